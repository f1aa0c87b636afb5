//! Activations in the forms that products read: f32, bfloat16, blocks of 8-bit integers.
//! Knows rows of activations; knows nothing of panels.

#[cfg(target_arch = "x86_64")]
use super::bf16;
use super::buffer::{Element, LINE, Lines};
use super::kernel::{Form, Route};
use super::quant::{self, Blocks};
use super::{MATVEC_ROWS, MIN_PARALLEL_VALUES, PAD, Packed, padded};
use crate::isa::dispatch;
use crate::simd::{self, Simd};
use crate::{Exec, Isa, IsaLevel, MatRef, Trans};

/// Rows readable beyond the last one of the bfloat16 form, so that AMX can always load whole tiles.
const ROW_PAD: usize = 31;
/// Values per task when rows are converted in parallel.
const TASK_VALUES: usize = 16 * 1024;

/// Activations `[rows, cols]` in the forms that products need. Reused from call to call; memory only grows.
#[derive(Default)]
pub struct Input {
    rows: usize,
    cols: usize,
    stride: usize,
    forms: Forms,
    f32: Lines,
    bf16: Lines,
    codes: Lines,
    scales: Lines,
    sums: Lines,
}

impl std::fmt::Debug for Input {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Input {{ [{}, {}], {:?} }}", self.rows, self.cols, self.forms)
    }
}

/// Which forms are up to date.
#[derive(Clone, Copy, Debug, Default)]
struct Forms {
    f32: bool,
    bf16: bool,
    blocks: bool,
}

/// RMS normalisation of a row.
#[derive(Clone, Copy)]
struct Norm<'a> {
    weight: &'a [f32],
    eps: f32,
}

/// A buffer that tasks fill row by row, each its own rows.
#[derive(Clone, Copy)]
struct RowsOut<T> {
    start: *mut T,
    stride: usize,
}
// SAFETY: tasks take disjoint rows, see `fill`.
unsafe impl<T> Sync for RowsOut<T> {}

impl<T: Element> RowsOut<T> {
    /// Makes room for `rows` rows of `stride` values.
    fn new(lines: &mut Lines, rows: usize, stride: usize) -> Self {
        lines.grow::<T>(rows * stride);
        Self { start: lines.as_mut_slice().as_mut_ptr(), stride }
    }
    /// Where a row starts.
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
    fn at(self, row: usize) -> *mut T {
        self.start.wrapping_add(row * self.stride)
    }
    /// # Safety
    /// `row` is below the number of rows of `new`, and nobody else uses that row meanwhile.
    unsafe fn row<'a>(self, row: usize) -> &'a mut [T] {
        // SAFETY: `new` made room for it; exclusive by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(row * self.stride), self.stride) }
    }
}

