//! Cleaning of one document, in the order of `job::Clean`: HTML tags, white space, length.

use fleet_common::job::Clean;

/// The cleaned text, or `None` where nothing worth keeping is left.
pub(crate) fn clean(text: String, rules: &Clean) -> Option<String> {
    let text = if rules.remove_html { remove_html(&text) } else { text };
    let text = if rules.normalize_whitespace { normalize_whitespace(&text) } else { text };
    let long_enough = rules.min_chars == 0 || text.chars().count() >= rules.min_chars;
    (long_enough && !text.trim().is_empty()).then_some(text)
}

/// Takes out what the regular expression `<[^>]+>` matches.
fn remove_html(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(open) = rest.find('<') {
        out.push_str(&rest[..open]);
        rest = &rest[open..];
        match rest.find('>') {
            Some(close) if close > 1 => rest = &rest[close + 1..],
            Some(close) => {
                out.push_str(&rest[..=close]); // `<>` is no tag
                rest = &rest[close + 1..];
            }
            None => break,
        }
    }
    out.push_str(rest);
    out
}

/// Every run of white space becomes one space; none at the ends. Python's `\s`, which counts four control characters in.
fn normalize_whitespace(text: &str) -> String {
    let white = |c: char| c.is_whitespace() || ('\x1c'..='\x1f').contains(&c);
    let words: Vec<&str> = text.split(white).filter(|word| !word.is_empty()).collect();
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_go_and_comparisons_without_an_end_stay() {
        assert_eq!(remove_html("<p class=\"x\">Hello <b>world</b></p>"), "Hello world");
        assert_eq!(remove_html("a < b and <> and <br\n/>c <"), "a  and c <");
        assert_eq!(remove_html("x <> y"), "x <> y");
        assert_eq!(remove_html("1 < 2"), "1 < 2");
    }

    #[test]
    fn white_space_becomes_single_spaces() {
        assert_eq!(normalize_whitespace(" a\t\n b\u{a0}c\x1cd "), "a b c d");
    }

    #[test]
    fn html_goes_before_white_space_and_short_documents_are_dropped() {
        let rules =
            Clean { remove_html: true, normalize_whitespace: true, min_chars: 3, near_duplicates: None };
        assert_eq!(clean(" a <i> b".into(), &rules).as_deref(), Some("a b"));
        assert_eq!(clean("<p>äö</p>".into(), &rules), None);
        assert_eq!(clean("<p>äöü</p>".into(), &rules).as_deref(), Some("äöü"));
        assert_eq!(clean(" \n".into(), &Clean::default()), None);
        assert_eq!(clean(" as it is\n".into(), &Clean::default()).as_deref(), Some(" as it is\n"));
    }
}
