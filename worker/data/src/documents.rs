//! From the bytes of files to documents: rows of tables, text, and pieces of text where there would be too few documents.

use crate::DataError;
use crate::clean::clean;
use crate::files::{Kind, SourceFile};
use fleet_common::job::Data;
use rayon::prelude::*;
use std::path::Path;

/// With fewer documents than this, texts are cut at blank lines, so that there is something to hold out.
const DOCUMENTS_MIN: usize = 20;

/// The least bytes of a cut piece where there is plenty of text; pieces are at most twice as long.
const PIECE: usize = 2 << 10;

/// Below this a piece says nothing.
const PIECE_MIN: usize = 256;

/// The documents of `files`, whose `contents` are given in the same order, cut and cleaned. Never empty.
pub(crate) fn parse(
    files: &[SourceFile],
    contents: Vec<Vec<u8>>,
    data: &Data,
) -> Result<Vec<String>, DataError> {
    let parsed: Result<Vec<Vec<String>>, DataError> = files
        .par_iter()
        .zip(contents)
        .map(|(file, bytes)| parse_file(file, bytes, &data.text_field))
        .collect();
    let mut documents: Vec<String> =
        parsed?.into_iter().flatten().filter(|text| !text.trim().is_empty()).collect();
    if documents.len() < DOCUMENTS_MIN {
        documents = cut_all(&documents);
    }
    let found = documents.len();
    let documents: Vec<String> =
        documents.into_par_iter().filter_map(|text| clean(text, &data.clean)).collect();
    if documents.is_empty() {
        let first = files.first().map(|f| f.path.display().to_string()).unwrap_or_default();
        let what = match found {
            0 => format!("the data hold no text ({} files, the first {first}); check data.path", files.len()),
            n => format!("cleaning left nothing of {n} documents; lower data.clean.min_chars"),
        };
        return Err(DataError::Empty(what));
    }
    Ok(documents)
}

fn parse_file(file: &SourceFile, bytes: Vec<u8>, field: &str) -> Result<Vec<String>, DataError> {
    let mut text = String::from_utf8(bytes)
        .map_err(|e| DataError::NotUtf8 { path: file.path.clone(), offset: e.utf8_error().valid_up_to() })?;
    if text.starts_with('\u{feff}') {
        text.drain(..'\u{feff}'.len_utf8()); // byte order mark
    }
    match file.kind {
        Kind::Text => Ok(vec![text]),
        Kind::Jsonl => jsonl(&file.path, &text, field),
        Kind::Csv(separator) => csv(&file.path, &text, field, separator),
    }
}

fn jsonl(path: &Path, text: &str, field: &str) -> Result<Vec<String>, DataError> {
    let mut documents = Vec::new();
    for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let bad = |what: String| DataError::Row { path: path.to_owned(), line: number as u64 + 1, what };
        let row: serde_json::Value = serde_json::from_str(line).map_err(|e| bad(format!("not JSON: {e}")))?;
        let row = row.as_object().ok_or_else(|| bad("not a JSON object".into()))?;
        match row.get(field) {
            Some(serde_json::Value::String(text)) => documents.push(text.clone()),
            Some(other) => return Err(bad(format!("field `{field}` is not text but {other:.40}"))),
            None => return Err(bad(no_field(field, row.keys().map(String::as_str)))),
        }
    }
    Ok(documents)
}

fn csv(path: &Path, text: &str, field: &str, separator: u8) -> Result<Vec<String>, DataError> {
    let bad = |line: u64, what: String| DataError::Row { path: path.to_owned(), line, what };
    let of_csv = |e: csv::Error| bad(e.position().map_or(1, csv::Position::line), e.to_string());
    if text.trim().is_empty() {
        return Ok(Vec::new());
    }
    let mut reader = csv::ReaderBuilder::new().delimiter(separator).from_reader(text.as_bytes());
    let headers = reader.headers().map_err(of_csv)?.clone();
    let column = headers
        .iter()
        .position(|name| name.trim() == field)
        .ok_or_else(|| bad(1, no_field(field, headers.iter())))?;
    let mut documents = Vec::new();
    for row in reader.records() {
        documents.push(row.map_err(of_csv)?.get(column).unwrap_or_default().to_owned());
    }
    Ok(documents)
}

fn no_field<'a>(field: &str, present: impl Iterator<Item = &'a str>) -> String {
    let present: Vec<&str> = present.take(12).collect();
    format!("no field `{field}`; set data.text_field to one of: {}", present.join(", "))
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

    fn documents(name: &str, bytes: &[u8]) -> Result<Vec<String>, DataError> {
        let file = SourceFile {
            path: name.into(),
            kind: match name.rsplit('.').next() {
                Some("jsonl") => Kind::Jsonl,
                Some("csv") => Kind::Csv(b','),
                _ => Kind::Text,
            },
        };
        parse(&[file], vec![bytes.to_vec()], &data(vec![], &[], &[]))
    }

    #[test]
    fn a_row_is_a_document() {
        let rows = b"{\"text\":\"one\",\"id\":1}\n\n{\"text\":\"two\\nlines\"}\n";
        assert_eq!(documents("a.jsonl", rows).unwrap(), ["one", "two\nlines"]);
        let rows = b"\xef\xbb\xbfid,text\n1,\"a, \"\"quoted\"\"\nfield\"\n2,plain\n";
        assert_eq!(documents("a.csv", rows).unwrap(), ["a, \"quoted\"\nfield", "plain"]);
    }

    #[test]
    fn bad_rows_and_bytes_are_named() {
        let message = |name, bytes: &[u8]| documents(name, bytes).unwrap_err().to_string();
        assert!(
            message("a.jsonl", b"{\"text\":\"x\"}\n{\"body\":1}")
                .contains("a.jsonl, line 2: no field `text`")
        );
        assert!(message("a.jsonl", b"{\"text\":3}").contains("is not text but 3"));
        assert!(message("a.jsonl", b"{").contains("line 1: not JSON"));
        assert!(message("a.csv", b"id,body\n1,x\n").contains("one of: id, body"));
        assert!(message("a.csv", b"id,text\n1,x\n2\n").contains("line 3"));
        assert!(message("a.txt", b"good \xff bad").contains("a.txt is not UTF-8 text: bad byte at offset 5"));
        assert!(message("a.txt", b" \n ").contains("hold no text"));
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
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300), kind in 0usize..3) {
            let _ = documents(["a.txt", "a.jsonl", "a.csv"][kind], &bytes);
        }
    }
}
