//! Links over TCP: a connection for each pair of ranks, with TLS 1.3, or plain after a TLS handshake that both have passed.

mod connect;
mod link;

use super::links::{Links, Wake, Want};
pub use connect::connect;
use link::Link;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

/// The peer has ended its side.
#[cfg(target_os = "linux")]
const ENDED: PollFlags = PollFlags::RDHUP;
#[cfg(not(target_os = "linux"))]
const ENDED: PollFlags = PollFlags::HUP;

pub struct TcpLinks {
    /// By rank; `None` for this one.
    links: Vec<Option<Link>>,
    woken: UnixStream,
    ended: Vec<usize>,
}

/// Its stream ends a wait.
struct Waker(UnixStream);

impl Wake for Waker {
    fn wake(&self) {
        // A full buffer wakes as well.
        let _ = (&self.0).write(&[1]);
    }
}

impl TcpLinks {
    fn new(links: Vec<Option<Link>>) -> io::Result<(TcpLinks, Arc<dyn Wake>)> {
        let (woken, waker) = UnixStream::pair()?;
        woken.set_nonblocking(true)?;
        waker.set_nonblocking(true)?;
        Ok((TcpLinks { links, woken, ended: Vec::new() }, Arc::new(Waker(waker))))
    }

    fn link(&mut self, peer: usize) -> io::Result<&mut Link> {
        self.links[peer].as_mut().ok_or_else(|| io::Error::other("a rank has no connection to itself"))
    }
}

impl Links for TcpLinks {
    fn send(&mut self, peer: usize, bytes: &[u8]) -> io::Result<usize> {
        self.link(peer)?.send(bytes)
    }

    fn flush(&mut self, peer: usize) -> io::Result<bool> {
        self.link(peer)?.flush()
    }

    fn receive(&mut self, peer: usize, into: &mut [u8]) -> io::Result<usize> {
        self.link(peer)?.receive(into)
    }

    fn look_ahead(&mut self, peer: usize) -> io::Result<&[u8]> {
        self.link(peer)?.look_ahead()
    }

    fn wait(&mut self, wants: &[Want], timeout: Duration) -> io::Result<()> {
        let mut fds = vec![PollFd::new(&self.woken, PollFlags::IN)];
        let mut ranks = Vec::with_capacity(self.links.len());
        for (rank, link) in self.links.iter().enumerate() {
            let Some(link) = link else { continue };
            let mut flags = PollFlags::empty();
            flags.set(PollFlags::IN, wants[rank].read && !link.has_ended());
            flags.set(PollFlags::OUT, wants[rank].write);
            flags.set(ENDED, !link.has_ended());
            if !flags.is_empty() {
                fds.push(PollFd::new(link.socket(), flags));
                ranks.push(rank);
            }
        }
        let timeout = Timespec::try_from(timeout).map_err(io::Error::other)?;
        match poll(&mut fds, Some(&timeout)) {
            Err(rustix::io::Errno::INTR) => {}
            result => drop(result?),
        }
        let woken = !fds[0].revents().is_empty();
        let over = |fd: &PollFd| fd.revents().intersects(ENDED | PollFlags::HUP | PollFlags::ERR);
        let ended: Vec<usize> =
            fds[1..].iter().zip(&ranks).filter(|(fd, _)| over(fd)).map(|(_, rank)| *rank).collect();
        if woken {
            let _ = (&self.woken).read(&mut [0; 64]);
        }
        for rank in ended {
            if let Some(link) = &mut self.links[rank]
                && !link.has_ended()
            {
                link.set_ended();
                self.ended.push(rank);
            }
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
