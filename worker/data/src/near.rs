//! Documents that are nearly the same: MinHash with banding (Broder 1997; Leskovec, Rajaraman and Ullman, "Mining of Massive Datasets",
//! chapter 3). The similarity of two texts is that of Jaccard of their sets of shingles: five words in a row each, without regard to case and
//! punctuation. It is estimated by the share of equal numbers in two signatures, with a standard error of at most 0.044.
//!
//! Signatures lie on disk; in memory are some bytes per document, and the hashes of one band at a time.

use crate::DataError;
use fleet_common::mapped::Mapped;
use rayon::prelude::*;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

/// Words of a shingle.
const SHINGLE: usize = 5;

/// Numbers of a signature.
const NUMBERS: usize = 128;

const BYTES: usize = NUMBERS * 4;

/// Documents whose hashes are in memory at once.
const AT_ONCE: usize = 4 << 20;

/// Of each permutation of the shingles the least one.
pub(crate) type Signature = [u32; NUMBERS];

pub(crate) fn signature(text: &str) -> Signature {
    let words: Vec<u64> =
        text.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty()).map(hash_of).collect();
    let mut least = [u32::MAX; NUMBERS];
    let mut take = |shingle: &[u64]| {
        let hash = mixed(shingle.iter().fold(0, |hash: u64, word| mixed(hash ^ word)));
        for (least, (factor, term)) in least.iter_mut().zip(&PERMUTATIONS) {
            *least = (*least).min((factor.wrapping_mul(hash).wrapping_add(*term) >> 32) as u32);
        }
    };
    match words.len() {
        0 => take(&[hash_of(text)]),
        1..SHINGLE => take(&words),
        _ => words.windows(SHINGLE).for_each(take),
    }
    least
}

/// Of a word in small letters: FNV-1a.
fn hash_of(word: &str) -> u64 {
    let add = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
    let small = word.chars().flat_map(char::to_lowercase);
    let mut bytes = [0; 4];
    small.fold(0xcbf2_9ce4_8422_2325, |hash, c| c.encode_utf8(&mut bytes).bytes().fold(hash, add))
}

