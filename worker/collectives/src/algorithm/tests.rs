//! The steps of all ranks, carried out in memory in any order that they allow, over channels that hold few bytes; against the plain
//! definition of each operation.

use super::*;
use crate::memory::reduce::reduce_into;
use proptest::prelude::*;
use std::collections::{HashMap, VecDeque};

/// One rank in the middle of its steps.
struct Rank {
    plan: Plan,
    positions: Vec<usize>,
    buffer: Vec<u8>,
}

/// Chance from a number.
struct Chance(u64);

impl Chance {
    fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) as usize) % end
    }
}

struct Network {
    reduction: Option<(DType, Op)>,
    /// Bytes under way from one rank to another.
    channels: HashMap<(usize, usize), VecDeque<u8>>,
    capacity: usize,
}

impl Network {
    /// Takes a few bytes further what `rank` does with `peer`; whether anything moved.
    fn go_on(&mut self, me: usize, rank: &mut Rank, at: usize, chance: &mut Chance) -> bool {
        let step = rank.plan.steps[at].clone();
        let position = rank.positions[at];
        let room = rank.plan.limit(at, &rank.positions).saturating_sub(position);
        let taken = 1 + chance.below(self.capacity);
        let size = self.reduction.map_or(1, |(dtype, _)| dtype.size());
        let (key, sends) = match step.kind {
            Kind::Send => ((me, step.peer), true),
            _ => ((step.peer, me), false),
        };
        let channel = self.channels.entry(key).or_default();
        let count = match step.kind {
            Kind::Send => room.min(self.capacity - channel.len()).min(taken),
            Kind::Receive => room.min(channel.len()).min(taken),
            Kind::Reduce(_) => room.min(channel.len()).min(taken.max(size)) / size * size,
        };
        let own = &mut rank.buffer[position..position + count];
        if sends {
            channel.extend(own.iter());
        } else {
            let received: Vec<u8> = channel.drain(..count).collect();
            match (step.kind, self.reduction) {
                (Kind::Reduce(first), Some((dtype, op))) => reduce_into(own, &received, dtype, op, first),
                _ => own.copy_from_slice(&received),
            }
        }
        rank.positions[at] += count;
        count > 0
    }
}

/// The first step with each peer, of those that send and of those that do not, that is not over.
fn fronts(rank: &Rank) -> Vec<usize> {
    let mut seen = Vec::new();
    (0..rank.plan.steps.len())
        .filter(|at| {
            let step = &rank.plan.steps[*at];
            let key = (step.peer, step.kind == Kind::Send);
            rank.positions[*at] < step.range.end && !seen.contains(&key) && {
                seen.push(key);
                true
            }
        })
        .collect()
}

/// Carries out the steps; panics where they come to a stand or do not fit together.
fn interpret(
    steps: Vec<Vec<Step>>,
    reduction: Option<(DType, Op)>,
    buffers: Vec<Vec<u8>>,
    seed: u64,
) -> Vec<Vec<u8>> {
    let lengths = |from: usize, to: usize, sent: bool| -> Vec<usize> {
        let (list, peer) = if sent { (&steps[from], to) } else { (&steps[to], from) };
        let these = list.iter().filter(|step| step.peer == peer && (step.kind == Kind::Send) == sent);
        these.map(|step| step.range.len()).collect()
    };
    for from in 0..steps.len() {
        for to in 0..steps.len() {
            assert_eq!(lengths(from, to, true), lengths(from, to, false), "messages from {from} to {to}");
        }
        assert!(steps[from].iter().all(|step| step.peer != from), "rank {from} talks to itself");
    }
    let mut chance = Chance(seed);
    let mut network = Network { reduction, channels: HashMap::new(), capacity: 8 + chance.below(200) };
    let mut ranks: Vec<Rank> = steps
        .into_iter()
        .zip(buffers)
        .map(|(steps, buffer)| Rank {
            positions: steps.iter().map(|step| step.range.start).collect(),
            plan: Plan::new(steps),
            buffer,
        })
        .collect();
    loop {
        let mut moved = false;
        let first = chance.below(ranks.len());
        for turn in 0..ranks.len() {
            let me = (first + turn) % ranks.len();
            if chance.below(3) == 0 {
                continue;
            }
            for at in fronts(&ranks[me]) {
                moved |= network.go_on(me, &mut ranks[me], at, &mut chance);
            }
        }
        if ranks.iter().all(|rank| fronts(rank).is_empty()) {
            return ranks.into_iter().map(|rank| rank.buffer).collect();
        }
        // Unlucky, or at a stand: everybody tries once more.
        let mut any = moved;
        for (me, rank) in ranks.iter_mut().enumerate() {
            for at in fronts(rank) {
                any |= network.go_on(me, rank, at, &mut chance);
            }
        }
        assert!(any, "no rank can go on");
    }
}

