//! Tensors by name for the builder: a loaded model's parameters, or a checkpoint's files.

use super::build::Source;
use crate::error::{ModelError, Result};
use crate::params::ParamStore;
use kernels::quant::Dtype;
use weights::TensorSource;
use weights::stored::{RowOrder, StoredTensor};

impl Source for ParamStore {
    fn stored(&self, name: &str) -> Result<StoredTensor<'_>> {
        let param = self.id(name).map(|id| self.get(id)).ok_or_else(|| missing(name))?;
        let cols = param.shape.last().copied().unwrap_or(1);
        Ok(StoredTensor {
            dtype: Dtype::F32,
            rows: param.data().len() / cols.max(1),
            cols,
            bytes: bytemuck::cast_slice(param.data()),
            row_order: RowOrder::HuggingFace,
        })
    }

    fn values(&self, name: &str) -> Result<Vec<f32>> {
        self.id(name).map(|id| self.data(id).to_vec()).ok_or_else(|| missing(name))
    }
}

fn missing(name: &str) -> ModelError {
    ModelError::Param { name: name.into(), expected: Vec::new(), found: "nothing".into() }
}

/// The tensors of an opened checkpoint.
pub(super) struct Files<'a>(pub &'a dyn TensorSource);

impl Source for Files<'_> {
    fn stored(&self, name: &str) -> Result<StoredTensor<'_>> {
        Ok(self.0.stored(name)?)
    }

    fn values(&self, name: &str) -> Result<Vec<f32>> {
        Ok(self.0.read_f32(name)?)
    }
}
