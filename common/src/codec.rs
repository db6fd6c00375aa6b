//! How a value becomes bytes on a wire and back: bincode in frames of a length (u32, little endian) and a body.
//!
//! The only file that names bincode. It never allocates for a length that a peer merely claims.

use crate::protocol::PROTOCOL_VERSION;
use bincode::config::{Configuration, Limit, LittleEndian, Varint};
use bytes::BytesMut;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::io::{self, Read, Write};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Most bytes of one encoded message: 100 times the longest job file, and a batch of some ten thousand events.
pub const FRAME_MAX: usize = 8 << 20;

/// bincode counts decoded sizes: a `u64` may take one byte on the wire and eight in memory, a `u128` sixteen.
const DECODED_MAX: usize = 16 * FRAME_MAX;

type Config = Configuration<LittleEndian, Varint, Limit<DECODED_MAX>>;

const CONFIG: Config = bincode::config::standard().with_limit::<DECODED_MAX>();

/// Room reserved before the body of a frame arrives; the rest grows with what really comes.
const RESERVE: usize = 4096;

/// Why a message could not be written or read.
#[derive(Debug, thiserror::Error)]
pub enum CodecError {
    #[error("a message of {bytes} bytes is over the limit of {max}")]
    TooLarge { bytes: usize, max: usize },
    #[error("the message cannot be encoded")]
    Encode(#[source] bincode::error::EncodeError),
    #[error("the message cannot be understood")]
    Decode(#[source] bincode::error::DecodeError),
    #[error("the message has {0} bytes too many")]
    Trailing(usize),
    #[error(
        "this cluster speaks version {PROTOCOL_VERSION} of the protocol, the other side {0}; install the same version of fleet"
    )]
    Version(u32),
    #[error("the stream ended inside a message")]
    Truncated,
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl CodecError {
    /// The other side has left, perhaps in the middle of a message: nothing that it said was wrong.
    pub fn is_end(&self) -> bool {
        use io::ErrorKind::*;
        match self {
            CodecError::Truncated => true,
            CodecError::Io(error) => {
                matches!(error.kind(), UnexpectedEof | ConnectionReset | ConnectionAborted | BrokenPipe)
            }
            _ => false,
        }
    }
}

/// Encodes one value. Refuses what a receiver would refuse for its size.
pub fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>, CodecError> {
    let bytes = bincode::serde::encode_to_vec(value, CONFIG).map_err(CodecError::Encode)?;
    check_length(bytes.len(), FRAME_MAX)?;
    Ok(bytes)
}

/// Bytes that a value takes when it is encoded.
pub fn encoded_len<T: Serialize>(value: &T) -> Result<usize, CodecError> {
    bincode::serde::encode_into_std_write(value, &mut io::sink(), CONFIG).map_err(CodecError::Encode)
}

/// Decodes one value that fills `bytes` exactly.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, CodecError> {
    check_length(bytes.len(), FRAME_MAX)?;
    let result = match bytes.len() {
        // A short message must not make bincode reserve what only a long one could fill.
        0..=1024 => bincode::serde::decode_from_slice(bytes, CONFIG.with_limit::<{ 16 * 1024 }>()),
        1025..=65536 => bincode::serde::decode_from_slice(bytes, CONFIG.with_limit::<{ 16 * 65536 }>()),
        _ => bincode::serde::decode_from_slice(bytes, CONFIG),
    };
    let (value, used) = result.map_err(CodecError::Decode)?;
    match bytes.len() - used {
        0 => Ok(value),
        extra => Err(CodecError::Trailing(extra)),
    }
}

/// A message that says its protocol's version before anything else. That is looked at first: of another version the rest may have
/// another shape.
pub trait Versioned: DeserializeOwned {
    /// The version at the head of an encoded message; `None` where there is none.
    fn version(bytes: &[u8]) -> Option<u32>;
}

/// Decodes one value of this version of the protocol.
pub fn decode_versioned<T: Versioned>(bytes: &[u8]) -> Result<T, CodecError> {
    match T::version(bytes) {
        Some(version) if version != PROTOCOL_VERSION => Err(CodecError::Version(version)),
        _ => decode(bytes),
    }
}

/// The first value of a message, whatever follows. Only for numbers: nothing is allocated for them.
pub fn head<T: DeserializeOwned>(bytes: &[u8]) -> Option<T> {
    bincode::serde::decode_from_slice(bytes, CONFIG).ok().map(|(value, _)| value)
}

