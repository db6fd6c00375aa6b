//! The signals that this process hears.

use nix::sys::signal::Signal as Number;
use std::future::pending;
use tokio::signal::unix::{Signal, SignalKind, signal};

/// What others may send to this process without ending it on the spot.
pub struct Signals {
    terminate: Signal,
    interrupt: Signal,
    quit: Signal,
    hangup: Signal,
    user1: Signal,
    user2: Signal,
    /// Of a `fleet launch` alone, which says so that nobody reads its program's stdout, or stderr: elsewhere a pipe that breaks is an error of
    /// the writing and nothing else.
    unheard: Option<[Signal; 2]>,
}

impl Signals {
    pub fn listen(relay: bool) -> std::io::Result<Signals> {
        Ok(Signals {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            quit: signal(SignalKind::quit())?,
            hangup: signal(SignalKind::hangup())?,
            user1: signal(SignalKind::user_defined1())?,
            user2: signal(SignalKind::user_defined2())?,
            unheard: match relay {
                true => Some([signal(SignalKind::pipe())?, signal(SignalKind::io())?]),
                false => None,
            },
        })
    }

    pub async fn next(&mut self) -> Number {
        let unheard = async {
            match &mut self.unheard {
                Some([pipe, io]) => tokio::select! {
                    _ = pipe.recv() => Number::SIGPIPE,
                    _ = io.recv() => Number::SIGIO,
                },
                None => pending().await,
            }
        };
        tokio::select! {
            _ = self.terminate.recv() => Number::SIGTERM,
            _ = self.interrupt.recv() => Number::SIGINT,
            _ = self.quit.recv() => Number::SIGQUIT,
            _ = self.hangup.recv() => Number::SIGHUP,
            _ = self.user1.recv() => Number::SIGUSR1,
            _ = self.user2.recv() => Number::SIGUSR2,
            signal = unheard => signal,
        }
    }
}
