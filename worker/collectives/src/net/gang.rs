//! A rank's end of a connected gang. Blocking calls are carried out by the thread that makes them, posted ones by a thread of the gang's own,
//! one after the other.

use super::calls::keep_own;
use super::driver::{Driver, Job, Stop};
use super::links::{Links, Wake};
use super::posted::{Posting, Shared};
use super::rendezvous::Rendezvous;
use crate::abort::Abort;
use crate::algorithm::{Operation, Plan, Topology, Work};
use crate::call::{Call, Signature};
use crate::collective::{Parts, Posted, Ticket};
use crate::cost::Chooser;
use crate::dtype::{DType, Op};
use crate::error::{CollectiveError, Result};
use crate::memory::{Claim, Common, PerRank};
use crate::posts::Posts;
use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

const DEADLINE: Duration = Duration::from_secs(60);
/// Plans that are kept. A training step has a few per block.
const PLANS_MAX: usize = 1024;

/// Collectives over connections between processes and hosts.
pub struct NetCollective {
    pub(super) shared: Arc<Shared>,
    topology: Arc<Topology>,
    pub(super) rank: usize,
    pub(super) generation: u64,
    pub(super) deadline: Duration,
    /// Calls made, blocking and posted.
    sequence: u64,
    pub(super) posts: Posts<Posting>,
    /// Names the next registered buffer; the same on every rank.
    pub(super) next_buffer: u64,
    chooser: Chooser,
    plans: HashMap<(Operation, usize, Cut), Arc<Plan>>,
    pub(super) scratch: Vec<u8>,
    failed: Option<CollectiveError>,
}

/// How a buffer is cut among the ranks.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Cut {
    /// Into equal parts.
    Even,
    /// Into `part`s of elements of so many bytes.
    Parts(usize),
    /// Into `part`s on each host, to be reduced over the hosts.
    Hosts(usize),
    /// Into these, where the ranks of a host share memory.
    Shards(Parts),
}

/// Aborts a gang from another thread.
#[derive(Clone)]
pub struct NetAbortHandle(Arc<Shared>);

impl NetAbortHandle {
    /// Ends the calls of this rank, which tells the others. The first reason stays.
    pub fn abort(&self, abort: Abort) {
        self.0.abort(abort);
    }
}

impl NetCollective {
    pub(super) fn new(
        links: Box<dyn Links>,
        waker: Arc<dyn Wake>,
        rendezvous: &Rendezvous,
        stop: Stop,
    ) -> NetCollective {
        let topology = Arc::new(rendezvous.topology());
        let (rank, generation) = (rendezvous.rank, rendezvous.generation);
        let driver = Driver::new(links, rank, topology.world(), generation, stop.clone());
        let shared = Shared::new(driver, stop, waker);
        NetCollective {
            shared: Arc::new(shared),
            chooser: Chooser::new(topology.clone()),
            topology,
            rank,
            generation,
            deadline: DEADLINE,
            sequence: 0,
            posts: Posts::new(),
            next_buffer: 0,
            plans: HashMap::new(),
            scratch: Vec::new(),
            failed: None,
        }
    }

    pub fn topology(&self) -> &Topology {
        &self.topology
    }

    pub fn abort_handle(&self) -> NetAbortHandle {
        NetAbortHandle(self.shared.clone())
    }

    /// Runs one call: nothing after an error, and an error stays, here and for the peers.
    pub(super) fn latched<T>(&mut self, call: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        let result = match self.shared.stop.load(SeqCst) {
            0 => call(self),
            word => Err(Abort::of(word).into()),
        };
        if let Err(error) = &result {
            self.failed = Some(error.clone());
            let (shared, abort) = (self.shared.clone(), Abort::for_error(error, self.rank));
            self.posts.close(|| shared.abort(abort));
            // Where a call has failed among the peers, they have heard it.
            self.shared.driver().fail(Abort::for_error(error, self.rank));
        }
        result
    }

    pub(super) fn world(&self) -> usize {
        self.topology.world()
    }

    fn signature(&self, call: Call, bytes: usize, place: u64) -> Signature {
        Signature { sequence: self.sequence, word: call.word(), bytes: bytes as u64, place }
    }

    fn plan(&mut self, operation: Operation, bytes: usize, cut: Cut) -> Arc<Plan> {
        let key = (operation, bytes, cut);
        if let Some(plan) = self.plans.get(&key) {
            return plan.clone();
        }
        let (world, size) = (self.world(), operation.reduction().map_or(1, |(dtype, _)| dtype.size()));
        let work = match &key.2 {
            Cut::Even => Work::in_equal_parts(operation, bytes, world),
            Cut::Parts(size) | Cut::Hosts(size) => Work::by_part(operation, bytes, *size, world),
            Cut::Shards(parts) => Work { operation, bytes, parts: parts.to_vec() },
        };
        let steps = match &key.2 {
            Cut::Shards(parts) => {
                let algorithm = self.chooser.across(&work);
                crate::algorithm::shards_across(algorithm, operation, &self.topology, self.rank, parts)
            }
            Cut::Hosts(_) if operation == Operation::Barrier => {
                crate::algorithm::barrier_of_hosts(&self.topology, self.rank)
            }
            Cut::Hosts(_) => {
                let algorithm = self.chooser.across(&work);
                crate::algorithm::across(algorithm, &work, size, &self.topology, self.rank)
            }
            _ => {
                let algorithm = self.chooser.choose(&work);
                crate::algorithm::steps(algorithm, &work, &self.topology, self.rank)
            }
        };
        let plan = Arc::new(Plan::new(steps));
        if self.plans.len() >= PLANS_MAX {
            self.plans.clear();
        }
        self.plans.insert(key, plan.clone());
        plan
    }

