//! Formats, splits and the stream, on files made here.

use super::file::read_with;
use super::text::cut_point;
use super::*;
use kernels::Exec;
use model::Silent;
use proptest::prelude::*;
use std::fs;
use std::io::Write;

mod pieces;

/// One token per byte, so that nothing can hide.
fn bytes(text: &str) -> Result<Vec<u32>> {
    Ok(text.bytes().map(u32::from).collect())
}

fn exec() -> Exec {
    Exec::new(2).unwrap()
}

fn read(path: &Path) -> Result<Vec<Document>> {
    read_with(&exec(), path, Some(&bytes), &mut Silent)
}

fn text_of(document: &Document) -> String {
    String::from_utf8(document.tokens.iter().map(|&t| t as u8).collect()).unwrap()
}

fn gzip(data: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(data).unwrap();
    encoder.finish().unwrap()
}

/// An `.npy` file, version 1.
fn npy(descr: &str, fortran: bool, shape: &str, data: &[u8]) -> Vec<u8> {
    let fortran = if fortran { "True" } else { "False" };
    let mut header = format!("{{'descr': '{descr}', 'fortran_order': {fortran}, 'shape': {shape}, }}");
    while !(10 + header.len() + 1).is_multiple_of(64) {
        header.push(' ');
    }
    header.push('\n');
    let mut out = b"\x93NUMPY\x01\x00".to_vec();
    out.extend((header.len() as u16).to_le_bytes());
    out.extend(header.as_bytes());
    out.extend(data);
    out
}

fn ids(values: &[i32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

#[test]
fn text_is_one_document_whatever_the_packing() {
    let dir = tempfile::tempdir().unwrap();
    let text = "One line.\n\nÜmläute — and more.\n";
    let two_parts = [gzip(&text.as_bytes()[..12]), gzip(&text.as_bytes()[12..])].concat();
    let two_frames =
        [&text.as_bytes()[..12], &text.as_bytes()[12..]].map(|p| zstd::encode_all(p, 1).unwrap()).concat();
    let files = [
        ("a.txt", text.as_bytes().to_vec()),
        ("a.txt.gz", gzip(text.as_bytes())),
        ("b.gz", two_parts),
        ("a.zst", zstd::encode_all(text.as_bytes(), 1).unwrap()),
        ("b.md.zst", two_frames),
        ("bom.txt", ["\u{feff}", text].concat().into_bytes()),
    ];
    for (name, content) in files {
        let path = dir.path().join(name);
        fs::write(&path, content).unwrap();
        let documents = read(&path).unwrap();
        assert_eq!(documents.len(), 1, "{name}");
        assert_eq!(text_of(&documents[0]), text, "{name}");
        assert_eq!(documents[0].source, path.display().to_string());
    }
}

#[test]
fn long_text_is_read_in_pieces_and_loses_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("long.txt");
    // No line break at all, one at every third word, and characters of several bytes at the seams.
    for separator in ["ä", "ö \n", " "] {
        let text = separator.repeat(3 << 20).split_at(3_000_002).0.to_string();
        fs::write(&path, &text).unwrap();
        assert!(text_of(&read(&path).unwrap()[0]) == text);
    }
}

#[test]
fn cuts_fall_where_tokens_end() {
    assert_eq!(cut_point("one\ntwo\n\nthree"), 4);
    assert_eq!(cut_point("one\n\ntwo\n"), 9);
    assert_eq!(cut_point("one two"), 4);
    assert_eq!(cut_point("onetwo"), 6);
    assert_eq!(cut_point(""), 0);
}

#[test]
fn invalid_utf8_is_named_by_its_offset() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("bad.txt");
    fs::write(&path, b"abc\xffdef").unwrap();
    assert!(read(&path).unwrap_err().to_string().contains("offset 3"));
    // In a later piece, and a character cut off by the end of the file.
    let mut long = "word ".repeat(1 << 19).into_bytes();
    let at = long.len();
    long.extend(b"\xe2\x82");
    fs::write(&path, &long).unwrap();
    assert!(read(&path).unwrap_err().to_string().contains(&format!("offset {at}")));
}

