//! Texts on their way out, in the order of their prompts however they come.

use fleet_rank::generate::{Generated, Said};
use std::collections::BTreeMap;
use std::io::{Result, Write};

/// Characters of a prompt that stand before its text, where there are several.
const TITLE: usize = 60;

/// The first text that is not whole goes out as it is written; what comes of those behind it waits.
pub struct Texts<'a, W> {
    /// What was asked for each.
    asked: &'a [&'a str],
    /// One object a line, of whole texts, instead of the texts.
    json: bool,
    out: W,
    /// The one that goes out.
    now: usize,
    waiting: BTreeMap<usize, Waiting>,
    /// How writing went.
    pub written: Result<()>,
}

#[derive(Default)]
struct Waiting {
    text: String,
    whole: Option<Generated>,
}

impl<'a, W: Write> Texts<'a, W> {
    pub fn new(asked: &'a [&'a str], json: bool, out: W) -> Texts<'a, W> {
        let mut texts = Texts { asked, json, out, now: 0, waiting: BTreeMap::new(), written: Ok(()) };
        texts.written = texts.begin();
        texts
    }

    /// Whether more is wanted: nobody may read any longer.
    pub fn take(&mut self, number: usize, said: Said) -> bool {
        let waiting = self.waiting.entry(number).or_default();
        match said {
            Said::Piece(piece) => waiting.text.push_str(piece),
            Said::Whole(whole) => waiting.whole = Some(whole),
        }
        if number == self.now && self.written.is_ok() {
            self.written = self.write();
        }
        self.written.is_ok()
    }

    /// Writes all that need not wait.
    fn write(&mut self) -> Result<()> {
        while let Some(Waiting { text, whole }) = self.waiting.get_mut(&self.now) {
            if !self.json && !text.is_empty() {
                self.out.write_all(std::mem::take(text).as_bytes())?;
            }
            let Some(whole) = whole.take() else { break };
            self.waiting.remove(&self.now);
            let line = if self.json { line(self.asked[self.now], &whole) } else { String::new() };
            writeln!(self.out, "{line}")?;
            for note in whole.notes {
                eprintln!("warning: {note}");
            }
            self.now += 1;
            self.begin()?;
        }
        self.out.flush()
    }

    fn begin(&mut self) -> Result<()> {
        match self.asked.get(self.now) {
            Some(asked) if !self.json && self.asked.len() > 1 => {
                writeln!(self.out, "==> {} <==", short(asked))?;
                self.out.flush()
            }
            _ => Ok(()),
        }
    }
}

fn short(text: &str) -> String {
    let line: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    match line.char_indices().nth(TITLE) {
        Some((end, _)) => format!("{} ...", &line[..end]),
        None => line,
    }
}

fn line(prompt: &str, generated: &Generated) -> String {
    #[derive(serde::Serialize)]
    struct Line<'a> {
        prompt: &'a str,
        #[serde(flatten)]
        generated: &'a Generated,
    }
    serde_json::json!(Line { prompt, generated }).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use fleet_rank::generate::End;

    fn whole(text: &str) -> Said<'static> {
        Said::Whole(Generated {
            text: text.into(),
            prompt_tokens: 1,
            new_tokens: 1,
            end: End::EndOfText,
            tokens_per_s: 1.0,
            notes: Vec::new(),
        })
    }

    #[test]
    fn texts_come_in_the_order_of_their_prompts_and_the_first_at_once() {
        let mut out = Vec::new();
        let mut texts = Texts::new(&["a", "b\nb", "c"], false, &mut out);
        assert!(texts.take(1, Said::Piece("two ")) && texts.take(0, Said::Piece("one")));
        assert_eq!(String::from_utf8_lossy(texts.out), "==> a <==\none");
        assert!(texts.take(2, Said::Piece("three")) && texts.take(2, whole("three")));
        assert!(texts.take(0, whole("one")));
        assert_eq!(String::from_utf8_lossy(texts.out), "==> a <==\none\n==> b b <==\ntwo ");
        assert!(texts.take(1, Said::Piece("more")) && texts.take(1, whole("two more")));
        assert!(texts.waiting.is_empty());
        let all = "==> a <==\none\n==> b b <==\ntwo more\n==> c <==\nthree\n";
        assert_eq!(String::from_utf8_lossy(&out), all);
    }

    #[test]
    fn one_alone_has_no_title_and_json_has_a_line_for_each() {
        let mut out = Vec::new();
        let mut texts = Texts::new(&["a"], false, &mut out);
        texts.take(0, Said::Piece("one"));
        texts.take(0, whole("one"));
        assert_eq!(String::from_utf8_lossy(&out), "one\n");
        let mut out = Vec::new();
        let mut texts = Texts::new(&["a", "b"], true, &mut out);
        texts.take(1, Said::Piece("two"));
        texts.take(1, whole("two"));
        texts.take(0, whole("one"));
        let lines = String::from_utf8(out).unwrap();
        let lines: Vec<serde_json::Value> =
            lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(
            (&lines[0]["prompt"], &lines[0]["text"], &lines[1]["text"]),
            (&"a".into(), &"one".into(), &"two".into())
        );
    }

    /// A pipe that nobody reads.
    struct Gone;

    impl Write for Gone {
        fn write(&mut self, _: &[u8]) -> Result<usize> {
            Err(std::io::ErrorKind::BrokenPipe.into())
        }
        fn flush(&mut self) -> Result<()> {
            Ok(())
        }
    }

    #[test]
    fn where_nobody_reads_no_more_is_wanted() {
        let mut texts = Texts::new(&["a"], false, Gone);
        assert!(!texts.take(0, Said::Piece("one")));
        assert!(texts.written.is_err());
    }
}
