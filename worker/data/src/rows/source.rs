//! The rows of a file, one after the other, each with its place.

use super::Row;
use crate::blocks::{Block, Contents};
use crate::table::Wrong;
use crate::{DataError, json};
use serde::Deserialize;
use serde::de::value::MapAccessDeserializer;
use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::Value;
use std::fmt;
use std::path::Path;

/// Where a row stands in its file, from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    Line(u64),
    Row(u64),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::Line(line) => write!(f, "line {line}"),
            Place::Row(row) => write!(f, "row {row}"),
        }
    }
}

/// Takes rows, or what is wrong with one; an error ends the reading.
pub(super) type Take<'a> = &'a mut dyn FnMut(Place, Result<Row, String>) -> Result<(), DataError>;

/// Gives the rows of a block. Behind a row that spoils the rest of its file nothing more is taken, and that is an error.
pub(super) fn each(path: &Path, block: Block, take: Take) -> Result<(), DataError> {
    let bad = |(line, what): Wrong| DataError::Row { path: path.to_owned(), line, what };
    match block.contents {
        Contents::Lines { line, text } => json::lines(line, &text).try_for_each(|(number, line)| {
            let row = match serde_json::from_str(line) {
                Ok(Value::Object(row)) => Ok(row),
                Ok(_) => Err(NO_OBJECT.to_owned()),
                Err(e) => Err(json::what_is_wrong(line, &e)),
            };
            take(Place::Line(number), row)
        }),
        Contents::Document { row, line, text } => document(path, (row, line), &text, take),
        Contents::Table { header, line, text } => {
            header.objects(line, &text).map_err(bad)?.try_for_each(|row| match row {
                Ok((line, row)) => take(Place::Line(line), Ok(row)),
                Err((line, what)) => take(Place::Line(line), Err(what)),
            })
        }
        Contents::Records { row, rows } => {
            (row..).zip(rows).try_for_each(|(number, row)| take(Place::Row(number), Ok(row)))
        }
        Contents::Texts { .. } => Err(DataError::Rows(format!(
            "{} is a text, and this job learns rows of instructions, which are JSON, CSV, TSV or Parquet; leave it out with data.exclude, \
             or write `task_name` = \"lm\"",
            path.display()
        ))),
    }
}

/// `text` begins with this row and line of its file.
fn document(path: &Path, (row, line): (u64, u64), text: &str, take: Take) -> Result<(), DataError> {
    if text.trim().is_empty() {
        return Ok(());
    }
    let mut stopped = None;
    let mut parser = serde_json::Deserializer::from_str(text);
    let read = Document { take, before: row - 1, stopped: &mut stopped }
        .deserialize(&mut parser)
        .and_then(|()| parser.end());
    match (stopped, read) {
        (Some(error), _) => Err(error),
        (None, Ok(())) => Ok(()),
        (None, Err(e)) => Err(DataError::Row {
            path: path.to_owned(),
            line: line - 1 + e.line() as u64,
            what: json::what_is_wrong(text, &e),
        }),
    }
}

const NO_OBJECT: &str = "a row is an object such as {\"prompt\": \"...\", \"completion\": \"...\"}";

/// A file that is one value: an array of rows, an object of columns, or one row.
struct Document<'a> {
    take: Take<'a>,
    /// Rows of the file that stand before it.
    before: u64,
    /// Why the taker wants no more.
    stopped: &'a mut Option<DataError>,
}

impl Document<'_> {
    fn give<E: Error>(&mut self, number: u64, row: Result<Row, String>) -> Result<(), E> {
        (self.take)(Place::Row(self.before + number), row).map_err(|error| {
            *self.stopped = Some(error);
            E::custom("stopped")
        })
    }
}

impl<'de> DeserializeSeed<'de> for Document<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Document<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("rows, which are objects")
    }

    fn visit_seq<A: SeqAccess<'de>>(mut self, mut rows: A) -> Result<(), A::Error> {
        let mut number = 0;
        while let Some(row) = rows.next_element::<Value>()? {
            number += 1;
            let row = match row {
                Value::Object(row) => Ok(row),
                _ => Err(NO_OBJECT.to_owned()),
            };
            self.give(number, row)?;
        }
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(mut self, map: A) -> Result<(), A::Error> {
        let object = Row::deserialize(MapAccessDeserializer::new(map))?;
        match columns(object).map_err(A::Error::custom)? {
            Table::Row(row) => self.give(1, Ok(row)),
            Table::Columns(names, mut columns) => {
                let rows = columns.first().map_or(0, |column| column.len());
                for number in 1..=rows as u64 {
                    let values = columns.iter_mut().filter_map(Iterator::next);
                    let row = names.iter().cloned().zip(values).collect();
                    self.give(number, Ok(row))?;
                }
                Ok(())
            }
        }
    }
}

