//! How a model's numbers are cut for several ranks, as numbers alone: which part of each unit a rank keeps, where whole units lie while they are
//! in, and in which order they come.

use fleet_collectives::{PART_ALIGN, SharedHost};
use fleet_common::job::Strategy;
use fleet_common::model::{Layout, Parameter, Role};
use fleet_learn::Places;
use std::ops::Range;

/// A rank among those that keep a model together: all of a gang, or those of one of several hosts that have a replica each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seat {
    pub rank: usize,
    pub world: usize,
    /// Which replica theirs is, from 0.
    pub replica: usize,
    pub replicas: usize,
    /// Every unit is padded to so many equal shares, a multiple of the ranks of any replica: its room is as long in all of them.
    shares: usize,
}

impl Seat {
    /// Of a gang whose ranks keep one model together.
    pub fn flat(rank: usize, world: usize) -> Seat {
        Seat { rank, world, replica: 0, replicas: 1, shares: world }
    }

    /// Of a gang on hosts of which each has a replica.
    pub fn on_host(gang: &dyn SharedHost) -> Seat {
        let sizes = (0..).map(|host| gang.size_of_host(host)).take_while(|size| *size > 0);
        Seat::in_replica(gang.local_rank(), gang.host(), &sizes.collect::<Vec<usize>>())
    }

    /// In one of several replicas, each of so many ranks.
    pub fn in_replica(rank: usize, replica: usize, sizes: &[usize]) -> Seat {
        let shares = sizes.iter().copied().fold(1, least_common_multiple);
        Seat { rank, world: sizes[replica], replica, replicas: sizes.len(), shares }
    }
}

fn least_common_multiple(a: usize, b: usize) -> usize {
    let (mut divisor, mut rest) = (a, b);
    while rest > 0 {
        (divisor, rest) = (rest, divisor % rest);
    }
    a / divisor * b
}

/// Which units have rooms at the same time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rooms {
    /// All of them, each in a room of its own: data-parallel (DDP).
    Everything,
    /// Two blocks in turn, and embedding or head; both where the head reads the embedding's matrix. Fully sharded (FSDP).
    TwoBlocks,
}

/// The rooms of a strategy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    pub weights: Rooms,
    pub gradients: Rooms,
}

impl Held {
    pub const DDP: Held = Held { weights: Rooms::Everything, gradients: Rooms::Everything };
    pub const FSDP: Held = Held { weights: Rooms::TwoBlocks, gradients: Rooms::TwoBlocks };
    /// Weights stay from a step's first forward to its last backward.
    pub const FSDP_KEEPING_WEIGHTS: Held = Held { weights: Rooms::Everything, ..Held::FSDP };

    /// Of a job's strategy, and whether weights go after a block's forward.
    pub fn of(strategy: Strategy, reshard_after_forward: bool) -> Held {
        match strategy {
            Strategy::Fsdp | Strategy::Hsdp if reshard_after_forward => Held::FSDP,
            Strategy::Fsdp | Strategy::Hsdp => Held::FSDP_KEEPING_WEIGHTS,
            Strategy::Auto | Strategy::Ddp => Held::DDP,
        }
    }
}

/// One rank's view of a model.
#[derive(Debug)]
pub struct Parts {
    units: Vec<Unit>,
    /// Elements that every rank keeps of the model, padding included.
    pub shard: usize,
    /// Elements of all rooms together.
    pub rooms: usize,
    /// Where units are in the rooms.
    pub places: Places,
}

/// Where a unit lies. Ranges are in elements.
#[derive(Clone, Debug, PartialEq)]
pub struct Unit {
    /// In the flat buffer.
    pub flat: Range<usize>,
    /// This rank's part, in the flat buffer. It may be empty.
    pub own: Range<usize>,
    /// This rank's part in its shard: as long as every other rank's, so longer than `own` where the unit does not divide.
    pub shard: Range<usize>,
    /// The whole unit in its room, as many shards as there are ranks. Empty where it has none.
    pub room: Range<usize>,
    /// What of this rank's part is parameters, counted from its begin.
    pub used: Vec<Range<usize>>,
}

