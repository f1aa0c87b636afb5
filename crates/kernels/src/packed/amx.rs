//! AMX bfloat16 tiles: the instructions behind a trait, whether this process may use them, and the product built on them.
//! Knows tiles and panels; knows nothing of threads and outputs.

use std::arch::asm;
use std::sync::OnceLock;

use super::{PAD, PANEL, padded};
use crate::Store;

/// Rows of activations of one tile register.
const TILE_ROWS: usize = 16;
/// Bytes of a row of a tile.
const TILE_ROW_BYTES: usize = 64;
/// Rows and panels that one call multiplies: four accumulators, two tiles of activations, two of weights.
pub(crate) const SHAPE: (usize, usize) = (2 * TILE_ROWS, 2);

/// The rows of so many that fill whole tiles.
pub(crate) fn whole(rows: usize) -> usize {
    rows / TILE_ROWS * TILE_ROWS
}

/// Shapes of the eight tiles, in the layout that `ldtilecfg` reads.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub(crate) struct TileConfig {
    pub palette: u8,
    pub start_row: u8,
    reserved: [u8; 14],
    /// Bytes per row.
    pub row_bytes: [u16; 16],
    /// Rows.
    pub rows: [u8; 16],
}

/// All eight tiles 16 rows of 64 bytes: the padding of panels and activations makes other shapes unnecessary.
pub(crate) const CONFIG: TileConfig = {
    let mut config =
        TileConfig { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
    let mut tile = 0;
    while tile < 8 {
        config.row_bytes[tile] = TILE_ROW_BYTES as u16;
        config.rows[tile] = TILE_ROWS as u8;
        tile += 1;
    }
    config
};

/// The six tile operations.
pub(crate) trait Tiles {
    /// Tiles that are configured as [`CONFIG`] says: those of a thread that holds [`Configured`], or fresh ones of the model.
    fn ready() -> Self;
    /// `ldtilecfg`.
    ///
    /// # Safety
    /// The implementation's instructions are available.
    unsafe fn configure(&mut self, config: &TileConfig);
    /// `tilerelease`.
    ///
    /// # Safety
    /// As [`configure`](Self::configure).
    unsafe fn release(&mut self);
    /// `tilezero`.
    ///
    /// # Safety
    /// The tiles are configured.
    unsafe fn zero<const T: usize>(&mut self);
    /// `tileloadd`.
    ///
    /// # Safety
    /// The tiles are configured; row `r` of the tile is readable at `p + r · stride` bytes.
    unsafe fn load<const T: usize>(&mut self, p: *const u8, stride: usize);
    /// `tilestored`.
    ///
    /// # Safety
    /// The tiles are configured; row `r` of the tile is writable at `p + r · stride` bytes.
    unsafe fn store<const T: usize>(&mut self, p: *mut u8, stride: usize);
    /// `tdpbf16ps`: `C += A · B`, `A` in pairs along its rows, `B` in pairs of rows.
    ///
    /// # Safety
    /// The tiles are configured with shapes that fit.
    unsafe fn multiply<const C: usize, const A: usize, const B: usize>(&mut self);
}

/// The CPU's tiles.
pub(crate) struct Hardware;

impl Tiles for Hardware {
    #[inline(always)]
    fn ready() -> Self {
        Self
    }
    #[inline(always)]
    unsafe fn configure(&mut self, config: &TileConfig) {
        // SAFETY: AMX is available by the caller's promise; reads 64 bytes.
        unsafe { asm!("ldtilecfg [{0}]", in(reg) config, options(nostack, preserves_flags, readonly)) }
    }
    #[inline(always)]
    unsafe fn release(&mut self) {
        // SAFETY: AMX is available by the caller's promise.
        unsafe { asm!("tilerelease", options(nostack, preserves_flags, nomem)) }
    }
    #[inline(always)]
    unsafe fn zero<const T: usize>(&mut self) {
        // SAFETY: configured by the caller's promise.
        unsafe { asm!("tilezero tmm{t}", t = const T, options(nostack, preserves_flags, nomem)) }
    }
    #[inline(always)]
    unsafe fn load<const T: usize>(&mut self, p: *const u8, stride: usize) {
        // SAFETY: configured and readable by the caller's promise.
        unsafe {
            asm!("tileloadd tmm{t}, [{p} + {s}]", t = const T, p = in(reg) p, s = in(reg) stride,
                options(nostack, preserves_flags, readonly));
        }
    }
    #[inline(always)]
    unsafe fn store<const T: usize>(&mut self, p: *mut u8, stride: usize) {
        // SAFETY: configured and writable by the caller's promise.
        unsafe {
            asm!("tilestored [{p} + {s}], tmm{t}", t = const T, p = in(reg) p, s = in(reg) stride,
                options(nostack, preserves_flags));
        }
    }
    #[inline(always)]
    unsafe fn multiply<const C: usize, const A: usize, const B: usize>(&mut self) {
        // SAFETY: configured by the caller's promise.
        unsafe {
            asm!("tdpbf16ps tmm{c}, tmm{a}, tmm{b}", c = const C, a = const A, b = const B,
                options(nostack, preserves_flags, nomem));
        }
    }
}

/// Tiles configured on this thread, released at the end.
pub(crate) struct Configured(());

impl Configured {
    /// Configures this thread's tiles; does nothing on a CPU without them.
    pub(crate) fn new() -> Self {
        if supported() {
            // SAFETY: AMX was detected and permitted.
            unsafe { Hardware.configure(&CONFIG) }
        }
        Self(())
    }
}

impl Drop for Configured {
    fn drop(&mut self) {
        if supported() {
            // SAFETY: AMX was detected and permitted.
            unsafe { Hardware.release() }
        }
    }
}

/// Where a block of outputs goes.
#[derive(Clone, Copy)]
pub(crate) struct Out {
    /// Row 0 of panel 0.
    pub first: *mut f32,
    /// Values between the starts of two rows.
    pub stride: usize,
    pub store: Store,
}

/// What a block multiplies.
#[derive(Clone, Copy)]
pub(crate) struct Operands<'a> {
    /// Reduced values of a row, without padding.
    pub cols: usize,
    /// BF16 panels lying one after another.
    pub weights: &'a [u16],
    pub panels: usize,
    /// BF16 rows `stride` apart, padded in both directions to whole tiles.
    pub x: &'a [u16],
    pub stride: usize,
    pub rows: usize,
}

