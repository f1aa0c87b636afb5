//! What the tests of the recurrences share: random inputs, comparison with f64, finite differences.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::testing;
pub(crate) use crate::testing::{execs, to_f64 as wide};

/// Sequence lengths around chunk borders.
pub(crate) const LENGTHS: [usize; 7] = [0, 1, 2, 63, 64, 65, 500];

/// Values below this count as this large: a gradient that vanishes is the difference of parts that do not.
const LEAST_SCALE: f64 = 1e-2;

pub(crate) fn rng(seed: u64) -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(seed)
}

/// `n` values evenly distributed over a range.
pub(crate) fn random(rng: &mut ChaCha8Rng, n: usize, low: f32, high: f32) -> Vec<f32> {
    (0..n).map(|_| rng.random_range(low..=high)).collect()
}

/// Asserts `|found − expected| ≤ tolerance · max(|expected|, LEAST_SCALE)` for every value.
#[track_caller]
pub(crate) fn assert_close(what: &str, found: &[f32], expected: &[f64], tolerance: f64) {
    assert_eq!(found.len(), expected.len(), "{what}: length");
    let scale = expected.iter().fold(LEAST_SCALE, |scale, x| scale.max(x.abs()));
    for (i, (&found, &expected)) in found.iter().zip(expected).enumerate() {
        let error = (f64::from(found) - expected).abs();
        assert!(
            error <= tolerance * scale,
            "{what}[{i}]: found {found}, expected {expected}, error {:.1e} of the largest {scale:.3e}",
            error / scale
        );
    }
}

/// Asserts that `gradient` is the derivative of `loss`, at every coordinate of the part that `part` selects.
#[track_caller]
pub(crate) fn assert_gradient<D: Clone>(
    what: &str,
    data: &D,
    part: impl Fn(&mut D) -> &mut Vec<f64>,
    loss: impl Fn(&D) -> f64,
    gradient: &[f64],
) {
    let mut centre = data.clone();
    let differences = testing::numeric_gradient(part(&mut centre), |values| {
        let mut data = data.clone();
        part(&mut data).copy_from_slice(values);
        loss(&data)
    });
    testing::assert_gradient(what, gradient, &differences);
}

/// Sum of products.
pub(crate) fn inner(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}
