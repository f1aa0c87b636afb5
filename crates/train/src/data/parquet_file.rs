//! Parquet files: a document per row of a string column `text`. Knows columns and rows; knows nothing of tokens.

use super::file::{Chunk, Emit, PIECE_BYTES, Piece, fail};
use crate::error::Result;
use parquet::basic::{ConvertedType, LogicalType, Type};
use parquet::column::reader::ColumnReader;
use parquet::errors::ParquetError;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::schema::types::SchemaDescriptor;
use std::fs::File;
use std::path::Path;

/// The column's name.
const COLUMN: &str = "text";
/// Rows decoded at once.
const ROWS: usize = 256;

/// Rows in order, those without a value left out. Columns other than `text` are not read.
pub(super) fn read_parquet(path: &Path, file: File, emit: &mut Emit<'_>) -> Result<()> {
    let bad = |e: ParquetError| fail(path, format!("malformed parquet: {e}"));
    let reader = SerializedFileReader::new(file).map_err(bad)?;
    let column = text_column(reader.metadata().file_metadata().schema_descr()).map_err(|e| fail(path, e))?;
    let mut row = 0_u64;
    let mut chunk = Chunk::default();
    for index in 0..reader.num_row_groups() {
        let group = reader.get_row_group(index).map_err(bad)?;
        let ColumnReader::ByteArrayColumnReader(mut values_of) =
            group.get_column_reader(column).map_err(bad)?
        else {
            return Err(fail(
                path,
                format!("malformed parquet: row group {index} holds `{COLUMN}` as another type"),
            ));
        };
        let optional = group.metadata().column(column).column_descr().max_def_level() > 0;
        let (first, expected) = (row, group.metadata().num_rows() as u64);
        loop {
            let (mut values, mut levels) = (Vec::new(), Vec::new());
            let (rows, ..) = values_of
                .read_records(ROWS, optional.then_some(&mut levels), None, &mut values)
                .map_err(bad)?;
            if rows == 0 {
                break;
            }
            let mut values = values.into_iter();
            for i in 0..rows {
                row += 1;
                let present = !optional || levels.get(i).is_some_and(|&level| level > 0);
                if !present {
                    continue;
                }
                let text = values.next().map(|value| String::from_utf8(value.data().to_vec()));
                let Some(Ok(text)) = text else {
                    emit(chunk);
                    return Err(fail(path, format!("row {row}: `{COLUMN}` is not UTF-8 text")));
                };
                chunk.bytes += text.len() as u64;
                chunk.pieces.push(Piece { text, ends: true });
            }
            if chunk.bytes >= PIECE_BYTES as u64 && !emit(std::mem::take(&mut chunk)) {
                return Ok(());
            }
        }
        if row - first != expected {
            let reason = format!("row group {index} holds {} rows, expected {expected}", row - first);
            return Err(fail(path, format!("malformed parquet: {reason}")));
        }
    }
    emit(chunk);
    Ok(())
}

/// Index of the column, or what is wrong with the file's columns.
fn text_column(schema: &SchemaDescriptor) -> std::result::Result<usize, String> {
    let leaf = (0..schema.num_columns()).find(|&i| schema.column(i).path().parts() == [COLUMN]);
    let is_string = |i: &usize| {
        let column = schema.column(*i);
        let annotated = matches!(column.logical_type_ref(), Some(LogicalType::String))
            || column.converted_type() == ConvertedType::UTF8;
        annotated && column.physical_type() == Type::BYTE_ARRAY && column.max_rep_level() == 0
    };
    if let Some(column) = leaf.filter(is_string) {
        return Ok(column);
    }
    let fields = schema.root_schema().get_fields();
    let names: Vec<&str> = fields.iter().map(|field| field.name()).collect();
    Err(match names.contains(&COLUMN) {
        true => format!(
            "its column `{COLUMN}` does not hold strings\nhint: documents are read from a string column `{COLUMN}`"
        ),
        false => format!(
            "has no column `{COLUMN}`, only {}\nhint: documents are read from a string column `{COLUMN}`; rename the one that holds them",
            names.join(", ")
        ),
    })
}