/// `tile[r][p] = x[r] · panelᵀ` of BF16 operands; `tile` `[32][panels][16]`, rows beyond `rows` are garbage. Sums in f32,
/// subnormals count as zero.
///
/// # Panics
/// Without AMX (unit tests use the model instead), and when slices are too short.
pub(crate) fn tile(configured: &Configured, operands: Operands<'_>, tile: &mut [f32]) {
    let stride = operands.panels * PANEL;
    assert!(tile.len() >= operands.rows.next_multiple_of(TILE_ROWS) * stride);
    let out = Out { first: tile.as_mut_ptr(), stride, store: Store::Overwrite };
    // SAFETY: the tile has room for whole tiles of rows.
    unsafe { tile_into(configured, operands, out) }
}

/// [`tile`] of any number of rows straight into those of an output, overwriting or adding.
///
/// # Safety
/// `out` has `rows` rounded up to 16 rows of `16 · panels` values that are the caller's alone.
///
/// # Panics
/// As [`tile`].
pub(crate) unsafe fn tile_into(_configured: &Configured, operands: Operands<'_>, out: Out) {
    #[cfg(test)]
    if !supported() {
        let mut model = super::amx_model::Model::ready();
        // SAFETY: the caller's contract.
        return unsafe { multiply(&mut model, operands, out) };
    }
    assert!(supported(), "no AMX on this CPU");
    // SAFETY: the caller's contract.
    unsafe { multiply(&mut Hardware, operands, out) }
}

/// [`tile_into`] of any number of panels.
///
/// # Safety
/// As [`tile_into`].
///
/// # Panics
/// As [`tile_into`].
pub(crate) unsafe fn panels_into(configured: &Configured, operands: Operands<'_>, out: Out) {
    let Operands { cols, weights, panels, .. } = operands;
    for panel in (0..panels).step_by(SHAPE.1) {
        let weights = &weights[panel * padded(cols) * PANEL..];
        let operands = Operands { weights, panels: SHAPE.1.min(panels - panel), ..operands };
        // SAFETY: the caller's contract; these panels' columns are among the output's.
        unsafe { tile_into(configured, operands, Out { first: out.first.add(panel * PANEL), ..out }) };
    }
}

