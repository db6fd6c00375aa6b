//! `worker exec-rank`: what stands between the agent and a rank for a millisecond. It begins a session, ties the process to the agent's life,
//! enters its control group, goes to the working directory and becomes the program. It is a program of its own because between fork and exec
//! there is no safe Rust.
//!
//! In a session of its own a rank has no controlling terminal, wherever the agent was started: who asks at `/dev/tty`, as getpass and ssh do,
//! finds none and asks elsewhere or gives up, where it would else be stopped for ever as a process in the background.

use crate::cgroup;
use anyhow::Context;
use fleet_common::protocol::CANNOT_START;
use fleet_common::signals;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
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
        tell(program, &format!("{error:#}"));
        return 126;
    }
    let error = Command::new(program).args(rest).exec();
    let missing = (error.kind() == ErrorKind::NotFound).then(|| missing_interpreter(program)).flatten();
    let why = missing.map_or_else(
        || error.to_string(),
        |name| format!("its first line names an interpreter that is not there: `{}`", name.escape_debug()),
    );
    tell(program, &why);
    if error.kind() == ErrorKind::NotFound { 127 } else { 126 }
}

/// In one write: whoever reads it holds the whole line, and says it once.
fn tell(program: &OsStr, why: &str) {
    let line = format!("{CANNOT_START}{}: {why}\n", program.display());
    let _ = std::io::stderr().write_all(line.as_bytes()); // nobody to tell it to is nobody's loss
}

/// The interpreter of a script, if that is what was not found: the system says the same of both.
fn missing_interpreter(program: &OsStr) -> Option<String> {
    const LINE_MAX: u64 = 256; // the kernel reads no more
    let places: Vec<PathBuf> = match program.as_bytes().contains(&b'/') {
        true => vec![program.into()],
        false => std::env::split_paths(&std::env::var_os("PATH")?).map(|dir| dir.join(program)).collect(),
    };
    let mut begin = Vec::new();
    let script = places.iter().find_map(|place| File::open(place).ok())?;
    script.take(LINE_MAX).read_to_end(&mut begin).ok()?;
    let line = begin.strip_prefix(b"#!")?.split(|byte| *byte == b'\n').next()?;
    let name = String::from_utf8_lossy(line).trim_matches([' ', '\t']).split([' ', '\t']).next()?.to_owned();
    (!Path::new(&name).exists()).then_some(name)
}

fn prepare(parent: &OsStr, dir: &OsStr, cgroup: &OsStr) -> anyhow::Result<()> {
    nix::unistd::setsid().context("no session of its own")?;
    signals::mind_the_file_limit();
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
