//! What the end-to-end tests share: a small world of its own for each test, real processes in it, and patience with a limit.
//!
//! Nothing here is built: the programs are those beside the test's own executable (`cargo build --workspace --bins` makes them). Tests run in
//! any order and side by side, as many as the machine has cores (cargo's default).

mod client;
mod coordinators;
pub mod documents;
pub mod fine_tuning;
pub mod fuzz;
pub mod http;
mod jobs;
mod network;
mod process;
pub mod shipped;
pub mod sim;
pub mod source;
pub mod submits;
mod terminal;
mod world;

pub use client::Client;
pub use coordinators::Coordinators;
pub use jobs::{TinyJob, corpus};
pub use network::{Network, Relay};
pub use process::{Finished, Running};
pub use terminal::Terminal;
pub use world::{Standing, World, end_worlds_on_signals};

use std::path::PathBuf;
use std::time::{Duration, Instant};

/// How long anything may take on a machine that does much else at the same time.
pub const PATIENCE: Duration = Duration::from_secs(90);

/// The program `name` of this workspace: beside this one, or a folder above where this is a test.
pub fn program(name: &str) -> PathBuf {
    let own = std::env::current_exe().expect("a program knows where it lies");
    let found = own.ancestors().skip(1).take(2).map(|dir| dir.join(name)).find(|path| path.is_file());
    found.unwrap_or_else(|| {
        panic!("{name} is not beside {}; run `cargo build --workspace --bins` first", own.display())
    })
}

/// Waits until `condition` holds; panics with `what` when it does not in time.
pub fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !condition() {
        assert!(begun.elapsed() < PATIENCE, "still not true after {} s: {what}", PATIENCE.as_secs());
        std::thread::sleep(Duration::from_millis(10));
    }
}
