//! One rank: what it would exchange is where it is to be.

use super::{Exchanged, Posted, Room, Transport};
use crate::Error;
use crate::parts::Seat;
use fleet_collectives::{SharedHost, Solo};
use fleet_learn::Result;
use std::ops::Range;
use tch::{Device, Kind, Tensor};

pub struct AloneTransport {
    gang: Solo,
    device: Device,
    rooms: usize,
    posts: u64,
}

impl AloneTransport {
    pub fn new(gang: Solo, device: Device) -> AloneTransport {
        AloneTransport { gang, device, rooms: 0, posts: 0 }
    }
}

impl Transport for AloneTransport {
    fn gang(&mut self) -> &mut dyn SharedHost {
        &mut self.gang
    }

    fn seat(&self) -> Seat {
        Seat::flat(0, 1)
    }

    fn room(&mut self, len: usize, kind: Kind) -> Result<Room> {
        let tensor = Tensor::f_zeros([len as i64], (kind, self.device)).map_err(Error::from)?;
        self.rooms += 1;
        Ok(Room { tensor, number: self.rooms - 1 })
    }

    fn post(&mut self, _room: &Room, _range: Range<usize>, _exchange: Exchanged) -> Result<Posted> {
        self.posts += 1;
        Ok(Posted(self.posts))
    }

    fn wait(&mut self, _posted: Posted) -> Result<()> {
        Ok(())
    }
}
