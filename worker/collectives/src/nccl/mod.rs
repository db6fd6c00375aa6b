//! Exchanges between CUDA devices over NCCL: what is posted is done on a stream of its own behind what the device was asked for before, and is
//! waited for by looking, so that an error, a death or a deadline ends the wait.
//!
//! A communicator belongs to one generation of a gang. Rank 0 makes its id, which travels through the gang of the host, and so do the news that
//! NCCL has no words for: who died, who is late.

#![allow(unsafe_code)]

mod library;
#[cfg(target_os = "linux")]
mod loaded;
#[cfg(all(test, target_os = "linux"))]
mod tests;

pub use library::{Call, Group, Id, Library, Mark, Numbers};
#[cfg(target_os = "linux")]
pub use loaded::Loaded;

use crate::collective::{SharedHost, refuse};
use crate::error::{CollectiveError, Result};
use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// For so long a wait looks without a pause: an exchange inside a machine takes not much longer.
const EAGER: Duration = Duration::from_micros(200);
/// Between two looks after that.
const PAUSE: Duration = Duration::from_micros(50);
/// For so long a rank whose NCCL failed listens for the news of a death that explains it.
const LISTENING: Duration = Duration::from_millis(300);

/// One rank's communicators, with the gang of the host beside them.
pub struct NcclCollective {
    library: Box<dyn Library>,
    gang: Box<dyn SharedHost>,
    among: Among,
    deadline: Duration,
    /// Not yet waited for, oldest first.
    posted: VecDeque<Waiting>,
    posts: u64,
    failed: Option<CollectiveError>,
}

/// Who keeps a model together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Among {
    /// All ranks.
    All,
    /// Those of each host, of which all have as many.
    Hosts,
}

/// What is done on a range of numbers of which each rank that keeps the model together has a share of equal length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// Each of those ranks gives its share; all of them come to be everywhere.
    Gather,
    /// Each rank's share becomes the sum over all ranks of the gang.
    Reduce,
    /// The same over those that keep the model together.
    ReduceWithin,
}

impl Work {
    fn call(self) -> Call {
        match self {
            Work::Gather => Call::AllGather,
            Work::Reduce | Work::ReduceWithin => Call::ReduceScatter,
        }
    }
}

struct Waiting {
    number: u64,
    call: Call,
    mark: Mark,
}

/// A rank's place in a group.
#[derive(Clone, Copy)]
struct Place {
    group: Group,
    rank: usize,
    world: usize,
    /// Of the gang, the group's first.
    first: usize,
}

/// This rank's groups. Ranks are numbered host by host.
fn places(gang: &dyn SharedHost, among: Among) -> Result<Vec<Place>> {
    let (rank, world) = (gang.rank(), gang.world_size());
    let (local, here, host) = (gang.local_rank(), gang.local_size(), gang.host());
    if among == Among::All || here == world {
        return Ok(vec![Place { group: Group::Shards, rank, world, first: 0 }]);
    }
    debug_assert_eq!(rank, host * here + local);
    if !(0..world / here).all(|host| gang.size_of_host(host) == here) {
        let message = "each host has a replica of the model, and hosts have different numbers of ranks; give each node as many, or use \
                       strategy = \"fsdp\"";
        return Err(refuse("NCCL", message.into()));
    }
    Ok(vec![
        Place { group: Group::Shards, rank: local, world: here, first: host * here },
        Place { group: Group::Replicas, rank: host, world: world / here, first: local },
    ])
}

impl NcclCollective {
    /// Joins the ranks of `gang`, each with its `library` or with why it has none. No call waits longer than `deadline` for its peers. A
    /// collective call.
    pub fn join(
        library: std::result::Result<Box<dyn Library>, String>,
        mut gang: Box<dyn SharedHost>,
        among: Among,
        deadline: Duration,
    ) -> Result<NcclCollective> {
        let (rank, world) = (gang.rank(), gang.world_size());
        let places = places(&*gang, among)?;
        // Zeros where this rank is not a group's first, or has no library.
        let mut ids: Vec<Id> = vec![[0; size_of::<Id>()]; places.len()];
        let own = library.and_then(|mut library| {
            for (_, id) in places.iter().zip(&mut ids).filter(|(place, _)| place.first == rank) {
                *id = library.unique_id()?;
            }
            Ok(library)
        });
        let mut all = vec![[0u8; size_of::<Id>()]; world * places.len()];
        gang.all_gather(ids.as_flattened(), all.as_flattened_mut())?;
        // Who cannot come says so before the others wait for it.
        let mut without = [if own.is_err() { (world - rank) as f64 } else { 0.0 }];
        gang.all_reduce_f64(&mut without, crate::Op::Max)?;
        let library = own.map_err(|why| refuse("NCCL", why))?;
        if without[0] > 0.0 {
            let first = world - without[0] as usize;
            return Err(CollectiveError::Peer { rank: first, what: "has no NCCL; its log says why".into() });
        }
        let (posted, posts, failed) = (VecDeque::new(), 0, None);
        let mut joined = NcclCollective { library, gang, among, deadline, posted, posts, failed };
        for (number, Place { group, rank, world, first }) in places.iter().enumerate() {
            let id = &all[first * places.len() + number];
            joined.latched(|nccl| {
                nccl.library.connect(*group, id, *rank, *world).map_err(|why| refuse("NCCL", why))?;
                nccl.settle("connect")
            })?;
        }
        Ok(joined)
    }

