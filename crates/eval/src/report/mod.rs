//! One self-contained HTML page from any set of results: no network, works from `file://`, light and dark.
//! The page is a fixed template; results travel inside it as JSON and are drawn as SVG by the page's own script.

use crate::error::{EvalError, Result};
use crate::quality::FileQuality;
use model::HeadPlan;
use serde::{Deserialize, Serialize};
use std::path::Path;
use surgery::HeadsReport;

const TEMPLATE: &str = include_str!("page.html");
const STYLE: &str = include_str!("page.css");
const SCRIPT: &str = include_str!("page.js");

/// One model of a comparison. Absent measurements are shown as dashes.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct VariantRow {
    /// Short name.
    pub name: String,
    /// What it is, in a few words.
    pub description: String,
    /// KV groups converted.
    pub converted: usize,
    /// KV groups in all.
    pub total: usize,
    /// Held-out perplexity, geometric mean over files.
    pub ppl: Option<f64>,
    /// Mean KL to the base, nats per token.
    pub kl: Option<f64>,
    /// Share of positions where the best token is the base's.
    pub top1_agreement: Option<f64>,
    /// Cache bytes after 8192 tokens.
    pub cache_bytes_8k: Option<usize>,
    /// Decode tokens per second, `(depth, rate)`.
    pub decode_tok_s: Vec<(usize, f64)>,
    /// Perplexity by file.
    pub files: Vec<FileQuality>,
}

/// A line of a chart.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Curve {
    /// Name in the legend.
    pub name: String,
    /// Meaning of x.
    pub x_label: String,
    /// Meaning of y.
    pub y_label: String,
    /// `(x, y)`.
    pub points: Vec<(f64, f64)>,
}

/// One prompt continued by several models.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Generation {
    /// The prompt.
    pub prompt: String,
    /// `(model name, text)`.
    pub texts: Vec<(String, String)>,
}

/// Everything a page can show; empty parts are left out.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Heading.
    pub title: String,
    /// A paragraph below it.
    pub summary: String,
    /// Head statistics.
    pub heads: Option<HeadsReport>,
    /// The plan, drawn over the head maps.
    pub plan: Option<HeadPlan>,
    /// The comparison.
    pub variants: Vec<VariantRow>,
    /// Learning curves.
    pub curves: Vec<Curve>,
    /// Generations side by side.
    pub generations: Vec<Generation>,
    /// Commands that reproduce the page.
    pub commands: Vec<String>,
    /// Versions and machine facts, `(name, value)`.
    pub environment: Vec<(String, String)>,
}

impl Report {
    /// The page.
    pub fn to_html(&self) -> Result<String> {
        let json = serde_json::to_string(self).map_err(|e| EvalError::Argument(format!("report: {e}")))?;
        // Inside a script element only `<` can end the element or open a comment.
        let json = json.replace('<', "\\u003c").replace('\u{2028}', "\\u2028").replace('\u{2029}', "\\u2029");
        Ok(TEMPLATE
            .replace("{{title}}", &escape(&self.title))
            .replace("{{style}}", STYLE)
            .replace("{{script}}", SCRIPT)
            .replace("{{data}}", &json))
    }

    /// Writes the page atomically.
    pub fn write_html(&self, path: &Path) -> Result<()> {
        weights::files::atomic_write(path, self.to_html()?.as_bytes())?;
        Ok(())
    }

    /// The comparison as a GitHub-flavoured Markdown table.
    pub fn to_markdown(&self) -> String {
        let depths: Vec<usize> =
            self.variants.first().map(|v| v.decode_tok_s.iter().map(|d| d.0).collect()).unwrap_or_default();
        let mut out = String::from(
            "| model | groups converted | perplexity | KL to base | top-1 agreement | cache at 8k |",
        );
        depths.iter().for_each(|d| out.push_str(&format!(" decode tok/s at {d} |")));
        out.push_str("\n|---|---|---|---|---|---|");
        depths.iter().for_each(|_| out.push_str("---|"));
        out.push('\n');
        for v in &self.variants {
            let dash = || "–".to_string();
            out.push_str(&format!(
                "| {} | {}/{} | {} | {} | {} | {} |",
                v.name,
                v.converted,
                v.total,
                v.ppl.map_or_else(dash, number),
                v.kl.map_or_else(dash, |x| format!("{x:.4}")),
                v.top1_agreement.map_or_else(dash, |x| format!("{:.1} %", 100.0 * x)),
                v.cache_bytes_8k.map_or_else(dash, bytes),
            ));
            for depth in &depths {
                let rate = v.decode_tok_s.iter().find(|d| d.0 == *depth);
                out.push_str(&format!(" {} |", rate.map_or_else(dash, |d| format!("{:.1}", d.1))));
            }
            out.push('\n');
        }
        out
    }
}

/// Bytes with a binary unit.
pub fn bytes(n: usize) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = n as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{n} B") } else { format!("{value:.1} {}", UNITS[unit]) }
}

/// A positive number with about four significant digits.
pub fn number(x: f64) -> String {
    if !x.is_finite() {
        return x.to_string();
    }
    match x.abs() {
        a if a >= 1e6 => format!("{x:.2e}"),
        a if a >= 1000.0 => format!("{x:.0}"),
        a if a >= 100.0 => format!("{x:.1}"),
        a if a >= 10.0 => format!("{x:.2}"),
        _ => format!("{x:.3}"),
    }
}

pub(crate) fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hostile_text_cannot_leave_its_script_element() {
        let report = Report {
            title: "<b>x</b>".into(),
            generations: vec![Generation { prompt: "</script><script>alert(1)".into(), texts: vec![] }],
            ..Report::default()
        };
        let html = report.to_html().unwrap();
        assert!(!html.contains("</script><script>alert"));
        assert!(html.contains("&lt;b&gt;x"));
    }

    #[test]
    fn the_page_needs_no_network() {
        let html = Report::default().to_html().unwrap();
        for marker in ["src=", "@import", "url(", "<link"] {
            assert!(!html.contains(marker), "{marker}");
        }
        assert!(!html.contains("{{"), "an unfilled placeholder is left");
    }

    #[test]
    fn markdown_has_a_cell_for_every_column() {
        let row = VariantRow {
            name: "base".into(),
            ppl: Some(24.5),
            decode_tok_s: vec![(2048, 30.0), (8192, 10.0)],
            ..VariantRow::default()
        };
        let text = Report { variants: vec![row], ..Report::default() }.to_markdown();
        let cells: Vec<usize> = text.lines().map(|l| l.matches('|').count()).collect();
        assert_eq!(cells, [9, 9, 9]);
    }

    #[test]
    fn sizes_read_well() {
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(1536), "1.5 KiB");
        assert_eq!(number(24.591), "24.59");
        assert_eq!(number(f64::INFINITY), "inf");
    }
}
