//! Text that somebody else wrote, made fit for a terminal: the one place that knows which characters act instead of being shown.

use std::borrow::Cow;
use std::fmt::Write as _;

/// The text on one line, in which nothing moves the cursor, changes colours or titles, types for the user, or turns the direction of
/// writing. What would is shown as an escape: `\x1b`, `\n`, `\u{202e}`. Tabs stay. Doing it twice changes nothing more.
pub fn plain(text: &str) -> Cow<'_, str> {
    if !text.chars().any(acts) {
        return Cow::Borrowed(text);
    }
    let mut plain = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        match c {
            c if !acts(c) => plain.push(c),
            '\n' => plain.push_str("\\n"),
            '\r' => plain.push_str("\\r"),
            c if c.is_ascii() => write!(plain, "\\x{:02x}", u32::from(c)).expect("a string takes all"),
            c => write!(plain, "\\u{{{:x}}}", u32::from(c)).expect("a string takes all"),
        }
    }
    Cow::Owned(plain)
}

/// The same JSON in characters that a terminal only shows.
pub fn json(text: &str) -> Cow<'_, str> {
    // JSON itself has no control characters but those that serde leaves in strings: DEL, C1 and the marks of direction.
    if !text.chars().any(acts) {
        return Cow::Borrowed(text);
    }
    let mut plain = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        match acts(c) {
            true => write!(plain, "\\u{:04x}", u32::from(c)).expect("a string takes all"),
            false => plain.push(c),
        }
    }
    Cow::Owned(plain)
}

/// Control characters (C0 but the tab, DEL, C1, among them the one-byte CSI), line separators, and marks that turn the direction of
/// writing (Unicode TR 9, as in "Trojan Source").
fn acts(c: char) -> bool {
    (c.is_control() && c != '\t')
        || matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_terminal_would_obey_is_shown_instead() {
        let nasty = "a\u{1b}]0;title\u{7}b\u{1b}[2Jc\u{9b}31md\re\u{202e}f\nq\u{7f}";
        assert_eq!(plain(nasty), "a\\x1b]0;title\\x07b\\x1b[2Jc\\u{9b}31md\\re\\u{202e}f\\nq\\x7f");
        assert_eq!(plain(&plain(nasty)), plain(nasty));
        for harmless in ["", "step 5  loss 1.2", "Grüße, 世界 🚀", "a\tb", "C:\\n"] {
            assert!(matches!(plain(harmless), Cow::Borrowed(same) if same == harmless));
        }
    }

    #[test]
    fn json_means_the_same_and_shows_only() {
        let nasty: String = (0..0x3000).filter_map(char::from_u32).collect();
        let text = serde_json::to_string(&nasty).unwrap();
        let safe = json(&text);
        assert!(!safe.chars().any(acts));
        assert_eq!(serde_json::from_str::<String>(&safe).unwrap(), nasty);
    }
}
