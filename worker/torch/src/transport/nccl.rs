//! Between CUDA devices, where the numbers lie.

use super::{Exchanged, Posted, Room, Transport, dtype};
use crate::parts::Seat;
use crate::{Error, shim};
use fleet_collectives::SharedHost;
use fleet_collectives::nccl::{Among, NcclCollective, Work};
use fleet_learn::Result;
use std::ops::Range;
use tch::{Device, Kind, Tensor};

/// Over NCCL. What was posted and not waited for ends when it is dropped.
pub struct NcclTransport {
    // Before the rooms, which it uses until it is gone.
    nccl: NcclCollective,
    seat: Seat,
    rooms: Vec<Tensor>,
    device: Device,
}

impl NcclTransport {
    /// `nccl` is one on this device.
    pub fn new(mut nccl: NcclCollective, device: Device) -> NcclTransport {
        let (among, gang) = (nccl.among(), nccl.gang());
        let seat = match among {
            Among::All => Seat::flat(gang.rank(), gang.world_size()),
            Among::Hosts => Seat::on_host(gang),
        };
        NcclTransport { nccl, seat, rooms: Vec::new(), device }
    }
}

impl Transport for NcclTransport {
    fn gang(&mut self) -> &mut dyn SharedHost {
        self.nccl.gang()
    }

    fn seat(&self) -> Seat {
        self.seat
    }

    fn room(&mut self, len: usize, kind: Kind) -> Result<Room> {
        let tensor = Tensor::f_zeros([len as i64], (kind, self.device)).map_err(Error::from)?;
        self.rooms.push(tensor.shallow_clone());
        Ok(Room { tensor, number: self.rooms.len() - 1 })
    }

    fn post(&mut self, room: &Room, range: Range<usize>, exchange: Exchanged) -> Result<Posted> {
        let work = match exchange {
            Exchanged::Gathered => Work::Gather,
            Exchanged::Reduced => Work::Reduce,
            Exchanged::ReducedWithin => Work::ReduceWithin,
        };
        let dtype = dtype(room.tensor.kind());
        Ok(Posted(shim::nccl::post(&mut self.nccl, &self.rooms[room.number], (range, dtype), work)?))
    }

    fn wait(&mut self, posted: Posted) -> Result<()> {
        Ok(self.nccl.wait(posted.0)?)
    }
}
