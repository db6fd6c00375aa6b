//! How ranks meet over TCP. Each handshake with one who calls has a thread, so a stranger that says nothing keeps nobody waiting; another
//! thread calls.

use super::link::Link;
use super::{TcpLinks, Wake};
use crate::error::Result;
use crate::net::meeting::{
    Arrival, CallFailed, HANDSHAKE, HANDSHAKES_MAX, HELLO, Hello, Meeting, PAUSE, caller,
};
use crate::net::rendezvous::{Key, Rendezvous, failed};
use crate::net::tls;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustls::{ClientConfig, ClientConnection, Connection, ServerConfig, ServerConnection};
use std::io::{self, ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, atomic::AtomicUsize, atomic::Ordering::SeqCst};
use std::time::{Duration, Instant};

pub fn connect(
    listener: &TcpListener,
    rendezvous: &Rendezvous,
    key: &Key,
    timeout: Duration,
) -> Result<(TcpLinks, Arc<dyn Wake>)> {
    let until = Instant::now() + timeout;
    let unusable = |error: rustls::Error| failed("cannot use the key")(io::Error::other(error));
    let config = tls::accepting(rendezvous, key).map_err(unusable)?;
    let calling: Vec<Arc<ClientConfig>> = (0..rendezvous.rank)
        .map(|rank| tls::connecting(rendezvous, rank, key).map(Arc::new).map_err(unusable))
        .collect::<Result<_>>()?;
    let (arrive, arrivals) = mpsc::channel();
    let rendezvous = Arc::new(rendezvous.clone());
    let accepting =
        Accepting { config: Arc::new(config), rendezvous: rendezvous.clone(), arrive: arrive.clone() };
    std::thread::spawn(move || {
        // The nearest first: then a rank is called by one after the other, and not by all at once.
        for (rank, config) in calling.into_iter().enumerate().rev() {
            let arrival = match call(&rendezvous, rank, config, until) {
                Ok(link) => Arrival::Joined(rank, link),
                Err(why) => Arrival::Wrong(why.of(rank, rendezvous.ranks[rank].address)),
            };
            let stop = matches!(arrival, Arrival::Wrong(_));
            if arrive.send(arrival).is_err() || stop {
                return;
            }
        }
    });
    let links = accept(listener, &accepting, &arrivals, until)?;
    TcpLinks::new(links).map_err(failed("cannot make a socket"))
}

/// Takes those who call, and those who were called, until all are there.
fn accept(
    listener: &TcpListener,
    accepting: &Accepting,
    arrivals: &Receiver<Arrival<Link>>,
    until: Instant,
) -> Result<Vec<Option<Link>>> {
    let unusable = failed("cannot accept connections");
    listener.set_nonblocking(true).map_err(&unusable)?;
    let look = Timespec::try_from(PAUSE).map_err(|error| unusable(io::Error::other(error)))?;
    let handshakes = Arc::new(AtomicUsize::new(0));
    let mut meeting = Meeting::new(&accepting.rendezvous);
    loop {
        while let Ok(arrival) = arrivals.try_recv() {
            meeting.take(arrival)?;
        }
        if meeting.is_complete() {
            return Ok(meeting.links());
        }
        if Instant::now() >= until {
            return Err(meeting.late());
        }
        let _ = poll(&mut [PollFd::new(listener, PollFlags::IN)], Some(&look));
        if handshakes.load(SeqCst) < HANDSHAKES_MAX
            && let Ok((socket, _)) = listener.accept()
        {
            accepting.clone().in_a_thread(socket, handshakes.clone());
        }
    }
}

#[derive(Clone)]
struct Accepting {
    config: Arc<ServerConfig>,
    rendezvous: Arc<Rendezvous>,
    arrive: Sender<Arrival<Link>>,
}

impl Accepting {
    fn in_a_thread(self, socket: TcpStream, count: Arc<AtomicUsize>) {
        count.fetch_add(1, SeqCst);
        std::thread::spawn(move || {
            if let Ok(from) = socket.peer_addr() {
                let mut claims = None;
                let arrival = self.handshake(socket, &mut claims);
                let refused = |why| Arrival::refused(from, claims.as_deref(), &why);
                let _ = self.arrive.send(arrival.unwrap_or_else(refused));
            }
            count.fetch_sub(1, SeqCst);
        });
    }

