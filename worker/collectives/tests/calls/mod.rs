//! Every call of `Exchange` against its plain definition, on numbers whose sums are exact in every type.

#![allow(clippy::unwrap_used, dead_code)] // shared by several tests, each of which uses a part

use fleet_collectives::{DType, Exchange, Op, Posted, part};
use proptest::prelude::*;
use std::ops::Range;

/// Number `index` of what `rank` puts into call `salt`.
pub fn input(salt: u64, rank: usize, index: usize) -> u64 {
    let mixed =
        (salt + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (rank as u64 * 7919 + index as u64 * 104_729);
    (mixed ^ (mixed >> 29)) % 16
}

pub fn encode(dtype: DType, values: impl Iterator<Item = u64>) -> Vec<u8> {
    let mut bytes = Vec::new();
    for value in values {
        match dtype {
            DType::F32 => bytes.extend((value as f32).to_ne_bytes()),
            DType::Bf16 => bytes.extend(half::bf16::from_f32(value as f32).to_ne_bytes()),
            DType::F16 => bytes.extend(half::f16::from_f32(value as f32).to_ne_bytes()),
            DType::F64 => bytes.extend((value as f64).to_ne_bytes()),
            DType::I32 => bytes.extend((value as i32).to_ne_bytes()),
            DType::I64 | DType::U64 => bytes.extend(value.to_ne_bytes()),
            DType::U8 => bytes.push(value as u8),
        }
    }
    bytes
}

pub fn inputs(dtype: DType, salt: u64, rank: usize, range: Range<usize>) -> Vec<u8> {
    encode(dtype, range.map(|i| input(salt, rank, i)))
}

pub fn reduced(dtype: DType, op: Op, salt: u64, world: usize, range: Range<usize>) -> Vec<u8> {
    let ranks: Vec<usize> = (0..world).collect();
    reduced_over(dtype, op, salt, &ranks, range)
}

/// The same of some of the ranks.
pub fn reduced_over(dtype: DType, op: Op, salt: u64, ranks: &[usize], range: Range<usize>) -> Vec<u8> {
    let one = |i: usize| {
        let all = ranks.iter().map(|rank| input(salt, *rank, i));
        match op {
            Op::Sum => all.sum::<u64>(),
            Op::Max => all.max().unwrap(),
        }
    };
    encode(dtype, range.map(one))
}

/// One call with its size: in elements, or in bytes where there is no type.
#[derive(Clone, Copy, Debug)]
pub enum Call {
    AllReduce(DType, Op, usize),
    ReduceScatter(DType, Op, usize),
    AllGather(usize),
    Broadcast(usize),
    AllToAll(usize),
    Barrier,
    /// Several at once, each on a range of its own.
    Posted([Posted; 3], usize),
}

/// The root is any number; it is taken modulo the world.
fn posted() -> Vec<Posted> {
    let mut all = vec![Posted::AllToAll, Posted::Broadcast { root: 5 }];
    for dtype in DType::ALL {
        all.push(Posted::AllGather(dtype));
        for op in [Op::Sum, Op::Max] {
            all.extend([Posted::AllReduce(dtype, op), Posted::ReduceScatter(dtype, op)]);
        }
    }
    all
}

/// Every call in every type, at sizes 0, 1, odd, and longer than any staging area.
pub fn all() -> Vec<Call> {
    let mut calls = vec![Call::Barrier];
    for dtype in DType::ALL {
        for op in [Op::Sum, Op::Max] {
            for size in [0, 1, 259] {
                calls.push(Call::AllReduce(dtype, op, size));
                calls.push(Call::ReduceScatter(dtype, op, size));
            }
        }
    }
    calls.push(Call::AllReduce(DType::F32, Op::Sum, 70_001));
    calls.push(Call::ReduceScatter(DType::F32, Op::Sum, 33_001));
    for size in [0, 1, 13, 132_077] {
        calls.extend([Call::AllGather(size), Call::Broadcast(size), Call::AllToAll(size)]);
    }
    for (at, one) in posted().into_iter().enumerate() {
        let next = posted()[(at + 1) % posted().len()];
        for size in [0, 1, 259, if at % 7 == 0 { 70_001 } else { 64 }] {
            calls.push(Call::Posted([one, next, one], size));
        }
    }
    calls
}

pub fn any() -> impl Strategy<Value = Call> {
    let dtype = || prop::sample::select(DType::ALL.to_vec());
    let op = || prop::sample::select(vec![Op::Sum, Op::Max]);
    let size = || prop_oneof![4 => 0usize..300, 1 => 30_000usize..70_000];
    let one = || prop::sample::select(posted());
    prop_oneof![
        Just(Call::Barrier),
        (dtype(), op(), size()).prop_map(|(d, o, s)| Call::AllReduce(d, o, s)),
        (dtype(), op(), size()).prop_map(|(d, o, s)| Call::ReduceScatter(d, o, s)),
        size().prop_map(Call::AllGather),
        size().prop_map(Call::Broadcast),
        size().prop_map(Call::AllToAll),
        ([one(), one(), one()], size()).prop_map(|(p, s)| Call::Posted(p, s)),
    ]
}

impl Call {
    /// Makes the call with inputs that depend on `salt` and the rank, and compares with the plain definition.
    pub fn check(self, gang: &mut dyn Exchange, salt: u64) {
        let (rank, world) = (gang.rank(), gang.world_size());
        let bytes = |rank, range| inputs(DType::U8, salt, rank, range);
        match self {
            Call::Barrier => gang.barrier().unwrap(),
            Call::AllReduce(dtype, op, size) => {
                let mut data = inputs(dtype, salt, rank, 0..size);
                gang.all_reduce(&mut data, dtype, op).unwrap();
                assert_eq!(data, reduced(dtype, op, salt, world, 0..size), "{self:?}");
            }
            Call::ReduceScatter(dtype, op, size) => {
                let data = inputs(dtype, salt, rank, 0..size * world);
                let mut output = vec![0xaa; size * dtype.size()];
                gang.reduce_scatter(&data, &mut output, dtype, op).unwrap();
                let mine = rank * size..(rank + 1) * size;
                assert_eq!(output, reduced(dtype, op, salt, world, mine), "{self:?}");
            }
            Call::AllGather(size) => {
                let mut output = vec![0xaa; size * world];
                gang.all_gather(&bytes(rank, 0..size), &mut output).unwrap();
                let want: Vec<u8> = (0..world).flat_map(|r| bytes(r, 0..size)).collect();
                assert_eq!(output, want, "{self:?}");
            }
            Call::Broadcast(size) => {
                let root = salt as usize % world;
                let mut data = bytes(rank, 0..size);
                gang.broadcast(&mut data, root).unwrap();
                assert_eq!(data, bytes(root, 0..size), "{self:?}");
            }
            Call::AllToAll(size) => {
                let mut output = vec![0xaa; size * world];
                gang.all_to_all(&bytes(rank, 0..size * world), &mut output).unwrap();
                let part = |r: usize| bytes(r, rank * size..(rank + 1) * size);
                assert_eq!(output, (0..world).flat_map(part).collect::<Vec<u8>>(), "{self:?}");
            }
            Call::Posted(exchanges, size) => {
                let exchanges = exchanges.map(|exchange| match exchange {
                    Posted::Broadcast { root } => Posted::Broadcast { root: root % world },
                    other => other,
                });
                check_posted(gang, exchanges, size, salt);
            }
        }
    }
}

/// Posts all three in one buffer, with gaps before, between and after, and waits for the first before the others.
fn check_posted(gang: &mut dyn Exchange, exchanges: [Posted; 3], size: usize, salt: u64) {
    let (rank, world, gap) = (gang.rank(), gang.world_size(), 24);
    let before: Vec<Vec<u8>> =
        (0..3).map(|at| posted_input(exchanges[at], size, salt + at as u64, rank, world)).collect();
    let buffer = gang.allocate_per_rank(4 * gap + before.iter().map(Vec::len).sum::<usize>()).unwrap();
    let mut start = 0;
    let mut posts = Vec::new();
    for (exchange, input) in exchanges.into_iter().zip(&before) {
        start += gap;
        buffer.write(start, input);
        let range = start..start + input.len();
        start = range.end;
        posts.push((gang.post(&buffer, range.clone(), exchange).unwrap(), range));
    }
    gang.wait(posts[0].0).unwrap();
    for (at, (_, range)) in posts.iter().enumerate() {
        let mut got = vec![0; range.len()];
        buffer.read(range.start, &mut got);
        let (place, want) = posted_output(exchanges[at], size, salt + at as u64, rank, world);
        assert_eq!(got[place], want, "{:?} of {size}, number {at}", exchanges[at]);
        gang.finish().unwrap();
    }
    let mut edge = vec![1; gap];
    buffer.read(0, &mut edge);
    assert_eq!(edge, vec![0; gap], "written before the range");
    buffer.read(buffer.len() - gap, &mut edge);
    assert_eq!(edge, vec![0; gap], "written behind the range");
}

fn posted_input(exchange: Posted, size: usize, salt: u64, rank: usize, world: usize) -> Vec<u8> {
    match exchange {
        Posted::AllReduce(dtype, _) | Posted::ReduceScatter(dtype, _) | Posted::AllGather(dtype) => {
            inputs(dtype, salt, rank, 0..size)
        }
        Posted::Broadcast { .. } => inputs(DType::U8, salt, rank, 0..size),
        Posted::AllToAll => inputs(DType::U8, salt, rank, 0..2 * size * world),
    }
}

/// Which bytes of the range are defined afterwards, and what they are.
fn posted_output(
    exchange: Posted,
    size: usize,
    salt: u64,
    rank: usize,
    world: usize,
) -> (Range<usize>, Vec<u8>) {
    match exchange {
        Posted::AllReduce(dtype, op) => (0..size * dtype.size(), reduced(dtype, op, salt, world, 0..size)),
        Posted::ReduceScatter(dtype, op) => {
            let mine = part(size, rank, world);
            let bytes = mine.start * dtype.size()..mine.end * dtype.size();
            (bytes, reduced(dtype, op, salt, world, mine))
        }
        Posted::AllGather(dtype) => {
            let of = |rank: usize| inputs(dtype, salt, rank, part(size, rank, world));
            (0..size * dtype.size(), (0..world).flat_map(of).collect())
        }
        Posted::Broadcast { root } => (0..size, inputs(DType::U8, salt, root, 0..size)),
        Posted::AllToAll => {
            let of = |from: usize| inputs(DType::U8, salt, from, rank * size..(rank + 1) * size);
            (size * world..2 * size * world, (0..world).flat_map(of).collect())
        }
    }
}
