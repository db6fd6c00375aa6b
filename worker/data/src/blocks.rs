//! A file as blocks: whole rows or texts, about a megabyte at a time, so that data of any size pass through the same memory. The same
//! file gives the same blocks.

use crate::array::{self, Elements};
use crate::chunks::{CHUNK, Characters, Chunks, Ends, Lines};
use crate::documents::{PIECE_LARGE, cut, cut_front};
use crate::formats::Kind;
use crate::table::{Dialect, Header, RowEnds};
use crate::text::{Opened, decode, open};
use crate::{DataError, json, parquet};
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};
use std::cell::RefCell;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};

/// A text of more bytes than this is cut.
pub(crate) const WHOLE_MAX: usize = 16 << 20;

/// What is held as a whole of JSON.
const COLUMNS: &str =
    "it is JSON of one object, which is held as a whole; write its rows as JSON Lines (.jsonl)";

/// Rows or texts that follow each other in a file.
#[derive(Debug)]
pub(crate) struct Block {
    pub contents: Contents,
    /// It held bytes that are not UTF-8.
    pub is_damaged: bool,
}

#[derive(Debug)]
pub(crate) enum Contents {
    /// Of a file that is a text: all of it, or pieces.
    Texts { texts: Vec<String>, begins: bool },
    /// Objects, one per line, from this line on.
    Lines { line: u64, text: String },
    /// A file of JSON that is one value, or rows of one that is an array, from this row and line on.
    Document { row: u64, line: u64, text: String },
    /// Rows of a table, from this line on.
    Table { header: Arc<Header>, line: u64, text: String },
    /// Rows of Parquet, from this row on.
    Records { row: u64, rows: Vec<Map<String, Value>> },
}

/// How files are read.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Reading<'a> {
    /// The only field that is wanted.
    pub field: Option<&'a str>,
    /// Texts are cut into pieces of at least so many bytes.
    pub piece: Option<usize>,
    /// What is not UTF-8 is read too.
    pub damaged_too: bool,
}

/// Whoever takes blocks, and whether there are to be more of them.
pub(crate) type Take<'t> = &'t mut dyn FnMut(Block) -> Result<bool, DataError>;

/// A file of the data.
#[derive(Clone, Debug)]
pub(crate) struct Input {
    pub path: PathBuf,
    pub sha256: [u8; 32],
    /// How often what it has is trained on in an epoch.
    pub weight: f64,
}

impl Input {
    /// Gives the blocks of the file, which is checked against its hash when it has been read whole.
    pub fn blocks(&self, reading: Reading, take: Take) -> Result<(), DataError> {
        let path = &self.path;
        let failed = |source| DataError::Read { path: path.clone(), source };
        let file = File::open(path).map_err(failed)?;
        let len = file.metadata().map_err(failed)?.len();
        let hasher = RefCell::new(Sha256::new());
        let hashed = || Hashed { file: &file, hasher: &hasher };
        let opened = open(path, hashed(), len)?;
        let is_parquet = opened.kind == Kind::Parquet;
        let goes_on = match is_parquet {
            true => parquet::blocks(path, &file, reading.field, take)?,
            false => text_blocks(path, opened, reading, take)?,
        };
        if !goes_on {
            return Ok(());
        }
        if is_parquet {
            hasher.replace(Sha256::new());
            io::Seek::rewind(&mut &file).map_err(failed)?;
        }
        io::copy(&mut hashed(), &mut io::sink()).map_err(failed)?;
        match <[u8; 32]>::from(hasher.take().finalize()) == self.sha256 {
            true => Ok(()),
            false => Err(DataError::Changed(path.clone())),
        }
    }
}

struct Hashed<'f> {
    file: &'f File,
    hasher: &'f RefCell<Sha256>,
}

impl Read for Hashed<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let read = self.file.read(out)?;
        self.hasher.borrow_mut().update(&out[..read]);
        Ok(read)
    }
}

