//! Noise on embeddings in training (NEFTune, arXiv:2310.05914), which makes answers of instruction-tuned models better: each number of the embeddings of a
//! sequence is moved by a uniform one of at most `alpha / sqrt(l e)`, for `l` tokens of `e` numbers. What it is moved by is a pure function of the
//! sequence and of the place in it, as for dropout. The sequence's own length counts, not that of a batch or a pack.

use crate::dropout::{mix, of_row};

/// In the place of a product's weight: no weight begins there.
const EMBEDDING: usize = usize::MAX;

/// How far a number of an embedding of `width` numbers is moved at most, in a sequence of `length` tokens.
pub fn most(alpha: f32, length: usize, width: usize) -> f32 {
    alpha / ((length * width) as f32).sqrt()
}

/// Of token `token` of a sequence with `noise`.
pub fn seed(noise: u64, token: usize) -> u64 {
    of_row(noise, EMBEDDING, token)
}

/// Moves `row`, the embedding of token `token` of a sequence of `length` tokens with `noise`.
pub fn apply(noise: u64, alpha: f32, (token, length): (usize, usize), row: &mut [f32]) {
    let (most, seed) = (most(alpha, length, row.len()), seed(noise, token));
    for (number, two) in row.chunks_mut(2).enumerate() {
        let bits = mix(seed.wrapping_add((number as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15)));
        for (x, bits) in two.iter_mut().zip([bits as i32, (bits >> 32) as i32]) {
            *x += most * (bits as f32 / (1u64 << 31) as f32);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dropout::of_sequence;

    #[test]
    fn a_sequence_is_moved_as_far_as_it_should() {
        let (length, width, alpha) = (50, 100, 5.0f32);
        let mut rows = vec![0.0f32; length * width];
        for (token, row) in rows.chunks_mut(width).enumerate() {
            apply(of_sequence(1, 2, 3), alpha, (token, length), row);
        }
        let most = alpha / (length as f32 * width as f32).sqrt();
        assert!(rows.iter().all(|x| x.abs() <= most));
        let mean = rows.iter().sum::<f32>() / rows.len() as f32;
        assert!(mean.abs() < 0.03 * most, "{mean}");
        // A uniform number in -1..1 has the variance 1/3.
        let square = rows.iter().map(|x| x * x).sum::<f32>() / rows.len() as f32 / (most * most);
        assert!((square - 1.0 / 3.0).abs() < 0.02, "{square}");
    }

    #[test]
    fn tokens_and_sequences_differ() {
        let row = |noise, token| {
            let mut row = vec![1.0f32; 7];
            apply(noise, 5.0, (token, 9), &mut row);
            row
        };
        assert_eq!(row(1, 0), row(1, 0));
        assert_ne!(row(1, 0), row(1, 1));
        assert_ne!(row(1, 0), row(2, 0));
    }
}
