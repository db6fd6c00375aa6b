//! Compressed data, unpacked as they are read.

use crate::formats::Packing;
use flate2::bufread::GzDecoder;
use std::fmt;
use std::io::{self, BufRead, Read};

const GZIP: &[u8] = b"\x1f\x8b\x08";

/// What is compressed, as it was. What is wrong with it is an error that `damage` finds; so is more than `limit` bytes.
pub(crate) fn unpack<'r>(
    packing: Packing,
    packed: impl Read + 'r,
    limit: u64,
) -> io::Result<Box<dyn Read + 'r>> {
    let inner: Box<dyn Read + 'r> = match packing {
        Packing::Gzip => Box::new(Members::new(packed)),
        Packing::Zstd => Box::new(Frames(zstd::stream::read::Decoder::new(packed)?)),
    };
    Ok(Box::new(Limited { inner, left: limit, limit }))
}

/// What is wrong with compressed data, if that is what an error says.
pub(crate) fn damage(error: &io::Error) -> Option<String> {
    error.get_ref()?.downcast_ref::<Damage>().map(|damage| damage.0.clone())
}

#[derive(Debug)]
struct Damage(String);

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Damage {}

fn damaged(what: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, Damage(what))
}

struct Limited<R> {
    inner: R,
    left: u64,
    limit: u64,
}

impl<R: Read> Read for Limited<R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(out)?;
        self.left = self.left.checked_sub(read as u64).ok_or_else(|| {
            damaged(format!(
                "it unpacks to more than {} bytes; unpack it yourself if it is meant so",
                self.limit
            ))
        })?;
        Ok(read)
    }
}

/// The frames of a file of zstd follow each other.
struct Frames<R: BufRead>(zstd::stream::read::Decoder<'static, R>);

impl<R: BufRead> Read for Frames<R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        self.0
            .read(out)
            .map_err(|e| damaged(format!("its zstd data are damaged or cut off ({e}); fetch it again")))
    }
}

/// The members of a file of gzip follow each other, and maybe zeros, with which tapes and archives fill their blocks.
struct Members<R: Read>(Option<GzDecoder<Ahead<R>>>);

impl<R: Read> Members<R> {
    fn new(packed: R) -> Members<R> {
        Members(Some(GzDecoder::new(Ahead { inner: packed, bytes: Vec::new(), at: 0 })))
    }
}

impl<R: Read> Read for Members<R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        while let Some(member) = &mut self.0 {
            let read = member.read(out).map_err(|e| match e.kind() {
                io::ErrorKind::InvalidData | io::ErrorKind::InvalidInput | io::ErrorKind::UnexpectedEof => {
                    damaged(format!("its gzip data are damaged or cut off ({e}); fetch it again"))
                }
                _ => e,
            })?;
            if read > 0 || out.is_empty() {
                return Ok(read);
            }
            let rest = self.0.take().map(|member| member.into_inner().next_member());
            self.0 = rest.transpose()?.flatten().map(GzDecoder::new);
        }
        Ok(0)
    }
}

/// Bytes of which some can be looked at before they are taken.
struct Ahead<R> {
    inner: R,
    bytes: Vec<u8>,
    at: usize,
}

impl<R: Read> Ahead<R> {
    /// Bytes that are there: at least so many, or all that come.
    fn fill(&mut self, least: usize) -> io::Result<&[u8]> {
        if self.bytes.len() - self.at < least {
            self.bytes.drain(..self.at);
            self.at = 0;
            while self.bytes.len() < least
                && (&mut self.inner).take(64 << 10).read_to_end(&mut self.bytes)? > 0
            {}
        }
        Ok(&self.bytes[self.at..])
    }

    /// Where another member begins; `None` behind the last one.
    fn next_member(mut self) -> io::Result<Option<Ahead<R>>> {
        if self.fill(GZIP.len())?.starts_with(GZIP) {
            return Ok(Some(self));
        }
        let (mut rest, mut is_zero) = (0, true);
        loop {
            let bytes = self.fill(1)?;
            if bytes.is_empty() {
                break;
            }
            is_zero &= bytes.iter().all(|byte| *byte == 0);
            rest += bytes.len();
            let seen = bytes.len();
            self.consume(seen);
        }
        match is_zero {
            true => Ok(None),
            false => Err(damaged(format!(
                "its gzip data end {rest} bytes before the file does, and what follows is not gzip; cut that off, or fetch it again"
            ))),
        }
    }
}

impl<R: Read> Read for Ahead<R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let read = self.fill(1)?.read(out)?;
        self.consume(read);
        Ok(read)
    }
}

impl<R: Read> BufRead for Ahead<R> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        self.fill(1)
    }

    fn consume(&mut self, amount: usize) {
        self.at += amount;
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use flate2::Compression;
    use flate2::write::GzEncoder;
    use std::io::Write;

    pub(crate) fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    pub(crate) fn zstd(bytes: &[u8]) -> Vec<u8> {
        ::zstd::encode_all(bytes, 3).unwrap()
    }

    fn unpacked(packing: Packing, bytes: &[u8], limit: u64) -> Result<Vec<u8>, String> {
        let mut out = Vec::new();
        let read = unpack(packing, bytes, limit).and_then(|mut reader| reader.read_to_end(&mut out));
        read.map(|_| out).map_err(|e| damage(&e).expect("what is wrong with the data"))
    }

    #[test]
    fn members_and_frames_follow_each_other() {
        let gz = |bytes: &[u8]| unpacked(Packing::Gzip, bytes, 1 << 20);
        let many: Vec<u8> = (0..3000).flat_map(|i| gzip(format!("{i} ").as_bytes())).collect();
        let all: String = (0..3000).map(|i| format!("{i} ")).collect();
        assert_eq!(gz(&many).unwrap(), all.as_bytes());
        assert_eq!(gz(&[gzip(b"one"), vec![0; 700]].concat()).unwrap(), b"one", "as tape drives leave it");
        let followed = gz(&[gzip(b"one"), vec![0; 3], gzip(b"two")].concat()).unwrap_err();
        assert!(followed.contains("what follows is not gzip"), "{followed}");
        let followed = gz(&[gzip(b"one"), b"<html>".to_vec()].concat()).unwrap_err();
        assert!(followed.contains("end 6 bytes before the file does"), "{followed}");
        let zst = |bytes: &[u8]| unpacked(Packing::Zstd, bytes, 1 << 20);
        assert_eq!(zst(&[zstd(b"one "), zstd(b"two")].concat()).unwrap(), b"one two");
        let text = b"some text ".repeat(100);
        for (packing, whole) in [(Packing::Gzip, gzip(&text)), (Packing::Zstd, zstd(&text))] {
            let said = unpacked(packing, &whole[..whole.len() - 9], 1 << 20).unwrap_err();
            assert!(said.contains("damaged or cut off"), "{said}");
        }
    }

    #[test]
    fn a_bomb_is_refused_before_it_is_unpacked_whole() {
        let text = [b' '; 10_000];
        for (packing, bomb) in [(Packing::Gzip, gzip(&text)), (Packing::Zstd, zstd(&text))] {
            assert_eq!(unpacked(packing, &bomb, 10_000).unwrap().len(), 10_000);
            assert!(unpacked(packing, &bomb, 9_999).unwrap_err().contains("more than 9999 bytes"));
        }
    }
}
