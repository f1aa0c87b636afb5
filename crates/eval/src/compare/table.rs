//! A comparison as a Markdown table.

use super::{Comparison, Estimate, PasskeyScore};
use crate::report::{between, bytes, number};

/// Tables of GitHub-flavoured Markdown: the configurations, then the criteria's rank correlations.
pub fn markdown(comparison: &Comparison) -> String {
    let Comparison { settings, base, rows, rank_correlation } = comparison;
    let contexts = if settings.passkey_samples > 0 { settings.passkey_contexts.as_slice() } else { &[] };
    let mut out = String::from("| model | groups | perplexity / base | KL to base | top-1 agreement |");
    contexts.iter().for_each(|context| out.push_str(&format!(" passkey {context} |")));
    out.push_str(&format!(" cache at {} | at 8k |\n|---|", settings.context));
    out.push_str(&"---|".repeat(4 + contexts.len() + 2));
    out.push_str(&format!("\n| base (perplexity {}) | 0 | 1 | 0 | 100 % |", number(base.ppl)));
    push_passkeys(&mut out, &base.passkey);
    out.push_str(&format!(" {} | {} |\n", bytes(base.cache_bytes), bytes(base.cache_bytes_8k)));
    for row in rows {
        let distance = &row.distance;
        out.push_str(&format!(
            "| {} | {}/{} | {} | {} | {} |",
            row.configuration,
            row.converted,
            row.total,
            estimate(distance.ppl_ratio, number),
            estimate(distance.kl, |x| format!("{x:.4}")),
            estimate(distance.top1_agreement, |x| format!("{:.1} %", 100.0 * x)),
        ));
        push_passkeys(&mut out, &row.passkey);
        out.push_str(&format!(" {} | {} |\n", bytes(row.cache_bytes), bytes(row.cache_bytes_8k)));
    }
    if rank_correlation.criteria.len() > 1 {
        out.push('\n');
        out.push_str(&rank_correlation.table().to_markdown());
    }
    out
}

fn push_passkeys(out: &mut String, scores: &[PasskeyScore]) {
    for PasskeyScore { score, .. } in scores {
        let [low, high] = [score.low, score.high].map(|p| 100.0 * p);
        out.push_str(&format!(" {}/{} ({low:.0}–{high:.0} %) |", score.correct, score.asked));
    }
}

fn estimate(estimate: Estimate, show: impl Fn(f64) -> String) -> String {
    between(estimate.value, estimate.interval, show)
}
