//! A small model, and jobs that go on from it.

use crate::{Finished, TinyJob, World};
use std::path::{Path, PathBuf};

/// The checkpoint that the summary names.
pub fn checkpoint(done: &Finished) -> PathBuf {
    PathBuf::from(done.summary()["checkpoint"].as_str().unwrap_or_else(|| panic!("none: {}", done.all())))
}

/// A world in which a small model has been trained, and the model.
pub fn with_a_base() -> (World, PathBuf) {
    let world = World::new();
    let base = TinyJob { run_name: "base", ..TinyJob::default() };
    let base = checkpoint(&world.launch(2, &base, &[]).finish().expect(0));
    (world, base)
}

/// A job file that trains an adapter beside `base`.
pub fn job(world: &World, base: &Path, run_name: &str) -> String {
    let text = TinyJob { run_name: "adapter", max_steps: 30, save_steps: 10, ..TinyJob::default() }.toml();
    let (before, rest) = text.split_once("[model]").expect("a table of a job");
    let (_, after) = rest.split_once("[data]").expect("a table of a job");
    let text = format!("{before}[model]\npath = {base:?}\n\n[data]{after}");
    let text = text.replace("run_name = \"adapter\"", &format!("run_name = {run_name:?}"));
    world.write(&format!("{run_name}.toml"), text).display().to_string()
}
