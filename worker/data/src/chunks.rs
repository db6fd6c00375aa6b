//! A file's bytes in chunks that end where a row ends.

use crate::DataError;
use crate::text::{not_text, unreadable};
use std::io::{self, Read};
use std::path::Path;

/// The least bytes of a chunk, where there are so many.
pub(crate) const CHUNK: usize = 1 << 20;

/// The most: a row that is longer is none.
const CHUNK_MAX: usize = 512 << 20;

/// Where rows end.
pub(crate) trait Ends {
    /// Behind the last end of a row in bytes that follow those that were given before.
    fn last(&mut self, bytes: &[u8]) -> Option<usize>;
}

/// Rows that are lines.
pub(crate) struct Lines;

impl Ends for Lines {
    fn last(&mut self, bytes: &[u8]) -> Option<usize> {
        Some(bytes.iter().rposition(|byte| *byte == b'\n')? + 1)
    }
}

/// Text whose chunks may end anywhere between two characters.
pub(crate) struct Characters;

impl Ends for Characters {
    fn last(&mut self, bytes: &[u8]) -> Option<usize> {
        let is_begin = |byte: &u8| *byte & 0xc0 != 0x80;
        bytes.iter().rposition(is_begin).filter(|at| *at > 0)
    }
}

pub(crate) struct Chunks<'r, E> {
    path: &'r Path,
    bytes: Box<dyn Read + 'r>,
    ends: E,
    /// Read, and not given yet; in it no row ends.
    rest: Vec<u8>,
    offset: usize,
}

impl<'r, E: Ends> Chunks<'r, E> {
    pub fn new(path: &'r Path, bytes: Box<dyn Read + 'r>, ends: E) -> Chunks<'r, E> {
        Chunks { path, bytes, ends, rest: Vec::new(), offset: 0 }
    }

    /// The next chunk and where it begins in the file.
    pub fn next(&mut self) -> Result<Option<(usize, Vec<u8>)>, DataError> {
        let mut chunk = std::mem::take(&mut self.rest);
        let mut end = None;
        loop {
            let seen = chunk.len();
            let read = (&mut self.bytes).take(CHUNK as u64).read_to_end(&mut chunk);
            if read.map_err(|e| unreadable(self.path, e))? == 0 {
                break;
            }
            end = self.ends.last(&chunk[seen..]).map(|at| seen + at).or(end);
            if let Some(end) = end.filter(|_| chunk.len() >= CHUNK) {
                self.rest = chunk.split_off(end);
                break;
            }
            if chunk.len() > CHUNK_MAX {
                let what =
                    format!("behind byte {} follows a row of more than {CHUNK_MAX} bytes", self.offset);
                return Err(not_text(self.path, what + "; is a quote never closed, or a line end missing?"));
            }
        }
        let offset = self.offset;
        self.offset += chunk.len();
        Ok((!chunk.is_empty()).then_some((offset, chunk)))
    }

    /// All that has not been given yet, if that can be held; `what` says why it must be, and what to do instead.
    pub fn all(&mut self, what: &'static str) -> Result<Vec<u8>, DataError> {
        let rest = io::Cursor::new(std::mem::take(&mut self.rest));
        held(self.path, rest.chain(&mut self.bytes), HELD_MAX, what)
    }
}

/// What is held as a whole has at most so many bytes.
pub(crate) const HELD_MAX: usize = 1 << 30;

/// All of `bytes`, of which there are at most `most`, else `what` is wrong.
pub(crate) fn held(
    path: &Path,
    bytes: impl Read,
    most: usize,
    what: &'static str,
) -> Result<Vec<u8>, DataError> {
    let mut all = Vec::new();
    bytes.take(most as u64 + 1).read_to_end(&mut all).map_err(|e| unreadable(path, e))?;
    match all.len() <= most {
        true => Ok(all),
        false => Err(DataError::TooLarge { path: path.to_owned(), most, what }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_too_large_to_hold_is_refused_with_what_to_do() {
        assert_eq!(held(Path::new("a"), &b"abc"[..], 3, "").unwrap(), b"abc");
        let error =
            held(Path::new("a"), &b"abcd"[..], 3, "it is UTF-16; convert it").unwrap_err().to_string();
        assert!(error.contains("more than 3 bytes, and it is UTF-16; convert it"), "{error}");
    }

    #[test]
    fn chunks_end_with_rows_and_are_all_of_the_file() {
        let text: String = (0..400_000).map(|i| format!("{i}\u{e4}\n")).collect();
        fn check(ends: impl Ends, text: &str, at_line: bool) {
            let mut chunks = Chunks::new(Path::new("a"), Box::new(text.as_bytes()), ends);
            let mut all = Vec::new();
            while let Some((offset, chunk)) = chunks.next().unwrap() {
                assert_eq!(offset, all.len());
                let part = String::from_utf8(chunk).unwrap();
                assert!(!at_line || part.ends_with('\n'));
                assert!(part.len() <= 2 * CHUNK);
                all.extend(part.into_bytes());
            }
            assert!(all == text.as_bytes());
        }
        check(Lines, &text, true);
        check(Characters, &text, false);
        let long = "x".repeat(3 * CHUNK);
        let mut chunks = Chunks::new(Path::new("a"), Box::new(long.as_bytes()), Lines);
        assert_eq!(chunks.next().unwrap().unwrap().1.len(), long.len(), "a row is never cut");
    }
}
