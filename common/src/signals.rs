//! What signals mean to fleet's own programs.

use nix::sys::signal::{SigSet, Signal, raise};
use std::time::Duration;

/// One that follows another within this time says nothing new: GNU `timeout` strikes its child and then the whole process group, and a
/// scheduler does much the same. Only one that comes later asks for the end at once, without what would still be saved.
pub const AGAIN_AFTER: Duration = Duration::from_secs(1);

/// For the first lines of `main`: a file that grows beyond a limit (`ulimit -f`) is an error of the writing, which names the file, and not
/// the end of this process without a word. Threads that start later and programs that are run from here have it from this one.
pub fn mind_no_file_limit() {
    let _ = file_limit().thread_block(); // fails for no valid set
}

/// For a process that becomes somebody else's program: the limit strikes it as it would in a shell.
pub fn mind_the_file_limit() {
    let _ = file_limit().thread_unblock();
}

/// Whether this process was started with a signal ignored, as `nohup` does it with SIGHUP and a shell without job control with SIGINT for what runs
/// in the background. Only Linux says so.
pub fn is_ignored(signal: Signal) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let bit = 1 << (signal as u32 - 1);
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).is_some_and(|mask| mask & bit != 0)
}

/// A signal that ends this process (SIGINT, SIGTERM) first does `last`; one that is ignored stays so. For the first lines of `main`: threads that
/// start later have from it that they are not struck.
pub fn before_the_end(last: impl FnOnce() + Send + 'static) {
    // One that is blocked would be waited for, ignored or not.
    let ends = [Signal::SIGINT, Signal::SIGTERM].into_iter().filter(|signal| !is_ignored(*signal));
    let ends: SigSet = ends.collect();
    let _ = ends.thread_block(); // fails for no valid set
    let wait = move || {
        let Ok(signal) = ends.wait() else { return };
        last();
        // So that who waits for this process hears of which signal it died.
        let _ = ends.thread_unblock();
        let _ = raise(signal);
        // It is ignored here, and what this process was at is gone.
        std::process::exit(128 + signal as i32);
    };
    if std::thread::Builder::new().name("signals".into()).spawn(wait).is_err() {
        let _ = ends.thread_unblock(); // they strike as they always do
    }
}

fn file_limit() -> SigSet {
    let mut set = SigSet::empty();
    set.add(Signal::SIGXFSZ);
    set
}
