//! The simulator: real replicas, the real state machine, real coordinators' and agents' cores, and everything around them made up:
//! network, disks, clocks, processes, ranks and people. One thread, virtual time, and one number from which all chance follows.
//!
//! `world` has the loop, `net`, `host`, `machine`, `engine`, `client` and `burst` are what takes part, `faults` breaks it, `oracle` and
//! `watch` know what must hold all the same. `scale` runs large gangs without chance in it, whose ranks meet and part over `mesh`.

mod burst;
mod client;
mod engine;
mod faults;
mod host;
mod jobs;
mod machine;
mod members;
mod mesh;
mod net;
mod oracle;
mod queue;
pub mod random;
pub mod scale;
mod setup;
mod trace;
mod watch;
mod world;

use queue::{MINUTE, Micros};
use std::panic::AssertUnwindSafe;
use world::World;

/// What came of one run.
#[derive(Clone, Debug)]
pub struct Report {
    pub seed: u64,
    /// Of everything that happened; equal for equal seeds.
    pub hash: u64,
    pub virtual_seconds: u64,
    pub events: u64,
    pub commands: u64,
    pub violation: Option<Violation>,
}

#[derive(Clone, Debug)]
pub struct Violation {
    pub what: String,
    /// What happened last.
    pub trace: Vec<String>,
}

/// Runs one seed with faults for so many virtual minutes, and after them until all is well again.
pub fn run(seed: u64, minutes: u64, print: bool) -> Report {
    let faults_end: Micros = minutes * MINUTE;
    let mut world = World::new(seed, faults_end, print);
    let ran = std::panic::catch_unwind(AssertUnwindSafe(|| world.run()));
    if ran.is_err() {
        world.violated("something panicked".to_owned());
    }
    let trace = world.trace.last();
    Report {
        seed,
        hash: world.trace.hash(),
        virtual_seconds: world.queue.now() / queue::SECOND,
        events: world.events,
        commands: world.oracle.commands,
        violation: world.violation.map(|what| Violation { what, trace }),
    }
}
