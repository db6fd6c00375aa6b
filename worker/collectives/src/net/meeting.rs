//! How all ranks come to be connected, whatever carries them: each calls those before it and is called by those behind it; both ends show
//! their keys, then say which rank they are and of which generation. Pure.

use super::rendezvous::Rendezvous;
use crate::error::CollectiveError;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

/// For one peer's handshake.
pub const HANDSHAKE: Duration = Duration::from_secs(5);
/// Handshakes of those who call, at a time; more wait in the kernel.
pub const HANDSHAKES_MAX: usize = 64;
/// Between calls of one who does not answer.
pub const PAUSE: Duration = Duration::from_millis(20);
/// Refusals that are remembered for the error.
const REFUSALS_MAX: usize = 4;
/// Longer names are no rank's.
const NAME_MAX: usize = 64;
const MAGIC: u64 = u64::from_le_bytes(*b"fleetnt1");

/// Who somebody says it is, once its key is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hello {
    generation: u64,
    rank: usize,
    world: usize,
    pub encryption: bool,
}

pub const HELLO: usize = 4 * 8;

impl Hello {
    pub fn of(rendezvous: &Rendezvous) -> Hello {
        let Rendezvous { generation, rank, encryption, .. } = *rendezvous;
        Hello { generation, rank, world: rendezvous.ranks.len(), encryption }
    }

    pub fn encode(self) -> [u8; HELLO] {
        let numbers = (self.rank as u64) << 32 | (self.world as u64) << 1 | u64::from(self.encryption);
        let mut bytes = [0; HELLO];
        for (eight, word) in bytes.chunks_exact_mut(8).zip([MAGIC, self.generation, numbers, 0]) {
            eight.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    pub fn decode(bytes: &[u8; HELLO]) -> io::Result<Hello> {
        let word = |at: usize| u64::from_le_bytes(bytes[at * 8..][..8].try_into().expect("eight bytes"));
        if word(0) != MAGIC {
            return Err(io::Error::other("it says something else than hello"));
        }
        let numbers = word(2);
        Ok(Hello {
            generation: word(1),
            rank: (numbers >> 32) as usize,
            world: (numbers as u32 >> 1) as usize,
            encryption: numbers & 1 == 1,
        })
    }

    /// In what the other side differs from what this one knows of it.
    pub fn difference(self, mine: Hello, expected: usize) -> Option<String> {
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

/// Whose key somebody who called has shown.
pub fn caller(rendezvous: &Rendezvous, shown: Option<&[u8]>) -> io::Result<usize> {
    let known = rendezvous.ranks.iter().position(|rank| Some(&rank.key.0[..]) == shown);
    let rank = known.ok_or_else(|| io::Error::other("it has no key of the rendezvous"))?;
    match rank > rendezvous.rank {
        true => Ok(rank),
        false => Err(io::Error::other("it should be called, and calls")),
    }
}

/// What came of a handshake.
pub enum Arrival<L> {
    Joined(usize, L),
    /// A rank of ours that cannot be one of this gang.
    Wrong(CollectiveError),
    /// Whoever it was, it has no key of ours.
    Refused(String),
}

impl<L> Arrival<L> {
    /// `claims` is what the one that was refused called itself, before it had shown a key.
    pub fn refused(from: SocketAddr, claims: Option<&str>, why: &io::Error) -> Arrival<L> {
        let claims = claims.filter(|name| !name.is_empty() && name.len() < NAME_MAX);
        let claims = claims.map(|name| format!(" that calls itself {name}")).unwrap_or_default();
        Arrival::Refused(format!("{from}{claims}: {why}"))
    }

    pub fn wrong(rank: usize, what: String) -> Arrival<L> {
        Arrival::Wrong(CollectiveError::Peer { rank, what })
    }
}

/// Why a call of `rank` came to nothing, in words that follow its name.
pub enum CallFailed {
    Late,
    /// It shows another key than the rendezvous has.
    OtherKey,
    /// It refuses this rank's.
    Unknown,
    /// Its hello is another than that of the rank that is called.
    Differs(String),
    BrokenOff(String),
}

impl CallFailed {
    pub fn of(self, rank: usize, address: SocketAddr) -> CollectiveError {
        let what = match self {
            CallFailed::Late => format!("did not answer at {address} in time"),
            CallFailed::OtherKey => {
                format!("at {address} shows another key than the rendezvous has for it")
            }
            CallFailed::Unknown => {
                format!("at {address} does not know this rank's key: is it of another generation?")
            }
            CallFailed::Differs(what) => what,
            CallFailed::BrokenOff(why) => format!("at {address} broke off the handshake: {why}"),
        };
        CollectiveError::Peer { rank, what }
    }
}

/// Who has come so far.
pub struct Meeting<L> {
    rank: usize,
    links: Vec<Option<L>>,
    refusals: Vec<String>,
}

impl<L> Meeting<L> {
    pub fn new(rendezvous: &Rendezvous) -> Meeting<L> {
        let links = rendezvous.ranks.iter().map(|_| None).collect();
        Meeting { rank: rendezvous.rank, links, refusals: Vec::new() }
    }

    /// An error where there can be no gang any more.
    pub fn take(&mut self, arrival: Arrival<L>) -> Result<(), CollectiveError> {
        match arrival {
            Arrival::Joined(rank, link) => self.links[rank] = Some(link),
            Arrival::Wrong(error) => return Err(error),
            Arrival::Refused(who) if self.refusals.len() < REFUSALS_MAX => self.refusals.push(who),
            Arrival::Refused(_) => {}
        }
        Ok(())
    }

    /// Whether all are there.
    pub fn is_complete(&self) -> bool {
        self.missing().is_none()
    }

    fn missing(&self) -> Option<usize> {
        (0..self.links.len()).find(|rank| *rank != self.rank && self.links[*rank].is_none())
    }

    /// When time is over.
    pub fn late(&self) -> CollectiveError {
        let mut what = "did not connect in time".to_owned();
        for refusal in &self.refusals {
            what.push_str(&format!("; refused {refusal}"));
        }
        CollectiveError::Peer { rank: self.missing().unwrap_or(self.rank), what }
    }

    /// By rank; `None` for this one.
    pub fn links(self) -> Vec<Option<L>> {
        self.links
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hello_comes_back_and_differences_are_told() {
        let mine = Hello { generation: 5, rank: 1, world: 4, encryption: true };
        assert_eq!(Hello::decode(&mine.encode()).unwrap(), mine);
        assert!(Hello::decode(&[7; HELLO]).is_err());
        assert_eq!(Hello { rank: 2, ..mine }.difference(mine, 2), None);
        let told = |theirs: Hello| theirs.difference(mine, 2).unwrap();
        assert_eq!(told(Hello { rank: 2, generation: 4, ..mine }), "is of generation 4, this rank of 5");
        assert_eq!(told(Hello { rank: 3, ..mine }), "calls itself rank 3");
        assert_eq!(told(Hello { rank: 2, world: 8, ..mine }), "is of a gang of 8 ranks, this one of 4");
        assert!(told(Hello { rank: 2, encryption: false, ..mine }).contains("encrypt"));
    }
}
