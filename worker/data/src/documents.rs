//! From the bytes of files to documents: rows of tables, text, and pieces of text where there would be too few documents.

use crate::clean::clean;
use crate::formats::Kind;
use crate::table::Dialect;
use crate::{DataError, Note, json, table, text};
use fleet_common::job::Data;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// With fewer documents than this, texts are cut at blank lines, so that there is something to hold out.
const DOCUMENTS_MIN: usize = 20;

/// The least bytes of a cut piece where there is plenty of text; pieces are at most twice as long.
const PIECE: usize = 2 << 10;

/// Below this a piece says nothing.
const PIECE_MIN: usize = 256;

/// What was read, and what became of it on the way to documents.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Counts {
    pub files: u64,
    /// Of tables and JSON.
    pub rows: u64,
    /// Files that are a document each.
    pub whole: u64,
    /// Rows and files without text.
    pub empty: u64,
    /// Pieces that the rest was cut into, where there were too few documents; else 0.
    pub pieces: u64,
    /// Documents or pieces that cleaning dropped.
    pub cleaned_away: u64,
    /// Rows of TSV whose text stands in quotes as in CSV, which a TSV does not have.
    pub quoted: u64,
}

impl Counts {
    /// What the user should know.
    pub(crate) fn notes(&self) -> Vec<Note> {
        let mut notes = vec![Note::info(self.told())];
        if self.quoted > 0 {
            notes.push(Note::warning(format!(
                "{} of TSV with text in quotes, which stay in the text: a TSV has no quoting; where quotes are not meant, write CSV \
                 or JSON Lines",
                counted(self.quoted, "row")
            )));
        }
        notes
    }

    fn told(&self) -> String {
        let (files, all) = (counted(self.files, "file"), counted(self.rows + self.whole, "document"));
        let mut line = match (self.rows, self.whole) {
            (_, 0) => format!("read {} of {files}", counted(self.rows, "row")),
            (0, _) => format!("read {all} of {files}"),
            (rows, whole) => {
                format!("read {all} of {files}: {} and {whole} whole", counted(rows, "row"))
            }
        };
        for (count, what) in [
            (self.empty, "without text"),
            (self.pieces, "pieces after cutting"),
            (self.cleaned_away, "dropped by data.clean"),
        ] {
            if count > 0 {
                line += &format!(", {count} {what}");
            }
        }
        line
    }
}

fn counted(count: u64, what: &str) -> String {
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
}

/// The documents of `files`, whose `contents` are given in the same order, cut and cleaned. Never empty.
pub(crate) fn parse(
    files: &[PathBuf],
    contents: Vec<Vec<u8>>,
    data: &Data,
) -> Result<(Vec<String>, Counts), DataError> {
    let parsed: Vec<Result<Parsed, DataError>> = files
        .par_iter()
        .zip(contents)
        .map(|(file, bytes)| parse_file(file, bytes, &data.text_field))
        .collect();
    let mut counts = Counts { files: files.len() as u64, ..Counts::default() };
    let mut documents = Vec::new();
    for parsed in parsed {
        let texts = match parsed? {
            Parsed::Whole(text) => {
                counts.whole += 1;
                vec![text]
            }
            Parsed::Rows(texts) => {
                counts.rows += texts.len() as u64;
                texts
            }
            Parsed::Tsv(texts) => {
                counts.rows += texts.len() as u64;
                counts.quoted += texts.iter().filter(|text| is_quoted(text)).count() as u64;
                texts
            }
        };
        documents.extend(texts.into_iter().filter(|text| !text.trim().is_empty()));
    }
    counts.empty = counts.rows + counts.whole - documents.len() as u64;
    if documents.len() < DOCUMENTS_MIN {
        let uncut = documents.len();
        documents = cut_all(&documents);
        counts.pieces = if documents.len() == uncut { 0 } else { documents.len() as u64 };
    }
    let found = documents.len() as u64;
    let documents: Vec<String> =
        documents.into_par_iter().filter_map(|text| clean(text, &data.clean)).collect();
    counts.cleaned_away = found - documents.len() as u64;
    if documents.is_empty() {
        let first = files.first().map(|f| f.display().to_string()).unwrap_or_default();
        let what = match found {
            0 => format!("the data hold no text ({} files, the first {first}); check data.path", files.len()),
            n => format!("cleaning left nothing of {n} documents; lower data.clean.min_chars"),
        };
        return Err(DataError::Empty(what));
    }
    Ok((documents, counts))
}

