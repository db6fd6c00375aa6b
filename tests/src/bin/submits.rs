//! Many submits at once while leaders and clients are killed: no job twice, none lost that was acknowledged, none that was said not to be.

use clap::Parser;
use fleet_common::arguments;
use fleet_tests::World;
use fleet_tests::submits::{self, Load};
use std::process::ExitCode;
use std::time::{Duration, Instant};

#[derive(Parser)]
struct Args {
    #[arg(long, default_value_t = 2_000)]
    submits: usize,
    /// At a time.
    #[arg(long, default_value_t = 100)]
    parallel: usize,
    /// Between two ends of whoever leads, in milliseconds.
    #[arg(long, default_value_t = 1_500)]
    kill_every_ms: u64,
    /// Clients that are killed, of a hundred.
    #[arg(long, default_value_t = 15)]
    killed_percent: u64,
    /// Of what is killed when.
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

fn main() -> ExitCode {
    let args = arguments::parse::<Args>();
    fleet_tests::end_worlds_on_signals();
    let load = Load {
        submits: args.submits,
        parallel: args.parallel,
        kill_every: Duration::from_millis(args.kill_every_ms),
        killed_percent: args.killed_percent,
        seed: args.seed,
    };
    let (world, begun) = (World::new(), Instant::now());
    let (tally, broken) = submits::run(&world, load);
    println!("{tally:?} in {:.0} s", begun.elapsed().as_secs_f64());
    broken.iter().for_each(|what| println!("BROKEN: {what}"));
    match broken.is_empty() {
        true => println!("passed"),
        false => println!("FAILED: {} promises", broken.len()),
    }
    ExitCode::from(u8::from(!broken.is_empty()))
}
