//! Links over QUIC: a connection for each pair of ranks, all from one UDP port. A thread of an async runtime encrypts, sends and receives, so
//! what is under way goes on while this rank computes; the rank's own threads only fill and empty streams.
//!
//! Nobody's kernel tells of the end of a process: a rank whose process is gone is missed after `IDLE`, unless its agent says it sooner.

mod connect;
mod link;

use super::links::{Links, Wake, Want};
pub use connect::connect;
use link::Link;
use quinn::congestion::CubicConfig;
use quinn::{Endpoint, IdleTimeout, TransportConfig, VarInt};
use std::io;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::task::Waker;
use std::time::Duration;
use tokio::runtime::Runtime;

/// A peer from which nothing has come for so long is gone.
const IDLE: Duration = Duration::from_secs(15);
/// Four chances before.
const KEEP_ALIVE: Duration = Duration::from_secs(3);
/// Until the first answer tells how far away the other side is: a lost first packet is sent again after three times this.
const FIRST_RTT: Duration = Duration::from_millis(20);
/// Sent before the first acknowledgement.
const FIRST_WINDOW: u64 = 256 << 10;
/// Bytes under way to a rank that has not asked for them yet, at most; and as many that are not acknowledged.
const WINDOW: u32 = 4 << 20;
/// Room in the kernel for what comes while the thread does not run. The system may give less.
const SOCKET_BUFFER: usize = 8 << 20;
/// For what others have not acknowledged yet, when this rank goes.
const LINGER: Duration = Duration::from_secs(2);
/// For the last packet of each connection, which says that it is over.
const CLOSING: Duration = Duration::from_millis(100);

pub struct QuicLinks {
    /// By rank; `None` for this one.
    links: Vec<Option<Link>>,
    signal: Arc<Signal>,
    waker: Waker,
    ended: Vec<usize>,
    endpoint: Endpoint,
    /// `None` at the end.
    runtime: Option<Runtime>,
}

/// Ends a wait: another thread's `wake`, or news of a stream.
#[derive(Default)]
struct Signal {
    woken: Mutex<bool>,
    changed: Condvar,
}

impl Wake for Signal {
    fn wake(&self) {
        *self.woken.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.changed.notify_all();
    }
}

impl std::task::Wake for Signal {
    fn wake(self: Arc<Self>) {
        Wake::wake(&*self);
    }
}

impl Signal {
    fn wait(&self, timeout: Duration) {
        let woken = self.woken.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.changed.wait_timeout_while(woken, timeout, |woken| !*woken);
        *waited.unwrap_or_else(PoisonError::into_inner).0 = false;
    }
}

fn transport() -> TransportConfig {
    let mut config = TransportConfig::default();
    let mut congestion = CubicConfig::default();
    congestion.initial_window(FIRST_WINDOW);
    config
        .max_idle_timeout(Some(IdleTimeout::from(VarInt::from_u32(IDLE.as_millis() as u32))))
        .keep_alive_interval(Some(KEEP_ALIVE))
        .initial_rtt(FIRST_RTT)
        .max_concurrent_bidi_streams(2u32.into())
        .max_concurrent_uni_streams(0u32.into())
        .stream_receive_window(WINDOW.into())
        .send_window(WINDOW.into())
        .datagram_receive_buffer_size(None)
        .congestion_controller_factory(Arc::new(congestion));
    config
}

impl QuicLinks {
    fn new(links: Vec<Option<Link>>, endpoint: Endpoint, runtime: Runtime) -> QuicLinks {
        let signal = Arc::new(Signal::default());
        let waker = Waker::from(signal.clone());
        QuicLinks { links, signal, waker, ended: Vec::new(), endpoint, runtime: Some(runtime) }
    }

    fn link(&mut self, peer: usize) -> io::Result<(&mut Link, &Waker)> {
        let link = self.links[peer].as_mut();
        Ok((link.ok_or_else(|| io::Error::other("a rank has no connection to itself"))?, &self.waker))
    }
}

impl Links for QuicLinks {
    fn send(&mut self, peer: usize, bytes: &[u8]) -> io::Result<usize> {
        let (link, waker) = self.link(peer)?;
        link.send(bytes, waker)
    }

    /// The runtime's thread sends whatever was taken.
    fn flush(&mut self, _peer: usize) -> io::Result<bool> {
        Ok(true)
    }

    fn receive(&mut self, peer: usize, into: &mut [u8]) -> io::Result<usize> {
        let (link, waker) = self.link(peer)?;
        link.receive(into, waker)
    }

    fn look_ahead(&mut self, peer: usize) -> io::Result<&[u8]> {
        let (link, waker) = self.link(peer)?;
        Ok(link.look_ahead(waker))
    }

    fn wait(&mut self, wants: &[Want], timeout: Duration) -> io::Result<()> {
        let mut ready = false;
        for (rank, link) in self.links.iter_mut().enumerate() {
            let Some(link) = link else { continue };
            ready |= wants[rank].read && link.is_readable(&self.waker);
            if link.ends_now(&self.waker) {
                self.ended.push(rank);
                ready = true;
            }
        }
        if !ready {
            self.signal.wait(timeout);
        }
        Ok(())
    }

    fn ended(&mut self) -> Vec<usize> {
        std::mem::take(&mut self.ended)
    }

    fn finish(&mut self, peer: usize) {
        if let Some(link) = &mut self.links[peer] {
            link.finish();
        }
    }
}

impl Drop for QuicLinks {
    /// Waits a little until the others have what was sent.
    fn drop(&mut self) {
        let Some(runtime) = self.runtime.take() else { return };
        let links: Vec<Link> = self.links.drain(..).flatten().collect();
        runtime.block_on(async {
            let all = async {
                for link in links {
                    link.delivered().await;
                }
            };
            let _ = tokio::time::timeout(LINGER, all).await;
            connect::close(&self.endpoint).await;
        });
        runtime.shutdown_background();
    }
}
