use super::*;
use crate::bank::init_bank;
use crate::stats::{AnalyzeOptions, analyze};
use crate::testing::{config, exec, logits, model, open, save_base, spec, tokens};
use model::{GroupMixer, MixerSpec, RecurrentKind, Silent};
use serde_json::{Value, json};
use std::path::PathBuf;
use weights::{Dtype, TensorInfo, TensorSource};

const MIXED: [Dtype; 3] = [Dtype::F16, Dtype::F32, Dtype::BF16];

/// The first group of layer 0 and the second of layer 1.
fn plan(spec: MixerSpec) -> HeadPlan {
    let mut plan = HeadPlan::empty(&config());
    plan.beta = 0.5;
    plan.mixer = Some(spec);
    plan.layers[0].groups[0].mixer = GroupMixer::Recurrent;
    plan.layers[1].groups[1].mixer = GroupMixer::Recurrent;
    plan
}

fn heads(model: &Model) -> HeadsReport {
    let options = AnalyzeOptions { criteria: vec![], ..Default::default() };
    analyze(&exec(), model, &[tokens(1, 40)], &options, &mut Silent).unwrap()
}

struct Bench {
    dir: tempfile::TempDir,
    base: Checkpoint,
    model: Model,
    out: PathBuf,
}

impl Bench {
    fn new(dtypes: &[Dtype]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let base = open(&save_base(dir.path(), &model(1), dtypes));
        let model = Model::load(&base).unwrap();
        let out = dir.path().join("hybrid");
        Self { dir, base, model, out }
    }
    fn convert(&self, plan: &HeadPlan, bank: Option<&HeadBank>, heads: Option<&HeadsReport>) -> Result<()> {
        convert(&self.base, plan, bank, heads, 5, &self.out, &mut Silent)
    }
    /// Nothing but the base lies in the folder.
    fn assert_nothing_written(&self) {
        let names: Vec<_> =
            std::fs::read_dir(self.dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names, ["base"]);
    }
}

fn message<T>(result: Result<T>) -> String {
    result.err().expect("an error").to_string()
}

#[test]
fn converted_then_loaded_is_converted_in_memory() {
    for (recurrent, window) in [
        (RecurrentKind::Mamba2, 4),
        (RecurrentKind::GatedDelta, 0),
        (RecurrentKind::Mamba, 4),
        (RecurrentKind::None, 4),
    ] {
        let bench = Bench::new(&MIXED);
        let plan = plan(spec(recurrent, window));
        let heads = heads(&bench.model);
        let mut bank = init_bank(&bench.model, spec(recurrent, window), &heads, 3).unwrap();
        for value in bank.groups.iter_mut().flatten().flat_map(|h| &mut h.values).flatten() {
            *value *= 1.0625;
        }
        let ids = tokens(9, 30);
        let mut seen = vec![logits(&bench.model, &ids)];
        for (bank, heads) in [(Some(&bank), None), (None, Some(&heads)), (None, None)] {
            bench.convert(&plan, bank, heads).unwrap();
            let loaded = Model::load(&open(&bench.out)).unwrap();
            let in_memory = convert_in_memory(&bench.model, &plan, bank, heads, 5).unwrap();
            assert_eq!(loaded.plan, plan);
            for layer in 0..2 {
                for group in 0..2 {
                    assert_eq!(loaded.head_tensors(layer, group), in_memory.head_tensors(layer, group));
                }
            }
            let found = logits(&loaded, &ids);
            assert_eq!(found, logits(&in_memory, &ids), "{recurrent:?} {window}");
            seen.push(found);
            std::fs::remove_dir_all(&bench.out).unwrap();
        }
        assert_ne!(seen[0], seen[1]);
        if matches!(recurrent, RecurrentKind::Mamba2 | RecurrentKind::GatedDelta) {
            // Bank, measured decays and default decays are three different starts.
            assert!(seen[1] != seen[2] && seen[2] != seen[3]);
        }
    }
}

#[test]
fn untouched_tensors_keep_their_bytes_and_types() {
    let bench = Bench::new(&MIXED);
    bench.convert(&plan(spec(RecurrentKind::Mamba2, 4)), None, None).unwrap();
    let hybrid = open(&bench.out);
    for info in bench.base.tensors.infos() {
        let (before, after) = (bench.base.tensors.raw(&info.name), hybrid.tensors.raw(&info.name));
        assert_eq!(before.unwrap().unwrap(), after.unwrap().unwrap(), "{}", info.name);
        assert_eq!(hybrid.tensors.info(&info.name).unwrap().shape, info.shape);
    }
    let layout = HeadLayout::new(spec(RecurrentKind::Mamba2, 4), &config());
    let added = hybrid.tensors.infos().len() - bench.base.tensors.infos().len();
    assert_eq!(added, 2 * layout.tensors().len());
    let name = "model.layers.1.self_attn.recurrent.1.out_gain";
    assert_eq!(hybrid.tensors.info(name).unwrap().dtype, Dtype::F32);
}

