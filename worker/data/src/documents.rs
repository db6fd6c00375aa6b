//! From the bytes of files to documents: rows of tables, text, and pieces of text where there would be too few documents.

use crate::blocks::{self, Block, Contents, Input, Reading};
use crate::clean::Pipeline;
use crate::table::{Dialect, Wrong};
use crate::{Counts, DataError, json};
use fleet_common::job::{BadRows, Data};
use serde_json::Value;
use std::path::PathBuf;

/// With fewer documents than this, texts are cut at blank lines, so that there is something to hold out.
const DOCUMENTS_MIN: usize = 20;

/// The least bytes of a cut piece where there is plenty of text; pieces are at most twice as long.
const PIECE: usize = 2 << 10;

/// Below this a piece says nothing.
const PIECE_MIN: usize = 256;

/// The same of a text that is cut because it is large.
pub(crate) const PIECE_LARGE: usize = 1 << 20;

/// The documents of a job's data.
pub(crate) struct Documents<'a> {
    data: &'a Data,
    files: &'a [Input],
    /// Where there are too few documents: the least bytes of the pieces that they are cut into.
    piece: Option<usize>,
    pipeline: Pipeline,
}

/// Documents of one block, cleaned, in their order.
#[derive(Debug, Default)]
pub(crate) struct Found {
    pub texts: Vec<String>,
    pub counts: Counts,
}

impl<'a> Documents<'a> {
    /// Looks into the files until it is clear that there are enough.
    pub fn of(files: &'a [Input], data: &'a Data) -> Result<Documents<'a>, DataError> {
        let mut documents = Documents { data, files, piece: None, pipeline: Pipeline::of(&data.clean) };
        let (mut count, mut bytes) = (0, 0);
        blocks::each(files, documents.reading(), 0, 0, &mut |file, block| {
            let (texts, _) = documents.raw(file, block)?;
            let filled = texts.iter().filter(|text| !text.trim().is_empty());
            let (more, said) = filled.fold((0, 0), |(count, bytes), text| (count + 1, bytes + text.len()));
            count += more;
            bytes += said;
            Ok(count < DOCUMENTS_MIN)
        })?;
        if count < DOCUMENTS_MIN {
            documents.piece = Some((bytes / DOCUMENTS_MIN).clamp(PIECE_MIN, PIECE));
        }
        Ok(documents)
    }

    pub fn files(&self) -> &'a [Input] {
        self.files
    }

    pub fn reading(&self) -> Reading<'a> {
        let damaged_too = self.data.bad_rows == BadRows::Skip;
        Reading { field: Some(&self.data.text_field), piece: self.piece, damaged_too }
    }

    /// The documents of a block of the file with this number.
    pub fn found(&self, file: usize, block: Block) -> Result<Found, DataError> {
        let (mut texts, mut counts) = self.raw(file, block)?;
        let before = texts.len();
        texts.retain(|text| !text.trim().is_empty());
        counts.empty += (before - texts.len()) as u64;
        if let Some(piece) = self.piece {
            texts = texts.iter().flat_map(|text| cut(text, piece)).map(str::to_owned).collect();
        }
        let found = texts.len();
        counts.pieces = found as u64;
        let texts: Vec<String> = texts.into_iter().filter_map(|text| self.pipeline.process(text)).collect();
        counts.cleaned_away = (found - texts.len()) as u64;
        Ok(Found { texts, counts })
    }

    /// Those of a block as they stand.
    fn raw(&self, file: usize, block: Block) -> Result<(Vec<String>, Counts), DataError> {
        let path = &self.files[file].path;
        let field = self.data.text_field.as_str();
        let mut rows = Rows {
            path,
            skips: self.data.bad_rows == BadRows::Skip,
            texts: Vec::new(),
            counts: Counts::default(),
        };
        let fatal = |(line, what): Wrong| DataError::Row { path: path.clone(), line, what };
        match block.contents {
            Contents::Texts { mut texts, begins } => {
                if texts.is_empty() {
                    texts.push(String::new());
                }
                let mut counts = Counts { whole: u64::from(begins), ..Counts::default() };
                if block.is_damaged {
                    counts.not_utf8 = texts.len() as u64;
                    texts.clear();
                }
                return Ok((texts, counts));
            }
            Contents::Lines { line, text } => {
                for (line, object) in json::lines(line, &text) {
                    rows.take(json::text(object, field).map_err(|what| (line, what)))?;
                }
            }
            Contents::Document { row, line, text } => {
                rows.texts = json::texts(row, line, &text, field).map_err(fatal)?;
            }
            Contents::Table { header, line, text } => {
                let mut texts = header.texts(line, &text, field).map_err(fatal)?;
                texts.try_for_each(|text| rows.take(text))?;
                if header.dialect() == Dialect::Tsv {
                    rows.counts.quoted = rows.texts.iter().filter(|text| is_quoted(text)).count() as u64;
                }
            }
            Contents::Records { row, rows: records } => {
                for (number, mut record) in (row..).zip(records) {
                    match record.shift_remove(field) {
                        Some(Value::String(text)) => rows.take(Ok(text))?,
                        _ => {
                            let what = format!(
                                "no text in the field `{field}`; leave such rows out, or set data.text_field"
                            );
                            let (path, place) = (path.clone(), format!("row {number}"));
                            rows.bad(place.clone(), what.clone(), DataError::BadRow { path, place, what })?;
                        }
                    }
                }
            }
        }
        let Rows { mut texts, mut counts, .. } = rows;
        counts.rows = texts.len() as u64 + counts.bad;
        if block.is_damaged {
            let before = texts.len();
            texts.retain(|text| !text.contains(char::REPLACEMENT_CHARACTER));
            counts.not_utf8 = (before - texts.len()) as u64;
        }
        Ok((texts, counts))
    }
}

