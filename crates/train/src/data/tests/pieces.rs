//! Parquet files, and what threads must not change: order, errors, interruption.

use super::super::file::fail;
use super::*;
use model::Progress;
use parquet::basic::{Compression, GzipLevel, ZstdLevel};
use parquet::data_type::{ByteArray, ByteArrayType, Int64Type};
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;
use std::sync::Arc;

const OPTIONAL: &str = "message m { REQUIRED INT64 id; OPTIONAL BYTE_ARRAY text (UTF8); }";
const REQUIRED: &str = "message m { REQUIRED INT64 id; REQUIRED BYTE_ARRAY text (UTF8); }";

/// Row groups of rows; `None` is a null.
fn parquet(schema: &str, groups: &[Vec<Option<Vec<u8>>>], compression: Compression) -> Vec<u8> {
    let schema = Arc::new(parse_message_type(schema).unwrap());
    let properties = Arc::new(WriterProperties::builder().set_compression(compression).build());
    let mut out = Vec::new();
    let mut writer = SerializedFileWriter::new(&mut out, schema, properties).unwrap();
    for rows in groups {
        let mut group = writer.next_row_group().unwrap();
        let ids: Vec<i64> = (0..).take(rows.len()).collect();
        let mut column = group.next_column().unwrap().unwrap();
        column.typed::<Int64Type>().write_batch(&ids, None, None).unwrap();
        column.close().unwrap();
        let levels: Vec<i16> = rows.iter().map(|row| i16::from(row.is_some())).collect();
        let values: Vec<ByteArray> = rows.iter().flatten().map(|row| ByteArray::from(row.clone())).collect();
        let mut column = group.next_column().unwrap().unwrap();
        column.typed::<ByteArrayType>().write_batch(&values, Some(&levels), None).unwrap();
        column.close().unwrap();
        group.close().unwrap();
    }
    writer.close().unwrap();
    out
}

fn rows(texts: &[&str]) -> Vec<Option<Vec<u8>>> {
    texts.iter().map(|text| Some(text.as_bytes().to_vec())).collect()
}

#[test]
fn parquet_holds_one_document_per_row() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("d.PARQUET");
    let many: Vec<String> = (0..700).map(|i| format!("row {i} ümläute {}", "x".repeat(i % 50))).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    let mut first = rows(&["one", ""]);
    first.extend([None, Some("two".into()), None]);
    for compression in [
        Compression::UNCOMPRESSED,
        Compression::SNAPPY,
        Compression::GZIP(GzipLevel::default()),
        Compression::ZSTD(ZstdLevel::default()),
    ] {
        fs::write(&path, parquet(OPTIONAL, &[first.clone(), rows(&many), rows(&["last"])], compression))
            .unwrap();
        let found: Vec<String> = read(&path).unwrap().iter().map(text_of).collect();
        let expected = [&["one", "two"][..], &many, &["last"]].concat();
        assert!(found == expected, "{compression}");
        fs::write(&path, parquet(REQUIRED, &[rows(&many)], compression)).unwrap();
        assert!(read(&path).unwrap().iter().map(text_of).eq(many.iter().copied()), "{compression}");
    }
    // More than a chunk of it.
    let long = "word ".repeat(1 << 19);
    fs::write(&path, parquet(REQUIRED, &[rows(&[&long, "short"])], Compression::SNAPPY)).unwrap();
    assert!(read(&path).unwrap().iter().map(text_of).eq([long.as_str(), "short"]));
}

#[test]
fn unusable_parquet_files_say_why() {
    let dir = tempfile::tempdir().unwrap();
    let plain = Compression::UNCOMPRESSED;
    let good = parquet(REQUIRED, &[rows(&["one", "two"])], plain);
    let of = |schema: &str, row: &[u8]| parquet(schema, &[vec![Some(row.to_vec())]], plain);
    let mut broken = good.clone();
    let value = good.windows(3).position(|w| w == b"one").unwrap();
    broken[value - 24..value].fill(0xff);
    for (name, content, expected) in [
        ("cut.parquet", good[..good.len() - 20].to_vec(), "malformed parquet"),
        ("head.parquet", good[..6].to_vec(), "malformed parquet"),
        ("text.parquet", b"just words, and no columns".to_vec(), "malformed parquet"),
        ("broken.parquet", broken, "malformed parquet"),
        (
            "none.parquet",
            of("message m { REQUIRED INT64 id; REQUIRED BYTE_ARRAY body (UTF8); }", b"x"),
            "no column `text`, only id, body\nhint: ",
        ),
        (
            "bytes.parquet",
            of("message m { REQUIRED INT64 id; REQUIRED BYTE_ARRAY text; }", b"x"),
            "does not hold strings\nhint: ",
        ),
        ("utf8.parquet", of(REQUIRED, b"a\xffb"), "row 1: `text` is not UTF-8"),
        ("nulls.parquet", parquet(OPTIONAL, &[vec![None, None]], plain), "no text"),
        ("empty.parquet", parquet(OPTIONAL, &[], plain), "no text"),
        ("packed.parquet.gz", gzip(&good), "cannot be read\nhint: unpack it"),
    ] {
        let path = dir.path().join(name);
        fs::write(&path, content).unwrap();
        let error = read(&path).unwrap_err().to_string();
        assert!(error.contains(expected) && error.contains(name), "{name}: {error}");
    }
    let path = dir.path().join("a.parquet");
    let schema = "message m { REQUIRED INT64 id; REQUIRED INT64 text; }";
    let schema = Arc::new(parse_message_type(schema).unwrap());
    SerializedFileWriter::new(fs::File::create(&path).unwrap(), schema, Arc::default())
        .unwrap()
        .close()
        .unwrap();
    assert!(read(&path).unwrap_err().to_string().contains("does not hold strings"));
}

