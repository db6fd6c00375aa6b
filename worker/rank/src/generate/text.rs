//! Tokens to text as they come: only whole characters are given out.

use tokenizers::Tokenizer;

/// Turns a growing list of tokens into pieces of valid UTF-8.
pub struct TextStream<'a> {
    tokenizer: &'a Tokenizer,
    ids: Vec<u32>,
    given: usize,
}

impl<'a> TextStream<'a> {
    pub fn new(tokenizer: &'a Tokenizer) -> Self {
        Self { tokenizer, ids: Vec::new(), given: 0 }
    }

    /// What the new token adds, without a character that is still incomplete.
    pub fn push(&mut self, id: u32) -> tokenizers::Result<String> {
        self.ids.push(id);
        let text = self.tokenizer.decode(&self.ids, true)?;
        Ok(self.give(text.trim_end_matches('\u{fffd}')))
    }

    /// What is left; bytes that never became a character appear as U+FFFD.
    pub fn finish(mut self) -> tokenizers::Result<String> {
        let text = self.tokenizer.decode(&self.ids, true)?;
        Ok(self.give(&text))
    }

    fn give(&mut self, text: &str) -> String {
        let new = text.get(self.given..).unwrap_or_default().to_owned();
        self.given += new.len();
        new
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// Each byte a token of its own.
    fn bytes() -> Tokenizer {
        let mut letters: Vec<char> =
            tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet().into_iter().collect();
        letters.sort();
        let vocab: serde_json::Map<_, _> =
            letters.iter().zip(0..).map(|(c, i)| (c.to_string(), json!(i))).collect();
        let level =
            json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
        let model = json!({"type": "BPE", "vocab": vocab, "merges": []});
        let json = json!({"version": "1.0", "added_tokens": [], "pre_tokenizer": level, "decoder": level, "model": model});
        Tokenizer::from_bytes(json.to_string()).unwrap()
    }

    #[test]
    fn characters_come_whole_and_nothing_is_lost() {
        let tokenizer = bytes();
        let text = "a\u{e4}\u{20ac}\u{1f600}z";
        let ids = tokenizer.encode(text, false).unwrap().get_ids().to_vec();
        assert_eq!(ids.len(), text.len());
        let mut stream = TextStream::new(&tokenizer);
        let pieces: Vec<String> = ids.iter().map(|id| stream.push(*id).unwrap()).collect();
        assert!(pieces.iter().all(|piece| !piece.contains('\u{fffd}')));
        assert_eq!(pieces.concat() + &stream.finish().unwrap(), text);
    }

    #[test]
    fn a_character_that_never_ends_is_shown_as_such() {
        let tokenizer = bytes();
        let ids = tokenizer.encode("\u{20ac}", false).unwrap().get_ids().to_vec();
        let mut stream = TextStream::new(&tokenizer);
        assert_eq!(stream.push(ids[0]).unwrap(), "");
        assert!(stream.finish().unwrap().starts_with('\u{fffd}'));
    }
}
