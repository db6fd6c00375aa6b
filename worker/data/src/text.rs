//! From the bytes of a file to its text: unpacked, known by its first bytes, and decoded.

use crate::DataError;
use crate::formats::{GZIP, HEAD, Kind};
use flate2::bufread::GzDecoder;
use std::io::Read;
use std::path::Path;

/// A compressed file may unpack to this much, or to `RATIO_MAX` times its size where that is more.
const UNPACKED_MIN: u64 = 256 << 20;

/// Text seldom shrinks to less than a twentieth; a bomb does to a thousandth.
const RATIO_MAX: u64 = 100;

/// The text of a file and how it is to be cut; never `Kind::Gzip`.
pub(crate) fn read(path: &Path, bytes: Vec<u8>) -> Result<(Kind, String), DataError> {
    let (kind, bytes) = unpacked(path, bytes)?;
    Ok((kind, decode(path, bytes)?))
}

/// The same of a file that may have bytes that are not UTF-8: in their place stands U+FFFD. Tells whether there are such.
pub(crate) fn read_damaged(path: &Path, bytes: Vec<u8>) -> Result<(Kind, String, bool), DataError> {
    let (kind, bytes) = unpacked(path, bytes)?;
    let is_utf16 = bytes.starts_with(b"\xff\xfe") || bytes.starts_with(b"\xfe\xff");
    match std::str::from_utf8(&bytes) {
        Err(_) if !is_utf16 && !bytes.contains(&0) => {
            let text = String::from_utf8_lossy(&bytes);
            Ok((kind, text.trim_start_matches('\u{feff}').to_owned(), true))
        }
        _ => Ok((kind, decode(path, bytes)?, false)),
    }
}

fn unpacked(path: &Path, bytes: Vec<u8>) -> Result<(Kind, Vec<u8>), DataError> {
    let kind = known(path, &bytes)?;
    let (kind, bytes) = match kind {
        Kind::Gzip => {
            let limit = UNPACKED_MIN.max(bytes.len() as u64 * RATIO_MAX);
            let bytes = gunzip(&bytes, limit).map_err(|what| not_text(path, what))?;
            (known(path, &bytes)?, bytes)
        }
        kind => (kind, bytes),
    };
    if kind == Kind::Gzip {
        return Err(not_text(path, "it is compressed twice; unpack it".into()));
    }
    Ok((kind, bytes))
}

/// The kind of a file that begins so, or the refusal of its format.
pub(crate) fn known(path: &Path, bytes: &[u8]) -> Result<Kind, DataError> {
    Kind::of(path, &bytes[..bytes.len().min(HEAD)]).map_err(|format| DataError::Foreign {
        path: path.to_owned(),
        name: format.name,
        cure: format.cure,
    })
}

fn gunzip(bytes: &[u8], limit: u64) -> Result<Vec<u8>, String> {
    let (mut text, mut rest) = (Vec::new(), bytes);
    // Members follow each other, and maybe zeros, with which tapes and archives fill their blocks.
    while rest.iter().any(|byte| *byte != 0) {
        if !text.is_empty() && !rest.starts_with(GZIP) {
            return Err(format!(
                "its gzip data end {} bytes before the file does, and what follows is not gzip; cut that off, or fetch it again",
                rest.len()
            ));
        }
        let mut member = GzDecoder::new(rest);
        (&mut member)
            .take(limit + 1 - text.len() as u64)
            .read_to_end(&mut text)
            .map_err(|e| format!("its gzip data are damaged or cut off ({e}); fetch it again"))?;
        if text.len() as u64 > limit {
            return Err(format!(
                "it unpacks to more than {limit} bytes; unpack it yourself if it is meant so"
            ));
        }
        rest = member.into_inner();
    }
    Ok(text)
}

/// UTF-8, or UTF-16 where a byte order mark says so. The mark is no part of the text.
fn decode(path: &Path, bytes: Vec<u8>) -> Result<String, DataError> {
    let text = match bytes.as_slice() {
        [0xff, 0xfe, rest @ ..] => utf16(rest, u16::from_le_bytes).map_err(|what| not_text(path, what))?,
        [0xfe, 0xff, rest @ ..] => utf16(rest, u16::from_be_bytes).map_err(|what| not_text(path, what))?,
        _ if bytes.contains(&0) => return Err(not_text(path, nul(&bytes))),
        _ => {
            let mut text = String::from_utf8(bytes).map_err(|e| DataError::NotUtf8 {
                path: path.to_owned(),
                offset: e.utf8_error().valid_up_to(),
            })?;
            if text.starts_with('\u{feff}') {
                text.drain(..'\u{feff}'.len_utf8());
            }
            text
        }
    };
    match text.as_bytes().contains(&0) {
        true => Err(not_text(path, nul(text.as_bytes()))),
        false => Ok(text),
    }
}

