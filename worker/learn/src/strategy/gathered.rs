//! Numbers of a model of which each rank of the gang keeps a shard, and each host, in turn, all of some units.

use super::Resident;
use super::sharded::Rooms;
use crate::error::Result;
use crate::shim::buffers::{Number, RankSlice, SharedSlice};
use crate::units::{Pieces, Places};
use fleet_collectives::{Gather, Parts, SharedHost, Ticket};
use std::ops::Range;

pub(super) struct Gathered<T> {
    /// This rank's shards, which the others collect.
    shards: RankSlice<T>,
    own: Places,
    /// Of the host, once: the units that are in.
    rooms: SharedSlice<T>,
    places: Places,
    units: Vec<Unit>,
}

/// How a unit is collected.
struct Unit {
    /// Of each rank, bytes of the rooms.
    parts: Parts,
    /// Where this rank's begins in its shards, in bytes.
    from: usize,
}

impl<T: Number> Gathered<T> {
    /// Of each unit those ranges that `members` has, in ascending order. Of a unit rank `r` has what lies in `shards(unit, r)`. All zeros. A
    /// collective call.
    pub fn new(
        members: &[Vec<Range<usize>>],
        shards: &dyn Fn(usize, usize) -> Range<usize>,
        resident: Resident,
        gang: &mut dyn SharedHost,
    ) -> Result<Gathered<T>> {
        let rooms = rooms(members, resident);
        let mut places = Vec::new();
        for (ranges, room) in members.iter().zip(&rooms.rooms) {
            let mut next = room.start;
            for range in ranges {
                places.push((range.clone(), next));
                next += range.len();
            }
        }
        let (rank, world) = (gang.rank(), gang.world_size());
        let of_rank = |unit: usize, rank: usize| of_shard(&members[unit], shards(unit, rank));
        let own = Places::in_a_row((0..members.len()).flat_map(|unit| of_rank(unit, rank)));
        let (mut units, mut from) = (Vec::new(), 0);
        for unit in 0..members.len() {
            let mut next = rooms.rooms[unit].start * size_of::<T>();
            let parts = (0..world).map(|rank| {
                let len: usize = of_rank(unit, rank).map(|range| range.len()).sum();
                next += len * size_of::<T>();
                next - len * size_of::<T>()..next
            });
            let parts: Parts = parts.collect();
            let len = parts[rank].len();
            units.push(Unit { parts, from });
            from += len;
        }
        Ok(Gathered {
            shards: RankSlice::new(gang.allocate_per_rank(longest(members, shards, world) * size_of::<T>())?),
            own,
            rooms: SharedSlice::new(gang.allocate_common(rooms.len * size_of::<T>())?),
            places: Places::new(places),
            units,
        })
    }

    /// Starts to collect a unit, if there is anything of it.
    pub fn post(&self, unit: usize, gang: &mut dyn SharedHost) -> Result<Option<Ticket>> {
        let Unit { parts, from } = &self.units[unit];
        if parts.iter().all(Range::is_empty) {
            return Ok(None);
        }
        let gather = Gather { from: (self.shards.memory(), *from), into: self.rooms.memory(), parts };
        Ok(Some(gang.post_gather(gather)?))
    }

    /// Of the units that are in.
    pub fn pieces(&self) -> Pieces<'_, T> {
        Pieces::Placed(&self.places, &self.rooms)
    }

    /// A range of this rank's shards, in the flat buffer, if it is one of the members.
    pub fn shard(&self, range: &Range<usize>) -> Option<&[T]> {
        self.own.find(range).map(|place| self.shards.range(place))
    }

    /// The same, to be written, while nothing is posted.
    pub fn shard_mut(&mut self, range: &Range<usize>) -> Option<&mut [T]> {
        self.own.find(range).map(|place| self.shards.range_mut(place))
    }

    /// This rank's shards in the flat buffer.
    pub fn owned(&self) -> Vec<Range<usize>> {
        self.own.iter().map(|(range, _)| range.clone()).collect()
    }
}

/// Where each of `members` lies while it is in.
pub(super) fn rooms(members: &[Vec<Range<usize>>], resident: Resident) -> Rooms {
    let lens: Vec<usize> = members.iter().map(|ranges| ranges.iter().map(Range::len).sum()).collect();
    match resident {
        Resident::TwoBlocks => Rooms::apart(&lens),
        Resident::AllUnits => Rooms::of_all(&lens),
    }
}

/// Numbers of the rank that keeps most of `members`, of `world` ranks.
pub(super) fn longest(
    members: &[Vec<Range<usize>>],
    shards: &dyn Fn(usize, usize) -> Range<usize>,
    world: usize,
) -> usize {
    let of_unit = |unit: usize, rank: usize| of_shard(&members[unit], shards(unit, rank)).map(|r| r.len());
    let of = |rank: usize| (0..members.len()).flat_map(|unit| of_unit(unit, rank)).sum();
    (0..world).map(of).max().unwrap_or(0)
}

/// What of `ranges` lies in `shard`; it may be nothing.
fn of_shard(ranges: &[Range<usize>], shard: Range<usize>) -> impl Iterator<Item = Range<usize>> + '_ {
    let cut = move |range: &Range<usize>| range.start.max(shard.start)..range.end.min(shard.end);
    ranges.iter().map(cut)
}
