//! How much of the data a given tokenizer can say. One without an unknown token and without bytes to fall back to drops what it has
//! no token for, and then every figure looks better than it is: a text is compared with what its tokens decode to.

use crate::{DataError, Note};
use fleet_common::events::Level;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use tokenizers::{NormalizedString, Normalizer, Tokenizer};

/// A tokenizer that drops more of the bytes than this is refused.
const DROPPED_MAX: f64 = 0.01;

/// Unknown tokens are seen by the model, so more of them may stand in the data; beyond this it is the wrong tokenizer.
const UNKNOWN_MAX: f64 = 0.5;

/// From this share on, changed characters and missing white space are worth a word.
const TOLD_MIN: f64 = 0.01;

/// Characters that a message shows.
const EXAMPLES: usize = 3;

/// Bytes of texts, and those of them that their tokens do not say.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Coverage {
    pub text_bytes: u64,
    /// Of visible characters that are dropped, or stand as unknown tokens.
    pub lost_bytes: u64,
    pub unknown_tokens: u64,
    /// Of white space that is no part of any token.
    pub white_bytes: u64,
    /// Of characters that stand as others, such as small ones for capitals.
    pub changed_bytes: u64,
    /// Some of the lost and of the changed characters, the most frequent first.
    pub lost_examples: String,
    pub changed_examples: String,
}

impl Coverage {
    /// Of a tokenizer that can say everything.
    pub fn whole(texts: &[&str]) -> Coverage {
        Coverage { text_bytes: texts.iter().map(|text| text.len() as u64).sum(), ..Coverage::default() }
    }

    /// Compares each text with its `ids`, which have nothing around them that the text has not; `unknown` is what stands for what the tokenizer
    /// does not know. Characters count as the same however they are composed, where the tokenizer composes or decomposes them.
    pub fn measure<I: AsRef<[u32]> + Sync>(
        tokenizer: &Tokenizer,
        unknown: Option<u32>,
        texts: &[&str],
        ids: &[I],
    ) -> Result<Coverage, DataError> {
        let decode = |ids: &[u32]| {
            let known: Vec<u32> = ids.iter().copied().filter(|&id| Some(id) != unknown).collect();
            crate::decode(tokenizer, &known, false).map_err(cannot)
        };
        let one = |mut tally: Tally, (text, ids): (&&str, &I)| {
            let said = decode(ids.as_ref())?;
            match tokenizer.get_normalizer() {
                None => tally.compare(text, &said),
                Some(normalizer) => {
                    let mut normal = NormalizedString::from(*text);
                    normalizer.normalize(&mut normal).map_err(cannot)?;
                    let composed = composed(text);
                    match self::composed(normal.get()) == composed {
                        true => tally.compare(normal.get(), &said),
                        false => tally.compare(&composed, &self::composed(&said)),
                    }
                }
            }
            Ok(tally)
        };
        let tally = texts
            .par_iter()
            .zip(ids)
            .try_fold(Tally::default, one)
            .try_reduce(Tally::default, |a, b| Ok(a.merge(b)))?;
        let all = ids.iter().flat_map(|ids| ids.as_ref());
        let unknown_tokens = all.filter(|&&id| Some(id) == unknown).count() as u64;
        let mut coverage = Coverage { unknown_tokens, ..tally.coverage(Coverage::whole(texts)) };
        for char in tally.lost_characters() {
            let alone = tokenizer.encode_fast(char.to_string(), false).map_err(cannot)?;
            let said = decode(alone.get_ids())?;
            let examples = match composed(&said).chars().any(|c| is_visible(c) && c != char) {
                true => &mut coverage.changed_examples,
                false => &mut coverage.lost_examples,
            };
            if examples.chars().count() < EXAMPLES {
                examples.push(char);
            }
        }
        Ok(coverage)
    }

    /// Of the texts of both together.
    pub fn and(&self, other: &Coverage) -> Coverage {
        let examples = |a: &str, b: &str| {
            let more = b.chars().filter(|&c| !a.contains(c));
            a.chars().chain(more).take(EXAMPLES).collect::<String>()
        };
        Coverage {
            text_bytes: self.text_bytes + other.text_bytes,
            lost_bytes: self.lost_bytes + other.lost_bytes,
            unknown_tokens: self.unknown_tokens + other.unknown_tokens,
            white_bytes: self.white_bytes + other.white_bytes,
            changed_bytes: self.changed_bytes + other.changed_bytes,
            lost_examples: examples(&self.lost_examples, &other.lost_examples),
            changed_examples: examples(&self.changed_examples, &other.changed_examples),
        }
    }

