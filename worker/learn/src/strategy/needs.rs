//! What a strategy keeps in memory and collects from other hosts, before anything runs.

use super::Resident;
use super::gathered::{longest, rooms};
use super::sharded::Rooms;
use super::shards::Collected;
use super::state::within;
use fleet_common::job::{Shape, Strategy};
use fleet_common::model::Layout;
use std::ops::Range;

/// Bytes for each rank on the CPU. What the ranks of a host share is divided by their number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Needs {
    /// fp32 masters and, under bf16-mixed, their copy. Where they are sharded over hosts, also the units that a host has.
    pub weights: usize,
    pub gradients: usize,
    /// Both moments.
    pub optimizer: usize,
}

/// How a job keeps its numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Keeping {
    pub strategy: Strategy,
    /// Under bf16-mixed and 16-mixed.
    pub bf16: bool,
    /// Everything is in bf16.
    pub narrow: bool,
    pub shape: Shape,
    /// Of what is collected from other hosts.
    pub resident: Resident,
    /// A step has several micro-batches.
    pub accumulates: bool,
}

impl Needs {
    /// Of one rank alone every strategy needs the same.
    pub fn of(keeping: &Keeping, layout: &Layout) -> Needs {
        if keeping.is_sharded_over_hosts() {
            return Needs::over_hosts(keeping, layout);
        }
        let of_host = |bytes_each: usize| keeping.of_host(bytes_each * layout.len);
        if keeping.narrow {
            let gradients = of_host(2) + 4 * Rooms::of_gradients(layout).len;
            return Needs { weights: of_host(2), gradients, optimizer: of_host(4) };
        }
        let gradients = match keeping.strategy {
            _ if keeping.shape.ranks == 1 => 4 * layout.len,
            Strategy::Auto | Strategy::Ddp => 4 * layout.len,
            Strategy::Fsdp | Strategy::Hsdp => of_host(4) + 4 * Rooms::of_gradients(layout).len,
        };
        Needs { weights: of_host(if keeping.bf16 { 6 } else { 4 }), gradients, optimizer: of_host(8) }
    }

    fn over_hosts(keeping: &Keeping, layout: &Layout) -> Needs {
        let world = keeping.shape.ranks as usize;
        let shards = |unit: usize, rank: usize| within(&layout.units[unit], rank, world);
        let whole: Vec<Vec<Range<usize>>> = layout.units.iter().map(|unit| vec![unit.clone()]).collect();
        let shard = longest(&whole, &shards, world);
        let Collected { exact, copy } = Collected::of(layout, keeping.bf16);
        let collected = |members: &[Vec<Range<usize>>], size: usize| {
            size * longest(members, &shards, world)
                + keeping.of_host(size * rooms(members, keeping.resident).len)
        };
        let masters = if keeping.bf16 { 4 * shard } else { 0 };
        let held = if keeping.accumulates { keeping.of_host(4 * layout.len) } else { 0 };
        Needs {
            weights: masters + collected(&exact, 4) + copy.map_or(0, |copy| collected(&copy, 2)),
            gradients: 4 * shard + held + 4 * Rooms::of_gradients(layout).len,
            optimizer: 8 * shard,
        }
    }

    pub fn total(&self) -> usize {
        self.weights + self.gradients + self.optimizer
    }
}

impl Keeping {
    /// Each rank has no more than its part of the weights.
    pub fn is_sharded_over_hosts(&self) -> bool {
        self.strategy == Strategy::Fsdp && self.shape.nodes > 1 && !self.narrow
    }

    /// Of each unit the bytes that a host collects before it is computed.
    pub fn collects(&self, layout: &Layout) -> Vec<usize> {
        if !self.is_sharded_over_hosts() {
            return vec![0; layout.units.len()];
        }
        let Collected { exact, copy } = Collected::of(layout, self.bf16);
        let numbers = |unit: &Vec<Range<usize>>| unit.iter().map(Range::len).sum::<usize>();
        let copied = |unit: usize| copy.as_ref().map_or(0, |copy| 2 * numbers(&copy[unit]));
        exact.iter().enumerate().map(|(number, unit)| 4 * numbers(unit) + copied(number)).collect()
    }

