//! What the end-to-end tests share: a small world of its own for each test, real processes in it, and patience with a limit.
//!
//! Nothing here is built: the programs are those beside the test's own executable (`cargo build --workspace --bins` makes them). Tests run in
//! any order and side by side, as many as the machine has cores (cargo's default).

mod jobs;
mod process;
pub mod sim;
mod world;

pub use jobs::{TinyJob, corpus};
pub use process::{Finished, Running};
pub use world::{Standing, World};

use std::path::PathBuf;
use std::time::{Duration, Instant};

/// How long anything may take on a machine that does much else at the same time.
pub const PATIENCE: Duration = Duration::from_secs(90);

/// The program `name` of this workspace.
pub fn program(name: &str) -> PathBuf {
    let test = std::env::current_exe().expect("a test knows its executable");
    let target = test.parent().and_then(|deps| deps.parent()).expect("tests lie in target/PROFILE/deps");
    let program = target.join(name);
    assert!(
        program.is_file(),
        "{} is missing; run `cargo build --workspace --bins` first",
        program.display()
    );
    program
}

/// Waits until `condition` holds; panics with `what` when it does not in time.
pub fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !condition() {
        assert!(begun.elapsed() < PATIENCE, "still not true after {} s: {what}", PATIENCE.as_secs());
        std::thread::sleep(Duration::from_millis(10));
    }
}
