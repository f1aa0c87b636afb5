//! Files and folders that appear whole or not at all: written under a temporary name beside the target, then renamed.

use crate::error::{Result, WeightsError};
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use tempfile::{NamedTempFile, TempDir};

#[cfg(test)]
mod tests;

/// Reads a JSON file.
///
/// # Errors
/// [`WeightsError::Io`], or [`WeightsError::Malformed`] naming `format`.
pub fn read_json(path: &Path, format: &'static str) -> Result<serde_json::Value> {
    let mut bytes = Vec::new();
    File::open(path).and_then(|mut f| f.read_to_end(&mut bytes)).map_err(WeightsError::io(path))?;
    serde_json::from_slice(&bytes).map_err(|e| WeightsError::malformed(path, format, e.to_string()))
}

/// A file being written under a temporary name in the target's folder; dropped without [`commit`](Self::commit), it is removed.
pub struct AtomicFile {
    target: PathBuf,
    temp: NamedTempFile,
}

impl AtomicFile {
    /// Opens a temporary file beside `target`, whose folder must exist.
    ///
    /// # Errors
    /// [`WeightsError::Io`].
    pub fn create(target: &Path) -> Result<Self> {
        let temp = tempfile::Builder::new()
            .rand_bytes(TEMP_RANDOM)
            .prefix(&temp_prefix(target))
            .tempfile_in(parent(target))
            .map_err(WeightsError::io(target))?;
        Ok(Self { target: target.to_path_buf(), temp })
    }

    /// The file to write to.
    pub fn file(&mut self) -> &mut File {
        self.temp.as_file_mut()
    }

    /// Flushes to the disk and renames to the target, replacing a file of that name.
    ///
    /// # Errors
    /// [`WeightsError::Io`]; the temporary file is removed and the target untouched.
    pub fn commit(self) -> Result<()> {
        let io = WeightsError::io(&self.target);
        set_default_permissions(self.temp.as_file()).map_err(&io)?;
        self.temp.as_file().sync_all().map_err(&io)?;
        self.temp.persist(&self.target).map_err(|e| io(e.error))?;
        sync_dir(parent(&self.target)).map_err(&io)
    }
}

impl Write for AtomicFile {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.temp.write(bytes)
    }
    fn flush(&mut self) -> std::io::Result<()> {
        self.temp.flush()
    }
}

/// Writes `bytes` to `path` so that a reader sees the old content or the new, never a part.
///
/// # Errors
/// [`WeightsError::Io`] (a full disk, a missing folder); nothing is left behind.
pub fn atomic_write(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = AtomicFile::create(path)?;
    file.file().write_all(bytes).map_err(WeightsError::io(path))?;
    file.commit()
}

/// What to do with a target folder that exists and is not empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Existing {
    /// Refuse.
    Refuse,
    /// Replace it on commit.
    Replace,
}

/// A folder being built beside its target; dropped without [`commit`](Self::commit), it is removed.
pub struct AtomicDir {
    target: PathBuf,
    temp: TempDir,
    existing: Existing,
}

/// Starts building the folder `out`. Missing parents are made.
///
/// # Errors
/// [`WeightsError::Io`], also when `out` exists, is not an empty folder, and `existing` is [`Existing::Refuse`].
pub fn atomic_dir(out: &Path, existing: Existing) -> Result<AtomicDir> {
    check_target(out, existing)?;
    let parent = parent(out);
    fs::create_dir_all(parent).map_err(WeightsError::io(parent))?;
    let temp = tempfile::Builder::new()
        .rand_bytes(TEMP_RANDOM)
        .prefix(&temp_prefix(out))
        .tempdir_in(parent)
        .map_err(WeightsError::io(out))?;
    Ok(AtomicDir { target: out.to_path_buf(), temp, existing })
}

impl AtomicDir {
    /// Folder to write into.
    pub fn path(&self) -> &Path {
        self.temp.path()
    }

