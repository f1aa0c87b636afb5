//! The header: 8 bytes of length, then JSON. Everything in it is checked against the file before use.

use super::Metadata;
use crate::config::unsupported;
use crate::error::{Result, WeightsError};
use crate::tensors::{Dtype, TensorInfo};
use serde::Deserialize;
use serde::de::{Deserializer, Error, MapAccess, Visitor};
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

/// Longest header accepted, as in the reference implementation.
const MAX_HEADER: usize = 100_000_000;
/// Bytes of the length field.
const LENGTH_BYTES: usize = 8;

pub(super) struct Header {
    /// In the order of their bytes.
    pub infos: Vec<TensorInfo>,
    /// Byte ranges in the file, one per tensor.
    pub ranges: Vec<Range<usize>>,
    pub metadata: Metadata,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: [usize; 2],
}

/// The JSON object with duplicate names refused, which a map would silently drop.
struct RawHeader {
    entries: BTreeMap<String, Entry>,
    metadata: Metadata,
}

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Names;
        impl<'de> Visitor<'de> for Names {
            type Value = RawHeader;
            fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
                f.write_str("an object of tensors")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<RawHeader, A::Error> {
                let mut entries = BTreeMap::new();
                let mut metadata = None;
                while let Some(name) = map.next_key::<String>()? {
                    let duplicate = if name == "__metadata__" {
                        metadata.replace(map.next_value::<Option<Metadata>>()?).is_some()
                    } else {
                        let entry = map.next_value::<Entry>()?;
                        entries.insert(name.clone(), entry).is_some()
                    };
                    if duplicate {
                        return Err(A::Error::custom(format!("the name `{name}` occurs twice")));
                    }
                }
                Ok(RawHeader { entries, metadata: metadata.flatten().unwrap_or_default() })
            }
        }
        deserializer.deserialize_map(Names)
    }
}

pub(super) fn parse(bytes: &[u8], path: &Path) -> Result<Header> {
    let bad = |reason: String| WeightsError::malformed(path, "safetensors", reason);
    let Some((length, rest)) = bytes.split_first_chunk::<LENGTH_BYTES>() else {
        return Err(bad(format!("the file has {} bytes, expected at least {LENGTH_BYTES}", bytes.len())));
    };
    let length = u64::from_le_bytes(*length);
    let header = usize::try_from(length)
        .ok()
        .filter(|&length| length <= MAX_HEADER)
        .ok_or_else(|| {
            bad(format!("the header is said to have {length} bytes, expected at most {MAX_HEADER}"))
        })
        .and_then(|length| {
            rest.get(..length).ok_or_else(|| {
                bad(format!("the header is said to have {length} bytes, but only {} follow", rest.len()))
            })
        })?;
    let data_start = LENGTH_BYTES + header.len();
    let data_bytes = bytes.len() - data_start;
    let raw: RawHeader = serde_json::from_slice(header).map_err(|e| bad(format!("header: {e}")))?;
    let mut entries: Vec<(String, Entry)> = raw.entries.into_iter().collect();
    entries.sort_by_key(|(_, entry)| entry.data_offsets);
    let mut end = 0;
    let (mut infos, mut ranges) = (Vec::new(), Vec::new());
    for (name, Entry { dtype, shape, data_offsets: [from, to] }) in entries {
        let dtype = match dtype.as_str() {
            "F32" => Dtype::F32,
            "F16" => Dtype::F16,
            "BF16" => Dtype::BF16,
            other => {
                return Err(unsupported(format!(
                    "tensor `{name}` in {} has element type {other}; supported are F32, F16 and BF16",
                    path.display()
                )));
            }
        };
        if from > to || to > data_bytes {
            return Err(bad(format!(
                "tensor `{name}` has offsets {from}..{to}, expected a range within the {data_bytes} bytes of data"
            )));
        }
        if from != end {
            let what = if from < end { "overlaps the tensor before it" } else { "leaves a gap before it" };
            return Err(bad(format!("tensor `{name}` starts at {from}, expected {end}: it {what}")));
        }
        let size = shape
            .iter()
            .try_fold(1usize, |n, &d| n.checked_mul(d))
            .and_then(|n| n.checked_mul(dtype.block().1))
            .ok_or_else(|| bad(format!("the size of tensor `{name}` with shape {shape:?} overflows")))?;
        if size != to - from {
            return Err(bad(format!(
                "tensor `{name}` of type {} and shape {shape:?} needs {size} bytes, but its offsets span {}",
                dtype.name(),
                to - from
            )));
        }
        end = to;
        infos.push(TensorInfo { name, shape, dtype, bytes: size });
        ranges.push(data_start + from..data_start + to);
    }
    if end != data_bytes {
        return Err(bad(format!(
            "the tensors end at {end}, but {data_bytes} bytes of data follow the header"
        )));
    }
    Ok(Header { infos, ranges, metadata: raw.metadata })
}
