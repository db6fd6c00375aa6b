//! Gangs on several hosts: a segment for each host, connections between all ranks.

#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used)] // helpers of tests, too

mod calls;
mod meeting;

use calls::{inputs, reduced_over};
use fleet_collectives::algorithm::Topology;
use fleet_collectives::{
    Abort, CollectiveError, DType, Exchange, Gang, Gather, HostCollective, Keep, Op, Parts, Segment,
    SharedHost, ShmCollective, part,
};
use meeting::{Before, TIMEOUT, Wire, each, ranks};
use proptest::prelude::*;
use std::os::fd::AsRawFd;
use std::time::Duration;

/// The ranks of a gang as threads, on hosts with these numbers.
fn gang<T: Send>(hosts: &[usize], body: impl Fn(HostCollective) -> T + Sync) -> Vec<T> {
    let topology = Topology::new(hosts);
    let segments: Vec<Segment> = (0..topology.hosts())
        .map(|host| Segment::create(topology.ranks_of(host).len(), meeting::GENERATION).unwrap())
        .collect();
    each(ranks(hosts, Wire::Tls), |before: Before| {
        let rank = before.told.rank;
        let host = topology.host_of(rank);
        let (place, size) = (topology.place_of(rank), topology.ranks_of(host).len());
        let fd = segments[host].fd().as_raw_fd();
        let shm = ShmCollective::attach(fd, place, size, meeting::GENERATION).unwrap();
        body(HostCollective::new(shm, before.connect(TIMEOUT).unwrap()).unwrap())
    })
}

/// `post_reduce` twice in one buffer: the sums of all ranks of all hosts, in the part among the ranks of the host.
fn check_post_reduce(
    gang: &mut HostCollective,
    hosts: &[usize],
    (dtype, op): (DType, Op),
    keep: Keep,
    size: usize,
) {
    let (rank, world, topology) = (gang.rank(), gang.world_size(), Topology::new(hosts));
    let (gap, length) = (24, size * dtype.size());
    let buffer = gang.allocate_per_rank(3 * gap + 2 * length).unwrap();
    let starts = [gap, 2 * gap + length];
    for (i, start) in starts.into_iter().enumerate() {
        buffer.write(start, &inputs(dtype, i as u64, rank, 0..size));
        gang.post_reduce(&buffer, start..start + length, dtype, op, keep).unwrap();
        gang.progress().unwrap();
    }
    gang.finish().unwrap();
    for (i, start) in starts.into_iter().enumerate() {
        let mut got = vec![0; length];
        buffer.read(start, &mut got);
        let mut want = inputs(dtype, i as u64, rank, 0..size);
        let range = match keep {
            Keep::MyPart | Keep::MyPartOfHost => part(size, gang.local_rank(), gang.local_size()),
            Keep::MyShard => part(size, rank, world),
            Keep::Everything => 0..size,
        };
        if keep == Keep::MyShard {
            // The rest is not defined.
            want.copy_from_slice(&got);
        }
        let of_host = keep == Keep::MyPartOfHost;
        let ranks: Vec<usize> =
            (0..world).filter(|one| !of_host || topology.host_of(*one) == gang.host()).collect();
        let sum = reduced_over(dtype, op, i as u64, &ranks, range.clone());
        want[range.start * dtype.size()..range.end * dtype.size()].copy_from_slice(&sum);
        assert_eq!(got, want, "{dtype} {op:?} {keep:?} of {size}");
    }
    gang.barrier().unwrap();
}

/// Twice in one buffer: each host has the parts of its own ranks, and the sums of theirs.
fn check_gather_of_host(gang: &mut HostCollective, hosts: &[usize], dtype: DType, size: usize) {
    let (rank, topology) = (gang.rank(), Topology::new(hosts));
    let length = size * dtype.size();
    let buffer = gang.allocate_per_rank(2 * length).unwrap();
    for turn in 0..2 {
        buffer.write(turn * length, &inputs(dtype, turn as u64, rank, 0..size));
        gang.post_gather_of_host(&buffer, turn * length..(turn + 1) * length, dtype).unwrap();
    }
    gang.finish().unwrap();
    let ranks = topology.ranks_of(gang.host());
    for turn in 0..2 {
        let mut got = vec![0; length];
        buffer.read(turn * length, &mut got);
        let parts = ranks.iter().enumerate().flat_map(|(local, one)| {
            let own = part(size, local, ranks.len());
            inputs(dtype, turn as u64, *one, 0..size)[own.start * dtype.size()..own.end * dtype.size()]
                .to_vec()
        });
        assert_eq!(got, parts.collect::<Vec<u8>>(), "{dtype} of {size}");
    }
    let mut numbers = [rank as f64, 1.0];
    gang.all_reduce_f64_of_host(&mut numbers, Op::Sum).unwrap();
    assert_eq!(numbers, [ranks.iter().sum::<usize>() as f64, ranks.len() as f64]);
    gang.barrier().unwrap();
}

