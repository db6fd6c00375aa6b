//! Text of users in HTML and XML.

use std::fmt::Write;

/// `text` as it may stand between tags and in quoted attributes: nothing in it is markup, and what no XML may hold is shown as U+FFFD.
pub fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            '\n' | '\t' => {
                let _ = write!(out, "&#{};", c as u32); // a string takes everything
            }
            '\u{fffe}' | '\u{ffff}' => out.push('\u{fffd}'),
            // Marks of writing direction could show a text as another one.
            '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => {
                out.push('\u{fffd}')
            }
            c if c.is_control() => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_a_user_wrote_is_markup() {
        assert_eq!(
            escape("<img src=x onerror=\"a('&')\">\u{1b}\u{202e}"),
            "&lt;img src=x onerror=&quot;a(&#39;&amp;&#39;)&quot;&gt;\u{fffd}\u{fffd}"
        );
    }
}
