//! The logic of exchanges over NCCL against a double of the library: ranks are threads, devices are memory of the host.

#![allow(clippy::unwrap_used)] // helpers of tests may panic
#![allow(unsafe_code)]

use super::*;
use crate::HostCollective;
use crate::abort::Abort;
use crate::net::{Key, Listener, RankAddress, Rendezvous};
use crate::shm::{Segment, ShmCollective};
use std::collections::HashMap;
use std::net::Ipv4Addr;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex};

type Said<T> = std::result::Result<T, String>;

const LONG: Duration = Duration::from_secs(120);
const SHORT: Duration = Duration::from_millis(300);

/// What the doubles of a group share: for each exchange who has started it, with which memory.
#[derive(Default)]
struct World {
    started: Vec<Vec<(usize, Call, Numbers)>>,
    done: usize,
}

/// Of all groups, by their ids.
#[derive(Default)]
struct Worlds {
    named: usize,
    by_id: HashMap<Id, Arc<Mutex<World>>>,
}

/// This rank in a group.
struct Member {
    world: Arc<Mutex<World>>,
    rank: usize,
    size: usize,
    starts: usize,
}

/// A rank's communicators. An exchange happens when its last rank has started it; what is behind it waits.
struct Double {
    worlds: Arc<Mutex<Worlds>>,
    members: HashMap<&'static str, Member>,
    /// What this rank has started, in order: group, and how many of its exchanges are then to be done.
    stream: Vec<(&'static str, usize)>,
    /// Until NCCL has taken on what it was asked for.
    looks: usize,
    /// From this exchange on NCCL fails.
    fails_at: usize,
    log: Log,
}

fn name(group: Group) -> &'static str {
    match group {
        Group::Shards => "shards",
        Group::Replicas => "replicas",
    }
}

impl Double {
    fn new(worlds: &Arc<Mutex<Worlds>>, fails_at: usize, log: &Log) -> Box<Double> {
        let (worlds, log) = (worlds.clone(), log.clone());
        Box::new(Double { worlds, members: HashMap::new(), stream: Vec::new(), looks: 0, fails_at, log })
    }

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
    let sum = |all: &[&mut [f32]], at: usize| all.iter().map(|numbers| numbers[at]).sum::<f32>();
    for at in 0..all[0].len() {
        match ranks[0].1 {
            Call::AllGather => {
                let number = all[at / share][at];
                all.iter_mut().for_each(|numbers| numbers[at] = number);
            }
            Call::ReduceScatter => all[at / share][at] = sum(&all, at),
            Call::AllReduce => {
                let sum = sum(&all, at);
                all.iter_mut().for_each(|numbers| numbers[at] = sum);
            }
        }
    }
}

