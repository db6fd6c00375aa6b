//! What a file is, by its name and its first bytes: the one place that decides it. The name says how text is cut into documents;
//! the first bytes say whether it is text at all, whatever the name.

use std::path::Path;

/// How a file's contents become documents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The file is a document.
    Text,
    /// Objects, each with a text field that is a document: one per line, in an array, or as columns.
    Json,
    /// RFC 4180: a row's text field is a document.
    Csv,
    /// The same with tabs, and without quotes.
    Tsv,
    /// Any of the others, compressed.
    Gzip,
}

/// A format that is not read.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Foreign {
    /// With its article: "a PDF".
    pub name: &'static str,
    /// What to do with such a file.
    pub cure: &'static str,
    /// Bytes and where they stand; all of them must be there.
    magic: &'static [(usize, &'static [u8])],
}

/// As much of a file's beginning as `Kind::of` looks at.
pub(crate) const HEAD: usize = 512;

pub(crate) const GZIP: &[u8] = b"\x1f\x8b\x08";

impl Kind {
    /// The kind of a file of this name that begins with `head` (`HEAD` bytes, or all that it has).
    pub fn of(path: &Path, head: &[u8]) -> Result<Kind, &'static Foreign> {
        if head.starts_with(GZIP) {
            return Ok(Kind::Gzip);
        }
        let is = |(at, bytes): &(usize, &[u8])| head.get(*at..).is_some_and(|rest| rest.starts_with(bytes));
        match FOREIGN.iter().find(|format| format.magic.iter().all(is)) {
            Some(format) => Err(format),
            None => Ok(Kind::by_name(path)),
        }
    }

    /// What the name alone says; a compressed file is called after what is in it, with `.gz` at the end.
    pub fn by_name(path: &Path) -> Kind {
        let name = path.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
        let name = name.strip_suffix(".gz").unwrap_or(&name);
        match name.rsplit_once('.').map(|(_, extension)| extension) {
            Some("json" | "jsonl" | "ndjson") => Kind::Json,
            Some("csv") => Kind::Csv,
            Some("tsv" | "tab") => Kind::Tsv,
            _ => Kind::Text,
        }
    }
}

const UNPACK: &str = "unpack it";
const ROWS: &str = "write its rows as JSON Lines (.jsonl)";
const AS_TEXT: &str = "save what it says as text";
const NO_TEXT: &str = "take it out of the data";
const WEIGHTS: &str = "it has no text to train on: a model goes to model.path";

const fn foreign(
    name: &'static str,
    cure: &'static str,
    magic: &'static [(usize, &'static [u8])],
) -> Foreign {
    Foreign { name, cure, magic }
}

