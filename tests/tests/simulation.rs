//! The simulator on a few seeds, on every seed that once found something, and on itself.

#![allow(clippy::unwrap_used)] // in a test an unwrap is an assertion

use fleet_tests::sim::{self, Report};
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
