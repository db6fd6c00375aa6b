//! The logic of exchanges over NCCL against a double of the library: ranks are threads, devices are memory of the host.

#![allow(clippy::unwrap_used)] // helpers of tests may panic
#![allow(unsafe_code)]

use super::*;
use crate::abort::Abort;
use crate::shm::{Segment, ShmCollective};
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex};

type Said<T> = std::result::Result<T, String>;

const LONG: Duration = Duration::from_secs(120);
const SHORT: Duration = Duration::from_millis(300);

/// What the doubles of all ranks share: for each exchange who has started it, with which memory.
#[derive(Default)]
struct World {
    started: Vec<Vec<(usize, Call, Numbers)>>,
    done: usize,
}

/// A rank's communicator. An exchange happens when its last rank has started it.
struct Double {
    world: Arc<Mutex<World>>,
    rank: usize,
    size: usize,
    /// Exchanges that this rank started.
    starts: usize,
    /// Until NCCL has taken on what it was asked for.
    looks: usize,
    /// From this exchange on NCCL fails.
    fails_at: usize,
    log: Arc<Mutex<Vec<String>>>,
}

impl Double {
    fn say(&self, what: String) {
        self.log.lock().unwrap().push(what);
    }
}

/// Carries out an exchange over the memory of all ranks.
fn carry_out(of: &[(usize, Call, Numbers)]) {
    let size = of.len();
    let mut ranks = of.to_vec();
    ranks.sort_by_key(|(rank, ..)| *rank);
    // SAFETY: each rank's memory is alive while it waits, and all of them wait.
    let mut all: Vec<&mut [f32]> = (ranks.iter())
        .map(|(.., n)| unsafe { std::slice::from_raw_parts_mut(n.address as *mut f32, n.count) })
        .collect();
    let share = all[0].len() / size;
    for rank in 0..size {
        for at in rank * share..(rank + 1) * share {
            match ranks[0].1 {
                Call::AllGather => {
                    let number = all[rank][at];
                    all.iter_mut().for_each(|numbers| numbers[at] = number);
                }
                Call::ReduceScatter => all[rank][at] = all.iter().map(|numbers| numbers[at]).sum(),
            }
        }
    }
}

impl Library for Double {
    fn unique_id(&mut self) -> Said<Id> {
        Ok([7; 128])
    }
    fn connect(&mut self, id: &Id, rank: usize, world: usize) -> Said<()> {
        assert_eq!((id, rank, world), (&[7; 128], self.rank, self.size));
        self.looks = 3;
        Ok(())
    }
    fn settled(&mut self) -> Said<bool> {
        if self.starts >= self.fails_at {
            return Err("remote process exited or there was a network error".into());
        }
        self.looks = self.looks.saturating_sub(1);
        Ok(self.looks == 0)
    }
    unsafe fn start(&mut self, call: Call, numbers: Numbers) -> Said<()> {
        assert_eq!(self.looks, 0, "NCCL is asked for more only when it has taken on what it was asked for");
        self.say(format!("start {} of {}", call.name(), numbers.count));
        let mut world = self.world.lock().unwrap();
        if world.started.len() == self.starts {
            world.started.push(Vec::new());
        }
        world.started[self.starts].push((self.rank, call, numbers));
        if world.started[self.starts].len() == self.size {
            carry_out(&world.started[self.starts]);
            world.done += 1;
        }
        self.starts += 1;
        self.looks = 2;
        Ok(())
    }
    fn mark(&mut self) -> Said<Mark> {
        assert_eq!(self.looks, 0, "a mark behind what is not yet on the stream marks nothing");
        self.say(format!("mark {}", self.starts));
        Ok(Mark(self.starts as u64))
    }
    fn reached(&mut self, mark: Mark) -> Said<bool> {
        Ok(self.world.lock().unwrap().done as u64 >= mark.0)
    }
    fn abort(&mut self) {
        self.say("abort".into());
    }
}

type Log = Arc<Mutex<Vec<String>>>;

