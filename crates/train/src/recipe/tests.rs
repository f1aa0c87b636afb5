//! Recipes on a tiny model from disk: all stages at once are the stages one by one, and a run killed anywhere ends with the same bits.

mod settings;

use super::*;
use crate::align::align;
use crate::data::{Document, SequenceStream, sequences};
use crate::heal::heal;
use crate::testing::{StopAfter, random_documents};
use kernels::Exec;
use model::{Model, Progress, Silent};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use surgery::convert::{convert_in_memory, save_model};
use surgery::select::{Choice, plan_by};
use surgery::stats::{AnalyzeOptions, analyze};
use surgery::{HeadsReport, bank::init_bank};
use weights::Checkpoint;

/// A base model of four KV groups, and text.
struct Fixture {
    exec: Exec,
    checkpoint: Checkpoint,
    base: Model,
    train: Vec<Document>,
    heldout: Vec<Document>,
    dir: tempfile::TempDir,
}

impl Fixture {
    fn new() -> Self {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/tests/data/llama3");
        let checkpoint = Checkpoint::open(&folder).unwrap();
        Self {
            exec: Exec::new(2).unwrap(),
            base: Model::load(&checkpoint).unwrap(),
            checkpoint,
            train: random_documents(3, 400, 64, 1),
            heldout: random_documents(1, 200, 64, 2),
            dir: tempfile::tempdir().unwrap(),
        }
    }

    fn work(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn run<'a>(&'a self, recipe: &'a Recipe, budget: &'a Budget, work: &'a Path) -> Run<'a> {
        Run {
            exec: &self.exec,
            checkpoint: &self.checkpoint,
            base: &self.base,
            train: &self.train,
            heldout: &self.heldout,
            recipe,
            budget,
            work,
            save_every_s: 1000,
            numbering: Numbering::default(),
        }
    }
}

/// A recipe of a few steps of every stage.
fn small(recipe: &Recipe) -> Recipe {
    let align =
        |align: Align| Align { tokens: 192, context: 32, tokens_per_step: 64, measure_context: 48, ..align };
    Recipe {
        seeds: Seeds::new(5),
        analyze: Analyze { tokens: 128, context: 64 },
        mixer: Mixer { window: recipe.mixer.window.min(4), ..recipe.mixer },
        align: recipe.align.map(align),
        heal: Heal { tokens: 64 * 4, context: 32, batch: 2, ..recipe.heal },
        ..recipe.clone()
    }
}

fn cases() -> [(Recipe, Budget); 3] {
    [
        (small(&DEFAULT), Budget::Beta(0.5)),
        (small(&DEFAULT), Budget::Elastic(vec![0.75, 0.25])),
        (small(&PAPER), Budget::Beta(0.5)),
    ]
}

/// Every file of a work folder that does not hold times.
fn files(work: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut folders = vec![work.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_none_or(|e| e != "jsonl") && !path.ends_with("recipe.json") {
                found.insert(path.strip_prefix(work).unwrap().to_path_buf(), std::fs::read(&path).unwrap());
            }
        }
    }
    found
}

/// Dies at the report of progress of this number, as a killed process does: nothing is saved on the way out.
struct DieAt(u64);

impl DieAt {
    fn tick(&mut self) {
        assert!(self.0 > 0, "killed");
        self.0 -= 1;
    }
}

impl Progress for DieAt {
    fn start(&mut self, _: &str, _: u64, _: &str) {
        self.tick();
    }
    fn advance(&mut self, _: u64, _: &str) {
        self.tick();
    }
    fn finish(&mut self) {
        self.tick();
    }
    fn note(&mut self, _: &str) {
        self.tick();
    }
}

