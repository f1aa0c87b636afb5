use super::judge::{WindowScore, distance};
use super::*;
use crate::quality::evaluate;
use crate::text::{WindowOptions, windows};
use model::Silent;
use model::plan::PlanModel;
use std::cell::Cell;
use std::path::Path;
use surgery::convert::convert;
use surgery::stats::{AnalyzeOptions, analyze};
use train::data::Document;
use weights::Checkpoint;

/// Sums of the same f32 terms in another order.
const TOLERANCE: f64 = 1e-9;

struct Fixture {
    exec: Exec,
    model: Model,
    texts: Vec<EvalText>,
    heads: HeadsReport,
}

fn tokens(n: usize, seed: u32) -> Vec<u32> {
    (0..n as u32).map(|i| (i.wrapping_mul(2_654_435_761).wrapping_add(seed * 97) >> 7) % 64).collect()
}

fn fixture() -> Fixture {
    let exec = Exec::new(1).unwrap();
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/tests/data/llama3");
    let model = Model::load(&Checkpoint::open(&dir).unwrap()).unwrap();
    let documents = [
        Document { source: "a".into(), tokens: tokens(150, 1) },
        Document { source: "b".into(), tokens: tokens(75, 2) },
    ];
    let options = WindowOptions { context: 50, stride: None, bos: None, max_tokens: None };
    let texts = windows(&documents, &options).unwrap();
    let heads = analyze(&exec, &model, &[tokens(128, 3)], &AnalyzeOptions::default(), &mut Silent).unwrap();
    Fixture { exec, model, texts, heads }
}

impl Fixture {
    fn inputs(&self) -> Inputs<'_> {
        Inputs {
            model: &self.model,
            tokenizer: None,
            texts: &self.texts,
            heads: &self.heads,
            bank: None,
            hybrids: &[],
            engine: EngineOptions::EXACT,
        }
    }

    fn settings(&self) -> Settings {
        Settings {
            model: PlanModel::of(&self.model.config),
            weights: "F32".into(),
            text_sha256: Settings::text_sha256(&self.texts),
            heads_sha256: Settings::heads_sha256(&self.heads),
            bank_sha256: None,
            context: 50,
            window: 4,
            sinks: 1,
            passkey_contexts: vec![50],
            passkey_samples: 0,
            seed: 5,
        }
    }

    /// A hybrid on disk with windows of four tokens in half of the groups, as the configuration `window, recency` has them.
    fn write_hybrid(&self, path: &Path, seed: u64) {
        let plan = {
            let (inputs, settings) = (self.inputs(), self.settings());
            let wanted = options(&[Method::Window], &["recency", "random"], &[0.5]);
            let planner = Planner::new(&inputs, &wanted, &settings).unwrap();
            let configurations = planner.configurations();
            let of = |seed: Option<u64>| configurations.iter().find(|c| c.seed == seed).unwrap();
            planner.plan(of((seed > 0).then_some(seed))).unwrap()
        };
        let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/tests/data/llama3");
        let checkpoint = Checkpoint::open(&base).unwrap();
        convert(&checkpoint, &plan, None, Some(&self.heads), 0, path, &mut Silent).unwrap();
    }

    fn compare(
        &self,
        options: &CompareOptions,
        file: &mut ResultsFile,
        progress: &mut dyn Progress,
    ) -> Result<Comparison> {
        compare(&self.exec, &self.inputs(), options, file, progress)
    }
}

fn options(methods: &[Method], criteria: &[&str], betas: &[f64]) -> CompareOptions {
    CompareOptions {
        methods: methods.to_vec(),
        criteria: criteria.iter().map(|c| c.to_string()).collect(),
        betas: betas.to_vec(),
        random_draws: 2,
    }
}

/// Counts what is judged, and stops after some configurations.
#[derive(Default)]
struct Counting {
    judged: usize,
    stop_after: Option<usize>,
    asked: Cell<usize>,
}

impl Progress for Counting {
    fn note(&mut self, _: &str) {
        self.judged += 1;
    }
    fn cancelled(&self) -> bool {
        self.asked.set(self.asked.get() + 1);
        self.stop_after.is_some_and(|n| self.judged >= n)
    }
}

