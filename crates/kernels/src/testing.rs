//! What the unit tests share: contexts, noise, comparison, finite differences.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::{Exec, Isa, IsaLevel, Precision};

/// Every instruction set of this CPU, with one thread and with two.
pub(crate) fn execs() -> Vec<Exec> {
    let pairs = Isa::available().into_iter().flat_map(|isa| [1, 2].map(|threads| (isa, threads)));
    pairs.map(|(isa, threads)| Exec::with_isa(threads, isa).unwrap()).collect()
}

/// [`execs`], with AMX on its software model where the CPU has everything but AMX.
pub(crate) fn execs_and_modelled_amx() -> Vec<Exec> {
    let modelled = Isa::modelled_amx().filter(|amx| !Isa::available().contains(amx));
    let modelled = modelled.into_iter().flat_map(|isa| [1, 2].map(|n| Exec::with_isa(n, isa).unwrap()));
    execs().into_iter().chain(modelled).collect()
}

/// Those of [`execs_and_modelled_amx`] that can multiply in bfloat16, doing so.
pub(crate) fn rounding_execs() -> Vec<Exec> {
    let can = execs_and_modelled_amx().into_iter().filter(|exec| exec.isa().level() >= IsaLevel::Avx512Bf16);
    can.map(|exec| exec.with_precision(Precision::Bf16).unwrap()).collect()
}

/// Every context in f32, and those that can in bfloat16, each with the tolerance of its precision.
pub(crate) fn execs_of_both_precisions(f32: f64, bf16: f64) -> Vec<(Exec, f64)> {
    let in_f32 = execs().into_iter().map(|exec| (exec, f32));
    in_f32.chain(rounding_execs().into_iter().map(|exec| (exec, bf16))).collect()
}

/// `n` values uniform in [-1, 1].
pub(crate) fn noise(seed: u64, n: usize) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..n).map(|_| rng.random_range(-1.0..=1.0)).collect()
}

/// The same values in f64.
pub(crate) fn to_f64(x: &[f32]) -> Vec<f64> {
    x.iter().copied().map(f64::from).collect()
}

/// Panics unless every value of `got` is within `tolerance · (1 + |want|)` of `want`.
pub(crate) fn assert_close(what: &str, got: &[f32], want: &[f64], tolerance: f64) {
    assert_eq!(got.len(), want.len(), "{what}: lengths");
    for (i, (&got, &want)) in got.iter().zip(want).enumerate() {
        let error = (f64::from(got) - want).abs();
        let equal = f64::from(got) == want;
        assert!(equal || error <= tolerance * (1.0 + want.abs()), "{what}[{i}]: {got}, reference {want}");
    }
}

/// Central finite differences of the scalar function `f` at `x`.
pub(crate) fn numeric_gradient(x: &[f64], f: impl Fn(&[f64]) -> f64) -> Vec<f64> {
    const STEP: f64 = 1e-5;
    let mut x = x.to_vec();
    (0..x.len())
        .map(|i| {
            let old = x[i];
            x[i] = old + STEP;
            let high = f(&x);
            x[i] = old - STEP;
            let low = f(&x);
            x[i] = old;
            (high - low) / (2.0 * STEP)
        })
        .collect()
}

/// Panics unless the analytic f64 gradient `got` agrees with finite differences `want`.
pub(crate) fn assert_gradient(what: &str, got: &[f64], want: &[f64]) {
    /// Truncation (step² · third derivative) and cancellation (1e-16 / step) of a central difference in f64.
    const TOLERANCE: f64 = 1e-7;
    assert_eq!(got.len(), want.len(), "{what}: lengths");
    for (i, (&got, &want)) in got.iter().zip(want).enumerate() {
        assert!(
            (got - want).abs() <= TOLERANCE * (1.0 + want.abs()),
            "{what}[{i}]: {got}, difference {want}"
        );
    }
}
