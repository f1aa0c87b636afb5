//! Quality against cache bytes as one SVG; self-contained, light and dark.

use super::{Comparison, Row};
use crate::report::{bytes, escape};
use std::fmt::Write;

const WIDTH: f64 = 960.0;
const LEFT: f64 = 70.0;
const RIGHT: f64 = 620.0;
const TOP: f64 = 60.0;
const BOTTOM: f64 = 430.0;
/// A line of the legend.
const LINE: f64 = 19.0;
/// Colours of [`STYLE`]: one for each criterion, and one more.
const COLORS: usize = 11;
/// Smallest KL drawn; a model that equals its base lies on this line.
const SMALLEST_KL: f64 = 1e-5;

const STYLE: &str = "
  :root { --ink: #1c1e21; --faint: #d9dce1; --paper: #ffffff; --c0: #1676c9; --c1: #b3245f; --c2: #b8860b; --c3: #2c8a4b; --c4: #7a4fc0; --c5: #c2521b; --c6: #0f8b8d; --c7: #6b7280; --c8: #e07fb4; --c9: #1f2937; --c10: #7d8c1f; }
  @media (prefers-color-scheme: dark) {
    :root { --ink: #e6e8eb; --faint: #3a3f47; --paper: #16181c; --c0: #55aaf5; --c1: #f5709f; --c2: #e0b040; --c3: #5cc47f; --c4: #b293ee; --c5: #f2915e; --c6: #4fc6c8; --c7: #a7adb8; --c8: #ffb3d9; --c9: #f3f4f6; --c10: #c3d64a; }
  }
  text { font: 13px system-ui, sans-serif; fill: var(--ink); } .title { font-size: 15px; font-weight: 600; }
  .paper { fill: var(--paper); } .grid { stroke: var(--faint); } .line { fill: none; stroke-width: 2; }
";

/// KL to the base (logarithmic) against the cache after the settings' context, as a share of the base's: a line per method, criterion and draw, a
/// point per budget with the interval of its KL.
pub fn svg(comparison: &Comparison) -> String {
    let rows = &comparison.rows;
    let mut series: Vec<(String, Vec<&Row>)> = Vec::new();
    for row in rows {
        let name = row.configuration.series();
        match series.iter_mut().find(|(n, _)| *n == name) {
            Some((_, points)) => points.push(row),
            None => series.push((name, vec![row])),
        }
    }
    let height = (BOTTOM + 50.0).max(TOP + LINE * (series.len() as f64 + 1.0));
    let lows = rows.iter().map(|r| r.distance.kl.interval.map_or(r.distance.kl.value, |(low, _)| low));
    let highs = rows.iter().map(|r| r.distance.kl.interval.map_or(r.distance.kl.value, |(_, high)| high));
    let decade = |x: f64| x.max(SMALLEST_KL).log10();
    let low = decade(lows.fold(f64::INFINITY, f64::min)).floor();
    let low = if low.is_finite() { low } else { -1.0 };
    let high = decade(highs.fold(SMALLEST_KL, f64::max)).ceil().max(low + 1.0);
    let widest = rows.iter().map(|r| share(comparison, r)).fold(1.0, f64::max);
    let x = |share: f64| LEFT + (RIGHT - LEFT) * share / widest;
    let y = |kl: f64| BOTTOM - (BOTTOM - TOP) * (decade(kl) - low) / (high - low);

    let mut out = String::new();
    let mut put = |text: std::fmt::Arguments<'_>| out.write_fmt(text).expect("a string takes everything");
    put(format_args!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" height=\"{height}\" role=\"img\">\n\
         <title>KL to the base against cache size, by method, criterion and budget</title>\n<style>{STYLE}</style>\n\
         <rect class=\"paper\" width=\"{WIDTH}\" height=\"{height}\"/>\n\
         <text class=\"title\" x=\"{LEFT}\" y=\"32\">KL to the base (nats per token) against cache size</text>\n"
    ));
    for exponent in low as i32..=high as i32 {
        let at = y(10f64.powi(exponent));
        put(format_args!(
            "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{RIGHT}\" y1=\"{at:.1}\" y2=\"{at:.1}\"/><text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>\n",
            LEFT - 8.0,
            at + 4.0,
            10f64.powi(exponent)
        ));
    }
    for percent in (0..=(100.0 * widest) as usize).step_by(25) {
        let at = x(percent as f64 / 100.0);
        put(format_args!(
            "<line class=\"grid\" x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{TOP}\" y2=\"{BOTTOM}\"/><text x=\"{at:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{percent} %</text>\n",
            BOTTOM + 20.0
        ));
    }
    put(format_args!(
        "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">cache after {} tokens, share of the base's {}</text>\n",
        (LEFT + RIGHT) / 2.0,
        BOTTOM + 40.0,
        comparison.settings.context,
        bytes(comparison.base.cache_bytes)
    ));
    let mut methods = Vec::new();
    let mut criteria = Vec::new();
    for (i, (name, points)) in series.iter().enumerate() {
        let configuration = &points[0].configuration;
        let dash = ["", "6 3", "2 3", "9 3 2 3", "1 4"][index(&mut methods, configuration.method) % 5];
        let color = index(&mut criteria, (&configuration.criterion, &configuration.hybrid)) % COLORS;
        let style = format!(
            "stroke: var(--c{color}); stroke-dasharray: {}",
            if dash.is_empty() { "none" } else { dash }
        );
        let mut sorted = points.clone();
        sorted.sort_by(|a, b| share(comparison, a).total_cmp(&share(comparison, b)));
        let path: Vec<String> = sorted
            .iter()
            .map(|row| format!("{:.1},{:.1}", x(share(comparison, row)), y(row.distance.kl.value)))
            .collect();
        put(format_args!("<polyline class=\"line\" style=\"{style}\" points=\"{}\"/>\n", path.join(" ")));
        for row in sorted {
            let (at, kl) = (x(share(comparison, row)), row.distance.kl);
            if let Some((low, high)) = kl.interval {
                put(format_args!(
                    "<line style=\"stroke: var(--c{color})\" x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{:.1}\" y2=\"{:.1}\"/>\n",
                    y(low),
                    y(high)
                ));
            }
            put(format_args!(
                "<circle style=\"fill: var(--c{color})\" cx=\"{at:.1}\" cy=\"{:.1}\" r=\"4\"><title>{}: KL {:.4}, {}</title></circle>\n",
                y(kl.value),
                escape(&row.configuration.to_string()),
                kl.value,
                bytes(row.cache_bytes)
            ));
        }
        let line = TOP + LINE * i as f64;
        put(format_args!(
            "<line class=\"line\" style=\"{style}\" x1=\"{:.1}\" x2=\"{:.1}\" y1=\"{line:.1}\" y2=\"{line:.1}\"/><text x=\"{:.1}\" y=\"{:.1}\">{}</text>\n",
            RIGHT + 20.0,
            RIGHT + 50.0,
            RIGHT + 58.0,
            line + 4.0,
            escape(name)
        ));
    }
    out.push_str("</svg>\n");
    out
}

fn share(comparison: &Comparison, row: &Row) -> f64 {
    row.cache_bytes as f64 / comparison.base.cache_bytes as f64
}

/// Where `value` stands among those seen so far, itself included.
fn index<T: PartialEq>(seen: &mut Vec<T>, value: T) -> usize {
    seen.iter().position(|v| *v == value).unwrap_or_else(|| {
        seen.push(value);
        seen.len() - 1
    })
}
