//! A gated MLP's products in training, on bfloat16 tiles: `silu(x · gateᵀ) ⊙ (x · upᵀ)` and its gradient are computed where a tile is finished,
//! and leave it rounded, in every form that a product reads next. In f32 they would cross the memory three times more.
//! Knows tiles and forms; the driver hands them out.

#![allow(clippy::needless_range_loop)] // Plain loops over registers stay inside the instruction set; iterator closures may not.

use std::arch::x86_64::*;
use std::cell::RefCell;

use super::bf16::{SPAN, as_integers, interleaved, transpose};
use super::buffer::Lines;
use super::driver::matmul_gated;
use super::input::row_stride;
use super::kernel::TileAt;
use super::product::Shared;
use super::{Input, PAD, PANEL, Packed, Product, matmul};
use crate::kv::lanes::Lanes;
use crate::simd::Avx512;
use crate::{Exec, IsaLevel, MatMut, MatRef, Store, Trans};

/// What the backward pass reads: gate and up activations `[rows, width]`, rounded.
#[derive(Default)]
pub(crate) struct Activations {
    rows: usize,
    width: usize,
    gate: Lines,
    up: Lines,
}

/// Pointers into matrices of which every tile has its own part.
#[derive(Clone, Copy)]
pub(super) struct Rows {
    first: *mut u16,
    stride: usize,
}

impl Rows {
    const NONE: Self = Self { first: std::ptr::null_mut(), stride: 0 };
}

/// Where finished tiles go.
#[derive(Clone, Copy)]
pub(super) enum Finish {
    /// Tiles of gate and up.
    Forward {
        /// Both, `[rows, width]`.
        gate: Rows,
        up: Rows,
        /// `silu(gate) ⊙ up`, likewise, where it is wanted.
        act: Rows,
    },
    /// Tiles of the gradient of `silu(gate) ⊙ up`.
    Backward {
        gate: Rows,
        up: Rows,
        /// Gradients, `[rows, width]` and, where they are wanted, transposed.
        d_gate: [Rows; 2],
        d_up: [Rows; 2],
        /// `silu(gate) ⊙ up` as panels of 16 columns, where they are wanted; the stride is a panel's.
        act: Rows,
    },
}

/// Operands on their way; memory only grows.
struct Operands {
    weights: [Packed; 2],
    rows: [Input; 3],
    columns: [Input; 3],
    act: Packed,
}

thread_local! {
    static OPERANDS: RefCell<Operands> = RefCell::new(Operands {
        weights: [(); 2].map(|()| Packed::empty()),
        rows: Default::default(),
        columns: Default::default(),
        act: Packed::empty(),
    });
}

/// Whether [`forward`] and [`backward`] can take these sizes on this instruction set, and pay.
pub(crate) fn pays(exec: &Exec, rows: usize, d_model: usize, width: usize) -> bool {
    exec.isa().level() >= IsaLevel::Amx
        && width.is_multiple_of(PAD)
        && super::pays(exec, rows, width, d_model)
        && super::pays(exec, width, d_model, rows)
}

/// Sets `saved` to the activations of `x`, and adds `(silu(gate) ⊙ up) · downᵀ` to an output where it is given.
///
/// # Panics
/// When shapes do not fit, or where it does not [pay](pays).
pub(crate) fn forward(
    exec: &Exec,
    x: &Shared,
    [gate, up]: [MatRef<'_>; 2],
    down: Option<(MatRef<'_>, MatMut<'_>)>,
    saved: &mut Activations,
) {
    let (rows, width) = (x.input().rows(), gate.rows());
    assert!(pays(exec, rows, gate.cols(), width), "[{rows}, {}] times {width}", gate.cols());
    assert!(up.rows() == width && up.cols() == gate.cols(), "gate and up have one shape");
    let stride = row_stride(width);
    (saved.rows, saved.width) = (rows, width);
    OPERANDS.with_borrow_mut(|Operands { weights, rows: [act, ..], .. }| {
        weights[0].set_bf16(exec, gate, Trans::Yes);
        weights[1].set_bf16(exec, up, Trans::Yes);
        let [gate_out, up_out] = [&mut saved.gate, &mut saved.up].map(|lines| {
            lines.grow::<u16>(rows * stride);
            Rows { first: lines.as_mut_slice().as_mut_ptr(), stride }
        });
        let act_out = if down.is_some() { rows_of(act, exec, rows, width) } else { Rows::NONE };
        let finish = Finish::Forward { gate: gate_out, up: up_out, act: act_out };
        // SAFETY: all three have `rows` rows of `width` values.
        unsafe { matmul_gated(exec, x.input(), &weights[0], Some(&weights[1]), finish) };
        if let Some((down, out)) = down {
            weights[0].set_bf16(exec, down, Trans::Yes);
            matmul(
                exec,
                act,
                &mut [Product { weight: &weights[0], bias: None, out, store: Store::Accumulate }],
            );
        }
    });
}

/// Gradients of weights that are wanted, and whether to add to them.
pub(crate) type Wanted<'a> = Option<(MatMut<'a>, Store)>;