#[test]
fn cut_parquet_files_are_errors_wherever_the_cut() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("c.parquet");
    let good = parquet(OPTIONAL, &[rows(&["one", "two"]), rows(&["three"])], Compression::SNAPPY);
    for len in 0..good.len() {
        fs::write(&path, &good[..len]).unwrap();
        assert!(read(&path).is_err(), "{len} of {} bytes", good.len());
    }
}

#[test]
fn no_wrong_byte_of_a_parquet_file_ends_the_program() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("w.parquet");
    let good = parquet(OPTIONAL, &[rows(&["one", "two"])], Compression::UNCOMPRESSED);
    let mut refused = 0;
    for at in 0..good.len() {
        for wrong in [0, good[at] ^ 1, 0x7f, 0xff] {
            let mut bytes = good.clone();
            bytes[at] = wrong;
            fs::write(&path, bytes).unwrap();
            match read(&path) {
                Ok(documents) => assert!(!documents.is_empty()),
                Err(error) => {
                    assert!(error.to_string().contains("w.parquet"), "{error}");
                    refused += 1;
                }
            }
        }
    }
    assert!(refused > good.len() / 4, "{refused}");
}

#[test]
fn any_number_of_threads_gives_the_same_documents() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("d.jsonl");
    let lines: Vec<String> =
        (0..3000).map(|i| format!("{{\"text\": \"{i} {}\"}}\n", "y".repeat(i * 7 % 3001))).collect();
    fs::write(&path, lines.concat()).unwrap();
    let expected = read_with(&Exec::new(1).unwrap(), &path, Some(&bytes), &mut Silent).unwrap();
    assert_eq!(expected.len(), 3000);
    assert!((0..3000).all(|i| text_of(&expected[i]).starts_with(&format!("{i} "))));
    for threads in [2, 3] {
        let found = read_with(&Exec::new(threads).unwrap(), &path, Some(&bytes), &mut Silent).unwrap();
        assert!(found == expected, "{threads} threads");
    }
}

#[test]
fn the_first_error_of_a_file_is_reported() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("e.jsonl");
    fs::write(&path, "{\"text\": \"good\"}\n{\"text\": \"bad 1\"}\n{\"text\": \"bad 2\"}\nno JSON\n")
        .unwrap();
    let refuse = |text: &str| match text.starts_with("bad") {
        true => Err(fail(Path::new("tokenizer"), text.into())),
        false => bytes(text),
    };
    let error = read_with(&exec(), &path, Some(&refuse), &mut Silent).unwrap_err().to_string();
    assert!(error.contains("bad 1"), "{error}");
    let error = read(&path).unwrap_err().to_string();
    assert!(error.contains("line 4") && error.contains("e.jsonl"), "{error}");
}

/// Cancels once something was read.
#[derive(Default)]
struct StopSoon {
    bytes: u64,
}

impl Progress for StopSoon {
    fn advance(&mut self, n: u64, _: &str) {
        self.bytes += n;
    }
    fn cancelled(&self) -> bool {
        self.bytes > 0
    }
}

#[test]
fn an_interruption_ends_reading() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("long.txt");
    let text = "some words\n".repeat(2 << 20);
    fs::write(&path, &text).unwrap();
    let mut progress = StopSoon::default();
    let result = read_with(&exec(), &path, Some(&bytes), &mut progress);
    assert!(matches!(result, Err(TrainError::Interrupted)));
    assert!(progress.bytes < text.len() as u64 / 2, "{} bytes", progress.bytes);
}
