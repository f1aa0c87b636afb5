use super::*;
use crate::testing::{config, exec, model, spec, tokens};
use crate::{HeadsReport, stats};
use model::{Model, RecurrentKind, Silent};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

fn heads(model: &Model) -> HeadsReport {
    let options = stats::AnalyzeOptions { criteria: vec![], ..Default::default() };
    stats::analyze(&exec(), model, &[tokens(1, 40)], &options, &mut Silent).unwrap()
}

fn bank(recurrent: RecurrentKind, window: usize) -> HeadBank {
    let model = model(1);
    let mut bank = init_bank(&model, spec(recurrent, window), &heads(&model), 7).unwrap();
    bank.info.heldout_error = vec![vec![0.5, 0.25]; 2];
    bank.info.mixer_fisher = vec![vec![1e-3, 2.0]; 2];
    bank.info.fisher_tokens = 40;
    bank
}

const KINDS: [(RecurrentKind, usize); 6] = [
    (RecurrentKind::Mamba2, 4),
    (RecurrentKind::Mamba2, 0),
    (RecurrentKind::GatedDelta, 4),
    (RecurrentKind::Mamba, 0),
    (RecurrentKind::Mamba, 4),
    (RecurrentKind::None, 4),
];

#[test]
fn banks_of_every_kind_survive_the_disk() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("bank.safetensors");
    for (recurrent, window) in KINDS {
        let bank = bank(recurrent, window);
        bank.write(&path, &config()).unwrap();
        let again = HeadBank::read(&path, &config()).unwrap();
        assert_eq!(again, bank, "{recurrent:?} {window}");
        assert_eq!(again.sha256(), bank.sha256());
    }
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn the_hash_is_of_the_values() {
    let mut bank = bank(RecurrentKind::Mamba2, 4);
    let before = bank.sha256();
    assert_eq!(before.len(), 64);
    bank.info.tokens += 1;
    assert_eq!(bank.sha256(), before);
    bank.groups[1][1].values[0][0] += 1.0;
    assert_ne!(bank.sha256(), before);
}

#[test]
fn fresh_heads_start_from_the_base_and_the_distances() {
    let model = model(1);
    let heads = heads(&model);
    let mamba2 = init_bank(&model, spec(RecurrentKind::Mamba2, 4), &heads, 7).unwrap();
    let layout = mamba2.layout(&model.config);
    let at = |name: &str| layout.tensors().iter().position(|t| t.name == name).unwrap();
    for layer in 0..2 {
        for group in 0..2 {
            let head = &mamba2.groups[layer][group];
            assert_eq!(head.values[at("q_proj.weight")], model.base_group(layer, group).q_proj);
            for (h, &bias) in head.values[at("dt_proj.bias")].iter().enumerate() {
                let distance = heads.layers[layer].heads[2 * group + h].mean_distance.clamp(2.0, 128.0);
                let decay = f64::from(bias).exp().ln_1p();
                assert!((decay * distance - 1.0).abs() < 1e-3, "softplus({bias}) · {distance}");
            }
        }
    }
    let random = |seed| init_bank(&model, spec(RecurrentKind::Mamba, 0), &heads, seed).unwrap();
    assert_eq!(random(1), random(1));
    assert_ne!(random(1).groups, random(2).groups);
    assert_ne!(random(1).groups[0][0], random(1).groups[0][1]);
    assert_ne!(random(1).groups[0][1], random(1).groups[1][0]);
}

#[test]
fn a_bank_that_does_not_fit_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("bank.safetensors");
    let good = bank(RecurrentKind::Mamba2, 4);
    good.write(&path, &config()).unwrap();
    let other = ModelConfig { layers: 3, ..config() };
    let message = |error: SurgeryError| error.to_string();
    let error = message(HeadBank::read(&path, &other).unwrap_err());
    assert!(
        error.contains("2 layers") && error.contains("3 layers") && error.contains("bank.safe"),
        "{error}"
    );
    // The same counts, another width: only the shapes tell.
    let wide = ModelConfig { d_model: 32, ..config() };
    let error = message(HeadBank::read(&path, &wide).unwrap_err());
    assert!(error.contains("layers.0.groups.0.q_proj.weight") && error.contains("[16, 32]"), "{error}");
    assert!(message(HeadBank::read(&dir.path().join("none"), &config()).unwrap_err()).contains("none"));

    let refused = |edit: &dyn Fn(&mut HeadBank)| {
        let mut bank = good.clone();
        edit(&mut bank);
        let at = dir.path().join("new");
        let error = message(bank.write(&at, &config()).unwrap_err());
        assert!(!at.exists(), "{error}");
        error
    };
    assert!(refused(&|b| drop(b.groups[1].pop())).contains("2 groups"));
    assert!(refused(&|b| drop(b.groups[1][0].values.pop())).contains("layer 1 group 0"));
    assert!(refused(&|b| b.groups[0][1].values[3].push(0.0)).contains("layers.0.groups.1."));
    assert!(refused(&|b| b.info.mixer_fisher[0][0] = f64::NAN).contains("mixer-fisher"));
    assert!(refused(&|b| b.info.heldout_error.truncate(1)).contains("held-out"));
    assert!(refused(&|b| b.groups[0][0].values[0][0] = f32::NAN).contains("layers.0.groups.0.q_proj"));

    write_f32(&path, &[], &Metadata::new()).unwrap();
    assert!(message(HeadBank::read(&path, &config()).unwrap_err()).contains("not a head bank"));
    for (json, word) in
        [("{\"version\": 9}", "version 9"), ("{", "malformed"), ("{\"version\": 1}", "malformed")]
    {
        let metadata = Metadata::from([(INFO_KEY.to_string(), json.to_string())]);
        write_f32(&path, &[], &metadata).unwrap();
        let error = message(HeadBank::read(&path, &config()).unwrap_err());
        assert!(error.contains(word), "{error}");
    }
    let metadata = Metadata::from([(INFO_KEY.to_string(), serde_json::to_string(&good.info).unwrap())]);
    write_f32(&path, &[], &metadata).unwrap();
    assert!(message(HeadBank::read(&path, &config()).unwrap_err()).contains("0 tensors"));
}

#[test]
fn damaged_banks_are_refused_or_read_whole() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("bank.safetensors");
    bank(RecurrentKind::GatedDelta, 4).write(&path, &config()).unwrap();
    let good = std::fs::read(&path).unwrap();
    // Header and description are where damage has ways to hide.
    let head = good.len().min(6000);
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let mut refused = 0;
    for _ in 0..1000 {
        let mut bytes = good.clone();
        for _ in 0..rng.random_range(1..5) {
            bytes[rng.random_range(0..head)] = rng.random();
        }
        std::fs::write(&path, &bytes).unwrap();
        match HeadBank::read(&path, &config()) {
            Ok(bank) => bank.check(&config()).unwrap(),
            Err(_) => refused += 1,
        }
    }
    assert!(refused > 0);
}
