//! `worker exec-rank`: what stands between the agent and a rank for a millisecond. It ties the process to the agent's life, enters its
//! control group, goes to the working directory and becomes the program. It is a program of its own because between fork and exec there is no safe Rust.

use crate::cgroup;
use anyhow::Context;
use std::ffi::{OsStr, OsString};
use std::os::unix::process::CommandExt;
use std::process::Command;

/// First argument of the hidden mode.
pub const MODE: &str = "exec-rank";

/// `exec-rank PARENT DIR CGROUP PROGRAM ARGS...`; an empty DIR or CGROUP stays where it is.
pub fn arguments(parent: u32, dir: &OsStr, cgroup: &OsStr, argv: &[OsString]) -> Vec<OsString> {
    let mut all = vec![MODE.into(), parent.to_string().into(), dir.to_owned(), cgroup.to_owned()];
    all.extend(argv.iter().cloned());
    all
}

/// Returns only if the program cannot be started: 127 if it is not there, 126 otherwise, as a shell does.
pub fn run(arguments: &[OsString]) -> u8 {
    let [parent, dir, cgroup, program, rest @ ..] = arguments else {
        eprintln!("error: `worker {MODE}` is for the agent's own use");
        return fleet_common::exit::REFUSED_INPUT;
    };
    if let Err(error) = prepare(parent, dir, cgroup) {
        eprintln!("error: cannot start {}: {error:#}", program.display());
        return 126;
    }
    let error = Command::new(program).args(rest).exec();
    eprintln!("error: cannot start {}: {error}", program.display());
    if error.kind() == std::io::ErrorKind::NotFound { 127 } else { 126 }
}

fn prepare(parent: &OsStr, dir: &OsStr, cgroup: &OsStr) -> anyhow::Result<()> {
    let parent: i32 = parent.to_str().and_then(|pid| pid.parse().ok()).context("no parent was named")?;
    #[cfg(target_os = "linux")]
    nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)
        .context("cannot be tied to the agent's life")?;
    // The agent may have died before the line above.
    anyhow::ensure!(nix::unistd::getppid().as_raw() == parent, "the agent is gone");
    if !cgroup.is_empty() {
        cgroup::enter(cgroup.as_ref()).with_context(|| format!("cannot enter {}", cgroup.display()))?;
    }
    if !dir.is_empty() {
        std::env::set_current_dir(dir).with_context(|| format!("cannot enter {}", dir.display()))?;
    }
    Ok(())
}