    /// Bytes of text that are in the tokens.
    pub fn said_bytes(&self) -> u64 {
        self.text_bytes.saturating_sub(self.lost_bytes + self.white_bytes)
    }

    fn share(&self, bytes: u64) -> f64 {
        bytes as f64 / self.text_bytes.max(1) as f64
    }

    /// Refuses a tokenizer that loses too much.
    pub fn check(&self) -> Result<(), DataError> {
        let share = self.share(self.lost_bytes);
        let (what, most) = match self.unknown_tokens {
            0 => ("drops", DROPPED_MAX),
            _ => ("does not know", UNKNOWN_MAX),
        };
        if share <= most {
            return Ok(());
        }
        Err(DataError::Vocabulary(format!(
            "the tokenizer {what} {} of the data{}; at most {} may be lost: choose a tokenizer with an unknown token or byte \
             fallback for this data (tokenizer.path), or data that it can write",
            percent(share),
            such_as(&self.lost_examples),
            percent(most)
        )))
    }

    /// What the user should know.
    pub fn notes(&self) -> Vec<Note> {
        let mut notes = Vec::new();
        let lost = self.share(self.lost_bytes);
        if self.lost_bytes > 0 {
            let how = match self.unknown_tokens {
                0 => "they are dropped".to_owned(),
                n => format!("{n} unknown tokens stand for them"),
            };
            notes.push(Note::warning(format!(
                "the tokenizer cannot write {} of the data, {} bytes{}: {how}, and bits per byte are of the rest",
                percent(lost),
                self.lost_bytes,
                such_as(&self.lost_examples)
            )));
        }
        if self.share(self.changed_bytes) > TOLD_MIN {
            notes.push(Note::warning(format!(
                "the tokenizer writes {} of the data as other characters{}: the model learns those",
                percent(self.share(self.changed_bytes)),
                such_as(&self.changed_examples)
            )));
        }
        if self.share(self.white_bytes) > TOLD_MIN {
            notes.push(Note {
                level: Level::Warn,
                line: format!(
                    "the tokenizer leaves out white space, {} of the data: bits per byte are of the rest",
                    percent(self.share(self.white_bytes))
                ),
            });
        }
        notes
    }
}

/// In the normal form in which a letter and its accents are one character.
fn composed(text: &str) -> String {
    let mut text = NormalizedString::from(text);
    text.nfc();
    text.get().to_owned()
}

impl Coverage {
    /// What whoever gave a prompt should know.
    pub fn prompt_note(&self) -> Option<String> {
        let how = match self.unknown_tokens {
            0 => "is dropped",
            _ => "stands as unknown tokens",
        };
        (self.lost_bytes > 0).then(|| {
            format!(
                "the tokenizer cannot write {} of the prompt{}: it {how}",
                percent(self.share(self.lost_bytes)),
                such_as(&self.lost_examples)
            )
        })
    }
}

fn cannot(error: tokenizers::Error) -> DataError {
    DataError::Vocabulary(format!("the tokenizer cannot decode what it encoded: {error}"))
}

fn percent(share: f64) -> String {
    match share * 100.0 {
        p if p >= 10.0 => format!("{p:.0} %"),
        p if p >= 0.01 => format!("{p:.2} %"),
        _ => "less than 0.01 %".to_owned(),
    }
}

fn such_as(examples: &str) -> String {
    let quoted: Vec<String> = examples.chars().map(|c| format!("`{}`", c.escape_debug())).collect();
    if quoted.is_empty() { String::new() } else { format!(" (such as {})", quoted.join(", ")) }
}

fn is_visible(c: char) -> bool {
    !c.is_whitespace() && c != char::REPLACEMENT_CHARACTER
}

/// How often each character stands in the texts, less how often in what their tokens say.
#[derive(Default)]
struct Tally {
    ascii: Ascii,
    other: HashMap<char, i64>,
}

struct Ascii([i64; 128]);

impl Default for Ascii {
    fn default() -> Ascii {
        Ascii([0; 128])
    }
}

impl Tally {
    fn compare(&mut self, text: &str, said: &str) {
        self.add(text, 1);
        self.add(said, -1);
    }

    fn add(&mut self, text: &str, by: i64) {
        for c in text.chars() {
            match self.ascii.0.get_mut(c as usize) {
                Some(count) => *count += by,
                None => *self.other.entry(c).or_default() += by,
            }
        }
    }