    /// A blocking call in place.
    pub(super) fn call(
        &mut self,
        call: Call,
        operation: Operation,
        cut: Cut,
        buffer: &mut [u8],
    ) -> Result<()> {
        self.posts.finish()?;
        self.sequence += 1;
        let plan = self.plan(operation, buffer.len(), cut);
        let signature = self.signature(call, buffer.len(), 0);
        let job = Job { plan: &plan, reduction: operation.reduction(), signature, deadline: self.deadline };
        self.shared.driver().run(&job, buffer)
    }

    /// Carries out at once, in place, what may also be posted. All ranks call the range `place`.
    fn now(&mut self, claim: Claim, call: Call, operation: Operation, cut: Cut, place: u64) -> Result<()> {
        self.posts.finish()?;
        let posting = self.posting(claim, call, operation, cut, place);
        self.shared.carry_out(posting)
    }

    fn posting(&mut self, claim: Claim, call: Call, operation: Operation, cut: Cut, place: u64) -> Posting {
        self.sequence += 1;
        let plan = self.plan(operation, claim.len(), cut);
        let signature = self.signature(call, claim.len(), place);
        Posting { plan, reduction: operation.reduction(), signature, deadline: self.deadline, claim }
    }

    /// Reduces over all hosts what the ranks of each host have reduced among themselves: each its `part` among the ranks of its host. The other
    /// parts of `bytes` are left alone.
    pub(crate) fn reduce_across(
        &mut self,
        buffers: &PerRank,
        bytes: Range<usize>,
        dtype: DType,
        op: Op,
    ) -> Result<()> {
        self.latched(|gang| {
            buffers.check(&bytes, dtype)?;
            let (call, operation) = (Call::AllReduce(dtype, op), Operation::AllReduce(dtype, op));
            let place = bytes.start as u64;
            gang.now(buffers.claim(bytes), call, operation, Cut::Hosts(dtype.size()), place)
        })
    }

    /// As `reduce_across`, for what `carried` names: each rank gets the sum over all hosts of its one of `parts`, which are counted from
    /// `bytes.start` on.
    pub(crate) fn reduce_shards_across(
        &mut self,
        buffers: &PerRank,
        bytes: Range<usize>,
        parts: &Parts,
        dtype: DType,
        op: Op,
    ) -> Result<()> {
        self.latched(|gang| {
            buffers.check(&bytes, dtype)?;
            let (call, operation) = (Call::ReduceScatter(dtype, op), Operation::ReduceScatter(dtype, op));
            let place = bytes.start as u64;
            gang.now(buffers.claim(bytes), call, operation, Cut::Shards(parts.clone()), place)
        })
    }

    /// Collects `parts`, of which each rank has its own in place, into the memory of each host: this rank what it carries.
    pub(crate) fn gather_across(&mut self, into: &Common, parts: &Parts) -> Result<()> {
        self.latched(|gang| {
            let (Some(first), Some(last)) = (parts.first(), parts.last()) else { return Ok(()) };
            let whole = first.start..last.end;
            let parts = parts.iter().map(|part| part.start - whole.start..part.end - whole.start).collect();
            let place = whole.start as u64;
            gang.now(into.claim(whole), Call::Gather, Operation::AllGather, Cut::Shards(parts), place)
        })
    }

    /// What this rank carries of `parts` on its host.
    pub(crate) fn carried(&self, parts: &Parts) -> Vec<Range<usize>> {
        crate::algorithm::carried_by(&self.topology, self.rank, parts)
    }

    /// `Exchange::post` of a buffer whose range all ranks call `place`.
    pub(super) fn post_at(
        &mut self,
        buffers: &PerRank,
        bytes: Range<usize>,
        exchange: Posted,
        place: u64,
    ) -> Result<Ticket> {
        self.latched(|gang| {
            let (claim, cut) = gang.claimed(buffers, bytes, exchange)?;
            let posting = gang.posting(claim, exchange.call(), exchange.into(), cut, place);
            let shared = gang.shared.clone();
            gang.posts.post(posting, || move |posting| shared.carry_out(posting))
        })
    }

    /// The same, at once.
    pub(crate) fn exchange_at(
        &mut self,
        buffers: &PerRank,
        bytes: Range<usize>,
        exchange: Posted,
        place: u64,
    ) -> Result<()> {
        self.latched(|gang| {
            let (claim, cut) = gang.claimed(buffers, bytes, exchange)?;
            gang.now(claim, exchange.call(), exchange.into(), cut, place)
        })
    }

    fn claimed(&self, buffers: &PerRank, bytes: Range<usize>, exchange: Posted) -> Result<(Claim, Cut)> {
        exchange.check(buffers, &bytes, self.world())?;
        let cut = match exchange {
            Posted::AllReduce(dtype, _) | Posted::ReduceScatter(dtype, _) | Posted::AllGather(dtype) => {
                Cut::Parts(dtype.size())
            }
            Posted::Broadcast { .. } | Posted::AllToAll => Cut::Even,
        };
        let mut claim = buffers.claim(bytes);
        if exchange == Posted::AllToAll {
            keep_own(claim.bytes(), self.rank, self.world());
        }
        Ok((claim, cut))
    }

    /// The first ranks of all hosts meet; the others only count the call.
    pub(crate) fn barrier_of_hosts(&mut self) -> Result<()> {
        self.latched(|gang| gang.call(Call::Barrier, Operation::Barrier, Cut::Hosts(1), &mut [0]))
    }
}

impl Drop for NetCollective {
    fn drop(&mut self) {
        let (shared, abort) = (self.shared.clone(), Abort::RankFailed(self.rank));
        self.posts.close(|| shared.abort(abort));
        if self.failed.is_none() && !self.posts.has_failed() {
            self.shared.driver().leave();
        }
    }
}
