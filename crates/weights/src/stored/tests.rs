use super::*;
use half::{bf16, f16};
use kernels::quant::dequantize;
use proptest::prelude::*;

#[test]
fn orders_are_inverse_and_stay_within_heads() {
    for head_dim in [2, 4, 6, 64] {
        let order = RowOrder::Interleaved { head_dim };
        for row in 0..3 * head_dim {
            let stored = order.stored_row(row);
            assert_eq!(stored / head_dim, row / head_dim);
            assert_eq!(order.hugging_face_row(stored), row);
        }
    }
    let four = RowOrder::Interleaved { head_dim: 4 };
    assert_eq!([0, 1, 2, 3].map(|row| four.stored_row(row)), [0, 2, 1, 3]);
    assert_eq!(RowOrder::HuggingFace.stored_row(5), RowOrder::HuggingFace.hugging_face_row(5));
}

#[test]
fn rows_and_vectors_have_shapes() {
    let bytes: Vec<u8> = (0..48).collect();
    let matrix = StoredTensor::new(Dtype::F16, &[4, 6], &bytes, RowOrder::Interleaved { head_dim: 4 });
    assert_eq!((matrix.rows, matrix.cols, matrix.row_bytes()), (4, 6, 12));
    assert_eq!(matrix.row_ids(), [0, 2, 1, 3]);
    assert_eq!(matrix.row(1), &bytes[24..36]);
    let vector = StoredTensor::new(Dtype::F32, &[12], &bytes, RowOrder::HuggingFace);
    assert_eq!((vector.rows, vector.cols, vector.row_ids()), (1, 12, vec![0]));
    let scalar = StoredTensor::new(Dtype::F32, &[], &bytes[..4], RowOrder::HuggingFace);
    assert_eq!((scalar.rows, scalar.cols), (1, 1));
    let empty = StoredTensor::new(Dtype::Q8_0, &[0, 32], &[], RowOrder::HuggingFace);
    assert_eq!((empty.rows, empty.row_ids().len()), (0, 0));
    empty.check_finite("empty").unwrap();
}

#[test]
fn plain_values_that_are_not_finite_are_found_wherever_they_are() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for (len, at) in [(1, 0), (4097, 4096), (9000, 5000)] {
            let mut values = vec![1.5f32; len];
            values[at] = bad;
            let bytes = [
                (Dtype::F32, values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>()),
                (Dtype::F16, values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect()),
                (Dtype::BF16, values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect()),
            ];
            for (dtype, bytes) in bytes {
                let error = StoredTensor::new(dtype, &[len], &bytes, RowOrder::HuggingFace)
                    .check_finite("x")
                    .unwrap_err();
                assert!(
                    matches!(&error, WeightsError::NonFinite { name, index } if name == "x" && *index == at),
                    "{error}"
                );
            }
        }
    }
    let largest: Vec<u8> = f16::MAX.to_le_bytes().repeat(9);
    StoredTensor::new(Dtype::F16, &[9], &largest, RowOrder::HuggingFace).check_finite("x").unwrap();
}

proptest! {
    /// For random bytes the scan of the scales says what looking at every dequantised value says.
    #[test]
    fn scales_decide(which in 0usize..11, seed in any::<u64>(), hot in any::<bool>()) {
        use rand::{Rng, SeedableRng};
        let dtype = Dtype::ALL[which];
        let (block, block_bytes) = dtype.block();
        let blocks = 3;
        let mut rng = rand::rngs::StdRng::seed_from_u64(seed);
        let mut bytes: Vec<u8> = (0..blocks * block_bytes).map(|_| rng.random()).collect();
        for &at in scale_offsets(dtype) {
            // Infinity or NaN in one scale of one block, or nowhere.
            for b in 0..blocks {
                bytes[b * block_bytes + at + 1] &= 0x7B;
            }
            if hot && rng.random() {
                bytes[rng.random_range(0..blocks) * block_bytes + at + 1] |= 0x7C;
            }
        }
        let mut values = vec![0.0; blocks * block];
        dequantize(dtype, &bytes, &mut values);
        let stored = StoredTensor::new(dtype, &[values.len()], &bytes, RowOrder::HuggingFace);
        let finite_block = |b: usize| values[b * block..(b + 1) * block].iter().all(|v| v.is_finite());
        match stored.check_finite("x") {
            Ok(()) => prop_assert!((0..blocks).all(finite_block)),
            Err(WeightsError::NonFinite { index, .. }) => {
                prop_assert_eq!(index % block, 0);
                // 0 × infinity is NaN, so a bad scale shows in every value but those of a zero K sub-scale of a minimum.
                prop_assert!((0..index / block).all(finite_block));
            }
            Err(other) => prop_assert!(false, "{}", other),
        }
    }
}
