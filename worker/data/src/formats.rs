//! What a file is, by its name and its first bytes: the one place that decides it. The name says how text is cut into documents;
//! the first bytes say whether it is text at all, whatever the name.

use fleet_common::files::stand_in;
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
    /// Rows in columns, with types.
    Parquet,
    /// Any of those that are text, compressed.
    Packed(Packing),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Packing {
    Gzip,
    Zstd,
}

/// A format that is not read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Foreign {
    /// With its article: "a PDF".
    pub name: &'static str,
    /// What to do with such a file.
    pub cure: &'static str,
    /// Bytes and where they stand; all of them must be there.
    magic: &'static [(usize, &'static [u8])],
}

/// As much of a file's beginning as `Kind::of` looks at.
pub(crate) const HEAD: usize = 4096;

const PACKED: [(&[u8], Packing); 2] =
    [(b"\x1f\x8b\x08", Packing::Gzip), (b"\x28\xb5\x2f\xfd", Packing::Zstd)];

const PARQUET: &[u8] = b"PAR1";

impl Kind {
    /// The kind of a file of this name that begins with `head` (`HEAD` bytes, or all that it has).
    pub fn of(path: &Path, head: &[u8]) -> Result<Kind, Foreign> {
        if let Some(pointer) = stand_in(head) {
            return Err(foreign(pointer.name, pointer.cure, &[]));
        }
        if let Some((_, packing)) = PACKED.iter().find(|(magic, _)| head.starts_with(magic)) {
            return Ok(Kind::Packed(*packing));
        }
        if head.starts_with(PARQUET) {
            return Ok(Kind::Parquet);
        }
        if let Some(format) = office(head) {
            return Err(format);
        }
        let is = |(at, bytes): &(usize, &[u8])| head.get(*at..).is_some_and(|rest| rest.starts_with(bytes));
        match FOREIGN.iter().find(|format| format.magic.iter().all(is)) {
            Some(format) => Err(*format),
            None if Kind::by_name(path) == Kind::Parquet => {
                Err(foreign("no Parquet file, although it is called one", "fetch it again", &[]))
            }
            None => Ok(Kind::by_name(path)),
        }
    }

    /// What the name alone says; a compressed file is called after what is in it, with `.gz` or `.zst` at the end.
    pub fn by_name(path: &Path) -> Kind {
        let name = path.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
        let name = [".gz", ".zst"].iter().find_map(|end| name.strip_suffix(end)).unwrap_or(&name);
        match name.rsplit_once('.').map(|(_, extension)| extension) {
            Some("json" | "jsonl" | "ndjson") => Kind::Json,
            Some("csv") => Kind::Csv,
            Some("tsv" | "tab") => Kind::Tsv,
            Some("parquet") => Kind::Parquet,
            _ => Kind::Text,
        }
    }
}

/// What an archive is whose first files have the names of Office's. Whoever writes one puts them in any order.
fn office(head: &[u8]) -> Option<Foreign> {
    const FILE: &[u8] = b"PK\x03\x04";
    let name = |at: usize| {
        let len = u16::from_le_bytes(head.get(at + 26..at + 28)?.try_into().ok()?);
        let name = head.get(at + 30..)?;
        Some(&name[..name.len().min(usize::from(len))])
    };
    let starts = || (0..head.len()).filter(|at| head[*at..].starts_with(FILE));
    let names = || starts().filter_map(name);
    let any = |beginning: &[u8]| head.starts_with(FILE) && names().any(|name| name.starts_with(beginning));
    match () {
        () if any(b"xl/") => Some(foreign("an Excel workbook", AS_CSV, &[])),
        () if any(b"word/") || any(b"ppt/") => Some(foreign("an Office document", AS_TEXT, &[])),
        () => None,
    }
}

/// Whether a file of this name is one of data, read or not.
pub(crate) fn is_data_by_name(path: &Path) -> bool {
    let extension = path.extension().unwrap_or_default().to_string_lossy().to_lowercase();
    DATA.contains(&extension.as_str())
}

#[rustfmt::skip]
const DATA: [&str; 37] = [
    "txt", "text", "json", "jsonl", "ndjson", "csv", "tsv", "tab", "jl",
    "parquet", "arrow", "feather", "avro", "orc", "h5", "hdf5", "npy", "npz", "pkl", "pickle", "sqlite", "db",
    "xlsx", "xls", "ods", "pdf", "docx", "epub",
    "gz", "zip", "zst", "bz2", "xz", "lz4", "7z", "tar", "tgz",
];

/// Whether a file of this name tells about data rather than being some.
pub(crate) fn is_documentation(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
    let (stem, extension) = name.split_once('.').unwrap_or((&name, ""));
    const STEMS: [&str; 9] = [
        "readme",
        "license",
        "licence",
        "copying",
        "notice",
        "changelog",
        "contributing",
        "citation",
        "authors",
    ];
    extension == "md" || STEMS.contains(&stem)
}

