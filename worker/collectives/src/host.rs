//! Ranks on several hosts that share memory inside each: reductions go through the segment first, then every rank of a host carries its own
//! part across, and the results lie in the segment again. All else goes over the connections.

use crate::abort::Abort;
use crate::collective::{
    Activity, Exchange, Gang, Keep, Pace, Posted, SharedHost, Ticket, refuse, through_bytes,
};
use crate::dtype::{DType, Op};
use crate::error::{CollectiveError, Result};
use crate::memory::{Common, PerRank};
use crate::net::{NetAbortHandle, NetCollective};
use crate::shm::{AbortHandle, ShmCollective};
use std::collections::VecDeque;
use std::ops::Range;
use std::time::Duration;

/// Bytes of the buffer through which blocking reductions go, piece by piece.
const PIECE: usize = 4 << 20;

/// A rank of a gang on several hosts.
pub struct HostCollective {
    /// The ranks of this host.
    shm: ShmCollective,
    /// All ranks.
    net: NetCollective,
    /// Reductions that are not over, oldest first.
    reductions: VecDeque<Reduction>,
    /// How many of them the ranks of this host have been asked for, and have been handed to the connections.
    posted: u64,
    handed: u64,
    piece: Option<PerRank>,
    failed: Option<CollectiveError>,
}

struct Reduction {
    buffers: PerRank,
    bytes: Range<usize>,
    dtype: DType,
    op: Op,
    keep: Keep,
}

/// Aborts a gang from another thread.
#[derive(Clone)]
pub struct HostAbortHandle {
    shm: AbortHandle,
    net: NetAbortHandle,
}

impl HostAbortHandle {
    pub fn abort(&self, abort: Abort) {
        self.shm.abort(abort);
        self.net.abort(abort);
    }
}

impl HostCollective {
    /// `shm` joins the ranks of this host, in the order in which they stand in the gang; `net` all ranks of the gang.
    pub fn new(shm: ShmCollective, net: NetCollective) -> Result<HostCollective> {
        let topology = net.topology();
        let here = topology.ranks_of(topology.host_of(net.rank()));
        if here.len() != shm.world_size() || here.get(shm.rank()) != Some(&net.rank()) {
            let message = format!(
                "rank {} of the gang is rank {} of {} in the segment; the rendezvous has {here:?} on its host",
                net.rank(),
                shm.rank(),
                shm.world_size()
            );
            return Err(refuse("connect", message));
        }
        let names = here.to_vec();
        Ok(HostCollective {
            shm: shm.named(names),
            net,
            reductions: VecDeque::new(),
            posted: 0,
            handed: 0,
            piece: None,
            failed: None,
        })
    }

    pub fn abort_handle(&self) -> HostAbortHandle {
        HostAbortHandle { shm: self.shm.abort_handle(), net: self.net.abort_handle() }
    }

    /// Runs one call: an error of one side is one of the other.
    fn latched<T>(&mut self, call: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        let result = call(self);
        if let Err(error) = &result {
            self.failed = Some(error.clone());
            let abort = Abort::for_error(error, self.net.rank());
            self.abort_handle().abort(abort);
            // Tells the other hosts, also where this rank is in no call with them.
            let _ = self.net.progress();
        }
        result
    }

    /// Hands to the connections what the ranks of this host have reduced.
    fn hand_over(&mut self, reduced: u64) -> Result<()> {
        while self.handed < reduced {
            let at = self.reductions.len() - (self.posted - self.handed) as usize;
            let Reduction { buffers, bytes, dtype, op, .. } = &self.reductions[at];
            self.net.post_across(buffers, bytes.clone(), *dtype, *op)?;
            self.handed += 1;
        }
        Ok(())
    }

    /// Inside, across, and inside again for those who want everything.
    fn finish_reductions(&mut self) -> Result<()> {
        self.shm.finish()?;
        self.hand_over(self.posted)?;
        self.net.finish()?;
        let mut gathers = false;
        for reduction in self.reductions.drain(..) {
            if reduction.keep == Keep::Everything {
                self.shm.post(&reduction.buffers, reduction.bytes, Posted::AllGather(reduction.dtype))?;
                gathers = true;
            }
        }
        if gathers { self.shm.finish() } else { Ok(()) }
    }

    /// The buffer of blocking reductions; allocated by all ranks in the same call.
    fn piece(&mut self) -> Result<PerRank> {
        match &self.piece {
            Some(piece) => Ok(piece.clone()),
            None => {
                let piece = self.shm.allocate_per_rank(PIECE)?;
                Ok(self.piece.insert(piece).clone())
            }
        }
    }
}

impl Gang for HostCollective {
    fn rank(&self) -> usize {
        self.net.rank()
    }
    fn world_size(&self) -> usize {
        self.net.world_size()
    }
    fn generation(&self) -> u64 {
        self.net.generation()
    }
    fn set_deadline(&mut self, deadline: Duration) {
        self.shm.set_deadline(deadline);
        self.net.set_deadline(deadline);
    }
    fn note(&mut self, activity: Activity) {
        self.shm.note(activity);
    }
    fn begin_step(&mut self, step: u64, last: Option<Pace>) {
        self.shm.begin_step(step, last);
    }