#[test]
fn killed_anywhere_and_run_again_it_ends_with_the_same_bits() {
    for (case, (recipe, budget)) in cases().iter().enumerate() {
        let fixture = Fixture::new();
        let reference = fixture.work("reference");
        std::fs::create_dir(&reference).unwrap();
        run(&fixture.run(recipe, budget, &reference), None, &mut Silent).unwrap();
        let (reference, work) = (files(&reference), fixture.work("work"));
        let mut deaths = 0;
        // Every third report; the cases begin at different ones.
        for reports in (case as u64..).step_by(3) {
            // A state after every step, or none but the last.
            let save_every_s = if reports % 2 == 0 { 0 } else { 1000 };
            let it = Run { save_every_s, ..fixture.run(recipe, budget, &work) };
            let mut record = Record::open(&it, "tiny", &[], true).unwrap();
            let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                run(&it, Some(&mut record), &mut DieAt(reports)).unwrap();
            }));
            if ended.is_err() {
                deaths += 1;
                let mut record = Record::open(&it, "tiny", &[], true).unwrap();
                run(&it, Some(&mut record), &mut Silent).unwrap();
                let stages = if recipe.align.is_some() { 5 } else { 4 };
                assert_eq!(record.stages.len(), stages, "case {case}, {reports}");
                assert!(record.stages.iter().all(|s| s.result.is_some()), "{record:?}");
            }
            assert!(files(&work) == reference, "case {case}: other bits after {reports} reports");
            std::fs::remove_dir_all(&work).unwrap();
            if ended.is_ok() {
                break;
            }
        }
        assert!(deaths > 9, "case {case}: only {deaths} deaths");
    }
}

#[test]
fn an_interruption_is_one_in_every_stage() {
    let (recipe, budget) = &cases()[0];
    let fixture = Fixture::new();
    let mut unfinished = std::collections::BTreeSet::new();
    for asked in 0.. {
        let work = fixture.work(&asked.to_string());
        let it = fixture.run(recipe, budget, &work);
        let mut record = Record::open(&it, "tiny", &[], false).unwrap();
        match run(&it, Some(&mut record), &mut StopAfter::new(asked)) {
            Ok(_) => break,
            Err(TrainError::Interrupted) => {}
            Err(other) => panic!("after {asked}: {other}"),
        }
        let again = Record::open(&it, "tiny", &[], true).unwrap();
        assert_eq!(again, record, "it is on disk");
        let last = again.stages.last().unwrap();
        assert!(last.result.is_none() && last.seconds > 0.0, "{last:?}");
        unfinished.insert(last.stage.clone());
    }
    assert_eq!(unfinished.into_iter().collect::<Vec<_>>(), ["align", "analyze", "convert", "heal"]);
}

/// The stages as one calls them without a recipe.
fn by_hand(fixture: &Fixture, recipe: &Recipe, budget: &Budget, out: &Path) -> Model {
    let Fixture { exec, checkpoint, base, train, heldout, .. } = fixture;
    std::fs::create_dir(out).unwrap();
    let texts = sequences(train, recipe.analyze.context, recipe.analyze.tokens, 5).unwrap();
    let options = AnalyzeOptions { seed: 5, ..AnalyzeOptions::default() };
    let heads = analyze(exec, base, &texts, &options, &mut Silent).unwrap();
    let spec = recipe.mixer.spec(&base.config);
    let bank = recipe.align.map(|settings| {
        let options = AlignOptions {
            heldout: sequences(heldout, 48, settings.heldout_items * 48, 5).unwrap(),
            fisher: sequences(train, 48, settings.fisher_items * 48, 5 ^ 1).unwrap(),
            out: out.join("bank"),
            ..settings.options()
        };
        let bank = init_bank(base, spec, &heads, 5).unwrap();
        let mut stream = SequenceStream::new(train, 32, 5).unwrap();
        align(exec, base, bank, &mut stream, &options, &mut Silent).unwrap()
    });
    let choice = Choice {
        criterion: if bank.is_some() { "mixer-fisher" } else { "recency" },
        beta: budget.beta(),
        keep_at_least_per_layer: 0,
        mixer: spec,
        seed: 5,
    };
    let plan = plan_by(&heads, bank.as_ref(), &choice).unwrap();
    let mut hybrid = convert_in_memory(base, &plan, bank.as_ref(), Some(&heads), 5).unwrap();
    let options = HealOptions {
        elastic: budget.elastic().to_vec(),
        seed: 5,
        state_dir: out.join("train"),
        ..recipe.heal.options()
    };
    let mut stream = SequenceStream::new(train, 32, 5 ^ 2).unwrap();
    heal(exec, Some(base), &mut hybrid, &mut stream, &options, &mut Silent).unwrap();
    save_model(checkpoint, &hybrid, &out.join("healed"), &mut Silent).unwrap();
    hybrid
}