    /// Moves the folder to its target.
    ///
    /// # Errors
    /// [`WeightsError::Io`]; the built folder is removed and an existing target kept.
    pub fn commit(self) -> Result<()> {
        let io = WeightsError::io(&self.target);
        check_target(&self.target, self.existing)?;
        set_dir_permissions(self.temp.path()).map_err(&io)?;
        sync_dir(self.temp.path()).map_err(&io)?;
        let mut old = None;
        if self.target.exists() {
            let aside = tempfile::Builder::new()
                .rand_bytes(TEMP_RANDOM)
                .prefix(&temp_prefix(&self.target))
                .tempdir_in(parent(&self.target))
                .map_err(&io)?;
            fs::rename(&self.target, aside.path().join("old")).map_err(&io)?;
            old = Some(aside);
        }
        if let Err(error) = fs::rename(self.temp.path(), &self.target) {
            if let Some(aside) = &old {
                fs::rename(aside.path().join("old"), &self.target).map_err(&io)?;
            }
            return Err(io(error));
        }
        // The folder has moved away from under the guard: nothing is left for it to remove.
        let _ = self.temp.keep();
        sync_dir(parent(&self.target)).map_err(&io)
    }
}

/// Moves a complete folder to the name `to` on the same file system. Missing parents are made.
///
/// # Errors
/// [`WeightsError::Io`], also when `to` exists and is not an empty folder; `from` then stays where it is.
pub fn move_dir(from: &Path, to: &Path) -> Result<()> {
    check_target(to, Existing::Refuse)?;
    fs::create_dir_all(parent(to)).map_err(WeightsError::io(parent(to)))?;
    fs::rename(from, to).map_err(WeightsError::io(to))?;
    sync_dir(parent(from)).map_err(WeightsError::io(from))?;
    sync_dir(parent(to)).map_err(WeightsError::io(to))
}

/// Removes what processes killed in the middle of writing `target` left beside it: the temporary files and folders of exactly that
/// name. Only for the one who is about to write `target`; another writer of the same target would lose its work.
///
/// # Errors
/// [`WeightsError::Io`]; a folder that is missing holds nothing to remove.
pub fn remove_stale(target: &Path) -> Result<()> {
    let entries = match fs::read_dir(parent(target)) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        entries => entries.map_err(WeightsError::io(parent(target)))?,
    };
    let prefix = temp_prefix(target);
    for entry in entries {
        let path = entry.map_err(WeightsError::io(parent(target)))?.path();
        let name = path.file_name().unwrap_or_default().as_encoded_bytes();
        let random = name.strip_prefix(prefix.as_encoded_bytes()).unwrap_or_default();
        if random.len() == TEMP_RANDOM && random.iter().all(u8::is_ascii_alphanumeric) {
            let is_dir = fs::symlink_metadata(&path).is_ok_and(|m| m.is_dir());
            let removed = if is_dir { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
            removed.map_err(WeightsError::io(&path))?;
        }
    }
    Ok(())
}

fn check_target(out: &Path, existing: Existing) -> Result<()> {
    let io = WeightsError::io(out);
    let refuse =
        |what: &str| Err(io(std::io::Error::new(std::io::ErrorKind::AlreadyExists, what.to_string())));
    match fs::symlink_metadata(out) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(io(error)),
        Ok(metadata) if !metadata.is_dir() => refuse("exists and is not a folder"),
        Ok(_) if existing == Existing::Replace => Ok(()),
        Ok(_) if fs::read_dir(out).map_err(&io)?.next().is_none() => Ok(()),
        Ok(_) => refuse("the folder exists and is not empty"),
    }
}

fn parent(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Random characters after a temporary name's prefix.
const TEMP_RANDOM: usize = 6;

fn temp_prefix(path: &Path) -> std::ffi::OsString {
    let mut prefix = std::ffi::OsString::from(".");
    prefix.push(path.file_name().unwrap_or_default());
    prefix.push(".tmp-");
    prefix
}

/// Temporary files are made for their owner only; results get the usual permissions.
#[cfg(unix)]
fn set_default_permissions(file: &File) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    file.set_permissions(fs::Permissions::from_mode(0o644))
}

#[cfg(unix)]
fn set_dir_permissions(dir: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(dir, fs::Permissions::from_mode(0o755))
}

/// Makes a rename in `dir` durable.
#[cfg(unix)]
fn sync_dir(dir: &Path) -> std::io::Result<()> {
    File::open(dir)?.sync_all()
}

#[cfg(not(unix))]
fn set_default_permissions(_: &File) -> std::io::Result<()> {
    Ok(())
}

#[cfg(not(unix))]
fn set_dir_permissions(_: &Path) -> std::io::Result<()> {
    Ok(())
}

#[cfg(not(unix))]
fn sync_dir(_: &Path) -> std::io::Result<()> {
    Ok(())
}
