//! The cluster's state as bytes: on the disk, on its way to another replica, and in a backup. Its version comes first, so that it is
//! known before anything else of it is believed.

use crate::cluster::State;
use fleet_common::codec;

/// Version of the state and of the history's rows; another one is refused.
pub const FORMAT: u32 = 9;

#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    #[error(
        "the state has format {found}, this program knows {FORMAT}; use the version of fleet that wrote it"
    )]
    Format { found: u32 },
    #[error("the state cannot be read: {0}")]
    Unreadable(String),
}

pub fn encode(state: &State) -> Result<Vec<u8>, ImageError> {
    let body = codec::encode_record(state).map_err(|error| ImageError::Unreadable(error.to_string()))?;
    Ok([FORMAT.to_le_bytes().as_slice(), &body].concat())
}

/// Only for bytes whose checksum was verified: there is no limit on sizes.
pub fn decode(bytes: &[u8]) -> Result<State, ImageError> {
    match split_format(bytes) {
        Some((FORMAT, body)) => {
            codec::decode_record(body).map_err(|error| ImageError::Unreadable(error.to_string()))
        }
        Some((found, _)) => Err(ImageError::Format { found }),
        None => Err(ImageError::Unreadable("it is too short".to_owned())),
    }
}

/// The version, and what follows it.
pub fn split_format(bytes: &[u8]) -> Option<(u32, &[u8])> {
    let (format, body) = bytes.split_first_chunk()?;
    Some((u32::from_le_bytes(*format), body))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_format_is_named_and_not_decoded() {
        let state = State::new("test".into());
        let mut bytes = encode(&state).unwrap();
        assert_eq!(decode(&bytes).unwrap(), state);
        bytes[0] += 1;
        let why = decode(&bytes).unwrap_err().to_string();
        assert!(why.contains(&format!("format {}", FORMAT + 1)), "{why}");
        assert!(matches!(decode(&bytes[..3]), Err(ImageError::Unreadable(_))));
    }
}