impl Parts {
    /// With a room for every unit.
    pub fn new(layout: &Layout, rooms: Rooms, seat: &Seat) -> Parts {
        Parts::with(layout, rooms, seat, true)
    }

    /// With rooms for what products read: none for the first unit, where they read nothing of that.
    pub fn of_products(layout: &Layout, rooms: Rooms, seat: &Seat) -> Parts {
        Parts::with(layout, rooms, seat, products_read_first(layout))
    }

    fn with(layout: &Layout, rooms: Rooms, seat: &Seat, has_first: bool) -> Parts {
        let sizes: Vec<usize> = layout.units.iter().map(|unit| share(unit, seat)).collect();
        let mut lens: Vec<usize> = sizes.iter().map(|size| size * seat.world).collect();
        if !has_first {
            lens[0] = 0;
        }
        let (starts, rooms) = match rooms {
            Rooms::Everything => side_by_side(&lens),
            Rooms::TwoBlocks => in_turn(&lens, layout.is_tied()),
        };
        let (shards, shard) = side_by_side(&sizes);
        let unit = |number: usize| {
            let flat = layout.units[number].clone();
            let own = part(&flat, seat.rank, sizes[number]);
            let used = merged(layout.parameters.iter().filter_map(|p| within_part(p, &own)));
            Unit {
                shard: shards[number]..shards[number] + sizes[number],
                room: starts[number]..starts[number] + lens[number],
                flat,
                own,
                used,
            }
        };
        let units: Vec<Unit> = (0..layout.units.len()).map(unit).collect();
        let with_room = units.iter().filter(|unit| !unit.room.is_empty());
        let places = Places::new(with_room.map(|unit| (unit.flat.clone(), unit.room.start)));
        Parts { units, shard, rooms, places }
    }

    pub fn units(&self) -> &[Unit] {
        &self.units
    }

    pub fn last(&self) -> usize {
        self.units.len() - 1
    }

    /// Where in the shard this rank's part of each parameter lies.
    pub fn kept<'a>(&'a self, layout: &'a Layout) -> impl Iterator<Item = (&'a Parameter, Range<usize>)> {
        layout.parameters.iter().flat_map(|parameter| {
            self.units.iter().filter_map(move |unit| {
                let within = within_part(parameter, &unit.own)?;
                Some((parameter, unit.shard.start + within.start..unit.shard.start + within.end))
            })
        })
    }

    /// Other units whose rooms overlap that of `unit`.
    pub fn neighbours(&self, unit: usize) -> impl Iterator<Item = usize> + use<'_> {
        let room = self.units[unit].room.clone();
        let overlap = move |other: &Range<usize>| other.start < room.end && room.start < other.end;
        (0..self.units.len()).filter(move |other| *other != unit && overlap(&self.units[*other].room))
    }
}

impl Unit {
    /// This rank's part in the unit's room.
    pub fn own_room(&self, rank: usize) -> Range<usize> {
        self.own_room_from(self.room.start, rank)
    }

    /// The same in a room that begins at `start`.
    pub fn own_room_from(&self, start: usize, rank: usize) -> Range<usize> {
        let start = start + rank * self.shard.len();
        start..start + self.shard.len()
    }

    /// What another rank has of it, in the flat buffer. It may be empty.
    pub fn part(&self, rank: usize) -> Range<usize> {
        part(&self.flat, rank, self.shard.len())
    }
}

/// Elements that each rank has of a unit.
fn share(unit: &Range<usize>, seat: &Seat) -> usize {
    unit.len().div_ceil(seat.shares).next_multiple_of(PART_ALIGN) * (seat.shares / seat.world)
}

