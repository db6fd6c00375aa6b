//! Ranks on several hosts that share memory inside each: reductions go through the segment first, then every rank of a host carries its own
//! part across, and the results lie in the segment again. What is collected lies once on each host. All else goes over the connections.
//!
//! What is posted is carried out by a thread of the rank's own, one after the other: inside, across, inside.

use crate::abort::Abort;
use crate::algorithm::Topology;
use crate::collective::{
    Activity, Exchange, Gang, Gather, Keep, Pace, Parts, Posted, SharedHost, Ticket, part, refuse,
    through_bytes,
};
use crate::dtype::{DType, Op};
use crate::error::{CollectiveError, Result};
use crate::memory::{Common, PerRank};
use crate::net::{NetAbortHandle, NetCollective, SlowLink};
use crate::posts::Posts;
use crate::shm::{AbortHandle, Notes, ShmCollective};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// For what is posted, when a rank goes.
const LINGER: Duration = Duration::from_secs(2);

/// Bytes of the buffer through which blocking reductions go, piece by piece.
const PIECE: usize = 4 << 20;

/// A rank of a gang on several hosts.
pub struct HostCollective {
    pair: Arc<Mutex<Pair>>,
    posts: Posts<Work>,
    topology: Topology,
    rank: usize,
    generation: u64,
    notes: Notes,
    abort: HostAbortHandle,
    piece: Option<PerRank>,
    failed: Option<CollectiveError>,
}

/// Used by one thread at a time: the rank's, when nothing is posted, or that which carries out.
struct Pair {
    /// The ranks of this host.
    shm: ShmCollective,
    /// All ranks.
    net: NetCollective,
}

enum Work {
    Reduce { buffers: PerRank, bytes: Range<usize>, dtype: DType, op: Op, keep: Keep },
    Gather { from: PerRank, at: usize, into: Common, parts: Parts },
    GatherOfHost { buffers: PerRank, bytes: Range<usize>, dtype: DType },
    Exchange { buffers: PerRank, bytes: Range<usize>, exchange: Posted },
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
        let (topology, rank) = (net.topology().clone(), net.rank());
        let here = topology.ranks_of(topology.host_of(rank));
        if here.len() != shm.world_size() || here.get(shm.rank()) != Some(&rank) {
            let message = format!(
                "rank {rank} of the gang is rank {} of {} in the segment; the rendezvous has {here:?} on its host",
                shm.rank(),
                shm.world_size()
            );
            return Err(refuse("connect", message));
        }
        let shm = shm.named(here.to_vec());
        Ok(HostCollective {
            abort: HostAbortHandle { shm: shm.abort_handle(), net: net.abort_handle() },
            notes: shm.notes(),
            generation: net.generation(),
            pair: Arc::new(Mutex::new(Pair { shm, net })),
            posts: Posts::new(),
            topology,
            rank,
            piece: None,
            failed: None,
        })
    }

    pub fn abort_handle(&self) -> HostAbortHandle {
        self.abort.clone()
    }

    /// Runs one call, when what was posted is over.
    fn call<T>(&mut self, call: impl FnOnce(&mut Pair) -> Result<T>) -> Result<T> {
        self.latched(|gang| {
            gang.posts.finish()?;
            call(&mut gang.pair())
        })
    }

    /// An error of one side is one of the other, and stays.
    fn latched<T>(&mut self, call: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        let result = call(self);
        if let Err(error) = &result {
            self.failed = Some(error.clone());
            self.give_up(error);
        }
        result
    }

    /// Ends the calls of both sides, and tells the other hosts, also where this rank is in no call with them.
    fn give_up(&mut self, error: &CollectiveError) {
        let abort = self.abort.clone();
        let why = Abort::for_error(error, self.rank);
        abort.abort(why);
        self.posts.close(|| abort.abort(why));
        let _ = self.pair().net.progress();
    }

    fn pair(&self) -> MutexGuard<'_, Pair> {
        self.pair.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn post(&mut self, work: Work) -> Result<Ticket> {
        let (pair, abort, rank) = (self.pair.clone(), self.abort.clone(), self.rank);
        self.posts.post(work, || {
            move |work: Work| {
                let result = pair.lock().unwrap_or_else(PoisonError::into_inner).carry_out(&work);
                if let Err(error) = &result {
                    abort.abort(Abort::for_error(error, rank));
                }
                result
            }
        })
    }

    /// The buffer of blocking reductions; allocated by all ranks in the same call.
    fn piece(&mut self) -> Result<PerRank> {
        match &self.piece {
            Some(piece) => Ok(piece.clone()),
            None => {
                let piece = self.pair().shm.allocate_per_rank(PIECE)?;
                Ok(self.piece.insert(piece).clone())
            }
        }
    }
}

