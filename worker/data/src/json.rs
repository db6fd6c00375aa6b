//! Rows of JSON, in the shapes that people have them: an object per line, an array of objects, and an object of columns.
//! The contents decide which it is. Only the text field is kept; the rest is skipped as it is parsed.

use crate::documents::{chat_cure, is_chat, no_field};
use crate::table::Wrong;
use serde::de::{
    DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Unexpected, Visitor,
};
use std::fmt;

/// Names of fields that a refusal lists.
const NAMES_MAX: usize = 12;

/// Lines with something in them, with their numbers, of which `first` is the first one's.
pub(crate) fn lines(first: u64, text: &str) -> impl Iterator<Item = (u64, &str)> {
    let newline = if text.contains('\n') { '\n' } else { '\r' };
    (first..).zip(text.split(newline)).filter(|(_, line)| !line.trim().is_empty())
}

/// The text field of the object in a line.
pub(crate) fn text(line: &str, field: &str) -> Result<String, String> {
    let mut out = Vec::new();
    parse(line, Rows { field, whole: None, out: &mut out }).map_err(|e| what_is_wrong(line, &e))?;
    out.pop().ok_or_else(|| "no text".to_owned())
}

/// That of all rows of a value that is a file, or a part of an array from this row and line on; or what is wrong in which line.
pub(crate) fn texts(row: u64, line: u64, text: &str, field: &str) -> Result<Vec<String>, Wrong> {
    let mut out = Vec::new();
    match parse(text, Rows { field, whole: Some(row), out: &mut out }) {
        Ok(()) => Ok(out),
        Err(e) => Err((line - 1 + e.line() as u64, what_is_wrong(text, &e))),
    }
}

/// Whether the file is one value rather than one per line: there is a single line, or the first is no value by itself and the
/// second does not begin one like it.
pub(crate) fn is_one_document<'t>(mut lines: impl Iterator<Item = &'t str>) -> bool {
    let (Some(first), Some(second)) = (lines.next(), lines.next()) else { return true };
    let whole = serde_json::from_str::<IgnoredAny>(first).is_ok();
    let array = first.starts_with('[');
    !whole && (array || (first.starts_with('{') && !second.starts_with('{')))
}

fn parse(text: &str, rows: Rows) -> serde_json::Result<()> {
    if text.trim().is_empty() {
        return Ok(());
    }
    let mut parser = serde_json::Deserializer::from_str(text);
    rows.deserialize(&mut parser)?;
    parser.end()
}

pub(crate) fn what_is_wrong(text: &str, error: &serde_json::Error) -> String {
    let all = without_place(error);
    let (row, what) =
        match all.starts_with("row ").then(|| all.split_at(all.find(": ").map_or(0, |at| at + 2))) {
            Some(parts) => parts,
            None => ("", all.as_str()),
        };
    let there = not_of_json(text, error);
    match () {
        () if what.contains("EOF while parsing") => {
            format!("not JSON: {row}{what}; the file seems to be cut off")
        }
        () if what.contains("surrogate") || what.contains("end of hex escape") => format!(
            "not JSON: {row}an escape such as \\ud83d is half of a character whose other half is missing; take it out, or leave such \
             rows out"
        ),
        () if there.is_some() => format!("not JSON: {row}{}", there.unwrap_or_default()),
        () if what.contains("trailing characters") => {
            format!("not JSON: {what}; write one object per line (`jq -c .`), or one array of objects")
        }
        () if error.is_syntax() => format!("not JSON: {what}"),
        () => all,
    }
}

/// What stands where `error` is, if it is one of those that other readers of JSON take.
fn not_of_json(text: &str, error: &serde_json::Error) -> Option<String> {
    let rest = rest(text, error);
    if begins_comment(rest) {
        return Some("a comment, which JSON does not have; take it out".into());
    }
    let number =
        ["NaN", "-NaN", "Infinity", "-Infinity"].into_iter().find(|number| rest.starts_with(number))?;
    let before = text[..text.len() - rest.len()].trim_end();
    let name = before.strip_suffix(':').and_then(|before| before.trim_end().strip_suffix('"'));
    let name = name.and_then(|before| before.rsplit('"').next()).map(|name| {
        let short: String = name.chars().take(40).flat_map(char::escape_debug).collect();
        format!("the field `{short}` is ")
    });
    Some(format!("{}{number}, which JSON does not have; write null", name.unwrap_or_default()))
}

fn begins_comment(rest: &str) -> bool {
    ["//", "/*", "#"].iter().any(|sign| rest.starts_with(sign))
}

