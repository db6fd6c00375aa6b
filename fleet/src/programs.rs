//! The other programs of fleet, which lie beside this one.

use crate::failure::Failure;
use std::path::PathBuf;

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
