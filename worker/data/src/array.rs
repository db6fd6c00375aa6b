//! A file of JSON that is an array of rows, in chunks that end behind a row.

use crate::chunks::Ends;

/// Where in the array the next byte stands.
#[derive(Clone, Debug, Default)]
pub(crate) struct Elements {
    depth: usize,
    in_text: bool,
    is_escaped: bool,
    /// Commas between rows that were passed.
    commas: u64,
}

impl Elements {
    /// Rows that ended with a comma.
    pub fn ended(&self) -> u64 {
        self.commas
    }
}

impl Ends for Elements {
    /// Behind the last comma between rows.
    fn last(&mut self, bytes: &[u8]) -> Option<usize> {
        let mut last = None;
        for (at, byte) in bytes.iter().enumerate() {
            match byte {
                _ if std::mem::take(&mut self.is_escaped) => {}
                b'\\' if self.in_text => self.is_escaped = true,
                b'"' => self.in_text = !self.in_text,
                _ if self.in_text => {}
                b'[' | b'{' => self.depth += 1,
                b']' | b'}' => self.depth = self.depth.saturating_sub(1),
                b',' if self.depth == 1 => {
                    self.commas += 1;
                    last = Some(at + 1);
                }
                _ => {}
            }
        }
        last
    }
}

/// Whether a file that begins so is an array, and not lines of such.
pub(crate) fn is_array(head: &[u8]) -> bool {
    let head = head.trim_ascii_start();
    let is_line = |line: &&[u8]| !line.trim_ascii().is_empty();
    let mut lines = head.split(|byte| *byte == b'\n').filter(is_line);
    let first = lines.next().unwrap_or_default();
    let is_value = || serde_json::from_slice::<serde::de::IgnoredAny>(first).is_ok();
    head.starts_with(b"[") && (lines.next().is_none() || !is_value())
}

/// A part of an array as an array: `first` and `last` where it begins and ends as the file does.
pub(crate) fn closed(part: String, first: bool, last: bool) -> String {
    let begin = if first { "" } else { "[" };
    let inside = if last { &part } else { part.strip_suffix(',').unwrap_or(&part) };
    let end = if last { "" } else { "]" };
    format!("{begin}{inside}{end}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn an_array_is_told_from_lines() {
        for (head, is) in [
            ("[{\"a\": 1},\n{\"a\": 2}]", true),
            (" \n[\n{}", true),
            ("[{}]\n", true),
            ("[1]\n[2]\n", false),
            ("{\"a\": [1]}", false),
            ("", false),
        ] {
            assert_eq!(is_array(head.as_bytes()), is, "{head:?}");
        }
    }

    proptest! {
        /// Wherever an array is cut behind a row, its parts have the same rows.
        #[test]
        fn parts_have_the_rows_of_the_whole(texts in proptest::collection::vec("[a,\"\\\\\\[\\]{}\n]{0,6}", 1..8), size in 1usize..20) {
            let rows: Vec<serde_json::Value> = texts.iter().map(|text| serde_json::json!({"t": [text]})).collect();
            let written = serde_json::to_string_pretty(&rows).unwrap();
            let mut ends = Elements::default();
            let (mut found, mut part, mut first) = (Vec::new(), Vec::new(), true);
            let mut take = |part: Vec<u8>, first, last| {
                let text = closed(String::from_utf8(part).unwrap(), first, last);
                found.extend(serde_json::from_str::<Vec<serde_json::Value>>(&text).unwrap());
            };
            for bytes in written.as_bytes().chunks(size) {
                let seen = part.len();
                part.extend(bytes);
                if let Some(end) = ends.last(bytes) {
                    let later = part.split_off(seen + end);
                    take(std::mem::replace(&mut part, later), std::mem::take(&mut first), false);
                }
            }
            take(part, first, true);
            prop_assert_eq!(ends.ended() as usize + 1, rows.len());
            prop_assert_eq!(found, rows);
        }
    }
}
