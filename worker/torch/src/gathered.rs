//! Whole units' weights in rooms, in the type in which products read them. A unit is gathered while the one before it is computed, and its weights are
//! where they were in its forward when its backward comes.

use crate::exact::Exact;
use crate::memory::{Stored, Weights, hidden_copy, narrow};
use crate::network::Numbers;
use crate::parts::{Parts, Rooms, Seat, Turn, Unit};
use crate::sharded::Keeping;
use crate::transport::{Exchanged, Posted, Room, Transport};
use fleet_common::model::Layout;
use tch::{Kind, Tensor};

pub struct Gathered {
    parts: Parts,
    seat: Seat,
    kept: Kind,
    products: Room,
    /// Where products do not read weights as they are kept.
    exact: Option<Exact>,
    units: Vec<Standing>,
    turn: Turn,
    /// For a whole unit as it is kept, where no other room has that: when it is asked for.
    whole: Option<Room>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Standing {
    state: State,
    /// Between `need` and `release`.
    in_use: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq)]
enum State {
    #[default]
    Absent,
    Coming(Posted),
    Here,
}

impl Gathered {
    /// A collective call.
    pub fn new(
        layout: &Layout,
        keeping: &Keeping,
        transport: &mut dyn Transport,
    ) -> fleet_learn::Result<Gathered> {
        let (seat, numbers) = (transport.seat(), keeping.numbers);
        let parts = parts(layout, keeping.held.weights, numbers, &seat);
        let products = transport.room(parts.rooms, numbers.products)?;
        let exact = match numbers.copied() {
            Some(_) => Some(Exact::new(layout, &parts, keeping.home(), transport)?),
            None => None,
        };
        let units = vec![Standing::default(); parts.units().len()];
        let (kept, turn) = (numbers.kept, Turn::FORWARD);
        Ok(Gathered { parts, seat, kept, products, exact, units, turn, whole: None })
    }

    /// Bytes of its rooms.
    pub fn bytes(layout: &Layout, rooms: Rooms, numbers: Numbers, seat: &Seat) -> usize {
        let parts = parts(layout, rooms, numbers, seat);
        let (kept, copied) = numbers.bytes();
        match numbers.copied() {
            Some(_) => copied * parts.rooms + kept * Exact::len(layout, &parts, seat),
            None => kept * parts.rooms,
        }
    }

    /// A pass begins: which unit is needed first.
    pub fn begin(&mut self, turn: Turn) {
        self.turn = turn;
    }

    pub fn view(&self) -> Weights<'_> {
        let products = Stored { flat: &self.products.tensor, places: Some(&self.parts.places) };
        Weights { products, exact: self.exact.as_ref().map_or(products, Exact::view) }
    }

    /// Has a unit in its room until its release, and the one after it on its way. `shard` is what this rank keeps of the model. A collective
    /// call.
    pub fn need(
        &mut self,
        unit: usize,
        shard: &Tensor,
        transport: &mut dyn Transport,
    ) -> fleet_learn::Result<()> {
        self.bring(unit, shard, transport)?;
        self.units[unit].in_use = true;
        let Some(next) = self.turn.after(unit, self.parts.last()) else { return Ok(()) };
        let is_taken = self.parts.neighbours(next).any(|other| self.units[other].in_use);
        if self.units[next].state == State::Absent && !is_taken {
            self.gather(next, shard, transport)?;
        }
        Ok(())
    }

    pub fn release(&mut self, unit: usize) {
        self.units[unit].in_use = false;
    }

    /// Starts to gather a unit. What else was in its room is not in any more.
    fn gather(
        &mut self,
        unit: usize,
        shard: &Tensor,
        transport: &mut dyn Transport,
    ) -> fleet_learn::Result<Posted> {
        for other in self.parts.neighbours(unit).collect::<Vec<_>>() {
            let standing = &mut self.units[other];
            assert!(!standing.in_use, "unit {other} is in use and has its room with unit {unit}");
            if let State::Coming(posted) = std::mem::take(&mut standing.state) {
                transport.wait(posted)?;
            }
        }
        let of = &self.parts.units()[unit];
        let own = narrow(shard, &of.shard)?;
        if let Some(exact) = &mut self.exact {
            exact.gather_vectors(shard, transport)?;
        }
        let posted = match &mut self.exact {
            Some(exact) if unit == 0 => {
                exact.gather_first(&own, &of.own_room_from(0, self.seat.rank), transport)?
            }
            _ => {
                hidden_copy(&self.products.tensor, &of.own_room(self.seat.rank), &own)?;
                transport.post(&self.products, of.room.clone(), Exchanged::Gathered)?
            }
        };
        self.units[unit].state = State::Coming(posted);
        Ok(posted)
    }

    /// Has a unit in its room.
    fn bring(
        &mut self,
        unit: usize,
        shard: &Tensor,
        transport: &mut dyn Transport,
    ) -> fleet_learn::Result<()> {
        let posted = match self.units[unit].state {
            State::Here => return Ok(()),
            State::Coming(posted) => posted,
            State::Absent => self.gather(unit, shard, transport)?,
        };
        transport.wait(posted)?;
        if let Some(exact) = &mut self.exact {
            exact.arrive(transport)?;
            if let Some(first) = exact.read_by_products().filter(|_| unit == 0) {
                hidden_copy(&self.products.tensor, &self.parts.units()[0].room, &first)?;
            }
        }
        self.units[unit].state = State::Here;
        Ok(())
    }

    /// What was gathered is not what ranks keep any more.
    pub fn outdate(&mut self, transport: &mut dyn Transport) -> fleet_learn::Result<()> {
        for standing in &mut self.units {
            if let State::Coming(posted) = std::mem::take(&mut standing.state) {
                transport.wait(posted)?;
            }
        }
        self.exact.as_mut().map_or(Ok(()), |exact| exact.outdate(transport))
    }

    /// A whole unit as it is kept, until another one is asked for. A collective call.
    pub fn whole(
        &mut self,
        unit: usize,
        shard: &Tensor,
        transport: &mut dyn Transport,
    ) -> fleet_learn::Result<Tensor> {
        if self.exact.is_none() {
            self.bring(unit, shard, transport)?;
            return Ok(narrow(&self.products.tensor, &self.parts.units()[unit].room)?);
        }
        let of = &self.parts.units()[unit];
        let own = narrow(shard, &of.shard)?;
        if self.seat.world == 1 {
            return Ok(own);
        }
        let len = |unit: &Unit| unit.shard.len() * self.seat.world;
        if self.whole.is_none() {
            let longest = self.parts.units().iter().map(len).max().unwrap_or(0);
            self.whole = Some(transport.room(longest, self.kept)?);
        }
        let room = self.whole.as_ref().expect("it was made");
        hidden_copy(&room.tensor, &of.own_room_from(0, self.seat.rank), &own)?;
        let posted = transport.post(room, 0..len(of), Exchanged::Gathered)?;
        transport.wait(posted)?;
        Ok(narrow(&room.tensor, &(0..len(of)))?)
    }
}

fn parts(layout: &Layout, rooms: Rooms, numbers: Numbers, seat: &Seat) -> Parts {
    match numbers.copied() {
        Some(_) => Parts::of_products(layout, rooms, seat),
        None => Parts::new(layout, rooms, seat),
    }
}
