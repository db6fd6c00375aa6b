//! Tokens to text as they come. The pieces together are what the prompt and the new tokens, decoded at once, have beyond the prompt.
//!
//! A piece is decoded behind the tokens before it, because decoders treat the beginning of a text in their own way: those of SentencePiece
//! drop a space there. Bytes at the end that are no character, as of one that is cut where the last token is, are left out. Only the last piece is kept for that, so the work grows with the text and not with its square.

use std::collections::HashSet;
use tokenizers::Tokenizer;

/// Tokens are given out as they are, even if no character is complete, when this many wait.
const HELD_MAX: usize = 256;

/// A character has at most four bytes, so no more tokens than this can be the beginning of one.
const INCOMPLETE_MAX: usize = 3;

/// Turns a growing list of tokens into pieces of valid UTF-8.
pub struct TextStream<'a> {
    tokenizer: &'a Tokenizer,
    /// Not part of the text.
    special: HashSet<u32>,
    /// The tokenizer has a token for each byte, and decodes a run of them all or not at all.
    byte_fallback: bool,
    /// The last tokens that were given out, and behind them those that wait.
    window: Vec<u32>,
    settled: usize,
    /// The text of the settled ones.
    given: String,
}

impl<'a> TextStream<'a> {
    pub fn new(tokenizer: &'a Tokenizer, prompt: &[u32]) -> tokenizers::Result<Self> {
        let added = tokenizer.get_added_tokens_decoder();
        let decoder = tokenizer.get_decoder().map(serde_json::to_string).transpose()?;
        let mut stream = Self {
            tokenizer,
            special: added.iter().filter(|(_, token)| token.special).map(|(id, _)| *id).collect(),
            byte_fallback: decoder.is_some_and(|json| json.contains(r#""ByteFallback""#)),
            window: Vec::new(),
            settled: 0,
            given: String::new(),
        };
        stream.window = prompt.iter().copied().filter(|id| stream.is_text(*id)).collect();
        stream.settled = stream.window.len();
        stream.given = stream.decode(&stream.window)?;
        Ok(stream)
    }

    /// What the new token adds, without a character that is still incomplete.
    pub fn push(&mut self, id: u32) -> tokenizers::Result<String> {
        if !self.is_text(id) {
            return Ok(String::new());
        }
        self.window.push(id);
        let text = self.decode(&self.window)?;
        let waits = text.ends_with('\u{fffd}') || self.is_byte(id);
        match waits {
            false => self.settle(self.window.len(), text),
            true if self.window.len() - self.settled < HELD_MAX => Ok(String::new()),
            true => self.settle_what_is_whole(text),
        }
    }

    /// What is left, without bytes at its end of which no character came: a text never ends within one.
    pub fn finish(mut self) -> tokenizers::Result<String> {
        for end in (self.settled..=self.window.len()).rev() {
            let text = self.decode(&self.window[..end])?;
            if !text.ends_with('\u{fffd}') {
                return self.settle(end, text);
            }
        }
        Ok(String::new())
    }

    /// Gives out as much as may be without cutting a character whose rest may still come.
    fn settle_what_is_whole(&mut self, text: String) -> tokenizers::Result<String> {
        let all = self.window.len();
        for end in (all - INCOMPLETE_MAX..all).rev() {
            let whole = self.decode(&self.window[..end])?;
            if !whole.ends_with('\u{fffd}') {
                return self.settle(end, whole);
            }
        }
        self.settle(all, text)
    }

    /// Gives out what `text`, that of the first `end` tokens of the window, has beyond what was given.
    fn settle(&mut self, end: usize, text: String) -> tokenizers::Result<String> {
        let new = match text.strip_prefix(&self.given) {
            Some(new) => new.to_owned(),
            // Bytes that no character came of have spoilt those that had been given out before them.
            None => self.decode(&self.window[self.settled..end])?,
        };
        let last = self.decode(&self.window[self.settled..end])?;
        if last.is_empty() {
            // Nothing to see: the next piece would begin a text behind these alone.
            (self.settled, self.given) = (end, text);
        } else {
            self.window.drain(..self.settled);
            (self.settled, self.given) = (end - self.settled, last);
        }
        Ok(new)
    }

    fn decode(&self, ids: &[u32]) -> tokenizers::Result<String> {
        fleet_data::decode(self.tokenizer, ids, false)
    }

    fn is_text(&self, id: u32) -> bool {
        !self.special.contains(&id) && self.tokenizer.id_to_token(id).is_some()
    }

    fn is_byte(&self, id: u32) -> bool {
        let is_byte = |token: String| token.len() == 6 && token.starts_with("<0x") && token.ends_with('>');
        self.byte_fallback && self.tokenizer.id_to_token(id).is_some_and(is_byte)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn tokenizer(json: Value) -> Tokenizer {
        Tokenizer::from_bytes(json.to_string()).unwrap()
    }

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
        tokenizer(
            json!({"version": "1.0", "added_tokens": [], "pre_tokenizer": level, "decoder": level, "model": model}),
        )
    }

    /// As Llama 2 has it: ids 0 to 2 are special, the bytes follow, then pieces.
    fn sentence_piece() -> Tokenizer {
        let special = |id: u32, content: &str| {
            json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
                "special": true})
        };
        let names = ["<unk>", "<s>", "</s>"].map(str::to_owned).into_iter();
        let bytes = (0..256).map(|byte| format!("<0x{byte:02X}>"));
        let pieces = ["\u{2581}", "\u{2581}the", "\u{2581}cat", "s", "\u{20ac}", "."].map(str::to_owned);
        let vocab: serde_json::Map<_, _> =
            names.chain(bytes).chain(pieces).zip(0..).map(|(token, id)| (token, json!(id))).collect();
        tokenizer(json!({
            "version": "1.0",
            "added_tokens": [special(0, "<unk>"), special(1, "<s>"), special(2, "</s>")],
            "pre_tokenizer": {"type": "Metaspace", "replacement": "\u{2581}", "prepend_scheme": "first", "split": false},
            "decoder": {"type": "Sequence", "decoders": [
                {"type": "Replace", "pattern": {"String": "\u{2581}"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
            "model": {"type": "BPE", "vocab": vocab, "merges": [], "byte_fallback": true, "unk_token": "<unk>", "fuse_unk": true},
        }))
    }

    const THE: u32 = 260;

    /// The pieces of `ids` after `prompt`, which together are what decoding all at once gives beyond the prompt.
    fn pieces(tokenizer: &Tokenizer, prompt: &[u32], ids: &[u32]) -> Vec<String> {
        let mut stream = TextStream::new(tokenizer, prompt).unwrap();
        let mut pieces: Vec<String> = ids.iter().map(|id| stream.push(*id).unwrap()).collect();
        pieces.push(stream.finish().unwrap());
        let mut wholes =
            (0..=ids.len()).rev().map(|end| tokenizer.decode(&[prompt, &ids[..end]].concat(), true).unwrap());
        let whole = wholes.find(|text| !text.ends_with('\u{fffd}')).unwrap();
        let before = tokenizer.decode(prompt, true).unwrap();
        assert_eq!(Some(pieces.concat().as_str()), whole.strip_prefix(&before), "{prompt:?} {ids:?}");
        pieces
    }

    #[test]
    fn characters_come_whole_and_nothing_is_lost() {
        let tokenizer = bytes();
        let text = "a\u{e4}\u{20ac}\u{1f600}z";
        let ids = tokenizer.encode(text, false).unwrap().get_ids().to_vec();
        assert_eq!(ids.len(), text.len());
        let pieces = pieces(&tokenizer, &[], &ids);
        assert!(pieces.iter().all(|piece| !piece.contains('\u{fffd}')));
        assert_eq!(pieces.concat(), text);
    }

    #[test]
    fn a_text_never_ends_within_a_character() {
        let tokenizer = bytes();
        let ids = tokenizer.encode("z\u{20ac}z", false).unwrap().get_ids().to_vec();
        assert_eq!(pieces(&tokenizer, &[], &ids[..3]), ["z", "", "", ""]);
        let broken = [&ids[..3], &ids[4..]].concat();
        assert_eq!(pieces(&tokenizer, &[], &broken)[3], "\u{fffd}z", "within a text it is shown");
        let tokenizer = sentence_piece();
        let euros: Vec<u32> = "\u{20ac}\u{20ac}".bytes().map(|byte| 3 + u32::from(byte)).collect();
        assert_eq!(
            pieces(&tokenizer, &[THE], &euros[..5])[5],
            "\u{20ac}",
            "nor does a cut one spoil those before it"
        );
    }

    #[test]
    fn a_space_at_the_seam_of_prompt_and_text_is_kept() {
        let tokenizer = sentence_piece();
        let (space, the, cat, s) = (THE - 1, THE, THE + 1, THE + 2);
        assert_eq!(pieces(&tokenizer, &[1, the], &[cat, s, the])[..3], [" cat", "s", " the"]);
        assert_eq!(pieces(&tokenizer, &[1], &[the, cat])[..2], ["the", " cat"], "a text begins without one");
        assert_eq!(pieces(&tokenizer, &[], &[space, the])[..2], ["", " the"]);
        assert_eq!(pieces(&tokenizer, &[the], &[space, space, the])[..3], [" ", " ", " the"]);
        assert_eq!(
            pieces(&tokenizer, &[the], &[2, 1, the])[..3],
            ["", "", " the"],
            "special tokens are no text"
        );
        assert_eq!(
            pieces(&tokenizer, &[the], &[9999, the])[..2],
            ["", " the"],
            "nor are ids beyond the tokenizer"
        );
    }

    #[test]
    fn a_run_of_bytes_waits_until_it_ends() {
        let tokenizer = sentence_piece();
        let byte = |byte: u8| 3 + u32::from(byte);
        let euro: Vec<u32> = "\u{20ac}".bytes().map(byte).collect();
        let with = |more: &[u32]| pieces(&tokenizer, &[THE], &[&euro, more].concat());
        assert_eq!(with(&[THE])[3], "\u{20ac} the");
        assert_eq!(with(&[])[3], "\u{20ac}");
        assert_eq!(with(&[byte(0xff), THE])[4], "\u{fffd}\u{fffd}\u{fffd}\u{fffd} the", "one spoils the run");
        assert_eq!(with(&euro)[6], "\u{20ac}\u{20ac}");
    }

    #[test]
    fn any_tokens_come_out_as_if_decoded_at_once() {
        // xorshift64
        let mut state = 0x2545_f491_4f6c_dd1d_u64;
        let mut below = |n: u32| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state % u64::from(n)) as u32
        };
        for (tokenizer, tokens, last) in [(bytes(), 256, 0), (sentence_piece(), THE + 8, THE)] {
            for _ in 0..200 {
                let mut ids = |n: u32| -> Vec<u32> {
                    // As often a piece as a byte.
                    (0..n)
                        .map(|_| if below(2) == 0 { tokens - 1 - below(9) } else { below(tokens) })
                        .collect()
                };
                let (prompt, new) = (ids(3), ids(40));
                // A prompt is text, so no character is cut at its end.
                pieces(&tokenizer, &[prompt, vec![last]].concat(), &new);
            }
        }
    }

    #[test]
    fn bytes_without_end_are_given_out_and_no_character_is_cut() {
        let tokenizer = sentence_piece();
        let euro: Vec<u32> = "\u{20ac}".bytes().map(|byte| 3 + u32::from(byte)).collect();
        let mut stream = TextStream::new(&tokenizer, &[THE]).unwrap();
        let given: String = euro.repeat(500).iter().map(|id| stream.push(*id).unwrap()).collect();
        assert!(given.chars().count() > 400 && given.chars().all(|c| c == '\u{20ac}'));
        assert_eq!(given + &stream.finish().unwrap(), "\u{20ac}".repeat(500));

        let mut stream = TextStream::new(&tokenizer, &[THE]).unwrap();
        let spoilt: String = (0..1000).map(|_| stream.push(3 + 0xff).unwrap()).collect();
        assert!(spoilt.chars().count() > 700 && stream.window.len() < 2 * HELD_MAX);
    }
}