impl Pair {
    fn carry_out(&mut self, work: &Work) -> Result<()> {
        match work {
            Work::Reduce { buffers, bytes, dtype, op, keep } => {
                self.reduce(buffers, bytes.clone(), *dtype, *op, *keep)
            }
            Work::Gather { from, at, into, parts } => self.gather(&Gather { from: (from, *at), into, parts }),
            Work::GatherOfHost { buffers, bytes, dtype } => {
                let inside = self.shm.post(buffers, bytes.clone(), Posted::AllGather(*dtype))?;
                self.shm.wait(inside)
            }
            // Buffers lie elsewhere in the segment of another host.
            Work::Exchange { buffers, bytes, exchange } => {
                self.net.exchange_at(buffers, bytes.clone(), *exchange, bytes.start as u64)
            }
        }
    }

    fn reduce(
        &mut self,
        buffers: &PerRank,
        bytes: Range<usize>,
        dtype: DType,
        op: Op,
        keep: Keep,
    ) -> Result<()> {
        if keep == Keep::MyShard {
            let parts = shards(bytes.len(), dtype.size(), self.net.world_size());
            let own = self.net.carried(&parts).into_iter();
            let own = own.map(|one| bytes.start + one.start..bytes.start + one.end).collect();
            let inside = self.shm.post_reduce_own(buffers, bytes.clone(), dtype, op, own)?;
            self.shm.wait(inside)?;
            return self.net.reduce_shards_across(buffers, bytes, &parts, dtype, op);
        }
        if keep == Keep::MyPartOfHost {
            let inside = self.shm.post_reduce(buffers, bytes, dtype, op, keep)?;
            return self.shm.wait(inside);
        }
        let inside = self.shm.post_reduce(buffers, bytes.clone(), dtype, op, Keep::MyPart)?;
        self.shm.wait(inside)?;
        self.net.reduce_across(buffers, bytes.clone(), dtype, op)?;
        if keep == Keep::Everything {
            let inside = self.shm.post(buffers, bytes, Posted::AllGather(dtype))?;
            self.shm.wait(inside)?;
        }
        Ok(())
    }

    fn gather(&mut self, gather: &Gather<'_>) -> Result<()> {
        let own = gather.check(self.net.rank(), self.net.world_size())?;
        // Nobody here reads any more what was there before.
        self.shm.barrier()?;
        gather.place_own(own);
        self.net.gather_across(gather.into, gather.parts)?;
        self.shm.barrier()
    }
}

/// The `part`s of all ranks, in bytes.
fn shards(bytes: usize, size: usize, world: usize) -> Parts {
    let of = |rank| part(bytes / size, rank, world);
    (0..world).map(of).map(|part| part.start * size..part.end * size).collect()
}

impl Gang for HostCollective {
    fn rank(&self) -> usize {
        self.rank
    }
    fn world_size(&self) -> usize {
        self.topology.world()
    }
    fn generation(&self) -> u64 {
        self.generation
    }
    fn set_deadline(&mut self, deadline: Duration) {
        let mut pair = self.pair();
        pair.shm.set_deadline(deadline);
        pair.net.set_deadline(deadline);
    }
    fn note(&mut self, activity: Activity) {
        self.notes.note(activity);
    }
    fn begin_step(&mut self, step: u64, last: Option<Pace>) {
        self.notes.begin_step(step, last);
    }

    /// The ranks of a host meet before and after the first of each meet.
    fn barrier(&mut self) -> Result<()> {
        self.call(|pair| {
            pair.shm.barrier()?;
            pair.net.barrier_of_hosts()?;
            pair.shm.barrier()
        })
    }

    fn all_reduce_f64(&mut self, values: &mut [f64], op: Op) -> Result<()> {
        through_bytes(values, |bytes| self.all_reduce(bytes, DType::F64, op))
    }

    fn slow_link(&mut self) -> Result<Option<SlowLink>> {
        self.call(|pair| pair.net.slow_link())
    }
}