/// The blocks of a file of text; false where no more are wanted.
pub(crate) fn text_blocks(
    path: &Path,
    opened: Opened,
    reading: Reading,
    take: Take,
) -> Result<bool, DataError> {
    let reader = Reader { path, reading, take };
    match opened.kind {
        Kind::Json => reader.json(opened.bytes),
        Kind::Csv => reader.table(opened.bytes, Dialect::Csv),
        Kind::Tsv => reader.table(opened.bytes, Dialect::Tsv),
        Kind::Text | Kind::Parquet | Kind::Packed(_) => reader.text(opened.bytes),
    }
}

struct Reader<'a> {
    path: &'a Path,
    reading: Reading<'a>,
    take: Take<'a>,
}

impl<'a> Reader<'a> {
    fn decode(&self, (offset, bytes): (usize, Vec<u8>)) -> Result<(String, bool), DataError> {
        decode(self.path, offset, bytes, self.reading.damaged_too)
    }

    fn text(self, bytes: Box<dyn Read + 'a>) -> Result<bool, DataError> {
        let mut chunks = Chunks::new(self.path, bytes, Characters);
        let mut piece = self.reading.piece;
        let (mut rest, mut is_damaged, mut begins) = (String::new(), false, true);
        // Whether line ends that come next belong to a cut.
        let mut is_cut = false;
        while let Some(chunk) = chunks.next()? {
            let (text, damaged) = self.decode(chunk)?;
            is_damaged |= damaged;
            rest.push_str(if is_cut { text.trim_start_matches(['\n', '\r']) } else { &text });
            if rest.len() > WHOLE_MAX {
                piece = piece.or(Some(PIECE_LARGE));
            }
            let Some(piece) = piece else { continue };
            let (texts, left) = cut_front(&rest, piece);
            if !texts.is_empty() {
                let contents =
                    Contents::Texts { texts: texts.into_iter().map(str::to_owned).collect(), begins };
                let left = left.to_owned();
                if !(self.take)(Block { contents, is_damaged })? {
                    return Ok(false);
                }
                (rest, is_damaged, begins) = (left, false, false);
                is_cut = true;
            }
            is_cut &= rest.is_empty();
        }
        let texts = match piece {
            Some(piece) => cut(&rest, piece).into_iter().map(str::to_owned).collect(),
            None => vec![rest],
        };
        (self.take)(Block { contents: Contents::Texts { texts, begins }, is_damaged })
    }

    fn json(self, bytes: Box<dyn Read + 'a>) -> Result<bool, DataError> {
        let (head, bytes) = self.head(bytes)?;
        if array::is_array(&head) {
            return self.array(bytes);
        }
        let mut chunks = Chunks::new(self.path, bytes, Lines);
        let Some((_, mut first)) = chunks.next()? else { return Ok(true) };
        // Two lines show what the file is.
        let is_line = |line: &&[u8]| line.iter().any(|byte| !byte.is_ascii_whitespace());
        while first.split(|byte| *byte == b'\n').filter(is_line).count() < 2 {
            let Some((_, more)) = chunks.next()? else { break };
            first.extend(more);
        }
        let (text, is_damaged) = self.decode((0, first))?;
        if json::is_one_document(json::lines(1, &text).map(|(_, line)| line.trim())) {
            let behind = text.len();
            let (rest, damaged) = self.decode((behind, chunks.all(COLUMNS)?))?;
            let contents = Contents::Document { row: 1, line: 1, text: text + &rest };
            return (self.take)(Block { contents, is_damaged: is_damaged || damaged });
        }
        let mut line = 1;
        let mut next = Some((text, is_damaged));
        while let Some((text, is_damaged)) = next {
            let lines = text.matches('\n').count() as u64;
            if !(self.take)(Block { contents: Contents::Lines { line, text }, is_damaged })? {
                return Ok(false);
            }
            line += lines;
            next = chunks.next()?.map(|chunk| self.decode(chunk)).transpose()?;
        }
        Ok(true)
    }

    /// As much as a chunk has of the beginning, and all.
    fn head(&self, mut bytes: Box<dyn Read + 'a>) -> Result<(Vec<u8>, Box<dyn Read + 'a>), DataError> {
        let mut head = Vec::new();
        let failed = |e| crate::text::unreadable(self.path, e);
        (&mut bytes).take(CHUNK as u64).read_to_end(&mut head).map_err(failed)?;
        Ok((head.clone(), Box::new(io::Cursor::new(head).chain(bytes))))
    }