    /// A rank's share of what its host has once.
    fn of_host(&self, bytes: usize) -> usize {
        bytes.div_ceil(self.shape.of_node() as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Model;
    use crate::testing::tiny_with;
    use serde_json::json;

    fn keeping(strategy: Strategy, ranks: u32, nodes: u32) -> Keeping {
        Keeping {
            strategy,
            bf16: false,
            narrow: false,
            shape: Shape { ranks, nodes },
            resident: Resident::TwoBlocks,
            accumulates: false,
        }
    }

    fn layout() -> Layout {
        Model::new(&tiny_with(json!({"num_hidden_layers": 20}))).unwrap().layout()
    }

    #[test]
    fn shards_shrink_with_the_ranks_and_replicas_do_not() {
        let layout = layout();
        let of = |strategy, ranks| Needs::of(&keeping(strategy, ranks, 1), &layout);
        assert_eq!(of(Strategy::Ddp, 1), of(Strategy::Fsdp, 1));
        assert_eq!(of(Strategy::Ddp, 1).total(), 16 * layout.len);
        assert_eq!(of(Strategy::Ddp, 4).gradients, 4 * layout.len);
        assert_eq!(of(Strategy::Fsdp, 4).gradients, layout.len + 4 * Rooms::of_gradients(&layout).len);
        assert_eq!(of(Strategy::Fsdp, 4).optimizer, 2 * layout.len);
        let bf16 = Keeping { bf16: true, ..keeping(Strategy::Ddp, 2, 1) };
        assert_eq!(Needs::of(&bf16, &layout).weights, 3 * layout.len);
        let narrow = Keeping { narrow: true, ..keeping(Strategy::Ddp, 1, 1) };
        let rooms = 4 * Rooms::of_gradients(&layout).len;
        assert_eq!(Needs::of(&narrow, &layout).total(), 8 * layout.len + rooms);
    }

    #[test]
    fn over_hosts_fsdp_keeps_shards_of_all_ranks_and_the_others_what_they_keep_on_one() {
        let layout = layout();
        for strategy in [Strategy::Ddp, Strategy::Hsdp] {
            let two = Needs::of(&keeping(strategy, 4, 2), &layout);
            assert_eq!(two, Needs::of(&keeping(strategy, 2, 1), &layout));
        }
        let [two, four] = [2, 4].map(|nodes| Needs::of(&keeping(Strategy::Fsdp, 2 * nodes, nodes), &layout));
        // Shards begin at whole cache lines.
        let about = |bytes: usize, of: usize| bytes >= of && bytes < of + of / 8;
        assert!(
            about(two.optimizer, 2 * layout.len) && about(four.optimizer, layout.len),
            "{two:?} {four:?}"
        );
        assert!(two.weights < 3 * layout.len && four.weights < two.weights, "{two:?} {four:?}");
        let staying = Keeping { resident: Resident::AllUnits, ..keeping(Strategy::Fsdp, 4, 2) };
        assert!(Needs::of(&staying, &layout).weights > two.weights + layout.len, "{two:?}");
        let adding = Keeping { accumulates: true, ..keeping(Strategy::Fsdp, 4, 2) };
        let more = Needs::of(&adding, &layout).gradients - two.gradients;
        assert_eq!(more, 2 * layout.len, "a host holds its own sums of all units");
    }

    #[test]
    fn a_host_collects_what_products_read() {
        let layout = layout();
        let fsdp = keeping(Strategy::Fsdp, 4, 2);
        let numbers = |bytes: &[usize]| bytes.iter().sum::<usize>();
        assert_eq!(numbers(&fsdp.collects(&layout)), 4 * layout.units.iter().map(Range::len).sum::<usize>());
        let narrow = numbers(&Keeping { bf16: true, ..fsdp }.collects(&layout));
        assert!(narrow > 2 * layout.len && narrow < 3 * layout.len, "{narrow} of {}", layout.len);
        assert_eq!(numbers(&keeping(Strategy::Hsdp, 4, 2).collects(&layout)), 0);
    }
}