impl Library for Double {
    fn unique_id(&mut self) -> Said<Id> {
        let mut worlds = self.worlds.lock().unwrap();
        worlds.named += 1;
        let id = [worlds.named as u8; 128];
        worlds.by_id.insert(id, Arc::default());
        Ok(id)
    }
    fn connect(&mut self, group: Group, id: &Id, rank: usize, size: usize) -> Said<()> {
        assert_eq!(self.looks, 0, "one communicator after the other");
        let world = self.worlds.lock().unwrap().by_id[id].clone();
        self.members.insert(name(group), Member { world, rank, size, starts: 0 });
        self.looks = 3;
        Ok(())
    }
    fn settled(&mut self) -> Said<bool> {
        if self.stream.len() >= self.fails_at {
            return Err("remote process exited or there was a network error".into());
        }
        self.looks = self.looks.saturating_sub(1);
        Ok(self.looks == 0)
    }
    unsafe fn start(&mut self, group: Group, call: Call, numbers: Numbers) -> Said<()> {
        assert_eq!(self.looks, 0, "NCCL is asked for more only when it has taken on what it was asked for");
        let all = if self.members.len() > 1 { format!(" among {}", name(group)) } else { String::new() };
        self.say(format!("start {} of {}{all}", call.name(), numbers.count));
        // As a stream does: what is behind comes after what was started before.
        while !self.reached(Mark(self.stream.len() as u64))? {
            std::thread::yield_now();
        }
        let member = self.members.get_mut(name(group)).unwrap();
        let mut world = member.world.lock().unwrap();
        if world.started.len() == member.starts {
            world.started.push(Vec::new());
        }
        world.started[member.starts].push((member.rank, call, numbers));
        if world.started[member.starts].len() == member.size {
            carry_out(&world.started[member.starts]);
            world.done += 1;
        }
        member.starts += 1;
        self.stream.push((name(group), member.starts));
        self.looks = 2;
        Ok(())
    }
    fn mark(&mut self) -> Said<Mark> {
        assert_eq!(self.looks, 0, "a mark behind what is not yet on the stream marks nothing");
        self.say(format!("mark {}", self.stream.len()));
        Ok(Mark(self.stream.len() as u64))
    }
    fn reached(&mut self, mark: Mark) -> Said<bool> {
        let mut before = self.stream[..mark.0 as usize].iter();
        Ok(before.all(|(group, count)| self.members[group].world.lock().unwrap().done >= *count))
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
    let worlds = Arc::default();
    std::thread::scope(|scope| {
        let ranks: Vec<_> = (0..size)
            .map(|rank| {
                let log = Log::default();
                let double = Double::new(&worlds, fails_at(rank), &log);
                let (segment, run) = (&segment, &run);
                scope.spawn(move || {
                    let gang = ShmCollective::attach(segment.fd().as_raw_fd(), rank, size, 1).unwrap();
                    let nccl =
                        NcclCollective::join(Ok(double), Box::new(gang), Among::All, deadline).unwrap();
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

fn post(nccl: &mut NcclCollective, work: Work, memory: &mut [f32]) -> crate::Result<u64> {
    let numbers =
        Numbers { address: memory.as_mut_ptr() as u64, count: memory.len(), dtype: crate::DType::F32 };
    // SAFETY: each test keeps its memory until it has waited, or until its communicator is gone.
    unsafe { nccl.post(work, numbers) }
}

#[test]
fn exchanges_are_done_in_the_order_in_which_they_were_posted() {
    let all = ranks(3, LONG, never, |rank, mut nccl, log, _| {
        let mut sums: Vec<f32> = (0..6).map(|at| (at + 10 * rank) as f32).collect();
        let mut gathered = vec![0.0; 3];
        gathered[rank] = rank as f32 + 1.0;
        let first = post(&mut nccl, Work::Reduce, &mut sums).unwrap();
        let second = post(&mut nccl, Work::Gather, &mut gathered).unwrap();
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
            post(&mut nccl, Work::Gather, &mut memory).unwrap();
            drop(nccl);
            assert_eq!(log.lock().unwrap().last().unwrap(), "abort");
        }
    });
}

#[test]
fn unequal_shares_are_refused() {
    ranks(2, LONG, never, |_, mut nccl, _, _| {
        let error = post(&mut nccl, Work::Gather, &mut [0.0; 3]).unwrap_err().to_string();
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
        let number = post(&mut nccl, Work::Gather, &mut memory).unwrap();
        let error = nccl.wait(number).unwrap_err();
        assert_eq!(error.culprit(), Some(1), "{error}");
        assert_eq!(log.lock().unwrap().last().unwrap(), "abort");
        assert_eq!(post(&mut nccl, Work::Gather, &mut memory).unwrap_err().to_string(), error.to_string());
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
            post(&mut nccl, Work::Gather, &mut memory).and_then(|number| nccl.wait(number)).unwrap_err();
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
                let error = post(&mut nccl, Work::Gather, &mut [0.0]).unwrap_err().to_string();
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
    let worlds = Arc::default();
    std::thread::scope(|scope| {
        for rank in 0..2 {
            let (fd, worlds) = (segment.fd().as_raw_fd(), &worlds);
            scope.spawn(move || {
                let gang = ShmCollective::attach(fd, rank, 2, 1).unwrap();
                let library: Said<Box<dyn Library>> = if rank == 1 {
                    Err("NCCL cannot be loaded; run it".into())
                } else {
                    Ok(Double::new(worlds, 9, &Log::default()))
                };
                let error = NcclCollective::join(library, Box::new(gang), Among::All, LONG).err().unwrap();
                match rank {
                    1 => assert_eq!(error.to_string(), "NCCL: NCCL cannot be loaded; run it"),
                    _ => assert_eq!(error.culprit(), Some(1), "{error}"),
                }
            });
        }
    });
}

/// Ranks as threads, on hosts with so many each, which keep a model together on each host.
fn on_hosts<T: Send>(
    sizes: &[usize],
    run: impl Fn(usize, crate::Result<NcclCollective>, Log) -> T + Sync,
) -> Vec<T> {
    let segments: Vec<Segment> = sizes.iter().map(|size| Segment::create(*size, 1).unwrap()).collect();
    let seats = sizes.iter().enumerate().flat_map(|(host, size)| (0..*size).map(move |local| (host, local)));
    let seats: Vec<(usize, usize)> = seats.collect();
    let doors: Vec<(Listener, Key)> = (seats.iter())
        .map(|_| (Listener::tcp((Ipv4Addr::LOCALHOST, 0).into()).unwrap(), Key::generate().unwrap()))
        .collect();
    let address = |(host, (listener, key)): (usize, &(Listener, Key))| RankAddress {
        host,
        address: listener.address().unwrap(),
        key: key.public().clone(),
    };
    let ranks: Vec<RankAddress> = seats.iter().map(|(host, _)| *host).zip(&doors).map(address).collect();
    let worlds = Arc::default();
    std::thread::scope(|scope| {
        let threads: Vec<_> = (doors.into_iter().zip(&seats).enumerate())
            .map(|(rank, ((listener, key), (host, local)))| {
                let told = Rendezvous { generation: 1, rank, ranks: ranks.clone(), encryption: false };
                let (fd, size) = (segments[*host].fd().as_raw_fd(), sizes[*host]);
                let (worlds, run) = (&worlds, &run);
                scope.spawn(move || {
                    let shm = ShmCollective::attach(fd, *local, size, 1).unwrap();
                    let net = listener.connect(&told, &key, LONG).unwrap();
                    let gang = Box::new(HostCollective::new(shm, net).unwrap());
                    let log = Log::default();
                    let double = Double::new(worlds, usize::MAX, &log);
                    run(rank, NcclCollective::join(Ok(double), gang, Among::Hosts, LONG), log)
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

#[test]
fn where_hosts_have_replicas_shares_are_of_a_host_and_sums_of_all() {
    for (hosts, here) in [(2, 2), (3, 2), (2, 1)] {
        let all = on_hosts(&vec![here; hosts], |rank, nccl, log| {
            let mut nccl = nccl.unwrap();
            let numbers = |more: usize| (0..2 * here).map(|at| (at + more + 10 * rank) as f32).collect();
            let [mut sums, mut within, mut gathered]: [Vec<f32>; 3] = [0, 1, 2].map(numbers);
            post(&mut nccl, Work::ReduceWithin, &mut within).unwrap();
            post(&mut nccl, Work::Reduce, &mut sums).unwrap();
            let last = post(&mut nccl, Work::Gather, &mut gathered).unwrap();
            nccl.wait(last).unwrap();
            drop(nccl);
            let local = rank % here;
            let own = 2 * local..2 * local + 2;
            (sums[own.clone()].to_vec(), within[own].to_vec(), gathered, log.lock().unwrap().clone())
        });
        for (rank, (sums, within, gathered, log)) in all.into_iter().enumerate() {
            let (local, host) = (rank % here, rank / here);
            let tens = |ranks: std::ops::Range<usize>| ranks.map(|rank| 10 * rank).sum::<usize>();
            let of_all = (hosts * here * 2 * local + tens(0..hosts * here)) as f32;
            assert_eq!(sums, [of_all, of_all + (hosts * here) as f32], "rank {rank} of {hosts} x {here}");
            let of_host = (here * (2 * local + 1) + tens(host * here..(host + 1) * here)) as f32;
            assert_eq!(within, [of_host, of_host + here as f32]);
            let wanted: Vec<f32> =
                (0..2 * here).map(|at| (at + 2 + 10 * (host * here + at / 2)) as f32).collect();
            assert_eq!(gathered, wanted);
            let wanted = [
                format!("start reduce_scatter of {} among shards", 2 * here),
                "mark 1".into(),
                format!("start reduce_scatter of {} among shards", 2 * here),
                "start all_reduce of 2 among replicas".into(),
                "mark 3".into(),
                format!("start all_gather of {} among shards", 2 * here),
                "mark 4".into(),
            ];
            assert_eq!(log, wanted);
        }
    }
}

#[test]
fn replicas_of_different_sizes_are_refused_with_what_to_do() {
    on_hosts(&[1, 2], |_, nccl, _| {
        let error = nccl.err().unwrap().to_string();
        assert!(error.contains("strategy = \"fsdp\""), "{error}");
    });
}