#[test]
fn the_folder_is_complete() {
    let bench = Bench::new(&[Dtype::F32]);
    let plan = plan(spec(RecurrentKind::Mamba2, 4));
    bench.convert(&plan, None, None).unwrap();
    let read = |name: &str| std::fs::read(bench.out.join(name)).unwrap();
    let mut config: Value = serde_json::from_slice(&read("config.json")).unwrap();
    assert_eq!(config["recurformer"], json!({"version": 1}));
    config.as_object_mut().unwrap().remove("recurformer");
    assert_eq!(config, bench.base.config_json);
    assert_eq!(
        HeadPlan::from_json(&String::from_utf8(read("head_plan.json")).unwrap(), &bench.base.config).unwrap(),
        plan
    );
    assert_eq!(
        read("generation_config.json"),
        std::fs::read(bench.base.path.join("generation_config.json")).unwrap()
    );
    let mut names: Vec<_> = std::fs::read_dir(&bench.out)
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(names, ["config.json", "generation_config.json", "head_plan.json", "model.safetensors"]);
    assert_eq!(std::fs::read_dir(bench.dir.path()).unwrap().count(), 2);
}

#[test]
fn an_empty_plan_changes_no_logit() {
    let bench = Bench::new(&MIXED);
    bench.convert(&HeadPlan::empty(&config()), None, None).unwrap();
    let ids = tokens(4, 20);
    assert_eq!(logits(&Model::load(&open(&bench.out)).unwrap(), &ids), logits(&bench.model, &ids));
    // It is still a base model and may be converted.
    let out = bench.dir.path().join("again");
    convert(&open(&bench.out), &plan(spec(RecurrentKind::None, 4)), None, None, 0, &out, &mut Silent)
        .unwrap();
}

/// Hides the stored bytes, as a quantised source does.
struct Quantised(Box<dyn TensorSource>);

impl TensorSource for Quantised {
    fn infos(&self) -> &[TensorInfo] {
        self.0.infos()
    }
    fn read_f32(&self, name: &str) -> weights::error::Result<Vec<f32>> {
        self.0.read_f32(name)
    }
    fn raw(&self, _: &str) -> weights::error::Result<Option<(Dtype, &[u8])>> {
        Ok(None)
    }
    fn stored(&self, name: &str) -> weights::error::Result<weights::StoredTensor<'_>> {
        self.0.stored(name)
    }
}

#[test]
fn quantised_tensors_become_their_exact_values() {
    let mut bench = Bench::new(&[Dtype::BF16]);
    let path = bench.base.path.clone();
    bench.base.tensors = Box::new(Quantised(bench.base.tensors));
    bench.convert(&plan(spec(RecurrentKind::Mamba2, 4)), None, None).unwrap();
    let (base, hybrid) = (open(&path), open(&bench.out));
    for info in base.tensors.infos() {
        assert_eq!(hybrid.tensors.info(&info.name).unwrap().dtype, Dtype::F32);
        assert_eq!(hybrid.tensors.read_f32(&info.name).unwrap(), base.tensors.read_f32(&info.name).unwrap());
    }
}

#[test]
fn what_does_not_fit_is_refused_before_anything_is_written() {
    let bench = Bench::new(&MIXED);
    let mamba2 = spec(RecurrentKind::Mamba2, 4);
    let heads = heads(&bench.model);
    let bank = init_bank(&bench.model, mamba2, &heads, 3).unwrap();

    let mut other = plan(mamba2);
    other.model.layers = 3;
    assert!(message(bench.convert(&other, None, None)).contains("head plan"));
    let gated = plan(spec(RecurrentKind::GatedDelta, 4));
    let error = message(bench.convert(&gated, Some(&bank), None));
    assert!(error.contains("gated-delta") && error.contains("mamba2") && error.contains("hint"), "{error}");
    let mut foreign = bank.clone();
    foreign.info.model.heads = 8;
    assert!(message(bench.convert(&plan(mamba2), Some(&foreign), None)).contains("8 heads"));
    let mut short = bank.clone();
    short.groups[1][1].values[0].pop();
    assert!(message(bench.convert(&plan(mamba2), Some(&short), None)).contains("layers.1.groups.1.q_proj"));
    let mut stranger = heads.clone();
    stranger.model.head_dim = 16;
    assert!(message(bench.convert(&plan(mamba2), None, Some(&stranger))).contains("head_dim 16"));
    let mut no_mixer = plan(mamba2);
    no_mixer.mixer = None;
    assert!(bench.convert(&no_mixer, None, None).is_err());
    bench.assert_nothing_written();
    assert!(message(convert_in_memory(&bench.model, &gated, Some(&bank), None, 0)).contains("hint"));
}