enum Table {
    Row(Row),
    Columns(Vec<String>, Vec<std::vec::IntoIter<Value>>),
}

/// An object of lists is one of columns, unless one of these is a conversation; so is one of objects by row number, as pandas writes them.
fn columns(object: Row) -> Result<Table, String> {
    let is_turn = |value: &Value| {
        let has = |name| value.get(name).is_some();
        (has("role") || has("from")) && (has("content") || has("value") || has("tool_calls"))
    };
    let is_list = |value: &Value| value.as_array().is_some_and(|list| !list.iter().any(is_turn));
    let is_numbered = |value: &Value| {
        let number = |key: &String| key.bytes().all(|byte| byte.is_ascii_digit());
        value.as_object().is_some_and(|column| !column.is_empty() && column.keys().all(number))
    };
    if object.is_empty() || !(object.values().all(is_list) || object.values().all(is_numbered)) {
        return Ok(Table::Row(object));
    }
    let (names, columns): (Vec<String>, Vec<Vec<Value>>) = object
        .into_iter()
        .map(|(name, column)| match column {
            Value::Array(list) => (name, list),
            Value::Object(column) => (name, column.into_iter().map(|(_, value)| value).collect()),
            _ => (name, Vec::new()),
        })
        .unzip();
    if let Some(at) = columns.iter().position(|column| column.len() != columns[0].len()) {
        return Err(format!(
            "the column `{}` has {} rows and `{}` has {}; a table's columns are equally long",
            names[0].escape_debug(),
            columns[0].len(),
            names[at].escape_debug(),
            columns[at].len()
        ));
    }
    Ok(Table::Columns(names, columns.into_iter().map(Vec::into_iter).collect()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::blocks::{Reading, text_blocks};
    use crate::formats::Kind;
    use crate::text::open;
    use proptest::prelude::*;

    fn read(kind: Kind, text: &str) -> Result<Vec<String>, String> {
        let path = Path::new(match kind {
            Kind::Json => "a.json",
            Kind::Csv => "a.csv",
            Kind::Tsv => "a.tsv",
            _ => "a",
        });
        let mut rows = Vec::new();
        let mut take = |place: Place, row: Result<Row, String>| {
            rows.push(match row {
                Ok(row) => format!("{place} {}", Value::Object(row)),
                Err(what) => format!("{place} bad: {what}"),
            });
            Ok(())
        };
        let opened = open(path, text.as_bytes(), text.len() as u64).map_err(|e| e.to_string())?;
        let mut give = |block| each(Path::new("a"), block, &mut take).map(|()| true);
        text_blocks(path, opened, Reading::default(), &mut give).map_err(|e| e.to_string())?;
        Ok(rows)
    }

    #[test]
    fn every_shape_of_json_gives_its_rows() {
        let (a, b) = ("{\"p\":\"a\",\"c\":1}", "{\"p\":\"b\",\"c\":2}");
        let lines = [format!("line 1 {a}"), format!("line 3 {b}")];
        assert_eq!(read(Kind::Json, &format!("{a}\n\n{b}\n")).unwrap(), lines);
        let rows = [format!("row 1 {a}"), format!("row 2 {b}")];
        for text in [
            format!("[{a},{b}]"),
            format!("[\n{a},\n{b}\n]\n"),
            "{\"p\":[\"a\",\"b\"],\"c\":[1,2]}".to_owned(),
            "{\"p\":{\"0\":\"a\",\"1\":\"b\"},\"c\":{\"0\":1,\"1\":2}}".to_owned(),
        ] {
            assert_eq!(read(Kind::Json, &text).unwrap(), rows, "{text}");
        }
        let chat = "{\"messages\":[{\"role\":\"user\",\"content\":\"a\"},{\"role\":\"assistant\",\"content\":\"b\"}]}";
        assert_eq!(read(Kind::Json, chat).unwrap(), [format!("row 1 {chat}")], "a conversation is no column");
        let column = format!("{{\"messages\":[{0},{0}]}}", &chat[12..chat.len() - 1]);
        assert_eq!(read(Kind::Json, &column).unwrap(), [format!("row 1 {chat}"), format!("row 2 {chat}")]);
        assert_eq!(read(Kind::Json, " [] ").unwrap(), [""; 0]);
    }

    #[test]
    fn large_arrays_are_read_in_parts_and_rows_keep_their_places() {
        let row = |n: usize| format!("{{\"p\":\"{n} [,]\",\"c\":\"{}\"}}", "x".repeat(100));
        let all: Vec<String> = (1..=30_000).map(row).collect();
        let wanted: Vec<String> = all.iter().zip(1..).map(|(row, n)| format!("row {n} {row}")).collect();
        for between in [",", ",\n", "\n  , "] {
            let text = format!("[{}]\n", all.join(between));
            assert!(text.len() > 3 << 20);
            assert!(read(Kind::Json, &text).unwrap() == wanted, "{between:?}");
        }
        let lines = all.join(",\n");
        let error = read(Kind::Json, &format!("[{lines},\n{{\"p\":nul}}]")).unwrap_err();
        assert!(error.contains("a, line 30001: not JSON"), "{error}");
        let error = read(Kind::Json, &format!("[{lines},")).unwrap_err();
        assert!(error.contains("line 30000: not JSON: EOF"), "{error}");
        for behind in [",]", "] 3"] {
            assert!(
                read(Kind::Json, &format!("[{lines}{behind}")).unwrap_err().contains("not JSON"),
                "{behind}"
            );
        }
        let last = read(Kind::Json, &format!("[{lines}, 3]")).unwrap().pop().unwrap();
        assert!(last.starts_with("row 30001 bad: a row is an object"), "{last}");
    }

    #[test]
    fn a_row_that_is_wrong_has_its_place_and_the_others_are_read() {
        let rows = read(Kind::Json, "{\"p\":1}\n{\"p\":\n[1]\n{\"p\":2}").unwrap();
        assert!(
            rows[1].starts_with("line 2 bad: not JSON: EOF")
                && rows[2].starts_with("line 3 bad: a row is an object")
        );
        assert_eq!(rows[3], "line 4 {\"p\":2}");
        assert!(read(Kind::Json, "[{\"p\":1}, 3]").unwrap()[1].starts_with("row 2 bad: a row is an object"));
        let rows = read(Kind::Csv, "p,c\n\"a, b\",1\nx\nc,2\n").unwrap();
        assert_eq!(
            (rows[0].as_str(), rows[2].as_str()),
            ("line 2 {\"p\":\"a, b\",\"c\":\"1\"}", "line 4 {\"p\":\"c\",\"c\":\"2\"}")
        );
        assert!(rows[1].starts_with("line 3 bad: 1 fields where the first row has 2"));
        assert_eq!(
            read(Kind::Tsv, "p\tc\n\"a\"\t1\n").unwrap(),
            ["line 2 {\"p\":\"\\\"a\\\"\",\"c\":\"1\"}"]
        );
    }

    proptest! {
        #[test]
        fn arbitrary_text_never_panics(text in "[\\[\\]{}:,\"a1 \n\r]{0,60}", kind in 0usize..3) {
            let _ = read([Kind::Json, Kind::Csv, Kind::Tsv][kind], &text);
        }
    }

    #[test]
    fn what_spoils_a_file_ends_its_reading() {
        let error = read(Kind::Json, "[{\"p\":1},\n{\"p\":").unwrap_err();
        assert!(error.contains("a, line 2: not JSON: EOF"), "{error}");
        let error = read(Kind::Json, "{\"p\":[1,2],\"c\":[1]}").unwrap_err();
        assert!(error.contains("the column `p` has 2 rows and `c` has 1"), "{error}");
        assert!(read(Kind::Csv, "p,c,p\n1,2,3\n").unwrap_err().contains("two columns `p`"));
        assert!(read(Kind::Csv, "p,c\n\"a,1\n").unwrap()[0].contains("bad: a quote is opened"));
        assert!(read(Kind::Text, "a").unwrap_err().contains("`task_name` = \"lm\""));
        let mut one = |_: Place, _: Result<Row, String>| Err(DataError::Rows("enough".into()));
        let error = document(Path::new("a"), (1, 1), "[{},{}]", &mut one).unwrap_err();
        assert_eq!(error.to_string(), "enough");
    }
}