#[test]
fn a_row_is_what_evaluate_says_of_the_converted_model() {
    let fixture = fixture();
    let dir = tempfile::tempdir().unwrap();
    let mut file = ResultsFile::open(&dir.path().join("r.jsonl"), fixture.settings()).unwrap();
    let options = options(&[Method::Window, Method::StreamingLlm], &["recency", "random"], &[0.5, 1.0]);
    let comparison = fixture.compare(&options, &mut file, &mut Silent).unwrap();
    // Two criteria, one drawn twice, and the baseline.
    assert_eq!(comparison.rows.len(), (1 + 2 + 1) * 2);
    let settings = fixture.settings();
    let inputs = fixture.inputs();
    let planner = Planner::new(&inputs, &options, &settings).unwrap();
    let base = Engine::from_model(&fixture.exec, &fixture.model, EngineOptions::EXACT).unwrap();
    for row in &comparison.rows {
        let plan = planner.plan(&row.configuration).unwrap();
        let hybrid = convert_in_memory(&fixture.model, &plan, None, None, 0).unwrap();
        let engine = Engine::from_model(&fixture.exec, &hybrid, EngineOptions::EXACT).unwrap();
        let quality =
            &evaluate(&fixture.exec, Some(&base), &[&engine, &base], &fixture.texts, &mut Silent).unwrap();
        let pooled = |i: usize| -> f64 {
            let files = &quality[i].files;
            files.iter().map(|f| f.nll * f.tokens as f64).sum::<f64>() / quality[i].overall.tokens as f64
        };
        let name = row.configuration.to_string();
        let near = |found: f64, expected: f64| {
            assert!((found - expected).abs() < TOLERANCE, "{name}: {found} {expected}")
        };
        near(row.distance.ppl_ratio.value, (pooled(0) - pooled(1)).exp());
        near(row.distance.kl.value, quality[0].overall.kl.unwrap());
        near(row.distance.top1_agreement.value, quality[0].overall.top1_agreement.unwrap());
        near(comparison.base.ppl, pooled(1).exp());
        assert_eq!(row.distance.tokens, quality[0].overall.tokens);
        assert_eq!(
            row.converted,
            if row.configuration.method == Method::StreamingLlm {
                4
            } else {
                (4.0 * row.configuration.beta) as usize
            }
        );
        assert!(row.distance.kl.value > 1e-6, "{name}: a window that changes nothing");
        let (low, high) = row.distance.kl.interval.unwrap();
        assert!(low <= row.distance.kl.value && row.distance.kl.value <= high && low < high, "{name}");
    }
    // The same windows whatever chose them, once every group has one.
    let all: Vec<f64> = comparison
        .rows
        .iter()
        .filter(|r| r.configuration.beta == 1.0 && r.configuration.method == Method::Window)
        .map(|r| r.distance.kl.value)
        .collect();
    assert!(all.len() == 3 && all.iter().all(|&kl| kl == all[0]), "{all:?}");
    // A baseline holds at most the budget's cache where it is judged, and less later.
    for row in comparison.rows.iter().filter(|r| r.configuration.method == Method::StreamingLlm) {
        let budget = comparison.rows.iter().find(|r| r.configuration.beta == row.configuration.beta).unwrap();
        assert!(row.cache_bytes <= budget.cache_bytes && row.cache_bytes + 1000 > budget.cache_bytes);
        assert_eq!(row.cache_bytes_8k, row.cache_bytes);
    }
    assert_eq!(comparison.rank_correlation.criteria, ["recency", "random"]);
    assert_eq!(comparison.rank_correlation.rho[0][0], Some(1.0));
}

#[test]
fn finished_hybrids_are_judged_like_conversions() {
    let fixture = fixture();
    let dir = tempfile::tempdir().unwrap();
    let [path, results] = ["hybrid", "r.jsonl"].map(|name| dir.path().join(name));
    fixture.write_hybrid(&path, 0);
    let wanted = options(&[Method::Window], &["recency"], &[0.5, 1.0]);
    let run = |names: &[&str], progress: &mut dyn Progress| {
        let open = |name: &&str| Hybrid::open(name, &path, &fixture.model).unwrap();
        let hybrids: Vec<Hybrid> = names.iter().map(open).collect();
        let mut file = ResultsFile::open(&results, fixture.settings()).unwrap();
        let inputs = Inputs { hybrids: &hybrids, ..fixture.inputs() };
        compare(&fixture.exec, &inputs, &wanted, &mut file, progress)
    };
    let comparison = run(&["mine"], &mut Silent).unwrap();
    let [window, _, hybrid] = &comparison.rows[..] else { panic!("three rows") };
    assert_eq!((hybrid.configuration.to_string().as_str(), hybrid.configuration.beta), ("mine, β 0.5", 0.5));
    assert_eq!((hybrid.distance, hybrid.cache_bytes), (window.distance, window.cache_bytes));
    assert_eq!((&hybrid.mixer, hybrid.converted), (&window.mixer, window.converted));
    // Known by its content: another hybrid in its place is judged anew.
    let mut counting = Counting::default();
    run(&["mine"], &mut counting).unwrap();
    assert_eq!(counting.judged, 0);
    std::fs::remove_dir_all(&path).unwrap();
    fixture.write_hybrid(&path, 5);
    let other = run(&["mine"], &mut counting).unwrap();
    assert_eq!((counting.judged, other.rows.len()), (1, 3));
    let chart = svg(&other);
    assert_eq!((chart.matches("<circle").count(), chart.matches("<polyline").count()), (3, 2));
    // Names are keys, and a base is no hybrid.
    let message = run(&["mine", "mine"], &mut Silent).unwrap_err().to_string();
    assert!(message.contains("two hybrids are named mine"), "{message}");
    let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/tests/data/llama3");
    let message = Hybrid::open("base", &base, &fixture.model).unwrap_err().to_string();
    assert!(message.contains("not a hybrid") && message.contains("hint:"), "{message}");
}

