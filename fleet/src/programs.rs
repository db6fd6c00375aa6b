//! The other programs of fleet, which lie beside this one.

use crate::failure::Failure;
use fleet_common::libtorch;
use fleet_common::model::no_such_model;
use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The path of `name` beside the running executable.
pub fn beside(name: &str) -> Result<PathBuf, Failure> {
    let own = std::env::current_exe()
        .map_err(|e| Failure::environment(format!("cannot tell where fleet lies: {e}")))?;
    let path = own.with_file_name(name);
    if path.is_file() {
        return Ok(path);
    }
    Err(Failure::environment(format!(
        "`{name}` is not beside {}; build or install all of fleet's programs",
        own.display()
    )))
}

/// What `--model` names must be a directory.
pub fn check_model(path: &Path) -> Result<(), Failure> {
    match path.is_dir() {
        true => Ok(()),
        false => Err(Failure::input(format!("--model {}: {}", path.display(), no_such_model(path)))),
    }
}

/// Becomes `fleet-rank`, which alone links libtorch, doing `command`. Options without a value are left out. Returns only where it cannot
/// be started.
pub fn become_rank<'a>(
    command: &str,
    options: Vec<(&str, Option<OsString>)>,
    flags: impl IntoIterator<Item = &'a str>,
) -> Failure {
    let program = match beside("fleet-rank") {
        Ok(program) => program,
        Err(failure) => return failure,
    };
    if let Some(flaw) = libtorch::flaw(&program) {
        return Failure::environment(flaw);
    }
    let mut process = Command::new(program);
    process.arg(command);
    for (name, value) in options {
        // In one word each: the value may begin with a hyphen.
        process.args(
            value.map(|value| [OsString::from(name), "=".into(), value].into_iter().collect::<OsString>()),
        );
    }
    process.args(flags);
    Failure::environment(format!("cannot start fleet-rank: {}", process.exec()))
}