#[test]
fn interrupted_conversions_leave_nothing() {
    struct Stop;
    impl Progress for Stop {
        fn cancelled(&self) -> bool {
            true
        }
    }
    let bench = Bench::new(&MIXED);
    let plan = plan(spec(RecurrentKind::Mamba2, 4));
    let result = convert(&bench.base, &plan, None, None, 0, &bench.out, &mut Stop);
    assert!(matches!(result, Err(SurgeryError::Interrupted)));
    bench.assert_nothing_written();
}

#[test]
fn hybrids_and_full_folders_are_refused() {
    let bench = Bench::new(&MIXED);
    let plan = plan(spec(RecurrentKind::None, 4));
    std::fs::create_dir(&bench.out).unwrap();
    bench.convert(&plan, None, None).unwrap();
    let before = std::fs::read(bench.out.join("model.safetensors")).unwrap();
    assert!(message(bench.convert(&plan, None, None)).contains("not empty"));
    assert_eq!(std::fs::read(bench.out.join("model.safetensors")).unwrap(), before);
    let hybrid = open(&bench.out);
    let again = convert(&hybrid, &plan, None, None, 0, &bench.dir.path().join("again"), &mut Silent);
    let error = message(again);
    assert!(error.contains("hybrid already: 2 of 4"), "{error}");
    let loaded = Model::load(&hybrid).unwrap();
    assert!(message(convert_in_memory(&loaded, &plan, None, None, 0)).contains("hybrid already"));
}

#[test]
fn notes_tell_of_another_bank() {
    struct Notes(Vec<String>);
    impl Progress for Notes {
        fn note(&mut self, line: &str) {
            self.0.push(line.to_string());
        }
    }
    let bench = Bench::new(&MIXED);
    let bank = init_bank(&bench.model, spec(RecurrentKind::Mamba2, 4), &heads(&bench.model), 3).unwrap();
    for (sha, notes) in [(bank.sha256(), 0), ("0".repeat(64), 1)] {
        let mut plan = plan(bank.info.spec);
        plan.criterion =
            Some(serde_json::from_value(json!({"name": "mixer-fisher", "bank_sha256": sha})).unwrap());
        let mut progress = Notes(Vec::new());
        convert(&bench.base, &plan, Some(&bank), None, 0, &bench.out, &mut progress).unwrap();
        assert_eq!(progress.0.len(), notes, "{:?}", progress.0);
        std::fs::remove_dir_all(&bench.out).unwrap();
    }
}

#[test]
fn a_trained_model_is_saved_with_its_changes_only() {
    let bench = Bench::new(&MIXED);
    let plan = plan(spec(RecurrentKind::Mamba2, 4));
    bench.convert(&plan, None, None).unwrap();
    let hybrid = open(&bench.out);
    let mut trained = Model::load(&hybrid).unwrap();
    let changed = ["model.layers.0.self_attn.recurrent.0.gate_proj.weight", "model.norm.weight"];
    for name in changed {
        let id = trained.params.id(name).unwrap();
        trained.params.data_mut(id)[1] += 0.1234;
    }
    // From the hybrid it started as, and from the base it came from.
    for (source, name) in [(&hybrid, "healed"), (&bench.base, "healed-base")] {
        let out = bench.dir.path().join(name);
        save_model(source, &trained, &out, &mut Silent).unwrap();
        let saved = open(&out);
        let again = Model::load(&saved).unwrap();
        assert_eq!(again.plan, plan);
        assert_eq!(again.params.len(), trained.params.len());
        for (_, param) in trained.params.iter() {
            assert_eq!(
                again.params.data(again.params.id(&param.name).unwrap()),
                param.data(),
                "{}",
                param.name
            );
        }
        for info in source.tensors.infos().iter().filter(|i| !changed.contains(&i.name.as_str())) {
            let (a, b) = (source.tensors.raw(&info.name), saved.tensors.raw(&info.name));
            assert_eq!(a.unwrap().unwrap(), b.unwrap().unwrap(), "{}", info.name);
        }
        assert_eq!(saved.tensors.info("model.norm.weight").unwrap().dtype, Dtype::F32);
    }
    // A model without converted groups leaves the source's heads behind.
    let out = bench.dir.path().join("base-again");
    save_model(&hybrid, &bench.model, &out, &mut Silent).unwrap();
    let ids = tokens(4, 20);
    assert_eq!(logits(&Model::load(&open(&out)).unwrap(), &ids), logits(&bench.model, &ids));
    assert!(message(save_model(&hybrid, &trained, &out, &mut Silent)).contains("not empty"));

    let mut other = trained.clone();
    other.config.rms_eps *= 2.0;
    assert!(
        message(save_model(&hybrid, &other, &bench.dir.path().join("x"), &mut Silent)).contains("differ")
    );
}