#[rustfmt::skip]
static FOREIGN: [Foreign; 46] = [
    // Stand-ins for files that were not fetched.
    foreign("a Git LFS pointer, not the data", "fetch the data with `git lfs pull`", &[(0, b"version https://git-lfs.github.com/spec/")]),
    foreign("a Git LFS pointer, not the data", "fetch the data with `git lfs pull`", &[(0, b"version https://hawser.github.com/spec/")]),
    foreign("a git-annex pointer, not the data", "fetch the data with `git annex get`", &[(0, b"/annex/objects/")]),
    // Compressed files and archives.
    foreign("compressed with zstd", "unpack it with `zstd -d`, or compress it with gzip", &[(0, b"\x28\xb5\x2f\xfd")]),
    foreign("compressed with bzip2", "unpack it with `bunzip2`, or compress it with gzip", &[(0, b"BZh"), (4, b"1AY&SY")]),
    foreign("compressed with bzip2", "unpack it with `bunzip2`, or compress it with gzip", &[(0, b"BZh"), (4, b"\x17\x72\x45\x38\x50\x90")]),
    foreign("compressed with xz", "unpack it with `unxz`, or compress it with gzip", &[(0, b"\xfd7zXZ\x00")]),
    foreign("compressed with lz4", "unpack it with `unlz4`, or compress it with gzip", &[(0, b"\x04\x22\x4d\x18")]),
    foreign("compressed with `compress`", "unpack it with `uncompress`", &[(0, b"\x1f\x9d")]),
    foreign("compressed with Snappy", UNPACK, &[(0, b"\xff\x06\x00\x00sNaPpY")]),
    foreign("a NumPy archive", ROWS, &[(0, b"PK\x03\x04"), (30, b"arr_0.npy")]),
    foreign("an EPUB book", AS_TEXT, &[(0, b"PK\x03\x04"), (38, b"application/epub")]),
    foreign("an Office document", AS_TEXT, &[(0, b"PK\x03\x04"), (30, b"[Content_Types].xml")]),
    foreign("an OpenDocument file", AS_TEXT, &[(0, b"PK\x03\x04"), (38, b"application/vnd.oasis.opendocument")]),
    foreign("a zip archive (or a document, workbook or PyTorch file made of one)", UNPACK, &[(0, b"PK\x03\x04")]),
    foreign("an empty zip archive", NO_TEXT, &[(0, b"PK\x05\x06")]),
    foreign("a tar archive", "unpack it with `tar -x`", &[(257, b"ustar")]),
    foreign("a 7z archive", UNPACK, &[(0, b"7z\xbc\xaf\x27\x1c")]),
    foreign("a RAR archive", UNPACK, &[(0, b"Rar!\x1a\x07")]),
    // Tables.
    foreign("a Parquet file", ROWS, &[(0, b"PAR1")]),
    foreign("an encrypted Parquet file", ROWS, &[(0, b"PARE")]),
    foreign("an Arrow file", ROWS, &[(0, b"ARROW1")]),
    foreign("an Arrow stream", ROWS, &[(0, b"\xff\xff\xff\xff")]),
    foreign("a Feather file", ROWS, &[(0, b"FEA1")]),
    foreign("an Avro file", ROWS, &[(0, b"Obj\x01")]),
    foreign("an SQLite database", ROWS, &[(0, b"SQLite format 3\0")]),
    foreign("an HDF5 file", ROWS, &[(0, b"\x89HDF\r\n\x1a\n")]),
    foreign("a NumPy array", ROWS, &[(0, b"\x93NUMPY")]),
    // Models, and what Python keeps.
    foreign("a safetensors file", WEIGHTS, &[(5, b"\0\0\0{\"")]),
    foreign("a GGUF model", WEIGHTS, &[(0, b"GGUF"), (5, b"\0\0\0")]),
    foreign("a pickle of Python", ROWS, &[(0, b"\x80\x02")]),
    foreign("a pickle of Python", ROWS, &[(0, b"\x80\x03")]),
    foreign("a pickle of Python", ROWS, &[(0, b"\x80\x04\x95")]),
    foreign("a pickle of Python", ROWS, &[(0, b"\x80\x05\x95")]),
    // Documents, pictures, sound, programs.
    foreign("a PDF", AS_TEXT, &[(0, b"%PDF-")]),
    foreign("an RTF document", AS_TEXT, &[(0, b"{\\rtf")]),
    foreign("an old Office document", AS_TEXT, &[(0, b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1")]),
    foreign("a PNG image", NO_TEXT, &[(0, b"\x89PNG\r\n\x1a\n")]),
    foreign("a JPEG image", NO_TEXT, &[(0, b"\xff\xd8\xff")]),
    foreign("a GIF image", NO_TEXT, &[(0, b"GIF8"), (5, b"a")]),
    foreign("a WebP image", NO_TEXT, &[(0, b"RIFF"), (8, b"WEBP")]),
    foreign("a WAV recording", NO_TEXT, &[(0, b"RIFF"), (8, b"WAVE")]),
    foreign("an Ogg recording", NO_TEXT, &[(0, b"OggS\0")]),
    foreign("an MP4 video", NO_TEXT, &[(0, b"\0\0\0"), (4, b"ftyp")]),
    foreign("a program (ELF)", NO_TEXT, &[(0, b"\x7fELF")]),
    foreign("UTF-32 text", "convert it with `iconv -f UTF-32 -t UTF-8`", &[(0, b"\xff\xfe\0\0")]),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_says_how_text_is_cut() {
        for (name, kind) in [
            ("a.txt", Kind::Text),
            ("a", Kind::Text),
            ("json", Kind::Text),
            ("A.JSON", Kind::Json),
            ("a.b.ndjson", Kind::Json),
            ("a.jsonl.gz", Kind::Json),
            ("A.CSV.GZ", Kind::Csv),
            ("a.tsv", Kind::Tsv),
            ("a.gz", Kind::Text),
        ] {
            assert_eq!(Kind::of(Path::new(name), b"text"), Ok(kind), "{name}");
            assert_eq!(Kind::of(Path::new(name), b"\x1f\x8b\x08\x00"), Ok(Kind::Gzip), "{name}");
        }
    }

    #[test]
    fn the_first_bytes_win_over_every_name() {
        let mut tar = vec![b'x'; 257];
        tar.extend(b"ustar\x0000");
        let cases: [(&[u8], &str); 14] = [
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "Git LFS pointer"),
            (b"\x28\xb5\x2f\xfd\x04", "zstd"),
            (b"BZh91AY&SY\x12", "bzip2"),
            (b"\xfd7zXZ\x00\x00", "xz"),
            (b"PK\x03\x04\x14\x00", "zip archive"),
            (&tar, "tar archive"),
            (b"PAR1\x15\x04", "Parquet"),
            (b"ARROW1\0\0\xff", "Arrow file"),
            (b"\xff\xff\xff\xff\x88\x01\0\0", "Arrow stream"),
            (b"\x58\x01\0\0\0\0\0\0{\"__metadata__\"", "safetensors"),
            (b"\x93NUMPY\x01\0", "NumPy array"),
            (b"\x80\x04\x95\x10", "pickle"),
            (b"SQLite format 3\0\x10", "SQLite"),
            (b"%PDF-1.7\n", "PDF"),
        ];
        for (head, name) in cases {
            for path in ["a.txt", "a.jsonl", "a.csv"] {
                let format = Kind::of(Path::new(path), head).unwrap_err();
                assert!(format.name.contains(name), "{path}: {}", format.name);
            }
        }
    }

    #[test]
    fn text_that_speaks_of_formats_is_text() {
        for text in ["PKzip", "GIF", "RIFF raff", "BZh", "GGUF is a format", "Obj", "ID", "", "7z", "a ustar"]
        {
            assert_eq!(Kind::of(Path::new("a.txt"), text.as_bytes()), Ok(Kind::Text), "{text}");
        }
    }
}
