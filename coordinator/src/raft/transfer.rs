//! A snapshot's content on its way between replicas. Raft carries a small descriptor; the receiver fetches the rest in chunks, one
//! after the other, each from where the last one ended, and may lose the connection in between.
//!
//! The state comes first, then the rows of the history. Those are facts that never change, so the source may already have more of
//! them than the snapshot's position says, or have removed some since, and the receiver may keep them whatever becomes of the snapshot:
//! what the installed state does not count any more is removed with its installation, and what is removed later comes with the log.

use super::disk::{Batch, Disk, DiskError, Durability, Table};
use super::image;
use super::log::Position;
use super::seal;
use super::stretch::{self, Damage, End, Stretch};
use fleet_common::codec;
use raft::eraftpb::{Message, Snapshot};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// Largest state that is taken from a peer.
const STATE_MAX: u64 = 1 << 30;

/// What raft carries in place of the state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Descriptor {
    pub state_bytes: u64,
    pub state_sha256: [u8; 32],
}

/// How far a transfer has come.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Cursor {
    State {
        offset: u64,
    },
    Rows {
        /// Position in `Table::HISTORY`.
        table: u8,
        /// The last key that was sent.
        after: Vec<u8>,
    },
    End,
}

/// "Give me what follows."
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fetch {
    pub at: Position,
    pub cursor: Cursor,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Chunk {
    pub at: Position,
    pub cursor: Cursor,
    pub content: Content,
    pub next: Cursor,
    /// SHA-256 over all of the above.
    pub sha256: [u8; 32],
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Content {
    State(Vec<u8>),
    /// Keys and sealed values.
    Rows(Vec<(Vec<u8>, Vec<u8>)>),
    /// The source has another snapshot by now.
    Gone,
}

impl Descriptor {
    pub fn of(state: &[u8]) -> Descriptor {
        Descriptor { state_bytes: state.len() as u64, state_sha256: Sha256::digest(state).into() }
    }

    /// As raft carries it: the format of the state comes first.
    pub fn announced(&self) -> Vec<u8> {
        let Descriptor { state_bytes, state_sha256 } = self;
        [image::FORMAT.to_le_bytes().as_slice(), &state_bytes.to_le_bytes(), state_sha256].concat()
    }

    fn read(announced: &[u8]) -> Result<Descriptor, Unfit> {
        let (format, rest) = image::split_format(announced).ok_or(Unfit::Senseless)?;
        if format != image::FORMAT {
            return Err(Unfit::Format(format));
        }
        let (state_bytes, hash) = rest.split_first_chunk().ok_or(Unfit::Senseless)?;
        let state_sha256 = hash.try_into().map_err(|_| Unfit::Senseless)?;
        Ok(Descriptor { state_bytes: u64::from_le_bytes(*state_bytes), state_sha256 })
    }
}

impl Chunk {
    fn new(fetch: &Fetch, content: Content, next: Cursor) -> Chunk {
        let (at, cursor) = (fetch.at, fetch.cursor.clone());
        Chunk { at, cursor, content, next, sha256: [0; 32] }.hashed()
    }

    /// With the hash that belongs to the rest of it.
    pub fn hashed(self) -> Chunk {
        Chunk { sha256: self.digest(), ..self }
    }

    pub fn gone(fetch: &Fetch) -> Chunk {
        Chunk::new(fetch, Content::Gone, Cursor::End)
    }

    fn digest(&self) -> [u8; 32] {
        let encoded = codec::encode(&(&self.at, &self.cursor, &self.content, &self.next));
        // One that cannot be encoded was never received, and is not sent either.
        encoded.map_or([0; 32], |bytes| Sha256::digest(bytes).into())
    }
}

/// The part of a snapshot that a receiver asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cut {
    Chunk(Chunk),
    /// What comes next cannot be read. It is neither sent nor left out: the receiver asks again, until it was mended.
    Damaged(Damage),
}

impl Cut {
    pub fn chunk(self) -> Option<Chunk> {
        match self {
            Cut::Chunk(chunk) => Some(chunk),
            Cut::Damaged(_) => None,
        }
    }
}

/// So many bytes of a snapshot, but for a single row that is larger.
pub fn cut<D: Disk>(disk: &D, state: &[u8], fetch: &Fetch, chunk_bytes: usize) -> Result<Cut, DiskError> {
    let chunk = match &fetch.cursor {
        Cursor::State { offset } => {
            let begin = usize::try_from(*offset).unwrap_or(usize::MAX).min(state.len());
            let end = (begin + chunk_bytes).min(state.len());
            let next = if end < state.len() { Cursor::State { offset: end as u64 } } else { first_rows(0) };
            Chunk::new(fetch, Content::State(state[begin..end].to_vec()), next)
        }
        Cursor::Rows { table, after } => match Table::HISTORY.get(usize::from(*table)) {
            None => Chunk::gone(fetch),
            Some(of) => {
                let Stretch { rows, end } = stretch::read(disk, *of, after, chunk_bytes)?;
                let next = match (rows.last(), end) {
                    (_, End::OfTable) => first_rows(table + 1),
                    (Some((key, _)), _) => Cursor::Rows { table: *table, after: key.clone() },
                    (None, End::Damage(why)) => return Ok(Cut::Damaged(Damage { table: *of, why })),
                    (None, End::Full) => Cursor::Rows { table: *table, after: after.clone() },
                };
                Chunk::new(fetch, Content::Rows(rows), next)
            }
        },
        Cursor::End => Chunk::gone(fetch),
    };
    Ok(Cut::Chunk(chunk))
}

fn first_rows(table: u8) -> Cursor {
    if usize::from(table) < Table::HISTORY.len() {
        Cursor::Rows { table, after: Vec::new() }
    } else {
        Cursor::End
    }
}

/// A snapshot that is being fetched. The message waits until its content is here.
pub struct Incoming {
    message: Message,
    at: Position,
    descriptor: Descriptor,
    state: Vec<u8>,
    cursor: Cursor,
}

/// From whom which snapshot comes.
pub type Announced = (u64, Position, Descriptor);

/// What a chunk did.
pub enum Taken {
    /// It was not the one that was asked for, or damaged: ask again.
    Nothing,
    More,
    /// All is here: raft may have the message, with the state in it.
    Complete(Box<Message>),
    /// The source cannot go on; a new snapshot will come.
    Lost,
}

/// Why an announced snapshot cannot be fetched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unfit {
    /// What describes it makes no sense.
    Senseless,
    /// Its state has another format than this program knows.
    Format(u32),
}

