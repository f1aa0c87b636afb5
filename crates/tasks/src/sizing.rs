//! How much text fits a number of tokens.

use crate::error::Result;

/// Interpolation steps before the search halves instead: texts are nearly linear in their size, but need not be.
const INTERPOLATIONS: usize = 6;

/// The largest size below `limit` whose text has at most `room` tokens; `None` when not even size 0 has. `tokens` gives the tokens of a
/// size and should grow with it; where it does not, the size found still fits and the next larger one does not.
///
/// # Errors
/// Those of `tokens`.
pub fn largest_fitting(
    room: usize,
    limit: usize,
    mut tokens: impl FnMut(usize) -> Result<usize>,
) -> Result<Option<usize>> {
    let mut low = (0, tokens(0)?);
    if low.1 > room {
        return Ok(None);
    }
    // The smallest size known not to fit, with its tokens where they were counted.
    let mut high: (usize, Option<usize>) = (limit.max(1), None);
    let mut step = 4;
    for turn in 0.. {
        if low.0 + 1 >= high.0 {
            break;
        }
        let guess = match high.1 {
            None => low.0 + step,
            Some(of_high) if turn < 2 * INTERPOLATIONS => {
                let share = (room - low.1) as f64 / of_high.saturating_sub(low.1).max(1) as f64;
                low.0 + (share * (high.0 - low.0) as f64) as usize
            }
            Some(_) => low.0.midpoint(high.0),
        };
        let size = guess.clamp(low.0 + 1, high.0 - 1);
        let found = tokens(size)?;
        if found > room {
            high = (size, Some(found));
        } else {
            // Up to where the slope so far points, at most eight times as far.
            let slope = found.saturating_sub(low.1).max(1) as f64 / (size - low.0) as f64;
            step = (((room - found) as f64 / slope) as usize + 1).clamp(1, 8 * size);
            low = (size, found);
        }
    }
    Ok(Some(low.0))
}

/// `document` with the last tokens of `filler`, repeated as needed, before it, so that there are `len`: text that begins somewhere inside, as
/// windows of longer texts do.
///
/// # Panics
/// When the document is longer, or there is no filler to fill with.
pub fn fill_front(document: Vec<u32>, filler: &[u32], len: usize) -> Vec<u32> {
    assert!(document.len() <= len, "{} tokens in a document of {len}", document.len());
    let missing = len - document.len();
    assert!(missing == 0 || !filler.is_empty(), "no filler for {missing} tokens");
    let mut tokens: Vec<u32> = filler.iter().rev().cycle().take(missing).copied().collect();
    tokens.reverse();
    tokens.extend(document);
    tokens
}

#[cfg(test)]
mod tests {
    use super::{fill_front, largest_fitting};
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn it_is_the_one_that_counting_up_finds(
            grows in prop::collection::vec(0..40_usize, 1..300),
            start in 0..50_usize,
            room in 0..4000_usize,
            limit in 1..300_usize,
        ) {
            let tokens = |n: usize| start + grows.iter().take(n).sum::<usize>();
            let naive = (0..limit).take_while(|&n| tokens(n) <= room).last();
            let found = largest_fitting(room, limit, |n| Ok(tokens(n))).unwrap();
            prop_assert_eq!(found, naive);
        }

        #[test]
        fn texts_that_are_not_monotone_still_fit(
            sizes in prop::collection::vec(0..100_usize, 2..100),
            room in 0..100_usize,
        ) {
            if let Some(n) = largest_fitting(room, sizes.len(), |n| Ok(sizes[n])).unwrap() {
                prop_assert!(sizes[n] <= room);
                prop_assert!(n + 1 == sizes.len() || sizes[n + 1] > room);
            } else {
                prop_assert!(sizes[0] > room);
            }
        }
    }

    #[test]
    fn a_linear_text_takes_few_looks() {
        for room in [100, 1_000, 10_000, 100_000] {
            let mut looks = 0;
            let found = largest_fitting(room, room, |n| {
                looks += 1;
                Ok(57 + 21 * n)
            });
            assert_eq!(found.unwrap(), Some((room - 57) / 21));
            assert!(looks <= 8, "{looks} looks for {room}");
        }
    }

    #[test]
    fn the_front_is_filled_from_its_end() {
        assert_eq!(fill_front(vec![7, 8], &[1, 2, 3], 2), [7, 8]);
        assert_eq!(fill_front(vec![7, 8], &[1, 2, 3], 4), [2, 3, 7, 8]);
        assert_eq!(fill_front(vec![7, 8], &[1, 2, 3], 6), [3, 1, 2, 3, 7, 8]);
        assert_eq!(fill_front(vec![7], &[], 1), [7]);
    }
}
