//! Read-only memory mapping of whole files: the crate's one place with `unsafe`. Knows no format.

use crate::error::{Result, WeightsError};
use std::fs::File;
use std::ops::Deref;
use std::path::Path;

/// The bytes of a file, mapped; an empty file has no mapping.
#[derive(Debug)]
pub struct MappedFile(Option<memmap2::Mmap>);

impl MappedFile {
    /// Maps `path` read-only. The file must not be truncated by another process while the mapping lives.
    ///
    /// # Errors
    /// [`WeightsError::Io`] when the file cannot be opened or mapped.
    pub fn open(path: &Path) -> Result<Self> {
        let io = WeightsError::io(path);
        let file = File::open(path).map_err(&io)?;
        let metadata = file.metadata().map_err(&io)?;
        if !metadata.is_file() {
            return Err(io(std::io::Error::new(std::io::ErrorKind::InvalidInput, "not a regular file")));
        }
        if metadata.len() == 0 {
            return Ok(Self(None));
        }
        // SAFETY: the mapping is read-only, of a regular nonempty file (both checked above), and lives as long as
        // `Mmap`. Bytes are only ever read as `u8`, for which every bit pattern is valid. This crate never writes to a
        // file it may have mapped: all its writers make a new file and rename it (see `files`), which leaves mappings of
        // the old one intact. What remains is another program truncating the file, as for every user of mmap.
        let map = unsafe { memmap2::Mmap::map(&file) }.map_err(&io)?;
        Ok(Self(Some(map)))
    }
}

impl Deref for MappedFile {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.0.as_deref().unwrap_or(&[])
    }
}
