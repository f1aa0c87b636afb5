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

    /// Announces that the whole file is about to be read once, in order. A hint: where the system has none, nothing happens.
    pub fn prefetch(&self) {
        #[cfg(unix)]
        if let Some(map) = &self.0 {
            // Hints may be refused without harm.
            let _ = map.advise(memmap2::Advice::Sequential);
            let _ = map.advise(memmap2::Advice::WillNeed);
        }
    }

    /// Drops the mapped pages from this process's memory; they come back from the file when touched.
    pub fn release(&self) {
        #[cfg(unix)]
        if let Some(map) = &self.0 {
            // SAFETY: `MADV_DONTNEED` may lose changes of private mappings only; this one is read-only and file-backed
            // (made in `open`), so that every page has the same content when it is read again.
            let _ = unsafe { map.unchecked_advise(memmap2::UncheckedAdvice::DontNeed) };
        }
    }
}

impl Deref for MappedFile {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.0.as_deref().unwrap_or(&[])
    }
}
