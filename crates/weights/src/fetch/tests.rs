use super::*;
use std::io::Write;

fn variables<'a>(set: &'a [(&'a str, &'a str)]) -> impl Fn(&str) -> Option<OsString> + 'a {
    move |name| set.iter().find(|(n, _)| *n == name).map(|(_, v)| OsString::from(v))
}

#[test]
fn the_cache_folder_follows_the_environment() {
    let cache = |set: &[(&str, &str)]| Cache::from_variables(variables(set)).map(|c| c.path().to_path_buf());
    assert_eq!(cache(&[("HOME", "/h")]).unwrap(), Path::new("/h/.cache/recurformer"));
    assert_eq!(cache(&[("HOME", "/h"), ("XDG_CACHE_HOME", "/x")]).unwrap(), Path::new("/x/recurformer"));
    assert_eq!(
        cache(&[("HOME", "/h"), ("XDG_CACHE_HOME", "x")]).unwrap(),
        Path::new("/h/.cache/recurformer")
    );
    assert_eq!(cache(&[("HOME", "/h"), ("RECURFORMER_CACHE", "/r")]).unwrap(), Path::new("/r"));
    assert_eq!(
        cache(&[("HOME", "/h"), ("RECURFORMER_CACHE", "")]).unwrap(),
        Path::new("/h/.cache/recurformer")
    );
    assert!(cache(&[]).unwrap_err().to_string().contains("RECURFORMER_CACHE"));
}

#[test]
fn a_cache_folder_appears_whole_or_not_at_all() {
    let dir = tempfile::tempdir().unwrap();
    let cache = Cache::at(dir.path().join("c"));
    let fail = cache.folder("a/b", |out| {
        fs::write(out.join("half"), "x").unwrap();
        Err(WeightsError::Tokenizer("stop".into()))
    });
    assert!(fail.is_err() && !cache.path().join("a/b").exists());
    let made =
        cache.folder("a/b", |out| fs::write(out.join("f"), "1").map_err(WeightsError::io(out))).unwrap();
    assert_eq!(fs::read_to_string(made.join("f")).unwrap(), "1");
    assert_eq!(cache.folder("a/b", |_| panic!("it is there")).unwrap(), made);
    let left: Vec<_> = fs::read_dir(cache.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left, ["a"]);
}

#[test]
fn concurrent_fills_agree() {
    let dir = tempfile::tempdir().unwrap();
    let cache = Cache::at(dir.path());
    let barrier = std::sync::Barrier::new(4);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let fill = |out: &Path| {
                    barrier.wait();
                    fs::write(out.join("f"), "same").map_err(WeightsError::io(out))
                };
                let folder = cache.folder("x", fill).unwrap();
                assert_eq!(fs::read_to_string(folder.join("f")).unwrap(), "same");
            });
        }
    });
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
}

/// A tar.gz of raw headers, so that hostile paths are not refused by the writer.
fn tgz(path: &Path, entries: &[(&str, tar::EntryType, &[u8])]) {
    let mut tar = Vec::new();
    for (name, kind, data) in entries {
        let mut header = tar::Header::new_gnu();
        header.as_mut_bytes()[..name.len()].copy_from_slice(name.as_bytes());
        header.set_entry_type(*kind);
        header.set_size(data.len() as u64);
        header.set_mode(0o644);
        if kind.is_symlink() {
            header.set_link_name("/etc/passwd").unwrap();
        }
        header.set_cksum();
        tar.extend_from_slice(header.as_bytes());
        tar.extend_from_slice(data);
        tar.resize(tar.len().next_multiple_of(512), 0);
    }
    tar.resize(tar.len() + 1024, 0);
    let mut gz = flate2::write::GzEncoder::new(File::create(path).unwrap(), flate2::Compression::fast());
    gz.write_all(&tar).unwrap();
    gz.finish().unwrap();
}