/// Encodes a record that stays on this machine's disk and may be larger than a frame, such as a snapshot of the state.
pub fn encode_record<T: Serialize>(value: &T) -> Result<Vec<u8>, CodecError> {
    bincode::serde::encode_to_vec(value, bincode::config::standard()).map_err(CodecError::Encode)
}

/// Decodes what `encode_record` wrote. Only for bytes whose checksum was verified: a record larger than a frame may claim any sizes.
pub fn decode_record<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, CodecError> {
    let result = match bytes.len() {
        0..=65536 => bincode::serde::decode_from_slice(bytes, CONFIG.with_limit::<{ 16 * 65536 }>()),
        65537..=FRAME_MAX => bincode::serde::decode_from_slice(bytes, CONFIG),
        _ => bincode::serde::decode_from_slice(bytes, bincode::config::standard()),
    };
    let (value, used) = result.map_err(CodecError::Decode)?;
    match bytes.len() - used {
        0 => Ok(value),
        extra => Err(CodecError::Trailing(extra)),
    }
}

/// Writes one frame and flushes.
pub async fn write_frame<W: AsyncWrite + Unpin, T: Serialize>(
    w: &mut W,
    value: &T,
) -> Result<(), CodecError> {
    w.write_all(&frame(value)?).await?;
    w.flush().await?;
    Ok(())
}

/// Reads one frame; `None` where the stream ended between two. Not cancel-safe: a read that was begun must be finished.
pub async fn read_frame<R: AsyncRead + Unpin, T: DeserializeOwned>(
    r: &mut R,
) -> Result<Option<T>, CodecError> {
    read_frame_limited(r, FRAME_MAX).await
}

/// Like `read_frame`, for peers that are trusted with fewer bytes than `FRAME_MAX`.
pub async fn read_frame_limited<R: AsyncRead + Unpin, T: DeserializeOwned>(
    r: &mut R,
    max: usize,
) -> Result<Option<T>, CodecError> {
    read_body(r, max).await?.map(|body| decode(&body)).transpose()
}

/// Like `read_frame_limited`, and names another version of the protocol.
pub async fn read_versioned<R: AsyncRead + Unpin, T: Versioned>(
    r: &mut R,
    max: usize,
) -> Result<Option<T>, CodecError> {
    read_body(r, max).await?.map(|body| decode_versioned(&body)).transpose()
}

async fn read_body<R: AsyncRead + Unpin>(r: &mut R, max: usize) -> Result<Option<Vec<u8>>, CodecError> {
    let mut header = Vec::with_capacity(HEADER);
    r.take(HEADER as u64).read_to_end(&mut header).await?;
    let Some(length) = parse_header(&header, max)? else { return Ok(None) };
    let mut body = Vec::with_capacity(length.min(RESERVE));
    r.take(length as u64).read_to_end(&mut body).await?;
    if body.len() < length { Err(CodecError::Truncated) } else { Ok(Some(body)) }
}

/// Frames out of pieces as they come. Unlike `read_frame`, a reader that stops between two pieces has lost nothing.
#[derive(Debug)]
pub struct Frames {
    bytes: BytesMut,
    max: usize,
}

impl Frames {
    /// Refuses frames over `max` bytes as soon as their length is known.
    pub fn new(max: usize) -> Frames {
        Frames { bytes: BytesMut::new(), max }
    }

    pub fn push(&mut self, piece: &[u8]) {
        self.bytes.extend_from_slice(piece);
    }

    /// Between two frames: the stream may end here.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Bytes that wait for the rest of their frame.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// The next whole frame.
    pub fn next_frame<T: DeserializeOwned>(&mut self) -> Result<Option<T>, CodecError> {
        self.next_body()?.map(|body| decode(&body)).transpose()
    }

    /// The next whole frame, if it is of this version of the protocol.
    pub fn next_versioned<T: Versioned>(&mut self) -> Result<Option<T>, CodecError> {
        self.next_body()?.map(|body| decode_versioned(&body)).transpose()
    }

    fn next_body(&mut self) -> Result<Option<BytesMut>, CodecError> {
        let Some(header) = self.bytes.get(..HEADER) else { return Ok(None) };
        let length = parse_header(header, self.max)?.unwrap_or_default();
        if self.bytes.len() < HEADER + length {
            return Ok(None);
        }
        let mut frame = self.bytes.split_to(HEADER + length);
        Ok(Some(frame.split_off(HEADER)))
    }
}

