//! What will happen, in the order of time and, at the same time, in the order in which it was planned.

use std::cmp::Ordering;
use std::collections::BinaryHeap;

/// Microseconds since the run began.
pub type Micros = u64;

pub const MS: Micros = 1_000;
pub const SECOND: Micros = 1_000 * MS;
pub const MINUTE: Micros = 60 * SECOND;

#[derive(Debug)]
pub struct Queue<E> {
    planned: BinaryHeap<Planned<E>>,
    next: u64,
    now: Micros,
}

#[derive(Debug)]
struct Planned<E> {
    at: Micros,
    number: u64,
    event: E,
}

impl<E> Default for Queue<E> {
    fn default() -> Self {
        Queue { planned: BinaryHeap::new(), next: 0, now: 0 }
    }
}

impl<E> Queue<E> {
    pub fn now(&self) -> Micros {
        self.now
    }

    /// Never in the past.
    pub fn at(&mut self, at: Micros, event: E) {
        self.planned.push(Planned { at: at.max(self.now), number: self.next, event });
        self.next += 1;
    }

    pub fn after(&mut self, wait: Micros, event: E) {
        self.at(self.now + wait, event);
    }

    /// The next event; time goes on to it.
    pub fn pop(&mut self) -> Option<E> {
        let planned = self.planned.pop()?;
        self.now = planned.at;
        Some(planned.event)
    }
}

impl<E> Ord for Planned<E> {
    /// The heap shows its greatest element first: that is the earliest.
    fn cmp(&self, other: &Self) -> Ordering {
        (other.at, other.number).cmp(&(self.at, self.number))
    }
}

impl<E> PartialOrd for Planned<E> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl<E> PartialEq for Planned<E> {
    fn eq(&self, other: &Self) -> bool {
        self.number == other.number
    }
}

impl<E> Eq for Planned<E> {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_decides_and_then_the_order_of_planning() {
        let mut queue = Queue::default();
        queue.at(5, "c");
        queue.at(3, "a");
        queue.at(3, "b");
        assert_eq!([queue.pop(), queue.pop()], [Some("a"), Some("b")]);
        queue.at(1, "late");
        assert_eq!((queue.pop(), queue.now()), (Some("late"), 3));
        assert_eq!([queue.pop(), queue.pop()], [Some("c"), None]);
    }
}
