//! A gated MLP's products in training, on bfloat16 tiles: `silu(x · gateᵀ) ⊙ (x · upᵀ)` and its gradient are computed where a tile is finished,
//! and leave it rounded, in every form that a product reads next. In f32 they would cross the memory three times more.
//! Knows tiles and forms; the driver hands them out.

#![allow(clippy::needless_range_loop)] // Plain loops over registers stay inside the instruction set; iterator closures may not.

use std::arch::x86_64::*;
use std::cell::RefCell;

use super::bf16::{SPAN, as_integers, interleaved, transpose};
use super::buffer::Lines;
use super::driver::matmul_gated;
use super::kernel::TileAt;
use super::product::Shared;
use super::{Input, PANEL, Packed, Product, matmul};
use crate::kv::lanes::Lanes;
use crate::simd::Avx512;
use crate::{Exec, IsaLevel, MatMut, MatRef, Store, Trans};

/// What the backward pass reads: gate and up activations `[rows, width]`, rounded, in the order in which tiles are finished.
#[derive(Default)]
pub(crate) struct Activations {
    rows: usize,
    width: usize,
    gate: Lines,
    up: Lines,
}

/// A matrix of which every tile has its own part.
#[derive(Clone, Copy)]
pub(super) struct Rows {
    first: *mut u16,
    stride: usize,
}

impl Rows {
    const NONE: Self = Self { first: std::ptr::null_mut(), stride: 0 };
}

/// A matrix in blocks of [`SPAN`] by [`SPAN`] values, one below the other, column after column of blocks.
#[derive(Clone, Copy)]
pub(super) struct Blocks {
    first: *mut u16,
    /// Blocks of a column.
    rows: usize,
}

impl Blocks {
    /// The block of a tile.
    ///
    /// # Safety
    /// The matrix has it.
    unsafe fn of(self, at: TileAt) -> *mut u16 {
        let block = at.panel / PANELS * self.rows + at.row / SPAN;
        // SAFETY: the caller's contract.
        unsafe { self.first.add(block * SPAN * SPAN) }
    }
}

/// Where finished tiles go.
#[derive(Clone, Copy)]
pub(super) enum Finish {
    /// Tiles of gate and up.
    Forward {
        /// Both, `[rows, width]`.
        gate: Blocks,
        up: Blocks,
        /// `silu(gate) ⊙ up`, likewise, where it is wanted.
        act: Rows,
    },
    /// Tiles of the gradient of `silu(gate) ⊙ up`.
    Backward {
        gate: Blocks,
        up: Blocks,
        /// Gradients, `[rows, width]` and, where they are wanted, transposed.
        d_gate: [Rows; 2],
        d_up: [Rows; 2],
        /// `silu(gate) ⊙ up` as panels of 16 columns, where they are wanted; the stride is a panel's.
        act: Rows,
    },
}