    /// The ranks of a host meet before and after the first of each meet.
    fn barrier(&mut self) -> Result<()> {
        self.latched(|gang| {
            gang.finish_reductions()?;
            gang.shm.barrier()?;
            gang.net.barrier_of_hosts()?;
            gang.shm.barrier()
        })
    }

    fn all_reduce_f64(&mut self, values: &mut [f64], op: Op) -> Result<()> {
        through_bytes(values, |bytes| self.all_reduce(bytes, DType::F64, op))
    }
}

impl Exchange for HostCollective {
    fn all_reduce(&mut self, data: &mut [u8], dtype: DType, op: Op) -> Result<()> {
        self.latched(|gang| {
            if !data.len().is_multiple_of(dtype.size()) {
                let message = format!("{} bytes are not whole {dtype} elements", data.len());
                return Err(refuse("all_reduce", message));
            }
            gang.finish_reductions()?;
            let piece = gang.piece()?;
            // Nothing at all still compares what ranks call.
            let pieces = data.len().div_ceil(PIECE).max(1);
            for at in 0..pieces {
                let some = at * PIECE..((at + 1) * PIECE).min(data.len());
                piece.write(0, &data[some.clone()]);
                gang.shm.post_reduce(&piece, 0..some.len(), dtype, op, Keep::MyPart)?;
                gang.shm.finish()?;
                let ticket = gang.net.post_across(&piece, 0..some.len(), dtype, op)?;
                gang.net.wait(ticket)?;
                gang.shm.post(&piece, 0..some.len(), Posted::AllGather(dtype))?;
                gang.shm.finish()?;
                piece.read(0, &mut data[some]);
            }
            Ok(())
        })
    }

    fn reduce_scatter(&mut self, input: &[u8], output: &mut [u8], dtype: DType, op: Op) -> Result<()> {
        self.latched(|gang| {
            gang.finish_reductions()?;
            gang.net.reduce_scatter(input, output, dtype, op)
        })
    }

    fn all_gather(&mut self, input: &[u8], output: &mut [u8]) -> Result<()> {
        self.latched(|gang| {
            gang.finish_reductions()?;
            gang.net.all_gather(input, output)
        })
    }

    fn broadcast(&mut self, data: &mut [u8], root: usize) -> Result<()> {
        self.latched(|gang| {
            gang.finish_reductions()?;
            gang.net.broadcast(data, root)
        })
    }

    fn all_to_all(&mut self, input: &[u8], output: &mut [u8]) -> Result<()> {
        self.latched(|gang| {
            gang.finish_reductions()?;
            gang.net.all_to_all(input, output)
        })
    }

    fn allocate_per_rank(&mut self, bytes: usize) -> Result<PerRank> {
        self.latched(|gang| {
            gang.finish_reductions()?;
            gang.shm.allocate_per_rank(bytes)
        })
    }

    fn post(&mut self, buffers: &PerRank, bytes: Range<usize>, exchange: Posted) -> Result<Ticket> {
        self.latched(|gang| {
            // What was posted before is handed over before, so that all ranks keep one order.
            gang.shm.finish()?;
            gang.hand_over(gang.posted)?;
            // Buffers lie elsewhere in the segment of another host.
            let place = bytes.start as u64;
            gang.net.post_at(buffers, bytes, exchange, place)
        })
    }

    fn progress(&mut self) -> Result<()> {
        self.latched(|gang| {
            gang.shm.progress()?;
            gang.hand_over(gang.posted - gang.shm.pending() as u64)?;
            gang.net.progress()
        })
    }

    fn pending(&self) -> usize {
        (self.posted - self.handed) as usize + self.net.pending()
    }

    fn wait(&mut self, ticket: Ticket) -> Result<()> {
        self.latched(|gang| gang.net.wait(ticket))
    }

    fn finish(&mut self) -> Result<()> {
        self.latched(HostCollective::finish_reductions)
    }
}

impl SharedHost for HostCollective {
    fn local_rank(&self) -> usize {
        self.shm.local_rank()
    }
    fn local_size(&self) -> usize {
        self.shm.local_size()
    }
    fn host(&self) -> usize {
        self.net.topology().host_of(self.net.rank())
    }

    fn allocate_common(&mut self, bytes: usize) -> Result<Common> {
        self.latched(|gang| {
            gang.finish_reductions()?;
            gang.shm.allocate_common(bytes)
        })
    }

    fn post_reduce(
        &mut self,
        buffers: &PerRank,
        bytes: Range<usize>,
        dtype: DType,
        op: Op,
        keep: Keep,
    ) -> Result<()> {
        self.latched(|gang| {
            gang.shm.post_reduce(buffers, bytes.clone(), dtype, op, Keep::MyPart)?;
            gang.reductions.push_back(Reduction { buffers: buffers.clone(), bytes, dtype, op, keep });
            gang.posted += 1;
            gang.hand_over(gang.posted - gang.shm.pending() as u64)
        })
    }
}