#[test]
fn ranks_of_a_host_gather_and_sum_among_themselves() {
    for hosts in [&[0, 0][..], &[0, 1], &[0, 0, 1, 1], &[0, 0, 0, 1, 1], &[0, 1, 0, 2, 0]] {
        gang(hosts, |mut gang| {
            for dtype in [DType::F32, DType::F16, DType::U8] {
                for size in [0, 1, 259, 5_001] {
                    check_gather_of_host(&mut gang, hosts, dtype, size);
                }
            }
        });
    }
}

const KEEPS: [Keep; 4] = [Keep::MyPart, Keep::MyPartOfHost, Keep::MyShard, Keep::Everything];

/// `post_gather` of two rooms in turn, three times: each host has the parts of all ranks, whatever was there before.
fn check_gather(gang: &mut HostCollective, seed: u64, size: usize) {
    let (rank, world) = (gang.rank(), gang.world_size());
    let room = size.next_multiple_of(8);
    let (from, into) = (gang.allocate_per_rank(3 * size).unwrap(), gang.allocate_common(2 * room).unwrap());
    // Parts of all lengths, none among them.
    let ends: Vec<usize> = (0..=world).map(|rank| size * rank * rank / (world * world)).collect();
    let parts = |turn: usize| -> Parts {
        let start = turn % 2 * room;
        ends.windows(2).map(|two| start + two[0]..start + two[1]).collect()
    };
    let bytes = |turn: u64| inputs(DType::U8, seed * 3 + turn, 0, 0..size);
    let posted: Vec<_> = (0..3)
        .map(|turn| {
            let own = ends[rank]..ends[rank + 1];
            from.write(turn * size, &bytes(turn as u64)[own]);
            let from = (&from, turn * size);
            gang.post_gather(Gather { from, into: &into, parts: &parts(turn) }).unwrap()
        })
        .collect();
    gang.wait(posted[2]).unwrap();
    for (turn, start) in [(1, room), (2, 0)] {
        let mut got = vec![0; size];
        into.read(start, &mut got);
        assert_eq!(got, bytes(turn), "turn {turn} of {size}");
    }
    gang.barrier().unwrap();
}

#[test]
fn reductions_in_place_are_those_of_all_hosts() {
    for hosts in [&[0, 0][..], &[0, 1], &[0, 0, 1, 1], &[0, 0, 0, 1, 1], &[0, 1, 0, 2, 0]] {
        gang(hosts, |mut gang| {
            for dtype in DType::ALL {
                for keep in KEEPS {
                    for size in [0, 1, 259, 5_001] {
                        check_post_reduce(&mut gang, hosts, (dtype, Op::Sum), keep, size);
                    }
                }
            }
        });
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 10, ..ProptestConfig::default() })]
    #[test]
    fn any_order_of_calls_agrees_with_the_definition(
        hosts in prop::collection::vec(0usize..3, 1..=6),
        calls in prop::collection::vec(calls::any(), 1..8),
        reductions in prop::collection::vec(
            (prop::sample::select(DType::ALL.to_vec()), 0usize..3000, prop::sample::select(KEEPS.to_vec())),
            1..4,
        ),
    ) {
        gang(&hosts, |mut gang| {
            for (index, call) in calls.iter().enumerate() {
                call.check(&mut gang, index as u64);
                if let Some((dtype, size, keep)) = reductions.get(index).copied() {
                    check_post_reduce(&mut gang, &hosts, (dtype, Op::Max), keep, size);
                    check_gather(&mut gang, index as u64, size);
                }
            }
        });
    }
}

