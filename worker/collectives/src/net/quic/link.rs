//! One connection, used without an async runtime: polled, with a waker that ends the wait of the thread that uses it.

use quinn::{Connection, RecvStream, SendStream};
use std::io::{self, ErrorKind};
use std::pin::Pin;
use std::task::{Context, Poll, Waker};
use tokio::io::{AsyncRead, ReadBuf};

/// Read at a time of what nobody has asked for yet.
const READ: usize = 128 << 10;
/// What is read ahead of a peer that has ended its side: more than its window.
const AHEAD_MAX: usize = 64 << 20;

pub struct Link {
    connection: Connection,
    data: (SendStream, RecvStream),
    /// Carries nothing but its end, which overtakes the data: that the other side is about to end.
    parting: (SendStream, RecvStream),
    /// Read and not asked for yet.
    inbox: Vec<u8>,
    /// Of the inbox, what was handed out.
    taken: usize,
    /// All data were read.
    over: bool,
    /// The peer said that it ends its side.
    parts: bool,
    /// This was told.
    ended: bool,
}

impl Link {
    pub fn new(
        connection: Connection,
        data: (SendStream, RecvStream),
        parting: (SendStream, RecvStream),
    ) -> Link {
        let (inbox, taken) = (Vec::new(), 0);
        Link { connection, data, parting, inbox, taken, over: false, parts: false, ended: false }
    }

    pub fn send(&mut self, bytes: &[u8], waker: &Waker) -> io::Result<usize> {
        match Pin::new(&mut self.data.0).poll_write(&mut Context::from_waker(waker), bytes) {
            Poll::Ready(sent) => sent.map_err(io::Error::from),
            Poll::Pending => Ok(0),
        }
    }

    pub fn receive(&mut self, into: &mut [u8], waker: &Waker) -> io::Result<usize> {
        if self.taken == self.inbox.len() {
            // Large pieces go where they belong, small ones come along with what follows them.
            if into.len() >= READ / 2 {
                return self.read(into, waker);
            }
            self.fill(waker)?;
        }
        let count = into.len().min(self.inbox.len() - self.taken);
        into[..count].copy_from_slice(&self.inbox[self.taken..self.taken + count]);
        self.taken += count;
        Ok(count)
    }

    /// 0: nothing now. Nothing ever is an error.
    fn read(&mut self, into: &mut [u8], waker: &Waker) -> io::Result<usize> {
        if self.over {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        let mut buffer = ReadBuf::new(into);
        let mut context = Context::from_waker(waker);
        match AsyncRead::poll_read(Pin::new(&mut self.data.1), &mut context, &mut buffer) {
            Poll::Pending => Ok(0),
            Poll::Ready(Ok(())) if !buffer.filled().is_empty() => Ok(buffer.filled().len()),
            Poll::Ready(result) => {
                self.over = true;
                result?;
                Err(ErrorKind::UnexpectedEof.into())
            }
        }
    }

    /// Some bytes into the inbox; whether there were any.
    fn fill(&mut self, waker: &Waker) -> io::Result<bool> {
        if self.taken == self.inbox.len() {
            self.inbox.clear();
            self.taken = 0;
        }
        let had = self.inbox.len();
        let mut inbox = std::mem::take(&mut self.inbox);
        inbox.resize(had + READ, 0);
        let count = self.read(&mut inbox[had..], waker);
        inbox.truncate(had + count.as_ref().copied().unwrap_or(0));
        self.inbox = inbox;
        Ok(count? > 0)
    }

    pub fn look_ahead(&mut self, waker: &Waker) -> &[u8] {
        while self.inbox.len() < AHEAD_MAX && matches!(self.fill(waker), Ok(true)) {}
        &self.inbox[self.taken..]
    }

    /// Whether `receive` would give something, or an error.
    pub fn is_readable(&mut self, waker: &Waker) -> bool {
        self.taken < self.inbox.len() || !matches!(self.fill(waker), Ok(false))
    }

    /// Whether the peer has ended its side and all that it sent is here. Once.
    pub fn ends_now(&mut self, waker: &Waker) -> bool {
        if self.ended {
            return false;
        }
        if !self.parts {
            let mut byte = [0];
            let mut buffer = ReadBuf::new(&mut byte);
            let mut context = Context::from_waker(waker);
            self.parts =
                AsyncRead::poll_read(Pin::new(&mut self.parting.1), &mut context, &mut buffer).is_ready();
        }
        if self.parts {
            self.look_ahead(waker);
            self.ended = self.over || self.inbox.len() >= AHEAD_MAX;
        }
        self.ended
    }

    pub fn finish(&mut self) {
        // An error means that it is finished, or the connection over.
        let _ = self.data.0.finish();
        let _ = self.parting.0.finish();
    }

    /// Returns when the other side has all that was sent before `finish`, or its connection is over.
    pub async fn delivered(mut self) {
        self.finish();
        let _ = self.data.0.stopped().await;
        let _ = self.parting.0.stopped().await;
        drop(self.connection);
    }
}