impl Incoming {
    pub fn new(message: Message) -> Result<Incoming, Unfit> {
        let snapshot = message.snapshot.as_ref().ok_or(Unfit::Senseless)?;
        let metadata = snapshot.metadata.as_ref().ok_or(Unfit::Senseless)?;
        let descriptor = Descriptor::read(&snapshot.data)?;
        let at = Position { index: metadata.index, term: metadata.term };
        if descriptor.state_bytes > STATE_MAX {
            return Err(Unfit::Senseless);
        }
        Ok(Incoming { message, at, descriptor, state: Vec::new(), cursor: Cursor::State { offset: 0 } })
    }

    pub fn source(&self) -> u64 {
        self.message.from
    }

    pub fn at(&self) -> Position {
        self.at
    }

    pub fn announced(&self) -> Announced {
        (self.source(), self.at, self.descriptor)
    }

    pub fn fetch(&self) -> Fetch {
        Fetch { at: self.at, cursor: self.cursor.clone() }
    }

    /// Whether another message announces the same content from the same source. The newer message counts, the progress stays.
    pub fn renew(&mut self, other: &Incoming) -> bool {
        let same =
            other.source() == self.source() && other.at == self.at && other.descriptor == self.descriptor;
        if same {
            self.message = other.message.clone();
        }
        same
    }

