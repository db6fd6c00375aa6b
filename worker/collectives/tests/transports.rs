//! Every call of `Exchange` over every transport, against its plain definition: all types, sizes and numbers of ranks, also with ranks that
//! come late.

#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used)] // helpers of tests, too

mod calls;
mod meeting;

use calls::Call;
use fleet_collectives::{Exchange, Op, Segment, ShmCollective};
use meeting::{GENERATION, TIMEOUT, WIRES, Wire, each, ranks};
use proptest::prelude::*;
use std::os::fd::AsRawFd;
use std::time::Duration;

#[derive(Clone, Copy, Debug)]
enum Transport {
    Shm,
    Net(Wire),
}

fn transports() -> impl Iterator<Item = Transport> {
    std::iter::once(Transport::Shm).chain(WIRES.map(Transport::Net))
}

/// The ranks of a gang as threads, on hosts with these numbers, of which shared memory knows one.
fn gang(transport: Transport, hosts: &[usize], body: impl Fn(&mut dyn Exchange) + Sync) {
    match transport {
        Transport::Net(wire) => {
            each(ranks(hosts, wire), |before| body(&mut before.connect(TIMEOUT).unwrap()));
        }
        Transport::Shm => {
            let world = hosts.len();
            let segment = Segment::create(world, GENERATION).unwrap();
            std::thread::scope(|scope| {
                for rank in 0..world {
                    let (fd, body) = (segment.fd().as_raw_fd(), &body);
                    scope.spawn(move || {
                        body(&mut ShmCollective::attach(fd, rank, world, GENERATION).unwrap());
                    });
                }
            });
        }
    }
}

#[test]
fn every_call_in_every_type_agrees_with_the_definition() {
    for transport in transports() {
        for hosts in [&[0][..], &[0, 1], &[0, 0, 1], &[0, 1, 1, 0, 2], &[0, 0, 0, 1, 1, 1, 2, 2]] {
            gang(transport, hosts, |gang| {
                for (index, call) in calls::all().into_iter().enumerate() {
                    call.check(gang, index as u64);
                }
            });
        }
    }
}

/// For which this thread had a core.
fn cpu_time() -> Duration {
    let stat = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
    Duration::from_nanos(stat.split(' ').next().unwrap().parse().unwrap())
}

#[test]
fn who_waits_leaves_the_cores_to_others_also_where_there_are_few() {
    for transport in transports() {
        gang(transport, &[0; 8], |gang| {
            gang.barrier().unwrap();
            if gang.rank() == 5 {
                std::thread::sleep(Duration::from_secs(1));
            }
            let before = cpu_time();
            gang.all_reduce_f64(&mut [1.0], Op::Sum).unwrap();
            let used = cpu_time() - before;
            assert!(used < Duration::from_millis(20), "{transport:?}: {used:?} for a wait of 1 s");
        });
    }
}

/// Who comes late to which call, in ms.
fn delays() -> impl Strategy<Value = Vec<(usize, usize, u64)>> {
    prop::collection::vec((0usize..8, 0usize..12, 1u64..40), 0..3)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]
    #[test]
    fn any_order_of_calls_agrees_with_the_definition_whoever_is_late(
        transport in prop::sample::select(transports().collect::<Vec<_>>()),
        hosts in prop::collection::vec(0usize..3, 1..=8),
        calls in prop::collection::vec(calls::any(), 1..12),
        late in delays(),
    ) {
        gang(transport, &hosts, |gang| {
            let rank = gang.rank();
            for (index, call) in calls.iter().enumerate() {
                for (_, _, delay) in late.iter().filter(|late| (late.0, late.1) == (rank, index)) {
                    std::thread::sleep(Duration::from_millis(*delay));
                }
                Call::check(*call, gang, index as u64);
            }
        });
    }
}