const UNPACK: &str = "unpack it";
const ROWS: &str = "write its rows as JSON Lines (.jsonl)";
const AS_TEXT: &str = "save what it says as text";
const AS_CSV: &str = "save it as CSV";
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
static FOREIGN: [Foreign; 42] = [
    // Compressed files and archives.
    foreign("compressed with bzip2", "unpack it with `bunzip2`, or compress it with zstd", &[(0, b"BZh"), (4, b"1AY&SY")]),
    foreign("compressed with bzip2", "unpack it with `bunzip2`, or compress it with zstd", &[(0, b"BZh"), (4, b"\x17\x72\x45\x38\x50\x90")]),
    foreign("compressed with xz", "unpack it with `unxz`, or compress it with zstd", &[(0, b"\xfd7zXZ\x00")]),
    foreign("compressed with lz4", "unpack it with `unlz4`, or compress it with zstd", &[(0, b"\x04\x22\x4d\x18")]),
    foreign("compressed with `compress`", "unpack it with `uncompress`", &[(0, b"\x1f\x9d")]),
    foreign("compressed with Snappy", UNPACK, &[(0, b"\xff\x06\x00\x00sNaPpY")]),
    foreign("a NumPy archive", ROWS, &[(0, b"PK\x03\x04"), (30, b"arr_0.npy")]),
    foreign("an EPUB book", AS_TEXT, &[(0, b"PK\x03\x04"), (38, b"application/epub")]),
    foreign("a workbook", AS_CSV, &[(0, b"PK\x03\x04"), (38, b"application/vnd.oasis.opendocument.spreadsheet")]),
    foreign("an Office document or workbook", "save it as text, a workbook as CSV", &[(0, b"PK\x03\x04"), (30, b"[Content_Types].xml")]),
    foreign("an OpenDocument file", AS_TEXT, &[(0, b"PK\x03\x04"), (38, b"application/vnd.oasis.opendocument")]),
    foreign("a zip archive (or a document, workbook or PyTorch file made of one)", UNPACK, &[(0, b"PK\x03\x04")]),
    foreign("an empty zip archive", NO_TEXT, &[(0, b"PK\x05\x06")]),
    foreign("a tar archive", "unpack it with `tar -x`", &[(257, b"ustar")]),
    foreign("a 7z archive", UNPACK, &[(0, b"7z\xbc\xaf\x27\x1c")]),
    foreign("a RAR archive", UNPACK, &[(0, b"Rar!\x1a\x07")]),
    // Tables.
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
            ("a.csv.zst", Kind::Csv),
        ] {
            assert_eq!(Kind::of(Path::new(name), b"text"), Ok(kind), "{name}");
            assert_eq!(
                Kind::of(Path::new(name), b"\x1f\x8b\x08\x00"),
                Ok(Kind::Packed(Packing::Gzip)),
                "{name}"
            );
            assert_eq!(
                Kind::of(Path::new(name), b"\x28\xb5\x2f\xfd\x04"),
                Ok(Kind::Packed(Packing::Zstd)),
                "{name}"
            );
            assert_eq!(Kind::of(Path::new(name), b"PAR1\x15\x04"), Ok(Kind::Parquet), "{name}");
        }
    }

    #[test]
    fn the_first_bytes_win_over_every_name() {
        let mut tar = vec![b'x'; 257];
        tar.extend(b"ustar\x0000");
        let cases: [(&[u8], &str); 12] = [
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "Git LFS pointer"),
            (b"BZh91AY&SY\x12", "bzip2"),
            (b"\xfd7zXZ\x00\x00", "xz"),
            (b"PK\x03\x04\x14\x00", "zip archive"),
            (&tar, "tar archive"),
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
    fn a_workbook_is_known_in_whatever_order_it_was_written() {
        let file = |name: &str| {
            let mut entry = b"PK\x03\x04".to_vec();
            entry.resize(26, 0);
            entry.extend((name.len() as u16).to_le_bytes());
            entry.extend([0; 2]);
            [entry, name.as_bytes().to_vec(), vec![0x55; 600]].concat()
        };
        let of = |names: &[&str]| {
            let head: Vec<u8> = names.iter().flat_map(|name| file(name)).collect();
            Kind::of(Path::new("a.xlsx"), &head[..head.len().min(HEAD)]).unwrap_err()
        };
        for names in [
            ["docProps/app.xml", "docProps/core.xml", "xl/theme/theme1.xml"],
            ["[Content_Types].xml", "_rels/.rels", "xl/workbook.xml"],
        ] {
            assert_eq!((of(&names).name, of(&names).cure), ("an Excel workbook", "save it as CSV"));
        }
        assert_eq!(of(&["[Content_Types].xml", "word/document.xml"]).name, "an Office document");
        assert_eq!(of(&["a.csv"]).cure, UNPACK);
        let ods = [&file("mimetype")[..38], b"application/vnd.oasis.opendocument.spreadsheet"].concat();
        assert_eq!(Kind::of(Path::new("a"), &ods).unwrap_err().name, "a workbook");
    }

    #[test]
    fn text_that_speaks_of_formats_is_text() {
        for text in ["PKzip", "GIF", "RIFF raff", "BZh", "GGUF is a format", "Obj", "ID", "", "7z", "a ustar"]
        {
            assert_eq!(Kind::of(Path::new("a.txt"), text.as_bytes()), Ok(Kind::Text), "{text}");
        }
    }
}
