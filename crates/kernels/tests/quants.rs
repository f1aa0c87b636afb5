//! Quantised blocks against llama.cpp's Python package (`tests/data/quants.safetensors`, made by
//! `testdata/make_goldens.py`): the same bytes of the same values, and the same values of the same bytes.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use kernels::quant::{Dtype, dequantize, quantize};
use recurformer_kernels as kernels;
use safetensors::SafeTensors;

const DATA: &[u8] = include_bytes!("data/quants.safetensors");

fn words(name: &str) -> Vec<[u8; 4]> {
    let file = SafeTensors::deserialize(DATA).unwrap();
    let view = file.tensor(name).unwrap();
    view.data().chunks_exact(4).map(|word| word.try_into().unwrap()).collect()
}

fn floats(name: &str) -> Vec<f32> {
    words(name).into_iter().map(f32::from_le_bytes).collect()
}

fn bytes(dtype: Dtype) -> Vec<u8> {
    words(&format!("{}.bytes", dtype.name())).into_iter().map(|word| i32::from_le_bytes(word) as u8).collect()
}

const QUANTISED: [Dtype; 5] = [Dtype::Q8_0, Dtype::Q4_0, Dtype::Q4_1, Dtype::Q5_0, Dtype::Q5_1];

#[test]
fn values_become_the_same_bytes() {
    let values = floats("values");
    for dtype in QUANTISED {
        let want = bytes(dtype);
        let mut got = vec![0; want.len()];
        quantize(dtype, &values, &mut got);
        let (_, size) = dtype.block();
        for (block, (got, want)) in got.chunks_exact(size).zip(want.chunks_exact(size)).enumerate() {
            let values = &values[32 * block..32 * (block + 1)];
            // Without a scale any code means zero; ours is the one in the middle.
            if values.iter().any(|&v| v != 0.0) {
                assert_eq!(got, want, "{} block {block}: {values:?}", dtype.name());
            }
        }
    }
}

#[test]
fn bytes_become_the_same_values() {
    for dtype in QUANTISED.into_iter().chain([Dtype::Q4K, Dtype::Q5K, Dtype::Q6K]) {
        let want = floats(&format!("{}.values", dtype.name()));
        let mut got = vec![f32::NAN; want.len()];
        dequantize(dtype, &bytes(dtype), &mut got);
        assert_eq!(got, want, "{}", dtype.name());
    }
}
