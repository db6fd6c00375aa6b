//! What happened, line by line: printed when wanted, the last lines kept for a violation, and all of it in one hash, by which two
//! runs are the same or not.

use super::queue::Micros;
use super::random::mix;
use std::collections::VecDeque;
use std::fmt;

/// Lines that are shown with a violation.
const KEPT: usize = 120;

#[derive(Debug)]
pub struct Trace {
    print: bool,
    hash: u64,
    last: VecDeque<String>,
}

impl Trace {
    pub fn new(print: bool) -> Trace {
        Trace { print, hash: 0, last: VecDeque::new() }
    }

    pub fn line(&mut self, now: Micros, text: fmt::Arguments<'_>) {
        let line = format!("{:>12.6} {text}", now as f64 / 1e6);
        for chunk in line.as_bytes().chunks(8) {
            self.count(chunk.iter().fold(0, |n, byte| n << 8 | u64::from(*byte)));
        }
        if self.print {
            println!("{line}");
        }
        if self.last.len() == KEPT {
            self.last.pop_front();
        }
        self.last.push_back(line);
    }

    /// Something too small for a line still counts.
    pub fn count(&mut self, what: u64) {
        self.hash = mix(self.hash ^ what);
    }

    pub fn hash(&self) -> u64 {
        self.hash
    }

    pub fn last(&self) -> Vec<String> {
        self.last.iter().cloned().collect()
    }
}
