//! A model of which one group copies from far: at the token `ASK` it attends to the value said before, wherever that stands, and says it.

use super::super::{Needle, NeedlePrompt};
use crate::testing::{config, noise};
use model::{HeadPlan, Model, ParamStore};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// The copying group.
pub const COPIES: (usize, usize) = (0, 1);
/// Asks for the value.
pub const ASK: u32 = 1;
/// The first of eight tokens that are values; those below are neither values nor `ASK`.
pub const VALUES: u32 = 40;

/// First of eight features that name a value, and of those that its copy goes to.
const NAME: usize = 2;
const COPY: usize = 10;
/// The pair of a head's components that turns slowest with the position.
const SLOW: usize = 3;

pub fn model() -> Model {
    let config = config();
    let (d_model, d, heads) = (config.d_model, config.head_dim, config.heads);
    let mut rng = ChaCha8Rng::seed_from_u64(11);
    let mut params = ParamStore::default();
    for (name, shape) in config.tensor_shapes() {
        let n = shape.iter().product();
        let mut data = match name.contains("norm") {
            true => vec![1.0; n],
            false => noise(&mut rng, n, 0.2 / (shape[shape.len() - 1] as f32).sqrt()),
        };
        let planted = name.contains(&format!("layers.{}.", COPIES.0));
        let group = COPIES.1;
        if name.contains("embed_tokens") {
            for (token, row) in data.chunks_exact_mut(d_model).enumerate() {
                row.fill(0.0);
                match token as u32 {
                    ASK => row[0] = 1.0,
                    value if value >= VALUES => {
                        row[1] = 1.0;
                        row[NAME + (value - VALUES) as usize] = 1.0;
                    }
                    _ => row[18..].copy_from_slice(&noise(&mut rng, d_model - 18, 0.5)),
                }
            }
        } else if planted && name.contains("q_proj") {
            for head in 2 * group..2 * group + 2 {
                data[(head * d + SLOW) * d_model] = 6.0;
            }
        } else if planted && name.contains("k_proj") {
            data[(group * d + SLOW) * d_model + 1] = 6.0;
        } else if planted && name.contains("v_proj") {
            (0..d).for_each(|c| data[(group * d + c) * d_model + NAME + c] = 1.0);
        } else if planted && name.contains("o_proj") {
            for head in 2 * group..2 * group + 2 {
                (0..d).for_each(|c| data[(COPY + c) * heads * d + head * d + c] = 1.0);
            }
        } else if name.contains("lm_head") {
            (0..8).for_each(|value| data[(VALUES as usize + value) * d_model + COPY + value] = 3.0);
        }
        params.insert(name, shape, data);
    }
    Model::from_parts(config.clone(), HeadPlan::empty(&config), params).unwrap()
}

/// `len` tokens with a value at `said`, asked for at the end.
pub fn prompt(seed: u64, said: usize, len: usize) -> NeedlePrompt {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut tokens: Vec<u32> = (0..len).map(|_| rng.random_range(2..VALUES)).collect();
    let (value, other) = (rng.random_range(VALUES..VALUES + 4), rng.random_range(VALUES + 4..VALUES + 8));
    tokens[said] = value;
    tokens[len - 2..].copy_from_slice(&[ASK, value]);
    NeedlePrompt { tokens, needles: vec![Needle { said, asked: len - 1, distractor: vec![other] }] }
}
