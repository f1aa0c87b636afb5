//! Results of `eval compare`: the file that it goes on with, or what it prints with `--json`.

use super::{Input, Kind, Reader};
use crate::answers::Score;
use crate::compare::{Comparison as Conversions, Found, PasskeyScore, RankCorrelation, Row};
use crate::error::Result;
use crate::report::format::count;
use crate::report::{Comparison, Report, SourceFile, Table, TaskRow, TokensOf, VariantRow};
use crate::run::RunInfo;

impl Reader {
    /// Reads either form; `text` is the whole file.
    pub(super) fn compare(&mut self, input: &Input<'_>, text: &str) -> Result<Vec<(String, String)>> {
        let conversions = if input.value.get("base").is_some() {
            input.parse(Kind::Compare)?
        } else {
            let Found { settings, base, rows } = Found::parse(text)
                .map_err(|e| input.bad(format!("malformed {}: {e}", Kind::Compare.name())))?;
            let base = base.ok_or_else(|| {
                input.bad("the base was not judged yet\nhint: run the same eval compare again, it goes on")
            })?;
            Conversions { settings, base, rows, rank_correlation: RankCorrelation::default() }
        };
        for score in conversions.rows.iter().flat_map(|row| &row.passkey).chain(&conversions.base.passkey) {
            if score.score.asked == 0 || score.score.correct > score.score.asked {
                return Err(input.bad(format!("passkeys at context {}: impossible counts", score.context)));
            }
        }
        let rho = &conversions.rank_correlation;
        if rho.rho.len() != rho.criteria.len() || rho.rho.iter().any(|row| row.len() != rho.criteria.len()) {
            return Err(input.bad("`rank_correlation` is not square"));
        }
        Ok(self.report.add_conversions(&conversions, &input.stem()))
    }
}

impl Report {
    /// The page of one comparison of conversions, named after the file that holds its results.
    pub fn of_conversions(conversions: &Conversions, path: String, run: RunInfo) -> Self {
        let mut report = Self {
            title: format!("Conversions of a {} model", conversions.settings.model),
            ..Self::default()
        };
        let facts = report.add_conversions(conversions, "");
        report.sources.push(SourceFile { path, kind: Kind::Compare.name().into(), facts, run: Some(run) });
        report
    }

    /// Adds its quality, passkeys and rank correlations, unless they are there already; gives what it says of itself. Where the title is taken,
    /// `stem` stands behind it.
    fn add_conversions(&mut self, conversions: &Conversions, stem: &str) -> Vec<(String, String)> {
        let Conversions { settings, rank_correlation, .. } = conversions;
        let mut new = quality(conversions);
        let taken = self.comparisons.iter().any(|c| c.title == new.title);
        let suffix = if taken { format!(", {stem}") } else { String::new() };
        if !self.comparisons.contains(&new) {
            new.title.push_str(&suffix);
            self.comparisons.push(new);
            self.add_passkeys(conversions, &suffix);
        }
        if rank_correlation.criteria.len() > 1 {
            self.add_table(rank_correlation.table());
        }
        vec![
            ("weights".into(), settings.weights.clone()),
            ("seed".into(), settings.seed.to_string()),
            ("SHA-256 of the text".into(), settings.text_sha256.clone()),
            ("SHA-256 of the head statistics".into(), settings.heads_sha256.clone()),
        ]
    }

    /// A table for each budget.
    fn add_passkeys(&mut self, conversions: &Conversions, suffix: &str) {
        let Conversions { base, rows, .. } = conversions;
        let mut betas: Vec<f64> = Vec::new();
        for row in rows.iter().filter(|row| !row.passkey.is_empty()) {
            if !betas.contains(&row.configuration.beta) {
                betas.push(row.configuration.beta);
            }
        }
        for beta in betas {
            let table =
                self.task_table(format!("Passkey of conversions, β {beta}{suffix}"), TokensOf::Context);
            table.rows.push(TaskRow { model: "base".into(), scores: scores(&base.passkey) });
            let of_beta = rows.iter().filter(|row| row.configuration.beta == beta);
            table.rows.extend(
                of_beta
                    .map(|row| TaskRow { model: row.configuration.series(), scores: scores(&row.passkey) }),
            );
        }
    }
}

/// The base and its conversions on the same text.
fn quality(conversions: &Conversions) -> Comparison {
    let Conversions { settings, base, rows, .. } = conversions;
    let total = rows.first().map_or(settings.model.layers * settings.model.kv_heads, |row| row.total);
    let own = VariantRow {
        name: "base".into(),
        total,
        ppl: Some(base.ppl),
        kl: Some(0.0),
        top1_agreement: Some(1.0),
        cache_bytes_8k: Some(base.cache_bytes_8k),
        cache_bytes: Some(base.cache_bytes),
        ..VariantRow::default()
    };
    let tokens =
        rows.first().map_or(String::new(), |row| format!("{} scored tokens; ", count(row.distance.tokens)));
    Comparison {
        title: format!("Conversions, context {}", count(settings.context)),
        note: format!(
            "{tokens}KL is to the base, nats per token; intervals are 95 %, of a bootstrap over windows. Weights {}. Windows of {} and {} sinks \
             where nothing else is said; β is the share of groups converted, or whose cache a baseline gets.",
            settings.weights, settings.window, settings.sinks
        ),
        context: Some(settings.context),
        rows: std::iter::once(own).chain(rows.iter().map(|row| variant(row, base.ppl))).collect(),
    }
}

fn variant(row: &Row, base_ppl: f64) -> VariantRow {
    let distance = &row.distance;
    VariantRow {
        name: row.configuration.to_string(),
        description: row.mixer.clone(),
        series: Some(row.configuration.series()),
        converted: row.converted,
        total: row.total,
        ppl: Some(base_ppl * distance.ppl_ratio.value),
        ppl_ratio: Some(distance.ppl_ratio),
        kl: Some(distance.kl.value),
        kl_interval: distance.kl.interval,
        top1_agreement: Some(distance.top1_agreement.value),
        top1_interval: distance.top1_agreement.interval,
        cache_bytes_8k: Some(row.cache_bytes_8k),
        cache_bytes: Some(row.cache_bytes),
        ..VariantRow::default()
    }
}

/// By context; intervals are computed again.
fn scores(passkey: &[PasskeyScore]) -> Vec<(usize, Score)> {
    let mut scores: Vec<_> =
        passkey.iter().map(|p| (p.context, Score::new(p.score.correct, p.score.asked))).collect();
    scores.sort_by_key(|s| s.0);
    scores
}

impl RankCorrelation {
    /// Criteria in rows and columns.
    pub(crate) fn table(&self) -> Table {
        let cell = |rho: &Option<f64>| rho.map_or("–".into(), |rho| format!("{rho:.2}"));
        let row = |(name, row): (&String, &Vec<Option<f64>>)| {
            std::iter::once(name.clone()).chain(row.iter().map(cell)).collect()
        };
        let title = "Spearman's ρ".to_string();
        Table {
            section: "Rank correlation of criteria".into(),
            note: "How alike criteria order the KV groups; 1: the same order.".into(),
            columns: std::iter::once(title.clone()).chain(self.criteria.iter().cloned()).collect(),
            rows: self.criteria.iter().zip(&self.rho).map(row).collect(),
            title,
        }
    }
}
