use super::*;

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn files_are_replaced_whole() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("f");
    atomic_write(&path, b"one").unwrap();
    let mut file = AtomicFile::create(&path).unwrap();
    file.file().write_all(b"half").unwrap();
    drop(file);
    assert_eq!(fs::read(&path).unwrap(), b"one");
    atomic_write(&path, b"two").unwrap();
    assert_eq!(
        (fs::read(&path).unwrap().as_slice(), names(dir.path())),
        (b"two".as_slice(), vec!["f".to_string()])
    );
    assert!(atomic_write(&dir.path().join("no/f"), b"").is_err());
    assert!(atomic_write(dir.path(), b"").is_err());
}

#[test]
fn folders_appear_whole_and_full_ones_are_kept() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("deep/out");
    let build = |existing| {
        let built = atomic_dir(&out, existing)?;
        fs::write(built.path().join("new"), "").unwrap();
        Ok::<_, WeightsError>(built)
    };
    drop(build(Existing::Refuse).unwrap());
    assert!(names(&dir.path().join("deep")).is_empty());
    fs::create_dir(&out).unwrap();
    build(Existing::Refuse).unwrap().commit().unwrap();
    assert_eq!(names(&out), ["new"]);
    assert!(build(Existing::Refuse).err().unwrap().to_string().contains("not empty"));
    fs::write(out.join("old"), "").unwrap();
    build(Existing::Replace).unwrap().commit().unwrap();
    assert_eq!(
        (names(&out), names(&dir.path().join("deep"))),
        (vec!["new".to_string()], vec!["out".to_string()])
    );
    let file = dir.path().join("file");
    fs::write(&file, "").unwrap();
    assert!(atomic_dir(&file, Existing::Replace).err().unwrap().to_string().contains("not a folder"));
}

#[test]
fn a_folder_filled_meanwhile_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let built = atomic_dir(&out, Existing::Refuse).unwrap();
    fs::create_dir(&out).unwrap();
    fs::write(out.join("theirs"), "").unwrap();
    assert!(built.commit().is_err());
    assert_eq!((names(&out), names(dir.path())), (vec!["theirs".to_string()], vec!["out".to_string()]));
}

/// Set in the process that `a_full_disk_leaves_nothing` starts under a file-size limit.
#[cfg(unix)]
const LIMITED: &str = "RECURFORMER_TEST_FULL_DISK";

/// A file-size limit fails writes in the middle, as a full disk does.
#[cfg(unix)]
#[test]
fn a_full_disk_leaves_nothing() {
    if let Some(dir) = std::env::var_os(LIMITED) {
        let path = Path::new(&dir).join("big.safetensors");
        let values = vec![0.0; 1 << 20];
        let tensors = [("w", [1usize << 20].as_slice(), values.as_slice())];
        let error = crate::safetensors::write_f32(&path, &tensors, &Default::default()).unwrap_err();
        assert!(matches!(error, WeightsError::Io { .. }), "{error}");
        assert!(error.to_string().contains("big.safetensors"), "{error}");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let binary = std::env::current_exe().unwrap();
    let status = std::process::Command::new("sh")
        .args([
            "-c",
            "trap '' XFSZ; ulimit -f 64; exec \"$0\" --exact files::tests::a_full_disk_leaves_nothing",
        ])
        .arg(binary)
        .env(LIMITED, dir.path())
        .stdout(std::process::Stdio::null())
        .status()
        .unwrap();
    assert!(status.success());
    assert!(names(dir.path()).is_empty());
}

#[test]
fn only_temporaries_of_the_same_target_are_stale() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    // As a kill leaves them.
    std::mem::forget(AtomicFile::create(&out).unwrap());
    let built = atomic_dir(&out, Existing::Refuse).unwrap();
    fs::write(built.path().join("half"), "").unwrap();
    std::mem::forget(built);
    assert_eq!(names(dir.path()).len(), 2);
    let others = [
        ".out.tmp-",
        ".out.tmp-abc",
        ".out.tmp-abcd-f",
        ".out.tmp-abcdefg",
        ".out2.tmp-abcdef",
        "out.tmp-abcdef",
        "out",
    ];
    others.iter().for_each(|name| fs::write(dir.path().join(name), "").unwrap());
    remove_stale(&out).unwrap();
    let mut expected = others.map(String::from);
    expected.sort();
    assert_eq!(names(dir.path()), expected);
    remove_stale(&dir.path().join("missing/out")).unwrap();
}

#[test]
fn folders_move_whole_and_overwrite_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (from, to) = (dir.path().join("from"), dir.path().join("deep/to"));
    fs::create_dir(&from).unwrap();
    fs::write(from.join("f"), "1").unwrap();
    move_dir(&from, &to).unwrap();
    assert!(!from.exists() && fs::read(to.join("f")).unwrap() == b"1");
    fs::create_dir(&from).unwrap();
    assert!(move_dir(&from, &to).is_err() && from.exists() && to.join("f").exists());
    assert!(move_dir(&dir.path().join("no"), &dir.path().join("other")).is_err());
}