enum Parsed {
    Whole(String),
    Rows(Vec<String>),
    Tsv(Vec<String>),
}

/// Whether a text is written as CSV writes one with quotes in it.
fn is_quoted(text: &str) -> bool {
    let inside = text.strip_prefix('"').and_then(|text| text.strip_suffix('"'));
    inside.is_some_and(|inside| inside.contains("\"\"") && !inside.replace("\"\"", "").contains('"'))
}

fn parse_file(path: &Path, bytes: Vec<u8>, field: &str) -> Result<Parsed, DataError> {
    let (kind, text) = text::read(path, bytes)?;
    Ok(match kind {
        Kind::Text | Kind::Gzip => Parsed::Whole(text),
        Kind::Json => Parsed::Rows(json::texts(path, &text, field)?),
        Kind::Csv => Parsed::Rows(table::texts(path, &text, field, Dialect::Csv)?),
        Kind::Tsv => Parsed::Tsv(table::texts(path, &text, field, Dialect::Tsv)?),
    })
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

fn cut_all(documents: &[String]) -> Vec<String> {
    let bytes: usize = documents.iter().map(String::len).sum();
    let piece = (bytes / DOCUMENTS_MIN).clamp(PIECE_MIN, PIECE);
    documents.iter().flat_map(|text| cut(text, piece)).map(str::to_owned).collect()
}

/// Pieces of `least..=2 * least` bytes, the last maybe shorter: to the first blank line from `least` on, else to the last end of a
/// line, else in the middle. White space at the cuts is dropped.
fn cut(text: &str, least: usize) -> Vec<&str> {
    let mut pieces = Vec::new();
    let mut rest = text;
    while rest.len() > 2 * least {
        let (from, to) = (rest.ceil_char_boundary(least), rest.floor_char_boundary(2 * least));
        let span = &rest[from..to];
        let end = blank_line(span).or_else(|| span.rfind('\n')).map_or(to, |at| from + at);
        pieces.push(rest[..end].trim_end());
        rest = rest[end..].trim_start_matches(['\n', '\r']);
    }
    pieces.push(rest.trim_end());
    pieces.retain(|piece| !piece.is_empty());
    pieces
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

    fn read(files: &[(&str, &[u8])], more: fn(&mut Data)) -> Result<(Vec<String>, String), DataError> {
        let mut data = data(vec![], &[], &[]);
        more(&mut data);
        let (names, contents) =
            files.iter().map(|(name, bytes)| (PathBuf::from(name), bytes.to_vec())).unzip();
        let names: Vec<PathBuf> = names;
        parse(&names, contents, &data).map(|(documents, counts)| (documents, counts.told()))
    }

    fn documents(name: &str, bytes: &[u8]) -> Result<Vec<String>, DataError> {
        Ok(read(&[(name, bytes)], |_| ())?.0)
    }

    #[test]
    fn a_row_is_a_document_and_the_rows_are_counted() {
        let rows = b"{\"text\":\"one\",\"id\":1}\n\n{\"text\":\"two\\nlines\"}\n{\"text\":\" \"}";
        let zipped = crate::text::tests::gzip(b"\xef\xbb\xbfid,text\n1,\"a, \"\"b\"\"\nc\"\n2,plain\n");
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
            let files: [(&str, &[u8]); 3] = [("a.txt", b"x"), ("b.txt", b"PAR1"), ("c.txt", b"\xff")];
            assert!(read(&files, |_| ()).unwrap_err().to_string().contains("b.txt is a Parquet file"));
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
