use super::*;
use proptest::prelude::*;
use std::fs;

fn file(header: &str, data: &[u8]) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.extend_from_slice(data);
    bytes
}

fn error(header: &str, data: &[u8]) -> String {
    parse(&file(header, data)).unwrap_err().to_string()
}

#[test]
fn a_good_file_parses() {
    let header = r#"{"__metadata__":{"format":"pt"},"b":{"dtype":"F32","shape":[1],"data_offsets":[4,8]},
        "a":{"dtype":"F16","shape":[2,1],"data_offsets":[0,4]},"c":{"dtype":"BF16","shape":[0],"data_offsets":[8,8]}}"#;
    let (infos, metadata) = parse(&file(header, &[0; 8])).unwrap();
    assert_eq!(infos.iter().map(|i| i.name.as_str()).collect::<Vec<_>>(), ["a", "b", "c"]);
    assert_eq!((infos[0].values(), infos[2].values(), metadata["format"].as_str()), (2, 0, "pt"));
    assert!(parse(&file("{}  ", &[])).unwrap().0.is_empty());
}

#[test]
fn truncated_files_are_malformed() {
    let good = file(r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#, &[0; 8]);
    parse(&good).unwrap();
    for length in 0..good.len() {
        assert!(matches!(parse(&good[..length]), Err(WeightsError::Malformed { .. })), "{length} bytes");
    }
}

#[test]
fn header_longer_than_the_file_is_malformed() {
    for length in [9, 1 << 20, u64::MAX, u64::MAX - 7] {
        let mut bytes = length.to_le_bytes().to_vec();
        bytes.extend_from_slice(b"{}      ");
        assert!(parse(&bytes).unwrap_err().to_string().contains("header"));
    }
}

#[test]
fn hostile_offsets_and_sizes_are_named() {
    let one = |rest: &str| format!(r#"{{"a":{{{rest}}}}}"#);
    for (header, word) in [
        (one(r#""dtype":"F32","shape":[2],"data_offsets":[0,16]"#), "0..16"),
        (one(r#""dtype":"F32","shape":[2],"data_offsets":[8,0]"#), "8..0"),
        (one(r#""dtype":"F32","shape":[3],"data_offsets":[0,8]"#), "needs 12"),
        (one(r#""dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,8]"#), "overflows"),
        (one(r#""dtype":"F32","shape":[4611686018427387905],"data_offsets":[0,8]"#), "overflows"),
        (one(r#""dtype":"I64","shape":[1],"data_offsets":[0,8]"#), "I64"),
        (one(r#""dtype":"F32","shape":[1],"data_offsets":[4,8]"#), "gap"),
        (one(r#""dtype":"F32","shape":[1],"data_offsets":[0,4]"#), "end at 4"),
        (one(r#""dtype":"F32","shape":[-1],"data_offsets":[0,4]"#), "header"),
        (one(r#""dtype":"F32","shape":[1]"#), "data_offsets"),
        ("[]".to_string(), "header"),
        ("{".to_string(), "header"),
        (
            r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}"#
                .to_string(),
            "overlaps",
        ),
        (
            r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#
                .to_string(),
            "twice",
        ),
    ] {
        let message = error(&header, &[0; 8]);
        assert!(message.contains(word), "{header}: {message}");
    }
}

fn write_one(path: &Path, name: &str, values: &[f32]) {
    write_f32(path, &[(name, &[values.len()], values)], &Metadata::new()).unwrap();
}

#[test]
fn non_finite_weights_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("nan.safetensors");
    let header = r#"{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#;
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let data = [1f32.to_le_bytes(), bad.to_le_bytes()].concat();
        fs::write(&path, file(header, &data)).unwrap();
        let error = SafetensorsSource::open_file(&path).unwrap().read_f32("w").unwrap_err();
        assert!(matches!(error, WeightsError::NonFinite { index: 1, .. }), "{error}");
        assert!(read_all(&path).is_err());
    }
}

#[test]
fn shards_are_read_and_their_faults_named() {
    let dir = tempfile::tempdir().unwrap();
    write_one(&dir.path().join("one.safetensors"), "a", &[1.0, 2.0]);
    write_one(&dir.path().join("two.safetensors"), "b", &[3.0]);
    let index =
        |map: &str| fs::write(dir.path().join(INDEX_FILE), format!(r#"{{"weight_map":{map}}}"#)).unwrap();
    let error = || SafetensorsSource::open_dir(dir.path()).unwrap_err().to_string();
    index(r#"{"a":"one.safetensors","b":"two.safetensors"}"#);
    let source = SafetensorsSource::open_dir(dir.path()).unwrap();
    assert_eq!(source.read_f32("b").unwrap(), [3.0]);
    assert_eq!(source.infos().len(), 2);
    assert!(matches!(source.read_f32("c"), Err(WeightsError::MissingTensor { .. })));
    index(r#"{"a":"one.safetensors","b":"three.safetensors"}"#);
    assert!(error().contains("`three.safetensors` is missing"));
    index(r#"{"a":"two.safetensors","b":"two.safetensors"}"#);
    assert!(error().contains("`a` is not in shard"));
    for outside in ["../one.safetensors", "/etc/passwd", "sub/one.safetensors", "..", ""] {
        index(&format!(r#"{{"a":"{outside}"}}"#));
        assert!(error().contains("inside the folder"), "{outside}");
    }
    write_one(&dir.path().join("two.safetensors"), "a", &[3.0]);
    index(r#"{"a":"one.safetensors","b":"two.safetensors"}"#);
    assert!(error().contains("another shard") || error().contains("not in shard"));
    index("[]");
    assert!(error().contains("weight_map"));
    fs::remove_file(dir.path().join(INDEX_FILE)).unwrap();
    assert!(error().contains("neither"));
}

#[test]
fn the_writer_refuses_misuse_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("out.safetensors");
    let tensor = |name: &str, dtype| OutTensor { name: name.to_string(), dtype, shape: vec![2] };
    let create = |tensors: &[OutTensor]| SafetensorsWriter::create(&path, tensors, &Metadata::new());
    assert!(create(&[tensor("a", Dtype::F32), tensor("a", Dtype::F32)]).is_err());
    assert!(create(&[tensor("a", Dtype::Q8_0)]).is_err());
    let mut writer = create(&[tensor("a", Dtype::F16)]).unwrap();
    assert!(writer.write_f32("b", &[0.0; 2]).is_err());
    assert!(writer.write_f32("a", &[0.0; 3]).is_err());
    assert!(writer.write_raw("a", &[0; 8]).is_err());
    assert!(matches!(writer.write_f32("a", &[0.0, 1e6]), Err(WeightsError::NonFinite { index: 1, .. })));
    drop(writer);
    assert!(create(&[tensor("a", Dtype::F32)]).unwrap().finish().is_err());
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    assert!(write_f32(&dir.path().join("no/such/folder"), &[], &Metadata::new()).is_err());
}

#[test]
fn odd_halves_do_not_misalign_floats() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("out.safetensors");
    let tensors = [
        OutTensor { name: "h".into(), dtype: Dtype::BF16, shape: vec![3] },
        OutTensor { name: "f".into(), dtype: Dtype::F32, shape: vec![] },
    ];
    let mut writer = SafetensorsWriter::create(&path, &tensors, &Metadata::new()).unwrap();
    writer.write_f32("h", &[1.0, 2.0, -0.5]).unwrap();
    writer.write_f32("f", &[7.0]).unwrap();
    writer.finish().unwrap();
    let (read, _) = read_all(&path).unwrap();
    assert_eq!(read[0].name, "f");
    assert_eq!(
        (read[0].values.as_slice(), read[1].values.as_slice()),
        ([7.0].as_slice(), [1.0, 2.0, -0.5].as_slice())
    );
}

proptest! {
    #[test]
    fn f32_round_trips_bit_for_bit(
        lengths in prop::collection::vec(0usize..70, 0..6),
        seed in any::<u32>(),
        note in "[ -~é∀]{0,20}",
    ) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.safetensors");
        let tensors: Vec<(String, Vec<f32>)> = lengths.iter().enumerate().map(|(t, &n)| {
            let value = |i: usize| f32::from_bits((seed ^ (i as u32).wrapping_mul(2_654_435_761)) & 0xBFFF_FFFF);
            (format!("t\"{t}"), (0..n).map(value).collect())
        }).collect();
        let shapes: Vec<[usize; 2]> = lengths.iter().map(|&n| [n, 1]).collect();
        let out: Vec<(&str, &[usize], &[f32])> = tensors.iter().zip(&shapes)
            .map(|((name, values), shape)| (name.as_str(), shape.as_slice(), values.as_slice())).collect();
        let metadata = Metadata::from([("note".to_string(), note)]);
        write_f32(&path, &out, &metadata).unwrap();
        let (read, back) = read_all(&path).unwrap();
        prop_assert_eq!(back, metadata);
        prop_assert_eq!(read.len(), tensors.len());
        for (name, values) in &tensors {
            let tensor = read.iter().find(|t| &t.name == name).unwrap();
            let bits = |v: &[f32]| v.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            prop_assert_eq!(bits(&tensor.values), bits(values));
            prop_assert_eq!(&tensor.shape, &vec![values.len(), 1]);
        }
    }

    #[test]
    fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = parse(&bytes);
        let mut framed = (bytes.len() as u64).to_le_bytes().to_vec();
        framed.extend(bytes);
        let _ = parse(&framed);
    }
}
