//! Between CUDA devices, where the numbers lie.

use super::{Exchanged, Posted, Room, Transport, dtype};
use crate::{Error, shim};
use fleet_collectives::Gang;
use fleet_collectives::nccl::{Call, NcclCollective};
use fleet_learn::Result;
use std::ops::Range;
use tch::{Device, Kind, Tensor};

/// Over NCCL. What was posted and not waited for ends when it is dropped.
pub struct NcclTransport {
    // Before the rooms, which it uses until it is gone.
    nccl: NcclCollective,
    rooms: Vec<Tensor>,
    device: Device,
}

impl NcclTransport {
    /// `nccl` is one on this device.
    pub fn new(nccl: NcclCollective, device: Device) -> NcclTransport {
        NcclTransport { nccl, rooms: Vec::new(), device }
    }
}

impl Transport for NcclTransport {
    fn gang(&mut self) -> &mut dyn Gang {
        self.nccl.gang()
    }

    fn room(&mut self, len: usize, kind: Kind) -> Result<Room> {
        let tensor = Tensor::f_zeros([len as i64], (kind, self.device)).map_err(Error::from)?;
        self.rooms.push(tensor.shallow_clone());
        Ok(Room { tensor, number: self.rooms.len() - 1 })
    }

    fn post(&mut self, room: &Room, range: Range<usize>, exchange: Exchanged) -> Result<Posted> {
        let call = match exchange {
            Exchanged::Gathered => Call::AllGather,
            Exchanged::Reduced => Call::ReduceScatter,
        };
        let dtype = dtype(room.tensor.kind());
        Ok(Posted(shim::nccl::post(&mut self.nccl, &self.rooms[room.number], (range, dtype), call)?))
    }

    fn wait(&mut self, posted: Posted) -> Result<()> {
        Ok(self.nccl.wait(posted.0)?)
    }
}
