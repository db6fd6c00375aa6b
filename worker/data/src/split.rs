//! Which documents are held out. A function of the documents' contents alone: runs with other seeds are compared on the same text.

use crate::DataError;
use sha2::{Digest, Sha256};

/// A generous guess of bytes per token, so that the held-out part fills at least one window.
const BYTES_PER_TOKEN: u64 = 6;

/// A document, as far as it matters here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Record {
    /// Of its text.
    pub hash: u64,
    pub bytes: u64,
}

impl Record {
    pub fn of(text: &str) -> Record {
        let digest = Sha256::digest(text);
        let mut first = [0; 8];
        first.copy_from_slice(&digest[..8]);
        Record { hash: u64::from_be_bytes(first), bytes: text.len() as u64 }
    }
}

/// Gives every document and its number, in the order of the data.
pub(crate) type Each<'a> = &'a dyn Fn(&mut dyn FnMut(usize, Record)) -> Result<(), DataError>;

/// Numbers of the documents that are held out, in the order of their hashes, so that the first of them are a fair sample: about `fraction` of
/// the text, by whole documents in that order; at least enough for one window of `max_seq_len` tokens, never more than about half.
/// Documents much larger than the share stay in training.
pub(crate) fn held_out(each: Each, fraction: f64, max_seq_len: u32) -> Result<Vec<usize>, DataError> {
    if fraction <= 0.0 {
        return Ok(Vec::new());
    }
    let mut total = 0;
    each(&mut |_, record| total += record.bytes)?;
    let window = u64::from(max_seq_len) * BYTES_PER_TOKEN;
    let target = ((total as f64 * fraction) as u64).max(window).min(total / 2);
    // No more than the lowest hashes are held in memory, twice as many where those are not enough.
    let mut share = (target as f64 / total.max(1) as f64 * 1.2).max(1e-4);
    loop {
        let most = if share < 1.0 { (share * u64::MAX as f64) as u64 } else { u64::MAX };
        let mut lowest = Vec::new();
        each(&mut |number, record| {
            if record.hash <= most {
                lowest.push((record.hash, number, record.bytes));
            }
        })?;
        lowest.sort_unstable();
        let (mut held_out, mut taken) = (Vec::new(), 0);
        for (_, number, bytes) in lowest {
            if taken < target && taken + bytes <= 2 * target {
                taken += bytes;
                held_out.push(number);
            }
        }
        if taken >= target || most == u64::MAX {
            return Ok(held_out);
        }
        share *= 2.0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn split(documents: &[String], fraction: f64, max_seq_len: u32) -> Vec<usize> {
        let records: Vec<Record> = documents.iter().map(|text| Record::of(text)).collect();
        let each = |take: &mut dyn FnMut(usize, Record)| {
            records.iter().enumerate().for_each(|(number, record)| take(number, *record));
            Ok(())
        };
        held_out(&each, fraction, max_seq_len).unwrap()
    }

    /// The same with everything in memory.
    fn plain(documents: &[String], fraction: f64, max_seq_len: u32) -> Vec<usize> {
        let total: u64 = documents.iter().map(|d| d.len() as u64).sum();
        let window = u64::from(max_seq_len) * BYTES_PER_TOKEN;
        let target = ((total as f64 * fraction) as u64).max(window).min(total / 2);
        let mut by_hash: Vec<(u64, usize)> =
            documents.iter().enumerate().map(|(i, d)| (Record::of(d).hash, i)).collect();
        by_hash.sort_unstable();
        let (mut validation, mut taken) = (Vec::new(), 0);
        for (_, i) in by_hash {
            let bytes = documents[i].len() as u64;
            if taken < target && taken + bytes <= 2 * target {
                taken += bytes;
                validation.push(i);
            }
        }
        validation
    }

    proptest! {
        #[test]
        fn what_is_held_in_memory_changes_nothing(sizes in proptest::collection::vec(1usize..5000, 1..80), fraction in 0.0001f64..1.0) {
            let documents: Vec<String> = sizes.iter().enumerate().map(|(i, &n)| format!("{i}").repeat(n)).collect();
            prop_assert_eq!(split(&documents, fraction, 64), plain(&documents, fraction, 64));
        }
    }

    #[test]
    fn about_the_share_is_held_out_and_the_same_every_time() {
        let documents: Vec<String> = (0..500).map(|i| format!("document {i} ").repeat(20)).collect();
        let first = split(&documents, 0.1, 16);
        assert!((45..=56).contains(&first.len()), "{} of 500", first.len());
        assert_eq!(first, split(&documents, 0.1, 16));
        assert!(split(&documents, 0.0, 16).is_empty());
    }

    #[test]
    fn one_huge_document_stays_in_training() {
        let mut documents: Vec<String> = (0..30).map(|i| format!("{i:02}").repeat(50)).collect();
        documents.push("x".repeat(100_000));
        let held_out = split(&documents, 0.02, 16);
        assert!(!held_out.contains(&30) && !held_out.is_empty());
    }
}
