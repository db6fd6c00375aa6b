//! `{% generation %}` blocks, which mark what the assistant wrote.
//!
//! The template engine has no tags of others, so each is written in its own: a scope at whose begin and end a function is called, which looks
//! how much was written until then. That moves no line, and leaves the white space around the tags to the engine.

/// The function that a template calls at the begin (true) and at the end (false) of each block.
pub(super) const CALLEE: &str = "__generation__";

/// Takes what the function gives, which is nothing.
const MARK: &str = "__generation_mark__";

/// A template in the engine's tags.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Marked {
    pub source: String,
    pub has_blocks: bool,
    /// The line of a block in something that is written elsewhere, such as a macro, so that its place is not known.
    pub misplaced: Option<usize>,
}

pub(super) fn marked(source: &str) -> Marked {
    let mut found =
        Marked { source: String::with_capacity(source.len()), has_blocks: false, misplaced: None };
    let mut rest = source;
    let mut captures = 0;
    while let Some(at) = rest.find('{') {
        let (text, tag) = rest.split_at(at);
        found.source.push_str(text);
        let (tag, behind) = tag.split_at(length(tag));
        let statement = statement(tag);
        match statement {
            "generation" => {
                found.has_blocks = true;
                if captures > 0 {
                    found.misplaced = Some(found.source.matches('\n').count() + 1);
                }
                found.source.push_str(&tag.replacen(statement, &format!("with {MARK} = {CALLEE}(true)"), 1));
            }
            "endgeneration" => {
                let call = format!("set {MARK} = {CALLEE}(false) %}}{{% endwith");
                found.source.push_str(&tag.replacen(statement, &call, 1));
            }
            _ => found.source.push_str(tag),
        }
        captures = match capture(statement) {
            Some(true) => captures + 1,
            Some(false) => captures - 1,
            None => captures,
        };
        rest = behind;
    }
    found.source.push_str(rest);
    found
}

/// Whether a statement begins (true) or ends something whose text goes elsewhere first.
fn capture(statement: &str) -> Option<bool> {
    match statement.split(|c: char| c.is_whitespace() || c == '(').next()? {
        "macro" | "call" | "filter" => Some(true),
        "set" if !statement.contains('=') => Some(true),
        "endmacro" | "endcall" | "endfilter" | "endset" => Some(false),
        _ => None,
    }
}

/// Of what begins with a brace: a comment, an expression, a statement, a raw block, or just the brace.
fn length(text: &str) -> usize {
    let until =
        |end: &str, from: usize| text[from..].find(end).map_or(text.len(), |at| from + at + end.len());
    match text.as_bytes().get(1) {
        Some(b'#') => until("#}", 2),
        Some(b'{') => code(text, "}}"),
        Some(b'%') => {
            let end = code(text, "%}");
            if statement(&text[..end]) != "raw" {
                return end;
            }
            let mut at = end;
            while let Some(next) = text[at..].find("{%") {
                let begin = at + next;
                at = until("%}", begin);
                if statement(&text[begin..at]) == "endraw" {
                    return at;
                }
            }
            text.len()
        }
        _ => 1,
    }
}

/// Where code ends that begins with two braces or so: behind `end`, which counts for nothing in a string.
fn code(text: &str, end: &str) -> usize {
    let bytes = text.as_bytes();
    let mut at = 2;
    let mut quote = None;
    while at < bytes.len() {
        match (quote, bytes[at]) {
            (Some(_), b'\\') => at += 1,
            (Some(open), byte) if open == byte => quote = None,
            (None, byte @ (b'"' | b'\'')) => quote = Some(byte),
            (None, _) if bytes[at..].starts_with(end.as_bytes()) => return at + end.len(),
            _ => {}
        }
        at += 1;
    }
    text.len()
}

/// What a statement says; empty where the tag is none.
fn statement(tag: &str) -> &str {
    let inner = tag.strip_prefix("{%").and_then(|inner| inner.strip_suffix("%}")).unwrap_or_default();
    let inner = inner.strip_prefix(['-', '+']).unwrap_or(inner);
    inner.strip_suffix(['-', '+']).unwrap_or(inner).trim()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_tags_are_replaced() {
        let made = "a{%- with __generation_mark__ = __generation__(true) -%}\n{{ x }}{% set __generation_mark__ = __generation__(false) %}{% endwith %}{";
        let expected = Marked { source: made.into(), has_blocks: true, misplaced: None };
        assert_eq!(marked("a{%- generation -%}\n{{ x }}{% endgeneration %}{"), expected);
        for plain in [
            "{# {% generation %} #}",
            "{{ '{% generation %}' }}",
            "{% raw %}{% generation %}{%- endraw %}",
            "{% set x = '\\'{% generation %}' %}",
            "{% if add_generation_prompt %}generation{% endif %}",
            "{% generation",
            "{% raw %}{% generation %}",
            "{%}",
            "{",
            "",
        ] {
            assert_eq!(marked(plain), Marked { source: plain.into(), has_blocks: false, misplaced: None });
        }
    }

    #[test]
    fn a_block_whose_place_is_not_known_is_found() {
        let line = |source: &str| marked(source).misplaced;
        assert_eq!(line("{% macro m() %}\n{% generation %}{% endgeneration %}{% endmacro %}"), Some(2));
        assert_eq!(line("{% set x %}{% generation %}{% endgeneration %}{% endset %}"), Some(1));
        assert_eq!(
            line("{% macro m() %}{% endmacro %}{% set x = 1 %}{% generation %}{% endgeneration %}"),
            None
        );
    }
}
