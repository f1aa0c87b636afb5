//! `sinks.json`: absorbing positions with their tests and causes, massive activations, no-op heads.

use super::{Input, Reader};
use crate::error::Result;
use crate::report::Table;
use crate::report::format::{count, number};
use surgery::sinks::{Estimate, Sink, SinksReport};

const SECTION: &str = "Attention sinks";
/// Positions and dimensions listed.
const MAX_ROWS: usize = 40;
/// Positions listed of a dimension.
const MAX_PLACES: usize = 8;

impl Reader {
    pub(super) fn sinks(&mut self, input: &Input<'_>) -> Result<Vec<(String, String)>> {
        let file = SinksReport::read(input.path).map_err(|e| input.unreadable(e))?;
        self.report.add_table(positions(&file));
        let massive = massive(&file);
        if !massive.rows.is_empty() {
            self.report.add_table(massive);
        }
        let heads = file.no_op_names();
        Ok(vec![
            ("model".into(), file.model.to_string()),
            ("sequences".into(), format!("{} of up to {} tokens", file.sequences, count(file.context))),
            ("donors per sequence".into(), file.donors.to_string()),
            ("seed".into(), file.seed.to_string()),
            ("SHA-256 of the tokens".into(), file.data_sha256),
            (
                "no-op heads (layer.head)".into(),
                if heads.is_empty() { "none".into() } else { heads.join(" ") },
            ),
        ])
    }
}

fn positions(file: &SinksReport) -> Table {
    let more = file.sinks.len().saturating_sub(MAX_ROWS);
    let left_out = if more > 0 { format!(" {more} weaker ones are left out.") } else { String::new() };
    let columns = [
        "position",
        "token",
        "sequences",
        "heads",
        "attention",
        "nats",
        "value / median",
        "KL without value",
        "KL without key",
        "position code",
        "token's share",
        "sees only itself",
        "cause",
        "waiver",
    ];
    Table {
        section: SECTION.into(),
        title: "Absorbing positions".into(),
        note: format!(
            "Heads: share of all {} heads where it absorbs. Nats above the median key. The three shares say how much of its strength an ordinary \
             position takes over with that attribute, with 95 % bootstrap intervals. A waiver gives nothing: cutting its value changes little.{left_out}",
            file.model.layers * file.model.heads
        ),
        columns: columns.map(String::from).into(),
        rows: file.sinks.iter().take(MAX_ROWS).map(|sink| position(file, sink)).collect(),
    }
}

fn position(file: &SinksReport, sink: &Sink) -> Vec<String> {
    let dash = || "–".to_string();
    let share = |estimate: Option<Estimate>| {
        estimate.map_or_else(dash, |e| format!("{:.2} [{:.2}, {:.2}]", e.mean, e.low, e.high))
    };
    let mut cells = vec![
        count(sink.position),
        file.token_name(sink),
        format!("{}/{}", sink.sequences.len(), file.sequences),
        format!("{:.1} %", 100.0 * sink.share),
        format!("{:.2}", sink.mass),
        format!("{:.1}", sink.strength),
        format!("{:.2}", sink.value_ratio),
    ];
    match &sink.tests {
        Some(tests) => cells.extend([
            number(tests.kl_value),
            number(tests.kl_key),
            share(tests.codes),
            share(tests.tokens),
            share(tests.alone),
            format!("{}{}", tests.cause.describe(), if tests.clear { "" } else { ", not clear" }),
            if tests.waiver { "yes" } else { "no" }.into(),
        ]),
        None => {
            cells.extend((0..5).map(|_| dash()));
            cells.extend(["not tested".into(), dash()]);
        }
    }
    cells
}

fn massive(file: &SinksReport) -> Table {
    let dimensions =
        file.activations.iter().flat_map(|layer| layer.dimensions.iter().map(move |d| (layer, d)));
    let rows = dimensions.filter(|(_, d)| d.massive).take(MAX_ROWS).map(|(layer, d)| {
        let positions = d.positions();
        let more = if positions.len() > MAX_PLACES { ", …" } else { "" };
        let positions: Vec<String> = positions.iter().take(MAX_PLACES).map(usize::to_string).collect();
        vec![
            layer.layer.to_string(),
            d.dimension.to_string(),
            count(d.max as usize),
            count(d.ratio as usize),
            format!("{}{more}", positions.join(", ")),
        ]
    });
    Table {
        section: SECTION.into(),
        title: "Massive activations".into(),
        note: "Dimensions of the residual stream after a layer whose largest value is at least 100 and 1,000 times the median.".into(),
        columns: ["after layer", "dimension", "largest", "times the median", "at positions"].map(String::from).into(),
        rows: rows.collect(),
    }
}