#[test]
fn floats_have_the_same_bits_on_all_hosts_and_run_after_run() {
    let run = || {
        gang(&[0, 0, 1, 1, 1], |mut gang| {
            let value = |i: usize| ((gang.rank() * 7919 + i) as f32).sin();
            let mut data: Vec<u8> = (0..30_001).flat_map(|i| value(i).to_ne_bytes()).collect();
            gang.all_reduce(&mut data, DType::F32, Op::Sum).unwrap();
            data
        })
    };
    let (one, other) = (run(), run());
    assert!(one.iter().chain(&other).all(|data| *data == one[0]));
}

/// Data-parallel steps as `SharedHost` describes them, on numbers whose result is known in closed form.
#[test]
fn a_data_parallel_step_gives_all_hosts_the_same_weights() {
    let elements = 5000;
    gang(&[0, 0, 1, 1], |mut gang| {
        let grads = gang.allocate_per_rank(elements * 4).unwrap();
        let weights = gang.allocate_common(elements * 4).unwrap();
        let read = |read: &dyn Fn(usize, &mut [u8]), i: usize| {
            let mut four = [0; 4];
            read(i * 4, &mut four);
            f32::from_ne_bytes(four)
        };
        for step in 1..=3 {
            for i in 0..elements {
                grads.write(i * 4, &((gang.rank() + 1) as f32 * (i % 7) as f32).to_ne_bytes());
            }
            gang.post_reduce(&grads, 0..elements * 4, DType::F32, Op::Sum, Keep::MyPart).unwrap();
            gang.finish().unwrap();
            let mine = part(elements, gang.local_rank(), gang.local_size());
            let squares = mine.clone().map(|i| f64::from(read(&|o, b| grads.read(o, b), i)).powi(2)).sum();
            let mut sums = [if gang.host() == 0 { squares } else { 0.0 }];
            gang.all_reduce_f64(&mut sums, Op::Sum).unwrap();
            assert_eq!(sums[0], (0..elements).map(|i| (10.0 * (i % 7) as f64).powi(2)).sum::<f64>());
            for i in mine {
                let new = read(&|o, b| weights.read(o, b), i) + read(&|o, b| grads.read(o, b), i);
                weights.write(i * 4, &new.to_ne_bytes());
            }
            gang.barrier().unwrap();
            for i in 0..elements {
                assert_eq!(read(&|o, b| weights.read(o, b), i), step as f32 * 10.0 * (i % 7) as f32);
            }
        }
    });
}

#[test]
fn what_breaks_on_one_host_is_told_on_all() {
    // A wrong call on one host.
    let errors = gang(&[0, 0, 1, 1], |mut gang| {
        let mut data = vec![0; if gang.rank() < 2 { 8 } else { 16 }];
        gang.all_reduce(&mut data, DType::F32, Op::Sum).unwrap_err().to_string()
    });
    assert!(
        errors.iter().all(|error| error.contains("rank 2 called") || error.contains("another call")),
        "{errors:?}"
    );
    // A rank that never comes.
    let over = std::sync::Barrier::new(4);
    let errors = gang(&[0, 0, 1, 1], |mut gang| {
        gang.barrier().unwrap();
        gang.set_deadline(Duration::from_millis(if gang.rank() == 2 { 400 } else { 60_000 }));
        if gang.rank() == 3 {
            over.wait();
            return gang.barrier().unwrap_err();
        }
        let error = gang.all_reduce_f64(&mut [1.0], Op::Sum).unwrap_err();
        over.wait();
        error
    });
    assert!(matches!(errors[2], CollectiveError::Deadline { rank: 3, .. }), "{:?}", errors[2]);
    let culprits: Vec<_> = errors.iter().map(CollectiveError::culprit).collect();
    assert_eq!(culprits, [Some(3); 4], "{errors:?}");
    // The agent of one host sees a rank die.
    let errors = gang(&[0, 0, 1, 1], |mut gang| {
        match gang.rank() {
            1 => {
                gang.barrier().unwrap();
                gang.abort_handle().abort(Abort::RankDied(1));
                gang.barrier().unwrap_err().culprit()
            }
            // Those that have not left the first one yet hear of it there.
            _ => gang.barrier().and_then(|()| gang.barrier()).unwrap_err().culprit(),
        }
    });
    assert_eq!(errors, [Some(1); 4]);
}