/// Of a unit that is cut into parts of `size`, the one of a rank.
fn part(unit: &Range<usize>, rank: usize, size: usize) -> Range<usize> {
    let at = |rank: usize| (unit.start + rank * size).min(unit.end);
    at(rank)..at(rank + 1)
}

/// Whether products read any of the first unit, whose tables are looked up.
pub fn products_read_first(layout: &Layout) -> bool {
    let is_read = |p: &Parameter| p.unit == 0 && matches!(p.role, Role::Weight | Role::TiedTable);
    layout.parameters.iter().any(is_read)
}

/// What of a parameter is in a part of a unit, counted from the part's begin.
fn within_part(parameter: &Parameter, part: &Range<usize>) -> Option<Range<usize>> {
    let range = parameter.range.start.max(part.start)..parameter.range.end.min(part.end);
    (!range.is_empty()).then(|| range.start - part.start..range.end - part.start)
}

/// Ranges in order; those that touch are one.
pub fn merged(ranges: impl Iterator<Item = Range<usize>>) -> Vec<Range<usize>> {
    let mut sorted: Vec<Range<usize>> = ranges.collect();
    sorted.sort_by_key(|range| range.start);
    let mut out: Vec<Range<usize>> = Vec::new();
    for range in sorted {
        match out.last_mut() {
            Some(before) if before.end == range.start => before.end = range.end,
            _ => out.push(range),
        }
    }
    out
}

/// Where each begins, and how long they are together.
fn side_by_side(lens: &[usize]) -> (Vec<usize>, usize) {
    let ends = lens.iter().scan(0, |end, len| {
        *end += len;
        Some(*end)
    });
    (ends.zip(lens).map(|(end, len)| end - len).collect(), lens.iter().sum())
}

fn in_turn(lens: &[usize], tied: bool) -> (Vec<usize>, usize) {
    let last = lens.len() - 1;
    let head = if tied { lens[0] } else { 0 };
    let edges = lens[0].max(head + lens[last]);
    let block = lens[1..last].iter().copied().max().unwrap_or(0);
    let start = |unit: usize| match unit {
        0 => 0,
        unit if unit == last => head,
        unit => edges + unit % 2 * block,
    };
    ((0..lens.len()).map(start).collect(), edges + 2 * block)
}

/// In which order a micro-batch needs units: forward from the embedding to the head, then back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Turn {
    next: Option<usize>,
    back: bool,
}

impl Turn {
    pub const FORWARD: Turn = Turn { next: Some(0), back: false };

    /// After the head, `last`.
    pub fn back(last: usize) -> Turn {
        Turn { next: last.checked_sub(1), back: true }
    }

