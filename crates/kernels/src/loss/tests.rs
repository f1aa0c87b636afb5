use super::*;
use crate::naive::loss as naive;
use crate::testing::{assert_close, assert_gradient, execs, noise, numeric_gradient, to_f64};

/// f32 rounding of logits of magnitude ~10 passing through one exponential.
const TOLERANCE: f64 = 3e-6;

#[test]
fn cross_entropy_agrees_with_naive() {
    for exec in execs() {
        for (rows, vocab) in [(0, 5), (1, 1), (3, 63), (2, 64), (5, 65), (3, 1025), (2, 49152)] {
            for (scale, shift) in [(1.0, 0.0), (10.0, 0.0), (3.0, 1e4), (3.0, -1e4)] {
                let logits: Vec<f32> = noise(1, rows * vocab).iter().map(|x| x * scale + shift).collect();
                let targets: Vec<u32> =
                    (0..rows).map(|r| if r == 1 { IGNORED } else { (r * 7919 % vocab) as u32 }).collect();
                let weight = 0.25;
                let (mut nll, mut dlogits) = (vec![f32::NAN; rows], vec![f32::NAN; rows * vocab]);
                cross_entropy(&exec, &logits, vocab, &targets, weight, &mut nll, Some(&mut dlogits));
                for r in 0..rows {
                    let (mut want, mut grad) = (0.0, vec![0.0; vocab]);
                    if targets[r] != IGNORED {
                        (want, grad) =
                            naive::cross_entropy(&to_f64(&logits[r * vocab..][..vocab]), targets[r] as usize);
                        grad.iter_mut().for_each(|g| *g *= f64::from(weight));
                    }
                    assert_close("nll", &nll[r..=r], &[want], TOLERANCE);
                    assert_close("dlogits", &dlogits[r * vocab..][..vocab], &grad, TOLERANCE);
                }
                let mut only = vec![f32::NAN; rows];
                cross_entropy(&exec, &logits, vocab, &targets, weight, &mut only, None);
                assert_eq!(only, nll);
                let (mut overwritten, mut own) = (logits, vec![f32::NAN; rows]);
                cross_entropy_in_place(&exec, &mut overwritten, vocab, &targets, weight, &mut own);
                assert!(overwritten == dlogits && own == nll);
            }
        }
    }
}

#[test]
fn kl_agrees_with_naive() {
    for exec in execs() {
        for (rows, vocab) in [(0, 5), (1, 1), (3, 63), (2, 64), (5, 65), (2, 5000)] {
            // Far apart, close together, and shifted by a constant.
            for (own, shift) in [(4.0, 0.0), (0.01, 0.0), (1.0, 1e4)] {
                let teacher: Vec<f32> = noise(1, rows * vocab).iter().map(|x| 6.0 * x).collect();
                let student: Vec<f32> =
                    noise(2, rows * vocab).iter().zip(&teacher).map(|(x, t)| t + own * x + shift).collect();
                let weight = 0.5;
                let (mut kl, mut dlogits) = (vec![f32::NAN; rows], vec![1.0; rows * vocab]);
                let added = Some((dlogits.as_mut_slice(), Store::Accumulate));
                kl_divergence(&exec, &teacher, &student, vocab, weight, &mut kl, added);
                let mut written = vec![f32::NAN; rows * vocab];
                let alone = Some((written.as_mut_slice(), Store::Overwrite));
                kl_divergence(&exec, &teacher, &student, vocab, weight, &mut kl, alone);
                assert!(written.iter().zip(&dlogits).all(|(alone, added)| 1.0 + alone == *added));
                for r in 0..rows {
                    let (t, s) =
                        (to_f64(&teacher[r * vocab..][..vocab]), to_f64(&student[r * vocab..][..vocab]));
                    let (want, grad) = naive::kl_divergence(&t, &s);
                    let grad: Vec<f64> = grad.iter().map(|g| 1.0 + f64::from(weight) * g).collect();
                    assert_close("kl", &kl[r..=r], &[want], TOLERANCE);
                    assert_close("dlogits", &dlogits[r * vocab..][..vocab], &grad, TOLERANCE);
                }
            }
        }
    }
}

#[test]
fn masked_logits_and_equal_rows_are_fine() {
    for exec in execs() {
        let teacher = [1.0, f32::NEG_INFINITY, 2.0, f32::NEG_INFINITY];
        let (mut kl, mut grad) = (vec![f32::NAN; 1], vec![0.0; 4]);
        kl_divergence(&exec, &teacher, &teacher, 4, 1.0, &mut kl, Some((&mut grad, Store::Accumulate)));
        assert_eq!(kl, [0.0]);
        assert_eq!(grad, [0.0; 4]);
        kl_divergence(&exec, &teacher, &[1.0, 1.0, 2.0, f32::NEG_INFINITY], 4, 1.0, &mut kl, None);
        assert!(kl[0].is_finite() && kl[0] > 0.0);
        let x = noise(1, 4);
        cross_entropy(&exec, &x, 4, &[IGNORED], 1.0, &mut kl, Some(&mut grad));
        assert_eq!((kl[0], &grad[..]), (0.0, &[0.0; 4][..]));
    }
}

#[test]
fn naive_gradients_agree_with_finite_differences() {
    let (x, teacher) = (to_f64(&noise(1, 7)), to_f64(&noise(2, 7)));
    let (_, grad) = naive::cross_entropy(&x, 3);
    assert_gradient("cross entropy", &grad, &numeric_gradient(&x, |x| naive::cross_entropy(x, 3).0));
    let (_, grad) = naive::kl_divergence(&teacher, &x);
    assert_gradient("kl", &grad, &numeric_gradient(&x, |x| naive::kl_divergence(&teacher, x).0));
}

#[test]
#[should_panic(expected = "target 9 is not below")]
fn targets_outside_the_vocabulary_are_refused() {
    cross_entropy(&Exec::new(1).unwrap(), &[0.0; 4], 4, &[9], 1.0, &mut [0.0], None);
}
