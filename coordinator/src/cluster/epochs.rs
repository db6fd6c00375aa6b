//! Under which of raft's terms each part of the log was written. Two replicas that have committed the same past say the same of every
//! position, so one that is offered a snapshot can tell whether its own past is in it.

use serde::{Deserialize, Serialize};
use std::collections::VecDeque;

/// Elections that are remembered.
pub const EPOCHS_MAX: usize = 1_024;

/// Invariant: indexes and terms rise.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Epochs {
    /// Index of the first entry of a term, and that term.
    since: VecDeque<(u64, u64)>,
}

impl Epochs {
    /// The entry at `index` is of this term. Entries come in their order.
    pub fn note(&mut self, index: u64, term: u64) {
        if self.since.back().is_some_and(|(_, last)| *last == term) {
            return;
        }
        self.since.push_back((index, term));
        if self.since.len() > EPOCHS_MAX {
            self.since.pop_front();
        }
    }

    /// For tests that compare what was decided, over elections.
    #[cfg(test)]
    pub fn forget(&mut self) {
        self.since.clear();
    }

    /// The term of an entry that was noted, or that lies between such; `None` before the first one that is remembered.
    pub fn term_at(&self, index: u64) -> Option<u64> {
        let behind = self.since.partition_point(|(first, _)| *first <= index);
        self.since.get(behind.checked_sub(1)?).map(|(_, term)| *term)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_position_has_the_term_of_the_last_change_before_it() {
        let mut epochs = Epochs::default();
        for (index, term) in [(5, 1), (6, 1), (7, 3), (9, 3), (10, 4)] {
            epochs.note(index, term);
        }
        let terms: Vec<Option<u64>> = [4, 5, 6, 7, 9, 10, 99].map(|index| epochs.term_at(index)).into();
        assert_eq!(terms, [None, Some(1), Some(1), Some(3), Some(3), Some(4), Some(4)]);
    }

    #[test]
    fn the_oldest_are_forgotten() {
        let mut epochs = Epochs::default();
        (1..=EPOCHS_MAX as u64 + 2).for_each(|n| epochs.note(n * 10, n));
        assert_eq!(epochs.term_at(29), None);
        assert_eq!(epochs.term_at(30), Some(3));
    }
}
