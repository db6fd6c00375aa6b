//! The workspace's own source, for tests that hold rules about it.

use std::path::{Path, PathBuf};

/// The clone.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("this package is in a folder of the clone")
        .to_owned()
}

/// Shows every Rust file below `folder` of the clone, by its path from the root.
pub fn visit(folder: &str, each: &mut impl FnMut(&Path, &str)) {
    below(&root().join(folder), each);
}

fn below(folder: &Path, each: &mut impl FnMut(&Path, &str)) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() && path.file_name().is_some_and(|name| name != "target") {
            below(&path, each);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = std::fs::read_to_string(&path).expect("source is UTF-8");
            each(path.strip_prefix(root()).unwrap_or(&path), &text);
        }
    }
}

/// What a file says to people: its texts in quotes, each with the line on which it begins. Without comments, and without what follows
/// the first `#[cfg(test)]`.
pub fn texts(source: &str) -> Vec<(usize, String)> {
    let code = source.split("#[cfg(test)]").next().unwrap_or_default();
    let (mut texts, mut rest, mut line) = (Vec::new(), code, 1);
    while let Some(first) = rest.chars().next() {
        let end = match first {
            '/' if rest.starts_with("//") => rest.find('\n').unwrap_or(rest.len()),
            '"' => {
                let end = end_of_text(&rest[1..]) + 1;
                texts.push((line, unescape(&rest[1..end])));
                end + 1
            }
            'r' if rest.starts_with("r\"") || rest.starts_with("r#") => match raw(rest) {
                Some((text, end)) => {
                    texts.push((line, text.to_owned()));
                    end
                }
                None => 1,
            },
            // A quote that is a character, and not a lifetime.
            '\'' if rest.starts_with("'\"'") => 3,
            '\'' if rest.starts_with("'\\\"'") => 4,
            _ => first.len_utf8(),
        };
        let end = end.min(rest.len());
        line += rest[..end].matches('\n').count();
        rest = &rest[end..];
    }
    texts
}

/// Where the quote is that ends a text.
fn end_of_text(text: &str) -> usize {
    let mut escaped = false;
    let end = text.bytes().position(|byte| {
        let ends = byte == b'"' && !escaped;
        escaped = byte == b'\\' && !escaped;
        ends
    });
    end.unwrap_or(text.len())
}

/// The text of `r#"..."#`, and where it is over.
fn raw(rest: &str) -> Option<(&str, usize)> {
    let hashes = rest[1..].bytes().take_while(|byte| *byte == b'#').count();
    let begin = 1 + hashes + 1;
    if rest.as_bytes().get(begin - 1) != Some(&b'"') {
        return None;
    }
    let close = format!("\"{}", "#".repeat(hashes));
    let length = rest[begin..].find(&close)?;
    Some((&rest[begin..begin + length], begin + length + close.len()))
}

/// As far as messages need it: quotes, and lines that go on.
fn unescape(text: &str) -> String {
    let mut lines = text.split("\\\n");
    let first = lines.next().unwrap_or_default().to_owned();
    lines.fold(first, |whole, line| whole + line.trim_start()).replace("\\\"", "\"").replace("\\n", "\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_found_whole_and_comments_are_not() {
        let source = "// \"no\"\nlet a = \"one \\\"two\\\" \\\n    three\"; '\"'; // \"no\"\nr#\"raw \"x\"\"#; b\"bytes\"\n#[cfg(test)]\n\"no\"";
        let found = texts(source);
        let expected = [(2, "one \"two\" three"), (4, "raw \"x\""), (4, "bytes")];
        assert_eq!(found, expected.map(|(line, text)| (line, text.to_owned())));
    }
}
