//! What happens to a document before it is tokenised: a chain of steps, each of which changes the text or drops it.

use fleet_common::job::Clean;

/// A step: the text as it goes on, or `None` where the document is dropped. Closures are such.
pub trait Processor: Send + Sync {
    fn process(&self, text: String) -> Option<String>;
}

impl<F: Fn(String) -> Option<String> + Send + Sync> Processor for F {
    fn process(&self, text: String) -> Option<String> {
        self(text)
    }
}

/// HTML tags and white space, in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TextCleaning {
    /// Takes out what the regular expression `<[^>]+>` matches.
    pub remove_html: bool,
    /// Every run of white space becomes one space; none at the ends.
    pub normalize_whitespace: bool,
}

impl Default for TextCleaning {
    fn default() -> TextCleaning {
        TextCleaning { remove_html: true, normalize_whitespace: true }
    }
}

impl Processor for TextCleaning {
    fn process(&self, text: String) -> Option<String> {
        let text = if self.remove_html { remove_html(&text) } else { text };
        Some(if self.normalize_whitespace { normalize_whitespace(&text) } else { text })
    }
}

/// Steps that documents go through, in the order in which they were added.
///
/// ```
/// use fleet_data::{Pipeline, TextCleaning};
///
/// let pipeline = Pipeline::default()
///     .add_processor(TextCleaning::default())
///     .filter(|text| text.chars().count() > 10)
///     .add_processor(|text: String| Some(text.to_lowercase()));
/// let texts = ["<p>A  text\nthat is kept</p>", "<b>short</b>"].map(str::to_owned);
/// let kept: Vec<String> = texts.into_iter().filter_map(|text| pipeline.process(text)).collect();
/// assert_eq!(kept, ["a text that is kept"]);
/// ```
#[derive(Default)]
pub struct Pipeline(Vec<Box<dyn Processor>>);

impl Pipeline {
    /// That of a job. What is left without text is dropped.
    pub fn of(rules: &Clean) -> Pipeline {
        let Clean { remove_html, normalize_whitespace, min_chars, .. } = *rules;
        Pipeline::default()
            .add_processor(TextCleaning { remove_html, normalize_whitespace })
            .filter(move |text| min_chars == 0 || text.chars().count() >= min_chars)
            .filter(|text| !text.trim().is_empty())
    }

    #[must_use]
    pub fn add_processor(mut self, step: impl Processor + 'static) -> Pipeline {
        self.0.push(Box::new(step));
        self
    }

    /// Drops the documents for which `keeps` is false.
    #[must_use]
    pub fn filter(self, keeps: impl Fn(&str) -> bool + Send + Sync + 'static) -> Pipeline {
        self.add_processor(move |text: String| keeps(&text).then_some(text))
    }

    /// The text behind all steps, or `None` where one drops it.
    pub fn process(&self, text: String) -> Option<String> {
        self.0.iter().try_fold(text, |text, step| step.process(text))
    }
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
        let clean = |text: String, rules: &Clean| Pipeline::of(rules).process(text);
        let rules =
            Clean { remove_html: true, normalize_whitespace: true, min_chars: 3, near_duplicates: None };
        assert_eq!(clean(" a <i> b".into(), &rules).as_deref(), Some("a b"));
        assert_eq!(clean("<p>äö</p>".into(), &rules), None);
        assert_eq!(clean("<p>äöü</p>".into(), &rules).as_deref(), Some("äöü"));
        assert_eq!(clean(" \n".into(), &Clean::default()), None);
        assert_eq!(clean(" as it is\n".into(), &Clean::default()).as_deref(), Some(" as it is\n"));
    }
}
