//! The signals that a launch minds: those that ask it to end, in the order in which they come, and those that are its program's.

use crate::failure::Failure;
use fleet_common::signals::{AGAIN_AFTER, is_ignored};
pub use nix::sys::signal::Signal;
use std::time::Instant;
use tokio::signal::unix::{self, SignalKind};

/// As a shell says that a signal ended something.
pub fn exit_code(signal: Signal) -> u8 {
    128 + signal as u8
}

/// Those that ask this launch to end: SIGINT, SIGTERM, SIGQUIT, SIGHUP.
pub struct Signals {
    interrupt: unix::Signal,
    terminate: unix::Signal,
    quit: unix::Signal,
    /// `None` under nohup, whose point is that a hang-up does nothing.
    hang_up: Option<unix::Signal>,
    /// When the last one came that counted.
    counted: Option<Instant>,
}

impl Signals {
    pub fn listen() -> Result<Signals, Failure> {
        let hang_up = if is_ignored(Signal::SIGHUP) { None } else { Some(on(SignalKind::hangup())?) };
        Ok(Signals {
            interrupt: on(SignalKind::interrupt())?,
            terminate: on(SignalKind::terminate())?,
            quit: on(SignalKind::quit())?,
            hang_up,
            counted: None,
        })
    }

    /// The next one that says something new. May be dropped and called again.
    pub async fn next(&mut self) -> Signal {
        loop {
            let signal = self.any().await;
            if is_new(&mut self.counted, Instant::now()) {
                return signal;
            }
        }
    }

    async fn any(&mut self) -> Signal {
        let hang_up = async {
            match &mut self.hang_up {
                Some(signal) => signal.recv().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            _ = self.interrupt.recv() => Signal::SIGINT,
            _ = self.terminate.recv() => Signal::SIGTERM,
            _ = self.quit.recv() => Signal::SIGQUIT,
            _ = hang_up => Signal::SIGHUP,
        }
    }
}

/// Those that ask for nothing that a launch knows, as a scheduler's warning that the time is nearly over: SIGUSR1 and SIGUSR2.
pub struct Notices {
    first: unix::Signal,
    second: unix::Signal,
}

impl Notices {
    pub fn listen() -> Result<Notices, Failure> {
        Ok(Notices { first: on(SignalKind::user_defined1())?, second: on(SignalKind::user_defined2())? })
    }

    pub async fn next(&mut self) -> Signal {
        tokio::select! {
            _ = self.first.recv() => Signal::SIGUSR1,
            _ = self.second.recv() => Signal::SIGUSR2,
        }
    }
}

fn on(kind: SignalKind) -> Result<unix::Signal, Failure> {
    unix::signal(kind).map_err(|e| Failure::environment(format!("cannot listen for signals: {e}")))
}

/// Whether one that comes `now` is more than an echo of the last one that `counted`.
fn is_new(counted: &mut Option<Instant>, now: Instant) -> bool {
    let echo = counted.is_some_and(|then| now.duration_since(then) < AGAIN_AFTER);
    if !echo {
        *counted = Some(now);
    }
    !echo
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn what_comes_within_a_second_is_the_same_signal_and_a_later_one_is_another() {
        let (begin, mut counted) = (Instant::now(), None);
        let mut new = |ms| is_new(&mut counted, begin + Duration::from_millis(ms));
        assert_eq!([0, 1, 999, 1_000, 1_500, 2_500].map(&mut new), [true, false, false, true, false, true]);
    }

    #[test]
    fn a_signal_is_told_as_a_shell_does() {
        assert_eq!([Signal::SIGHUP, Signal::SIGINT, Signal::SIGTERM].map(exit_code), [129, 130, 143]);
    }
}