    /// An array of rows.
    fn array(self, bytes: Box<dyn Read + 'a>) -> Result<bool, DataError> {
        let mut chunks = Chunks::new(self.path, bytes, Elements::default());
        let (mut seen, mut line) = (Elements::default(), 1);
        let mut next = chunks.next()?;
        while let Some((offset, bytes)) = next {
            let row = seen.ended() + 1;
            seen.last(&bytes);
            let is_behind_comma = row > 1 && bytes.trim_ascii_start().starts_with(b"]");
            next = chunks.next()?;
            let is_last = next.is_none();
            let (text, is_damaged) = self.decode((offset, bytes))?;
            let lines = text.matches('\n').count() as u64;
            if is_behind_comma {
                let what = "not JSON: a comma without a row behind it; take it out".to_owned();
                return Err(DataError::Row { path: self.path.to_owned(), line, what });
            }
            let contents = Contents::Document { row, line, text: array::closed(text, offset == 0, is_last) };
            if !(self.take)(Block { contents, is_damaged })? {
                return Ok(false);
            }
            line += lines;
        }
        Ok(true)
    }

    fn table(self, bytes: Box<dyn Read + 'a>, dialect: Dialect) -> Result<bool, DataError> {
        let bad = |(line, what)| DataError::Row { path: self.path.to_owned(), line, what };
        let (head, bytes) = self.head(bytes)?;
        let ends = RowEnds::of(&String::from_utf8_lossy(&head), dialect);
        let mut chunks = Chunks::new(self.path, bytes, ends);
        let Some(first) = chunks.next()? else { return Ok(true) };
        let (first, mut is_damaged) = self.decode(first)?;
        let Some((header, rest, mut line)) = Header::read(&first, dialect).map_err(bad)? else {
            return Ok(true);
        };
        let header = Arc::new(header);
        let mut text = rest.to_owned();
        loop {
            let lines = header.lines(&text);
            let contents = Contents::Table { header: header.clone(), line, text };
            if !(self.take)(Block { contents, is_damaged })? {
                return Ok(false);
            }
            line += lines;
            let Some(chunk) = chunks.next()? else { return Ok(true) };
            (text, is_damaged) = self.decode(chunk)?;
        }
    }
}

/// Gives the blocks of files with the number of their file, from a file on and in it behind so many blocks, as long as more are wanted.
pub(crate) fn each(
    files: &[Input],
    reading: Reading,
    first: usize,
    mut skipped: usize,
    take: &mut dyn FnMut(usize, Block) -> Result<bool, DataError>,
) -> Result<(), DataError> {
    for (number, file) in files.iter().enumerate().skip(first) {
        let mut goes_on = true;
        file.blocks(reading, &mut |block| {
            if skipped > 0 {
                skipped -= 1;
                return Ok(true);
            }
            goes_on = take(number, block)?;
            Ok(goes_on)
        })?;
        if !goes_on {
            break;
        }
    }
    Ok(())
}

/// The same, some blocks at a time for all cores, which a thread of its own reads ahead. The first error in the order of the data is the
/// one that is told.
pub(crate) fn batches(
    files: &[Input],
    reading: Reading,
    first: usize,
    skipped: usize,
    take: &mut dyn FnMut(Vec<(usize, Block)>) -> Result<(), DataError>,
) -> Result<(), DataError> {
    let size = 2 * rayon::current_num_threads();
    std::thread::scope(|scope| {
        let (sender, blocks) = mpsc::sync_channel(size);
        scope.spawn(move || {
            let mut give = |file, block| Ok(sender.send(Ok((file, block))).is_ok());
            if let Err(error) = each(files, reading, first, skipped, &mut give) {
                let _ = sender.send(Err(error)); // who takes no more has an error of its own
            }
        });
        loop {
            let (mut batch, mut failed) = (Vec::with_capacity(size), None);
            for block in blocks.iter().take(size) {
                match block {
                    Ok(block) => batch.push(block),
                    Err(error) => failed = Some(error),
                }
            }
            let is_last = batch.len() < size;
            take(batch)?;
            match failed {
                Some(error) => return Err(error),
                None if is_last => return Ok(()),
                None => {}
            }
        }
    })
}
