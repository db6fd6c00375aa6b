//! Ends a process together with the one that started it.

use std::io;

/// Asks the system for SIGTERM when the parent ends, and fails if `parent` has ended already. `parent` is the id that the starter passed of
/// itself: asking for it here could come too late. Call it before any thread is started; on Linux only.
#[cfg(target_os = "linux")]
pub fn die_with(parent: u32) -> io::Result<()> {
    nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGTERM)?;
    if nix::unistd::getppid().as_raw().unsigned_abs() == parent {
        return Ok(());
    }
    Err(io::Error::other(format!("process {parent}, which started this one, has ended")))
}

#[cfg(not(target_os = "linux"))]
pub fn die_with(_parent: u32) -> io::Result<()> {
    Err(io::Error::other("--die-with-parent works on Linux only"))
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_is_not_the_parent_counts_as_ended() {
        let error = die_with(std::process::id()).unwrap_err();
        assert!(error.to_string().contains("has ended"), "{error}");
    }
}