    fn handshake(&self, socket: TcpStream, claims: &mut Option<String>) -> io::Result<Arrival<Link>> {
        let until = Instant::now() + HANDSHAKE;
        let mut tls = ServerConnection::new(self.config.clone()).map_err(io::Error::other)?;
        let mut both = Both { socket: &socket, until };
        let shaken = handshake(&mut tls, &mut both);
        *claims = tls.server_name().map(str::to_owned);
        shaken?;
        let shown = tls.peer_certificates().and_then(|keys| keys.first()).map(|key| key.as_ref());
        let rank = caller(&self.rendezvous, shown)?;
        let mut tls = Connection::from(tls);
        let mine = Hello::of(&self.rendezvous);
        let theirs = read_hello(&mut tls, &mut both)?;
        write_hello(&mut tls, &mut both, mine)?;
        if let Some(what) = theirs.difference(mine, rank) {
            return Ok(Arrival::wrong(rank, what));
        }
        let tls = if mine.encryption {
            Some(Box::new(tls))
        } else {
            both.read_exact(&mut [0])?;
            None
        };
        Ok(Arrival::Joined(rank, Link::new(socket, tls)?))
    }
}

/// Calls `rank` until it answers.
fn call(
    rendezvous: &Rendezvous,
    rank: usize,
    config: Arc<ClientConfig>,
    until: Instant,
) -> std::result::Result<Link, CallFailed> {
    loop {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(CallFailed::Late);
        }
        match TcpStream::connect_timeout(&rendezvous.ranks[rank].address, left.min(Duration::from_secs(1))) {
            Ok(socket) => return shake_hands(rendezvous, rank, config, socket, until),
            // It may not listen yet, or its host be on its way.
            Err(_) => std::thread::sleep(PAUSE.min(left)),
        }
    }
}

fn shake_hands(
    rendezvous: &Rendezvous,
    rank: usize,
    config: Arc<ClientConfig>,
    socket: TcpStream,
    until: Instant,
) -> std::result::Result<Link, CallFailed> {
    let refused =
        |error: io::Error| match error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
            Some(rustls::Error::InvalidCertificate(_)) => CallFailed::OtherKey,
            Some(rustls::Error::AlertReceived(_)) => CallFailed::Unknown,
            _ => CallFailed::BrokenOff(error.to_string()),
        };
    let tls = ClientConnection::new(config, tls::name(rendezvous));
    let mut tls = Connection::from(tls.map_err(|error| CallFailed::BrokenOff(error.to_string()))?);
    let mine = Hello::of(rendezvous);
    let mut both = Both { socket: &socket, until };
    let shaken = write_hello(&mut tls, &mut both, mine).and_then(|()| read_hello(&mut tls, &mut both));
    if let Some(what) = shaken.map_err(refused)?.difference(mine, rank) {
        return Err(CallFailed::Differs(what));
    }
    let tls = if mine.encryption {
        Some(Box::new(tls))
    } else {
        // The other side has nothing of TLS left when it reads this byte, and sends nothing before.
        both.write_all(&[1]).map_err(refused)?;
        None
    };
    Link::new(socket, tls).map_err(refused)
}

/// A socket whose reads and writes end at a point in time.
struct Both<'a> {
    socket: &'a TcpStream,
    until: Instant,
}

impl Both<'_> {
    fn left(&self) -> io::Result<Option<Duration>> {
        let left = self.until.saturating_duration_since(Instant::now());
        if left.is_zero() { Err(ErrorKind::TimedOut.into()) } else { Ok(Some(left)) }
    }
}

impl Read for Both<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.socket.set_read_timeout(self.left()?)?;
        let mut socket = self.socket;
        socket.read(into)
    }
}

impl Write for Both<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.socket.set_write_timeout(self.left()?)?;
        let mut socket = self.socket;
        socket.write(bytes)
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn handshake(tls: &mut ServerConnection, both: &mut Both<'_>) -> io::Result<()> {
    while tls.is_handshaking() {
        tls.complete_io(both)?;
    }
    Ok(())
}

fn write_hello(tls: &mut Connection, both: &mut Both<'_>, hello: Hello) -> io::Result<()> {
    tls.writer().write_all(&hello.encode())?;
    while tls.is_handshaking() || tls.wants_write() {
        tls.complete_io(both)?;
    }
    Ok(())
}

fn read_hello(tls: &mut Connection, both: &mut Both<'_>) -> io::Result<Hello> {
    let mut bytes = [0; HELLO];
    let mut had = 0;
    while had < HELLO {
        match tls.reader().read(&mut bytes[had..]) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(count) => had += count,
            Err(error) if error.kind() == ErrorKind::WouldBlock => drop(tls.complete_io(both)?),
            Err(error) => return Err(error),
        }
    }
    Hello::decode(&bytes)
}
