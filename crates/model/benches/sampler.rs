//! One draw from 49152 logits, beside the plain definition with full sorts: `cargo bench -p recurformer-model`.

use divan::{Bencher, black_box};
use recurformer_model::{Sampler, SamplerOptions};

fn main() {
    divan::main();
}

const VOCAB: usize = 49152;

/// Roughly normal, standard deviation 3, as a language model's are.
fn logits() -> Vec<f32> {
    let mut state = 1u64;
    let mut uniform = move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 24) as f32
    };
    (0..VOCAB).map(|_| ((0..12).map(|_| uniform()).sum::<f32>() - 6.0) * 3.0).collect()
}

fn options(name: &str) -> SamplerOptions {
    let sampled = SamplerOptions { temperature: 0.8, ..Default::default() };
    match name {
        "greedy" => SamplerOptions::default(),
        "plain" => sampled,
        "top_k" => SamplerOptions { top_k: 40, ..sampled },
        "top_p" => SamplerOptions { top_p: 0.95, ..sampled },
        "min_p" => SamplerOptions { min_p: 0.05, ..sampled },
        _ => SamplerOptions { top_k: 40, top_p: 0.95, repetition_penalty: 1.1, ..sampled },
    }
}

const NAMES: [&str; 6] = ["greedy", "plain", "top_k", "top_p", "min_p", "all"];

#[divan::bench(args = NAMES)]
fn sampler(bencher: Bencher<'_, '_>, name: &str) {
    let (logits, mut sampler) = (logits(), Sampler::new(options(name)).expect("valid options"));
    let seen: Vec<u32> = (0..1000).collect();
    bencher.bench_local(|| sampler.sample(&logits, &seen));
}

/// Sorts everything, then takes the first tokens.
#[divan::bench(args = NAMES)]
fn full_sort(bencher: Bencher<'_, '_>, name: &str) {
    let (logits, options) = (logits(), options(name));
    bencher.bench_local(|| {
        let mut all: Vec<(u32, f64)> = (0..).zip(logits.iter().map(|&l| f64::from(l))).collect();
        all.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        if options.temperature == 0.0 {
            return all[0].0;
        }
        if options.top_k > 0 {
            all.truncate(options.top_k);
        }
        let best = all[0].1;
        all.iter_mut().for_each(|c| c.1 = ((c.1 - best) / f64::from(options.temperature)).exp());
        let target = all.iter().map(|c| c.1).sum::<f64>() * f64::from(options.top_p);
        let mut mass = 0.0;
        all.retain(|c| {
            let keep = options.top_p == 1.0 || mass < target;
            mass += c.1;
            keep && c.1 >= f64::from(options.min_p)
        });
        black_box(&all)[0].0
    });
}
