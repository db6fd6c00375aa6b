//! Which windows are trained on when and by whom: a pure function of (seed, epoch, step).
//!
//! The global batch of a step does not depend on the number of ranks; each rank computes its part from its position. A checkpoint
//! holds a cursor, not a list: sequences taken of an epoch, from which batches of any size go on.

use crate::DataError;
use crate::permutation::Permutation;
use std::ops::Range;

/// What becomes of the windows at the end of an epoch that are too few for a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rest {
    /// The last step of the epoch takes them, however few they are.
    Taken,
    /// They are left out; in the next epoch these are others.
    LeftOut,
}

/// The order of a run. Steps count from 0 over the whole run: step `s` is the one that makes `s + 1` steps done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Order {
    seed: u64,
    windows: u64,
    global_batch: u64,
    micro_batches: u64,
    rest: Rest,
    /// Steps that were done before batches were of this size, and where they led.
    before: (u64, Cursor),
}

/// Position in the data: `epoch` passes are complete, and of the next one so many optimizer steps, which took its first `windows` ones.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cursor {
    pub epoch: u64,
    pub step: u64,
    pub windows: u64,
}

impl Order {
    /// `windows`: of the training part. `global_batch`: windows of one optimizer step, which is
    /// ranks x `batch_size` x `micro_batches`. Refuses data of which no step can be made.
    ///
    /// # Panics
    /// If `global_batch` or `micro_batches` is 0.
    pub fn new(
        seed: u64,
        windows: u64,
        global_batch: u64,
        micro_batches: u64,
        rest: Rest,
    ) -> Result<Order, DataError> {
        assert!(global_batch > 0 && micro_batches > 0, "a batch holds at least one window");
        let least = if rest == Rest::Taken { 1 } else { global_batch };
        if windows < least {
            return Err(DataError::TooLittle(format!(
                "the training data fills {windows} sequences, and one optimizer step takes {global_batch} (ranks x batch_size x \
                 accumulate_grad_batches); lower one of these, or max_seq_len where text is cut into sequences, or add data"
            )));
        }
        Ok(Order { seed, windows, global_batch, micro_batches, rest, before: (0, Cursor::default()) })
    }

    /// Of a run that goes on at a position to which `steps` steps have led, perhaps of other batches. It knows no step before.
    pub fn from(self, steps: u64, position: Cursor) -> Order {
        Order { before: (steps, position), ..self }
    }

    pub fn windows(&self) -> u64 {
        self.windows
    }

    pub fn global_batch(&self) -> u64 {
        self.global_batch
    }

    /// Steps of one pass.
    pub fn steps_per_epoch(&self) -> u64 {
        self.steps_of(self.windows)
    }

    fn steps_of(&self, windows: u64) -> u64 {
        match self.rest {
            Rest::Taken => windows.div_ceil(self.global_batch),
            Rest::LeftOut => windows / self.global_batch,
        }
    }

    /// What is said where an epoch leaves out a tenth of the data or more, because they fill no batch.
    pub fn leaves_out(&self) -> Option<String> {
        let (rest, windows, batch) = (self.windows % self.global_batch, self.windows, self.global_batch);
        (self.rest == Rest::LeftOut && rest * 10 >= windows).then(|| {
            format!(
                "an epoch learns {} of the {windows} sequences: a step takes {batch} (batch_size x ranks x accumulate_grad_batches), and {rest} fill none; \
                 other ones are left out in each epoch; lower batch_size or accumulate_grad_batches to learn more of them",
                windows - rest
            )
        })
    }

    /// Steps from where batches have this size to the end of that epoch.
    fn first_steps(&self) -> u64 {
        self.steps_of(self.windows.saturating_sub(self.before.1.windows))
    }

    /// Optimizer steps of a run; `max_steps` wins over `epochs`.
    pub fn total_steps(&self, epochs: u32, max_steps: Option<u64>) -> u64 {
        if let Some(steps) = max_steps {
            return steps;
        }
        let ((done, position), epochs) = (self.before, u64::from(epochs));
        let of = |epochs: u64| self.steps_per_epoch().saturating_mul(epochs);
        match epochs.checked_sub(position.epoch + 1) {
            Some(later) => done.saturating_add(self.first_steps()).saturating_add(of(later)),
            None if (epochs, 0) == (position.epoch, position.windows) => done,
            None => of(epochs).min(done.saturating_sub(1)), // it is behind the end
        }
    }

