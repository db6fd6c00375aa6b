//! Strings at which a text ends. Pure.

/// Passes a text on piece by piece, up to the first of these strings. What may be the beginning of one waits.
pub struct StopStrings<'a> {
    stops: Vec<&'a str>,
    held: String,
    has_ended: bool,
}

impl<'a> StopStrings<'a> {
    /// Empty strings end nothing.
    pub fn new(stops: impl IntoIterator<Item = &'a str>) -> StopStrings<'a> {
        let stops = stops.into_iter().filter(|stop| !stop.is_empty()).collect();
        StopStrings { stops, held: String::new(), has_ended: false }
    }

    /// What may be given out, and the string at which the text has ended.
    pub fn push(&mut self, piece: &str) -> (String, Option<&'a str>) {
        if self.has_ended {
            return (String::new(), None);
        }
        self.held.push_str(piece);
        let found = self.stops.iter().filter_map(|stop| Some((self.held.find(stop)?, *stop)));
        // Of two at one place the longer one.
        if let Some((at, stop)) = found.min_by_key(|(at, stop)| (*at, std::cmp::Reverse(stop.len()))) {
            self.held.truncate(at);
            self.has_ended = true;
            return (std::mem::take(&mut self.held), Some(stop));
        }
        let waits = self.held.len() - self.beginning();
        let rest = self.held.split_off(waits);
        (std::mem::replace(&mut self.held, rest), None)
    }

    /// The last piece, with what waited; nothing where the text has ended before.
    pub fn finish(mut self, piece: &str) -> (String, Option<&'a str>) {
        let (mut out, stop) = self.push(piece);
        out.push_str(&self.held);
        (out, stop)
    }

    /// Bytes at the end of what is held with which one of the strings begins.
    fn beginning(&self) -> usize {
        let most = self.stops.iter().map(|stop| stop.len() - 1).max().unwrap_or(0).min(self.held.len());
        let first = self.held.len() - most;
        let mut starts = (first..self.held.len()).filter(|at| self.held.is_char_boundary(*at));
        let begins = |at: &usize| self.stops.iter().any(|stop| stop.starts_with(&self.held[*at..]));
        starts.find(begins).map_or(0, |at| self.held.len() - at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is given out at each piece, with the rest at the end, and where it ended.
    fn given<'a>(stops: &[&'a str], pieces: &[&str]) -> (Vec<String>, Option<&'a str>) {
        let mut stream = StopStrings::new(stops.iter().copied());
        let mut all = Vec::new();
        for piece in pieces {
            let (out, end) = stream.push(piece);
            all.push(out);
            if end.is_some() {
                return (all, end);
            }
        }
        all.push(stream.finish("").0);
        (all, None)
    }

    #[test]
    fn a_text_is_cut_before_a_string_that_spans_pieces() {
        assert_eq!(
            given(&["END"], &["a E", "N", "D b"]),
            (vec!["a ".into(), "".into(), "".into()], Some("END"))
        );
        assert_eq!(given(&["END"], &["a E", "N", "x"]).0, ["a ", "", "ENx", ""]);
        assert_eq!(given(&["END"], &["EEN", "D"]).0, ["E", ""], "it may begin within a beginning");
        assert_eq!(given(&["\u{20ac}\u{20ac}"], &["a\u{20ac}", "b"]).0, ["a", "\u{20ac}b", ""]);
        assert_eq!(given(&["END"], &["a EN"]).0, ["a ", "EN"], "what waited is not lost");
    }

    #[test]
    fn the_first_of_several_ends_it_and_none_changes_nothing() {
        assert_eq!(given(&["bc", "b", "a"], &["xabc"]), (vec!["x".into()], Some("a")));
        assert_eq!(given(&["b", "bc"], &["xbc"]).1, Some("bc"));
        assert_eq!(given(&[], &["a", "b"]).0, ["a", "b", ""]);
        assert_eq!(given(&[""], &["a"]).0, ["a", ""]);
    }

    #[test]
    fn however_a_text_is_cut_into_pieces_the_same_comes_out() {
        let text = "aababcabcdababcd";
        for stop in ["abcd", "bab", "d", "zz", "aabab"] {
            let whole = text.find(stop).map_or(text, |at| &text[..at]);
            for size in 1..text.len() {
                let pieces: Vec<&str> =
                    text.as_bytes().chunks(size).map(|piece| std::str::from_utf8(piece).unwrap()).collect();
                assert_eq!(given(&[stop], &pieces).0.concat(), whole, "{stop} in pieces of {size}");
            }
        }
    }
}
