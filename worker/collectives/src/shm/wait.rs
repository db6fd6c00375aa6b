//! Waiting for other processes: spin a little, then sleep on a futex in the shared segment.
//!
//! With more ranks than cores a spinning waiter keeps the rank it waits for from running, so the spin is short.

#![allow(unsafe_code)]

use std::sync::atomic::{AtomicU32, Ordering::SeqCst};
use std::time::{Duration, Instant};

/// A few microseconds: longer than a peer on another core needs to answer, shorter than a time slice. 45 x faster than long spins when
/// four ranks share two cores.
const SPINS: u32 = 200;

/// At one go; what a sleep takes beyond it does not count as waiting.
const SLEEP_MAX: Duration = Duration::from_millis(250);

/// Something that becomes true because another rank stored it. Lives in the segment, on a cache line of its own.
#[repr(C, align(64))]
pub(super) struct Event {
    /// Changes with every wake-up; what sleepers sleep on.
    epoch: AtomicU32,
    sleepers: AtomicU32,
}

#[derive(Debug, PartialEq)]
pub(super) enum Woken {
    Ready,
    Stopped,
    TimedOut,
}

impl Event {
    /// To be called after the `SeqCst` store that may have made a condition true. A system call only if someone sleeps.
    ///
    /// No wake-up is lost: a sleeper counts itself before it looks at its condition, the waker stores before it counts the sleepers.
    pub fn wake(&self) {
        if self.sleepers.load(SeqCst) > 0 {
            self.epoch.fetch_add(1, SeqCst);
            futex_wake_all(&self.epoch);
        }
    }

    /// Waits until `ready`, until `stopped`, or until the deadline has passed, not counting the time in which this process itself stood
    /// still: a gang that a debugger stops and continues as a whole has missed nothing. Both look at memory with `SeqCst`; `ready` wins.
    pub fn wait(&self, deadline: Duration, ready: impl Fn() -> bool, stopped: impl Fn() -> bool) -> Woken {
        for _ in 0..SPINS {
            if ready() {
                return Woken::Ready;
            }
            std::hint::spin_loop();
        }
        let mut left = deadline;
        self.sleepers.fetch_add(1, SeqCst);
        let woken = loop {
            let epoch = self.epoch.load(SeqCst);
            if ready() {
                break Woken::Ready;
            }
            if stopped() {
                break Woken::Stopped;
            }
            if left.is_zero() {
                break Woken::TimedOut;
            }
            let (slept, sleep) = (Instant::now(), left.min(SLEEP_MAX));
            futex_wait(&self.epoch, epoch, sleep);
            left -= slept.elapsed().min(sleep);
        };
        self.sleepers.fetch_sub(1, SeqCst);
        woken
    }
}

fn futex_wait(word: &AtomicU32, expected: u32, timeout: Duration) {
    let timeout = libc::timespec {
        tv_sec: timeout.as_secs().try_into().unwrap_or(libc::time_t::MAX),
        tv_nsec: timeout.subsec_nanos().into(),
    };
    // SAFETY: `word` and `timeout` outlive the call. A wake-up for whatever reason only makes the caller look again.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAIT, expected, &raw const timeout) };
}

fn futex_wake_all(word: &AtomicU32) {
    // SAFETY: `word` is a mapped address; waking has no other effect.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE, i32::MAX) };
}
