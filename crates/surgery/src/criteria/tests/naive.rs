//! A base model in plain f64 loops whose head outputs can be replaced; shares no arithmetic with the engine.

use super::Scores;
use model::{Model, ModelConfig};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

type Rows = Vec<Vec<f64>>;

/// Step of the central differences.
const STEP: f64 = 1e-5;

pub struct Naive<'a> {
    model: &'a ModelData,
    ids: Vec<usize>,
}
