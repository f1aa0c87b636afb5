//! `.npy` files of token ids.

use super::file::fail;
use crate::error::Result;
use std::io::Read;
use std::path::Path;

/// A vector is one document, a matrix one per row.
pub(super) fn read_npy(path: &Path, input: Box<dyn Read>) -> Result<Vec<Vec<u32>>> {
    let bad = |reason: String| fail(path, format!("malformed npy: {reason}"));
    let file = npyz::NpyFile::new(input).map_err(|e| bad(e.to_string()))?;
    let shape: Vec<usize> = file.shape().iter().map(|&n| n as usize).collect();
    let row = match shape[..] {
        [n] | [_, n] => n,
        _ => {
            return Err(bad(format!(
                "expected a vector or a matrix of int32 token ids, found shape {shape:?}"
            )));
        }
    };
    if file.order() == npyz::Order::Fortran && shape.len() > 1 {
        return Err(bad("expected C order, found Fortran order".into()));
    }
    let values: usize = shape
        .iter()
        .try_fold(1_usize, |a, &n| a.checked_mul(n))
        .ok_or_else(|| bad(format!("shape {shape:?}")))?;
    let dtype = file.dtype().descr();
    let data =
        file.data::<i32>().map_err(|_| bad(format!("expected int32 token ids, found dtype {dtype}")))?;
    let mut ids = Vec::new();
    for value in data {
        let value = value.map_err(|e| bad(e.to_string()))?;
        ids.push(
            u32::try_from(value)
                .map_err(|_| bad(format!("token id {value} at index {} is negative", ids.len())))?,
        );
    }
    if ids.len() != values {
        return Err(bad(format!("expected {values} values, found {}", ids.len())));
    }
    Ok(ids.chunks(row.max(1)).map(<[u32]>::to_vec).collect())
}
