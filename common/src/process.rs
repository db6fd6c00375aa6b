//! Whether a process that a file names is still that process: numbers are used again.

use nix::errno::Errno;
use nix::sys::signal::kill;
use nix::unistd::Pid;

/// When a process started, in the kernel's ticks since boot; only Linux says it.
pub fn started(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // the second field is the name in brackets and may hold spaces; the start is the 22nd
    stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}

/// Whether the process `pid` runs that started at `start`; without one, any that has this number now.
pub fn is_running(pid: u32, start: Option<u64>) -> bool {
    let Some(number) = i32::try_from(pid).ok().filter(|number| *number > 0) else { return false };
    let alive = !matches!(kill(Pid::from_raw(number), None), Err(Errno::ESRCH));
    alive && (start.is_none() || start == started(pid))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_that_was_used_again_is_another_process() {
        let me = std::process::id();
        assert!(is_running(me, started(me)) && is_running(me, None));
        assert!(!is_running(me, started(me).map(|start| start + 1).or(Some(1))));
        assert!(!is_running(0, None) && !is_running(u32::MAX, None));
    }
}
