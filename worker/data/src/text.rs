//! From the bytes of a file to its text: unpacked, known by its first bytes, and decoded.

use crate::DataError;
use crate::chunks::{HELD_MAX, held};
use crate::formats::{HEAD, Kind};
use crate::unpack::{damage, unpack};
use std::io::{self, Cursor, Read};
use std::path::Path;

/// A compressed file may unpack to this much, or to `RATIO_MAX` times its size where that is more.
const UNPACKED_MIN: u64 = 256 << 20;

/// Text seldom shrinks to less than a twentieth; a bomb does to a thousandth.
const RATIO_MAX: u64 = 100;

const UTF16: &str = "it is UTF-16, which is held as a whole; convert it with `iconv -f UTF-16 -t UTF-8`";

const UTF8_MARK: &[u8] = b"\xef\xbb\xbf";

/// A file that is open: how it is to be cut, never `Kind::Packed`, and its bytes. Of text these are unpacked, in UTF-8 as far as the file is
/// right, and without a byte order mark.
pub(crate) struct Opened<'r> {
    pub kind: Kind,
    pub bytes: Box<dyn Read + 'r>,
}

/// Opens what `file` gives, of which there are `len` bytes. UTF-16 is held as a whole, if it can be.
pub(crate) fn open<'r>(path: &Path, mut file: impl Read + 'r, len: u64) -> Result<Opened<'r>, DataError> {
    let failed = |e| unreadable(path, e);
    let mut head = first_bytes(&mut file).map_err(failed)?;
    let mut kind = known(path, &head)?;
    let mut bytes: Box<dyn Read + 'r> = Box::new(Cursor::new(head.clone()).chain(file));
    if let Kind::Packed(packing) = kind {
        bytes = unpack(packing, bytes, UNPACKED_MIN.max(len.saturating_mul(RATIO_MAX))).map_err(failed)?;
        head = first_bytes(&mut bytes).map_err(failed)?;
        kind = known(path, &head)?;
        match kind {
            Kind::Packed(_) => return Err(not_text(path, "it is compressed twice; unpack it".into())),
            Kind::Parquet => {
                return Err(not_text(
                    path,
                    "it is a Parquet file that is compressed as a whole; unpack it".into(),
                ));
            }
            _ => bytes = Box::new(Cursor::new(head.clone()).chain(bytes)),
        }
    }
    let unit: Option<fn([u8; 2]) -> u16> = match head.as_slice() {
        _ if kind == Kind::Parquet => None,
        [0xff, 0xfe, ..] => Some(u16::from_le_bytes),
        [0xfe, 0xff, ..] => Some(u16::from_be_bytes),
        _ => None,
    };
    if let Some(unit) = unit {
        let all = held(path, bytes, HELD_MAX, UTF16)?;
        let text = utf16(&all[2..], unit).map_err(|what| not_text(path, what))?;
        bytes = Box::new(Cursor::new(text.into_bytes()));
    } else if head.starts_with(UTF8_MARK) {
        bytes.read_exact(&mut [0; UTF8_MARK.len()]).map_err(failed)?;
    }
    Ok(Opened { kind, bytes })
}

fn first_bytes(file: &mut impl Read) -> io::Result<Vec<u8>> {
    let mut head = Vec::with_capacity(HEAD);
    file.take(HEAD as u64).read_to_end(&mut head)?;
    Ok(head)
}

/// The error of a file that cannot be read: damaged, or on a disk that fails.
pub(crate) fn unreadable(path: &Path, error: io::Error) -> DataError {
    match damage(&error) {
        Some(what) => not_text(path, what),
        None => DataError::Read { path: path.to_owned(), source: error },
    }
}

/// The text of bytes that begin at `offset`; with `damaged_too` U+FFFD stands for what is not UTF-8. Tells whether there was such.
pub(crate) fn decode(
    path: &Path,
    offset: usize,
    bytes: Vec<u8>,
    damaged_too: bool,
) -> Result<(String, bool), DataError> {
    if bytes.contains(&0) {
        return Err(not_text(path, nul(&bytes, offset)));
    }
    match String::from_utf8(bytes) {
        Ok(text) => Ok((text, false)),
        Err(e) if damaged_too => Ok((String::from_utf8_lossy(e.as_bytes()).into_owned(), true)),
        Err(e) => {
            Err(DataError::NotUtf8 { path: path.to_owned(), offset: offset + e.utf8_error().valid_up_to() })
        }
    }
}

/// The kind of a file that begins so, or the refusal of its format.
pub(crate) fn known(path: &Path, bytes: &[u8]) -> Result<Kind, DataError> {
    Kind::of(path, &bytes[..bytes.len().min(HEAD)]).map_err(|format| DataError::Foreign {
        path: path.to_owned(),
        name: format.name,
        cure: format.cure,
    })
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
fn nul(bytes: &[u8], offset: usize) -> String {
    let at = offset + bytes.iter().position(|&byte| byte == 0).unwrap_or_default();
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

pub(crate) fn not_text(path: &Path, what: String) -> DataError {
    DataError::NotText { path: path.to_owned(), what }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::unpack::tests::{gzip, zstd};

    fn text(name: &str, bytes: &[u8]) -> Result<(Kind, String), String> {
        let path = Path::new(name);
        let read = || {
            let mut opened = open(path, bytes, bytes.len() as u64)?;
            let mut all = Vec::new();
            opened.bytes.read_to_end(&mut all).map_err(|e| unreadable(path, e))?;
            Ok((opened.kind, decode(path, 0, all, false)?.0))
        };
        read().map_err(|e: DataError| e.to_string())
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
        assert!(text("a.txt", b"ARROW1").unwrap_err().contains("a.txt is an Arrow file"));
        assert!(text("a.parquet", b"PAR").unwrap_err().contains("a.parquet is no Parquet file, although"));
        assert_eq!(
            decode(Path::new("a"), 9, b"caf\xe9".to_vec(), true).unwrap(),
            ("caf\u{fffd}".into(), true)
        );
        assert!(
            decode(Path::new("a"), 9, b"caf\xe9".to_vec(), false)
                .unwrap_err()
                .to_string()
                .contains("offset 12")
        );
    }

    #[test]
    fn what_is_compressed_is_unpacked_whatever_the_file_is_called() {
        let rows = b"{\"text\":\"a\"}\n";
        for name in ["a.jsonl.gz", "a.jsonl", "a.json.GZ", "a.jsonl.zst"] {
            for packed in [gzip(rows), zstd(rows)] {
                assert_eq!(text(name, &packed).unwrap(), (Kind::Json, "{\"text\":\"a\"}\n".into()), "{name}");
            }
        }
        assert!(text("a.gz", &gzip(&zstd(b"x"))).unwrap_err().contains("compressed twice"));
        assert!(text("a.gz", &gzip(b"ARROW1")).unwrap_err().contains("is an Arrow file"));
        assert!(text("a.gz", &zstd(b"PAR1")).unwrap_err().contains("compressed as a whole"));
        let whole = gzip(&b"some text ".repeat(100));
        assert!(
            text("a.gz", &whole[..whole.len() - 9])
                .unwrap_err()
                .contains("a.gz is not text: its gzip data are damaged")
        );
    }
}
