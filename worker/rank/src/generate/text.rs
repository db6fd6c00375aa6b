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
    use tokenizers::decoders::byte_level::ByteLevel;
    use tokenizers::models::bpe::BPE;

    /// Each byte a token of its own.
    fn bytes() -> Tokenizer {
        let alphabet = tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet();
        let mut letters: Vec<char> = alphabet.into_iter().collect();
        letters.sort();
        let vocab = letters.iter().enumerate().map(|(i, c)| (c.to_string(), i as u32)).collect();
        let model = BPE::builder().vocab_and_merges::<ahash_map::Map, _>(vocab, vec![]).build().unwrap();
        let mut tokenizer = Tokenizer::new(model);
        tokenizer.with_pre_tokenizer(Some(tokenizers::pre_tokenizers::byte_level::ByteLevel::new(false, true, false)));
        tokenizer.with_decoder(Some(ByteLevel::default()));
        tokenizer
    }

    mod ahash_map {
        pub type Map = std::collections::HashMap<String, u32>;
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