/// Writes one frame and flushes.
pub fn write_frame_blocking<W: Write, T: Serialize>(w: &mut W, value: &T) -> Result<(), CodecError> {
    w.write_all(&frame(value)?)?;
    w.flush()?;
    Ok(())
}

/// Reads one frame; `None` where the stream ended between two.
pub fn read_frame_blocking<R: Read, T: DeserializeOwned>(r: &mut R) -> Result<Option<T>, CodecError> {
    let mut header = Vec::with_capacity(HEADER);
    r.by_ref().take(HEADER as u64).read_to_end(&mut header)?;
    let Some(length) = parse_header(&header, FRAME_MAX)? else { return Ok(None) };
    let mut body = Vec::with_capacity(length.min(RESERVE));
    r.by_ref().take(length as u64).read_to_end(&mut body)?;
    if body.len() < length {
        return Err(CodecError::Truncated);
    }
    decode(&body).map(Some)
}

const HEADER: usize = size_of::<u32>();

/// Header and body in one buffer, so that a writer needs one system call and never leaves half a header.
pub fn frame<T: Serialize>(value: &T) -> Result<Vec<u8>, CodecError> {
    let mut bytes = Vec::new();
    append_frame(value, &mut bytes)?;
    Ok(bytes)
}

/// Adds a frame to others, so that one write serves several. On an error `bytes` is as it was.
pub fn append_frame<T: Serialize>(value: &T, bytes: &mut Vec<u8>) -> Result<(), CodecError> {
    let begin = bytes.len();
    bytes.extend_from_slice(&[0; HEADER]);
    let encoded = bincode::serde::encode_into_std_write(value, bytes, CONFIG).map_err(CodecError::Encode);
    let length = encoded.and_then(|length| check_length(length, FRAME_MAX).map(|()| length));
    match length {
        Ok(length) => {
            bytes[begin..begin + HEADER].copy_from_slice(&(length as u32).to_le_bytes());
            Ok(())
        }
        Err(error) => {
            bytes.truncate(begin);
            Err(error)
        }
    }
}

fn parse_header(header: &[u8], max: usize) -> Result<Option<usize>, CodecError> {
    if header.is_empty() {
        return Ok(None);
    }
    let header: [u8; HEADER] = header.try_into().map_err(|_| CodecError::Truncated)?;
    let length = u32::from_le_bytes(header) as usize;
    check_length(length, max)?;
    Ok(Some(length))
}