/// [`tile_into`] on any tiles, which are configured.
///
/// # Safety
/// As [`tile_into`].
#[inline(always)]
unsafe fn multiply<T: Tiles>(tiles: &mut T, operands: Operands<'_>, out: Out) {
    let Operands { cols, weights, panels, x, stride, rows } = operands;
    let cols = padded(cols);
    let tile_rows = rows.next_multiple_of(TILE_ROWS);
    assert!(panels <= SHAPE.1, "{panels} panels");
    assert!(weights.len() >= panels * cols * PANEL);
    assert!(rows == 0 || x.len() >= (tile_rows - 1) * stride + cols);
    if rows == 0 || panels == 0 {
        return;
    }
    for row in (0..tile_rows).step_by(SHAPE.0) {
        // SAFETY: the tiles are configured; the lengths were checked above; the caller's contract for the output.
        unsafe {
            let sides = Sides {
                steps: cols / PAD,
                w: weights.as_ptr().cast(),
                panel_bytes: 2 * cols * PANEL,
                x: x.as_ptr().add(row * stride).cast(),
                stride: 2 * stride,
            };
            let next = if row + SHAPE.0 < tile_rows { SHAPE.0 * out.stride } else { 0 };
            let out = Out { first: out.first.add(row * out.stride), ..out };
            match (row + TILE_ROWS < tile_rows, panels > 1) {
                (true, true) => block::<T, true, true>(tiles, sides, out, next),
                (true, false) => block::<T, true, false>(tiles, sides, out, next),
                (false, true) => block::<T, false, true>(tiles, sides, out, next),
                (false, false) => block::<T, false, false>(tiles, sides, out, next),
            }
        }
    }
}

/// Where a block's operands start, in bytes.
#[derive(Clone, Copy)]
struct Sides {
    /// Tiles along the reduction.
    steps: usize,
    w: *const u8,
    panel_bytes: usize,
    x: *const u8,
    /// Between rows of `x`.
    stride: usize,
}

/// Tiles 0 to 3 sum (rows × panels), 4 and 5 hold activations, 6 and 7 weights. The outputs `next` values further
/// on, the next block's, are called into the cache meanwhile.
///
/// # Safety
/// As [`multiply`] checks, with 16 or (`ROWS`) 32 rows, 1 or (`PANELS`) 2 panels.
#[inline(always)]
unsafe fn block<T: Tiles, const ROWS: bool, const PANELS: bool>(
    tiles: &mut T,
    Sides { steps, w, panel_bytes, x, stride }: Sides,
    out: Out,
    next: usize,
) {
    /// Bytes of one tile of weights: 16 pairs of columns × 16 outputs.
    const W_TILE: usize = TILE_ROWS * TILE_ROW_BYTES;
    let (out, out_stride, add) =
        (out.first.cast::<u8>(), out.stride * size_of::<f32>(), out.store == Store::Accumulate);
    // SAFETY: inside panels, rows and `out` by the caller's promise: a tile of activations is 16 rows of 32 values, a tile of weights 16
    // pairs of columns.
    unsafe {
        if add {
            tiles.load::<0>(out, out_stride);
            if PANELS {
                tiles.load::<1>(out.add(TILE_ROW_BYTES), out_stride);
            }
            if ROWS {
                tiles.load::<2>(out.add(TILE_ROWS * out_stride), out_stride);
            }
            if ROWS && PANELS {
                tiles.load::<3>(out.add(TILE_ROWS * out_stride + TILE_ROW_BYTES), out_stride);
            }
        } else {
            tiles.zero::<0>();
            tiles.zero::<1>();
            tiles.zero::<2>();
            tiles.zero::<3>();
        }
        let rows_per_step = SHAPE.0.div_ceil(steps.max(1));
        let mut coming = out.wrapping_add(next * size_of::<f32>());
        let coming_end = coming.wrapping_add(if next > 0 { SHAPE.0 * out_stride } else { 0 });
        for step in 0..steps {
            for _ in 0..rows_per_step {
                if coming < coming_end {
                    prefetch(coming);
                    if PANELS {
                        prefetch(coming.wrapping_add(TILE_ROW_BYTES));
                    }
                    coming = coming.wrapping_add(out_stride);
                }
            }
            let x = x.add(step * TILE_ROW_BYTES);
            let w = w.add(step * W_TILE);
            tiles.load::<4>(x, stride);
            tiles.load::<6>(w, TILE_ROW_BYTES);
            tiles.multiply::<0, 4, 6>();
            if ROWS {
                tiles.load::<5>(x.add(TILE_ROWS * stride), stride);
                tiles.multiply::<2, 5, 6>();
            }
            if PANELS {
                tiles.load::<7>(w.add(panel_bytes), TILE_ROW_BYTES);
                tiles.multiply::<1, 4, 7>();
            }
            if ROWS && PANELS {
                tiles.multiply::<3, 5, 7>();
            }
        }
        tiles.store::<0>(out, out_stride);
        if PANELS {
            tiles.store::<1>(out.add(TILE_ROW_BYTES), out_stride);
        }
        if ROWS {
            tiles.store::<2>(out.add(TILE_ROWS * out_stride), out_stride);
        }
        if ROWS && PANELS {
            tiles.store::<3>(out.add(TILE_ROWS * out_stride + TILE_ROW_BYTES), out_stride);
        }
    }
}

