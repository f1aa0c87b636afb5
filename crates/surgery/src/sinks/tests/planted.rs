//! Small models with a sink of known cause, and text for them. Embeddings are one-hot with a constant beside; layers are zero but for what
//! is planted.

use crate::testing::noise;
use model::{HeadPlan, Model, ModelConfig, ParamStore};
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use weights::{Family, RopeScaling};

/// Tokens of text in which every token occurs once.
pub const DISTINCT: usize = VOCAB;
/// Scores of [`by_token`]'s sink above all others.
pub const TOKEN_STRENGTH: f64 = 12.0;

const VOCAB: usize = 48;
const D_MODEL: usize = 128;
const D_FF: usize = 2 * VOCAB;
/// Dimension that is 1 in every embedding.
const CONST: usize = VOCAB;
/// Dimension that says how much a token saw of itself.
const ITSELF: usize = VOCAB + 1;
/// First of `VOCAB` dimensions that hold what a token saw.
const SEEN: usize = VOCAB + 2;
/// First dimension that only the output projection reads.
const OUT: usize = 100;
/// What RMSNorm makes of a 1 in an embedding, whose norm is √2.
const ONE: f32 = 8.0;

pub struct Planted {
    config: ModelConfig,
    params: ParamStore,
    seed: u64,
}

impl Planted {
    /// Every layer's attention is uniform and gives nothing. Two query heads on one KV head.
    pub fn new(head_dim: usize, layers: usize, rope_theta: f64, factor: f64) -> Self {
        let config = ModelConfig {
            family: Family::Qwen2,
            vocab: VOCAB,
            d_model: D_MODEL,
            d_ff: D_FF,
            layers,
            heads: 2,
            kv_heads: 1,
            head_dim,
            rms_eps: 1e-9,
            rope_theta,
            rope_scaling: RopeScaling::Linear { factor },
            max_context: 256,
            tie_embeddings: false,
            qkv_bias: true,
            qk_norm: false,
            bos_token_id: None,
            eos_token_ids: vec![],
        };
        let mut params = ParamStore::default();
        for (name, shape) in config.tensor_shapes() {
            let fill = if name.contains("norm") { 1.0 } else { 0.0 };
            let n = shape.iter().product();
            params.insert(name, shape, vec![fill; n]);
        }
        let mut planted = Self { config, params, seed: 9 };
        for token in 0..VOCAB {
            planted.set("model.embed_tokens", token, token, 1.0);
            planted.set("model.embed_tokens", token, CONST, 1.0);
        }
        let values = planted.noise(VOCAB * D_MODEL, 0.1);
        planted.params.insert("lm_head.weight", vec![VOCAB, D_MODEL], values);
        planted
    }

    fn noise(&mut self, n: usize, scale: f32) -> Vec<f32> {
        self.seed += 1;
        noise(&mut ChaCha8Rng::seed_from_u64(self.seed), n, scale)
    }

    fn set(&mut self, name: &str, row: usize, column: usize, value: f32) {
        let id = self.params.id(&format!("{name}.weight")).unwrap();
        let columns = self.params.get(id).shape[1];
        self.params.data_mut(id)[row * columns + column] = value;
    }

    fn attention(&mut self, layer: usize, what: &str, row: usize, column: usize, value: f32) {
        self.set(&format!("model.layers.{layer}.self_attn.{what}_proj"), row, column, value);
    }

    /// Values of `layer` are random mixtures of the one-hot tokens, and its heads write to the output dimensions.
    fn speak(&mut self, layer: usize) {
        let (d, outputs) = (self.config.head_dim, D_MODEL - OUT);
        let (values, out) = (self.noise(d * VOCAB, 0.3), self.noise(outputs * 2 * d, 0.3));
        for (i, value) in values.into_iter().enumerate() {
            self.attention(layer, "v", i / VOCAB, i % VOCAB, value);
        }
        for (i, value) in out.into_iter().enumerate() {
            self.attention(layer, "o", OUT + i / (2 * d), i % (2 * d), value);
        }
    }

    /// The first head of `layer` likes the key of `token`, by the slowest pair of RoPE: `strength` nats above others in layer 0.
    pub fn add_token_key(&mut self, layer: usize, token: usize, strength: f64) {
        let slow = self.config.head_dim / 2 - 1;
        let scale = (strength as f32 * (self.config.head_dim as f32).sqrt()).sqrt();
        self.attention(layer, "q", slow, CONST, scale / ONE);
        self.attention(layer, "k", slow, token, scale / ONE);
    }

