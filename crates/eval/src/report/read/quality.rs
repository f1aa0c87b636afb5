//! Perplexity and KL of `eval`, the quickstart's results, generated text.

use super::{Input, Kind, Reader, distinct};
use crate::error::Result;
use crate::quality::Quality;
use crate::report::format::count;
use crate::report::{Comparison, Generation, SpeedPoint, SpeedSeries, SpeedTable, VariantRow};
use crate::run::{CACHE_TOKENS, RunInfo, RunModel};
use serde::{Deserialize, Serialize};

/// The quickstart's `results.json`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct QuickstartResults {
    /// Heading of the report.
    pub title: String,
    /// A paragraph below it.
    pub summary: String,
    /// The text that was trained and judged on.
    pub text: String,
    /// The comparison.
    pub models: Vec<VariantRow>,
    /// Generations side by side.
    pub generations: Vec<Generation>,
    /// What made it.
    pub run: RunInfo,
}

/// What `eval ppl` and `eval kl` print.
#[derive(Deserialize)]
struct QualityFile {
    #[serde(flatten)]
    own: Quality,
    base: Option<Quality>,
    context: usize,
}

/// What `generate --json` prints, as far as it is shown.
#[derive(Deserialize)]
struct GenerationFile {
    prompt: Option<String>,
    text: Option<String>,
}

impl Reader {
    pub(super) fn quickstart(&mut self, input: &Input<'_>) -> Result<()> {
        let results: QuickstartResults = input.parse(Kind::Quickstart)?;
        if self.report.title.is_empty() {
            (self.report.title, self.report.summary) = (results.title, results.summary);
        }
        let series = results
            .models
            .iter()
            .filter(|row| !row.decode_tok_s.is_empty())
            .map(|row| SpeedSeries {
                name: row.name.clone(),
                points: row
                    .decode_tok_s
                    .iter()
                    .map(|&(depth, rate)| SpeedPoint {
                        depth,
                        prefill_tok_s: None,
                        decode_tok_s: Some(rate),
                        cache_bytes: row.cache_bytes_8k.filter(|_| depth == CACHE_TOKENS),
                    })
                    .collect(),
            })
            .collect();
        self.report.speeds.push(SpeedTable { title: "quickstart, q8_0 weights, f16 cache".into(), series });
        self.report.comparisons.push(Comparison {
            title: format!("Held-out text of {}", results.text),
            note: "Perplexity is the geometric mean over the held-out files; KL is to the base model, nats per token.".into(),
            context: None,
            rows: results.models,
        });
        results.generations.into_iter().for_each(|g| self.report.add_generation(g));
        Ok(())
    }

    /// Models judged on the same windows of the same files stand in one comparison, whichever files they come from.
    pub(super) fn quality(&mut self, input: &Input<'_>, run: Option<&RunInfo>) -> Result<()> {
        let file: QualityFile = input.parse(Kind::Quality)?;
        let names: Vec<&str> = file.own.files.iter().map(|f| f.name.as_str()).collect();
        let title = format!("Held-out text, context {}", count(file.context));
        let note = format!(
            "{} scored tokens of {}. Perplexity is the geometric mean over the files; KL is to the base model, nats per token.",
            count(file.own.overall.tokens),
            if names.len() > 8 { format!("{} files", names.len()) } else { names.join(", ") }
        );
        let rows = &mut self.report.comparisons;
        let at = rows.iter().position(|c| (&c.title, &c.note) == (&title, &note)).unwrap_or_else(|| {
            rows.push(Comparison { title, note, ..Comparison::default() });
            rows.len() - 1
        });
        let comparison = &mut rows[at];
        let (own_name, base_name) = input.names(run);
        let model = |index: usize| run.and_then(|run| run.models.get(index));
        let is_compared = file.own.overall.kl.is_some();
        let own = row(own_name, &file.own, model(0));
        match file.base {
            Some(base) => comparison.add(row(base_name, &base, model(1)), input),
            // The base itself was not judged, but what it would get against itself is known.
            None if is_compared && model(1).is_some() => {
                let unmeasured =
                    VariantRow { kl: Some(0.0), top1_agreement: Some(1.0), ..described(base_name, model(1)) };
                comparison.add(unmeasured, input);
            }
            None => {}
        }
        comparison.add(own, input);
        Ok(())
    }

    /// The same prompt continued by several models is one entry.
    pub(super) fn generation(&mut self, input: &Input<'_>, run: Option<&RunInfo>) -> Result<()> {
        let file: GenerationFile = input.parse(Kind::Generation)?;
        let text = file.text.ok_or_else(|| {
            input.bad("holds token ids without text\nhint: run generate where the model has its tokenizer")
        })?;
        let prompt = file.prompt.unwrap_or_else(|| "(not recorded)".into());
        let texts = vec![(input.names(run).0, text)];
        self.report.add_generation(Generation { prompt, texts });
        Ok(())
    }
}

impl crate::report::Report {
    fn add_generation(&mut self, new: Generation) {
        match self.generations.iter_mut().find(|g| g.prompt == new.prompt) {
            Some(found) => found.texts.extend(new.texts),
            None => self.generations.push(new),
        }
    }
}

impl Comparison {
    /// Adds a row, or completes the one of the same model where nothing contradicts.
    fn add(&mut self, mut row: VariantRow, input: &Input<'_>) {
        if let Some(found) = self.rows.iter_mut().find(|found| found.name == row.name && agrees(found, &row))
        {
            found.ppl = found.ppl.or(row.ppl);
            found.kl = found.kl.or(row.kl);
            found.top1_agreement = found.top1_agreement.or(row.top1_agreement);
            found.cache_bytes_8k = found.cache_bytes_8k.or(row.cache_bytes_8k);
            if found.files.is_empty() {
                found.files = row.files;
            }
            return;
        }
        row.name = distinct(&row.name, input, |name| self.rows.iter().any(|r| r.name == name));
        // Bases first: they are what the others are compared with.
        let at = if row.is_base() {
            self.rows.iter().take_while(|r| r.is_base()).count()
        } else {
            self.rows.len()
        };
        self.rows.insert(at, row);
    }
}

/// Whether two rows can be of the same model: no measure differs.
fn agrees(a: &VariantRow, b: &VariantRow) -> bool {
    fn same<T: PartialEq>(a: Option<T>, b: Option<T>) -> bool {
        a.zip(b).is_none_or(|(a, b)| a == b)
    }
    same(a.ppl, b.ppl)
        && same(a.kl, b.kl)
        && same(a.top1_agreement, b.top1_agreement)
        && same(a.cache_bytes_8k, b.cache_bytes_8k)
}

fn row(name: String, quality: &Quality, model: Option<&RunModel>) -> VariantRow {
    VariantRow {
        ppl: Some(quality.overall.ppl),
        kl: quality.overall.kl,
        top1_agreement: quality.overall.top1_agreement,
        files: quality.files.clone(),
        ..described(name, model)
    }
}

/// A row of what a run says of a model.
fn described(name: String, model: Option<&RunModel>) -> VariantRow {
    VariantRow {
        name,
        description: model.map_or(String::new(), |m| format!("{} weights, {} cache", m.weights, m.kv_type)),
        converted: model.map_or(0, |m| m.converted),
        total: model.map_or(0, |m| m.total),
        cache_bytes_8k: model.map(|m| m.cache_bytes_8k),
        ..VariantRow::default()
    }
}
