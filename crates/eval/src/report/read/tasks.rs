//! Long-range tasks: passkey, HashHop, RULER, induction.

use super::{Input, Kind, Reader, distinct};
use crate::answers::Score;
use crate::error::Result;
use crate::report::{Report, TaskRow, TaskTable, TokensOf};
use crate::run::RunInfo;
use serde::Deserialize;

/// What the commands print.
#[derive(Deserialize)]
struct TaskFile {
    results: Vec<Cell>,
    base: Option<Base>,
}

#[derive(Deserialize)]
struct Base {
    results: Vec<Cell>,
}

/// A score at one context, of induction at one distance; passkey counts `samples`, the others `asked`. Intervals are computed again.
#[derive(Deserialize)]
struct Cell {
    #[serde(alias = "distance")]
    context: usize,
    correct: usize,
    #[serde(alias = "samples")]
    asked: usize,
    hops: Option<usize>,
    task: Option<String>,
}

impl Reader {
    pub(super) fn task(&mut self, input: &Input<'_>, kind: Kind, run: Option<&RunInfo>) -> Result<()> {
        let file: TaskFile = input.parse(kind)?;
        let (own, base) = input.names(run);
        let of_base = file.base.map(|b| b.results).unwrap_or_default();
        let mut found = Vec::new();
        for (model, cells) in [(base, of_base), (own, file.results)] {
            for cell in cells {
                if cell.asked == 0 || cell.correct > cell.asked {
                    return Err(input.bad(format!(
                        "{} right answers of {} at {} tokens",
                        cell.correct, cell.asked, cell.context
                    )));
                }
                found.push((
                    title(&cell, kind),
                    model.clone(),
                    (cell.context, Score::new(cell.correct, cell.asked)),
                ));
            }
        }
        // Rows of this file, so that a model keeps one row over its contexts but never takes over another file's.
        let mut rows: Vec<(String, TaskRow)> = Vec::new();
        for (title, model, score) in found {
            match rows.iter_mut().find(|(t, row)| *t == title && row.model == model) {
                Some((_, row)) => row.scores.push(score),
                None => rows.push((title, TaskRow { model, scores: vec![score] })),
            }
        }
        let by = if kind == Kind::Induction { TokensOf::Distance } else { TokensOf::Context };
        for (title, mut row) in rows {
            row.scores.sort_by_key(|s| s.0);
            let table = self.report.task_table(title, by);
            if !table.rows.contains(&row) {
                row.model = distinct(&row.model, input, |name| table.rows.iter().any(|r| r.model == name));
                table.rows.push(row);
            }
        }
        Ok(())
    }
}

impl Report {
    /// The table of this title, begun if there is none.
    pub(super) fn task_table(&mut self, title: String, by: TokensOf) -> &mut TaskTable {
        let tables = &mut self.tasks;
        let at = tables.iter().position(|t| t.title == title).unwrap_or_else(|| {
            tables.push(TaskTable { title, by, rows: Vec::new() });
            tables.len() - 1
        });
        &mut tables[at]
    }
}

fn title(cell: &Cell, kind: Kind) -> String {
    match (kind, cell.hops, &cell.task) {
        (Kind::HashHop, Some(1), _) => "HashHop, 1 hop".into(),
        (Kind::HashHop, Some(hops), _) => format!("HashHop, {hops} hops"),
        (Kind::Induction, _, Some(task)) => format!("Induction, {task}"),
        (Kind::Ruler, _, Some(task)) => format!("RULER, {}", task.replace('_', " ")),
        _ => "Passkey".into(),
    }
}
