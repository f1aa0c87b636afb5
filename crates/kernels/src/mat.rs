//! Borrowed row-major matrix views with a row stride; every constructor checks its bounds.

use std::borrow::Cow;

/// A read-only view of `rows × cols` values whose rows start `row_stride` apart.
#[derive(Clone, Copy, Debug)]
pub struct MatRef<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
}

/// A mutable view of `rows × cols` values whose rows start `row_stride` apart.
#[derive(Debug)]
pub struct MatMut<'a> {
    data: &'a mut [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
}

fn check(len: usize, rows: usize, cols: usize, row_stride: usize) {
    assert!(cols <= row_stride || rows <= 1, "cols {cols} exceed row stride {row_stride}");
    let need = if rows == 0 { 0 } else { (rows - 1) * row_stride + cols };
    assert!(
        len >= need,
        "matrix view {rows}x{cols} stride {row_stride} needs {need} values, slice has {len}"
    );
}

impl<'a> MatRef<'a> {
    /// A view with an explicit stride. Panics when the slice is too short.
    pub fn new(data: &'a [f32], rows: usize, cols: usize, row_stride: usize) -> Self {
        check(data.len(), rows, cols, row_stride);
        Self { data, rows, cols, row_stride }
    }
    /// A contiguous `rows × cols` view.
    pub fn dense(data: &'a [f32], rows: usize, cols: usize) -> Self {
        Self::new(data, rows, cols, cols)
    }
    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }
    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }
    /// Distance between the starts of two rows, in values.
    pub fn row_stride(&self) -> usize {
        self.row_stride
    }
    /// Row `r`.
    pub fn row(&self, r: usize) -> &'a [f32] {
        assert!(r < self.rows, "row {r} of {}", self.rows);
        &self.data[r * self.row_stride..r * self.row_stride + self.cols]
    }
    /// Rows `start..start + rows`.
    pub fn rows_at(&self, start: usize, rows: usize) -> MatRef<'a> {
        assert!(start + rows <= self.rows, "rows {start}+{rows} of {}", self.rows);
        let data = if rows == 0 { &[] } else { &self.data[start * self.row_stride..] };
        MatRef::new(data, rows, self.cols, self.row_stride)
    }
    /// The underlying slice, starting at row 0, column 0.
    pub fn data(&self) -> &'a [f32] {
        self.data
    }
    /// The values row by row, without what lies between rows.
    pub fn to_dense(&self) -> Vec<f32> {
        let mut dense = Vec::with_capacity(self.rows * self.cols);
        (0..self.rows).for_each(|r| dense.extend_from_slice(self.row(r)));
        dense
    }
    /// [`to_dense`](Self::to_dense), without a copy where nothing lies between rows.
    pub fn dense_values(&self) -> Cow<'a, [f32]> {
        match self.row_stride == self.cols {
            true => Cow::Borrowed(&self.data[..self.rows * self.cols]),
            false => Cow::Owned(self.to_dense()),
        }
    }
    /// Columns `start..start + cols` of every row.
    pub fn columns(&self, start: usize, cols: usize) -> MatRef<'a> {
        assert!(start + cols <= self.cols, "columns {start}+{cols} of {}", self.cols);
        MatRef::new(if self.rows == 0 { &[] } else { &self.data[start..] }, self.rows, cols, self.row_stride)
    }
}

impl<'a> MatMut<'a> {
    /// A view with an explicit stride. Panics when the slice is too short.
    pub fn new(data: &'a mut [f32], rows: usize, cols: usize, row_stride: usize) -> Self {
        check(data.len(), rows, cols, row_stride);
        Self { data, rows, cols, row_stride }
    }
    /// A contiguous `rows × cols` view.
    pub fn dense(data: &'a mut [f32], rows: usize, cols: usize) -> Self {
        Self::new(data, rows, cols, cols)
    }
    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }
    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }
    /// Distance between the starts of two rows, in values.
    pub fn row_stride(&self) -> usize {
        self.row_stride
    }
    /// Row `r`.
    pub fn row_mut(&mut self, r: usize) -> &mut [f32] {
        assert!(r < self.rows, "row {r} of {}", self.rows);
        &mut self.data[r * self.row_stride..r * self.row_stride + self.cols]
    }
    /// Every row in order, as disjoint slices that tasks can share out.
    pub fn into_rows(self) -> Vec<&'a mut [f32]> {
        let (rows, cols) = (self.rows, self.cols);
        if cols == 0 {
            return (0..rows).map(|_| Default::default()).collect();
        }
        self.data.chunks_mut(self.row_stride.max(cols)).take(rows).map(|row| &mut row[..cols]).collect()
    }
    /// The underlying slice, starting at row 0, column 0.
    pub fn data_mut(&mut self) -> &mut [f32] {
        self.data
    }
    /// A read-only view of the same values.
    pub fn as_ref(&self) -> MatRef<'_> {
        MatRef { data: self.data, rows: self.rows, cols: self.cols, row_stride: self.row_stride }
    }
    /// A shorter-lived mutable view of the same values.
    pub fn reborrow(&mut self) -> MatMut<'_> {
        MatMut { data: self.data, rows: self.rows, cols: self.cols, row_stride: self.row_stride }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn views_address_the_right_values() {
        let data: Vec<f32> = (0..22).map(|i| i as f32).collect();
        let view = MatRef::new(&data, 4, 4, 6);
        assert_eq!(view.row(3), [18.0, 19.0, 20.0, 21.0]);
        assert_eq!(view.columns(1, 2).row(2), [13.0, 14.0]);
        assert_eq!(view.rows_at(2, 2).row(1), view.row(3));
        assert_eq!(view.rows_at(4, 0).rows(), 0);
        let mut copy = data.clone();
        let rows = MatMut::new(&mut copy, 4, 4, 6).into_rows();
        assert_eq!(rows.len(), 4);
        assert_eq!(rows[3], view.row(3));
        assert_eq!(MatMut::dense(&mut [], 3, 0).into_rows().len(), 3);
    }

    #[test]
    #[should_panic(expected = "needs 22 values")]
    fn short_slices_are_refused() {
        MatRef::new(&[0.0; 21], 4, 4, 6);
    }
}