    fn merge(mut self, other: Tally) -> Tally {
        self.ascii.0.iter_mut().zip(other.ascii.0).for_each(|(a, b)| *a += b);
        other.other.into_iter().for_each(|(c, count)| *self.other.entry(c).or_default() += count);
        self
    }

    fn counts(&self) -> impl Iterator<Item = (char, i64)> {
        let ascii = self.ascii.0.iter().zip(0u8..).map(|(count, c)| (char::from(c), *count));
        ascii.chain(self.other.iter().map(|(c, count)| (*c, *count)))
    }

    /// Visible ones, the most frequent first.
    fn lost_characters(&self) -> Vec<char> {
        let mut lost: Vec<(char, i64)> = self.counts().filter(|&(c, n)| n > 0 && is_visible(c)).collect();
        lost.sort_by_key(|&(c, n)| (-n, c));
        lost.truncate(LOOKED_AT);
        lost.into_iter().map(|(c, _)| c).collect()
    }

    /// Fills in what is lost. A character that went while another one came is changed, not lost.
    fn coverage(&self, all: Coverage) -> Coverage {
        let (mut lost, mut lost_bytes, mut gained, mut white, mut white_bytes) = (0, 0, 0, 0, 0);
        for (c, n) in self.counts() {
            let bytes = n * c.len_utf8() as i64;
            match () {
                () if c == char::REPLACEMENT_CHARACTER && n <= 0 => (),
                () if c.is_whitespace() && n > 0 => (white, white_bytes) = (white + n, white_bytes + bytes),
                () if c.is_whitespace() => (),
                () if n > 0 => (lost, lost_bytes) = (lost + n, lost_bytes + bytes),
                () => gained -= n,
            }
        }
        let share = |bytes: i64, of: i64, whole: i64| (bytes as f64 * of as f64 / whole.max(1) as f64) as u64;
        let changed = gained.min(lost);
        let white_gone = (white - (gained - changed)).max(0);
        Coverage {
            lost_bytes: share(lost_bytes, lost - changed, lost),
            changed_bytes: share(lost_bytes, changed, lost),
            white_bytes: share(white_bytes, white_gone, white),
            ..all
        }
    }
}