/// `text` from the word on in which `error` is.
fn rest<'t>(text: &'t str, error: &serde_json::Error) -> &'t str {
    let line: usize = text.split_inclusive('\n').take(error.line().saturating_sub(1)).map(str::len).sum();
    let at = text.floor_char_boundary((line + error.column().saturating_sub(1)).min(text.len()));
    let word = text[..at].trim_end_matches(|c: char| c.is_ascii_alphabetic() || c == '-' || c == '/');
    text[word.len()..].trim_start_matches([':', ',', '[', ' ', '\t', '\r', '\n'])
}

/// The message without the line and column that serde_json adds.
fn without_place(error: &impl fmt::Display) -> String {
    let what = error.to_string();
    what.rfind(" at line ").map_or(what.as_str(), |at| &what[..at]).to_owned()
}

/// Appends the text of a row to `out`; with `whole`, of all rows of an array, of which that is the first one's number, or of a column.
struct Rows<'a> {
    field: &'a str,
    whole: Option<u64>,
    out: &'a mut Vec<String>,
}

impl<'de> DeserializeSeed<'de> for Rows<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Rows<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "an object with the field `{}`", self.field)
    }

    fn visit_str<E: Error>(self, _: &str) -> Result<(), E> {
        Err(E::invalid_type(Unexpected::Other("a text"), &self)) // not the text itself, which may be long
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let mut found = None;
        let (mut names, mut columns) = (Vec::new(), Vec::new());
        while let Some(name) = map.next_key::<String>()? {
            if name == self.field {
                if found.is_some() {
                    return Err(A::Error::custom(format!("the field `{name}` is given twice")));
                }
                found = Some(map.next_value_seed(Text {
                    field: self.field,
                    column: self.whole.is_some(),
                    out: self.out,
                })?);
                continue;
            }
            let shape = map.next_value_seed(Shaped)?;
            // The first column of another length is enough.
            if !columns.iter().any(|(_, seen)| *seen == shape) {
                columns.push((name.clone(), shape));
            }
            if names.len() < NAMES_MAX {
                names.push(name);
            }
        }
        if let Some(shape) = found {
            return match columns.iter().find(|(_, other)| other.differs(&shape)) {
                Some((name, other)) => Err(A::Error::custom(format!(
                    "the column `{}` has {} rows and `{}` has {}; a table's columns are equally long",
                    self.field,
                    shape.rows(),
                    name.escape_debug(),
                    other.rows()
                ))),
                None => Ok(()),
            };
        }
        let deeper = match self.whole.is_some() {
            true => {
                "; rows below one of them go to JSON Lines (`jq -c '.NAME[]'`); no rows at all: leave it out with data.exclude"
            }
            false => "",
        };
        Err(A::Error::custom(no_field(self.field, names.iter().map(String::as_str)) + deeper))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut rows: A) -> Result<(), A::Error> {
        let Some(mut number) = self.whole else {
            let array = Unexpected::Other("an array");
            return Err(A::Error::invalid_type(array, &self));
        };
        loop {
            let row = Rows { field: self.field, whole: None, out: self.out };
            match rows.next_element_seed(row) {
                Ok(Some(())) => number += 1,
                Ok(None) => return Ok(()),
                Err(e) => return Err(A::Error::custom(format!("row {number}: {}", without_place(&e)))),
            }
        }
    }
}

/// What a field of an object is, of which the others may be columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Shape {
    Scalar,
    List(u64),
    Object(u64),
}

impl Shape {
    fn rows(self) -> u64 {
        match self {
            Shape::Scalar => 1,
            Shape::List(rows) | Shape::Object(rows) => rows,
        }
    }

    /// Whether both are columns of the same kind, and not equally long.
    fn differs(&self, other: &Shape) -> bool {
        match (self, other) {
            (Shape::List(rows), Shape::List(others)) | (Shape::Object(rows), Shape::Object(others)) => {
                rows != others
            }
            _ => false,
        }
    }
}

/// Skips a value and tells its shape.
struct Shaped;

impl<'de> DeserializeSeed<'de> for Shaped {
    type Value = Shape;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Shape, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Shaped {
    type Value = Shape;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a value")
    }

    fn visit_bool<E>(self, _: bool) -> Result<Shape, E> {
        Ok(Shape::Scalar)
    }

    fn visit_i64<E>(self, _: i64) -> Result<Shape, E> {
        Ok(Shape::Scalar)
    }

    fn visit_u64<E>(self, _: u64) -> Result<Shape, E> {
        Ok(Shape::Scalar)
    }

    fn visit_f64<E>(self, _: f64) -> Result<Shape, E> {
        Ok(Shape::Scalar)
    }

