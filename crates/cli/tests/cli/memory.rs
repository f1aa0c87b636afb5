//! Options of `heal` that save memory: what changes no bit, what does, what they refuse.

use crate::common::Work;

const HEAL: &str = "heal --model hybrid --base llama3 --data data.npy --stage continue --train all --tokens 256 --context 32 --batch 2";

#[test]
fn savings_that_change_no_bit() {
    let work = Work::with_model("llama3");
    work.make_hybrid("llama3", "gated-delta", 4);
    let healed = |name: &str, more: &str| {
        work.ok(&format!("{HEAL} {more} --out {name}"));
        work.read(&format!("{name}/model.safetensors"))
    };
    let plain = healed("plain", "--clip 0");
    let savings = "--optimizer-in-backward --checkpoint-activations";
    assert!(healed("saved", savings) == plain);
    assert!(healed("one", &format!("{savings} 1")) == plain);
    // The gradient of an untrained model is longer than this.
    assert!(healed("clipped", "--clip 1e-3") != plain);
    let rounded = healed("rounded", "--clip 0 --moments bf16");
    assert!(rounded != plain && rounded.len() == plain.len());
    assert!(healed("both", &format!("{savings} --moments bf16")) == rounded);
}

#[test]
fn what_cannot_be_saved_is_refused() {
    let work = Work::with_model("llama3");
    work.make_hybrid("llama3", "gated-delta", 4);
    for (more, needle) in [
        ("--clip=-1", "--clip -1"),
        ("--clip nan", "--clip NaN"),
        ("--checkpoint-activations some", "expected a number of layers, or all"),
        ("--optimizer-in-backward --accumulate 2", "--accumulate"),
    ] {
        work.fails(2, &format!("{HEAL} --out out {more}"), &[needle]);
    }
    work.fails(
        1,
        &format!("{HEAL} --out out --optimizer-in-backward --clip 1"),
        &["hint: turn clipping off"],
    );
    assert!(!work.path("out").exists());
}
