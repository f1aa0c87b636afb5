//! Learning curves of align and heal.

use super::{Input, Kind, Reader, bad};
use crate::error::Result;
use crate::report::Curve;
use crate::report::format::count;
use serde_json::Value;
use std::collections::BTreeMap;

/// Most points of a curve; longer runs are drawn as means of steps.
const MAX_POINTS: usize = 1000;

/// The first line, if it is a JSON object.
pub(super) fn first_line(text: &str) -> Option<Value> {
    let line = text.lines().find(|line| !line.trim().is_empty())?;
    serde_json::from_str::<Value>(line).ok().filter(Value::is_object)
}

impl Reader {
    /// One curve per measure; of an elastic run one per measure and beta.
    pub(super) fn metrics(
        &mut self,
        input: &Input<'_>,
        text: &str,
        kind: Kind,
    ) -> Result<Vec<(String, String)>> {
        let measures: &[(&str, &str)] = match kind {
            Kind::AlignMetrics => &[("error", "align: relative error of the heads")],
            _ => &[("loss", "heal: loss"), ("kl", "heal: KL to the base, nats per token")],
        };
        let mut curves: BTreeMap<(usize, String), Vec<(f64, f64)>> = BTreeMap::new();
        let (mut steps, mut tokens) = (0, 0.0);
        for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
            let wrong = |what: &str| bad(input.path, &format!("line {}: {what}", number + 1));
            let value: Value = serde_json::from_str(line).map_err(|e| wrong(&format!("not JSON: {e}")))?;
            if Kind::of(&value) != Some(kind) {
                return Err(wrong(&format!("not a line of {}", kind.name())));
            }
            tokens = value["tokens"].as_f64().ok_or_else(|| wrong("`tokens` is no number"))?;
            let beta =
                value.get("beta").and_then(Value::as_f64).map_or(String::new(), |b| format!(", β {b}"));
            for (index, (field, _)) in measures.iter().enumerate() {
                let found = &value[*field];
                match found.as_f64() {
                    Some(y) => curves.entry((index, beta.clone())).or_default().push((tokens, y)),
                    // Healing on next tokens has no KL.
                    None if found.is_null() && *field == "kl" => {}
                    None => return Err(wrong(&format!("`{field}` is no number"))),
                }
            }
            steps += 1;
        }
        let name = input.path.display().to_string();
        for ((index, beta), points) in curves {
            let steps_per_point = points.len().div_ceil(MAX_POINTS).max(1);
            self.report.curves.push(Curve {
                name: format!("{name}{beta}"),
                x_label: "tokens".into(),
                y_label: measures[index].1.into(),
                points: points.chunks(steps_per_point).map(mean).collect(),
                steps_per_point,
            });
        }
        Ok(vec![("steps".into(), count(steps)), ("tokens".into(), count(tokens as usize))])
    }
}

/// The mean of y at the last x.
fn mean(points: &[(f64, f64)]) -> (f64, f64) {
    let last = points.last().map_or(0.0, |p| p.0);
    (last, points.iter().map(|p| p.1).sum::<f64>() / points.len() as f64)
}
