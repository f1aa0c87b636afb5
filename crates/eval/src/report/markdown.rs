//! The results as Markdown tables for a README.

use super::format::{between, bytes, count, markdown, number};
use super::{Comparison, Report, SpeedTable, Table, TaskTable, TokensOf};

const DASH: &str = "–";

impl Report {
    /// Every table as GitHub-flavoured Markdown, with headings where there are several, and the commands. Values are escaped.
    pub fn to_markdown(&self) -> String {
        let mut tables: Vec<Table> = self.comparisons.iter().map(Comparison::table).collect();
        tables.extend(self.tasks.iter().map(TaskTable::table));
        tables.extend(self.speeds.iter().map(SpeedTable::table));
        tables.extend(self.tables.iter().cloned());
        let mut out = String::new();
        for table in &tables {
            if tables.len() > 1 {
                out.push_str(&format!("### {}\n\n", markdown(&table.title)));
            }
            out.push_str(&table.to_markdown());
            out.push('\n');
            if !table.note.is_empty() {
                out.push_str(&format!("{}\n\n", markdown(&table.note)));
            }
        }
        let commands: Vec<&str> =
            self.sources.iter().filter_map(|s| s.run.as_ref()).map(|run| run.command.as_str()).collect();
        if !commands.is_empty() {
            // Indented, no text can end the block.
            commands
                .iter()
                .for_each(|c| out.push_str(&format!("    {}\n", c.replace(char::is_control, " "))));
        }
        out
    }
}

impl Table {
    /// Its head and rows alone; the first column is text, the others are figures.
    pub fn to_markdown(&self) -> String {
        let line = |cells: &[String]| {
            format!("| {} |\n", cells.iter().map(|c| markdown(c)).collect::<Vec<_>>().join(" | "))
        };
        let rule = vec!["---".to_string(); self.columns.len()].join("|");
        let mut out = format!("{}|{rule}|\n", line(&self.columns));
        self.rows.iter().for_each(|row| out.push_str(&line(row)));
        out
    }
}

fn shown<T>(value: Option<T>, format: impl Fn(T) -> String) -> String {
    value.map_or_else(|| DASH.into(), format)
}

/// Every value once, in order.
fn sorted(values: impl Iterator<Item = usize>) -> Vec<usize> {
    let mut values: Vec<usize> = values.collect();
    values.sort_unstable();
    values.dedup();
    values
}

impl Comparison {
    /// One line per model; decode speeds in columns by depth where there are any.
    pub fn table(&self) -> Table {
        let depths = sorted(self.rows.iter().flat_map(|row| row.decode_tok_s.iter().map(|d| d.0)));
        let has_ratio = self.rows.iter().any(|row| row.ppl_ratio.is_some());
        let mut columns: Vec<String> = vec!["model".into(), "groups converted".into(), "perplexity".into()];
        columns.extend(has_ratio.then(|| "perplexity / base".into()));
        columns.extend(["KL to base".into(), "top-1 agreement".into()]);
        columns.extend(self.context.map(|context| format!("cache at {}", count(context))));
        columns.push("cache at 8k".into());
        let percent = |x: f64| format!("{:.1} %", 100.0 * x);
        let nats = |x: f64| format!("{x:.4}");
        let rows = self.rows.iter().map(|v| {
            let mut cells = vec![
                v.name.clone(),
                if v.total > 0 { format!("{}/{}", v.converted, v.total) } else { DASH.into() },
                shown(v.ppl, number),
            ];
            cells.extend(has_ratio.then(|| shown(v.ppl_ratio, |r| between(r.value, r.interval, number))));
            cells.push(shown(v.kl, |x| between(x, v.kl_interval, nats)));
            cells.push(shown(v.top1_agreement, |x| between(x, v.top1_interval, percent)));
            cells.extend(self.context.map(|_| shown(v.cache_bytes, bytes)));
            cells.push(shown(v.cache_bytes_8k, bytes));
            let rate = |depth: usize| v.decode_tok_s.iter().find(|d| d.0 == depth);
            cells.extend(depths.iter().map(|&d| shown(rate(d), |d| format!("{:.1}", d.1))));
            cells
        });
        let rows = rows.collect();
        columns.extend(depths.iter().map(|d| format!("decode tok/s at {d}")));
        Table { section: "Quality".into(), title: self.title.clone(), note: self.note.clone(), rows, columns }
    }
}

impl TaskTable {
    /// One line per model, contexts in columns: right answers, share and interval.
    pub fn table(&self) -> Table {
        let contexts = sorted(self.rows.iter().flat_map(|row| row.scores.iter().map(|s| s.0)));
        let rows = self.rows.iter().map(|row| {
            let score = |context: usize| row.scores.iter().find(|s| s.0 == context);
            let cells = contexts.iter().map(|&c| shown(score(c), |s| s.1.to_string()));
            std::iter::once(row.model.clone()).chain(cells).collect()
        });
        Table {
            section: "Long-range tasks".into(),
            title: match self.by {
                TokensOf::Context => self.title.clone(),
                TokensOf::Distance => format!("{}, by distance", self.title),
            },
            note: "Right answers, share, and its 95 % interval (Wilson).".into(),
            rows: rows.collect(),
            columns: std::iter::once("model".into()).chain(contexts.iter().map(|&c| count(c))).collect(),
        }
    }
}

impl SpeedTable {
    /// One line per model and depth.
    pub fn table(&self) -> Table {
        let rate = |x: f64| if x >= 1000.0 { count(x as usize) } else { format!("{x:.1}") };
        let rows = self.series.iter().flat_map(|series| {
            series.points.iter().map(move |p| {
                vec![
                    series.name.clone(),
                    count(p.depth),
                    shown(p.prefill_tok_s, rate),
                    shown(p.decode_tok_s, rate),
                    shown(p.cache_bytes, bytes),
                ]
            })
        });
        Table {
            section: "Speed and cache".into(),
            title: format!("Speed and cache: {}", self.title),
            note: String::new(),
            rows: rows.collect(),
            columns: ["model", "depth", "prefill tok/s", "decode tok/s", "cache"].map(String::from).into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::VariantRow;
    use super::super::testing::hostile_report;
    use super::*;

    #[test]
    fn every_row_has_a_cell_for_every_column() {
        let base = VariantRow {
            name: "base".into(),
            total: 4,
            ppl: Some(24.5),
            decode_tok_s: vec![(2048, 30.0)],
            ..VariantRow::default()
        };
        let other = VariantRow { decode_tok_s: vec![(8192, 10.0)], ..base.clone() };
        let comparison = Comparison { rows: vec![base, other], ..Comparison::default() };
        let text = Report { comparisons: vec![comparison], ..Report::default() }.to_markdown();
        let lines: Vec<&str> = text.lines().filter(|l| !l.is_empty()).collect();
        assert_eq!(lines.iter().map(|l| l.matches('|').count()).collect::<Vec<_>>(), [9; 4]);
        assert_eq!(lines[2], "| base | 0/4 | 24.50 | – | – | – | 30.0 | – |");
    }

    #[test]
    fn hostile_text_stays_in_its_cell() {
        let text = hostile_report().to_markdown();
        assert!(
            !text.contains('<') || text.lines().filter(|l| l.contains('<')).all(|l| l.starts_with("    "))
        );
        for line in text.lines().filter(|l| l.starts_with('|')) {
            let bars = line.replace("\\|", "").matches('|').count();
            assert!(bars == 7 || bars == 3 || bars == 6, "{line}");
        }
        assert!(!text.contains('\u{1b}'));
    }
}
