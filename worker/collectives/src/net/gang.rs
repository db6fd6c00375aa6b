//! A rank's end of a connected gang. Blocking calls are carried out by the thread that makes them, posted ones by a thread of the gang's own,
//! one after the other.

use super::driver::{Driver, Job, Stop};
use super::links::{Links, Wake};
use super::rendezvous::Rendezvous;
use crate::abort::Abort;
use crate::algorithm::{Operation, Plan, Topology, Work};
use crate::call::{Call, Signature};
use crate::collective::{Activity, Exchange, Gang, Posted, Ticket, refuse, through_bytes};
use crate::cost::Chooser;
use crate::dtype::{DType, Op};
use crate::error::{CollectiveError, Result};
use crate::memory::{Claim, PerRank};
use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

const DEADLINE: Duration = Duration::from_secs(60);
/// Posted exchanges in flight; beyond it `post` waits.
const POSTS_MAX: usize = 256;
/// Plans that are kept. A training step has a few per block.
const PLANS_MAX: usize = 1024;

/// Collectives over connections between processes and hosts.
pub struct NetCollective {
    shared: Arc<Shared>,
    topology: Arc<Topology>,
    rank: usize,
    generation: u64,
    deadline: Duration,
    /// Calls made, blocking and posted.
    sequence: u64,
    posts: u64,
    /// Names the next registered buffer; the same on every rank.
    next_buffer: u64,
    chooser: Chooser,
    plans: HashMap<(Operation, usize, Cut), Arc<Plan>>,
    scratch: Vec<u8>,
    worker: Option<JoinHandle<()>>,
    failed: Option<CollectiveError>,
}

/// How a buffer is cut among the ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Cut {
    /// Into equal parts.
    Even,
    /// Into `part`s of elements of so many bytes.
    Parts(usize),
    /// Into `part`s on each host, to be reduced over the hosts.
    Hosts(usize),
}

struct Shared {
    driver: Mutex<Driver>,
    queue: Mutex<Queue>,
    changed: Condvar,
    stop: Stop,
    waker: Arc<dyn Wake>,
}

#[derive(Default)]
struct Queue {
    waiting: VecDeque<Posting>,
    /// Number of the last that is over.
    done: u64,
    failed: Option<CollectiveError>,
    closed: bool,
}

struct Posting {
    plan: Arc<Plan>,
    reduction: Option<(DType, Op)>,
    signature: Signature,
    deadline: Duration,
    claim: Claim,
}

/// Aborts a gang from another thread.
#[derive(Clone)]
pub struct NetAbortHandle(Arc<Shared>);

impl NetAbortHandle {
    /// Ends the calls of this rank, which tells the others. The first reason stays.
    pub fn abort(&self, abort: Abort) {
        let _ = self.0.stop.compare_exchange(0, abort.word(), SeqCst, SeqCst);
        self.0.waker.wake();
    }
}

