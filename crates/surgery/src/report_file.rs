//! Reports as versioned JSON files: checked when they come in and before they go out.

use crate::error::{Result, SurgeryError};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::path::Path;
use weights::files::{atomic_write, read_json};

/// What a report says is wrong with it.
pub(crate) type Checked = std::result::Result<(), String>;

/// Reads the file `name` of this version.
///
/// # Errors
/// [`SurgeryError::Weights`] when it cannot be read, [`SurgeryError::File`] when it is malformed, of another version, or fails the check.
pub(crate) fn read<T: DeserializeOwned>(
    path: &Path,
    (name, version): (&'static str, u32),
    check: impl Fn(&T) -> Checked,
) -> Result<T> {
    let bad = |reason: String| SurgeryError::File { path: path.to_path_buf(), reason };
    let json = read_json(path, name)?;
    let found = json.get("version").and_then(serde_json::Value::as_u64);
    if found != Some(u64::from(version)) {
        let found = found.map_or("none".to_string(), |v| v.to_string());
        return Err(bad(format!("{name} has version {found}, expected {version}")));
    }
    let report = serde_json::from_value(json).map_err(|e| bad(format!("malformed {name}: {e}")))?;
    check(&report).map_err(bad)?;
    Ok(report)
}

/// Writes it atomically, as indented JSON.
///
/// # Errors
/// [`SurgeryError::File`] when it fails the check, [`SurgeryError::Weights`] when the file cannot be written.
pub(crate) fn write<T: Serialize>(path: &Path, report: &T, check: impl Fn(&T) -> Checked) -> Result<()> {
    let bad = |reason: String| SurgeryError::File { path: path.to_path_buf(), reason };
    check(report).map_err(bad)?;
    let json = serde_json::to_vec_pretty(report).map_err(|e| bad(e.to_string()))?;
    Ok(atomic_write(path, &json)?)
}
