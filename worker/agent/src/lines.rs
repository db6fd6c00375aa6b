//! Splits what a process prints into lines of bounded length. Pure.

use crate::gang::LINE_MAX;

/// Bytes in, whole lines out. A line longer than the limit is cut there, its rest is skipped.
#[derive(Debug, Default)]
pub struct LineSplitter {
    partial: Vec<u8>,
    skipping: bool,
}

impl LineSplitter {
    /// The lines that these bytes complete.
    pub fn push(&mut self, bytes: &[u8]) -> Vec<String> {
        let mut lines = Vec::new();
        let mut rest = bytes;
        while let Some(end) = rest.iter().position(|&byte| byte == b'\n') {
            self.append(&rest[..end], &mut lines);
            if !self.skipping {
                lines.push(text(&self.partial));
            }
            self.partial.clear();
            self.skipping = false;
            rest = &rest[end + 1..];
        }
        self.append(rest, &mut lines);
        lines
    }

    /// The last line, if it had no end.
    pub fn finish(&mut self) -> Option<String> {
        let partial = std::mem::take(&mut self.partial);
        (!partial.is_empty() && !std::mem::take(&mut self.skipping)).then(|| text(&partial))
    }

    fn append(&mut self, bytes: &[u8], lines: &mut Vec<String>) {
        if self.skipping {
            return;
        }
        let room = LINE_MAX - self.partial.len();
        self.partial.extend_from_slice(&bytes[..bytes.len().min(room)]);
        if bytes.len() > room {
            lines.push(format!("{} [cut]", text(&self.partial)));
            self.skipping = true;
        }
    }
}

/// Progress bars rewrite a line with carriage returns: what stands there last counts.
fn text(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let text = text.trim_end_matches('\r');
    text.rsplit('\r').next().unwrap_or(text).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn lines_are_put_together_and_long_ones_cut() {
        let mut splitter = LineSplitter::default();
        assert_eq!(splitter.push(b"one\ntw"), ["one"]);
        assert_eq!(splitter.push(b"o\r\n\n 10%\r 20%\r\n"), ["two", "", " 20%"]);
        let long = vec![b'x'; LINE_MAX + 5];
        let cut = splitter.push(&long);
        assert_eq!(cut.len(), 1);
        assert!(cut[0].starts_with("xxx") && cut[0].ends_with(" [cut]") && cut[0].len() == LINE_MAX + 6);
        assert_eq!(splitter.push(b"the rest\nnext"), Vec::<String>::new());
        assert_eq!(splitter.finish().as_deref(), Some("next"));
        assert_eq!(splitter.finish(), None);
    }

    proptest! {
        #[test]
        fn it_does_not_matter_how_the_bytes_arrive(text in "[a-z\n]{0,300}", cuts in prop::collection::vec(0usize..300, 0..6)) {
            let mut whole = LineSplitter::default();
            let mut expected = whole.push(text.as_bytes());
            expected.extend(whole.finish());
            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(text.len())).chain([0, text.len()]).collect();
            cuts.sort();
            let mut pieces = LineSplitter::default();
            let mut seen: Vec<String> = cuts.windows(2).flat_map(|cut| pieces.push(&text.as_bytes()[cut[0]..cut[1]])).collect();
            seen.extend(pieces.finish());
            prop_assert_eq!(seen, expected);
        }
    }
}