/// Panels of a tile.
const PANELS: usize = SPAN / PANEL;

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
        && width.is_multiple_of(SPAN)
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
    (saved.rows, saved.width) = (rows, width);
    let blocks = rows.div_ceil(SPAN);
    OPERANDS.with_borrow_mut(|Operands { weights, rows: [act, ..], .. }| {
        weights[0].set_bf16(exec, gate, Trans::Yes);
        weights[1].set_bf16(exec, up, Trans::Yes);
        let [gate_out, up_out] = [&mut saved.gate, &mut saved.up].map(|lines| {
            lines.grow::<u16>(blocks * SPAN * width);
            Blocks { first: lines.as_mut_slice().as_mut_ptr(), rows: blocks }
        });
        let act_out = if down.is_some() { rows_of(act, exec, rows, width) } else { Rows::NONE };
        let finish = Finish::Forward { gate: gate_out, up: up_out, act: act_out };
        // SAFETY: all three have `rows` rows of `width` values, gate and up in whole blocks.
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
        let read = |lines: &Lines| Blocks {
            first: lines.as_slice::<u16>().as_ptr().cast_mut(),
            rows: rows.div_ceil(SPAN),
        };
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
        // SAFETY: gate and up are only read, and have `rows` rows of `width` values in whole blocks; the others have just been given that room, transposed ones
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
    /// Finishes the tile `at` of two panels, whose values are `[rows][panels][16]`.
    ///
    /// # Safety
    /// The CPU has AVX-512 with BF16. The matrices have the tile's rows and columns, transposed ones and blocks whole spans of 32 rows, and nobody
    /// else uses that part of what is written.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")]
    pub(super) unsafe fn tile(self, at: TileAt, tile: &[f32], up_tile: &[f32]) {
        let values = at.rows * SPAN;
        assert!(at.panels == PANELS && at.rows <= SPAN && tile.len() >= values);
        // SAFETY: the caller's contract.
        unsafe {
            match self {
                Self::Forward { gate, up, act } => {
                    assert!(up_tile.len() >= values);
                    forward_tile(at, [tile, up_tile], [gate, up], act);
                }
                Self::Backward { gate, up, d_gate, d_up, act } => {
                    backward_tile(at, tile, [gate, up], [d_gate, d_up], act);
                }
            }
        }
    }
}

/// # Safety
/// As [`Finish::tile`], which checked the tiles' lengths.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")]
unsafe fn forward_tile(at: TileAt, tiles: [&[f32]; 2], blocks: [Blocks; 2], act: Rows) {
    // SAFETY: rows of the tile, and the same ones of the matrices.
    unsafe {
        let [gate, up] = blocks.map(|matrix| matrix.of(at));
        for row in 0..at.rows {
            let [g, u] =
                tiles.map(|tile| [0, PANEL].map(|i| _mm512_loadu_ps(tile.as_ptr().add(row * SPAN + i))));
            store(gate.add(row * SPAN), g);
            store(up.add(row * SPAN), u);
            if !act.first.is_null() {
                let silu = |i: usize| _mm512_mul_ps(_mm512_mul_ps(g[i], sigmoid(g[i])), u[i]);
                store(act.first.add((at.row + row) * act.stride + at.panel * PANEL), [silu(0), silu(1)]);
            }
        }
    }
}

/// Rows beyond the last one are zeros where forms are transposed.
///
/// # Safety
/// As [`Finish::tile`], which checked the tile's length.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")]
unsafe fn backward_tile(at: TileAt, tile: &[f32], blocks: [Blocks; 2], gradients: [[Rows; 2]; 2], act: Rows) {
    let zero = _mm512_setzero_si512();
    let one = _mm512_set1_ps(1.0);
    // Of gate and up, of both panels: pairs of rows.
    let mut pairs = [[[zero; PANEL]; PANELS]; 2];
    // SAFETY: rows of the tile, the same ones of the matrices, and spans of 32 rows of those that are transposed.
    unsafe {
        let [gate, up] = blocks.map(|matrix| matrix.of(at).cast_const());
        for pair in 0..SPAN / 2 {
            // Gradients of gate and up, and `silu(gate) ⊙ up`; of both rows, of both panels.
            let mut values = [[[_mm512_setzero_ps(); PANELS]; 2]; 3];
            for half in 0..2 {
                let row = 2 * pair + half;
                if row >= at.rows {
                    continue;
                }
                for panel in 0..PANELS {
                    let (place, read) = (row * SPAN + panel * PANEL, |from: *const u16| {
                        let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
                        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
                    });
                    let d = _mm512_loadu_ps(tile.as_ptr().add(place));
                    let (g, u) = (read(gate.add(place)), read(up.add(place)));
                    let sigmoid = sigmoid(g);
                    let silu = _mm512_mul_ps(g, sigmoid);
                    let slope = _mm512_fmadd_ps(silu, _mm512_sub_ps(one, sigmoid), sigmoid);
                    values[0][half][panel] = _mm512_mul_ps(_mm512_mul_ps(d, u), slope);
                    values[1][half][panel] = _mm512_mul_ps(d, silu);
                    values[2][half][panel] = _mm512_mul_ps(silu, u);
                }
                for i in 0..2 {
                    let to = gradients[i][0];
                    store(to.first.add((at.row + row) * to.stride + at.panel * PANEL), values[i][half]);
                }
            }
            for panel in 0..PANELS {
                let of_rows = |i: usize| {
                    let both = _mm512_cvtne2ps_pbh(values[i][1][panel], values[i][0][panel]);
                    interleaved(as_integers(both))
                };
                pairs[0][panel][pair] = of_rows(0);
                pairs[1][panel][pair] = of_rows(1);
                if !act.first.is_null() {
                    let to = act.first.add((at.panel + panel) * act.stride + (at.row / 2 + pair) * SPAN);
                    _mm512_storeu_si512(to.cast(), of_rows(2));
                }
            }
        }
        for i in 0..2 {
            let to = gradients[i][1];
            if to.first.is_null() {
                continue;
            }
            for panel in 0..PANELS {
                let columns = transpose(pairs[i][panel]);
                for c in 0..PANEL {
                    let column = (at.panel + panel) * PANEL + c;
                    _mm512_storeu_si512(to.first.add(column * to.stride + at.row).cast(), columns[c]);
                }
            }
        }
    }
}

/// Rounds the values of both panels to a row of 32.
///
/// # Safety
/// 32 values are writable.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")]
#[inline]
unsafe fn store(to: *mut u16, [first, second]: [__m512; 2]) {
    // SAFETY: the caller's contract.
    unsafe { _mm512_storeu_si512(to.cast(), as_integers(_mm512_cvtne2ps_pbh(second, first))) };
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
    // Two thirds of the bits, doubled by a step of Newton's: faster than a division.
    let (sum, two) = (_mm512_add_ps(_mm512_set1_ps(1.0), exp), _mm512_set1_ps(2.0));
    let inverse = _mm512_rcp14_ps(sum);
    _mm512_mul_ps(inverse, _mm512_fnmadd_ps(sum, inverse, two))
}