fn number(rank: usize, index: usize) -> u64 {
    (((rank * 7919 + index * 104_729) as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) % 16
}

fn encode(dtype: DType, value: u64) -> Vec<u8> {
    match dtype {
        DType::F32 => (value as f32).to_ne_bytes().to_vec(),
        DType::Bf16 => half::bf16::from_f32(value as f32).to_ne_bytes().to_vec(),
        DType::F16 => half::f16::from_f32(value as f32).to_ne_bytes().to_vec(),
        DType::F64 => (value as f64).to_ne_bytes().to_vec(),
        DType::I32 => (value as i32).to_ne_bytes().to_vec(),
        DType::I64 | DType::U64 => value.to_ne_bytes().to_vec(),
        DType::U8 => vec![value as u8],
    }
}

fn elements(dtype: DType, count: usize, of: impl Fn(usize) -> u64) -> Vec<u8> {
    (0..count).flat_map(|index| encode(dtype, of(index))).collect()
}

fn reduce(op: Op, values: impl Iterator<Item = u64>) -> u64 {
    match op {
        Op::Sum => values.sum(),
        Op::Max => values.max().unwrap_or(0),
    }
}

/// Hosts for up to eight ranks: on one, each on its own, evenly, unevenly, and mixed.
fn any_topology() -> impl Strategy<Value = Topology> {
    prop::collection::vec(0usize..4, 1..=8).prop_map(|labels| Topology::new(&labels))
}

fn any_work() -> impl Strategy<Value = (DType, Op, usize)> {
    let size = prop_oneof![1 => Just(0usize), 1 => Just(1), 4 => 2usize..300, 1 => 700usize..1500];
    (prop::sample::select(DType::ALL.to_vec()), prop::sample::select(vec![Op::Sum, Op::Max]), size)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn all_reduce_is_the_reduction_on_every_rank(
        topology in any_topology(), (dtype, op, count) in any_work(), seed: u64,
    ) {
        let world = topology.world();
        let work = Work::by_part(Operation::AllReduce(dtype, op), count * dtype.size(), dtype.size(), world);
        let want = elements(dtype, count, |i| reduce(op, (0..world).map(|rank| number(rank, i))));
        for algorithm in Algorithm::ALL {
            let steps = (0..world).map(|rank| steps(algorithm, &work, &topology, rank)).collect();
            let buffers = (0..world).map(|rank| elements(dtype, count, |i| number(rank, i))).collect();
            for got in interpret(steps, Some((dtype, op)), buffers, seed) {
                prop_assert_eq!(&got, &want, "{}", algorithm);
            }
        }
    }

    #[test]
    fn reduce_scatter_and_all_gather_have_the_parts(
        topology in any_topology(), (dtype, op, count) in any_work(), even: bool, seed: u64,
    ) {
        let (world, size) = (topology.world(), dtype.size());
        let count = if even { count / world * world } else { count };
        let work = |operation| match even {
            true => Work::in_equal_parts(operation, count * size, world),
            false => Work::by_part(operation, count * size, size, world),
        };
        let sums = elements(dtype, count, |i| reduce(op, (0..world).map(|rank| number(rank, i))));
        for algorithm in Algorithm::ALL {
            let scatter = work(Operation::ReduceScatter(dtype, op));
            let list = (0..world).map(|rank| steps(algorithm, &scatter, &topology, rank)).collect();
            let buffers = (0..world).map(|rank| elements(dtype, count, |i| number(rank, i))).collect();
            for (got, part) in interpret(list, Some((dtype, op)), buffers, seed).iter().zip(&scatter.parts) {
                prop_assert_eq!(&got[part.clone()], &sums[part.clone()], "{}", algorithm);
            }
            let gather = work(Operation::AllGather);
            let list = (0..world).map(|rank| steps(algorithm, &gather, &topology, rank)).collect();
            let own = |rank: usize| {
                let mut buffer = vec![0xaa; count * size];
                buffer[gather.parts[rank].clone()].copy_from_slice(&sums[gather.parts[rank].clone()]);
                buffer
            };
            for got in interpret(list, None, (0..world).map(own).collect(), seed) {
                prop_assert_eq!(&got, &sums, "{}", algorithm);
            }
        }
    }

    #[test]
    fn broadcast_and_all_to_all_bring_everybody_what_is_theirs(
        topology in any_topology(), count in 0usize..400, root in 0usize..8, seed: u64,
    ) {
        let world = topology.world();
        let bytes = |rank: usize, count: usize| elements(DType::U8, count, |i| number(rank, i));
        let root = root % world;
        let cast = Work::by_part(Operation::Broadcast { root }, count, 1, world);
        let swap = Work::by_part(Operation::AllToAll, 2 * world * count, 1, world);
        for algorithm in Algorithm::ALL {
            let list = (0..world).map(|rank| steps(algorithm, &cast, &topology, rank)).collect();
            for got in interpret(list, None, (0..world).map(|rank| bytes(rank, count)).collect(), seed) {
                prop_assert_eq!(got, bytes(root, count), "{}", algorithm);
            }
            let list = (0..world).map(|rank| steps(algorithm, &swap, &topology, rank)).collect();
            let buffers = (0..world).map(|rank| bytes(rank, 2 * world * count)).collect();
            for (me, got) in interpret(list, None, buffers, seed).into_iter().enumerate() {
                for from in (0..world).filter(|from| *from != me) {
                    let place = (world + from) * count;
                    let sent = &bytes(from, world * count)[me * count..(me + 1) * count];
                    prop_assert_eq!(&got[place..place + count], sent);
                }
            }
        }
    }

    #[test]
    fn across_adds_what_the_hosts_have(topology in any_topology(), (dtype, op, count) in any_work(), seed: u64) {
        let (world, size) = (topology.world(), dtype.size());
        let work = Work::by_part(Operation::AllReduce(dtype, op), count * size, size, world);
        let mine = |rank: usize| {
            let ranks = topology.ranks_of(topology.host_of(rank)).len();
            let part = part(count, topology.place_of(rank), ranks);
            part.start * size..part.end * size
        };
        let hosts = topology.hosts();
        let want = elements(dtype, count, |i| reduce(op, (0..hosts).map(|host| number(host, i))));
        for algorithm in Algorithm::ALL {
            let list = (0..world).map(|rank| across(algorithm, &work, size, &topology, rank)).collect();
            let buffers =
                (0..world).map(|rank| elements(dtype, count, |i| number(topology.host_of(rank), i))).collect();
            for (rank, got) in interpret(list, Some((dtype, op)), buffers, seed).iter().enumerate() {
                prop_assert_eq!(&got[mine(rank)], &want[mine(rank)]);
            }
        }
    }

    #[test]
    fn sums_of_floats_have_the_same_bits_on_every_rank_whatever_the_order(
        topology in any_topology(), count in 1usize..200, seeds in prop::array::uniform2(any::<u64>()),
    ) {
        let world = topology.world();
        let value = |rank: usize, i: usize| ((rank * 31 + i) as f32 * 0.7).sin() * 1e3;
        let buffer = |rank: usize| (0..count).flat_map(|i| value(rank, i).to_ne_bytes()).collect::<Vec<u8>>();
        for algorithm in Algorithm::ALL {
            let work = Work::by_part(Operation::AllReduce(DType::F32, Op::Sum), count * 4, 4, world);
            let run = |seed| {
                let list = (0..world).map(|rank| steps(algorithm, &work, &topology, rank)).collect();
                interpret(list, Some((DType::F32, Op::Sum)), (0..world).map(buffer).collect(), seed)
            };
            let (one, other) = (run(seeds[0]), run(seeds[1]));
            prop_assert_eq!(&one, &other, "{} in another order", algorithm);
            prop_assert!(one.iter().all(|rank| *rank == one[0]), "{} on another rank", algorithm);
        }
    }
}

/// Whose arrival a rank has heard of when it leaves.
#[test]
fn a_barrier_lets_nobody_out_before_all_are_in() {
    for world in 1..=20 {
        let topology = Topology::even(1, world);
        let work = Work::by_part(Operation::Barrier, 1, 1, world);
        let lists: Vec<Vec<Step>> =
            (0..world).map(|rank| steps(Algorithm::Tree, &work, &topology, rank)).collect();
        let rounds = lists[0].len() / 2;
        let mut heard: Vec<Vec<bool>> =
            (0..world).map(|me| (0..world).map(|one| one == me).collect()).collect();
        for round in 0..rounds {
            let before = heard.clone();
            for me in 0..world {
                let [send, receive] = &lists[me][2 * round..2 * round + 2] else {
                    panic!("two steps a round")
                };
                assert_eq!((send.kind, receive.kind), (Kind::Send, Kind::Receive));
                assert_eq!(Plan::new(lists[me].clone()).earlier(2 * round + 1).last(), Some(2 * round));
                let theirs = &before[receive.peer];
                heard[me].iter_mut().zip(theirs).for_each(|(mine, theirs)| *mine |= theirs);
            }
        }
        assert!(heard.iter().flatten().all(|heard| *heard), "{world} ranks");
    }
}

#[test]
fn hosts_are_crossed_once_in_each_direction_and_by_all_of_their_ranks() {
    let (topology, world) = (Topology::even(4, 3), 12);
    let bytes = 12 * 64 * 4;
    let work = Work::by_part(Operation::AllReduce(DType::F32, Op::Sum), bytes, 4, world);
    let crossing = |rank: usize| -> usize {
        let list = steps(Algorithm::Hierarchical, &work, &topology, rank);
        let sent = list.iter().filter(|step| step.kind == Kind::Send);
        sent.filter(|step| topology.host_of(step.peer) != topology.host_of(rank)).map(|s| s.range.len()).sum()
    };
    for rank in 0..world {
        assert_eq!(crossing(rank), 2 * 3 * bytes / 4 / 3, "three quarters of a third, twice");
    }
}