    pub fn take<D: Disk>(&mut self, chunk: Chunk, disk: &D) -> Result<Taken, DiskError> {
        if chunk.at != self.at || chunk.cursor != self.cursor || chunk.digest() != chunk.sha256 {
            return Ok(Taken::Nothing);
        }
        match (chunk.content, &chunk.next) {
            (Content::Gone, _) => return Ok(Taken::Lost),
            (Content::State(bytes), next) => {
                self.state.extend_from_slice(&bytes);
                let whole = !matches!(next, Cursor::State { .. });
                if self.state.len() as u64 > self.descriptor.state_bytes
                    || (whole && Descriptor::of(&self.state) != self.descriptor)
                {
                    return Ok(Taken::Lost);
                }
            }
            (Content::Rows(rows), _) => {
                let Cursor::Rows { table, .. } = &self.cursor else { return Ok(Taken::Lost) };
                let Some(table) = Table::HISTORY.get(usize::from(*table)) else { return Ok(Taken::Lost) };
                let mut batch = Batch::default();
                for (key, value) in rows {
                    if seal::open(*table, &key, &value).is_none() {
                        return Ok(Taken::Lost);
                    }
                    batch.put(*table, &key, value);
                }
                if !batch.is_empty() {
                    disk.write(&batch, Durability::Written)?;
                }
            }
        }
        if chunk.next <= self.cursor {
            return Ok(Taken::Lost);
        }
        self.cursor = chunk.next;
        if self.cursor != Cursor::End {
            return Ok(Taken::More);
        }
        let mut message = std::mem::take(&mut self.message);
        let metadata = message.snapshot.take().and_then(|snapshot| snapshot.metadata);
        message.snapshot = Some(Snapshot { data: std::mem::take(&mut self.state), metadata });
        Ok(Taken::Complete(Box::new(message)))
    }
}

#[cfg(test)]
mod tests {
    use super::super::memory::MemoryDisk;
    use super::super::stretch::END_OF_KEYS;
    use super::*;
    use raft::eraftpb::{ConfState, MessageType, SnapshotMetadata};

    const CHUNK_BYTES: usize = 256 << 10;
    const AT: Position = Position { index: 9, term: 2 };

    fn source(rows: u64) -> MemoryDisk {
        let disk = MemoryDisk::default();
        for table in &Table::HISTORY {
            let mut batch = Batch::default();
            for n in 0..rows {
                let key = n.to_be_bytes();
                batch.put(*table, &key, seal::seal(*table, &key, vec![n as u8; 1000]));
            }
            disk.write(&batch, Durability::Written).unwrap();
        }
        disk
    }

    fn announced(state: &[u8]) -> Incoming {
        let data = Descriptor::of(state).announced();
        let conf_state = Some(ConfState { voters: vec![1], learners: vec![2], ..ConfState::default() });
        let metadata = SnapshotMetadata { conf_state, index: AT.index, term: AT.term };
        let snapshot = Some(Snapshot { data, metadata: Some(metadata) });
        let mut message = Message { to: 2, from: 1, term: 2, snapshot, ..Message::default() };
        message.set_msg_type(MessageType::MsgSnapshot);
        Incoming::new(message).ok().unwrap()
    }

    #[test]
    fn a_descriptor_travels_with_the_format_of_the_state() {
        let descriptor = Descriptor::of(b"state");
        let mut announced = descriptor.announced();
        assert_eq!(Descriptor::read(&announced), Ok(descriptor));
        assert_eq!(Descriptor::read(&announced[..9]), Err(Unfit::Senseless));
        announced[0] += 1;
        assert_eq!(Descriptor::read(&announced), Err(Unfit::Format(image::FORMAT + 1)));
    }

