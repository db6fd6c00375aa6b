//! What a transport must bring: bytes in order to and from each peer, and a way to wait.

use std::io;
use std::time::Duration;

/// For what a rank waits at one peer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Want {
    pub read: bool,
    pub write: bool,
}

/// Connections to peers, by rank; none to this rank itself. Nothing blocks but `wait`. Errors mean that the connection is over.
pub trait Links: Send {
    /// Takes some of `bytes`; 0: there is no room now.
    fn send(&mut self, peer: usize, bytes: &[u8]) -> io::Result<usize>;
    /// Hands on what was taken and is still in this process; whether all is gone.
    fn flush(&mut self, peer: usize) -> io::Result<bool>;
    /// Some bytes, 0: none now. `UnexpectedEof` where the peer has ended its side and all has been read.
    fn receive(&mut self, peer: usize, into: &mut [u8]) -> io::Result<usize>;
    /// Reads what has come so far, up to a limit, to be looked at before it is received.
    fn look_ahead(&mut self, peer: usize) -> io::Result<&[u8]>;
    /// Returns when something that is wanted may go on, when a peer has ended its side, when woken, or after `timeout`.
    fn wait(&mut self, wants: &[Want], timeout: Duration) -> io::Result<()>;
    /// The peers that ended their side, since the last call.
    fn ended(&mut self) -> Vec<usize>;
    /// Ends this side, behind all that was sent.
    fn finish(&mut self, peer: usize);
}

/// Wakes a `Links::wait` from another thread.
pub trait Wake: Send + Sync {
    fn wake(&self);
}