    pub fn gang(&mut self) -> &mut dyn SharedHost {
        &mut *self.gang
    }

    /// Who keeps a model together.
    pub fn among(&self) -> Among {
        self.among
    }

    /// Starts to work in place on numbers of this device, behind everything that the device was asked for before on its default stream, and
    /// gives its number, from 1. Every rank makes the same calls in the same order with the same sizes.
    ///
    /// # Safety
    /// `numbers` are memory of the library's device that lives, and that nobody else uses, until the call was waited for or this is dropped.
    pub unsafe fn post(&mut self, work: Work, numbers: Numbers) -> Result<u64> {
        self.latched(|nccl| {
            let call = work.call();
            let (place, world) = match nccl.among {
                Among::All => (nccl.gang.rank(), nccl.gang.world_size()),
                Among::Hosts => (nccl.gang.local_rank(), nccl.gang.local_size()),
            };
            if !numbers.count.is_multiple_of(world) {
                let message = format!("{} numbers are not equal shares of {world} ranks", numbers.count);
                return Err(refuse(call.name(), message));
            }
            // SAFETY: the caller's promise.
            unsafe { nccl.start(Group::Shards, call, numbers) }?;
            if work == Work::Reduce && world < nccl.gang.world_size() {
                let count = numbers.count / world;
                let address = numbers.address + (place * count * numbers.dtype.size()) as u64;
                // SAFETY: a part of the same.
                unsafe {
                    nccl.start(Group::Replicas, Call::AllReduce, Numbers { address, count, ..numbers })
                }?;
            }
            let mark = nccl.library.mark().map_err(|why| nccl.broken(call.name(), &why))?;
            nccl.posts += 1;
            nccl.posted.push_back(Waiting { number: nccl.posts, call, mark });
            Ok(nccl.posts)
        })
    }

    /// # Safety
    /// As of `post`.
    unsafe fn start(&mut self, group: Group, call: Call, numbers: Numbers) -> Result<()> {
        // SAFETY: the caller's promise.
        let started = unsafe { self.library.start(group, call, numbers) };
        started.map_err(|why| self.broken(call.name(), &why))?;
        self.settle(call.name())
    }

    /// Returns when a posted call, and all before it, are done on the device.
    pub fn wait(&mut self, number: u64) -> Result<()> {
        while let Some(waiting) = self.posted.pop_front_if(|waiting| waiting.number <= number) {
            self.latched(|nccl| {
                nccl.look(waiting.call.name(), waiting.number, |library| library.reached(waiting.mark))
            })?;
        }
        match &self.failed {
            Some(error) => Err(error.clone()),
            None => Ok(()),
        }
    }

    /// Until NCCL has taken on what it was asked for last: only then may it be asked for more.
    fn settle(&mut self, operation: &'static str) -> Result<()> {
        self.look(operation, self.posts + 1, |_| Ok(true))
    }

    /// Looks until `done` and NCCL has nothing open.
    fn look(
        &mut self,
        operation: &'static str,
        number: u64,
        done: impl Fn(&mut dyn Library) -> std::result::Result<bool, String>,
    ) -> Result<()> {
        let began = Instant::now();
        loop {
            let settled = self.library.settled();
            let over = settled.and_then(|settled| Ok(settled && done(&mut *self.library)?));
            match over {
                Ok(true) => return Ok(()),
                Ok(false) => {}
                Err(why) => return Err(self.broken(operation, &why)),
            }
            self.gang.progress()?;
            let waited = began.elapsed();
            if waited > self.deadline {
                return Err(self.late(operation, number));
            }
            match waited < EAGER {
                true => std::thread::yield_now(),
                false => std::thread::sleep(PAUSE),
            }
        }
    }

    /// Why NCCL failed: the death of a rank where one is told of soon, else its own words.
    fn broken(&mut self, operation: &'static str, why: &str) -> CollectiveError {
        let began = Instant::now();
        while began.elapsed() < LISTENING {
            if let Err(told) = self.gang.progress() {
                return told;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        refuse(operation, format!("NCCL: {why}"))
    }

    /// Whom all wait for: the rank that does not come to a meeting of those whose deadline is over, too.
    fn late(&mut self, operation: &'static str, number: u64) -> CollectiveError {
        self.library.abort();
        self.gang.set_deadline((self.deadline / 4).max(Duration::from_secs(2)));
        match self.gang.barrier() {
            Err(named) => named,
            Ok(()) => refuse(
                operation,
                format!(
                    "call {number} over NCCL was not done within {:?}, though all ranks are there",
                    self.deadline
                ),
            ),
        }
    }

    /// Runs one call: an error stays, and takes the communicator along.
    fn latched<T>(&mut self, call: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        let result = call(self);
        if let Err(error) = &result {
            self.failed = Some(error.clone());
            self.library.abort();
        }
        result
    }
}

impl Drop for NcclCollective {
    /// What is on its way uses memory that its owner may give back afterwards.
    fn drop(&mut self) {
        if !self.posted.is_empty() {
            self.library.abort();
        }
    }
}