    fn all_rows(disk: &MemoryDisk) -> Vec<(Vec<u8>, Vec<u8>)> {
        let mut rows = Vec::new();
        for table in &Table::HISTORY {
            disk.scan(*table, &[], &END_OF_KEYS, &mut |key, value| {
                rows.push((key.to_vec(), value.to_vec()));
                true
            })
            .unwrap();
        }
        rows
    }

    #[test]
    fn a_snapshot_arrives_whole_through_lost_repeated_and_damaged_chunks() {
        let (disk, state) = (source(700), vec![7; 3 * CHUNK_BYTES + 5]);
        let target = MemoryDisk::default();
        let mut incoming = announced(&state);
        let mut previous: Option<Chunk> = None;
        for round in 0.. {
            assert!(round < 1_000);
            let chunk = cut(&disk, &state, &incoming.fetch(), CHUNK_BYTES).unwrap().chunk().unwrap();
            if round % 3 == 0 {
                let mut damaged = chunk.clone();
                damaged.sha256[0] ^= 1;
                assert!(matches!(incoming.take(damaged, &target).unwrap(), Taken::Nothing));
            }
            if let Some(previous) = previous.replace(chunk.clone()) {
                assert!(matches!(incoming.take(previous, &target).unwrap(), Taken::Nothing));
            }
            match incoming.take(chunk, &target).unwrap() {
                Taken::More => {}
                Taken::Complete(message) => {
                    assert_eq!(message.snapshot.unwrap().data, state);
                    break;
                }
                Taken::Nothing | Taken::Lost => panic!("round {round}"),
            }
        }
        assert_eq!(all_rows(&target), all_rows(&disk));
    }

    #[test]
    fn a_source_that_moved_on_or_a_wrong_state_ends_the_transfer() {
        let disk = source(1);
        let mut incoming = announced(b"right");
        let gone = Chunk::gone(&incoming.fetch());
        assert!(matches!(incoming.take(gone, &disk).unwrap(), Taken::Lost));
        let wrong = cut(&disk, b"wrong", &incoming.fetch(), CHUNK_BYTES).unwrap().chunk().unwrap();
        assert!(matches!(incoming.take(wrong, &disk).unwrap(), Taken::Lost));
    }

    #[test]
    fn a_damaged_row_is_neither_sent_nor_left_out() {
        let disk = source(9);
        assert!(disk.rot(Table::HISTORY[0], 4, 0));
        let target = MemoryDisk::default();
        let mut incoming = announced(b"s");
        let mut ask = |disk: &MemoryDisk| {
            let Cut::Chunk(chunk) = cut(disk, b"s", &incoming.fetch(), CHUNK_BYTES).unwrap() else {
                return false;
            };
            assert!(!matches!(incoming.take(chunk, &target).unwrap(), Taken::Lost | Taken::Nothing));
            true
        };
        assert!(ask(&disk), "the state");
        assert!(ask(&disk), "what comes before it");
        assert!(!ask(&disk) && !ask(&disk), "it is waited for");
        assert_eq!(all_rows(&target).len(), 4);
        assert!(disk.rot(Table::HISTORY[0], 4, 0));
        while all_rows(&target).len() < all_rows(&disk).len() {
            assert!(ask(&disk), "it was mended");
        }
    }

    #[test]
    fn a_damaged_row_is_not_kept() {
        let target = MemoryDisk::default();
        let mut incoming = announced(b"s");
        let state = cut(&source(0), b"s", &incoming.fetch(), CHUNK_BYTES).unwrap().chunk().unwrap();
        assert!(matches!(incoming.take(state, &target).unwrap(), Taken::More));
        let rows = vec![(b"k".to_vec(), b"not sealed".to_vec())];
        let chunk = Chunk::new(&incoming.fetch(), Content::Rows(rows), first_rows(1));
        assert!(matches!(incoming.take(chunk, &target).unwrap(), Taken::Lost));
        assert!(all_rows(&target).is_empty());
    }
}
