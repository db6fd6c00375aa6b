//! Prints what exchanges cost over scale, as tables in Markdown: the steps of all ranks under a virtual clock and a model of links.

use fleet_collectives::algorithm::{Algorithm, Topology};
use fleet_collectives::cost::{Link, Links, predict};
use fleet_collectives::{DType, Op, Posted};
use std::time::Duration;

/// Hosts, of eight ranks each.
const HOSTS: [usize; 5] = [1, 4, 16, 64, 128];
const RANKS: usize = 8;

fn main() {
    let links = Links {
        inside: Link {
            latency: Duration::from_micros(2),
            bandwidth: 10e9,
            loss: 0.0,
            retransmit: Duration::ZERO,
        },
        across: Link {
            latency: Duration::from_micros(20),
            bandwidth: 12.5e9,
            loss: 1e-6,
            retransmit: Duration::from_micros(200),
        },
        reduce: 1.0 / 10e9,
    };
    let exchanges = [
        ("all_reduce", Posted::AllReduce(DType::F32, Op::Sum)),
        ("reduce_scatter", Posted::ReduceScatter(DType::F32, Op::Sum)),
        ("all_gather", Posted::AllGather(DType::F32)),
    ];
    for (name, exchange) in exchanges {
        println!("\n{name}, milliseconds\n");
        print!("| size | algorithm |");
        HOSTS.iter().for_each(|hosts| print!(" {} x {RANKS} |", hosts));
        println!("\n|---|---|{}", "---|".repeat(HOSTS.len()));
        for (size, bytes) in [("64 KiB", 64 << 10), ("4 MiB", 4 << 20), ("256 MiB", 256 << 20)] {
            // Halving differs in all_reduce alone.
            let all_reduce = matches!(exchange, Posted::AllReduce(..));
            for algorithm in Algorithm::ALL.into_iter().filter(|one| all_reduce || *one != Algorithm::Halving)
            {
                print!("| {size} | {algorithm} |");
                for hosts in HOSTS {
                    let topology = Topology::even(hosts, RANKS);
                    let time = predict(exchange, bytes, algorithm, &topology, &links);
                    print!(" {:.2} |", time.as_secs_f64() * 1e3);
                }
                println!();
            }
        }
    }
}