    /// Where the run stands when `step` steps are done.
    ///
    /// # Panics
    /// If the run goes on behind `step`.
    pub fn cursor(&self, step: u64) -> Cursor {
        let (before, position) = self.before;
        let done = step.checked_sub(before).expect("a step of this run");
        match done.checked_sub(self.first_steps()) {
            None => Cursor {
                step: position.step + done,
                windows: position.windows + done * self.global_batch,
                ..position
            },
            Some(later) => {
                let step = later % self.steps_per_epoch();
                let epoch = position.epoch + 1 + later / self.steps_per_epoch();
                Cursor { epoch, step, windows: step * self.global_batch }
            }
        }
    }

    /// Passes over the data when `step` steps are done, of what all steps of an epoch take.
    pub fn epochs_done(&self, step: u64) -> f64 {
        let cursor = self.cursor(step);
        let taken = match cursor.epoch == self.before.1.epoch {
            true => self.before.1.windows + self.first_steps() * self.global_batch,
            false => self.steps_per_epoch() * self.global_batch,
        };
        let taken = taken.min(self.windows);
        (cursor.epoch * taken + cursor.windows) as f64 / taken as f64
    }

    /// Labels of one full step over all ranks: what its loss is divided by. Windows have `max_seq_len` tokens.
    pub fn predictions_per_step(&self, max_seq_len: u32) -> u64 {
        self.global_batch * (u64::from(max_seq_len) - 1)
    }

    /// Indices of the windows of the global batch of `step`.
    pub fn batch(&self, step: u64) -> impl Iterator<Item = u64> + use<> {
        self.positions(step, 0..self.size(step))
    }

    /// Windows of the global batch of `step`.
    fn size(&self, step: u64) -> u64 {
        self.windows.saturating_sub(self.cursor(step).windows).min(self.global_batch)
    }

    /// Indices of the windows that `rank` of `world` takes in micro-batch `micro` of `step`: `global_batch / world / micro_batches`
    /// of them, and of a smaller batch as evenly as it divides, perhaps none. Over all ranks and micro-batches they are exactly `batch(step)`,
    /// in that order.
    ///
    /// # Panics
    /// If the global batch does not divide evenly, or `rank` or `micro` is out of range.
    pub fn rank_part(&self, step: u64, micro: u64, rank: u64, world: u64) -> Vec<u64> {
        let parts = world * self.micro_batches;
        assert!(micro < self.micro_batches && rank < world, "micro-batch {micro} of rank {rank} of {world}");
        assert!(self.global_batch.is_multiple_of(parts), "{} windows for {parts} parts", self.global_batch);
        let (part, size) = (micro * world + rank, self.size(step));
        self.positions(step, size * part / parts..size * (part + 1) / parts).collect()
    }

    /// Windows at these positions of the global batch of `step`.
    fn positions(&self, step: u64, within: Range<u64>) -> impl Iterator<Item = u64> + use<> {
        let Cursor { epoch, windows, .. } = self.cursor(step);
        let permutation = Permutation::new(self.windows, self.seed, epoch);
        within.map(move |i| permutation.at(windows + i))
    }
}