impl Input {
    /// Without rows.
    pub fn new() -> Self {
        Self::default()
    }
    /// Copies `x` and makes the forms that products with `weights` read.
    ///
    /// # Panics
    /// When a weight has other columns than `x`.
    pub fn set(&mut self, exec: &Exec, x: MatRef<'_>, weights: &[&Packed]) {
        self.fill(exec, x, None, weights);
    }
    /// The same of `x` after RMS normalisation of each row: `x / sqrt(mean(x²) + eps) · norm`.
    ///
    /// # Panics
    /// When a weight has other columns than `x`, or `norm` another length.
    pub fn set_rms_norm(&mut self, exec: &Exec, x: MatRef<'_>, norm: &[f32], eps: f32, weights: &[&Packed]) {
        assert_eq!(norm.len(), x.cols(), "one norm weight per column");
        self.fill(exec, x, Some(Norm { weight: norm, eps }), weights);
    }
    /// Becomes `alpha · op(a)` rounded to bfloat16, for products of more than 4 rows with BF16 weights.
    ///
    /// # Panics
    /// On an instruction set without bfloat16.
    #[cfg_attr(not(target_arch = "x86_64"), allow(unused_variables))] // Only x86 gets past the assertion.
    pub fn set_bf16(&mut self, exec: &Exec, a: MatRef<'_>, ta: Trans, alpha: f32) {
        let (m, k) = ta.shape(a);
        self.reserve_bf16(exec, m, k);
        let stride = self.stride;
        #[cfg(target_arch = "x86_64")]
        if m * stride > 0 {
            let rows = &mut self.bf16.as_mut_slice::<u16>()[..m * stride];
            let single = exec.single();
            let exec = if m * k < MIN_PARALLEL_VALUES { &single } else { exec };
            let together = bf16::together(ta == Trans::Yes, m, exec.threads());
            exec.parallel_chunks(rows, together * stride, |block, out| {
                // SAFETY: an `Isa` of this level exists only after detection.
                unsafe { bf16::rows(a, ta, alpha, block * together, out, stride) }
            });
        }
    }
    /// Becomes `a` rounded to bfloat16 as [`set_bf16`](Self::set_bf16) does, and `transposed` becomes `aᵀ`, from one reading of it.
    ///
    /// # Panics
    /// On an instruction set without bfloat16.
    #[cfg_attr(not(target_arch = "x86_64"), allow(unused_variables))] // Only x86 gets past the assertion.
    pub(super) fn set_bf16_both(&mut self, exec: &Exec, a: MatRef<'_>, transposed: &mut Input) {
        /// Columns whose 32 rows stay in the first caches between their two forms.
        #[cfg(target_arch = "x86_64")]
        const COLUMNS: usize = 512;
        let (m, n) = (a.rows(), a.cols());
        self.reserve_bf16(exec, m, n);
        transposed.reserve_bf16(exec, n, m);
        #[cfg(target_arch = "x86_64")]
        if m * n > 0 {
            let stride = self.stride;
            let rows = &mut self.bf16.as_mut_slice::<u16>()[..m * stride];
            let columns = RowsOut::<u16>::new(&mut transposed.bf16, n, transposed.stride);
            let single = exec.single();
            let exec = if m * n < MIN_PARALLEL_VALUES { &single } else { exec };
            exec.parallel_chunks(rows, bf16::SPAN * stride, |block, out| {
                let first = block * bf16::SPAN;
                for start in (0..n).step_by(COLUMNS) {
                    let part = a.columns(start, COLUMNS.min(n - start));
                    // SAFETY: an `Isa` of this level exists only after detection. `reserve_bf16` made room for `n` rows of padded `m` values, of which
                    // this task alone has those of its 32 rows of `a`.
                    unsafe {
                        bf16::rows(part, Trans::No, 1.0, first, &mut out[start..], stride);
                        bf16::columns(part, first, columns.at(start), columns.stride);
                    }
                }
            });
        }
    }
    /// Room for `rows` rows of `cols` values in bfloat16 and the padding of both.
    fn reserve_bf16(&mut self, exec: &Exec, rows: usize, cols: usize) {
        assert!(exec.isa().level() >= IsaLevel::Avx512Bf16, "{} has no bfloat16", exec.isa());
        (self.rows, self.cols, self.stride) = (rows, cols, row_stride(cols));
        self.forms = Forms { f32: false, bf16: true, blocks: false };
        self.bf16.grow::<u16>((rows + ROW_PAD) * self.stride);
    }
    /// [`set_bf16`](Self::set_bf16) that leaves the writing to the caller: the first of `rows` rows of padded `cols` values, and the values between
    /// two. Values beyond `cols` are to be zeros.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn bf16_out(&mut self, exec: &Exec, rows: usize, cols: usize) -> (*mut u16, usize) {
        self.reserve_bf16(exec, rows, cols);
        (self.bf16.as_mut_slice().as_mut_ptr(), self.stride)
    }
    /// Appends rows of zeros until there are `rows`, after [`set_bf16`](Self::set_bf16).
    pub(super) fn pad_bf16(&mut self, rows: usize) {
        if rows > self.rows {
            // Room for `ROW_PAD` more rows was made.
            assert!(self.forms.bf16 && rows - self.rows <= ROW_PAD);
            self.bf16.as_mut_slice::<u16>()[self.rows * self.stride..rows * self.stride].fill(0);
            self.rows = rows;
        }
    }
    /// Rows of activations.
    pub fn rows(&self) -> usize {
        self.rows
    }
    /// The normalised values, not rounded. Panics unless [`set_rms_norm`](Self::set_rms_norm) made them.
    pub fn f32(&self) -> MatRef<'_> {
        assert!(self.forms.f32, "the input was not set for f32");
        MatRef::new(self.f32.as_slice(), self.rows, self.cols, self.stride)
    }

    /// Input features.
    pub(super) fn cols(&self) -> usize {
        self.cols
    }
    /// f32 rows, zero padded, and the distance between them.
    pub(super) fn f32_rows(&self) -> (&[f32], usize) {
        assert!(self.forms.f32, "the input was not set for this weight");
        (self.f32.as_slice(), self.stride)
    }
    /// bfloat16 rows, zero padded, and the distance between them. Panics when no weight given to `set` needs them.
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
    pub(super) fn bf16_rows(&self) -> (&[u16], usize) {
        assert!(self.forms.bf16, "the input was not set for this weight");
        (self.bf16.as_slice(), self.stride)
    }
    /// Quantised rows. Panics when no weight given to `set` needs them.
    pub(super) fn blocks(&self) -> Blocks<'_> {
        assert!(self.forms.blocks, "the input was not set for this weight");
        Blocks {
            codes: self.codes.as_slice(),
            stride: codes_stride(self.cols),
            scales: self.scales.as_slice(),
            sums: self.sums.as_slice(),
            blocks: self.cols / PAD,
        }
    }

    fn fill(&mut self, exec: &Exec, x: MatRef<'_>, norm: Option<Norm<'_>>, weights: &[&Packed]) {
        let (rows, cols) = (x.rows(), x.cols());
        // What is normalised is needed in f32 on the way.
        let mut forms = Forms { f32: norm.is_some() || weights.is_empty(), ..Forms::default() };
        for weight in weights {
            assert_eq!(weight.cols(), cols, "{weight:?} times activations [{rows}, {cols}]");
            match Route::of(exec.isa(), weight.dtype(), rows).form() {
                Form::F32 => forms.f32 = true,
                Form::Bf16 => forms.bf16 = true,
                Form::Blocks => forms.blocks = true,
            }
        }
        let (stride, blocks) = (row_stride(cols), cols / PAD);
        (self.rows, self.cols, self.stride, self.forms) = (rows, cols, stride, forms);
        let f32_out = RowsOut::<f32>::new(&mut self.f32, if forms.f32 { rows } else { 0 }, stride);
        let bf16_rows = if forms.bf16 { rows + ROW_PAD } else { 0 };
        let bf16_out = RowsOut::<u16>::new(&mut self.bf16, bf16_rows, stride);
        let parts = if rows <= MATVEC_ROWS { quant::FINE } else { 1 };
        let block_rows = if forms.blocks { rows } else { 0 };
        let codes_out = RowsOut::<i8>::new(&mut self.codes, block_rows, parts * codes_stride(cols));
        let scales_out = RowsOut::<f32>::new(&mut self.scales, block_rows, parts * blocks);
        let sums_out = RowsOut::<i32>::new(&mut self.sums, block_rows, parts * blocks);
        let isa = exec.isa();
        let one = |row: usize| {
            let mut values = x.row(row);
            if forms.f32 {
                // SAFETY: `row < rows` for which the buffers were grown above, and every row is visited once.
                let f32_row = unsafe { f32_out.row(row) };
                copy_row(isa, values, norm, f32_row);
                values = &f32_row[..cols];
            }
            if forms.bf16 {
                // SAFETY: as above.
                let (bf16_row, padding) = unsafe { bf16_out.row(row) }.split_at_mut(cols);
                dispatch!(isa, round_row(values, bf16_row));
                padding.fill(0);
            }
            if forms.blocks {
                // SAFETY: as above.
                let (codes, scales, sums) =
                    unsafe { (codes_out.row(row), scales_out.row(row), sums_out.row(row)) };
                let stride = codes_stride(cols);
                codes.chunks_exact_mut(stride.max(1)).for_each(|part| part[cols..].fill(0));
                quant::quantize_activations(isa, values, parts, (codes, stride), scales, sums);
            }
        };
        if exec.threads() == 1 || rows < 2 || rows * cols < MIN_PARALLEL_VALUES {
            (0..rows).for_each(one);
            return;
        }
        let task = TASK_VALUES.div_ceil(cols).max(1);
        exec.parallel_for(rows.div_ceil(task), |i| {
            (i * task..rows.min((i + 1) * task)).for_each(one);
        });
    }
}