    fn visit_str<E>(self, _: &str) -> Result<Shape, E> {
        Ok(Shape::Scalar)
    }

    fn visit_unit<E>(self) -> Result<Shape, E> {
        Ok(Shape::Scalar)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut rows: A) -> Result<Shape, A::Error> {
        let mut count = 0;
        while rows.next_element::<IgnoredAny>()?.is_some() {
            count += 1;
        }
        Ok(Shape::List(count))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut rows: A) -> Result<Shape, A::Error> {
        let mut count = 0;
        while rows.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {
            count += 1;
        }
        Ok(Shape::Object(count))
    }
}

/// The value of the text field: a text; with `column`, also texts in an array, or by the number of their row as pandas writes them.
struct Text<'a> {
    field: &'a str,
    column: bool,
    out: &'a mut Vec<String>,
}

impl<'de> DeserializeSeed<'de> for Text<'_> {
    type Value = Shape;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Shape, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Text<'_> {
    type Value = Shape;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match is_chat(self.field) {
            true => write!(f, "text in the field `{}`; {}", self.field, chat_cure("text")),
            false => {
                write!(f, "text in the field `{}`; leave such rows out, or set data.text_field", self.field)
            }
        }
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Shape, E> {
        self.out.push(text.to_owned());
        Ok(Shape::Scalar)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut texts: A) -> Result<Shape, A::Error> {
        if !self.column {
            return Err(A::Error::invalid_type(Unexpected::Other("an array"), &self));
        }
        let before = self.out.len();
        while texts.next_element_seed(Text { field: self.field, column: false, out: self.out })?.is_some() {}
        Ok(Shape::List((self.out.len() - before) as u64))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut texts: A) -> Result<Shape, A::Error> {
        if !self.column {
            return Err(A::Error::invalid_type(Unexpected::Other("an object"), &self));
        }
        let before = self.out.len();
        while texts.next_key::<IgnoredAny>()?.is_some() {
            texts.next_value_seed(Text { field: self.field, column: false, out: self.out })?;
        }
        Ok(Shape::Object((self.out.len() - before) as u64))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read(all: &str) -> Result<Vec<String>, String> {
        let told = |(line, what): Wrong| format!("line {line}: {what}");
        match is_one_document(lines(1, all).map(|(_, line)| line.trim())) {
            true => texts(1, 1, all, "text").map_err(told),
            false => {
                lines(1, all).map(|(n, line)| text(line, "text").map_err(|what| told((n, what)))).collect()
            }
        }
    }

    #[test]
    fn every_shape_gives_its_rows() {
        let shapes = [
            "{\"text\":\"a\"}\n{\"id\":1,\"text\":\"b\\n\"}\n",
            "\r\n{\"text\":\"a\"}\r\n\r\n  {\"text\":\"b\\n\"}",
            "{\"text\":\"a\"}\r{\"text\":\"b\\n\"}\r",
            "[{\"text\":\"a\",\"x\":{\"text\":\"no\"}},{\"text\":\"b\\n\"}]",
            "[\n  {\n    \"text\": \"a\"\n  },\n  {\n    \"text\": \"b\\n\"\n  }\n]\n",
            "[{\"text\":\"a\"},\n {\"text\":\"b\\n\"}]",
            "{\"id\":[1,2],\"text\":[\"a\",\"b\\n\"]}",
            "{\n  \"text\": [\n \"a\",\n \"b\\n\"\n ]\n}",
            "{\"text\":{\"0\":\"a\",\"1\":\"b\\n\"},\"id\":{\"0\":1,\"1\":2}}",
        ];
        for shape in shapes {
            assert_eq!(read(shape).unwrap(), ["a", "b\n"], "{shape}");
        }
        assert_eq!(read("{\n\"text\": \"one row over lines\"\n}").unwrap(), ["one row over lines"]);
        let beside = "{\"text\":\"a row\",\"tags\":[1,2],\"meta\":{\"x\":NULL}}".replace("NULL", "null");
        assert_eq!(read(&beside).unwrap(), ["a row"]);
        assert_eq!(read("{\"text\":[\"a\"],\"meta\":{\"x\":1,\"y\":2},\"v\":1}").unwrap(), ["a"]);
        for nothing in ["", " \n", "[]", "[\n]"] {
            assert_eq!(read(nothing).unwrap(), [] as [&str; 0], "{nothing:?}");
        }
    }

    #[test]
    fn what_is_wrong_names_its_line_and_row() {
        for (text, told) in [
            (
                "{\"text\":\"a\"}\n\n{\"text\":\"b",
                "line 3: not JSON: EOF while parsing a string; the file seems to be cut off",
            ),
            ("{\"text\":\"a\n{\"text\":\"b\"}", "line 1: not JSON: EOF"),
            ("[{\"text\":\"a\"},\n{\"text\":\"b\"", "line 2: not JSON: row 2: EOF"),
            ("{}", "line 1: no field `text`, and no other"),
            (
                "{\"text\":\"a\"}\n{\"body\":1,\"id\":2}\n",
                "line 2: no field `text`; set data.text_field to one of: body, id",
            ),
            ("[{\"text\":\"a\"},\n{\"body\":1}]", "line 2: row 2: no field `text`"),
            ("{\"version\":1,\"data\":[{\"text\":\"a\"}]}", "`jq -c '.NAME[]'`"),
            (
                "{\"text\":\"a\"}\n{\"text\":null}",
                "line 2: invalid type: null, expected text in the field `text`",
            ),
            ("{\"text\":\"a\"}\n{\"text\":3}", "line 2: invalid type: integer `3`, expected text"),
            ("{\"text\":\"a\"}\n{\"text\":[\"b\"]}", "line 2: invalid type: an array, expected text"),
            ("{\"text\":\"a\",\"text\":\"b\"}", "line 1: the field `text` is given twice"),
            ("[\"a\",\"b\"]", "row 1: invalid type: a text, expected an object with the field `text`"),
            ("[{\"text\":\"a\"}]\n[{\"text\":\"b\"}]", "line 1: invalid type: an array"),
            (
                "{\n\"text\":\"a\"\n}\n{\n\"text\":\"b\"\n}",
                "line 4: not JSON: trailing characters; write one object per line",
            ),
            ("{\"text\":\"a\"} {\"text\":\"b\"}", "line 1: not JSON: trailing characters"),
            ("some text\nof lines", "line 1: not JSON: expected value"),
            (
                "{\"text\":\"a\"}\n{\"score\": NaN,\"text\":\"b\"}",
                "line 2: not JSON: the field `score` is NaN, which JSON does not have; write null",
            ),
            ("{\"text\":\"a\",\"x\":[1,-Infinity]}", "line 1: not JSON: -Infinity, which JSON"),
            (
                "[{\"text\":\"a\"},\n{\"x\":Infinity,\"text\":\"b\"}]",
                "line 2: not JSON: row 2: the field `x` is Infinity",
            ),
            (
                "{\"text\":\"a\"}\n// more\n",
                "line 2: not JSON: a comment, which JSON does not have; take it out",
            ),
            ("# rows\n{\"text\":\"a\"}", "line 1: not JSON: a comment"),
            ("{\"text\":\"a\"} // the first\n{\"text\":\"b\"}", "line 1: not JSON: a comment"),
            ("{\n/* all */ \"text\":\"a\"}", "line 2: not JSON: a comment"),
            (
                "{\"text\":\"a \\ud83d\"}",
                "line 1: not JSON: an escape such as \\ud83d is half of a character",
            ),
            (
                "{\"text\":\"a \\ude00\"}",
                "line 1: not JSON: an escape such as \\ud83d is half of a character",
            ),
            (
                "{\"text\":[\"a\",\"b\"],\"n\":1,\"id\":[1,2,3]}",
                "line 1: the column `text` has 2 rows and `id` has 3; a table's columns are equally long",
            ),
            (
                "{\"id\":{\"0\":1},\"text\":{\"0\":\"a\",\"1\":\"b\"}}",
                "the column `text` has 2 rows and `id` has 1",
            ),
            ("3", "line 1: invalid type: integer `3`, expected an object"),
        ] {
            let error = read(text).unwrap_err();
            assert!(error.contains(told), "{text}: {error}");
        }
    }

    proptest! {
        #[test]
        fn every_text_survives_every_shape(texts in proptest::collection::vec(any::<String>(), 0..6)) {
            let rows: Vec<serde_json::Value> = texts.iter().map(|text| serde_json::json!({"id": 1, "text": text})).collect();
            let lines: String = rows.iter().map(|row| format!("{row}\n")).collect();
            prop_assert_eq!(read(&lines).unwrap(), &texts[..]);
            prop_assert_eq!(read(&serde_json::to_string_pretty(&rows).unwrap()).unwrap(), &texts[..]);
            prop_assert_eq!(read(&serde_json::json!({"text": texts}).to_string()).unwrap(), &texts[..]);
        }

        #[test]
        fn arbitrary_json_never_panics(text in "[{}\\[\\]\":,text1 \n\\\\]{0,40}") {
            let _ = read(&text);
        }
    }
}