#[test]
fn an_interrupted_comparison_goes_on_where_it_stopped() {
    let fixture = fixture();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("r.jsonl");
    let open = || ResultsFile::open(&path, fixture.settings()).unwrap();
    let wanted = options(&[Method::Window], &["recency", "kl-fisher"], &[0.5, 1.0]);
    let mut stopping = Counting { stop_after: Some(3), ..Counting::default() };
    let stopped = fixture.compare(&wanted, &mut open(), &mut stopping);
    assert!(matches!(stopped, Err(EvalError::Interrupted)), "{stopped:?}");
    assert_eq!(
        std::fs::read_to_string(&path).unwrap().lines().count(),
        2 + 3,
        "settings, base and what was finished"
    );
    let mut counting = Counting::default();
    let gone_on = fixture.compare(&wanted, &mut open(), &mut counting).unwrap();
    assert_eq!((counting.judged, gone_on.rows.len()), (1, 4));
    let whole_path = dir.path().join("whole.jsonl");
    let mut whole = ResultsFile::open(&whole_path, fixture.settings()).unwrap();
    fixture.compare(&wanted, &mut whole, &mut Silent).unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), std::fs::read(&whole_path).unwrap());
    // Nothing is left to do: no model runs.
    let mut counting = Counting::default();
    let again = fixture.compare(&wanted, &mut open(), &mut counting).unwrap();
    assert_eq!((again.rows, counting.judged, counting.asked.get()), (gone_on.rows, 0, 0));
    // More budgets measure what is missing.
    let more = options(&[Method::Window], &["recency"], &[0.5, 0.75]);
    let mut counting = Counting::default();
    assert_eq!(
        (fixture.compare(&more, &mut open(), &mut counting).unwrap().rows.len(), counting.judged),
        (2, 1)
    );
}

#[test]
fn results_of_other_settings_or_damaged_ones_are_refused() {
    let fixture = fixture();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("r.jsonl");
    let mut file = ResultsFile::open(&path, fixture.settings()).unwrap();
    assert!(!path.exists(), "nothing is written before the first result");
    fixture.compare(&options(&[Method::Window], &["recency"], &[0.5]), &mut file, &mut Silent).unwrap();
    let refused = |settings: Settings, needle: &str| {
        let message = ResultsFile::open(&path, settings).err().unwrap().to_string();
        assert!(message.contains(needle) && message.contains("hint:"), "{message}");
    };
    refused(Settings { context: 51, sinks: 2, ..fixture.settings() }, "(context, sinks)");
    refused(Settings { text_sha256: "other".into(), ..fixture.settings() }, "(text_sha256)");
    let text = std::fs::read_to_string(&path).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    for (damaged, needle) in [
        (text.replace("\"kl\"", "\"lk\""), "line 3 is no result"),
        (text[..text.len() - 20].to_string(), "line 3 is no result"),
        (lines[1..].join("\n"), "line 1 is out of place"),
        ([lines[0], lines[1], lines[1]].join("\n"), "line 3 is out of place"),
        ([lines[0], lines[1], lines[2], lines[2]].join("\n"), "line 4 is out of place"),
    ] {
        std::fs::write(&path, damaged).unwrap();
        refused(fixture.settings(), needle);
    }
    let bad = |options: CompareOptions, needle: &str| {
        let mut file = ResultsFile::open(&dir.path().join("none"), fixture.settings()).unwrap();
        let message = fixture.compare(&options, &mut file, &mut Silent).unwrap_err().to_string();
        assert!(message.contains(needle), "{message}");
    };
    bad(options(&[Method::Bank], &["recency"], &[0.5]), "needs a head bank");
    bad(options(&[Method::Window], &["mixer-fisher"], &[0.5]), "head bank");
    bad(options(&[Method::Window], &["recency"], &[1.5]), "between 0 and 1");
}

