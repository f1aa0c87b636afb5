//! A report whose every string is an attack.

use super::*;
use crate::run::RunModel;

/// Leaves a script element, an attribute, a comment, a Markdown cell and a terminal line, where that is possible.
pub(super) const ATTACK: &str = "</script><script>document.title='pwned'</script><img src=x onerror=alert(1)>\"'`|<!--\n\u{1b}[31m# x ${1} {{data}}";

pub(super) fn hostile_report() -> Report {
    let attack = || ATTACK.to_string();
    let row = VariantRow {
        name: attack(),
        description: attack(),
        series: Some(attack()),
        ppl: Some(2.0),
        ..VariantRow::default()
    };
    let run = RunInfo {
        command: attack(),
        version: attack(),
        models: vec![RunModel { name: attack(), ..RunModel::default() }],
        ..RunInfo::default()
    };
    Report {
        title: attack(),
        summary: attack(),
        comparisons: vec![Comparison { title: attack(), note: attack(), context: None, rows: vec![row] }],
        tasks: vec![TaskTable {
            title: attack(),
            by: TokensOf::Distance,
            rows: vec![TaskRow { model: attack(), scores: vec![(512, Score::new(1, 2))] }],
        }],
        speeds: vec![SpeedTable {
            title: attack(),
            series: vec![SpeedSeries { name: attack(), points: vec![SpeedPoint::default()] }],
        }],
        tables: vec![Table {
            section: attack(),
            title: attack(),
            note: attack(),
            columns: vec![attack(); 2],
            rows: vec![vec![attack(); 2]],
        }],
        maps: Vec::new(),
        curves: vec![Curve { name: attack(), x_label: attack(), y_label: attack(), ..Curve::default() }],
        generations: vec![Generation { prompt: attack(), texts: vec![(attack(), attack())] }],
        sources: vec![SourceFile {
            path: attack(),
            kind: attack(),
            facts: vec![(attack(), attack())],
            run: Some(run),
        }],
    }
}
