//! How all ranks come to be connected: each calls those before it and is called by those behind it; both ends show their keys, then say which
//! rank they are and of which generation.

use super::link::Link;
use super::{TcpLinks, Wake};
use crate::error::{CollectiveError, Result};
use crate::net::rendezvous::{Key, Listener, Rendezvous, failed};
use crate::net::tls;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustls::{ClientConfig, ClientConnection, Connection, ServerConfig, ServerConnection};
use std::io::{self, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, atomic::AtomicUsize, atomic::Ordering::SeqCst};
use std::time::{Duration, Instant};

/// For one peer's handshake.
const HANDSHAKE: Duration = Duration::from_secs(5);
/// Handshakes of those who call, at a time; more wait in the kernel.
const HANDSHAKES_MAX: usize = 64;
/// Between looks at who has come, and between calls of one who does not answer.
const PAUSE: Duration = Duration::from_millis(20);
/// Refusals that are remembered for the error.
const REFUSALS_MAX: usize = 4;
const MAGIC: u64 = u64::from_le_bytes(*b"fleetnt1");

/// Who somebody says it is, once its key is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Hello {
    generation: u64,
    rank: usize,
    world: usize,
    encryption: bool,
}

const HELLO: usize = 4 * 8;

impl Hello {
    fn of(rendezvous: &Rendezvous) -> Hello {
        let Rendezvous { generation, rank, encryption, .. } = *rendezvous;
        Hello { generation, rank, world: rendezvous.ranks.len(), encryption }
    }

