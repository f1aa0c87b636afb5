//! Random streams, one per purpose, seed and number, so that no text of one purpose is drawn like one of another.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// What is drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Documents to train on.
    Train = 1,
    /// Documents held out.
    Heldout = 2,
    /// HashHop prompts to test with.
    HashHop = 3,
    /// RULER prompts to test with.
    Ruler = 4,
    /// Probes to choose heads with.
    Probe = 5,
    /// MQAR sequences to train on.
    MqarTrain = 6,
    /// MQAR sequences that say when training is done.
    MqarCheck = 7,
    /// MQAR sequences to test with.
    MqarTest = 8,
    /// Random tokens that come back, to test with.
    Induction = 9,
}

/// The stream of number `index` (below 2^56).
pub fn stream(purpose: Purpose, seed: u64, index: u64) -> ChaCha8Rng {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(((purpose as u64) << 56) | index);
    rng
}

/// One of `items`.
pub fn one_of<'a, T: ?Sized>(rng: &mut impl Rng, items: &[&'a T]) -> &'a T {
    items[rng.random_range(0..items.len())]
}