/// The rows of a block.
struct Rows<'a> {
    path: &'a PathBuf,
    /// Bad ones are left out.
    skips: bool,
    texts: Vec<String>,
    counts: Counts,
}

impl Rows<'_> {
    fn take(&mut self, row: Result<String, Wrong>) -> Result<(), DataError> {
        match row {
            Ok(text) => {
                self.texts.push(text);
                Ok(())
            }
            Err((line, what)) => {
                let path = self.path.clone();
                self.bad(format!("line {line}"), what.clone(), DataError::Row { path, line, what })
            }
        }
    }

    /// Counts a row that is wrong, or gives the error that it is.
    fn bad(&mut self, place: String, what: String, error: DataError) -> Result<(), DataError> {
        if !self.skips {
            return Err(error);
        }
        self.counts.bad += 1;
        self.counts.first_bad.get_or_insert_with(|| format!("{}, {place}: {what}", self.path.display()));
        Ok(())
    }
}

/// Refuses data without text.
pub(crate) fn check(documents: u64, counts: &Counts, files: &[Input]) -> Result<(), DataError> {
    if documents > 0 {
        return Ok(());
    }
    let first = files.first().map(|file| file.path.display().to_string()).unwrap_or_default();
    Err(DataError::Empty(match counts.cleaned_away {
        0 => format!("the data hold no text ({} files, the first {first}); check data.path", files.len()),
        n => format!("cleaning left nothing of {n} documents; lower data.clean.min_chars"),
    }))
}

/// Whether a text is written as CSV writes one with quotes in it.
fn is_quoted(text: &str) -> bool {
    let inside = text.strip_prefix('"').and_then(|text| text.strip_suffix('"'));
    inside.is_some_and(|inside| inside.contains("\"\"") && !inside.replace("\"\"", "").contains('"'))
}

/// What is wrong with a row or a header that has these fields.
pub(crate) fn no_field<'a>(field: &str, present: impl Iterator<Item = &'a str>) -> String {
    let present: Vec<&str> = present.collect();
    let has = |name: &str| present.contains(&name);
    if let Some(chat) = present.iter().find(|name| is_chat(name)) {
        return format!("no field `{field}`, but `{chat}`: {}", chat_cure(field));
    }
    if let Some((a, b)) = PAIRS.into_iter().find(|(a, b)| has(a) && has(b)) {
        return format!(
            "no field `{field}`, but `{a}` and `{b}`: rows of instructions are learnt with `task_name` = \"sft\"; plain text is one text per row in the field `{field}`"
        );
    }
    let short = |name: &str| name.chars().take(40).flat_map(char::escape_debug).collect::<String>();
    let names: Vec<String> = present.into_iter().take(12).map(short).collect();
    match names.as_slice() {
        [] => format!("no field `{field}`, and no other"),
        names => format!("no field `{field}`; set data.text_field to one of: {}", names.join(", ")),
    }
}

/// Whether a field of this name holds the turns of a chat.
pub(crate) fn is_chat(field: &str) -> bool {
    ["messages", "conversations", "conversation"].contains(&field)
}