fn utf16(bytes: &[u8], unit: fn([u8; 2]) -> u16) -> Result<String, String> {
    let (units, rest) = bytes.as_chunks::<2>();
    let text: Result<String, _> = char::decode_utf16(units.iter().map(|&pair| unit(pair))).collect();
    match text {
        Ok(text) if rest.is_empty() => Ok(text),
        _ => Err("its byte order mark says UTF-16 and the rest is not; convert it to UTF-8".into()),
    }
}

/// What is wrong where a byte is 0.
fn nul(bytes: &[u8]) -> String {
    let at = bytes.iter().position(|&byte| byte == 0).unwrap_or_default();
    let (pairs, _) = bytes[..bytes.len().min(HEAD)].as_chunks::<2>();
    let every_second =
        |i: usize| pairs.len() > 1 && pairs.iter().filter(|p| p[i] == 0).count() * 10 > pairs.len() * 6;
    match (every_second(1), every_second(0)) {
        (true, false) => "it seems to be UTF-16; convert it with `iconv -f UTF-16LE -t UTF-8`".into(),
        (false, true) => "it seems to be UTF-16; convert it with `iconv -f UTF-16BE -t UTF-8`".into(),
        _ => {
            format!("it is binary (a NUL byte at offset {at}); convert it, or leave it out with data.exclude")
        }
    }
}

fn not_text(path: &Path, what: String) -> DataError {
    DataError::NotText { path: path.to_owned(), what }
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

    fn text(name: &str, bytes: &[u8]) -> Result<(Kind, String), String> {
        read(Path::new(name), bytes.to_vec()).map_err(|e| e.to_string())
    }

    fn utf16(text: &str, bytes: fn(u16) -> [u8; 2]) -> Vec<u8> {
        text.encode_utf16().flat_map(bytes).collect()
    }

    #[test]
    fn byte_order_marks_and_utf_16_are_read() {
        assert_eq!(text("a.txt", b"\xef\xbb\xbfhi").unwrap(), (Kind::Text, "hi".into()));
        assert_eq!(text("a.csv", b"").unwrap(), (Kind::Csv, String::new()));
        for bytes in [
            utf16("\u{feff}gr\u{fc}n \u{1F600}", u16::to_le_bytes),
            utf16("\u{feff}gr\u{fc}n \u{1F600}", u16::to_be_bytes),
        ] {
            assert_eq!(text("a.txt", &bytes).unwrap().1, "gr\u{fc}n \u{1F600}");
        }
        assert!(text("a.txt", b"\xff\xfea").unwrap_err().contains("says UTF-16"));
        assert!(
            text("a.txt", &utf16("without a mark", u16::to_le_bytes))
                .unwrap_err()
                .contains("iconv -f UTF-16LE")
        );
    }

    #[test]
    fn binary_is_called_binary_and_other_encodings_by_their_first_bad_byte() {
        assert!(
            text("a.txt", b"abc\0\xff")
                .unwrap_err()
                .contains("a.txt is not text: it is binary (a NUL byte at offset 3)")
        );
        assert!(text("a.txt", b"caf\xe9").unwrap_err().contains("bad byte at offset 3"));
        assert!(text("a.txt", b"PAR1").unwrap_err().contains("a.txt is a Parquet file"));
    }

    #[test]
    fn gzip_is_unpacked_whatever_the_file_is_called() {
        let rows = b"{\"text\":\"a\"}\n";
        for name in ["a.jsonl.gz", "a.jsonl", "a.json.GZ"] {
            assert_eq!(text(name, &gzip(rows)).unwrap(), (Kind::Json, "{\"text\":\"a\"}\n".into()), "{name}");
        }
        let two = [gzip(b"one "), gzip(b"two")].concat();
        assert_eq!(text("a.gz", &two).unwrap(), (Kind::Text, "one two".into()), "members follow each other");
        assert!(text("a.gz", &gzip(&gzip(b"x"))).unwrap_err().contains("compressed twice"));
        assert!(text("a.gz", &gzip(b"PAR1")).unwrap_err().contains("is a Parquet file"));
        let padded = [gzip(b"one"), vec![0; 700]].concat();
        assert_eq!(text("a.gz", &padded).unwrap(), (Kind::Text, "one".into()), "as tape drives leave it");
        let followed = text("a.gz", &[gzip(b"one"), vec![0; 3], gzip(b"two")].concat()).unwrap_err();
        assert!(followed.contains("what follows is not gzip"), "{followed}");
        let followed = text("a.gz", &[gzip(b"one"), b"<html>".to_vec()].concat()).unwrap_err();
        assert!(followed.contains("end 6 bytes before the file does"), "{followed}");
        let whole = gzip(&b"some text ".repeat(100));
        assert!(text("a.gz", &whole[..whole.len() - 9]).unwrap_err().contains("damaged or cut off"));
    }

    #[test]
    fn a_bomb_is_refused_before_it_is_unpacked_whole() {
        let bomb = gzip(&[b' '; 10_000]);
        assert_eq!(gunzip(&bomb, 10_000).unwrap().len(), 10_000);
        assert!(gunzip(&bomb, 9_999).unwrap_err().contains("more than 9999 bytes"));
    }
}