fn check_length(bytes: usize, max: usize) -> Result<(), CodecError> {
    if bytes > max { Err(CodecError::TooLarge { bytes, max }) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::events::{Event, EventBatch, EventBody, Level, Step};
    use crate::ids::{ClientId, JobId, NodeId, ReplicaId, UserId};
    use crate::net::{Authorities, PrivateKey};
    use crate::protocol::{
        Admission, ClientFrame, CoordinatorAddress, FromAgent, FromRank, JoinReply, JoinRequest, Member,
        Reply, Request, ToAgent, ToRank,
    };
    use proptest::prelude::*;

    fn golden<T: Serialize + DeserializeOwned + PartialEq + std::fmt::Debug>(value: T, hex: &str) {
        assert_eq!(hex::encode(encode(&value).unwrap()), hex);
        assert_eq!(decode::<T>(&hex::decode(hex).unwrap()).unwrap(), value);
    }

    /// A change of these bytes is a change of the protocol: raise `PROTOCOL_VERSION`.
    #[test]
    fn messages_have_the_bytes_they_always_had() {
        golden(ClientFrame::change(ClientId(300), 2, Request::Job(JobId(7))), "0afb2c01020200000607");
        golden(Reply::Submitted { job: JobId(251) }, "00fbfb00");
        golden(ToAgent::Welcome { node: NodeId(1) }, "0001");
        golden(ToRank::CheckpointCommitted { step: 100 }, "0264");
        golden(
            JoinRequest {
                version: 1,
                token_id: "ab".into(),
                token_secret: "cd".into(),
                csr_der: vec![1, 2],
                name: "n".into(),
            },
            "01026162026364020102016e",
        );
        let admission = Admission {
            member: Member::Worker(NodeId(3)),
            certificate_der: vec![9],
            authorities: Authorities::one(vec![]),
            coordinators: vec![CoordinatorAddress {
                replica: ReplicaId(2),
                client: "a".into(),
                member: "b".into(),
            }],
            cas: vec![(vec![8], PrivateKey::new(vec![7]))],
        };
        golden(JoinReply::Accepted(Box::new(admission)), "000103010901000102016101620101080107");
        let step = Step {
            step: 1,
            total_steps: 20,
            epoch: 0.0,
            loss: 1.5,
            lr: 0.0,
            grad_norm: 2.0,
            tokens_per_s: 0.0,
        };
        golden(
            FromAgent::Events(EventBatch {
                job: JobId(1),
                generation: 1,
                first_seq: 4,
                events: vec![Event { unix_ms: 1000, body: EventBody::Step(step) }],
            }),
            concat!(
                "0201010401",
                "fbe803",
                "02",
                "0114",
                "0000000000000000",
                "000000000000f83f",
                "0000000000000000",
                "0000000000000040",
                "0000000000000000",
            ),
        );
    }

    #[test]
    fn another_version_is_named_whatever_shape_the_rest_has() {
        let named = |error: CodecError| {
            let text = error.to_string();
            assert!(
                text.contains(&format!("version {PROTOCOL_VERSION} of the protocol, the other side 99")),
                "{text}"
            );
        };
        // A version, then what no message of ours has; a greeting begins with its tag.
        let (bare, greeting) = (hex::decode("63ffff").unwrap(), hex::decode("0063ffff").unwrap());
        named(decode_versioned::<ClientFrame>(&bare).unwrap_err());
        named(decode_versioned::<JoinRequest>(&bare).unwrap_err());
        named(decode_versioned::<FromAgent>(&greeting).unwrap_err());
        let heartbeat = encode(&FromAgent::Heartbeat { unix_ms: 7 }).unwrap();
        assert!(decode_versioned::<FromAgent>(&heartbeat).is_ok(), "only a greeting has a version");
        let frame = ClientFrame::query(Request::Nodes);
        assert_eq!(decode_versioned::<ClientFrame>(&encode(&frame).unwrap()).unwrap(), frame);
    }

    fn frames(lines: &[&str]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for line in lines {
            let body = EventBody::Log { rank: Some(0), level: Level::Info, line: (*line).into() };
            write_frame_blocking(&mut bytes, &FromRank::Event(Event { unix_ms: 1, body })).unwrap();
        }
        bytes
    }

    #[tokio::test]
    async fn frames_are_read_to_the_clean_end_of_a_stream() {
        let bytes = frames(&["one", "two"]);
        let (mut blocking, mut asynchronous) = (bytes.as_slice(), bytes.as_slice());
        for _ in 0..2 {
            let a: Option<FromRank> = read_frame_blocking(&mut blocking).unwrap();
            let b: Option<FromRank> = read_frame(&mut asynchronous).await.unwrap();
            assert!(a.is_some());
            assert_eq!(a, b);
        }
        assert!(read_frame_blocking::<_, FromRank>(&mut blocking).unwrap().is_none());
        assert!(read_frame::<_, FromRank>(&mut asynchronous).await.unwrap().is_none());
        let mut written = Vec::new();
        write_frame(&mut written, &ToRank::Stop).await.unwrap();
        assert_eq!(written, [1, 0, 0, 0, 1]);
    }

    #[test]
    fn frames_come_out_of_pieces_of_any_size() {
        let mut bytes = Vec::new();
        for step in 0..20 {
            append_frame(&ToRank::CheckpointCommitted { step: step * 100 }, &mut bytes).unwrap();
        }
        for size in [1, 3, 7, 64, bytes.len()] {
            let (mut frames, mut steps) = (Frames::new(64), Vec::new());
            for piece in bytes.chunks(size) {
                frames.push(piece);
                while let Some(message) = frames.next_frame::<ToRank>().unwrap() {
                    steps.push(message);
                }
            }
            assert!(frames.is_empty() && steps.len() == 20, "pieces of {size}");
        }
        let mut frames = Frames::new(64);
        frames.push(&[65, 0, 0, 0]);
        assert!(matches!(frames.next_frame::<ToRank>(), Err(CodecError::TooLarge { bytes: 65, max: 64 })));
        let kept = bytes.len();
        assert!(append_frame(&Reply::Token { text: "x".repeat(FRAME_MAX) }, &mut bytes).is_err());
        assert_eq!(bytes.len(), kept);
    }

    #[tokio::test]
    async fn a_stream_that_ends_inside_a_frame_is_an_error_wherever_it_ends() {
        let bytes = frames(&["line"]);
        for end in 1..bytes.len() {
            let cut = &bytes[..end];
            assert!(matches!(read_frame_blocking::<_, FromRank>(&mut &*cut), Err(CodecError::Truncated)));
            assert!(matches!(read_frame::<_, FromRank>(&mut &*cut).await, Err(CodecError::Truncated)));
        }
    }

    #[tokio::test]
    async fn lengths_over_the_limit_are_refused_before_anything_is_read_or_reserved() {
        let mut claim: &[u8] = &[0xff, 0xff, 0xff, 0xff, 0];
        let refused = read_frame::<_, ToRank>(&mut claim).await;
        assert!(matches!(refused, Err(CodecError::TooLarge { bytes: 0xffff_ffff, max: FRAME_MAX })));
        assert_eq!(claim.len(), 1);
        let long = Reply::Token { text: "x".repeat(FRAME_MAX) };
        assert!(matches!(encode(&long), Err(CodecError::TooLarge { .. })));
        assert!(matches!(write_frame_blocking(&mut Vec::new(), &long), Err(CodecError::TooLarge { .. })));
        let mut small = Vec::new();
        write_frame_blocking(&mut small, &Reply::Token { text: "x".repeat(100) }).unwrap();
        let refused = read_frame_limited::<_, Reply>(&mut small.as_slice(), 64).await;
        assert!(matches!(refused, Err(CodecError::TooLarge { max: 64, .. })));
    }

    #[test]
    fn a_text_longer_than_its_message_is_refused_by_the_limit_and_not_by_running_out_of_bytes() {
        // `Reply::Token` and a length of 2^32 bytes, then nothing.
        let claim = hex::decode("02fd0000000001000000").unwrap();
        let error = decode::<Reply>(&claim).unwrap_err();
        assert!(matches!(error, CodecError::Decode(bincode::error::DecodeError::LimitExceeded)), "{error:?}");
    }

    #[test]
    fn a_message_at_the_limit_passes_and_trailing_bytes_do_not() {
        let long = Reply::Token { text: "x".repeat(FRAME_MAX - 16) };
        assert_eq!(decode::<Reply>(&encode(&long).unwrap()).unwrap(), long);
        let batch = vec![u64::MAX >> 60; FRAME_MAX - 16]; // one byte each on the wire, eight in memory
        assert_eq!(decode::<Vec<u64>>(&encode(&batch).unwrap()).unwrap(), batch);
        let mut bytes = encode(&ToRank::Stop).unwrap();
        bytes.push(0);
        assert!(matches!(decode::<ToRank>(&bytes), Err(CodecError::Trailing(1))));
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
            let _ = decode::<JoinRequest>(&bytes);
            let _ = decode::<JoinReply>(&bytes);
            let _ = decode::<ClientFrame>(&bytes);
            let _ = decode::<Reply>(&bytes);
            let _ = decode::<FromAgent>(&bytes);
            let _ = decode::<ToAgent>(&bytes);
            let _ = decode::<FromRank>(&bytes);
            let _ = decode::<ToRank>(&bytes);
            let _ = read_frame_blocking::<_, FromAgent>(&mut bytes.as_slice());
        }

        #[test]
        fn a_damaged_message_is_an_error_or_another_message(at in 0usize..60, bit in 0u8..8) {
            let mut bytes = encode(&JoinReply::Accepted(Box::new(Admission {
                member: Member::Client(UserId(5)), certificate_der: vec![7; 20],
                authorities: Authorities::one(vec![8; 20]), coordinators: Vec::new(), cas: Vec::new(),
            }))).unwrap();
            let at = at % bytes.len();
            bytes[at] ^= 1 << bit;
            let _ = decode::<JoinReply>(&bytes);
        }

        #[test]
        fn lines_of_any_text_survive(line in any::<String>(), rank in any::<Option<u32>>(), unix_ms in any::<u64>()) {
            let event = FromRank::Event(Event { unix_ms, body: EventBody::Log { rank, level: Level::Warn, line } });
            prop_assert_eq!(decode::<FromRank>(&encode(&event).unwrap()).unwrap(), event);
        }
    }
}
