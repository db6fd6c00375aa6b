//! SIGINT, SIGTERM and SIGHUP, in the order in which they come.

use crate::failure::Failure;
use tokio::signal::unix::{self, SignalKind};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    Interrupt,
    Terminate,
    HangUp,
}

impl Signal {
    pub fn name(self) -> &'static str {
        match self {
            Signal::Interrupt => "SIGINT",
            Signal::Terminate => "SIGTERM",
            Signal::HangUp => "SIGHUP",
        }
    }

    /// 128 and the signal's number.
    pub fn exit_code(self) -> u8 {
        match self {
            Signal::Interrupt => fleet_common::exit::SIGINT,
            Signal::Terminate => fleet_common::exit::SIGTERM,
            Signal::HangUp => 129,
        }
    }
}

pub struct Signals {
    interrupt: unix::Signal,
    terminate: unix::Signal,
    /// `None` under nohup, whose point is that a hang-up does nothing.
    hang_up: Option<unix::Signal>,
}

impl Signals {
    pub fn listen() -> Result<Signals, Failure> {
        let on = |kind| {
            unix::signal(kind).map_err(|e| Failure::environment(format!("cannot listen for signals: {e}")))
        };
        let hang_up = if hang_up_is_ignored() { None } else { Some(on(SignalKind::hangup())?) };
        Ok(Signals {
            interrupt: on(SignalKind::interrupt())?,
            terminate: on(SignalKind::terminate())?,
            hang_up,
        })
    }

    pub async fn next(&mut self) -> Signal {
        let hang_up = async {
            match &mut self.hang_up {
                Some(signal) => signal.recv().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            _ = self.interrupt.recv() => Signal::Interrupt,
            _ = self.terminate.recv() => Signal::Terminate,
            _ = hang_up => Signal::HangUp,
        }
    }
}

/// Whether this process was started with SIGHUP ignored. Only Linux says so.
fn hang_up_is_ignored() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).is_some_and(|mask| mask & 1 != 0)
}
