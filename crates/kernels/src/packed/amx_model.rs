//! The tile operations in plain Rust as the instruction set's manual defines them, for tests on CPUs without AMX.

use super::amx::{TileConfig, Tiles};

/// Most rows and bytes per row of a tile in palette 1.
const MAX_ROWS: usize = 16;
const MAX_ROW_BYTES: usize = 64;

/// Content of a tile.
type Tile = [[u8; MAX_ROW_BYTES]; MAX_ROWS];
const ZERO: Tile = [[0; MAX_ROW_BYTES]; MAX_ROWS];

/// Eight tiles. Every misuse that faults on the CPU panics.
pub(crate) struct Model {
    config: Option<TileConfig>,
    tiles: [Tile; 8],
}

/// Subnormals count as zero, in operands and results.
fn flush(x: f32) -> f32 {
    if x.is_subnormal() { 0.0f32.copysign(x) } else { x }
}

impl Model {
    pub(crate) fn new() -> Self {
        Self { config: None, tiles: [[[0xff; MAX_ROW_BYTES]; MAX_ROWS]; 8] }
    }
    /// Rows and bytes per row.
    fn shape(&self, tile: usize) -> (usize, usize) {
        let config = self.config.expect("tiles are configured");
        let shape = (usize::from(config.rows[tile]), usize::from(config.row_bytes[tile]));
        assert!(shape.0 > 0 && shape.1 > 0, "tile {tile} is not configured");
        shape
    }
    fn bf16(&self, tile: usize, row: usize, at: usize) -> f32 {
        let row = &self.tiles[tile][row];
        flush(f32::from_bits(u32::from(u16::from_le_bytes([row[2 * at], row[2 * at + 1]])) << 16))
    }
}

impl Tiles for Model {
    fn ready() -> Self {
        let mut model = Self::new();
        // SAFETY: the model needs no instructions.
        unsafe { model.configure(&super::amx::CONFIG) };
        model
    }
    unsafe fn configure(&mut self, config: &TileConfig) {
        assert!(config.palette == 1 && config.start_row == 0);
        for (tile, (&rows, &bytes)) in config.rows.iter().zip(&config.row_bytes).enumerate() {
            assert!(usize::from(rows) <= MAX_ROWS && usize::from(bytes) <= MAX_ROW_BYTES);
            assert!((rows == 0) == (bytes == 0) && (tile < 8 || rows == 0));
        }
        self.config = Some(*config);
        self.tiles = [ZERO; 8];
    }
    unsafe fn release(&mut self) {
        self.config = None;
    }
    unsafe fn zero<const T: usize>(&mut self) {
        self.shape(T);
        self.tiles[T] = ZERO;
    }
    unsafe fn load<const T: usize>(&mut self, p: *const u8, stride: usize) {
        let (rows, bytes) = self.shape(T);
        self.tiles[T] = ZERO;
        for row in 0..rows {
            // SAFETY: readable by the caller's promise.
            let source = unsafe { std::slice::from_raw_parts(p.add(row * stride), bytes) };
            self.tiles[T][row][..bytes].copy_from_slice(source);
        }
    }
    unsafe fn store<const T: usize>(&mut self, p: *mut u8, stride: usize) {
        let (rows, bytes) = self.shape(T);
        for row in 0..rows {
            // SAFETY: writable by the caller's promise.
            let target = unsafe { std::slice::from_raw_parts_mut(p.add(row * stride), bytes) };
            target.copy_from_slice(&self.tiles[T][row][..bytes]);
        }
    }
    unsafe fn multiply<const C: usize, const A: usize, const B: usize>(&mut self) {
        assert!(C != A && C != B && A != B, "tiles must differ");
        let ((rows, row_bytes), (a_rows, a_bytes), (b_rows, b_bytes)) =
            (self.shape(C), self.shape(A), self.shape(B));
        assert!(a_rows == rows && b_bytes == row_bytes && a_bytes / 4 == b_rows);
        for row in 0..rows {
            for out in 0..row_bytes / 4 {
                // Even and odd columns have sums of their own, added at the end.
                let mut sums = [0.0f32; 2];
                for pair in 0..a_bytes / 4 {
                    for (half, sum) in sums.iter_mut().enumerate() {
                        let (a, b) = (self.bf16(A, row, 2 * pair + half), self.bf16(B, pair, 2 * out + half));
                        *sum = flush(a.mul_add(b, *sum));
                    }
                }
                let cell = &mut self.tiles[C][row][4 * out..][..4];
                let old = flush(f32::from_le_bytes([cell[0], cell[1], cell[2], cell[3]]));
                cell.copy_from_slice(&flush(old + flush(sums[0] + sums[1])).to_le_bytes());
            }
        }
        for row in rows..MAX_ROWS {
            self.tiles[C][row] = [0; MAX_ROW_BYTES];
        }
    }
}
