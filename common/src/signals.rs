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

/// A signal that ends this process (SIGINT, SIGTERM) first does `last`. For the first lines of `main`: threads that start later have from it that
/// they are not struck.
pub fn before_the_end(last: impl FnOnce() + Send + 'static) {
    let ends: SigSet = [Signal::SIGINT, Signal::SIGTERM].into_iter().collect();
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