/// The finish of SplitMix64.
const fn mixed(hash: u64) -> u64 {
    let hash = hash.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let hash = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let hash = (hash ^ (hash >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    hash ^ (hash >> 31)
}

/// Factors, which are odd, and terms.
static PERMUTATIONS: [(u64, u64); NUMBERS] = {
    let mut all = [(0, 0); NUMBERS];
    let mut at = 0;
    while at < NUMBERS {
        all[at] = (mixed(2 * at as u64) | 1, mixed(2 * at as u64 + 1));
        at += 1;
    }
    all
};

/// Rows of a band: as many as leave 95 of 100 pairs that are just similar enough with a band in common.
fn rows(similar: f64) -> usize {
    let found = |rows: usize| 1.0 - (1.0 - similar.powi(rows as i32)).powi((NUMBERS / rows) as i32);
    (1..=NUMBERS).rev().find(|rows| found(*rows) >= 0.95).unwrap_or(1)
}

/// Of so many signatures on the disk.
pub(crate) fn bytes(count: usize) -> u64 {
    (count * BYTES) as u64
}

/// The signatures of documents, in their order, in a file that goes with this.
pub(crate) struct Signatures {
    path: PathBuf,
    file: BufWriter<File>,
}

impl Signatures {
    pub fn create(path: &Path) -> Result<Signatures, DataError> {
        Signatures::with(path, 0)
    }

    /// With the first `count` of those that are there.
    pub fn with(path: &Path, count: usize) -> Result<Signatures, DataError> {
        let opened = File::options().create(true).append(true).open(path).and_then(|file| {
            file.set_len(bytes(count))?;
            Ok(file)
        });
        let file = opened.map_err(|source| failed(path, source))?;
        Ok(Signatures { path: path.to_owned(), file: BufWriter::new(file) })
    }

    /// All are on the disk then.
    pub fn sync(&mut self) -> Result<(), DataError> {
        let synced = self.file.flush().and_then(|()| self.file.get_ref().sync_all());
        synced.map_err(|source| failed(&self.path, source))
    }

    pub fn add(&mut self, signatures: &[Signature]) -> Result<(), DataError> {
        let mut numbers = signatures.iter().flatten();
        let written = numbers.try_for_each(|number| self.file.write_all(&number.to_le_bytes()));
        written.map_err(|source| failed(&self.path, source))
    }

    /// Which documents are left out: of those that are at least so similar, also over others between them, all but the first.
    pub fn duplicates(self, similar: f64) -> Result<Vec<bool>, DataError> {
        let Signatures { path, mut file } = self;
        file.flush().map_err(|source| failed(&path, source))?;
        let all = Mapped::open(&path).map_err(|source| failed(&path, source))?;
        let found = duplicates(&all, similar, AT_ONCE);
        fs::remove_file(&path).map_err(|source| failed(&path, source))?;
        Ok(found)
    }
}

fn failed(path: &Path, source: std::io::Error) -> DataError {
    DataError::Write { path: path.to_owned(), source }
}

fn duplicates(all: &[u8], similar: f64, at_once: usize) -> Vec<bool> {
    let count = all.len() / BYTES;
    let signature = |number: u32| &all[number as usize * BYTES..][..BYTES];
    let is_similar = |a: u32, b: u32| {
        let (a, b) = (signature(a).as_chunks::<4>().0, signature(b).as_chunks::<4>().0);
        let same = a.iter().zip(b).filter(|(a, b)| a == b).count();
        same as f64 >= similar * NUMBERS as f64
    };
    let (rows, parts) = (rows(similar), count.div_ceil(at_once).max(1) as u64);
    let mut groups = Groups((0..count as u32).collect());
    for band in 0..NUMBERS / rows {
        for part in 0..parts {
            let hash = |number: u32| {
                let band = &signature(number)[band * rows * 4..][..rows * 4];
                let (words, _) = band.as_chunks::<4>();
                words.iter().fold(0, |hash, word| mixed(hash ^ u64::from(u32::from_le_bytes(*word))))
            };
            let mut hashes: Vec<(u64, u32)> = (0..count as u32)
                .into_par_iter()
                .map(|number| (hash(number), number))
                .filter(|(hash, _)| hash % parts == part)
                .collect();
            hashes.par_sort_unstable();
            for alike in hashes.chunk_by(|a, b| a.0 == b.0) {
                let (first, mut before) = (alike[0].1, alike[0].1);
                for &(_, number) in &alike[1..] {
                    // With the first and the last one before it: a group that all texts of a kind are in is gone through once.
                    for other in [first, before] {
                        if groups.first(other) != groups.first(number) && is_similar(other, number) {
                            groups.join(other, number);
                        }
                    }
                    before = number;
                }
            }
        }
    }
    (0..count as u32).map(|number| groups.first(number) != number).collect()
}

/// Of each document one before it in its group, or itself.
struct Groups(Vec<u32>);

impl Groups {
    fn first(&mut self, number: u32) -> u32 {
        let mut at = number;
        while self.0[at as usize] != at {
            self.0[at as usize] = self.0[self.0[at as usize] as usize];
            at = self.0[at as usize];
        }
        at
    }

    fn join(&mut self, a: u32, b: u32) {
        let (a, b) = (self.first(a), self.first(b));
        self.0[a.max(b) as usize] = a.min(b);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    /// Words that follow from a number.
    fn text(seed: u64, words: usize) -> Vec<String> {
        (0..words as u64).map(|i| format!("w{}", mixed(seed * 1_000_003 + i) % 5000)).collect()
    }

    fn jaccard(a: &[String], b: &[String]) -> f64 {
        let set = |words: &[String]| words.windows(SHINGLE).map(<[String]>::to_vec).collect::<HashSet<_>>();
        let (a, b) = (set(a), set(b));
        a.intersection(&b).count() as f64 / a.union(&b).count() as f64
    }

    fn changed(words: &[String], every: usize) -> Vec<String> {
        let change = |(at, word): (usize, &String)| {
            if at % every == every / 2 { "changed".to_owned() } else { word.clone() }
        };
        words.iter().enumerate().map(change).collect()
    }

    fn found(texts: &[String], similar: f64, at_once: usize) -> Vec<usize> {
        let all: Vec<u8> = texts.iter().flat_map(|text| signature(text)).flat_map(u32::to_le_bytes).collect();
        let dropped = duplicates(&all, similar, at_once);
        (0..texts.len()).filter(|number| dropped[*number]).collect()
    }

    #[test]
    fn signatures_estimate_the_similarity_of_jaccard() {
        for (seed, every) in [(1, 10), (2, 20), (3, 40), (4, 100)] {
            let a = text(seed, 800);
            let b = changed(&a, every);
            let pairs = signature(&a.join(" ")).into_iter().zip(signature(&b.join(" ")));
            let estimate = pairs.filter(|(a, b)| a == b).count() as f64 / NUMBERS as f64;
            let real = jaccard(&a, &b);
            assert!((estimate - real).abs() < 0.13, "{estimate} of {real}"); // three standard errors
        }
        assert_eq!(signature("One, two; THREE four five!"), signature("one two three four five"));
        assert_ne!(signature("a b"), signature("b a"));
        assert_ne!(signature("..."), signature("?"));
    }

    #[test]
    fn all_but_the_first_of_a_group_are_found_and_nothing_else() {
        let mut texts: Vec<String> = (0..300).map(|seed| text(seed, 400).join(" ")).collect();
        let near = |seed, every| changed(&text(seed, 400), every).join(" ");
        assert!(jaccard(&text(7, 400), &changed(&text(7, 400), 200)) > 0.9);
        assert!(jaccard(&text(8, 400), &changed(&text(8, 400), 25)) < 0.75);
        texts.push(near(7, 200));
        texts.push(near(8, 25));
        texts.push(texts[9].to_uppercase());
        texts.push(near(7, 400));
        assert_eq!(found(&texts, 0.85, 1 << 20), [300, 302, 303]);
        assert_eq!(found(&texts, 0.85, 16), [300, 302, 303], "whatever is in memory at once");
        assert_eq!(found(&texts, 1.0, 1 << 20), [302]);
        assert_eq!(found(&[], 0.8, 16), [] as [usize; 0]);
    }

    #[test]
    fn bands_find_what_is_just_similar_enough() {
        assert_eq!([0.5, 0.8, 0.9, 1.0].map(rows), [3, 7, 12, NUMBERS]);
    }
}