impl Exchange for HostCollective {
    fn all_reduce(&mut self, data: &mut [u8], dtype: DType, op: Op) -> Result<()> {
        self.latched(|gang| {
            if !data.len().is_multiple_of(dtype.size()) {
                let message = format!("{} bytes are not whole {dtype} elements", data.len());
                return Err(refuse("all_reduce", message));
            }
            gang.posts.finish()?;
            let piece = gang.piece()?;
            // Nothing at all still compares what ranks call.
            let pieces = data.len().div_ceil(PIECE).max(1);
            for at in 0..pieces {
                let some = at * PIECE..((at + 1) * PIECE).min(data.len());
                piece.write(0, &data[some.clone()]);
                gang.pair().reduce(&piece, 0..some.len(), dtype, op, Keep::Everything)?;
                piece.read(0, &mut data[some]);
            }
            Ok(())
        })
    }

    fn reduce_scatter(&mut self, input: &[u8], output: &mut [u8], dtype: DType, op: Op) -> Result<()> {
        self.call(|pair| pair.net.reduce_scatter(input, output, dtype, op))
    }

    fn all_gather(&mut self, input: &[u8], output: &mut [u8]) -> Result<()> {
        self.call(|pair| pair.net.all_gather(input, output))
    }

    fn broadcast(&mut self, data: &mut [u8], root: usize) -> Result<()> {
        self.call(|pair| pair.net.broadcast(data, root))
    }

    fn all_to_all(&mut self, input: &[u8], output: &mut [u8]) -> Result<()> {
        self.call(|pair| pair.net.all_to_all(input, output))
    }

    fn allocate_per_rank(&mut self, bytes: usize) -> Result<PerRank> {
        self.call(|pair| pair.shm.allocate_per_rank(bytes))
    }

    fn post(&mut self, buffers: &PerRank, bytes: Range<usize>, exchange: Posted) -> Result<Ticket> {
        self.latched(|gang| {
            exchange.check(buffers, &bytes, gang.world_size())?;
            gang.post(Work::Exchange { buffers: buffers.clone(), bytes, exchange })
        })
    }

    fn progress(&mut self) -> Result<()> {
        self.latched(|gang| gang.posts.wait_for(0))
    }

    fn pending(&self) -> usize {
        self.posts.pending()
    }

    fn wait(&mut self, ticket: Ticket) -> Result<()> {
        self.latched(|gang| gang.posts.wait_for(ticket.0))
    }

    fn finish(&mut self) -> Result<()> {
        self.latched(|gang| gang.posts.finish())
    }
}

impl SharedHost for HostCollective {
    fn local_rank(&self) -> usize {
        self.topology.place_of(self.rank)
    }
    fn local_size(&self) -> usize {
        self.topology.ranks_of(self.host()).len()
    }
    fn host(&self) -> usize {
        self.topology.host_of(self.rank)
    }

    fn size_of_host(&self, host: usize) -> usize {
        if host < self.topology.hosts() { self.topology.ranks_of(host).len() } else { 0 }
    }

    fn all_reduce_f64_of_host(&mut self, values: &mut [f64], op: Op) -> Result<()> {
        self.call(|pair| pair.shm.all_reduce_f64(values, op))
    }

    fn allocate_common(&mut self, bytes: usize) -> Result<Common> {
        self.call(|pair| pair.shm.allocate_common(bytes))
    }

    fn post_reduce(
        &mut self,
        buffers: &PerRank,
        bytes: Range<usize>,
        dtype: DType,
        op: Op,
        keep: Keep,
    ) -> Result<Ticket> {
        self.latched(|gang| {
            buffers.check(&bytes, dtype)?;
            gang.post(Work::Reduce { buffers: buffers.clone(), bytes, dtype, op, keep })
        })
    }

    fn post_gather_of_host(
        &mut self,
        buffers: &PerRank,
        bytes: Range<usize>,
        dtype: DType,
    ) -> Result<Ticket> {
        self.latched(|gang| {
            buffers.check(&bytes, dtype)?;
            gang.post(Work::GatherOfHost { buffers: buffers.clone(), bytes, dtype })
        })
    }

    fn post_gather(&mut self, gather: Gather<'_>) -> Result<Ticket> {
        self.latched(|gang| {
            gather.check(gang.rank, gang.world_size())?;
            let Gather { from: (from, at), into, parts } = gather;
            gang.post(Work::Gather { from: from.clone(), at, into: into.clone(), parts: parts.clone() })
        })
    }
}

impl Drop for HostCollective {
    /// What all have posted and nobody waits for any more is still done: the others would take it for a failure.
    fn drop(&mut self) {
        let (abort, rank) = (self.abort.clone(), self.rank);
        self.posts.finish_within(LINGER);
        self.posts.close(|| abort.abort(Abort::RankFailed(rank)));
    }
}