impl Shared {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn driver(&self) -> MutexGuard<'_, Driver> {
        self.driver.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `number` posts are over, or one has failed.
    fn wait_for(&self, number: u64) -> Result<()> {
        let mut queue = self.queue();
        loop {
            if let Some(error) = &queue.failed {
                return Err(error.clone());
            }
            if queue.done >= number {
                return Ok(());
            }
            queue = self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// The gang's own thread.
    fn work_off(&self) {
        let mut queue = self.queue();
        loop {
            let Some(mut posting) = queue.waiting.pop_front() else {
                if queue.closed {
                    return;
                }
                queue = self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            drop(queue);
            let Posting { ref plan, reduction, signature, deadline, .. } = posting;
            let job = Job { plan, reduction, signature, deadline };
            let result = self.driver().run(&job, posting.claim.bytes());
            queue = self.queue();
            match result {
                Ok(()) => queue.done += 1,
                Err(error) => {
                    queue.failed = Some(error);
                    queue.waiting.clear();
                    queue.closed = true;
                }
            }
            self.changed.notify_all();
        }
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
        let shared = Shared {
            driver: Mutex::new(driver),
            queue: Mutex::default(),
            changed: Condvar::new(),
            stop,
            waker,
        };
        NetCollective {
            shared: Arc::new(shared),
            chooser: Chooser::new(topology.clone()),
            topology,
            rank,
            generation,
            deadline: DEADLINE,
            sequence: 0,
            posts: 0,
            next_buffer: 0,
            plans: HashMap::new(),
            scratch: Vec::new(),
            worker: None,
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
    fn latched<T>(&mut self, call: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        let result = match self.shared.stop.load(SeqCst) {
            0 => call(self),
            word => Err(Abort::of(word).into()),
        };
        if let Err(error) = &result {
            self.failed = Some(error.clone());
            self.stop_worker(Abort::for_error(error, self.rank));
            let signature = self.signature(Call::Barrier, 0, 0);
            // Where a call has failed among the peers, they have heard it.
            self.shared.driver().fail(signature, Abort::for_error(error, self.rank));
        }
        result
    }

    fn world(&self) -> usize {
        self.topology.world()
    }

    fn signature(&self, call: Call, bytes: usize, place: u64) -> Signature {
        Signature { sequence: self.sequence, word: call.word(), bytes: bytes as u64, place }
    }

    fn plan(&mut self, operation: Operation, bytes: usize, cut: Cut) -> Arc<Plan> {
        if let Some(plan) = self.plans.get(&(operation, bytes, cut)) {
            return plan.clone();
        }
        let (world, size) = (self.world(), operation.reduction().map_or(1, |(dtype, _)| dtype.size()));
        let work = match cut {
            Cut::Even => Work::in_equal_parts(operation, bytes, world),
            Cut::Parts(size) => Work::by_part(operation, bytes, size, world),
            Cut::Hosts(size) => Work::by_part(operation, bytes, size, world),
        };
        let steps = match cut {
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
        self.plans.insert((operation, bytes, cut), plan.clone());
        plan
    }

    /// A blocking call in place.
    fn call(&mut self, call: Call, operation: Operation, cut: Cut, buffer: &mut [u8]) -> Result<()> {
        self.shared.wait_for(self.posts)?;
        self.sequence += 1;
        let plan = self.plan(operation, buffer.len(), cut);
        let signature = self.signature(call, buffer.len(), 0);
        let job = Job { plan: &plan, reduction: operation.reduction(), signature, deadline: self.deadline };
        self.shared.driver().run(&job, buffer)
    }

    /// Hands a range of this rank's buffer to the gang's own thread.
    fn post_work(
        &mut self,
        claim: Claim,
        call: Call,
        operation: Operation,
        cut: Cut,
        place: u64,
    ) -> Result<Ticket> {
        if let Some(oldest) = (self.posts + 1).checked_sub(POSTS_MAX as u64) {
            self.shared.wait_for(oldest)?;
        }
        self.sequence += 1;
        self.posts += 1;
        let plan = self.plan(operation, claim.len(), cut);
        let signature = self.signature(call, claim.len(), place);
        let posting =
            Posting { plan, reduction: operation.reduction(), signature, deadline: self.deadline, claim };
        if self.worker.is_none() {
            let shared = self.shared.clone();
            let worker =
                std::thread::Builder::new().name("fleet-net".into()).spawn(move || shared.work_off());
            self.worker = Some(worker.map_err(super::rendezvous::failed("cannot start a thread"))?);
        }
        self.shared.queue().waiting.push_back(posting);
        self.shared.changed.notify_all();
        Ok(Ticket(self.posts))
    }

    /// Starts the reduction over all hosts of what the ranks of each host have reduced among themselves: each its `part` among the ranks of
    /// its host. The other parts of `bytes` are left alone.
    pub(crate) fn post_across(
        &mut self,
        buffers: &PerRank,
        bytes: Range<usize>,
        dtype: DType,
        op: Op,
    ) -> Result<Ticket> {
        self.latched(|gang| {
            buffers.check(&bytes, dtype)?;
            let (call, operation) = (Call::AllReduce(dtype, op), Operation::AllReduce(dtype, op));
            let place = bytes.start as u64;
            gang.post_work(buffers.claim(bytes), call, operation, Cut::Hosts(dtype.size()), place)
        })
    }

    /// `Exchange::post` of a buffer whose range all ranks call `place`.
    pub(crate) fn post_at(
        &mut self,
        buffers: &PerRank,
        bytes: Range<usize>,
        exchange: Posted,
        place: u64,
    ) -> Result<Ticket> {
        self.latched(|gang| {
            exchange.check(buffers, &bytes, gang.world())?;
            let cut = match exchange {
                Posted::AllReduce(dtype, _) | Posted::ReduceScatter(dtype, _) | Posted::AllGather(dtype) => {
                    Cut::Parts(dtype.size())
                }
                Posted::Broadcast { .. } | Posted::AllToAll => Cut::Even,
            };
            let mut claim = buffers.claim(bytes);
            if exchange == Posted::AllToAll {
                keep_own(claim.bytes(), gang.rank, gang.world());
            }
            gang.post_work(claim, exchange.call(), exchange.into(), cut, place)
        })
    }

    /// The first ranks of all hosts meet; the others only count the call.
    pub(crate) fn barrier_of_hosts(&mut self) -> Result<()> {
        self.latched(|gang| gang.call(Call::Barrier, Operation::Barrier, Cut::Hosts(1), &mut [0]))
    }

    fn stop_worker(&mut self, abort: Abort) {
        let Some(worker) = self.worker.take() else { return };
        {
            let mut queue = self.shared.queue();
            queue.closed = true;
            queue.waiting.clear();
            if queue.done < self.posts && queue.failed.is_none() {
                let _ = self.shared.stop.compare_exchange(0, abort.word(), SeqCst, SeqCst);
            }
        }
        self.shared.changed.notify_all();
        self.shared.waker.wake();
        let _ = worker.join();
    }
}

impl Drop for NetCollective {
    fn drop(&mut self) {
        self.stop_worker(Abort::RankFailed(self.rank));
        let failed = self.failed.is_some() || self.shared.queue().failed.is_some();
        if !failed {
            self.sequence += 1;
            let signature = self.signature(Call::Barrier, 0, 0);
            self.shared.driver().leave(signature);
        }
    }
}

fn expect_whole(operation: &'static str, bytes: usize, dtype: DType) -> Result<()> {
    if bytes.is_multiple_of(dtype.size()) {
        return Ok(());
    }
    Err(refuse(operation, format!("{bytes} bytes are not whole {dtype} elements")))
}

impl Gang for NetCollective {
    fn rank(&self) -> usize {
        self.rank
    }
    fn world_size(&self) -> usize {
        self.world()
    }
    fn generation(&self) -> u64 {
        self.generation
    }
    fn set_deadline(&mut self, deadline: Duration) {
        self.deadline = deadline;
    }
    fn note(&mut self, _activity: Activity) {}
    fn begin_step(&mut self, _step: u64, _last: Option<Duration>) {}

    fn barrier(&mut self) -> Result<()> {
        self.latched(|gang| gang.call(Call::Barrier, Operation::Barrier, Cut::Even, &mut [0]))
    }

    fn all_reduce_f64(&mut self, values: &mut [f64], op: Op) -> Result<()> {
        through_bytes(values, |bytes| self.all_reduce(bytes, DType::F64, op))
    }
}

impl Exchange for NetCollective {
    fn all_reduce(&mut self, data: &mut [u8], dtype: DType, op: Op) -> Result<()> {
        self.latched(|gang| {
            expect_whole("all_reduce", data.len(), dtype)?;
            let operation = Operation::AllReduce(dtype, op);
            gang.call(Call::AllReduce(dtype, op), operation, Cut::Parts(dtype.size()), data)
        })
    }

    fn reduce_scatter(&mut self, input: &[u8], output: &mut [u8], dtype: DType, op: Op) -> Result<()> {
        self.latched(|gang| {
            let (bytes, world) = (output.len(), gang.world());
            expect_whole("reduce_scatter", bytes, dtype)?;
            if input.len() != bytes * world {
                let message = format!("{} bytes are not {world} parts of {bytes}", input.len());
                return Err(refuse("reduce_scatter", message));
            }
            let mut scratch = std::mem::take(&mut gang.scratch);
            scratch.clear();
            scratch.extend_from_slice(input);
            let operation = Operation::ReduceScatter(dtype, op);
            gang.call(Call::ReduceScatter(dtype, op), operation, Cut::Even, &mut scratch)?;
            output.copy_from_slice(&scratch[gang.rank * bytes..(gang.rank + 1) * bytes]);
            gang.scratch = scratch;
            Ok(())
        })
    }

    fn all_gather(&mut self, input: &[u8], output: &mut [u8]) -> Result<()> {
        self.latched(|gang| {
            let (bytes, world) = (input.len(), gang.world());
            if output.len() != bytes * world {
                let message = format!("{} bytes are not room for {world} parts of {bytes}", output.len());
                return Err(refuse("all_gather", message));
            }
            output[gang.rank * bytes..(gang.rank + 1) * bytes].copy_from_slice(input);
            gang.call(Call::AllGather(DType::U8), Operation::AllGather, Cut::Even, output)
        })
    }

    fn broadcast(&mut self, data: &mut [u8], root: usize) -> Result<()> {
        self.latched(|gang| {
            if root >= gang.world() {
                return Err(refuse("broadcast", format!("there is no rank {root} of {}", gang.world())));
            }
            gang.call(Call::Broadcast { root }, Operation::Broadcast { root }, Cut::Even, data)
        })
    }

    fn all_to_all(&mut self, input: &[u8], output: &mut [u8]) -> Result<()> {
        self.latched(|gang| {
            let (total, world) = (input.len(), gang.world());
            if output.len() != total || !total.is_multiple_of(world) {
                let message =
                    format!("input of {total} and output of {} bytes, not {world} parts each", output.len());
                return Err(refuse("all_to_all", message));
            }
            let mut scratch = std::mem::take(&mut gang.scratch);
            scratch.clear();
            scratch.extend_from_slice(input);
            scratch.resize(2 * total, 0);
            keep_own(&mut scratch, gang.rank, world);
            gang.call(Call::AllToAll, Operation::AllToAll, Cut::Even, &mut scratch)?;
            output.copy_from_slice(&scratch[total..]);
            gang.scratch = scratch;
            Ok(())
        })
    }

    fn allocate_per_rank(&mut self, bytes: usize) -> Result<PerRank> {
        let buffer = PerRank::registered(bytes, self.next_buffer)?;
        // Ranges of two buffers are never the same place.
        self.next_buffer += (bytes as u64 + 1).next_multiple_of(64);
        Ok(buffer)
    }

    fn post(&mut self, buffers: &PerRank, bytes: Range<usize>, exchange: Posted) -> Result<Ticket> {
        let place = buffers.id + bytes.start as u64;
        self.post_at(buffers, bytes, exchange, place)
    }

    fn progress(&mut self) -> Result<()> {
        self.latched(|gang| gang.shared.wait_for(0))
    }

    fn wait(&mut self, ticket: Ticket) -> Result<()> {
        self.latched(|gang| gang.shared.wait_for(ticket.0))
    }

    fn finish(&mut self) -> Result<()> {
        self.latched(|gang| gang.shared.wait_for(gang.posts))
    }
}

/// The part that a rank sends to itself, from the input half to the output half.
fn keep_own(buffer: &mut [u8], rank: usize, world: usize) {
    let half = buffer.len() / 2;
    let size = half / world;
    buffer.copy_within(rank * size..(rank + 1) * size, half + rank * size);
}