#[test]
fn all_stages_at_once_are_the_stages_one_by_one() {
    for (recipe, budget) in &cases() {
        let fixture = Fixture::new();
        let work = fixture.work("work");
        let it = fixture.run(recipe, budget, &work);
        let mut record = Record::open(&it, "tiny", &["text".into()], false).unwrap();
        let made = run(&it, Some(&mut record), &mut Silent).unwrap();
        let expected = by_hand(&fixture, recipe, budget, &fixture.work("hand"));
        assert_eq!(made.healed.plan, expected.plan);
        let elastic = made.healed.plan.elastic.as_ref().map(|e| e.betas.clone());
        assert_eq!(elastic, (!budget.elastic().is_empty()).then(|| vec![0.25, 0.75]));
        for (_, param) in expected.params.iter() {
            let id = made.healed.params.id(&param.name).unwrap();
            assert!(made.healed.params.data(id) == param.data(), "{}", param.name);
        }

        let stages: Vec<(&str, u64)> = record.stages.iter().map(|s| (s.stage.as_str(), s.tokens)).collect();
        let all = [("analyze", 128), ("align", 192), ("plan", 0), ("convert", 0), ("heal", 256)].into_iter();
        let expected = all.filter(|(stage, _)| *stage != "align" || recipe.align.is_some());
        assert_eq!(stages, expected.collect::<Vec<_>>());
        assert!(record.stages.iter().all(|s| s.seconds > 0.0), "{record:?}");
        let Some(StageResult::Heal { losses }) = &record.stages.last().unwrap().result else {
            panic!("{record:?}");
        };
        let steps: Vec<usize> = losses.iter().map(|l| l.steps).collect();
        assert_eq!(steps, if budget.elastic().is_empty() { vec![4] } else { vec![2, 2] });

        let out = fixture.work("deep/out");
        publish(&work, &record, &out).unwrap();
        assert!(out.join("model.safetensors").exists() && !Files::of(&work).healed.exists());
        let written: serde_json::Value =
            serde_json::from_slice(&std::fs::read(out.join("recipe.json")).unwrap()).unwrap();
        assert_eq!(written, serde_json::to_value(&record).unwrap());
        assert_eq!(written["settings"]["recipe"]["seeds"]["heal"], 7);
        assert_eq!(written["settings"]["recipe"]["heal"]["projection_lr_scale"], 0.03, "as it is written");
        // Everything is there but the checkpoint, which the training state gives back.
        let again = run(&it, Some(&mut record), &mut Silent).unwrap();
        assert_eq!(again.healed.plan, made.healed.plan);
        assert!(publish(&work, &record, &out).is_err(), "nothing is overwritten");
    }
}

#[test]
fn stages_are_counted_with_those_around_them() {
    struct Notes(Vec<String>);
    impl Progress for Notes {
        fn note(&mut self, line: &str) {
            if line.starts_with('[') {
                self.0.push(line.to_string());
            }
        }
    }
    let fixture = Fixture::new();
    let texts = |case: usize, numbering| {
        let (recipe, budget) = &cases()[case];
        let work = fixture.work(&format!("{case}"));
        let _ = std::fs::create_dir(&work);
        let mut notes = Notes(Vec::new());
        run(&Run { numbering, ..fixture.run(recipe, budget, &work) }, None, &mut notes).unwrap();
        notes.0
    };
    let around = Numbering { before: 1, after: 2 };
    assert_eq!(
        texts(0, around),
        [
            "[2/8] analyze: where does each head look?",
            "[3/8] align: training a replacement for every KV group",
            "[4/8] plan: 2 of 4 KV groups, by the replacement's own error",
            "[5/8] convert",
            "[6/8] heal: distilling the base into the hybrid",
        ]
    );
    assert_eq!(
        texts(0, around),
        [
            "[2/8] analyze: found heads.json",
            "[3/8] align: found bank.safetensors",
            "[4/8] plan: 2 of 4 KV groups, by the replacement's own error",
            "[5/8] convert: found hybrid/",
            "[6/8] heal: found healed/",
        ]
    );
    assert_eq!(
        texts(2, Numbering::default()),
        [
            "[1/4] analyze: where does each head look?",
            "[2/4] plan: 2 of 4 KV groups, by recency",
            "[3/4] convert",
            "[4/4] heal: training all weights on next tokens",
        ]
    );
    let heads = HeadsReport::read(&Files::of(&fixture.work("0")).heads).unwrap();
    assert_eq!(heads.seed, 5);
}