/// Lost characters that are looked at for examples.
const LOOKED_AT: usize = 100;

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    /// Measures a tokenizer of this model and these parts.
    fn measure(model: Value, more: Value, texts: &[&str]) -> Coverage {
        let mut json = json!({"version": "1.0", "added_tokens": [], "model": model});
        json.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let tokenizer = Tokenizer::from_bytes(json.to_string()).unwrap();
        let ids: Vec<Vec<u32>> = texts
            .iter()
            .map(|text| tokenizer.encode_fast(*text, false).unwrap().get_ids().to_vec())
            .collect();
        let unknown = tokenizer.token_to_id("<unk>");
        Coverage::measure(&tokenizer, unknown, texts, &ids).unwrap()
    }

    /// A BPE model that knows these characters and merges none.
    fn characters(known: &str, unknown: Option<&str>) -> Value {
        let names = known.chars().map(String::from).chain(unknown.map(str::to_owned));
        let vocab: serde_json::Map<String, Value> = names.zip(0u32..).map(|(c, id)| (c, id.into())).collect();
        json!({"type": "BPE", "vocab": vocab, "merges": [], "unk_token": unknown, "fuse_unk": false})
    }

    fn told(coverage: &Coverage) -> String {
        coverage.notes().into_iter().map(|note| note.line).collect::<Vec<_>>().join(" | ")
    }

    const FUSE: fn() -> Value = || json!({"decoder": {"type": "Fuse"}});

    #[test]
    fn what_is_dropped_is_counted_told_and_refused_above_a_share() {
        let text = "abc ".repeat(100) + "\u{e9}\u{20ac}";
        let coverage = measure(characters("abc ", None), FUSE(), &[&text]);
        assert_eq!((coverage.text_bytes, coverage.lost_bytes, coverage.said_bytes()), (405, 5, 400));
        let error = coverage.check().unwrap_err().to_string();
        assert!(error.contains("drops 1.23 % of the data (such as `\u{e9}`, `\u{20ac}`)"), "{error}");
        let long = "abc ".repeat(1000) + "\u{e9}\u{e9}";
        let coverage = measure(characters("abc ", None), FUSE(), &[&long]);
        coverage.check().unwrap();
        assert!(
            told(&coverage)
                .contains("cannot write 0.10 % of the data, 4 bytes (such as `\u{e9}`): they are dropped")
        );
        let whole = measure(characters("abc \u{e9}", None), FUSE(), &[&long]);
        assert_eq!((whole.said_bytes(), told(&whole).as_str()), (4004, ""));
    }

    #[test]
    fn bytes_that_a_byte_level_tokenizer_lacks_are_dropped_too() {
        let byte_level =
            json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
        let parts = json!({"pre_tokenizer": byte_level, "decoder": byte_level});
        // \u{e9} is the bytes c3 a9; the second has no token.
        let coverage = measure(characters("abc\u{120}\u{c3}", None), parts, &["abc abc \u{e9}"]);
        assert_eq!((coverage.lost_bytes, coverage.said_bytes()), (2, 8));
        assert_eq!(coverage.lost_examples, "\u{e9}");
    }

    #[test]
    fn unknown_tokens_are_told_and_refused_when_they_are_most() {
        let coverage = measure(characters("abc ", Some("<unk>")), FUSE(), &["abc abc xyz"]);
        assert_eq!((coverage.lost_bytes, coverage.unknown_tokens), (3, 3));
        coverage.check().unwrap();
        assert!(
            told(&coverage)
                .contains("27 % of the data, 3 bytes (such as `x`, `y`, `z`): 3 unknown tokens stand")
        );
        let error = measure(characters("abc ", Some("<unk>")), FUSE(), &["uvw xyz a"]).check().unwrap_err();
        assert!(error.to_string().contains("does not know 67 % of the data"), "{error}");
        let words =
            json!({"type": "WordLevel", "vocab": {"hello": 0, "world": 1, "<unk>": 2}, "unk_token": "<unk>"});
        let coverage = measure(words, json!({"pre_tokenizer": {"type": "Whitespace"}}), &["hello world foo"]);
        assert_eq!((coverage.lost_bytes, coverage.unknown_tokens, coverage.white_bytes), (3, 1, 1));
    }

    #[test]
    fn what_a_normalizer_changes_is_told_and_not_lost() {
        let parts = json!({"normalizer": {"type": "Lowercase"}, "decoder": {"type": "Fuse"}});
        let coverage = measure(characters("abc ", None), parts, &["ABC abc"]);
        assert_eq!((coverage.lost_bytes, coverage.changed_bytes, coverage.said_bytes()), (0, 3, 7));
        coverage.check().unwrap();
        assert_eq!(
            told(&coverage),
            "the tokenizer writes 43 % of the data as other characters (such as `A`, `B`, `C`): the model learns those"
        );
    }

    #[test]
    fn letters_that_a_tokenizer_composes_are_not_lost() {
        // A letter and its accent as two characters, as files of macOS have them.
        let apart = "cafe\u{301} ".repeat(50);
        let letters = |more: &str| characters(&format!("acfe {more}"), None);
        let with = |normalizer: Value, model: Value| {
            measure(model, json!({"normalizer": normalizer, "decoder": {"type": "Fuse"}}), &[&apart])
        };
        for (form, model) in
            [("NFC", letters("\u{e9}")), ("NFKC", letters("\u{e9}")), ("NFD", letters("\u{301}"))]
        {
            let coverage = with(json!({"type": form}), model);
            assert_eq!((coverage.lost_bytes, coverage.changed_bytes), (0, 0), "{form}");
            assert_eq!(coverage.said_bytes(), apart.len() as u64);
        }
        with(json!({"type": "NFC"}), letters("")).check().unwrap_err();
        measure(letters("\u{e9}"), FUSE(), &[&apart]).check().unwrap_err();
        let bert = json!({"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true, "strip_accents": true, "lowercase": true});
        let coverage = with(bert, letters(""));
        assert_eq!(coverage.lost_bytes, 0, "changed, as it is where the letter is one character");
        assert!(coverage.changed_bytes > 0);
    }

    #[test]
    fn white_space_without_a_token_is_told_and_not_counted() {
        let coverage = measure(characters("abc ", None), FUSE(), &["abc abc\n\nabc\tabc"]);
        assert_eq!((coverage.lost_bytes, coverage.white_bytes, coverage.said_bytes()), (0, 3, 13));
        coverage.check().unwrap();
        assert!(told(&coverage).contains("leaves out white space, 19 % of the data"));
        let marked = json!({"pre_tokenizer": {"type": "Metaspace", "replacement": "\u{2581}", "prepend_scheme": "never", "split": true}});
        let coverage = measure(characters("abc\u{2581}", None), marked, &["abc abc abc"]);
        assert_eq!(coverage.white_bytes, 0, "it stands as \u{2581}, which no decoder takes back here");
    }
}
