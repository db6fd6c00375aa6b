//! One connection, that never blocks.

#[cfg(target_os = "linux")]
use rustix::net::sockopt::set_tcp_congestion;
use rustls::Connection;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};

/// Bytes read from the kernel at a time.
const READ: usize = 128 << 10;
/// Encrypted bytes that wait in this process, at most: they are encrypted anew only when the kernel takes some.
const UNSENT_MAX: usize = 256 << 10;
/// What is read ahead of a connection that has ended: more than a kernel keeps for one.
const AHEAD_MAX: usize = 64 << 20;

pub struct Link {
    socket: TcpStream,
    /// `None`: plain.
    tls: Option<Box<Connection>>,
    /// Received and not asked for yet.
    inbox: Vec<u8>,
    /// Of the inbox, what was handed out.
    taken: usize,
    /// As it came from the kernel.
    raw: Vec<u8>,
    unsent: usize,
    /// The peer will send nothing more.
    ended: bool,
}

impl Link {
    /// `socket` is in blocking mode, its handshake over.
    pub fn new(socket: TcpStream, mut tls: Option<Box<Connection>>) -> io::Result<Link> {
        socket.set_nonblocking(true)?;
        socket.set_nodelay(true)?;
        // Where the system's default paces by a model of long paths, as BBR does, hosts side by side get a tenth of the link.
        #[cfg(target_os = "linux")]
        let _ = ["cubic", "reno"].iter().any(|name| set_tcp_congestion(&socket, name).is_ok());
        socket.set_read_timeout(None)?;
        socket.set_write_timeout(None)?;
        let mut inbox = Vec::new();
        if let Some(tls) = &mut tls {
            tls.set_buffer_limit(None);
            // What came along with the end of the handshake.
            take_plain(tls, &mut inbox)?;
        }
        Ok(Link { socket, tls, inbox, taken: 0, raw: vec![0; READ], unsent: 0, ended: false })
    }

    pub fn socket(&self) -> &TcpStream {
        &self.socket
    }

    pub fn has_ended(&self) -> bool {
        self.ended
    }

    pub fn set_ended(&mut self) {
        self.ended = true;
    }

    pub fn send(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let Some(tls) = &mut self.tls else { return or_none(self.socket.write(bytes)) };
        let room = UNSENT_MAX.saturating_sub(self.unsent);
        let taken = tls.writer().write(&bytes[..bytes.len().min(room)])?;
        self.unsent += taken;
        self.flush()?;
        Ok(taken)
    }

    pub fn flush(&mut self) -> io::Result<bool> {
        let Some(tls) = &mut self.tls else { return Ok(true) };
        while tls.wants_write() {
            if or_none(tls.write_tls(&mut &self.socket))? == 0 {
                return Ok(false);
            }
        }
        self.unsent = 0;
        Ok(true)
    }

    pub fn receive(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if self.taken == self.inbox.len() {
            self.inbox.clear();
            self.taken = 0;
            // Large pieces go where they belong, small ones come along with what follows them.
            if self.tls.is_none() && into.len() >= READ / 2 {
                return end_is_error(self.socket.read(into));
            }
            self.read()?;
        }
        let count = into.len().min(self.inbox.len() - self.taken);
        into[..count].copy_from_slice(&self.inbox[self.taken..self.taken + count]);
        self.taken += count;
        Ok(count)
    }

    /// Some bytes from the kernel into the inbox.
    fn read(&mut self) -> io::Result<usize> {
        let count = match end_is_error(self.socket.read(&mut self.raw))? {
            0 => return Ok(0),
            count => count,
        };
        let Some(tls) = &mut self.tls else {
            self.inbox.extend_from_slice(&self.raw[..count]);
            return Ok(count);
        };
        let mut raw = &self.raw[..count];
        while !raw.is_empty() {
            tls.read_tls(&mut raw)?;
            take_plain(tls, &mut self.inbox)?;
        }
        Ok(count)
    }

    pub fn look_ahead(&mut self) -> io::Result<&[u8]> {
        while self.inbox.len() < AHEAD_MAX {
            match self.read() {
                Ok(0) => break,
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::UnexpectedEof => break,
                Err(error) => return Err(error),
            }
        }
        Ok(&self.inbox[self.taken..])
    }

    pub fn finish(&mut self) {
        let _ = self.socket.shutdown(Shutdown::Write);
    }
}

/// Decrypts what has come.
fn take_plain(tls: &mut Connection, inbox: &mut Vec<u8>) -> io::Result<()> {
    let state = tls.process_new_packets().map_err(io::Error::other)?;
    let had = inbox.len();
    inbox.resize(had + state.plaintext_bytes_to_read(), 0);
    tls.reader().read_exact(&mut inbox[had..])
}

fn or_none(result: io::Result<usize>) -> io::Result<usize> {
    match result {
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(0),
        result => result,
    }
}

/// Nothing now is 0, nothing ever is an error. Of a read into room for something.
fn end_is_error(result: io::Result<usize>) -> io::Result<usize> {
    match result {
        Ok(0) => Err(ErrorKind::UnexpectedEof.into()),
        result => or_none(result),
    }
}
