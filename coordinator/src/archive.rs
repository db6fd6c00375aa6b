//! The file of a backup: a line for people, records with their lengths, and a checksum over all of it. Pure: bytes in, records out.
//!
//! A file is verified as a whole before any record of it is decoded.

use anyhow::{Context, Result, anyhow, bail};
use fleet_common::codec;
use fleet_common::net::PrivateKey;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::fmt;
use std::io::{Read, Write};

/// Of the file; another one is refused.
pub const FORMAT: u32 = 3;
/// Largest record: the state of the largest cluster.
const RECORD_MAX: u64 = 1 << 30;
/// Longest first line.
const LINE_MAX: usize = 4_096;

/// The first line, for people.
#[derive(Debug, Serialize, Deserialize)]
pub struct Header {
    pub format: u32,
    pub cluster_id: String,
    pub log_index: u64,
    pub made_unix_ms: u64,
    pub note: String,
}

/// The format alone: the rest of another format's line may be anything.
#[derive(Deserialize)]
struct AnyHeader {
    format: u32,
}

#[derive(Serialize, Deserialize)]
pub enum Record {
    Ca {
        der: Vec<u8>,
        key: PrivateKey,
    },
    State {
        index: u64,
        term: u64,
        /// As `raft::image` makes it.
        state: Vec<u8>,
    },
    Rows {
        table: String,
        rows: Vec<(Vec<u8>, Vec<u8>)>,
    },
    /// The last one: a file without it was cut off.
    End,
    /// Rows that could not be read when the backup was made.
    LeftOut(Gap),
}

/// Rows of a table that are missing, between two that are there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gap {
    pub table: String,
    /// The last key before it; empty where it is at the beginning.
    pub after: Vec<u8>,
    /// The first key after it; `None` where it goes to the end.
    pub until: Option<Vec<u8>>,
    pub why: String,
}

impl fmt::Display for Gap {
    /// Keys as the numbers that they are made of, such as `7.120`: of a job and its event.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let numbers = |key: &[u8]| -> String {
            let number =
                |part: &[u8]| part.iter().fold(0u64, |n, byte| n << 8 | u64::from(*byte)).to_string();
            key.chunks(8).map(number).collect::<Vec<_>>().join(".")
        };
        let Gap { table, after, until, why } = self;
        match (after.is_empty(), until) {
            (true, None) => write!(f, "all of {table}")?,
            (true, Some(until)) => write!(f, "{table} before {}", numbers(until))?,
            (false, None) => write!(f, "{table} after {}", numbers(after))?,
            (false, Some(until)) => write!(f, "{table} between {} and {}", numbers(after), numbers(until))?,
        }
        write!(f, " ({why})")
    }
}

pub struct Writer<W> {
    out: W,
    hash: Sha256,
}

impl<W: Write> Writer<W> {
    pub fn new(out: W) -> Writer<W> {
        Writer { out, hash: Sha256::new() }
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.hash.update(bytes);
        Ok(self.out.write_all(bytes)?)
    }

    pub fn header(&mut self, header: &Header) -> Result<()> {
        self.put(serde_json::to_string(header)?.as_bytes())?;
        self.put(b"\n")
    }

    pub fn record(&mut self, record: &Record) -> Result<()> {
        self.encoded(&codec::encode_record(record)?)
    }

    /// A record's bytes, whatever they are.
    pub fn encoded(&mut self, bytes: &[u8]) -> Result<()> {
        self.put(&(bytes.len() as u64).to_le_bytes())?;
        self.put(bytes)
    }

    /// The checksum of everything.
    pub fn finish(mut self) -> Result<W> {
        let hash = self.hash.finalize();
        self.out.write_all(&hash)?;
        Ok(self.out)
    }
}

/// Checks that a file is whole and unchanged. Decodes nothing but its first line.
pub fn verify(input: &mut dyn Read) -> Result<Header> {
    walk(input, &mut |_| Ok(()))
}

/// Hands all records of a verified file to `take`.
pub fn read(input: &mut dyn Read, take: &mut dyn FnMut(Record) -> Result<()>) -> Result<Header> {
    walk(input, &mut |bytes| take(codec::decode_record(bytes).context("it is damaged")?))
}