    fn encode(self) -> [u8; HELLO] {
        let numbers = (self.rank as u64) << 32 | (self.world as u64) << 1 | u64::from(self.encryption);
        let mut bytes = [0; HELLO];
        for (eight, word) in bytes.chunks_exact_mut(8).zip([MAGIC, self.generation, numbers, 0]) {
            eight.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    fn decode(bytes: &[u8; HELLO]) -> Option<Hello> {
        let word = |at: usize| u64::from_le_bytes(bytes[at * 8..][..8].try_into().expect("eight bytes"));
        let numbers = word(2);
        (word(0) == MAGIC).then_some(Hello {
            generation: word(1),
            rank: (numbers >> 32) as usize,
            world: (numbers as u32 >> 1) as usize,
            encryption: numbers & 1 == 1,
        })
    }

    /// In what the other side differs from what this one knows of it.
    fn difference(self, mine: Hello, expected: usize) -> Option<String> {
        if self.generation != mine.generation {
            return Some(format!("is of generation {}, this rank of {}", self.generation, mine.generation));
        }
        if self.rank != expected {
            return Some(format!("calls itself rank {}", self.rank));
        }
        if self.world != mine.world {
            return Some(format!("is of a gang of {} ranks, this one of {}", self.world, mine.world));
        }
        (self.encryption != mine.encryption)
            .then(|| "wants to encrypt where this rank does not, or the reverse".to_owned())
    }
}

/// What came of a handshake with somebody who called.
enum Arrival {
    Joined(usize, Link),
    /// A rank of ours that cannot be one of this gang.
    Wrong(CollectiveError),
    /// Whoever it was, it has no key of ours.
    Refused(String),
}

pub fn connect(
    listener: Listener,
    rendezvous: &Rendezvous,
    key: &Key,
    timeout: Duration,
) -> Result<(TcpLinks, Arc<dyn Wake>)> {
    let until = Instant::now() + timeout;
    let (world, me) = (rendezvous.ranks.len(), rendezvous.rank);
    let mut links: Vec<Option<Link>> = (0..world).map(|_| None).collect();
    let unusable = |error: rustls::Error| failed("cannot use the key")(io::Error::other(error));
    let config = tls::accepting(rendezvous, key).map_err(unusable)?;
    let accepted = Accepting { config: Arc::new(config), rendezvous: Arc::new(rendezvous.clone()) };
    let calling: Vec<Arc<ClientConfig>> = (0..me)
        .map(|rank| tls::connecting(rendezvous, rank, key).map(Arc::new).map_err(unusable))
        .collect::<Result<_>>()?;
    let (report, called) = mpsc::channel();
    let told = accepted.rendezvous.clone();
    std::thread::spawn(move || {
        for (rank, config) in calling.into_iter().enumerate() {
            let result = call(&told, rank, config, until);
            let stop = result.is_err();
            if report.send(result.map(|link| (rank, link))).is_err() || stop {
                return;
            }
        }
    });
    accept(&listener, &accepted, &called, &mut links, until)?;
    TcpLinks::new(links).map_err(failed("cannot make a socket"))
}

/// Takes those who call, and those who were called, until all are there.
fn accept(
    listener: &Listener,
    accepting: &Accepting,
    called: &Receiver<Result<(usize, Link)>>,
    links: &mut [Option<Link>],
    until: Instant,
) -> Result<()> {
    let me = accepting.rendezvous.rank;
    let unusable = failed("cannot accept connections");
    listener.socket.set_nonblocking(true).map_err(&unusable)?;
    let (arrive, arrivals) = mpsc::channel();
    let handshakes = Arc::new(AtomicUsize::new(0));
    let mut refusals: Vec<String> = Vec::new();
    loop {
        while let Ok(result) = called.try_recv() {
            let (rank, link) = result?;
            links[rank] = Some(link);
        }
        while let Ok(arrival) = arrivals.try_recv() {
            match arrival {
                Arrival::Joined(rank, link) => links[rank] = Some(link),
                Arrival::Wrong(error) => return Err(error),
                Arrival::Refused(who) if refusals.len() < REFUSALS_MAX => refusals.push(who),
                Arrival::Refused(_) => {}
            }
        }
        let Some(missing) = (0..links.len()).find(|rank| *rank != me && links[*rank].is_none()) else {
            return Ok(());
        };
        if Instant::now() >= until {
            let mut what = "did not connect in time".to_owned();
            for refusal in refusals {
                what.push_str(&format!("; refused {refusal}"));
            }
            return Err(CollectiveError::Peer { rank: missing, what });
        }
        let pause = Timespec::try_from(PAUSE).map_err(|error| unusable(io::Error::other(error)))?;
        let _ = poll(&mut [PollFd::new(&listener.socket, PollFlags::IN)], Some(&pause));
        if handshakes.load(SeqCst) < HANDSHAKES_MAX
            && let Ok((socket, _)) = listener.socket.accept()
        {
            accepting.clone().in_a_thread(socket, arrive.clone(), handshakes.clone());
        }
    }
}

#[derive(Clone)]
struct Accepting {
    config: Arc<ServerConfig>,
    rendezvous: Arc<Rendezvous>,
}

impl Accepting {
    /// A stranger that says nothing keeps nobody waiting.
    fn in_a_thread(self, socket: TcpStream, arrive: Sender<Arrival>, count: Arc<AtomicUsize>) {
        count.fetch_add(1, SeqCst);
        std::thread::spawn(move || {
            let _ = arrive.send(self.greet(socket));
            count.fetch_sub(1, SeqCst);
        });
    }

    fn greet(&self, socket: TcpStream) -> Arrival {
        let from = socket.peer_addr().map_or_else(|_| "somebody".to_owned(), |address| address.to_string());
        let mut called_itself = String::new();
        let greeted = self.handshake(socket, &mut called_itself);
        let claims = if called_itself.is_empty() {
            String::new()
        } else {
            format!(" that calls itself {called_itself}")
        };
        match greeted {
            Ok(arrival) => arrival,
            Err(error) => Arrival::Refused(format!("{from}{claims}: {error}")),
        }
    }

    fn handshake(&self, socket: TcpStream, called_itself: &mut String) -> io::Result<Arrival> {
        let until = Instant::now() + HANDSHAKE;
        let mut tls = ServerConnection::new(self.config.clone()).map_err(io::Error::other)?;
        let mut both = Both { socket: &socket, until };
        let shaken = handshake(&mut tls, &mut both);
        // Longer names are no rank's.
        *called_itself = tls.server_name().filter(|name| name.len() < 64).unwrap_or_default().to_owned();
        shaken?;
        let shown = tls.peer_certificates().and_then(|keys| keys.first()).map(|key| key.as_ref().to_vec());
        let known = self.rendezvous.ranks.iter().position(|rank| Some(&rank.key.0) == shown.as_ref());
        let rank = known.ok_or_else(|| io::Error::other("it has no key of the rendezvous"))?;
        let mut tls = Connection::from(tls);
        let mine = Hello::of(&self.rendezvous);
        let theirs = read_hello(&mut tls, &mut both)?;
        write_hello(&mut tls, &mut both, mine)?;
        if let Some(what) = theirs.difference(mine, rank) {
            return Ok(Arrival::Wrong(CollectiveError::Peer { rank, what }));
        }
        if rank <= mine.rank {
            return Err(io::Error::other("it should be called, and calls"));
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
fn call(rendezvous: &Rendezvous, rank: usize, config: Arc<ClientConfig>, until: Instant) -> Result<Link> {
    let wrong = |what: String| CollectiveError::Peer { rank, what };
    let address = rendezvous.ranks[rank].address;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(wrong(format!("did not answer at {address} in time")));
        }
        match TcpStream::connect_timeout(&address, left.min(Duration::from_secs(1))) {
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
) -> Result<Link> {
    let address = rendezvous.ranks[rank].address;
    let wrong = |what: String| CollectiveError::Peer { rank, what };
    let refused =
        |error: io::Error| match error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
            Some(rustls::Error::InvalidCertificate(_)) => {
                wrong(format!("at {address} shows another key than the rendezvous has for it"))
            }
            Some(rustls::Error::AlertReceived(_)) => {
                wrong(format!("at {address} does not know this rank's key: is it of another generation?"))
            }
            _ => wrong(format!("at {address} broke off the handshake: {error}")),
        };
    let tls =
        ClientConnection::new(config, tls::name(rendezvous)).map_err(|error| wrong(error.to_string()))?;
    let mut tls = Connection::from(tls);
    let mine = Hello::of(rendezvous);
    let mut both = Both { socket: &socket, until };
    let shaken = write_hello(&mut tls, &mut both, mine).and_then(|()| read_hello(&mut tls, &mut both));
    let theirs = shaken.map_err(refused)?;
    if let Some(what) = theirs.difference(mine, rank) {
        return Err(wrong(what));
    }
    let tls = if mine.encryption {
        Some(Box::new(tls))
    } else {
        // The other side has nothing of TLS left when it reads this byte, and sends nothing before.
        both.write_all(&[1]).map_err(refused)?;
        None
    };
    Link::new(socket, tls).map_err(failed("cannot use a socket"))
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
    Hello::decode(&bytes).ok_or_else(|| io::Error::other("it says something else than hello"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hello_comes_back_and_differences_are_told() {
        let mine = Hello { generation: 5, rank: 1, world: 4, encryption: true };
        assert_eq!(Hello::decode(&mine.encode()), Some(mine));
        assert_eq!(Hello::decode(&[7; HELLO]), None);
        assert_eq!(Hello { rank: 2, ..mine }.difference(mine, 2), None);
        let told = |theirs: Hello| theirs.difference(mine, 2).unwrap();
        assert_eq!(told(Hello { rank: 2, generation: 4, ..mine }), "is of generation 4, this rank of 5");
        assert_eq!(told(Hello { rank: 3, ..mine }), "calls itself rank 3");
        assert_eq!(told(Hello { rank: 2, world: 8, ..mine }), "is of a gang of 8 ranks, this one of 4");
        assert!(told(Hello { rank: 2, encryption: false, ..mine }).contains("encrypt"));
    }
}