/// Values between the starts of two rows: padded, and not a multiple of 1024, whose rows would share cache sets.
fn row_stride(cols: usize) -> usize {
    let stride = padded(cols);
    if stride > 0 && stride.is_multiple_of(1024) { stride + PAD } else { stride }
}

/// Bytes between the starts of two rows of 8-bit codes.
fn codes_stride(cols: usize) -> usize {
    cols.next_multiple_of(LINE)
}

/// One row of f32, normalised if asked, zero padded.
fn copy_row(isa: Isa, x: &[f32], norm: Option<Norm<'_>>, out: &mut [f32]) {
    let (out, padding) = out.split_at_mut(x.len());
    padding.fill(0.0);
    match norm {
        None => out.copy_from_slice(x),
        Some(norm) => dispatch!(isa, |s| normalise(s, x, norm, out)),
    }
}

#[inline(always)]
fn normalise<S: Simd>(s: S, x: &[f32], norm: Norm<'_>, out: &mut [f32]) {
    let inv = 1.0 / (simd::dot(s, x, x) / x.len() as f32 + norm.eps).sqrt();
    for ((out, &x), &w) in out.iter_mut().zip(x).zip(norm.weight) {
        *out = x * inv * w;
    }
}

/// Rounds to bfloat16, to nearest even; NaN stays NaN.
#[inline(always)]
fn round_row(x: &[f32], out: &mut [u16]) {
    for (out, &x) in out.iter_mut().zip(x) {
        let bits = x.to_bits();
        let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
        // A NaN's payload could carry into the sign.
        *out = if x.is_nan() { 0x7fc0 } else { rounded as u16 };
    }
}