#[test]
fn tarballs_unpack_without_their_top_folder() {
    use tar::EntryType::{Directory, Regular};
    let dir = tempfile::tempdir().unwrap();
    let (archive, out) = (dir.path().join("a.tgz"), dir.path().join("out"));
    tgz(
        &archive,
        &[("package/", Directory, b""), ("package/a", Regular, b"1"), ("./package/b/c.txt", Regular, b"22")],
    );
    unpack_tgz(&archive, &out).unwrap();
    assert_eq!(fs::read(out.join("a")).unwrap(), b"1");
    assert_eq!(fs::read(out.join("b/c.txt")).unwrap(), b"22");
}

#[test]
fn hostile_tarballs_write_nothing_outside() {
    use tar::EntryType::{Char, Link, Regular, Symlink};
    let dir = tempfile::tempdir().unwrap();
    let (archive, out) = (dir.path().join("a.tgz"), dir.path().join("in/out"));
    fs::create_dir_all(&out).unwrap();
    for (name, kind) in [
        ("package/../../evil", Regular),
        ("../evil", Regular),
        ("/tmp/evil-recurformer", Regular),
        ("package/..\\evil", Regular),
        ("evil", Regular),
        ("package/link", Symlink),
        ("package/link", Link),
        ("package/dev", Char),
    ] {
        tgz(&archive, &[(name, kind, b"")]);
        let error = unpack_tgz(&archive, &out).unwrap_err();
        assert!(matches!(error, WeightsError::Malformed { .. }), "{name}: {error}");
    }
    assert_eq!(fs::read_dir(&out).unwrap().count(), 0);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
    fs::write(&archive, b"not gzip").unwrap();
    assert!(matches!(unpack_tgz(&archive, &out), Err(WeightsError::Malformed { .. })));
}

#[test]
fn zip_entries_come_out() {
    let dir = tempfile::tempdir().unwrap();
    let archive = dir.path().join("a.zip");
    let mut zip = zip::ZipWriter::new(File::create(&archive).unwrap());
    zip.start_file("m/x.bin", zip::write::SimpleFileOptions::default()).unwrap();
    zip.write_all(&[7; 1000]).unwrap();
    zip.finish().unwrap();
    let out = dir.path().join("x");
    unzip_entry(&archive, "m/x.bin", &out).unwrap();
    assert_eq!(fs::read(&out).unwrap(), [7; 1000]);
    assert!(unzip_entry(&archive, "m/y.bin", &out).unwrap_err().to_string().contains("m/y.bin"));
    fs::write(&archive, "no").unwrap();
    assert!(unzip_entry(&archive, "m/x.bin", &out).is_err());
}

#[test]
fn checksums_and_missing_clients_are_explained() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("f.whl");
    fs::write(&file, "abc").unwrap();
    let abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
    assert_eq!(sha256_of(&file).unwrap(), abc);
    check_sha256(&file, abc, "f").unwrap();
    assert!(check_sha256(&file, "00", "f").unwrap_err().to_string().contains("SHA-256"));
    let error =
        run(&[&["recurformer-no-such-client"]], &[], dir.path(), "p", "do this").unwrap_err().to_string();
    assert!(error.contains("not installed") && error.contains("hint: do this"), "{error}");
    assert_eq!(only_file(dir.path(), "whl", "p", "").unwrap(), file);
    assert!(only_file(dir.path(), "tgz", "p", "").is_err());
}

#[cfg(unix)]
#[test]
fn a_clients_failure_is_quoted_and_the_next_one_tried_without_pip() {
    let dir = tempfile::tempdir().unwrap();
    let fails: &[&str] = &["sh", "-c", "echo 'ERROR: no such version' >&2; exit 1"];
    let bare: &[&str] = &["sh", "-c", "echo 'python: No module named pip' >&2; exit 1"];
    let works: &[&str] = &["sh", "-c", "echo > done"];
    let error = run(&[bare, fails, works], &[], dir.path(), "p", "h").unwrap_err().to_string();
    assert!(error.contains("no such version") && !dir.path().join("done").exists(), "{error}");
    run(&[bare, works], &[], dir.path(), "p", "h").unwrap();
    assert!(dir.path().join("done").exists());
}