    /// Weakens the key of [`by_token`].
    pub fn scale_token_key(&mut self, factor: f32) {
        let id = self.params.id("model.layers.0.self_attn.k_proj.weight").unwrap();
        self.params.data_mut(id).iter_mut().for_each(|x| *x *= factor);
    }

    pub fn model(&self) -> Model {
        let plan = HeadPlan::empty(&self.config);
        Model::from_parts(self.config.clone(), plan, self.params.clone()).unwrap()
    }
}

/// Every key is the same before RoPE. The query of token t is turned back by t, so that at position t it has no position any more: it
/// likes the code 0. The first half of the text may hold any tokens.
pub fn by_position() -> Planted {
    // With these frequencies no other position within the text comes near.
    let mut planted = Planted::new(16, 1, 2.0, 0.5);
    planted.speak(0);
    // Eight pairs score 20 together, after the division by √16.
    let scale = 10f32.sqrt();
    for (pair, frequency) in planted.config.rope_inv_freq().into_iter().enumerate() {
        for token in 0..VOCAB {
            let (sin, cos) = (token as f64 * frequency).sin_cos();
            planted.attention(0, "q", pair, token, scale * cos as f32 / ONE);
            planted.attention(0, "q", pair + 8, token, -scale * sin as f32 / ONE);
        }
        let id = planted.params.id("model.layers.0.self_attn.k_proj.bias").unwrap();
        planted.params.data_mut(id)[pair] = scale;
    }
    planted
}

/// Token t at position t in the second half; the first half shuffled.
pub fn by_position_text(sequences: usize) -> Vec<Vec<u32>> {
    (0..sequences as u64)
        .map(|seed| {
            let mut tokens: Vec<u32> = (0..VOCAB as u32).collect();
            tokens[..VOCAB / 2].shuffle(&mut ChaCha8Rng::seed_from_u64(seed));
            tokens
        })
        .collect()
}

/// Token 0 absorbs; its value is `value` times that of others.
pub fn by_token(value: f32) -> Planted {
    let mut planted = Planted::new(16, 1, 1e6, 1.0);
    planted.speak(0);
    planted.add_token_key(0, 0, TOKEN_STRENGTH);
    let id = planted.params.id("model.layers.0.self_attn.v_proj.weight").unwrap();
    planted.params.data_mut(id).chunks_mut(D_MODEL).for_each(|row| row[0] *= value);
    planted
}

/// Random text with token 0 at one position.
pub fn by_token_text(sequences: usize, position: usize) -> Vec<Vec<u32>> {
    (0..sequences as u64)
        .map(|seed| {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            let mut tokens: Vec<u32> = (0..64).map(|_| rng.random_range(1..VOCAB as u32)).collect();
            tokens[position] = 0;
            tokens
        })
        .collect()
}

/// Layer 0 averages the tokens seen; its MLP multiplies that with the token itself, `g·u = silu(g)·u − silu(−g)·u`: 1 for a token that saw
/// only itself, 1/(i+1) at position i of distinct tokens. Layer 1 attends to where this is large.
pub fn by_mask() -> Planted {
    let mut planted = Planted::new(64, 2, 1e6, 1.0);
    for token in 0..VOCAB {
        planted.attention(0, "v", token, token, 1.0 / ONE);
        planted.attention(0, "o", SEEN + token, token, 1.0);
        let mlp = "model.layers.0.mlp";
        for (row, sign) in [(token, 1.0), (VOCAB + token, -1.0)] {
            planted.set(&format!("{mlp}.gate_proj"), row, token, sign);
            planted.set(&format!("{mlp}.up_proj"), row, SEEN + token, 1.0);
            // The norm before the MLP makes (√128/√3)² of the first token's product.
            planted.set(&format!("{mlp}.down_proj"), ITSELF, row, sign * 3.0 / D_MODEL as f32);
        }
    }
    planted.speak(1);
    // The first scores about 15.
    planted.attention(1, "q", 31, CONST, 1.0);
    planted.attention(1, "k", 31, ITSELF, 2.65);
    planted
}

/// All tokens once, in any order.
pub fn by_mask_text(sequences: usize) -> Vec<Vec<u32>> {
    (0..sequences as u64)
        .map(|seed| {
            let mut tokens: Vec<u32> = (0..VOCAB as u32).collect();
            tokens.shuffle(&mut ChaCha8Rng::seed_from_u64(seed));
            tokens
        })
        .collect()
}