#[test]
fn jsonl_gives_a_document_per_line() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("d.jsonl");
    let long = "x".repeat(2 << 20);
    fs::write(&path, format!("{{\"text\": \"one\", \"id\": 3}}\r\n\n{{\"text\": \"{long}\"}}\n{{\"text\": \"\"}}\n{{\"text\": \"last\"}}")).unwrap();
    let documents = read(&path).unwrap();
    assert_eq!(documents.len(), 3);
    assert_eq!(text_of(&documents[0]), "one");
    assert!(text_of(&documents[1]) == long);
    assert_eq!(text_of(&documents[2]), "last");
    for (content, expected) in [
        ("{\"text\": \"a\"}\n{\"body\": \"b\"}\n", "line 2"),
        ("{\"text\": 4}\n", "line 1"),
        ("plain words\n", "line 1"),
    ] {
        fs::write(&path, content).unwrap();
        let error = read(&path).unwrap_err().to_string();
        assert!(error.contains(expected) && error.contains("`text`"), "{error}");
    }
}

#[test]
fn npy_holds_one_document_per_row() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("t.npy");
    fs::write(&path, npy("<i4", false, "(5,)", &ids(&[1, 2, 3, 4, 5]))).unwrap();
    let documents = read_file(&exec(), &path, None, &mut Silent).unwrap();
    assert_eq!(documents.iter().map(|d| d.tokens.clone()).collect::<Vec<_>>(), [[1, 2, 3, 4, 5]]);
    fs::write(&path, npy("<i4", false, "(2, 3)", &ids(&[1, 2, 3, 4, 5, 6]))).unwrap();
    let documents = read_file(&exec(), &path, None, &mut Silent).unwrap();
    assert_eq!(documents.iter().map(|d| d.tokens.clone()).collect::<Vec<_>>(), [[1, 2, 3], [4, 5, 6]]);
    assert!(check_vocab(&documents, 7).is_ok());
    let error = check_vocab(&documents, 6).unwrap_err().to_string();
    assert!(error.contains("token id 6") && error.contains("position 2"), "{error}");
}

#[test]
fn bad_npy_files_are_errors() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("t.npy");
    let data = ids(&[1, 2, 3, 4]);
    for (content, expected) in [
        (npy("<i8", false, "(2,)", &data), "int32"),
        (npy("<f4", false, "(4,)", &data), "int32"),
        (npy("<i4", false, "(1, 2, 2)", &data), "shape"),
        (npy("<i4", false, "()", &data[..4]), "shape"),
        (npy("<i4", true, "(2, 2)", &data), "Fortran"),
        (npy("<i4", false, "(9,)", &data), "malformed npy"),
        (npy("<i4", false, "(1000000000000, 1000000000000)", &data), "malformed npy"),
        (npy("<i4", false, "(1,)", &ids(&[-1])), "negative"),
        (npy("<i4", false, "(0,)", &[]), "no text"),
        (npy("<i4", false, "(3, 0)", &[]), "no text"),
        (b"\x93NUMPY\x01\x00\xff".to_vec(), "malformed npy"),
        (b"text".to_vec(), "malformed npy"),
    ] {
        fs::write(&path, content).unwrap();
        let error = read_file(&exec(), &path, None, &mut Silent).unwrap_err().to_string();
        assert!(error.contains(expected), "expected {expected}: {error}");
    }
}

#[test]
fn missing_empty_and_broken_files_are_errors() {
    let dir = tempfile::tempdir().unwrap();
    for (name, content, expected) in [
        ("empty.txt", vec![], "no text"),
        ("empty.jsonl", b"\n\n".to_vec(), "no text"),
        ("cut.gz", gzip(b"some text that goes on and on")[..15].to_vec(), "cannot be read"),
        ("not.gz", b"plain".to_vec(), "cannot be read"),
        ("not.zst", b"plain".to_vec(), "cannot be read"),
    ] {
        let path = dir.path().join(name);
        fs::write(&path, content).unwrap();
        let error = read(&path).unwrap_err().to_string();
        assert!(error.contains(expected) && error.contains(name), "{name}: {error}");
    }
    assert!(read(&dir.path().join("none.txt")).is_err());
    let path = dir.path().join("a.txt");
    fs::write(&path, "words").unwrap();
    assert!(read_file(&exec(), &path, None, &mut Silent).unwrap_err().to_string().contains("tokenizer"));
}

