//! Buffers of a pass, allocated once and reused from token to token.

use super::windows::WindowStores;
use crate::mixers::StepScratch;
use kernels::kv::AttendScratch;
use kernels::packed::Input;
use kernels::rope::RopeTable;

/// Every activation that is alive within a pass.
pub(super) struct Workspace {
    /// Residual stream `[rows, d_model]`.
    pub h: Vec<f32>,
    /// Input of the product that comes next, in the forms its weights need.
    pub input: Input,
    /// Output of each segment of a layer, `[rows, segment rows]`.
    pub projected: Vec<Vec<f32>>,
    /// Head outputs in head order, `[rows, heads · head_dim]`.
    pub heads: Vec<f32>,
    /// `silu(gate) · up`, `[rows, d_ff]`.
    pub active: Vec<f32>,
    /// Rotated queries and keys of windows, and their values, in the order of [`Columns`](super::windows::Columns).
    pub rotated: Vec<f32>,
    /// Keys and values that windows see.
    pub windows: WindowStores,
    /// Log denominators of windows whose dropped tokens are weighed, `[rows, groups · heads of a group]`.
    pub window_lse: Vec<f32>,
    /// Of steps of converted groups.
    pub steps: Vec<StepScratch>,
    /// Of norms of queries and keys.
    pub normed: [Vec<f32>; 2],
    /// Position of every row.
    pub positions: Vec<usize>,
    /// First row of every sequence, and then the number of rows.
    pub starts: Vec<usize>,
    pub rope: RopeTable,
    pub attend: AttendScratch,
}

impl Workspace {
    /// Empty buffers for a model of these RoPE frequencies.
    pub fn new(inv_freq: &[f64]) -> Self {
        Self {
            h: Vec::new(),
            input: Input::new(),
            projected: Vec::new(),
            heads: Vec::new(),
            active: Vec::new(),
            rotated: Vec::new(),
            windows: WindowStores::default(),
            window_lse: Vec::new(),
            steps: Vec::new(),
            normed: Default::default(),
            positions: Vec::new(),
            starts: Vec::new(),
            rope: RopeTable::new(inv_freq),
            attend: AttendScratch::default(),
        }
    }
}
