//! What goes over a connection: frames, each a header and some bytes. A message is one or more frames; a farewell is the last.

use crate::abort::Abort;
use crate::call::Signature;

/// Bytes of a frame, at most: what has to be sent before a farewell can follow.
pub const FRAME_MAX: usize = 128 << 10;
pub const HEADER: usize = 7 * 8;
const DATA: u64 = 1;
const FAREWELL: u64 = 2;
const DONE: u64 = 0;
const NOBODY: u64 = u64::MAX;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Body {
    /// So many bytes of a message follow.
    Data(usize),
    Farewell(Farewell),
}

/// The last word of a rank, with the signature of the call that it is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Farewell {
    /// `None`: it has done all of its calls.
    pub reason: Option<Abort>,
    /// From whom it expected something.
    pub waits_for: Option<usize>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    pub generation: u64,
    pub signature: Signature,
    pub body: Body,
}

impl Header {
    pub fn encode(&self) -> [u8; HEADER] {
        let (kind, what) = match self.body {
            Body::Data(bytes) => (DATA, bytes as u64),
            Body::Farewell(farewell) => {
                let waits_for = farewell.waits_for.map_or(0, |rank| (rank as u64 + 1) << 32);
                (FAREWELL | waits_for, farewell.reason.map_or(DONE, Abort::word))
            }
        };
        let Signature { sequence, word, bytes, place } = self.signature;
        let mut encoded = [0; HEADER];
        let words = [kind, what, self.generation, sequence, word, bytes, place];
        for (eight, word) in encoded.chunks_exact_mut(8).zip(words) {
            eight.copy_from_slice(&word.to_le_bytes());
        }
        encoded
    }

    /// `None`: no header of ours.
    pub fn decode(encoded: &[u8; HEADER]) -> Option<Header> {
        let mut words = [0; HEADER / 8];
        for (word, eight) in words.iter_mut().zip(encoded.chunks_exact(8)) {
            *word = u64::from_le_bytes(eight.try_into().expect("a chunk of eight bytes"));
        }
        let [kind, what, generation, sequence, word, bytes, place] = words;
        let body = match kind & 0xffff_ffff {
            DATA if what <= FRAME_MAX as u64 => Body::Data(what as usize),
            FAREWELL => Body::Farewell(Farewell {
                reason: (what != DONE).then(|| Abort::of(what)),
                waits_for: (kind >> 32)
                    .checked_sub(1)
                    .filter(|rank| *rank != NOBODY)
                    .map(|rank| rank as usize),
            }),
            _ => return None,
        };
        Some(Header { generation, signature: Signature { sequence, word, bytes, place }, body })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn reasons() -> impl Strategy<Value = Option<Abort>> {
        prop::sample::select(vec![
            None,
            Some(Abort::Stopped),
            Some(Abort::RankDied(3)),
            Some(Abort::RankFailed(0)),
            Some(Abort::RankLate(1023)),
            Some(Abort::RankDiffers(7)),
        ])
    }

    proptest! {
        #[test]
        fn headers_come_back_as_they_were(
            words: [u64; 5], bytes in 0usize..=FRAME_MAX, reason in reasons(), waits_for in prop::option::of(0usize..2000),
        ) {
            let [generation, sequence, word, size, place] = words;
            let signature = Signature { sequence, word, bytes: size, place };
            for body in [Body::Data(bytes), Body::Farewell(Farewell { reason, waits_for })] {
                let header = Header { generation, signature, body };
                prop_assert_eq!(Header::decode(&header.encode()), Some(header));
            }
        }

        #[test]
        fn any_bytes_are_decoded_or_refused(bytes: [u8; 32], more: [u8; 24]) {
            let mut encoded = [0; HEADER];
            encoded[..32].copy_from_slice(&bytes);
            encoded[32..].copy_from_slice(&more);
            if let Some(Header { body: Body::Data(bytes), .. }) = Header::decode(&encoded) {
                prop_assert!(bytes <= FRAME_MAX);
            }
        }
    }
}