/// What people call a question and what is to be learnt of it.
const PAIRS: [(&str, &str); 8] = [
    ("prompt", "completion"),
    ("prompt", "response"),
    ("prompt", "chosen"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
    ("input", "output"),
    ("chosen", "rejected"),
];

/// What to do with rows of chats, whose text shall stand in `field`.
pub(crate) fn chat_cure(field: &str) -> String {
    format!(
        "rows of chats are learnt with `task_name` = \"sft\"; plain text is one text per row in the field `{field}`"
    )
}

/// Pieces of `least..=2 * least` bytes, the last maybe shorter: to the first blank line from `least` on, else to the last end of a
/// line, else in the middle. White space at the cuts is dropped.
pub(crate) fn cut(text: &str, least: usize) -> Vec<&str> {
    let (mut pieces, rest) = cut_front(text, least);
    pieces.push(rest.trim_end());
    pieces.retain(|piece| !piece.is_empty());
    pieces
}

/// The same as far as it does not hang on what follows, and the rest.
pub(crate) fn cut_front(text: &str, least: usize) -> (Vec<&str>, &str) {
    let mut pieces = Vec::new();
    let mut rest = text;
    while rest.len() > 2 * least {
        let (from, to) = (rest.ceil_char_boundary(least), rest.floor_char_boundary(2 * least));
        let span = &rest[from..to];
        let end = blank_line(span).or_else(|| span.rfind('\n')).map_or(to, |at| from + at);
        pieces.push(rest[..end].trim_end());
        rest = rest[end..].trim_start_matches(['\n', '\r']);
    }
    pieces.retain(|piece| !piece.is_empty());
    (pieces, rest)
}

/// Where the first line ends that is followed by a line of nothing but white space.
fn blank_line(span: &str) -> Option<usize> {
    span.match_indices('\n').map(|(at, _)| at).find(|&at| {
        let next = &span[at + 1..];
        next.find('\n').is_some_and(|end| next[..end].trim().is_empty())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::tests::data;
    use proptest::prelude::*;
    use sha2::{Digest, Sha256};

    fn read(files: &[(&str, &[u8])], more: fn(&mut Data)) -> Result<(Vec<String>, String), DataError> {
        let mut data = data(vec![], &[], &[]);
        more(&mut data);
        let dir = tempfile::tempdir().unwrap();
        let input = |(name, bytes): &(&str, &[u8])| {
            let path = dir.path().join(name);
            std::fs::write(&path, bytes).unwrap();
            Input { path, sha256: Sha256::digest(bytes).into(), weight: 1.0 }
        };
        let inputs: Vec<Input> = files.iter().map(input).collect();
        let documents = Documents::of(&inputs, &data)?;
        let mut counts = Counts { files: inputs.len() as u64, ..Counts::default() };
        let mut all = Vec::new();
        blocks::batches(&inputs, documents.reading(), 0, 0, &mut |batch| {
            batch.into_iter().try_for_each(|(file, block)| {
                let found = documents.found(file, block)?;
                counts.add(found.counts);
                all.extend(found.texts);
                Ok(())
            })
        })?;
        counts.settle();
        check(all.len() as u64, &counts, &inputs)?;
        Ok((all, counts.told()))
    }

    fn documents(name: &str, bytes: &[u8]) -> Result<Vec<String>, DataError> {
        Ok(read(&[(name, bytes)], |_| ())?.0)
    }

    #[test]
    fn a_row_is_a_document_and_the_rows_are_counted() {
        let rows = b"{\"text\":\"one\",\"id\":1}\n\n{\"text\":\"two\\nlines\"}\n{\"text\":\" \"}";
        let zipped = crate::unpack::tests::gzip(b"\xef\xbb\xbfid,text\n1,\"a, \"\"b\"\"\nc\"\n2,plain\n");
        let (texts, told) = read(&[("a.jsonl", rows)], |_| ()).unwrap();
        assert_eq!((texts.len(), told.as_str()), (2, "read 3 rows of 1 file, 1 without text"));
        let all: [(&str, &[u8]); 4] =
            [("a.jsonl", rows), ("b.csv.gz", &zipped), ("c.tsv", b"text\n\"x\n"), ("d.md", b"y z")];
        let (texts, told) = read(&all, |data| data.clean.min_chars = 3).unwrap();
        assert_eq!(texts, ["one", "two\nlines", "a, \"b\"\nc", "plain", "y z"]);
        assert_eq!(
            told,
            "read 7 documents of 4 files: 6 rows and 1 whole, 1 without text, 1 dropped by data.clean"
        );
        assert_eq!(read(&[("a.txt", b"a")], |_| ()).unwrap().1, "read 1 document of 1 file");
        let long = "A line of text.\n\n".repeat(60);
        let (texts, told) = read(&[("a.txt", long.as_bytes())], |_| ()).unwrap();
        assert_eq!(told, format!("read 1 document of 1 file, {} pieces after cutting", texts.len()));
    }

    #[test]
    fn rows_of_chats_say_what_to_do() {
        let said = |row: &[u8], more: fn(&mut Data)| read(&[("a.jsonl", row)], more).unwrap_err().to_string();
        let chat = b"{\"messages\": [{\"role\": \"user\", \"content\": \"hi\"}], \"id\": 1}";
        for told in [said(chat, |_| ()), said(chat, |data| data.text_field = "messages".into())] {
            assert!(
                told.contains("learnt with `task_name` = \"sft\"") && told.contains("field `text`"),
                "{told}"
            );
        }
        let pair = said(b"{\"prompt\": \"a\", \"completion\": \"b\"}", |_| ());
        assert!(
            pair.contains("`prompt` and `completion`") && pair.contains("`task_name` = \"sft\""),
            "{pair}"
        );
        assert!(said(b"{\"prompt\": \"a\"}", |_| ()).contains("set data.text_field to one of: prompt"));
    }

    #[test]
    fn quotes_of_csv_in_a_tsv_are_told() {
        assert!(
            is_quoted("\"he said \"\"hi\"\"\"") && !is_quoted("\"hi\"") && !is_quoted("\"a\" \"\" \"b\"")
        );
        let counts = Counts { rows: 2, quoted: 1, ..Counts::default() };
        assert!(counts.notes()[1].line.starts_with("1 row of TSV with text in quotes"));
    }

    #[test]
    fn json_lines_are_rows_by_their_name_and_text_in_a_text_file() {
        let rows = b"{\"text\":\"one\"}\n{\"text\":\"two\"}";
        for name in ["a.json", "a.jsonl", "a.NDJSON", "a.json.gz"] {
            assert_eq!(documents(name, rows).unwrap(), ["one", "two"], "{name}");
        }
        assert_eq!(documents("a.txt", rows).unwrap().concat().as_bytes(), rows);
    }

    #[test]
    fn the_first_file_that_is_wrong_is_the_one_told() {
        for _ in 0..20 {
            let files: [(&str, &[u8]); 3] = [("a.txt", b"x"), ("b.txt", b"ARROW1"), ("c.txt", b"\xff")];
            assert!(read(&files, |_| ()).unwrap_err().to_string().contains("b.txt is an Arrow file"));
        }
        assert!(documents("a.txt", b" \n ").unwrap_err().to_string().contains("hold no text"));
    }

    #[test]
    fn one_long_text_becomes_pieces_that_end_at_blank_lines() {
        let text: String =
            (0..400).map(|i| format!("Speech number {i} goes on for a while.\nSecond line.\n\n")).collect();
        let pieces = documents("a.txt", text.as_bytes()).unwrap();
        assert!(pieces.len() >= 10, "{} pieces", pieces.len());
        for piece in &pieces[..pieces.len() - 1] {
            assert!((1000..4096).contains(&piece.len()), "{} bytes", piece.len());
            assert!(piece.starts_with("Speech") && piece.ends_with("Second line."));
        }
    }

    #[test]
    fn large_files_are_read_as_if_they_were_whole() {
        let text: String = (0..90_000)
            .map(|i| format!("Line {i} of a caf\u{e9}.{}", ["\n", "\n\n", "\r\n"][i % 3]))
            .collect();
        assert!(text.len() > 2 * crate::chunks::CHUNK);
        assert_eq!(documents("a.txt", text.as_bytes()).unwrap(), cut(&text, PIECE));

        let line = |i: usize| format!("row {i} with \"quotes\",\nand lines");
        let rows: String =
            (0..60_000).map(|i| format!("{}\n", serde_json::json!({"text": line(i), "id": i}))).collect();
        assert!(rows.len() > 2 * crate::chunks::CHUNK);
        let wanted: Vec<String> = (0..60_000).map(line).collect();
        assert_eq!(documents("a.jsonl", rows.as_bytes()).unwrap(), wanted);
        let error = documents("a.jsonl", (rows + "{}").as_bytes()).unwrap_err().to_string();
        assert!(error.contains("a.jsonl, line 60001: no field `text`"), "{error}");

        let quoted = |i: usize| format!("\"{}\"", line(i).replace('"', "\"\""));
        let table: String = (0..60_000).map(|i| format!("{i},{}\r\n", quoted(i))).collect();
        let table = format!("id,text\r\n{table}");
        assert!(table.len() > 2 * crate::chunks::CHUNK);
        assert_eq!(documents("a.csv", table.as_bytes()).unwrap(), wanted);
        let error = documents("a.csv", (table + "1\r\n").as_bytes()).unwrap_err().to_string();
        assert!(error.contains("a.csv, line 120002: 1 fields"), "{error}");
    }

    proptest! {
        #[test]
        fn cutting_loses_nothing_but_white_space(text in "[a-zä€ \\n\\r]{0,3000}", least in 8usize..300) {
            let kept: String = cut(&text, least).concat();
            let visible = |s: &str| s.chars().filter(|c| !c.is_whitespace()).collect::<String>();
            prop_assert_eq!(visible(&kept), visible(&text));
            prop_assert!(cut(&text, least).iter().all(|piece| piece.len() <= 2 * least));
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300), kind in 0usize..4) {
            let _ = documents(["a.txt", "a.jsonl", "a.csv", "a.tsv"][kind], &bytes);
        }
    }
}
