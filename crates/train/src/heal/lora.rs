//! Low-rank updates as a reparametrisation: `W = W₀ + s·B·A` (LoRA, arXiv 2106.09685). The model only ever sees W; its gradient gives those of A
//! and B, and saving the model merges them.

use kernels::{Exec, MatMut, MatRef, Store, Trans, gemm};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// `s`, the customary α/r with α = 2r.
pub(super) const SCALE: f32 = 2.0;

/// Suffixes of the parameters that get an update.
pub(super) const TARGETS: [&str; 4] =
    ["self_attn.o_proj.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"];

/// The factors of one matrix `[rows, cols]`, or their gradients.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Factors {
    pub rank: usize,
    pub rows: usize,
    pub cols: usize,
    /// `[rank, cols]`.
    pub a: Vec<f32>,
    /// `[rows, rank]`.
    pub b: Vec<f32>,
}

impl Factors {
    pub fn zeros(rank: usize, rows: usize, cols: usize) -> Self {
        Self { rank, rows, cols, a: vec![0.0; rank * cols], b: vec![0.0; rows * rank] }
    }

    /// A uniform in ±1/√cols, B zero: W starts at W₀. `stream` separates the matrices of a model.
    pub fn init(rank: usize, rows: usize, cols: usize, seed: u64, stream: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(stream);
        let bound = (cols as f32).sqrt().recip();
        let mut factors = Self::zeros(rank, rows, cols);
        factors.a.iter_mut().for_each(|v| *v = rng.random_range(-bound..bound));
        factors
    }

    /// Writes `W₀ + s·B·A` into `w`.
    pub fn merge(&self, exec: &Exec, w0: &[f32], w: &mut [f32]) {
        w.copy_from_slice(w0);
        let (out, a, b) = (MatMut::dense(w, self.rows, self.cols), self.a_view(), self.b_view());
        gemm(exec, out, b, Trans::No, a, Trans::No, SCALE, Store::Accumulate);
    }

    /// Overwrites `grads` with `dA = s·Bᵀ·dW`, `dB = s·dW·Aᵀ`.
    pub fn backward(&self, exec: &Exec, dw: &[f32], grads: &mut Factors) {
        let dw = MatRef::dense(dw, self.rows, self.cols);
        let da = MatMut::dense(&mut grads.a, self.rank, self.cols);
        gemm(exec, da, self.b_view(), Trans::Yes, dw, Trans::No, SCALE, Store::Overwrite);
        let db = MatMut::dense(&mut grads.b, self.rows, self.rank);
        gemm(exec, db, dw, Trans::No, self.a_view(), Trans::Yes, SCALE, Store::Overwrite);
    }

    fn a_view(&self) -> MatRef<'_> {
        MatRef::dense(&self.a, self.rank, self.cols)
    }

    fn b_view(&self) -> MatRef<'_> {
        MatRef::dense(&self.b, self.rows, self.rank)
    }
}
