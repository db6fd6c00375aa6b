//! Splits what a process prints into lines, as somebody at a terminal would read them in the end. Pure.

/// Bytes of one line. What is longer becomes several lines: nothing is cut off.
pub const LINE_MAX: usize = 1 << 20;

/// Bytes in, lines out. A carriage return goes back to the beginning of the line: what is written over counts for nothing, also not for
/// the limit, so that of a progress bar only its last state is left.
#[derive(Debug)]
pub struct LineSplitter {
    line: Vec<u8>,
    /// The next byte begins the line anew.
    returned: bool,
    max: usize,
}

impl Default for LineSplitter {
    fn default() -> Self {
        LineSplitter::new(LINE_MAX)
    }
}

impl LineSplitter {
    /// Lines of at most `max` bytes.
    pub fn new(max: usize) -> LineSplitter {
        LineSplitter { line: Vec::new(), returned: false, max: max.max(4) }
    }

    /// The lines that these bytes complete. What is not UTF-8 is replaced, as `String::from_utf8_lossy` does.
    pub fn push(&mut self, bytes: &[u8]) -> Vec<String> {
        let mut lines = Vec::new();
        for piece in bytes.split_inclusive(|byte| matches!(byte, b'\n' | b'\r')) {
            let (text, end) = match piece {
                [text @ .., end @ (b'\n' | b'\r')] => (text, Some(*end)),
                text => (text, None),
            };
            self.append(text, &mut lines);
            match end {
                Some(b'\n') => {
                    lines.push(self.take(self.line.len()));
                    self.returned = false;
                }
                Some(_) => self.returned = true,
                None => {}
            }
        }
        lines
    }

    /// The last line, if it had no end.
    pub fn finish(&mut self) -> Option<String> {
        (!self.line.is_empty()).then(|| self.take(self.line.len()))
    }

    fn append(&mut self, mut text: &[u8], lines: &mut Vec<String>) {
        if text.is_empty() {
            return;
        }
        if std::mem::take(&mut self.returned) {
            self.line.clear();
        }
        while self.line.len() + text.len() > self.max {
            let (now, later) = text.split_at(self.max - self.line.len());
            self.line.extend_from_slice(now);
            lines.push(self.take(whole_characters(&self.line)));
            text = later;
        }
        self.line.extend_from_slice(text);
    }

    fn take(&mut self, bytes: usize) -> String {
        let rest = self.line.split_off(bytes);
        let line = String::from_utf8_lossy(&self.line).into_owned();
        self.line = rest;
        line
    }
}

/// The text in pieces of at most `max` bytes, cut between characters; one piece where it is empty.
pub fn pieces(mut text: &str, max: usize) -> Vec<&str> {
    let mut pieces = Vec::new();
    while text.len() > max {
        let (piece, rest) = text.split_at(text.floor_char_boundary(max.max(4)));
        pieces.push(piece);
        text = rest;
    }
    pieces.push(text);
    pieces
}

/// How many bytes there are without a character at the end whose rest is still to come.
fn whole_characters(bytes: &[u8]) -> usize {
    let last = bytes.utf8_chunks().last().map_or(&[][..], |chunk| chunk.invalid());
    // Within a character one byte to three of it can be missing; what is never a character stays.
    let unfinished =
        !last.is_empty() && std::str::from_utf8(last).is_err_and(|error| error.error_len().is_none());
    if unfinished { bytes.len() - last.len() } else { bytes.len() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn split(max: usize, bytes: &[u8]) -> Vec<String> {
        let mut splitter = LineSplitter::new(max);
        let mut lines = splitter.push(bytes);
        lines.extend(splitter.finish());
        lines
    }

    #[test]
    fn lines_are_put_together_from_what_comes() {
        let mut splitter = LineSplitter::default();
        assert_eq!(splitter.push(b"one\ntw"), ["one"]);
        assert_eq!(splitter.push(b"o\r\n\nthree"), ["two", ""]);
        assert_eq!(splitter.finish().as_deref(), Some("three"));
        assert_eq!(splitter.finish(), None);
    }

    #[test]
    fn of_a_line_that_is_written_over_the_last_state_counts() {
        assert_eq!(split(99, b"50%\r100%\rdone"), ["done"]);
        assert_eq!(split(99, b"50%\r100%\r\nError"), ["100%", "Error"]);
        assert_eq!(split(99, b"50%\r\r\r\n"), ["50%"]);
        assert_eq!(split(99, b"\r 1%\r 2%\rFATAL: no disk\n"), ["FATAL: no disk"]);
        let mut bar = LineSplitter::new(99);
        (0..1000)
            .for_each(|n| assert!(bar.push(format!("\r{n:4} of 1000 [######    ]").as_bytes()).is_empty()));
        assert!(bar.line.len() < 99);
        assert_eq!(bar.push(b"\rFATAL\n"), ["FATAL"]);
        assert_eq!(bar.push(b"\rx\n"), ["x"], "and nothing is left of it");
    }

    #[test]
    fn a_long_line_becomes_several_and_loses_nothing() {
        assert_eq!(split(4, b"abcdefghij\nxyzw\n"), ["abcd", "efgh", "ij", "xyzw"]);
        assert_eq!(split(4, "aaüü🚀b\n".as_bytes()), ["aaü", "ü", "🚀", "b"]);
        assert_eq!(
            split(4, b"aaa\xffb\n"),
            ["aaa\u{fffd}", "b"],
            "what is no text is no part of a character"
        );
        assert_eq!(split(4, b"abcd\rxy\n"), ["xy"], "a full line may still be written over");
    }

    #[test]
    fn pieces_are_cut_between_characters() {
        assert_eq!(pieces("", 4), [""]);
        assert_eq!(pieces("abcd", 4), ["abcd"]);
        assert_eq!(pieces("aaüü🚀b", 4), ["aaü", "ü", "🚀", "b"]);
    }

    proptest! {
        #[test]
        fn it_does_not_matter_how_the_bytes_arrive(
            bytes in prop::collection::vec(prop_oneof![Just(b'\n'), Just(b'\r'), Just(0xc3), Just(0xbc), 0x61u8..0x7b], 0..300),
            cuts in prop::collection::vec(0usize..300, 0..6),
        ) {
            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(bytes.len())).chain([0, bytes.len()]).collect();
            cuts.sort();
            let mut pieces = LineSplitter::new(7);
            let mut seen: Vec<String> = cuts.windows(2).flat_map(|cut| pieces.push(&bytes[cut[0]..cut[1]])).collect();
            seen.extend(pieces.finish());
            prop_assert_eq!(seen, split(7, &bytes));
        }

        #[test]
        fn without_carriage_returns_every_character_comes_out(text in "[a-zü🚀\n]{0,300}") {
            prop_assert_eq!(split(5, text.as_bytes()).concat(), text.replace('\n', ""));
            prop_assert_eq!(pieces(&text, 5).into_iter().collect::<String>(), text);
        }
    }
}
