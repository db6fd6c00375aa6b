//! Which documents are held out. A function of the documents' contents alone: runs with other seeds are compared on the same text.

use sha2::{Digest, Sha256};

/// A generous guess of bytes per token, so that the held-out part fills at least one window.
const BYTES_PER_TOKEN: u64 = 6;

/// Indices of documents.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Split {
    /// In the order of the data.
    pub train: Vec<usize>,
    /// In the order of their hashes, so that the first of them are a fair sample.
    pub validation: Vec<usize>,
}

/// Holds out about `fraction` of the text, by whole documents in the order of their hashes; at least enough for one window of
/// `max_seq_len` tokens, never more than about half. Documents much larger than the share stay in training.
pub(crate) fn split(documents: &[String], fraction: f64, max_seq_len: u32) -> Split {
    if fraction <= 0.0 {
        return Split { train: (0..documents.len()).collect(), validation: Vec::new() };
    }
    let total: u64 = documents.iter().map(|d| d.len() as u64).sum();
    let window = u64::from(max_seq_len) * BYTES_PER_TOKEN;
    let target = ((total as f64 * fraction) as u64).max(window).min(total / 2);

    let mut by_hash: Vec<(u64, usize)> =
        documents.iter().enumerate().map(|(i, d)| (content_hash(d), i)).collect();
    by_hash.sort_unstable();
    let mut held_out = vec![false; documents.len()];
    let mut validation = Vec::new();
    let mut taken = 0;
    for (_, i) in by_hash {
        let bytes = documents[i].len() as u64;
        if taken < target && taken + bytes <= 2 * target {
            taken += bytes;
            held_out[i] = true;
            validation.push(i);
        }
    }
    Split { train: (0..documents.len()).filter(|&i| !held_out[i]).collect(), validation }
}

fn content_hash(text: &str) -> u64 {
    let digest = Sha256::digest(text);
    let mut first = [0; 8];
    first.copy_from_slice(&digest[..8]);
    u64::from_be_bytes(first)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_document_is_on_one_side(sizes in proptest::collection::vec(1usize..5000, 1..80), fraction in 0.0f64..1.0) {
            let documents: Vec<String> = sizes.iter().enumerate().map(|(i, &n)| format!("{i}").repeat(n)).collect();
            let Split { train, validation } = split(&documents, fraction, 64);
            let mut all = [train, validation].concat();
            all.sort_unstable();
            prop_assert!(all.into_iter().eq(0..documents.len()));
        }
    }

    #[test]
    fn about_the_share_is_held_out_and_the_same_every_time() {
        let documents: Vec<String> = (0..500).map(|i| format!("document {i} ").repeat(20)).collect();
        let first = split(&documents, 0.1, 16);
        assert!((45..=56).contains(&first.validation.len()), "{} of 500", first.validation.len());
        assert_eq!(first, split(&documents, 0.1, 16));
        assert!(split(&documents, 0.0, 16).validation.is_empty());
    }

    #[test]
    fn one_huge_document_stays_in_training() {
        let mut documents: Vec<String> = (0..30).map(|i| format!("{i:02}").repeat(50)).collect();
        documents.push("x".repeat(100_000));
        let parts = split(&documents, 0.02, 16);
        assert!(parts.train.contains(&30) && !parts.validation.is_empty());
    }
}
