//! Runs the simulator: one seed, or many side by side. See `fleet_tests::sim`.

use clap::Parser;
use fleet_common::arguments;
use fleet_tests::sim::{self, Report, scale};
use std::ops::Range;
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

/// Simulates a cluster with everything that can go wrong, from a seed. The same seed gives the same run, byte for byte.
#[derive(Debug, Parser)]
struct Arguments {
    /// The run to make.
    #[arg(long, default_value_t = 1, conflicts_with = "seeds")]
    seed: u64,
    /// Many runs, as FROM..TO without TO, on all cores.
    #[arg(long, value_parser = range)]
    seeds: Option<Range<u64>>,
    /// Virtual hours with faults.
    #[arg(long, default_value_t = 1.0)]
    hours: f64,
    /// With one seed: only the result, and not what happens, line by line.
    #[arg(long)]
    quiet: bool,
    /// With many seeds: go on after a violation.
    #[arg(long)]
    keep_going: bool,
    /// Instead: gangs of up to 1,024 ranks on 1 to 128 hosts, with few faults, and how long their protocol takes.
    #[arg(long, conflicts_with_all = ["seeds", "hours"])]
    gangs: bool,
    /// With many seeds: so many at once.
    #[arg(long)]
    jobs: Option<usize>,
}

fn range(text: &str) -> Result<Range<u64>, String> {
    let (from, to) = text.split_once("..").ok_or("write it like 1..100")?;
    let number = |text: &str| text.parse().map_err(|_| format!("`{text}` is not a number"));
    Ok(number(from)?..number(to)?)
}

fn main() -> ExitCode {
    let arguments = arguments::parse::<Arguments>();
    if arguments.gangs {
        return gangs(arguments.seed);
    }
    let minutes = (arguments.hours * 60.0).ceil() as u64;
    let failures = match &arguments.seeds {
        Some(seeds) => many(seeds.clone(), minutes, &arguments),
        None => {
            let report = sim::run(arguments.seed, minutes, !arguments.quiet);
            show(&report, arguments.quiet);
            u64::from(report.violation.is_some())
        }
    };
    if failures == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Hosts of the gangs, each with eight ranks.
const HOSTS: [u32; 5] = [1, 4, 16, 64, 128];

fn gangs(seed: u64) -> ExitCode {
    let mut all = Vec::new();
    for hosts in HOSTS {
        match scale::run(hosts, seed, false) {
            Ok(figures) => all.push(figures),
            Err(what) => {
                println!("{hosts} hosts: VIOLATION: {what}");
                return ExitCode::FAILURE;
            }
        }
    }
    print!("{}", scale::table(&all));
    ExitCode::SUCCESS
}

/// Returns how many runs ended in a violation.
fn many(seeds: Range<u64>, minutes: u64, arguments: &Arguments) -> u64 {
    let begun = Instant::now();
    let threads =
        arguments.jobs.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from));
    let next = AtomicU64::new(seeds.start);
    let (failures, stop) = (AtomicU64::new(0), AtomicBool::new(false));
    let done = Mutex::new((0u64, 0u64));
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds.end {
                        break;
                    }
                    let report = sim::run(seed, minutes, false);
                    let mut done = done.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
                    done.0 += 1;
                    done.1 += report.virtual_seconds;
                    if report.violation.is_some() {
                        failures.fetch_add(1, Ordering::Relaxed);
                        stop.fetch_or(!arguments.keep_going, Ordering::Relaxed);
                        show(&report, true);
                    } else if done.0.is_multiple_of(50) {
                        println!("{} seeds, {:.0} s", done.0, begun.elapsed().as_secs_f64());
                    }
                }
            });
        }
    });
    let (count, virtual_seconds) = *done.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let failures = failures.load(Ordering::Relaxed);
    println!(
        "{count} seeds with {:.1} virtual hours in {:.1} s on {threads} threads: {failures} violations",
        virtual_seconds as f64 / 3600.0,
        begun.elapsed().as_secs_f64()
    );
    failures
}

fn show(report: &Report, with_trace: bool) {
    let Report { seed, hash, virtual_seconds, events, commands, violation } = report;
    if let Some(violation) = violation {
        if with_trace {
            violation.trace.iter().for_each(|line| println!("{line}"));
        }
        println!("seed {seed}: VIOLATION after {virtual_seconds} virtual seconds: {}", violation.what);
    }
    println!(
        "seed {seed}: {virtual_seconds} virtual seconds, {events} events, {commands} commands, hash {hash:016x}"
    );
}