/// From the gradient `dy` of the block's output: overwrites `dx`, and the weights' gradients that are wanted. `x` holds the forward pass's input
/// for gradients of weights, where those of gate or up are wanted.
///
/// # Panics
/// When shapes do not fit.
pub(crate) fn backward(
    exec: &Exec,
    x: Option<&Shared>,
    [gate, up, down]: [MatRef<'_>; 3],
    saved: &Activations,
    dy: MatRef<'_>,
    [gate_grad, up_grad, down_grad]: [Wanted<'_>; 3],
    mut dx: MatMut<'_>,
) {
    let Activations { rows, width, .. } = *saved;
    assert!(
        dy.rows() == rows && down.cols() == width && down.rows() == dy.cols(),
        "gradient of a gated block"
    );
    let stride = row_stride(width);
    OPERANDS.with_borrow_mut(|Operands { weights: [weight, _], rows: forms, columns, act }| {
        let [dy_rows, d_gate, d_up] = forms;
        let [dy_columns, d_gate_columns, d_up_columns] = columns;
        match down_grad {
            Some(_) => dy_rows.set_bf16_both(exec, dy, dy_columns),
            None => dy_rows.set_bf16(exec, dy, Trans::No, 1.0),
        }
        weight.set_bf16(exec, down, Trans::No);
        let both = |rows_form: &mut Input, columns_form: &mut Input, wanted: bool| {
            let columns = if wanted { rows_of(columns_form, exec, width, rows) } else { Rows::NONE };
            [rows_of(rows_form, exec, rows, width), columns]
        };
        let read = |lines: &Lines| Rows { first: lines.as_slice::<u16>().as_ptr().cast_mut(), stride };
        let finish = Finish::Backward {
            gate: read(&saved.gate),
            up: read(&saved.up),
            d_gate: both(d_gate, d_gate_columns, gate_grad.is_some()),
            d_up: both(d_up, d_up_columns, up_grad.is_some()),
            act: match down_grad {
                Some(_) => {
                    let (first, stride) = act.bf16_out(exec, width, rows);
                    Rows { first, stride }
                }
                None => Rows::NONE,
            },
        };
        // SAFETY: gate and up are only read, and have `rows` rows of `width` values; the others have just been given that room, transposed ones
        // `width` rows of `rows` values, padded.
        unsafe { matmul_gated(exec, dy_rows, weight, None, finish) };
        if let Some((out, store)) = down_grad {
            matmul(exec, dy_columns, &mut [Product { weight: act, bias: None, out, store }]);
        }
        for (i, (d, matrix)) in [(&*d_gate, gate), (&*d_up, up)].into_iter().enumerate() {
            weight.set_bf16(exec, matrix, Trans::No);
            let store = if i == 0 { Store::Overwrite } else { Store::Accumulate };
            matmul(exec, d, &mut [Product { weight, bias: None, out: dx.reborrow(), store }]);
        }
        for (columns, grad) in [(&*d_gate_columns, gate_grad), (&*d_up_columns, up_grad)] {
            if let Some((out, store)) = grad {
                let weight = x.expect("the input of a layer that trains").panels();
                matmul(exec, columns, &mut [Product { weight, bias: None, out, store }]);
            }
        }
    });
}

/// `input` becomes `[rows, cols]` in bfloat16, to be written.
fn rows_of(input: &mut Input, exec: &Exec, rows: usize, cols: usize) -> Rows {
    let (first, stride) = input.bf16_out(exec, rows, cols);
    Rows { first, stride }
}

impl Finish {
    /// Finishes the tile `at`, whose values are `[rows][panels][16]`.
    ///
    /// # Safety
    /// The CPU has AVX-512 with BF16. The matrices have the tile's rows and columns, transposed ones whole spans of 32 rows, and nobody else uses
    /// that part of what is written.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")]
    pub(super) unsafe fn tile(self, at: TileAt, tile: &[f32], up_tile: &[f32]) {
        assert!(at.rows <= SPAN && tile.len() >= at.rows * at.panels * PANEL);
        for panel in 0..at.panels {
            // SAFETY: the caller's contract.
            unsafe {
                match self {
                    Self::Forward { gate, up, act } => {
                        assert!(up_tile.len() >= at.rows * at.panels * PANEL);
                        forward_panel(at, panel, [tile, up_tile], [gate, up, act]);
                    }
                    Self::Backward { gate, up, d_gate, d_up, act } => {
                        backward_panel(at, panel, tile, [gate, up], [d_gate, d_up], act);
                    }
                }
            }
        }
    }
}

/// One panel's 16 columns.
///
/// # Safety
/// As [`Finish::tile`], which checked the tiles' lengths.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")]
unsafe fn forward_panel(at: TileAt, panel: usize, tiles: [&[f32]; 2], [gate, up, act]: [Rows; 3]) {
    let column = (at.panel + panel) * PANEL;
    for row in 0..at.rows {
        // SAFETY: 16 values of the tile's row, and of the same row and columns of the matrices.
        unsafe {
            let [g, u] =
                tiles.map(|tile| _mm512_loadu_ps(tile.as_ptr().add((row * at.panels + panel) * PANEL)));
            let store = |to: Rows, values: __m512| {
                let to = to.first.add((at.row + row) * to.stride + column);
                _mm256_storeu_si256(
                    to.cast(),
                    std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(values)),
                );
            };
            store(gate, g);
            store(up, u);
            if !act.first.is_null() {
                store(act, _mm512_mul_ps(_mm512_mul_ps(g, sigmoid(g)), u));
            }
        }
    }
}

/// One panel's 16 columns: rows beyond the last one are zeros where forms are transposed.
///
/// # Safety
/// As [`Finish::tile`], which checked the tile's length.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")]
unsafe fn backward_panel(
    at: TileAt,
    panel: usize,
    tile: &[f32],
    [gate, up]: [Rows; 2],
    gradients: [[Rows; 2]; 2],
    act: Rows,
) {
    let column = (at.panel + panel) * PANEL;
    let zero = _mm512_setzero_si512();
    let mut pairs = [[zero; PANEL]; 2];
    let one = _mm512_set1_ps(1.0);
    for pair in 0..PANEL {
        let mut values = [[_mm512_setzero_ps(); 2]; 3];
        for half in 0..2 {
            let row = 2 * pair + half;
            if row >= at.rows {
                continue;
            }
            // SAFETY: 16 values of the tile's row, and of the same row and columns of the matrices.
            let (d, g, u) = unsafe {
                let read = |from: Rows| {
                    let from = from.first.add((at.row + row) * from.stride + column);
                    let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
                    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
                };
                let d = _mm512_loadu_ps(tile.as_ptr().add((row * at.panels + panel) * PANEL));
                (d, read(gate), read(up))
            };
            let sigmoid = sigmoid(g);
            let silu = _mm512_mul_ps(g, sigmoid);
            let slope = _mm512_fmadd_ps(silu, _mm512_sub_ps(one, sigmoid), sigmoid);
            values[0][half] = _mm512_mul_ps(_mm512_mul_ps(d, u), slope);
            values[1][half] = _mm512_mul_ps(d, silu);
            values[2][half] = _mm512_mul_ps(silu, u);
        }
        for i in 0..2 {
            let both = as_integers(_mm512_cvtne2ps_pbh(values[i][1], values[i][0]));
            pairs[i][pair] = interleaved(both);
            let to = gradients[i][0];
            // SAFETY: 16 values each of one or two of the tile's rows.
            unsafe {
                let first = to.first.add((at.row + 2 * pair) * to.stride + column);
                if 2 * pair < at.rows {
                    _mm256_storeu_si256(first.cast(), _mm512_castsi512_si256(both));
                }
                if 2 * pair + 1 < at.rows {
                    _mm256_storeu_si256(first.add(to.stride).cast(), _mm512_extracti64x4_epi64::<1>(both));
                }
            }
        }
        if !act.first.is_null() {
            let both = interleaved(as_integers(_mm512_cvtne2ps_pbh(values[2][1], values[2][0])));
            // SAFETY: a pair of rows, padded to 32, of a panel.
            unsafe {
                let to = act.first.add((at.panel + panel) * act.stride + (at.row / 2 + pair) * SPAN);
                _mm512_storeu_si512(to.cast(), both);
            }
        }
    }
    for i in 0..2 {
        let to = gradients[i][1];
        if to.first.is_null() {
            continue;
        }
        let columns = transpose(pairs[i]);
        for c in 0..PANEL {
            // SAFETY: 32 values, padding included, of a row of the transposed matrix.
            unsafe {
                _mm512_storeu_si512(to.first.add((column + c) * to.stride + at.row).cast(), columns[c])
            };
        }
    }
}

/// Logistic function.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")]
#[inline]
fn sigmoid(x: __m512) -> __m512 {
    /// 2¹²⁶ is finite, and so much larger than 1 that the result is as good as 0.
    const LARGEST: f32 = 126.0;
    let to_base_2 = _mm512_mul_ps(x, _mm512_set1_ps(-std::f32::consts::LOG2_E));
    // The second operand is what a comparison with NaN gives. SAFETY: AVX-512 is among this function's features.
    let exp = unsafe { Avx512::new().exp2(_mm512_min_ps(_mm512_set1_ps(LARGEST), to_base_2)) };
    _mm512_div_ps(_mm512_set1_ps(1.0), _mm512_add_ps(_mm512_set1_ps(1.0), exp))
}