/// Calls the line at `p`, which need not exist, into the cache to be written.
#[inline(always)]
fn prefetch(p: *const u8) {
    use std::arch::x86_64::{_MM_HINT_ET0, _mm_prefetch};
    // SAFETY: a hint, which cannot fault.
    unsafe { _mm_prefetch::<_MM_HINT_ET0>(p.cast()) }
}

/// Whether the CPU has bfloat16 tiles, the operating system saves them and permits them to this process, and they
/// compute what they should. Asked once.
pub(crate) fn supported() -> bool {
    static SUPPORTED: OnceLock<bool> = OnceLock::new();
    *SUPPORTED.get_or_init(|| cpu_has_tiles() && permitted() && computes())
}

/// CPUID and the operating system's XCR0.
fn cpu_has_tiles() -> bool {
    use std::arch::x86_64::{__cpuid, __cpuid_count};
    /// Leaf 1, ECX: the operating system lets XGETBV run.
    const OSXSAVE: u32 = 1 << 27;
    /// Leaf 7, EDX: AMX-BF16 and AMX-TILE.
    const AMX: u32 = 1 << 22 | 1 << 24;
    /// XCR0: tile configuration and tile data are saved.
    const TILE_STATE: u32 = 1 << 17 | 1 << 18;
    if __cpuid(0).eax < 7 || __cpuid(1).ecx & OSXSAVE == 0 || __cpuid_count(7, 0).edx & AMX != AMX {
        return false;
    }
    let xcr0: u32;
    // SAFETY: XGETBV may run because OSXSAVE is set.
    unsafe {
        asm!("xgetbv", in("ecx") 0, out("eax") xcr0, out("edx") _, options(nostack, nomem, preserves_flags))
    };
    xcr0 & TILE_STATE == TILE_STATE
}

/// Asks Linux for the tile data state, for the whole process.
#[cfg(target_os = "linux")]
fn permitted() -> bool {
    const SYS_ARCH_PRCTL: usize = 158;
    const ARCH_REQ_XCOMP_PERM: usize = 0x1023;
    const XFEATURE_XTILEDATA: usize = 18;
    let status: isize;
    // SAFETY: the call takes two integers, touches no memory of ours; the kernel clobbers rcx and r11.
    unsafe {
        asm!("syscall", inlateout("rax") SYS_ARCH_PRCTL as isize => status,
            in("rdi") ARCH_REQ_XCOMP_PERM, in("rsi") XFEATURE_XTILEDATA,
            out("rcx") _, out("r11") _, options(nostack));
    }
    status == 0
}

/// Other systems have no known way to ask.
#[cfg(not(target_os = "linux"))]
fn permitted() -> bool {
    false
}

/// One product of small integers, which bfloat16 holds exactly, against integer arithmetic.
fn computes() -> bool {
    let (a, b, want) = known_product();
    let mut got = vec![f32::NAN; TILE_ROWS * PANEL];
    let out = Out { first: got.as_mut_ptr(), stride: PANEL, store: Store::Overwrite };
    // SAFETY: CPUID, XCR0 and the operating system's permission were checked by `supported` before; `got` is a whole tile.
    unsafe {
        Hardware.configure(&CONFIG);
        multiply(&mut Hardware, known_operands(&a, &b), out);
        Hardware.release();
    }
    got == want
}

