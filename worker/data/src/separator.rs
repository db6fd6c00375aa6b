//! What separates the fields of a CSV: a comma, or what its first line `sep=;` names, or what its first rows show.

use crate::chunks::CHUNK;

/// What stands between fields where it is no comma.
const OTHERS: [char; 3] = [';', '\t', '|'];

/// Rows that are looked at; the first one names the fields.
const ROWS_MAX: usize = 16;

/// The character that a first line `sep=;` names, as Excel reads and writes it, and what follows that line.
pub(crate) fn named(text: &str, newline: char) -> Option<(char, &str)> {
    let (line, rest) = text.split_once(newline)?;
    let line = line.trim_end_matches('\r').trim_matches('"');
    let named = line.strip_prefix("sep=").or_else(|| line.strip_prefix("SEP="))?;
    let mut characters = named.chars();
    match (characters.next(), characters.next()) {
        (Some(separator), None) if separator.is_ascii() && separator != '"' => Some((separator, rest)),
        _ => None,
    }
}

/// Another character than a comma that separates: the first row has it and no comma, and at least half of those behind it have as many of it:
/// the others are rows of another length. Of a file no more counts than a chunk, so that whoever sees more of it finds the same.
pub(crate) fn shown(text: &str, newline: char) -> Option<char> {
    let counts = counts(text, newline);
    let (first, behind) = counts.split_first()?;
    let same = |at: usize| behind.iter().filter(|row| row[at] == first[at]).count();
    let separates = |at: &usize| first[*at] > 0 && 2 * same(*at) >= behind.len();
    let found = (0..OTHERS.len()).find(separates).map(|at| OTHERS[at]);
    found.filter(|_| first[OTHERS.len()] == 0)
}

/// Of each of the first rows how many of `OTHERS`, and commas, stand outside of quotes.
fn counts(text: &str, newline: char) -> Vec<[usize; OTHERS.len() + 1]> {
    let is_cut = text.len() >= CHUNK;
    let text = &text[..text.floor_char_boundary(CHUNK)];
    let (mut rows, mut row, mut is_empty) = (Vec::new(), [0; OTHERS.len() + 1], true);
    let (mut in_quotes, mut before) = (false, newline);
    for c in text.chars() {
        let place = OTHERS.iter().chain(&[',']).position(|separator| *separator == c);
        // A quote opens where a field begins, or behind the one that seemed to close.
        let opens = before == newline || before == '"' || before == ',' || OTHERS.contains(&before);
        match c {
            '"' if in_quotes || opens => in_quotes = !in_quotes,
            c if c == newline && !in_quotes => {
                if !std::mem::replace(&mut is_empty, true) {
                    rows.push(std::mem::take(&mut row));
                }
                if rows.len() == ROWS_MAX {
                    return rows;
                }
            }
            _ => {
                is_empty &= c.is_whitespace() && place.is_none();
                if let Some(place) = place.filter(|_| !in_quotes) {
                    row[place] += 1;
                }
            }
        }
        before = c;
    }
    if !is_empty && !is_cut {
        rows.push(row);
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_separator_is_found_where_most_rows_have_it() {
        for (text, separator) in [
            ("id;text\n1;a\n2;b, c", Some(';')),
            ("id\ttext\n1\ta, b\n", Some('\t')),
            ("id|text\n\n1|\"a|b\"\n2|\"c \"\"|\"\" d\"\n", Some('|')),
            ("id;text\n1;\"a\nb;c\"\n", Some(';')),
            ("price;text\n1,5;a\n2,5;b\n", Some(';')),
            ("id;text\n1;a;b\n", None),
            ("id;text\n1;a\n2;b;c\n3;d\n", Some(';')),
            ("id;text\n1;a;b\n2;c\n", Some(';')),
            ("id;text\n1\n2\n3;a\n", None),
            ("id,text;x\n1,a;b\n", None),
            ("id;text\n", Some(';')),
            ("text\na; b\n", None),
            ("", None),
        ] {
            assert_eq!(shown(text, '\n'), separator, "{text:?}");
        }
        let long = "x".repeat(CHUNK);
        assert_eq!(
            shown(&format!("a;b\n1;2\n1;2;3{long}"), '\n'),
            Some(';'),
            "a row that is cut counts for nothing"
        );
    }
}
