use super::*;
use crate::testing::noise;

const ALL: [Dtype; 11] = [
    Dtype::F32,
    Dtype::F16,
    Dtype::BF16,
    Dtype::Q8_0,
    Dtype::Q4_0,
    Dtype::Q4_1,
    Dtype::Q5_0,
    Dtype::Q5_1,
    Dtype::Q4K,
    Dtype::Q5K,
    Dtype::Q6K,
];

fn stored(dtype: Dtype, values: &[f32]) -> Vec<u8> {
    let (block, bytes) = dtype.block();
    let mut out = vec![0xaa; values.len() / block * bytes];
    quantize(dtype, values, &mut out);
    out
}

fn round_trip(dtype: Dtype, values: &[f32]) -> Vec<f32> {
    let mut out = vec![f32::NAN; values.len()];
    dequantize(dtype, &stored(dtype, values), &mut out);
    out
}

/// Roughly normal values, as weights are.
fn weights(seed: u64, n: usize) -> Vec<f32> {
    let noise = noise(seed, 6 * n);
    noise.chunks_exact(6).map(|six| 0.02 * six.iter().sum::<f32>()).collect()
}

/// Root of the mean squared error relative to the values.
fn relative_error(want: &[f32], got: &[f32]) -> f64 {
    let square = |x: f64| x * x;
    let error: f64 = want.iter().zip(got).map(|(&w, &g)| square(f64::from(w) - f64::from(g))).sum();
    let size: f64 = want.iter().map(|&w| square(f64::from(w))).sum();
    (error / size).sqrt()
}

/// What llama.cpp's reference quantisers leave on normal values, with a few percent to spare.
const ERRORS: [(Dtype, f64); 11] = [
    (Dtype::F32, 0.0),
    (Dtype::F16, 3e-4),
    (Dtype::BF16, 2.5e-3),
    (Dtype::Q8_0, 6e-3),
    (Dtype::Q4_0, 0.095),
    (Dtype::Q4_1, 0.085),
    (Dtype::Q5_0, 0.048),
    (Dtype::Q5_1, 0.042),
    (Dtype::Q4K, 0.078),
    (Dtype::Q5K, 0.038),
    (Dtype::Q6K, 0.019),
];

#[test]
fn round_trips_stay_within_each_type_s_error() {
    for (dtype, bound) in ERRORS {
        let values = weights(1, 256 * 64);
        let error = relative_error(&values, &round_trip(dtype, &values));
        assert!(error <= bound, "{}: {error}", dtype.name());
        assert!(error >= bound / 2.0, "{}: {error} is far below its bound", dtype.name());
    }
}

#[test]
fn scale_searches_beat_plain_rounding_between_the_extremes() {
    // Q4_K stores 4.5 bits, Q4_1 five, and yet is better; Q6_K beats the same bits without a search.
    let values = weights(2, 256 * 64);
    let error = |dtype| relative_error(&values, &round_trip(dtype, &values));
    assert!(error(Dtype::Q4K) < error(Dtype::Q4_1));
    assert!(error(Dtype::Q5K) < error(Dtype::Q5_1));
    assert!(error(Dtype::Q6K) < error(Dtype::Q5K) / 1.9);
}

#[test]
fn zeros_stay_zeros_and_constants_stay_near() {
    for dtype in ALL {
        assert!(round_trip(dtype, &[0.0; 512]).iter().all(|&v| v == 0.0), "{}", dtype.name());
        assert!(round_trip(dtype, &[-0.0; 512]).iter().all(|&v| v == 0.0), "{}", dtype.name());
        for constant in [1.0f32, -1.0, 0.3, -0.37, 1000.0] {
            for got in round_trip(dtype, &[constant; 256]) {
                // Half a step of the coarsest scale (8 levels for a sign), less for everything else.
                assert!(
                    (got - constant).abs() <= constant.abs() / 15.0,
                    "{}: {constant} {got}",
                    dtype.name()
                );
            }
        }
        // Zeros beside a block that is not.
        let mut values = vec![0.0; 256];
        values.extend(weights(3, 256));
        assert!(round_trip(dtype, &values)[..256].iter().all(|&v| v == 0.0), "{}", dtype.name());
    }
}

#[test]
fn extreme_values_stay_finite() {
    for dtype in ALL {
        for size in [f32::MIN_POSITIVE, 1e-40, 1e-30, 1e-12, 1e-7, 1e-5, 1e5, 1e12, 1e30, f32::MAX] {
            if matches!(dtype, Dtype::F16) && size > 6e4 {
                continue;
            }
            let values: Vec<f32> = noise(4, 512).iter().map(|v| v * size).collect();
            let got = round_trip(dtype, &values);
            assert!(
                dtype == Dtype::BF16 || got.iter().all(|v| v.is_finite()),
                "{} at {size}: {:?}",
                dtype.name(),
                got.iter().find(|v| !v.is_finite())
            );
            // A value never changes its sign, and never grows by more than a step.
            for (&w, &g) in values.iter().zip(&got) {
                assert!(g.abs() <= 1.2 * size.max(1e-6), "{} at {size}: {w} became {g}", dtype.name());
            }
        }
    }
}

#[test]
fn saturated_scales_still_give_the_largest_values() {
    // 1e7 needs a scale beyond f16 for types with few codes: they must clip, not overflow.
    for dtype in [Dtype::Q8_0, Dtype::Q4_0, Dtype::Q5_0, Dtype::Q6K] {
        let mut values = vec![1e9f32; 256];
        values[3] = -1e9;
        let got = round_trip(dtype, &values);
        assert!(got[0] > 4e5 && got[3] < -4e5, "{}: {} {}", dtype.name(), got[0], got[3]);
    }
}

#[test]
fn one_outlier_keeps_its_value() {
    for (dtype, _) in ERRORS {
        let mut values = weights(5, 256);
        values[77] = -3.0;
        let got = round_trip(dtype, &values)[77];
        assert!((got + 3.0).abs() < 0.06, "{}: {got}", dtype.name());
    }
}

#[test]
fn every_f16_widens_exactly() {
    for bits in 0..=u16::MAX {
        let want = half::f16::from_bits(bits).to_f32();
        let got = half_to_f32(bits);
        assert!(
            got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan(),
            "{bits:#06x}: {got} {want}"
        );
    }
}

#[test]
fn row_lengths_choose_a_type_that_fits() {
    for dtype in ALL {
        for cols in [1, 32, 100, 256, 576] {
            assert!(cols % dtype.for_row_length(cols).block().0 == 0);
        }
        assert_eq!(dtype.for_row_length(512), dtype);
    }
}

#[test]
fn partial_blocks_are_refused() {
    for dtype in ALL.into_iter().filter(|dtype| !dtype.is_plain()) {
        let (block, bytes) = dtype.block();
        for (values, bytes) in [(block - 1, bytes), (block, bytes - 1), (block + 1, 2 * bytes), (1, 0)] {
            let refused =
                std::panic::catch_unwind(|| quantize(dtype, &vec![0.0; values], &mut vec![0; bytes]));
            assert!(refused.is_err(), "{} {values} {bytes}", dtype.name());
            let refused =
                std::panic::catch_unwind(|| dequantize(dtype, &vec![0; bytes], &mut vec![0.0; values]));
            assert!(refused.is_err(), "{} {values} {bytes}", dtype.name());
        }
        quantize(dtype, &[], &mut []);
        dequantize(dtype, &[], &mut []);
    }
}
