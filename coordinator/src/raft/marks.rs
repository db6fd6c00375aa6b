//! What replicas have shown of their disks, as the others remember it: so that a disk which was put back to an older state is found by
//! any of them, also when the leader has changed and every process was started anew.
//!
//! A mark is a promise that can never be taken back: the term in which a replica spoke, and an entry that it acknowledged and that is
//! committed. A replica whose disk has less has forgotten.

use super::log::Position;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// What one replica has shown to be on its disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mark {
    /// It spoke in this term.
    pub term: u64,
    /// It acknowledged this entry, which is committed; index 0 when none is known.
    pub at: Position,
}

/// The marks of all replicas that take part, by id. Each only rises.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Marks {
    of: BTreeMap<u64, Mark>,
}

impl Marks {
    /// Returns whether that was news.
    pub fn raise(&mut self, id: u64, mark: Mark) -> bool {
        let known = self.of.entry(id).or_default();
        let before = *known;
        known.term = known.term.max(mark.term);
        if mark.at.index > known.at.index {
            known.at = mark.at;
        }
        *known != before
    }

    pub fn of(&self, id: u64) -> Mark {
        self.of.get(&id).copied().unwrap_or_default()
    }

    pub fn iter(&self) -> impl Iterator<Item = (u64, Mark)> {
        self.of.iter().map(|(id, mark)| (*id, *mark))
    }

    /// Those who do not take part any more show nothing that anybody asks for.
    pub fn keep_only(&mut self, takes_part: impl Fn(u64) -> bool) {
        self.of.retain(|id, _| takes_part(*id));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mark(term: u64, index: u64) -> Mark {
        Mark { term, at: Position { index, term } }
    }

    #[test]
    fn a_mark_only_rises_and_in_each_part_by_itself() {
        let mut marks = Marks::default();
        assert!(marks.raise(1, mark(3, 10)));
        assert!(!marks.raise(1, mark(2, 9)));
        assert!(marks.raise(1, Mark { term: 7, at: Position::default() }));
        assert_eq!(marks.of(1), Mark { term: 7, at: Position { index: 10, term: 3 } });
        assert!(marks.raise(1, mark(4, 11)));
        assert_eq!(marks.of(1), Mark { term: 7, at: Position { index: 11, term: 4 } });
        marks.keep_only(|id| id != 1);
        assert_eq!(marks.of(1), Mark::default());
    }
}
