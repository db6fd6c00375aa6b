//! The simulator on a few seeds, on every seed that once found something, and on itself.

#![allow(clippy::unwrap_used)] // in a test an unwrap is an assertion

use fleet_common::codec::FRAME_MAX;
use fleet_tests::sim::{self, Report, scale};
use std::path::Path;

/// Seeds that are run each time.
const SEEDS: std::ops::Range<u64> = 1..9;
/// Virtual minutes with faults of each.
const MINUTES: u64 = 20;

fn well(report: &Report) {
    if let Some(violation) = &report.violation {
        panic!(
            "{}\nseed {}: {}; run `cargo run -p fleet-tests --bin simulate -- --seed {}`",
            violation.trace.join("\n"),
            report.seed,
            violation.what,
            report.seed
        );
    }
}

#[test]
fn nothing_is_lost_whoever_fails() {
    std::thread::scope(|scope| {
        let runs: Vec<_> = SEEDS.map(|seed| scope.spawn(move || sim::run(seed, MINUTES, false))).collect();
        runs.into_iter().for_each(|run| well(&run.join().unwrap()));
    });
}

#[test]
fn what_was_found_once_stays_away() {
    let text = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("seeds.txt")).unwrap();
    for line in text.lines().filter(|line| !line.starts_with('#') && !line.trim().is_empty()) {
        let mut words = line.split_whitespace();
        let mut number = || words.next().and_then(|word| word.parse().ok()).expect("SEED MINUTES what");
        well(&sim::run(number(), number(), false));
    }
}

#[test]
fn a_seed_gives_the_same_run_again() {
    let [one, two] = [0, 1].map(|_| sim::run(77, 10, false));
    assert_eq!((one.hash, one.events), (two.hash, two.events));
    assert_ne!(one.hash, sim::run(78, 10, false).hash);
    assert!(one.commands > 100, "a run in which nothing happens shows nothing: {one:?}");
}

/// The real coordinators and agents, 1,024 ranks on 128 hosts: all meet, a rank that dies is named and takes all others along, a stop and a
/// second start leave none behind, and the loss of a host is told as that. That no rank of two starts lives at a time the simulator sees to itself.
#[test]
fn a_thousand_ranks_meet_and_leave_together() {
    let [few, many] = [1, 128].map(|hosts| scale::run(hosts, 1, false).unwrap());
    assert_eq!((few.ranks, many.ranks), (8, 1024));

    let error = many.death.error.clone().unwrap();
    let dead = scale::victim(1024);
    assert_eq!((error.rank, error.signal), (Some(dead), Some(9)), "{error:?}");
    let node = format!("machine-{}", dead / 8 + 1);
    assert_eq!(error.node.as_deref(), Some(node.as_str()), "{error:?}");
    assert!(many.death.gone < 2.0 && many.death.recorded < 3.0, "{many:?}");

    assert_eq!(many.stop.error, None);
    assert!(many.stop.gone < 2.0, "{many:?}");
    let error = many.lost.error.clone().unwrap();
    assert_eq!(error.node.as_deref(), Some("machine-65"), "{error:?}");

    // What is said grows with the ranks, and what each agent gets stays far below the limit of a message.
    assert!(many.start.list_bytes < 128 * (few.start.list_bytes + 1024), "{many:?} {few:?}");
    assert!((many.start.list_bytes as usize) < FRAME_MAX / 16, "{many:?}");
    assert!(many.start.log_bytes < 200 * few.start.log_bytes.max(2048), "{many:?} {few:?}");
    assert!(many.start.told < 2.0, "{many:?}");
}
