//! How a value becomes bytes on a wire and back: bincode in frames of a length (u32, little endian) and a body.
//!
//! The only file that names bincode. It never allocates for a length that a peer merely claims.

use bincode::config::{Configuration, Limit, LittleEndian, Varint};
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
    #[error("the stream ended inside a message")]
    Truncated,
    #[error("the stream failed")]
    Io(#[from] io::Error),
}

/// Encodes one value. Refuses what a receiver would refuse for its size.
pub fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>, CodecError> {
    let bytes = bincode::serde::encode_to_vec(value, CONFIG).map_err(CodecError::Encode)?;
    check_length(bytes.len(), FRAME_MAX)?;
    Ok(bytes)
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

/// Writes one frame and flushes.
pub async fn write_frame<W: AsyncWrite + Unpin, T: Serialize>(w: &mut W, value: &T) -> Result<(), CodecError> {
    w.write_all(&frame(value)?).await?;
    w.flush().await?;
    Ok(())
}

/// Reads one frame; `None` where the stream ended between two. Not cancel-safe: a read that was begun must be finished.
pub async fn read_frame<R: AsyncRead + Unpin, T: DeserializeOwned>(r: &mut R) -> Result<Option<T>, CodecError> {
    read_frame_limited(r, FRAME_MAX).await
}

/// Like `read_frame`, for peers that are trusted with fewer bytes than `FRAME_MAX`.
pub async fn read_frame_limited<R: AsyncRead + Unpin, T: DeserializeOwned>(
    r: &mut R,
    max: usize,
) -> Result<Option<T>, CodecError> {
    let mut header = Vec::with_capacity(HEADER);
    r.take(HEADER as u64).read_to_end(&mut header).await?;
    let Some(length) = parse_header(&header, max)? else { return Ok(None) };
    let mut body = Vec::with_capacity(length.min(RESERVE));
    r.take(length as u64).read_to_end(&mut body).await?;
    finish(&body, length).map(Some)
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
    finish(&body, length).map(Some)
}

const HEADER: usize = size_of::<u32>();

/// Header and body in one buffer, so that a writer needs one system call and never leaves half a header.
fn frame<T: Serialize>(value: &T) -> Result<Vec<u8>, CodecError> {
    let mut bytes = vec![0; HEADER];
    let length =
        bincode::serde::encode_into_std_write(value, &mut bytes, CONFIG).map_err(CodecError::Encode)?;
    check_length(length, FRAME_MAX)?;
    bytes[..HEADER].copy_from_slice(&(length as u32).to_le_bytes());
    Ok(bytes)
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

fn finish<T: DeserializeOwned>(body: &[u8], length: usize) -> Result<T, CodecError> {
    if body.len() < length {
        return Err(CodecError::Truncated);
    }
    decode(body)
}

fn check_length(bytes: usize, max: usize) -> Result<(), CodecError> {
    if bytes > max { Err(CodecError::TooLarge { bytes, max }) } else { Ok(()) }
}
