//! Over the memory of the host. Tensors of the CPU lie in the memory that is exchanged; what another device has is copied there and back.

use super::{Exchanged, Posted, Room, Transport, dtype, share};
use crate::memory::{hidden_copy, narrow};
use crate::parts::Seat;
use crate::{Error, shim};
use fleet_collectives::{self as collectives, Keep, Op, PerRank, SharedHost, Ticket};
use fleet_learn::Result;
use std::collections::VecDeque;
use std::ops::Range;
use tch::{Device, Kind, Tensor};

/// Over any exchange of bytes.
pub struct HostTransport {
    gang: Box<dyn SharedHost>,
    seat: Seat,
    device: Device,
    /// Whether tensors are copied although they are the CPU's.
    apart: bool,
    rooms: Vec<Memory>,
    under_way: VecDeque<UnderWay>,
    posts: u64,
}

struct Memory {
    bytes: PerRank,
    /// Over `bytes`.
    host: Tensor,
    /// The same tensor, or one of another device.
    device: Tensor,
}

struct UnderWay {
    posted: Posted,
    ticket: Ticket,
    room: usize,
    /// What a device gets of it.
    result: Range<usize>,
}

impl HostTransport {
    /// All ranks keep a model together.
    pub fn new(gang: Box<dyn SharedHost>, device: Device) -> HostTransport {
        let seat = Seat::flat(gang.rank(), gang.world_size());
        let apart = device != Device::Cpu;
        HostTransport { gang, seat, device, apart, rooms: Vec::new(), under_way: VecDeque::new(), posts: 0 }
    }

    /// The ranks of each host keep one together.
    pub fn within_hosts(self) -> HostTransport {
        HostTransport { seat: Seat::on_host(&*self.gang), ..self }
    }

    /// Treats the CPU as a device with memory of its own.
    pub fn copying(self) -> HostTransport {
        HostTransport { apart: true, ..self }
    }

    fn copied(&self, room: usize, range: &Range<usize>, to_host: bool) -> Result<()> {
        if self.apart {
            let room = &self.rooms[room];
            let (from, to) = if to_host { (&room.device, &room.host) } else { (&room.host, &room.device) };
            hidden_copy(to, range, &narrow(from, range)?)?;
        }
        Ok(())
    }
}

impl Transport for HostTransport {
    fn gang(&mut self) -> &mut dyn SharedHost {
        &mut *self.gang
    }

    fn seat(&self) -> Seat {
        self.seat
    }

    fn room(&mut self, len: usize, kind: Kind) -> Result<Room> {
        let bytes = self.gang.allocate_per_rank(len * kind.elt_size_in_bytes())?;
        let host = shim::over(bytes.clone(), kind)?;
        let device = match self.apart {
            true => Tensor::f_zeros([len as i64], (kind, self.device)).map_err(Error::from)?,
            false => host.shallow_clone(),
        };
        let room = Room { tensor: device.shallow_clone(), number: self.rooms.len() };
        self.rooms.push(Memory { bytes, host, device });
        Ok(room)
    }

    fn post(&mut self, room: &Room, range: Range<usize>, exchange: Exchanged) -> Result<Posted> {
        let mine = share(&range, &self.seat);
        let dtype = dtype(room.tensor.kind());
        let (given, result) = match exchange {
            Exchanged::Gathered => (&mine, range.clone()),
            Exchanged::Reduced | Exchanged::ReducedWithin => (&range, mine.clone()),
        };
        self.copied(room.number, given, true)?;
        let bytes = range.start * dtype.size()..range.end * dtype.size();
        let (gang, buffers) = (&mut self.gang, &self.rooms[room.number].bytes);
        let ticket = match (exchange, self.seat.replicas) {
            (Exchanged::Gathered, 1) => gang.post(buffers, bytes, collectives::Posted::AllGather(dtype)),
            (Exchanged::Gathered, _) => gang.post_gather_of_host(buffers, bytes, dtype),
            (_, 1) => gang.post(buffers, bytes, collectives::Posted::ReduceScatter(dtype, Op::Sum)),
            (Exchanged::Reduced, _) => gang.post_reduce(buffers, bytes, dtype, Op::Sum, Keep::MyPart),
            (Exchanged::ReducedWithin, _) => {
                gang.post_reduce(buffers, bytes, dtype, Op::Sum, Keep::MyPartOfHost)
            }
        }?;
        self.posts += 1;
        let posted = Posted(self.posts);
        self.under_way.push_back(UnderWay { posted, ticket, room: room.number, result });
        Ok(posted)
    }

    fn wait(&mut self, posted: Posted) -> Result<()> {
        while let Some(done) = self.under_way.pop_front_if(|other| other.posted <= posted) {
            self.gang.wait(done.ticket)?;
            self.copied(done.room, &done.result, false)?;
        }
        Ok(())
    }
}