#[test]
fn data_arguments() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("self");
    fs::write(&path, "x").unwrap();
    assert_eq!(DataSource::parse(path.to_str().unwrap()).unwrap(), DataSource::File(path));
    assert_eq!(DataSource::parse("self").unwrap(), DataSource::SelfSampled);
    for text in BuiltIn::ALL {
        assert_eq!(DataSource::parse(text.name()).unwrap(), DataSource::BuiltIn(text));
    }
    let generated = DataSource::parse("retrieval:context=512").unwrap();
    assert!(matches!(generated, DataSource::Generated(Generated { context: 512, .. })));
    let error = DataSource::parse("hashhop:hop=2").unwrap_err().to_string();
    assert!(error.contains("hop=2") && error.contains("hint:"), "{error}");
    assert!(DataSource::parse("no/such/file").unwrap_err().to_string().contains("english-small"));
    assert!(DataSource::parse(dir.path().to_str().unwrap()).unwrap_err().to_string().contains("folder"));
}

fn documents(lengths: &[(&str, usize)]) -> Vec<Document> {
    let mut next = 0;
    lengths
        .iter()
        .map(|&(source, len)| {
            next += len as u32;
            Document { source: source.into(), tokens: (next - len as u32..next).collect() }
        })
        .collect()
}

#[test]
fn every_eighth_document_of_a_source_is_held_out() {
    let all = documents(&[("a", 1); 17].iter().chain(&[("b", 1); 8]).copied().collect::<Vec<_>>());
    let heldout = split(all.clone(), Split::Heldout);
    assert_eq!(heldout.iter().map(|d| d.tokens[0]).collect::<Vec<_>>(), [7, 15, 24]);
    assert_eq!(split(all, Split::Train).len(), 22);
}

#[test]
fn heldout_windows_are_consecutive_and_bounded() {
    let all = documents(&[("a", 10), ("b", 1), ("a", 7), ("c", 5)]);
    let cut = windows(&all, 4, 12);
    let lengths: Vec<(&str, Vec<usize>)> =
        cut.iter().map(|(n, w)| (n.as_str(), w.iter().map(Vec::len).collect())).collect();
    assert_eq!(lengths, [("a", vec![4, 4, 2, 2]), ("c", vec![4])]);
    assert_eq!(cut[0].1[1], [4, 5, 6, 7]);
}

#[test]
fn streams_need_enough_text() {
    assert!(SequenceStream::new(&[], 4, 0).is_err());
    assert!(
        SequenceStream::new(&documents(&[("a", 3), ("b", 3)]), 4, 0)
            .unwrap_err()
            .to_string()
            .contains("hint")
    );
    assert!(SequenceStream::new(&documents(&[("a", 9)]), 1, 0).is_err());
    // Short documents of one source share an item.
    let mut shared = SequenceStream::new(&documents(&[("a", 3), ("a", 3)]), 4, 0).unwrap();
    assert_eq!(shared.next_batch(1).rows(), 4);
}

#[test]
fn every_piece_of_an_item_is_a_sequence_of_its_own() {
    let all = documents(&[("a", 30), ("a", 21), ("a", 7), ("a", 128), ("a", 40), ("a", 1), ("a", 63)]);
    let mut stream = SequenceStream::new(&all, 64, 3).unwrap();
    let mut pieces: Vec<Vec<u32>> = Vec::new();
    for _ in 0..4 {
        // Two windows of the long document and two items of the others, 162 tokens.
        let batch = stream.next_batch(1);
        assert_eq!(batch.rows(), 64);
        pieces.extend(batch.iter().map(<[u32]>::to_vec));
    }
    let mut tokens: Vec<u32> = pieces.concat();
    tokens.sort_unstable();
    tokens.dedup();
    assert_eq!(tokens.len(), 4 * 64, "nothing twice");
    for piece in &pieces {
        let of = |token: &u32| all.iter().position(|d| d.tokens.contains(token)).unwrap();
        assert!(piece.iter().all(|t| of(t) == of(&piece[0])), "a piece of one document");
        assert!(piece.windows(2).all(|w| w[1] == w[0] + 1), "in its order");
        let whole = &all[of(&piece[0])].tokens;
        assert!(piece.len() == 64 || piece[0] == whole[0] || piece.len() >= 16, "no short rest: {piece:?}");
    }
    assert!(pieces.iter().any(|p| p.len() == 64) && pieces.iter().any(|p| p.len() < 64));
}