#[test]
fn intervals_cover_what_windows_say() {
    // Windows that agree leave no doubt; more windows leave less.
    let same = vec![WindowScore { tokens: 10, nll: 30.0, base_nll: 20.0, kl: 5.0, agree: 4 }; 8];
    let sure = distance(&same, 1);
    assert_eq!((sure.kl.value, sure.kl.interval), (0.5, Some((0.5, 0.5))));
    assert!((sure.ppl_ratio.value - 1f64.exp()).abs() < 1e-12);
    assert_eq!((sure.top1_agreement.value, sure.tokens), (0.4, 80));
    let mixed = |n: usize| -> Vec<WindowScore> {
        (0..n).map(|i| WindowScore { kl: if i % 2 == 0 { 2.0 } else { 8.0 }, ..same[0] }).collect()
    };
    let width = |n: usize| {
        let kl = distance(&mixed(n), 1).kl;
        let (low, high) = kl.interval.unwrap();
        assert!((kl.value - 0.5).abs() < 1e-12 && low < 0.5 && high > 0.5);
        high - low
    };
    // The standard error of a mean of n values of spread 0.3 is 0.3 / √n.
    for n in [16, 64, 256] {
        let expected = 2.0 * 1.96 * 0.3 / (n as f64).sqrt();
        assert!((width(n) / expected - 1.0).abs() < 0.15, "{n}: {} {expected}", width(n));
    }
    assert_eq!(distance(&same[..1], 1).kl.interval, None);
    // Windows weigh by their tokens.
    let long = WindowScore { tokens: 30, kl: 3.0, ..same[0] };
    assert_eq!(distance(&[same[0], long], 1).kl.value, 8.0 / 40.0);
    assert_eq!(distance(&mixed(16), 1), distance(&mixed(16), 1));
}

#[test]
fn the_chart_shows_every_configuration_and_needs_no_network() {
    let fixture = fixture();
    let dir = tempfile::tempdir().unwrap();
    let mut file = ResultsFile::open(&dir.path().join("r.jsonl"), fixture.settings()).unwrap();
    let options = options(&[Method::Window, Method::DuoAttention], &["recency"], &[0.0, 0.5]);
    let comparison = fixture.compare(&options, &mut file, &mut Silent).unwrap();
    // Nothing converted, and streaming heads longer than the text: no difference, which a logarithmic axis must survive.
    assert_eq!(comparison.rows[0].distance.kl.value, 0.0);
    let chart = svg(&comparison);
    assert_eq!(chart.matches("<circle").count(), 4);
    assert_eq!(chart.matches("<polyline").count(), 2);
    assert!(!chart.contains("NaN") && !chart.contains("inf"), "{chart}");
    assert!(!chart.contains("src=") && !chart.contains("url(") && !chart.contains("@import"), "{chart}");
    let table = markdown(&comparison);
    let cells: Vec<usize> = table.lines().map(|line| line.matches('|').count()).collect();
    assert_eq!(cells, [8; 7][..cells.len()], "{table}");
}

#[test]
fn layers_are_left_out_until_the_budget_is_met() {
    let mut fixture = fixture();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("r.jsonl");
    let mut file = ResultsFile::open(&path, fixture.settings()).unwrap();
    let wanted = options(&[Method::SkippedLayers, Method::Window], &["recency"], &[0.5]);
    let comparison = fixture.compare(&wanted, &mut file, &mut Silent).unwrap();
    let [skipped, window] = &comparison.rows[..] else { panic!("two rows") };
    assert_eq!(skipped.mixer, "1 of 2 layers skipped");
    assert!(
        skipped.cache_bytes <= window.cache_bytes && skipped.cache_bytes == comparison.base.cache_bytes / 2
    );
    assert!(
        skipped.distance.kl.value > window.distance.kl.value,
        "a layer is missed more than distant tokens"
    );
    fixture.heads.layers[1].similarity = None;
    let mut file = ResultsFile::open(&dir.path().join("old.jsonl"), fixture.settings()).unwrap();
    let message = fixture.compare(&wanted, &mut file, &mut Silent).unwrap_err().to_string();
    assert!(message.contains("no similarities of layers"), "{message}");
}