/// The operands of [`known_product`].
fn known_operands<'a>(a: &'a [u16], b: &'a [u16]) -> Operands<'a> {
    Operands { cols: PAD, weights: b, panels: 1, x: a, stride: PAD, rows: TILE_ROWS }
}

/// Activations `[16][32]`, a panel of 32 columns, their product `[16][16]`.
pub(super) fn known_product() -> (Vec<u16>, Vec<u16>, Vec<f32>) {
    let bf16 = |value: i32| (value as f32).to_bits().wrapping_shr(16) as u16;
    let x = |row: usize, col: usize| ((row * 5 + col * 3) % 17) as i32 - 8;
    let w = |out: usize, col: usize| ((out * 7 + col * 11) % 13) as i32 - 6;
    let a = (0..TILE_ROWS * PAD).map(|i| bf16(x(i / PAD, i % PAD))).collect();
    let b = (0..PAD * PANEL).map(|i| bf16(w(i / 2 % PANEL, i / (2 * PANEL) * 2 + i % 2))).collect();
    let dot = |row: usize, out: usize| (0..PAD).map(|col| x(row, col) * w(out, col)).sum::<i32>();
    let want = (0..TILE_ROWS * PANEL).map(|i| dot(i / PANEL, i % PANEL) as f32).collect();
    (a, b, want)
}

#[cfg(test)]
mod tests {
    use super::super::amx_model::Model;
    use super::*;

    #[test]
    fn the_model_computes_the_known_product() {
        let (a, b, want) = known_product();
        let mut got = vec![f32::NAN; TILE_ROWS * PANEL];
        let out = Out { first: got.as_mut_ptr(), stride: PANEL, store: Store::Overwrite };
        // SAFETY: the model needs no instructions; `got` is a whole tile.
        unsafe { multiply(&mut Model::ready(), known_operands(&a, &b), out) };
        assert_eq!(got, want);
    }

    #[test]
    fn blocks_of_every_size_use_only_their_rows_and_panels() {
        let bf16 = |value: f32| half::bf16::from_f32(value).to_bits();
        let noise = |seed, n| crate::testing::noise(seed, n).into_iter().map(bf16).collect::<Vec<u16>>();
        let value = |bits: u16| f64::from(half::bf16::from_bits(bits).to_f32());
        for cols in [1, 31, 32, 33, 64, 100] {
            let (padded, stride) = (padded(cols), padded(cols) + PAD);
            for (rows, panels) in
                [(1, 1), (5, 2), (16, 1), (16, 2), (17, 1), (31, 2), (32, 2), (32, 1), (0, 1)]
            {
                let mut x = noise(1, SHAPE.0 * stride);
                // Between and beyond the rows: never used for the rows asked for.
                for (i, x) in x.iter_mut().enumerate() {
                    let (row, col) = (i / stride, i % stride);
                    *x = if row >= rows || col >= padded {
                        bf16(f32::NAN)
                    } else if col >= cols {
                        0
                    } else {
                        *x
                    };
                }
                let w = noise(2, panels * padded * PANEL);
                let mut tile = vec![f32::NAN; SHAPE.0 * panels * PANEL + 1];
                let operands = Operands { cols, weights: &w, panels, x: &x, stride, rows };
                let mut run = |store| {
                    let out = Out { first: tile.as_mut_ptr(), stride: panels * PANEL, store };
                    // SAFETY: the model needs no instructions; `tile` has all rows.
                    unsafe {
                        multiply(&mut Model::ready(), operands, out);
                    }
                };
                run(Store::Overwrite);
                run(Store::Accumulate);
                assert!(tile[SHAPE.0 * panels * PANEL].is_nan());
                for row in 0..rows {
                    for out in 0..panels * PANEL {
                        let panel = &w[out / PANEL * padded * PANEL..];
                        let term = |col: usize| {
                            value(x[row * stride + col])
                                * value(panel[(col / 2 * PANEL + out % PANEL) * 2 + col % 2])
                        };
                        // Stored, then added.
                        let want = 2.0 * (0..cols).map(term).sum::<f64>();
                        let got = f64::from(tile[row * panels * PANEL + out]);
                        // Two sums of up to 100 products below 1 in f32.
                        assert!((got - want).abs() < 4e-5, "{rows}x{cols}x{panels}: {got}, reference {want}");
                    }
                }
            }
        }
    }
}