#[test]
fn short_rests_are_dropped_and_long_ones_begin_the_next_item() {
    // Of equal documents every order is the same. 24 = 19 + 5, and the rest of 14 is dropped; 60 = 40 + 20, and 20 are left.
    let lengths = |seq_len, len: usize, count| {
        let mut stream = SequenceStream::new(&documents(&vec![("a", len); count]), seq_len, 1).unwrap();
        let mut seen: Vec<Vec<usize>> =
            (0..2).map(|_| stream.next_batch(1).iter().map(<[u32]>::len).collect()).collect();
        seen.sort();
        seen
    };
    assert_eq!(lengths(24, 19, 4), [[19, 5], [19, 5]]);
    assert_eq!(lengths(60, 40, 3), [[20, 40], [40, 20]]);
}

#[test]
fn draws_are_counted_by_source() {
    let all = documents(&[("big", 1600), ("tiny", 9), ("small", 100)]);
    let mut stream = SequenceStream::new(&all, 10, 0).unwrap();
    stream.next_batch(100);
    let counted = [("big", 800), ("tiny", 0), ("small", 200)];
    assert!(stream.drawn().eq(counted));
    assert_eq!(stream.drawn_note(), "tokens by source: big 800, tiny 0, small 200");
    stream.next_batch(17);
    stream.skip_to(100);
    assert!(stream.drawn().eq(counted));
}

#[test]
fn one_epoch_covers_every_window_once() {
    let mut stream = SequenceStream::new(&documents(&[("a", 64), ("a", 128)]), 16, 5).unwrap();
    for _ in 0..3 {
        let mut seen: Vec<u32> = stream.next_batch(12).tokens().to_vec();
        seen.sort_unstable();
        assert_eq!(seen, (0..192).collect::<Vec<_>>());
    }
}

#[test]
fn sources_take_turns_by_the_root_of_their_size() {
    let mut stream = SequenceStream::new(&documents(&[("big", 1600), ("small", 100)]), 10, 0).unwrap();
    let small = (0..100).filter(|_| stream.next_batch(1).tokens()[0] >= 1600).count();
    assert_eq!(small, 20);
}

proptest! {
    #[test]
    fn a_stream_resumes_anywhere(
        lengths in prop::collection::vec((0..3_usize, 0..60_usize), 1..12),
        seq_len in 2..40_usize,
        seed in any::<u64>(),
        stop in 0..60_u64,
        more in 1..20_usize,
    ) {
        let names = ["a", "b", "c"];
        let all = documents(&lengths.iter().map(|&(s, n)| (names[s], n)).collect::<Vec<_>>());
        if let Ok(mut first) = SequenceStream::new(&all, seq_len, seed) {
            let mut other = SequenceStream::new(&all, seq_len, seed).unwrap();
            for _ in 0..stop {
                prop_assert_eq!(first.next_batch(1).rows(), seq_len);
            }
            prop_assert_eq!(first.position(), stop);
            // From the start, and from somewhere behind.
            other.skip_to(stop + 7);
            other.skip_to(stop);
            for _ in 0..more {
                prop_assert_eq!(first.next_batch(1), other.next_batch(1));
            }
        }
    }
}

#[test]
fn brown_tags_become_readable_text() {
    let tagged = "\n\n\tThe/at jury/nn said/vbd ``/`` no/at evidence/nn ''/'' ,/, and/cc left/vbd (/( early/rb )/) ./.\n\
        Why/wrb ?/. ?/.\n\n\n\t``/`` I/ppss own/vb and/or/cc rent/vb it/ppo ''/'' ?/. ?/.\n";
    let expected = "The jury said \"no evidence,\" and left (early). Why?\n\n\"I own and/or rent it?\"";
    assert_eq!(brown::plain_text(tagged), expected);
    assert_eq!(brown::plain_text("\n \n"), "");
}
