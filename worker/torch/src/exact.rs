//! What is read as it is kept while products are in 16 bits, in fp32: the first unit, which has the tables, as a whole, and the norms and biases of
//! all other units, which are few: those of all units come together, once a step.

use crate::Error;
use crate::memory::{Stored, hidden_copy, narrow};
use crate::parts::{Parts, Seat, products_read_first};
use crate::transport::{Exchanged, Posted, Room, Transport};
use fleet_collectives::PART_ALIGN;
use fleet_common::model::Layout;
use fleet_learn::Places;
use std::ops::Range;
use tch::{Device, Kind, Tensor};

pub struct Exact {
    room: Room,
    map: Map,
    /// Where in this rank's shard the vectors are that it gives.
    own: Tensor,
    /// Of each number of the vectors, where it is among those that came.
    from: Tensor,
    vectors: Vectors,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Vectors {
    Outdated,
    Coming(Posted),
    Here,
}

/// Where they lie, as numbers alone: the first unit, then the vectors, then those of each rank as they come.
#[derive(Debug)]
struct Map {
    places: Places,
    first: Range<usize>,
    vectors: Range<usize>,
    come: Range<usize>,
    own: Vec<i64>,
    from: Vec<i64>,
    /// Products read of the first unit, too.
    products_read_first: bool,
}

impl Map {
    fn new(layout: &Layout, parts: &Parts, seat: &Seat) -> Map {
        let units = parts.units();
        let first = 0..units[0].shard.len() * seat.world;
        let vectors = || layout.parameters.iter().filter(|p| p.unit > 0 && p.role.is_vector());
        let len: usize = vectors().map(|p| p.range.len()).sum();
        let mut lens = vec![0; seat.world];
        // Of each run its rank, and where it begins among what that rank gives.
        let mut runs: Vec<(usize, usize, usize)> = Vec::new();
        let mut own = Vec::new();
        for vector in vectors() {
            let unit = &units[vector.unit];
            for (rank, given) in lens.iter_mut().enumerate() {
                let part = unit.part(rank);
                let run = vector.range.start.max(part.start)..vector.range.end.min(part.end);
                if run.is_empty() {
                    continue;
                }
                runs.push((rank, *given, run.len()));
                *given += run.len();
                if rank == seat.rank {
                    let start = unit.shard.start + run.start - part.start;
                    own.extend((start..start + run.len()).map(|at| at as i64));
                }
            }
        }
        let share = lens.into_iter().max().unwrap_or(0).next_multiple_of(PART_ALIGN);
        let from = runs.into_iter().flat_map(|(rank, start, len)| {
            let start = rank * share + start;
            (start..start + len).map(|at| at as i64)
        });
        let mut next = first.end;
        let whole = (layout.units[0].clone(), first.start);
        let placed = vectors().map(|p| {
            next += p.range.len();
            (p.range.clone(), next - p.range.len())
        });
        let places = Places::new(std::iter::once(whole).chain(placed));
        let begin = (first.end + len).next_multiple_of(PART_ALIGN);
        Map {
            places,
            vectors: first.end..first.end + len,
            come: begin..begin + share * seat.world,
            first,
            own,
            from: from.collect(),
            products_read_first: products_read_first(layout),
        }
    }
}

impl Exact {
    /// Of a model of which this rank has `parts`, at `home`. A collective call.
    pub fn new(
        layout: &Layout,
        parts: &Parts,
        home: Device,
        transport: &mut dyn Transport,
    ) -> fleet_learn::Result<Exact> {
        let map = Map::new(layout, parts, &transport.seat());
        let room = transport.room(map.come.end, Kind::Float)?;
        let indices =
            |numbers: &[i64], device| Ok::<_, Error>(Tensor::f_from_slice(numbers)?.f_to_device(device)?);
        let (own, from) = (indices(&map.own, home)?, indices(&map.from, room.tensor.device())?);
        Ok(Exact { room, map, own, from, vectors: Vectors::Outdated })
    }

    /// Elements of its room.
    pub fn len(layout: &Layout, parts: &Parts, seat: &Seat) -> usize {
        Map::new(layout, parts, seat).come.end
    }

    pub fn view(&self) -> Stored<'_> {
        Stored { flat: &self.room.tensor, places: Some(&self.map.places) }
    }