    /// `unit` is needed now: which one comes next. None at the ends, and where it is needed out of its turn (a head that reads the embedding).
    pub fn after(&mut self, unit: usize, last: usize) -> Option<usize> {
        if self.next != Some(unit) {
            return None;
        }
        self.next = if self.back { unit.checked_sub(1) } else { (unit < last).then_some(unit + 1) };
        self.next
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fleet_learn::model::Model;
    use fleet_learn::testing::tiny_with;
    use serde_json::json;

    fn layout(tied: bool, layers: usize) -> Layout {
        // Odd sizes: there is room between parameters.
        let config = tiny_with(
            json!({"tie_word_embeddings": tied, "num_hidden_layers": layers, "intermediate_size": 45}),
        );
        Model::new(&config).unwrap().layout()
    }

    #[test]
    fn every_parameter_is_kept_once_and_no_padding() {
        for (world, rooms) in
            [(1, Rooms::Everything), (2, Rooms::TwoBlocks), (3, Rooms::TwoBlocks), (7, Rooms::Everything)]
        {
            let layout = layout(false, 3);
            let ranks: Vec<Parts> =
                (0..world).map(|rank| Parts::new(&layout, rooms, &Seat::flat(rank, world))).collect();
            assert!(ranks.iter().all(|parts| (parts.shard, parts.rooms) == (ranks[0].shard, ranks[0].rooms)));
            let kept = |parts: &Parts| parts.kept(&layout).map(|(_, range)| range.len()).sum::<usize>();
            let numbers: usize = layout.parameters.iter().map(|p| p.range.len()).sum();
            assert_eq!(ranks.iter().map(kept).sum::<usize>(), numbers);
            for parts in &ranks {
                let used: usize = parts.units().iter().flat_map(|unit| &unit.used).map(Range::len).sum();
                assert_eq!(used, kept(parts));
                let mut ranges: Vec<Range<usize>> = parts.kept(&layout).map(|(_, range)| range).collect();
                ranges.sort_by_key(|range| range.start);
                assert!(
                    ranges.windows(2).all(|two| two[0].end <= two[1].start)
                        && ranges.iter().all(|r| r.end <= parts.shard)
                );
            }
        }
    }

    #[test]
    fn a_room_is_where_its_unit_is_and_neighbours_in_time_are_not_in_space() {
        for (tied, layers) in [(false, 1), (false, 4), (true, 1), (true, 5)] {
            let layout = layout(tied, layers);
            let seat = Seat::flat(1, 3);
            let parts = Parts::new(&layout, Rooms::TwoBlocks, &seat);
            for (number, unit) in parts.units().iter().enumerate() {
                assert!(unit.room.len() >= unit.flat.len() && unit.room.end <= parts.rooms);
                let others: Vec<usize> = parts.neighbours(number).collect();
                assert!(others.iter().all(|other| other.abs_diff(number) > 1), "{number}: {others:?}");
                assert_eq!(parts.places.of(&unit.flat).start, unit.room.start);
                let begins = |own: &Range<usize>| parts.places.of(own).start == unit.own_room(1).start;
                assert!(unit.own.is_empty() || begins(&unit.own));
            }
            assert_eq!(parts.neighbours(0).next().is_none(), tied, "a tied head reads both");
            assert_eq!(Parts::new(&layout, Rooms::Everything, &seat).neighbours(0).next(), None);
            let of_products = Parts::of_products(&layout, Rooms::TwoBlocks, &seat);
            assert_eq!(of_products.units()[0].room.is_empty(), !tied);
            assert!(of_products.neighbours(0).next().is_none() && of_products.rooms <= parts.rooms);
        }
    }

    #[test]
    fn replicas_of_other_sizes_have_rooms_of_the_same_length() {
        let layout = layout(false, 3);
        let sizes = [1, 2, 3];
        let of = |replica: usize, rank| {
            Parts::new(&layout, Rooms::TwoBlocks, &Seat::in_replica(rank, replica, &sizes))
        };
        let alone = of(0, 0);
        for (replica, size) in sizes.into_iter().enumerate() {
            let ranks: Vec<Parts> = (0..size).map(|rank| of(replica, rank)).collect();
            for (number, unit) in alone.units().iter().enumerate() {
                let own: Vec<Range<usize>> =
                    ranks.iter().map(|parts| parts.units()[number].own.clone()).collect();
                assert_eq!(own.iter().map(Range::len).sum::<usize>(), unit.flat.len());
                for parts in &ranks {
                    let same = &parts.units()[number];
                    assert_eq!(same.room, unit.room);
                    assert!((0..size).all(|rank| same.part(rank) == own[rank]));
                }
            }
        }
    }

    #[test]
    fn units_come_forward_and_then_back() {
        let mut turn = Turn::FORWARD;
        let forward = [0, 1, 2, 0, 3].map(|unit| turn.after(unit, 3));
        assert_eq!(forward, [Some(1), Some(2), Some(3), None, None]);
        let mut turn = Turn::back(3);
        assert_eq!([2, 1, 0].map(|unit| turn.after(unit, 3)), [Some(1), Some(0), None]);
    }
}