/// The validation windows that `rank` of `world` evaluates: consecutive ones of the first `limit`, as evenly as they divide.
pub fn evaluation_part(windows: u64, limit: Option<u64>, rank: u64, world: u64) -> Range<u64> {
    assert!(rank < world, "rank {rank} of {world}");
    let windows = limit.map_or(windows, |limit| windows.min(limit));
    let (each, rest) = (windows / world, windows % world);
    let first = rank * each + rank.min(rest);
    first..first + each + u64::from(rank < rest)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn rest() -> impl Strategy<Value = Rest> {
        prop_oneof![Just(Rest::Taken), Just(Rest::LeftOut)]
    }

    proptest! {
        #[test]
        fn the_parts_of_all_ranks_are_the_global_batch(
            seed: u64, size in 1u64..5, micros in 1u64..4, world in 1u64..9, spare in 0u64..500, step in 0u64..200, rest in rest()
        ) {
            let batch = size * micros * world;
            let order = Order::new(seed, batch + spare, batch, micros, rest).unwrap();
            let mut parts = Vec::new();
            for micro in 0..micros {
                for rank in 0..world {
                    parts.extend(order.rank_part(step, micro, rank, world));
                }
            }
            prop_assert_eq!(parts, order.batch(step).collect::<Vec<_>>());
        }

        #[test]
        fn an_epoch_whose_rest_is_taken_shows_every_window_once(
            seed: u64, batch in 1u64..20, windows in 1u64..200, epoch in 0u64..5
        ) {
            let order = Order::new(seed, windows, batch, 1, Rest::Taken).unwrap();
            let steps = order.steps_per_epoch();
            prop_assert_eq!(steps, windows.div_ceil(batch));
            let mut seen: Vec<u64> = (epoch * steps..(epoch + 1) * steps).flat_map(|s| order.batch(s)).collect();
            seen.sort_unstable();
            prop_assert!(seen.into_iter().eq(0..windows));
            prop_assert_eq!(order.epochs_done(epoch * steps), epoch as f64);
        }

        #[test]
        fn an_epoch_shows_no_window_twice(seed: u64, batch in 1u64..20, windows in 20u64..400, epoch in 0u64..5) {
            let order = Order::new(seed, windows, batch, 1, Rest::LeftOut).unwrap();
            let steps = order.steps_per_epoch();
            let mut seen: Vec<u64> = (epoch * steps..(epoch + 1) * steps).flat_map(|s| order.batch(s)).collect();
            prop_assert_eq!(seen.len() as u64, steps * batch);
            seen.sort_unstable();
            seen.dedup();
            prop_assert_eq!(seen.len() as u64, steps * batch);
            prop_assert!(seen.iter().all(|&w| w < windows));
        }

        #[test]
        fn a_run_that_goes_on_takes_what_it_would_have_taken(
            seed: u64, batch in 1u64..9, windows in 9u64..100, done in 0u64..60, more in 0u64..30, rest in rest()
        ) {
            let whole = Order::new(seed, windows, batch, 1, rest).unwrap();
            let later = whole.from(done, whole.cursor(done));
            let step = done + more;
            prop_assert!(later.batch(step).eq(whole.batch(step)));
            prop_assert_eq!(later.cursor(step), whole.cursor(step));
            prop_assert_eq!(later.epochs_done(step), whole.epochs_done(step));
            for epochs in 0..20 {
                prop_assert_eq!(later.total_steps(epochs, None), whole.total_steps(epochs, None));
            }
        }

        #[test]
        fn batches_of_other_sizes_go_on_behind_what_was_taken(
            seed: u64, windows in 30u64..200, runs in proptest::collection::vec((1u64..30, 0u64..12), 1..6),
            rest in rest()
        ) {
            let (mut step, mut position, mut seen) = (0, Cursor::default(), std::collections::BTreeMap::new());
            for (batch, steps) in runs {
                let order = Order::new(seed, windows, batch, 1, rest).unwrap().from(step, position);
                for _ in 0..steps {
                    let of_epoch: &mut Vec<u64> = seen.entry(order.cursor(step).epoch).or_default();
                    of_epoch.extend(order.batch(step));
                    step += 1;
                }
                position = order.cursor(step);
                prop_assert_eq!(order.epochs_done(step).floor() as u64, position.epoch);
                let of_epoch = seen.get(&position.epoch).map_or(0, Vec::len) as u64;
                prop_assert_eq!(position.windows, of_epoch);
            }
            for (epoch, mut of_epoch) in seen {
                let whole = Order::new(seed, windows, windows, 1, rest).unwrap();
                let all: Vec<u64> = whole.batch(epoch).take(of_epoch.len()).collect();
                prop_assert!(all == of_epoch, "in the order of the epoch");
                let count = of_epoch.len();
                of_epoch.sort_unstable();
                of_epoch.dedup();
                prop_assert_eq!(count, of_epoch.len());
            }
        }

        #[test]
        fn evaluation_covers_every_window_once(windows in 0u64..300, limit in proptest::option::of(0u64..400), world in 1u64..9) {
            let all: Vec<u64> = (0..world).flat_map(|rank| evaluation_part(windows, limit, rank, world)).collect();
            prop_assert!(all.into_iter().eq(0..windows.min(limit.unwrap_or(u64::MAX))));
        }
    }

    /// Checkpoints hold a cursor into this order: if it moves, resumed runs train on other data than they say.
    #[test]
    fn the_order_never_changes() {
        let order = Order::new(42, 1000, 8, 1, Rest::LeftOut).unwrap();
        assert_eq!(order.batch(0).collect::<Vec<_>>(), GOLDEN_FIRST);
        assert_eq!(order.batch(125).collect::<Vec<_>>(), GOLDEN_SECOND_EPOCH);
    }

    const GOLDEN_FIRST: [u64; 8] = [148, 714, 306, 474, 115, 772, 48, 321];
    const GOLDEN_SECOND_EPOCH: [u64; 8] = [806, 879, 321, 628, 312, 891, 787, 194];

    #[test]
    fn cursor_and_totals() {
        let order = Order::new(1, 103, 10, 2, Rest::LeftOut).unwrap();
        assert_eq!(order.steps_per_epoch(), 10);
        assert_eq!(order.cursor(25), Cursor { epoch: 2, step: 5, windows: 50 });
        assert_eq!(order.total_steps(3, None), 30);
        assert_eq!(order.total_steps(3, Some(7)), 7);
        assert_eq!(order.predictions_per_step(256), 2550);
        assert_eq!(order.leaves_out(), None, "3 of 103 are few");
        let said = Order::new(1, 100, 64, 8, Rest::LeftOut).unwrap().leaves_out().unwrap();
        assert!(said.contains("learns 64 of the 100") && said.contains("36 fill none"), "{said}");
        // After 25 steps 53 windows of the third epoch are left, for two batches of 20.
        let wider = Order::new(1, 103, 20, 1, Rest::LeftOut).unwrap().from(25, order.cursor(25));
        assert_eq!(wider.cursor(26), Cursor { epoch: 2, step: 6, windows: 70 });
        assert_eq!(wider.cursor(27), Cursor { epoch: 3, step: 0, windows: 0 });
        assert_eq!([1, 2, 3, 4].map(|epochs| wider.total_steps(epochs, None)), [5, 10, 27, 32]);
        assert_eq!((wider.total_steps(3, Some(90)), wider.epochs_done(26)), (90, 2.0 + 70.0 / 90.0));
    }

    #[test]
    fn a_rest_that_is_taken_is_a_smaller_step() {
        let order = Order::new(1, 99, 8, 2, Rest::Taken).unwrap();
        assert_eq!((order.steps_per_epoch(), order.total_steps(3, None), order.leaves_out()), (13, 39, None));
        assert_eq!(order.cursor(12), Cursor { epoch: 0, step: 12, windows: 96 });
        assert_eq!(order.cursor(13), Cursor { epoch: 1, step: 0, windows: 0 });
        // Three windows for two micro-batches of two ranks: one part has nothing.
        let sizes = [0, 1].map(|micro| [0, 1].map(|rank| order.rank_part(12, micro, rank, 2).len()));
        assert_eq!(sizes, [[0, 1], [1, 1]]);
        // A run that goes on with wider batches takes what is left of the epoch.
        let wider = Order::new(1, 99, 20, 1, Rest::Taken).unwrap().from(12, order.cursor(12));
        assert_eq!((wider.batch(12).count(), wider.cursor(13).epoch, wider.total_steps(1, None)), (3, 1, 13));
        assert_eq!(Order::new(1, 7, 8, 1, Rest::Taken).unwrap().steps_per_epoch(), 1);
        assert!(Order::new(1, 0, 8, 1, Rest::Taken).is_err());
    }

    #[test]
    fn data_smaller_than_a_batch_is_refused_with_the_numbers() {
        let error = Order::new(1, 7, 8, 1, Rest::LeftOut).unwrap_err().to_string();
        assert!(error.contains("fills 7 sequences") && error.contains("takes 8"), "{error}");
    }
}