    /// What of the first unit products read has to be rounded from here.
    pub fn read_by_products(&self) -> Option<Tensor> {
        let first = narrow(&self.room.tensor, &self.map.first);
        self.map.products_read_first.then(|| first.expect("the first unit is within its room"))
    }

    /// Starts to gather the first unit, of which `own` is this rank's part.
    pub fn gather_first(
        &mut self,
        own: &Tensor,
        place: &Range<usize>,
        transport: &mut dyn Transport,
    ) -> fleet_learn::Result<Posted> {
        hidden_copy(&self.room.tensor, place, own)?;
        transport.post(&self.room, self.map.first.clone(), Exchanged::Gathered)
    }

    /// Starts to gather the vectors where they are outdated, of which this rank's are in its `shard`.
    pub fn gather_vectors(
        &mut self,
        shard: &Tensor,
        transport: &mut dyn Transport,
    ) -> fleet_learn::Result<()> {
        if self.vectors != Vectors::Outdated {
            return Ok(());
        }
        let start =
            self.map.come.start + transport.seat().rank * self.map.come.len() / transport.seat().world;
        let own = shard.f_index_select(0, &self.own).map_err(Error::from)?;
        hidden_copy(&self.room.tensor, &(start..start + self.map.own.len()), &own)?;
        self.vectors =
            Vectors::Coming(transport.post(&self.room, self.map.come.clone(), Exchanged::Gathered)?);
        Ok(())
    }

    /// Has the vectors in place, if they are coming.
    pub fn arrive(&mut self, transport: &mut dyn Transport) -> fleet_learn::Result<()> {
        let Vectors::Coming(posted) = self.vectors else { return Ok(()) };
        transport.wait(posted)?;
        let come =
            narrow(&self.room.tensor, &self.map.come)?.f_index_select(0, &self.from).map_err(Error::from)?;
        hidden_copy(&self.room.tensor, &self.map.vectors, &come)?;
        self.vectors = Vectors::Here;
        Ok(())
    }

    /// What is here is not what ranks keep any more.
    pub fn outdate(&mut self, transport: &mut dyn Transport) -> fleet_learn::Result<()> {
        if let Vectors::Coming(posted) = std::mem::replace(&mut self.vectors, Vectors::Outdated) {
            transport.wait(posted)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::parts::Rooms;
    use fleet_learn::model::Model;
    use fleet_learn::testing::tiny_with;
    use serde_json::json;

    /// Numbers that tell where in the flat buffer they are go from shards to their places.
    #[test]
    fn vectors_come_to_their_places_whoever_has_them() {
        let config = json!({"num_hidden_layers": 3, "intermediate_size": 45, "attention_bias": true});
        let layout = Model::new(&tiny_with(config)).unwrap().layout();
        for world in [1, 2, 3, 7] {
            let ranks = (0..world).map(|rank| {
                let seat = Seat::flat(rank, world);
                let parts = Parts::of_products(&layout, Rooms::TwoBlocks, &seat);
                let mut shard = vec![0; parts.shard];
                for unit in parts.units() {
                    for (at, number) in unit.own.clone().enumerate() {
                        shard[unit.shard.start + at] = number;
                    }
                }
                let map = Map::new(&layout, &parts, &seat);
                let given: Vec<usize> = map.own.iter().map(|at| shard[*at as usize]).collect();
                (map, given)
            });
            let ranks: Vec<(Map, Vec<usize>)> = ranks.collect();
            let share = ranks[0].0.come.len() / world;
            let mut come = vec![0; share * world];
            for (rank, (_, given)) in ranks.iter().enumerate() {
                come[rank * share..rank * share + given.len()].copy_from_slice(given);
            }
            for (map, _) in &ranks {
                let vectors: Vec<usize> = map.from.iter().map(|at| come[*at as usize]).collect();
                for p in layout.parameters.iter().filter(|p| p.unit > 0 && p.role.is_vector()) {
                    let place = map.places.of(&p.range);
                    let place = place.start - map.vectors.start..place.end - map.vectors.start;
                    assert!(vectors[place].iter().copied().eq(p.range.clone()), "{} of {world}", p.name);
                }
            }
        }
    }
}