fn walk(input: &mut dyn Read, take: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<Header> {
    let end = codec::encode_record(&Record::End)?;
    let mut hash = Sha256::new();
    // Grows with what really comes, not with what is claimed.
    let mut next = |length: u64, hash: &mut Sha256| -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        if (&mut *input).take(length).read_to_end(&mut bytes)? as u64 != length {
            bail!("it ends too soon");
        }
        hash.update(&bytes);
        Ok(bytes)
    };
    let mut line = Vec::new();
    while line.last() != Some(&b'\n') {
        if line.len() > LINE_MAX {
            bail!("it is not a backup of fleet");
        }
        line.extend(next(1, &mut hash)?);
    }
    let AnyHeader { format } =
        serde_json::from_slice(&line).map_err(|_| anyhow!("it is not a backup of fleet"))?;
    if format != FORMAT {
        bail!("it has format {format}, this program knows {FORMAT}; use the version of fleet that made it");
    }
    let header = serde_json::from_slice(&line).context("its first line is damaged")?;
    loop {
        let mut length = [0; 8];
        length.copy_from_slice(&next(8, &mut hash)?);
        let length = u64::from_le_bytes(length);
        if length > RECORD_MAX {
            bail!("it is damaged: a record of {length} bytes");
        }
        let bytes = next(length, &mut hash)?;
        take(&bytes)?;
        if bytes == end {
            break;
        }
    }
    let found = hash.finalize();
    if next(32, &mut Sha256::new())? != found.as_slice() {
        bail!("it is damaged: its checksum is wrong");
    }
    Ok(header)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(format: u32) -> Vec<u8> {
        let note = "contains a key".to_owned();
        let header = Header { format, cluster_id: "c".into(), log_index: 7, made_unix_ms: 1, note };
        let mut writer = Writer::new(Vec::new());
        writer.header(&header).unwrap();
        writer.record(&Record::State { index: 7, term: 2, state: vec![5; 40] }).unwrap();
        let rows = vec![(b"k".to_vec(), b"v".to_vec())];
        writer.record(&Record::Rows { table: "events".into(), rows }).unwrap();
        let (table, after, until) = ("events".into(), vec![0, 0, 0, 0, 0, 0, 0, 7], None);
        writer.record(&Record::LeftOut(Gap { table, after, until, why: "rot".into() })).unwrap();
        writer.record(&Record::End).unwrap();
        writer.finish().unwrap()
    }

    #[test]
    fn what_was_written_is_read_in_order() {
        let bytes = file(FORMAT);
        assert_eq!(verify(&mut bytes.as_slice()).unwrap().log_index, 7);
        let mut seen = Vec::new();
        read(&mut bytes.as_slice(), &mut |record| {
            seen.push(match record {
                Record::Ca { .. } => "ca".to_owned(),
                Record::State { index, state, .. } => format!("state {index} {}", state.len()),
                Record::Rows { table, rows } => format!("{} {table}", rows.len()),
                Record::LeftOut(gap) => gap.to_string(),
                Record::End => "end".to_owned(),
            });
            Ok(())
        })
        .unwrap();
        assert_eq!(seen, ["state 7 40", "1 events", "events after 7 (rot)", "end"]);
    }

    #[test]
    fn another_format_is_named() {
        let why = verify(&mut file(FORMAT + 1).as_slice()).unwrap_err().to_string();
        assert!(why.contains(&format!("format {}, this program knows {FORMAT}", FORMAT + 1)), "{why}");
        let newer = format!("{{\"format\":{},\"and\":\"more\"}}\n", FORMAT + 7);
        let why = verify(&mut newer.as_bytes()).unwrap_err().to_string();
        assert!(why.contains(&format!("format {}", FORMAT + 7)), "{why}");
    }

    #[test]
    fn every_bit_and_every_byte_count() {
        let bytes = file(FORMAT);
        for length in 0..bytes.len() {
            assert!(verify(&mut &bytes[..length]).is_err(), "cut at {length}");
            let mut damaged = bytes.clone();
            damaged[length] ^= 1 << (length % 8);
            assert!(verify(&mut damaged.as_slice()).is_err(), "changed at {length}");
        }
    }
}