/// Ranks as threads. `fails_at` gives for each rank the exchange from which on its NCCL fails.
fn ranks<T: Send>(
    size: usize,
    deadline: Duration,
    fails_at: impl Fn(usize) -> usize,
    run: impl Fn(usize, NcclCollective, Log, &Segment) -> T + Sync,
) -> Vec<T> {
    let segment = Segment::create(size, 1).unwrap();
    let world = Arc::new(Mutex::new(World::default()));
    std::thread::scope(|scope| {
        let ranks: Vec<_> = (0..size)
            .map(|rank| {
                let log = Log::default();
                let double = Double {
                    world: world.clone(),
                    rank,
                    size,
                    starts: 0,
                    looks: 0,
                    fails_at: fails_at(rank),
                    log: log.clone(),
                };
                let (segment, run) = (&segment, &run);
                scope.spawn(move || {
                    let gang = ShmCollective::attach(segment.fd().as_raw_fd(), rank, size, 1).unwrap();
                    let nccl = NcclCollective::join(Ok(Box::new(double)), Box::new(gang), deadline).unwrap();
                    run(rank, nccl, log, segment)
                })
            })
            .collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

fn never(_rank: usize) -> usize {
    usize::MAX
}

fn post(nccl: &mut NcclCollective, call: Call, memory: &mut [f32]) -> crate::Result<u64> {
    let numbers =
        Numbers { address: memory.as_mut_ptr() as u64, count: memory.len(), dtype: crate::DType::F32 };
    // SAFETY: each test keeps its memory until it has waited, or until its communicator is gone.
    unsafe { nccl.post(call, numbers) }
}

#[test]
fn exchanges_are_done_in_the_order_in_which_they_were_posted() {
    let all = ranks(3, LONG, never, |rank, mut nccl, log, _| {
        let mut sums: Vec<f32> = (0..6).map(|at| (at + 10 * rank) as f32).collect();
        let mut gathered = vec![0.0; 3];
        gathered[rank] = rank as f32 + 1.0;
        let first = post(&mut nccl, Call::ReduceScatter, &mut sums).unwrap();
        let second = post(&mut nccl, Call::AllGather, &mut gathered).unwrap();
        assert_eq!((first, second), (1, 2));
        nccl.wait(second).unwrap();
        nccl.wait(first).unwrap();
        drop(nccl);
        let log = log.lock().unwrap().clone();
        assert_eq!(log, ["start reduce_scatter of 6", "mark 1", "start all_gather of 3", "mark 2"]);
        (sums[2 * rank..2 * rank + 2].to_vec(), gathered)
    });
    for (rank, (sums, gathered)) in all.into_iter().enumerate() {
        let first = (3 * 2 * rank + 30) as f32;
        assert_eq!((sums, gathered), (vec![first, first + 3.0], vec![1.0, 2.0, 3.0]));
    }
}

#[test]
fn what_is_not_waited_for_is_ended_before_its_memory_goes() {
    ranks(2, LONG, never, |rank, mut nccl, log, _| {
        if rank == 0 {
            let mut memory = [0.0; 2];
            post(&mut nccl, Call::AllGather, &mut memory).unwrap();
            drop(nccl);
            assert_eq!(log.lock().unwrap().last().unwrap(), "abort");
        }
    });
}

#[test]
fn unequal_shares_are_refused() {
    ranks(2, LONG, never, |_, mut nccl, _, _| {
        let error = post(&mut nccl, Call::AllGather, &mut [0.0; 3]).unwrap_err().to_string();
        assert!(error.contains("equal shares"), "{error}");
    });
}

#[test]
fn who_does_not_come_until_the_deadline_is_named_and_communicators_are_aborted() {
    let barrier = std::sync::Barrier::new(3);
    ranks(3, SHORT, never, |rank, mut nccl, log, _| {
        if rank == 1 {
            // It is somewhere else for as long as the others wait.
            barrier.wait();
            return;
        }
        let mut memory = [0.0; 3];
        let number = post(&mut nccl, Call::AllGather, &mut memory).unwrap();
        let error = nccl.wait(number).unwrap_err();
        assert_eq!(error.culprit(), Some(1), "{error}");
        assert_eq!(log.lock().unwrap().last().unwrap(), "abort");
        assert_eq!(post(&mut nccl, Call::AllGather, &mut memory).unwrap_err().to_string(), error.to_string());
        barrier.wait();
    });
}

#[test]
fn news_of_a_death_end_a_wait_at_once() {
    let began = Instant::now();
    ranks(2, LONG, never, |rank, mut nccl, log, segment| {
        if rank == 1 {
            // The agent, which saw its process end.
            segment.abort(Abort::RankDied(1));
            return;
        }
        let mut memory = [0.0; 2];
        let error =
            post(&mut nccl, Call::AllGather, &mut memory).and_then(|number| nccl.wait(number)).unwrap_err();
        assert_eq!(error.to_string(), "aborted: rank 1 died");
        assert_eq!(log.lock().unwrap().last().unwrap(), "abort");
    });
    assert!(began.elapsed() < LONG / 2);
}

#[test]
fn what_fails_in_nccl_is_told_in_its_words_unless_a_death_explains_it() {
    for died in [false, true] {
        ranks(
            1,
            LONG,
            |_| 1,
            |_, mut nccl, log, segment| {
                if died {
                    segment.abort(Abort::RankDied(0));
                }
                let error = post(&mut nccl, Call::AllGather, &mut [0.0]).unwrap_err().to_string();
                let wanted = if died { "rank 0 died" } else { "all_gather: NCCL: remote process exited" };
                assert!(error.contains(wanted), "{error}");
                assert_eq!(log.lock().unwrap().last().unwrap(), "abort");
            },
        );
    }
}

#[test]
fn a_rank_without_the_library_is_named_by_the_others() {
    let segment = Segment::create(2, 1).unwrap();
    let world = Arc::new(Mutex::new(World::default()));
    std::thread::scope(|scope| {
        for rank in 0..2 {
            let (fd, world) = (segment.fd().as_raw_fd(), world.clone());
            scope.spawn(move || {
                let gang = ShmCollective::attach(fd, rank, 2, 1).unwrap();
                let double =
                    Double { world, rank, size: 2, starts: 0, looks: 0, fails_at: 9, log: Log::default() };
                let library: Said<Box<dyn Library>> = if rank == 1 {
                    Err("NCCL cannot be loaded; run it".into())
                } else {
                    Ok(Box::new(double))
                };
                let error = NcclCollective::join(library, Box::new(gang), LONG).err().unwrap();
                match rank {
                    1 => assert_eq!(error.to_string(), "NCCL: NCCL cannot be loaded; run it"),
                    _ => assert_eq!(error.culprit(), Some(1), "{error}"),
                }
            });
        }
    });
}
