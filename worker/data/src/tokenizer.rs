//! Byte-level BPE: trained on the training documents, or read from a given `tokenizer.json`.
//!
//! In the data of a given one the names of its special tokens are these tokens, as for transformers and in prompts; for one that is trained
//! here they are text, since its data were written without it.

use crate::model_dir::{self, GivenTokenizer};
use crate::{Coverage, DataError, splits};
use fleet_common::job;
use fleet_common::model::{Family, Splits};
use rayon::prelude::*;
use sha2::{Digest, Sha256};
use std::collections::HashSet;
use std::ops::Range;
use std::path::{Path, PathBuf};
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainerBuilder};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, Tokenizer};

/// Stands after every document.
pub const END_OF_TEXT: &str = "<|endoftext|>";

/// The 256 bytes and the end of text.
const VOCABULARY_MIN: u32 = 257;

/// A pair that is seen only once is not worth a token; also the default of Hugging Face.
const MIN_FREQUENCY: u64 = 2;

/// What given tokenizers call the end of a text, the likeliest first.
const END_NAMES: [&str; 8] = [
    END_OF_TEXT,
    "</s>",
    "<|end_of_text|>",
    "<eos>",
    "<|eot_id|>",
    "<|im_end|>",
    "<\u{ff5c}end\u{2581}of\u{2581}sentence\u{ff5c}>",
    "<end_of_turn>",
];

/// Bytes of the longest word that a tokenizer is trained on in one piece.
const WORD_MAX: usize = 1 << 10;

/// A tokenizer and the bytes of its `tokenizer.json`.
pub(crate) struct Encoder {
    tokenizer: Tokenizer,
    pub json: Vec<u8>,
    /// Ids are below this.
    pub vocab_size: u32,
    pub eos_id: u32,
    frame: Frame,
    /// Whether it can say every text as it stands.
    pub says_all: bool,
    /// What stands for what it does not know.
    unknown: Option<u32>,
    /// How it is taken otherwise than early fleets took it; empty where it is not.
    taken: String,
}

impl Encoder {
    /// Trains as Hugging Face's `ByteLevelBPETokenizer` does. The same texts give the same bytes.
    pub fn train<T: AsRef<str>>(
        texts: impl Iterator<Item = T> + Send,
        vocab_size: u32,
        splits: Splits,
    ) -> Result<Encoder, DataError> {
        if vocab_size < VOCABULARY_MIN {
            return Err(DataError::Vocabulary(format!(
                "vocab_size is {vocab_size}; a byte-level tokenizer needs at least {VOCABULARY_MIN} (256 bytes and {END_OF_TEXT})"
            )));
        }
        let trained = train(texts, vocab_size, splits)
            .map_err(|e| DataError::Vocabulary(format!("training the tokenizer: {e}")))?;
        let found = trained.get_vocab_size(true);
        if found < vocab_size as usize {
            return Err(DataError::Vocabulary(format!(
                "the training data gave {found} tokens and vocab_size asks for {vocab_size}; set vocab_size = {found} or lower, or \
                 add data"
            )));
        }
        let json = trained
            .to_string(false)
            .map_err(|e| DataError::Vocabulary(format!("training the tokenizer: {e}")))?;
        Encoder::trained(json.into_bytes())
            .map_err(|what| DataError::Vocabulary(format!("training the tokenizer: {what}")))
    }

    /// A given `tokenizer.json`. A document ends with what the job says; else with the `eos_token` that the files beside the tokenizer
    /// name, as TRL does it; else with the first end of a text that the model names; else with what is usually called so.
    pub fn open(path: &Path, ids: &ModelIds) -> Result<Encoder, DataError> {
        Encoder::of(&GivenTokenizer::open(path, ids.vocab_size)?, path, ids)
    }

    /// Of one that is open; `path` stands in errors.
    pub fn of(given: &GivenTokenizer, path: &Path, ids: &ModelIds) -> Result<Encoder, DataError> {
        let refused = |what| DataError::Tokenizer { path: path.to_owned(), what };
        let named = if ids.chosen { None } else { given.special.eos.as_deref() };
        let GivenTokenizer { tokenizer, json, beside, .. } = given;
        let mut encoder = Encoder::new(tokenizer.clone(), json.clone(), &ids.ends, named).map_err(refused)?;
        let has_special = tokenizer.get_added_tokens_decoder().values().any(|token| token.special);
        encoder.taken = format!("{beside}{}", if has_special { " special tokens in texts" } else { "" });
        Ok(encoder)
    }

    /// One that was trained here.
    pub fn trained(json: Vec<u8>) -> Result<Encoder, String> {
        let mut tokenizer = Tokenizer::from_bytes(&json).map_err(|e| format!("not a tokenizer.json: {e}"))?;
        tokenizer.set_encode_special_tokens(true); // in data, `<|endoftext|>` is thirteen characters and no end
        Encoder::new(tokenizer, json, &[], None)
    }

    fn new(
        tokenizer: Tokenizer,
        json: Vec<u8>,
        ends: &[u32],
        named: Option<&str>,
    ) -> Result<Encoder, String> {
        let vocab_size = tokenizer.get_vocab(true).values().max().map_or(0, |id| id + 1);
        let eos_id = named
            .and_then(|name| tokenizer.token_to_id(name))
            .or_else(|| usual_end(&tokenizer, ends))
            .ok_or_else(|| {
                format!(
                    "it has no end-of-text token (looked for {}); name it as eos_token in a tokenizer_config.json beside it",
                    END_NAMES.join(" ")
                )
            })?;
        let frame = Frame::of(&tokenizer).map_err(|e| e.to_string())?;
        let settings = serde_json::from_slice(&json).unwrap_or_default();
        let says_all = has_every_byte(&settings, &tokenizer);
        let unknown = unknown(&settings, &tokenizer);
        Ok(Encoder { tokenizer, json, vocab_size, eos_id, frame, says_all, unknown, taken: String::new() })
    }

    /// Whether the post-processor ends a text, so that nobody else has to.
    pub fn ends_texts(&self) -> bool {
        self.frame.behind.last() == Some(&self.eos_id)
    }

    /// Names what this tokenizer makes of a document, for the hash of a cache. Where that is what fleet always made of it the name is
    /// what it always was, so that old runs can be continued.
    pub fn name(&self, ids: &ModelIds) -> String {
        let name =
            format!("file {} eos {:?}", hex::encode(Sha256::digest(&self.json)), ids.ends.first().copied());
        let Frame { before, behind } = &self.frame;
        let is_plain = before.is_empty()
            && behind.is_empty()
            && Some(self.eos_id) == usual_end(&self.tokenizer, &ids.ends);
        let frame = match is_plain {
            true => String::new(),
            false => format!(" frame {before:?} {behind:?} end {}", self.eos_id),
        };
        format!("{name}{frame}{}", self.taken)
    }

    /// Token ids of each text with what the post-processor puts around it, on all cores.
    pub fn encode(&self, texts: &[&str]) -> Result<Vec<Encoded>, DataError> {
        let all: Result<Vec<Encoded>, _> =
            texts.par_iter().map(|text| self.frame.encode(&self.tokenizer, text)).collect();
        all.map_err(|e| DataError::Vocabulary(format!("the tokenizer cannot encode the data: {e}")))
    }

    /// Whether these ids need an end of text behind them: where the text itself ends with it there is one.
    pub fn lacks_end(&self, ids: &[u32]) -> bool {
        !(ids.last() == Some(&self.eos_id) && is_special(&self.tokenizer, self.eos_id))
    }

    /// How much of the texts is in their tokens, which `encode` gave.
    pub fn coverage(&self, texts: &[&str], encoded: &[Encoded]) -> Result<Coverage, DataError> {
        match self.says_all {
            true => Ok(Coverage::whole(texts)),
            false => Coverage::measure(&self.tokenizer, self.unknown, texts, encoded),
        }
    }
}

impl GivenTokenizer {
    /// How much of a text is in its tokens, which `encode` gave.
    pub fn coverage(&self, text: &str, encoded: &Encoded) -> Result<Coverage, DataError> {
        let json: serde_json::Value = serde_json::from_slice(&self.json).unwrap_or_default();
        let unknown = unknown(&json, &self.tokenizer);
        Coverage::measure(&self.tokenizer, unknown, &[text], std::slice::from_ref(encoded))
    }

    /// A text as tokens, be it a document or a prompt.
    pub fn encode(&self, text: &str) -> tokenizers::Result<Encoded> {
        Frame::of(&self.tokenizer)?.encode(&self.tokenizer, text)
    }
}

fn has_every_byte(json: &serde_json::Value, tokenizer: &Tokenizer) -> bool {
    let known = |c: char| tokenizer.token_to_id(c.encode_utf8(&mut [0; 4])).is_some();
    is_byte_level(json) && ByteLevel::alphabet().into_iter().all(known)
}

/// What stands for what the tokenizer does not know.
fn unknown(json: &serde_json::Value, tokenizer: &Tokenizer) -> Option<u32> {
    let model = &json["model"];
    match model["unk_id"].as_u64() {
        Some(id) => u32::try_from(id).ok(),
        None => model["unk_token"].as_str().and_then(|name| tokenizer.token_to_id(name)),
    }
}

/// A text as tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Encoded {
    pub ids: Vec<u32>,
    /// Which of them are the text's, and not what the post-processor puts around it.
    text: Range<usize>,
    /// The begin of a text that the text has itself, so that it was not put there again.
    pub own_begin: Vec<u32>,
}

impl Encoded {
    /// A text with nothing around it.
    pub(crate) fn bare(ids: Vec<u32>) -> Encoded {
        Encoded { text: 0..ids.len(), ids, own_begin: Vec::new() }
    }

    /// Without the end that the post-processor puts behind it.
    pub(crate) fn open(&self) -> &[u32] {
        &self.ids[..self.text.end]
    }

    pub fn of_text(&self) -> &[u32] {
        &self.ids[self.text.clone()]
    }
}

impl AsRef<[u32]> for Encoded {
    fn as_ref(&self) -> &[u32] {
        self.of_text()
    }
}

/// What a post-processor puts around every text: the begin that Llama wants to see before it, an end behind it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Frame {
    before: Vec<u32>,
    behind: Vec<u32>,
}

impl Frame {
    fn of(tokenizer: &Tokenizer) -> tokenizers::Result<Frame> {
        if tokenizer.get_post_processor().is_none() {
            return Ok(Frame::default());
        }
        // The first that the tokenizer can write.
        for text in ["a", "A", "0", ".", " "] {
            let ids =
                |special| tokenizer.encode_fast(text, special).map(|encoding| encoding.get_ids().to_vec());
            let (plain, mut all) = (ids(false)?, ids(true)?);
            let begin = (0..all.len()).find(|at| all[*at..].starts_with(&plain));
            if let Some(begin) = begin.filter(|_| !plain.is_empty()) {
                let behind = all.split_off(begin + plain.len());
                all.truncate(begin);
                return Ok(Frame { before: all, behind });
            }
        }
        Ok(Frame::default())
    }

    /// As transformers encodes a text: with the frame. Only a begin that the text itself has too is not put there again.
    fn encode(&self, tokenizer: &Tokenizer, text: &str) -> tokenizers::Result<Encoded> {
        let Frame { before, behind } = self;
        let mut ids = tokenizer.encode_fast(text, true)?.get_ids().to_vec();
        let room = ids.len().checked_sub(before.len() + behind.len());
        let Some(len) = room.filter(|_| ids.starts_with(before) && ids.ends_with(behind)) else {
            return Ok(Encoded { text: 0..ids.len(), ids, own_begin: Vec::new() });
        };
        let twice = !before.is_empty() && ids[before.len()..][..len].starts_with(before);
        let own_begin: Vec<u32> = if twice { ids.drain(..before.len()).collect() } else { Vec::new() };
        let begin = before.len() - own_begin.len();
        Ok(Encoded { ids, text: begin..begin + len, own_begin })
    }
}

/// What is done with a tokenizer: those of others run code of others, which panics at some of them.
pub fn guarded<T>(
    tokenizer: &job::Tokenizer,
    work: impl FnOnce() -> Result<T, DataError>,
) -> Result<T, DataError> {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
        let text = text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default();
        let which = match tokenizer {
            job::Tokenizer::File(path) => path.display().to_string(),
            job::Tokenizer::Train { .. } => "the one that is trained".to_owned(),
        };
        Err(DataError::Vocabulary(format!(
            "the tokenizer ({which}) fails at these texts ({}); choose another one (tokenizer.path), or other data",
            text.replace('\n', " ")
        )))
    })
}

/// The text of tokens. Some decoders of the tokenizers library panic where there is nothing to decode.
pub fn decode(tokenizer: &Tokenizer, ids: &[u32], skip_special: bool) -> tokenizers::Result<String> {
    let special = |id: &u32| skip_special && is_special(tokenizer, *id);
    let is_text = |id: &u32| !special(id) && tokenizer.id_to_token(*id).is_some();
    if !ids.iter().any(is_text) {
        return Ok(String::new());
    }
    tokenizer.decode(ids, skip_special)
}

fn is_special(tokenizer: &Tokenizer, id: u32) -> bool {
    let token = tokenizer.id_to_token(id);
    token.is_some_and(|token| tokenizer.get_added_vocabulary().is_special_token(&token))
}

/// The first of `ends` that the tokenizer has, else the first of the usual names.
fn usual_end(tokenizer: &Tokenizer, ends: &[u32]) -> Option<u32> {
    let known = ends.iter().copied().find(|id| tokenizer.id_to_token(*id).is_some());
    known.or_else(|| END_NAMES.iter().find_map(|name| tokenizer.token_to_id(name)))
}

/// Whether this is byte-level BPE as GPT-2's, with a token for every byte and nothing that changes the text before: it loses nothing.
fn is_byte_level(json: &serde_json::Value) -> bool {
    let is = |part: &serde_json::Value, name: &str| part["type"] == name;
    let splits = &json["pre_tokenizer"];
    let byte_level = match splits["pretokenizers"].as_array().map(Vec::as_slice) {
        Some([before @ .., last]) => {
            is(last, "ByteLevel")
                && before.iter().all(|part| is(part, "Split") && part["behavior"] == "Isolated")
        }
        _ => is(splits, "ByteLevel"),
    };
    // Composed letters are the same text.
    let keeps = json["normalizer"].is_null() || is(&json["normalizer"], "NFC");
    byte_level && is(&json["model"], "BPE") && keeps
}

fn train<T: AsRef<str>>(
    texts: impl Iterator<Item = T> + Send,
    vocab_size: u32,
    splits: Splits,
) -> tokenizers::Result<Tokenizer> {
    let mut tokenizer = Tokenizer::new(BPE::default());
    splits::put(&mut tokenizer, splits)?;
    tokenizer.with_decoder(Some(ByteLevel::new(false, true, true)));
    tokenizer.with_post_processor(Some(ByteLevel::new(false, false, true)));
    let trainer = BpeTrainerBuilder::new()
        .show_progress(false)
        .vocab_size(vocab_size as usize)
        .min_frequency(MIN_FREQUENCY)
        .special_tokens(vec![AddedToken::from(END_OF_TEXT, true)])
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect::<HashSet<char>>())
        .build();
    let pieces = texts.flat_map(|text| pieces(text.as_ref()).map(str::to_owned).collect::<Vec<String>>());
    tokenizer.train(&mut TrainerWrapper::BpeTrainer(trainer), pieces)?;
    Ok(tokenizer)
}

/// The text, cut where something that is no word goes on for longer than a word can be: the work of training grows with the square of the
/// longest, and what base64 or a genome repeats is found in its pieces as well.
fn pieces(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        let mut run = 0;
        let cut = rest.char_indices().find_map(|(at, c)| {
            run = if c.is_whitespace() { 0 } else { run + c.len_utf8() };
            (run > WORD_MAX).then_some(at)
        });
        let (piece, later) = rest.split_at(cut.unwrap_or(rest.len()));
        rest = later;
        (!piece.is_empty()).then_some(piece)
    })
}

fn splits_of(config: &model_dir::Object) -> Splits {
    let family = config.get("model_type").and_then(|name| Family::find(name.as_str()?));
    family.map_or(Splits::AsWritten, |family| family.splits)
}

/// What the model says about ids: how many there are, and which end a text.
pub(crate) struct ModelIds {
    pub vocab_size: u32,
    pub ends: Vec<u32>,
    /// By the job, which knows better than the files.
    pub chosen: bool,
    /// The directory of a given model.
    pub given: Option<PathBuf>,
    pub splits: Splits,
}

impl ModelIds {
    pub fn of(model: &job::Model) -> Result<ModelIds, DataError> {
        match model {
            job::Model::New(config) => {
                let vocab_size = config.get("vocab_size").and_then(model_dir::whole);
                let missing =
                    || DataError::Settings { path: "[model]".into(), what: "has no vocab_size".into() };
                let ends = model_dir::token_ids(config, "eos_token_id");
                let (vocab_size, chosen) = (vocab_size.ok_or_else(missing)?, !ends.is_empty());
                let splits = splits_of(config);
                Ok(ModelIds { vocab_size, ends, chosen, given: None, splits })
            }
            job::Model::Pretrained(dir) => ModelIds::of_dir(dir),
        }
    }

    /// Whether the model has an embedding for every id of a tokenizer of this size.
    pub fn check_holds(&self, tokenizer_size: u32) -> Result<(), DataError> {
        if tokenizer_size <= self.vocab_size {
            return Ok(());
        }
        let cure = match &self.given {
            None => format!("set vocab_size = {tokenizer_size} in [model], or choose a smaller tokenizer"),
            Some(dir) => format!(
                "a given model has no more; use its own tokenizer.json, which belongs in {}, without tokens that were added later, or make the model larger with \
                 transformers: resize_token_embeddings({tokenizer_size}), then save_pretrained",
                dir.display()
            ),
        };
        Err(DataError::Vocabulary(format!(
            "the tokenizer has {tokenizer_size} tokens and the model's vocab_size is {}; {cure}",
            self.vocab_size
        )))
    }

    fn of_dir(dir: &Path) -> Result<ModelIds, DataError> {
        let path = dir.join(model_dir::CONFIG);
        let refused = |what: &str| DataError::Model { path: dir.to_owned(), what: what.to_owned() };
        if !dir.is_dir() {
            return Err(refused(fleet_common::model::no_such_model(dir)));
        }
        let missing = || {
            refused(
                "it has no config.json; a model directory holds config.json, model.safetensors and tokenizer.json",
            )
        };
        let config = model_dir::read_object(&path)?.ok_or_else(missing)?;
        let vocab_size = config.get("vocab_size").and_then(model_dir::whole);
        let vocab_size = vocab_size
            .ok_or_else(|| DataError::Settings { path: path.clone(), what: "has no vocab_size".into() })?;
        model_dir::end_ids(dir)?; // not now, but what is wrong with them
        let ends = model_dir::token_ids(&config, "eos_token_id");
        let splits = splits_of(&config);
        Ok(ModelIds { vocab_size, ends, chosen: false, given: Some(dir.to_owned()), splits })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "the cat sat on the mat and the dog sat on the log; the end of the cat and the dog.\n";

    fn ids_of(encoder: &Encoder, texts: &[&str]) -> Vec<Vec<u32>> {
        encoder.encode(texts).unwrap().into_iter().map(|encoded| encoded.ids).collect()
    }

    #[test]
    fn a_trained_tokenizer_reads_back_what_it_wrote() {
        let encoder = Encoder::train([TEXT.repeat(3)].iter(), 280, Splits::AsWritten).unwrap();
        assert_eq!((encoder.vocab_size, encoder.eos_id), (280, 0));
        let text = "the cat\u{1F600} é\n<|endoftext|>";
        let ids = encoder.encode(&[text]).unwrap().remove(0).ids;
        assert!(!ids.contains(&encoder.eos_id), "the name of a special token in data is text: {ids:?}");
        assert_eq!(encoder.tokenizer.decode(&ids, false).unwrap(), text);
        assert!(ids.len() < text.len());
    }

    #[test]
    fn what_is_no_word_is_trained_on_in_pieces() {
        let long = format!("{} é{} and", "ab".repeat(WORD_MAX), "é".repeat(WORD_MAX));
        let cut: Vec<&str> = pieces(&long).collect();
        assert_eq!(cut.concat(), long);
        let words = || cut.iter().flat_map(|piece| piece.split_whitespace());
        assert!(
            words().all(|word| word.len() <= WORD_MAX),
            "{:?}",
            words().map(str::len).collect::<Vec<_>>()
        );
        assert_eq!(pieces(TEXT).collect::<Vec<_>>(), [TEXT]);
        assert_eq!(pieces("").count(), 0);
    }

    #[test]
    fn a_vocabulary_larger_than_the_data_allows_names_what_it_gave() {
        let error = Encoder::train([TEXT].iter(), 4096, Splits::AsWritten).err().unwrap().to_string();
        let found: u32 = error.split_whitespace().find_map(|word| word.parse().ok()).unwrap();
        assert!((258..400).contains(&found) && error.contains("asks for 4096"), "{error}");
        assert_eq!(Encoder::train([TEXT].iter(), found, Splits::AsWritten).unwrap().vocab_size, found);
        assert!(
            Encoder::train([TEXT].iter(), 256, Splits::AsWritten)
                .err()
                .unwrap()
                .to_string()
                .contains("at least 257")
        );
    }

    #[test]
    fn only_a_whole_byte_level_tokenizer_is_taken_to_lose_nothing() {
        let encoder = Encoder::train([TEXT.repeat(3)].iter(), 280, Splits::AsWritten).unwrap();
        let json: serde_json::Value = serde_json::from_slice(&encoder.json).unwrap();
        assert!(has_every_byte(&json, &encoder.tokenizer));
        let mut lowering = json.clone();
        lowering["normalizer"] = serde_json::json!({"type": "Lowercase"});
        let mut splitting = json.clone();
        splitting["pre_tokenizer"] = serde_json::json!({"type": "Whitespace"});
        let mut dropping = json.clone();
        let removed = serde_json::json!({"type": "Split", "behavior": "Removed"});
        dropping["pre_tokenizer"] =
            serde_json::json!({"type": "Sequence", "pretokenizers": [removed, {"type": "ByteLevel"}]});
        assert!(
            [lowering, splitting, dropping].iter().all(|other| !has_every_byte(other, &encoder.tokenizer))
        );
        let mut fewer = json.clone();
        fewer["model"]["vocab"].as_object_mut().unwrap().remove("\u{e9}");
        let fewer = Encoder::trained(fewer.to_string().into_bytes()).unwrap();
        assert!(!has_every_byte(&json, &fewer.tokenizer));
    }

    #[test]
    fn a_given_tokenizer_is_kept_byte_for_byte_and_its_end_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tokenizer.json");
        let json = r#"{"version":"1.0","added_tokens":[{"id":2,"content":"</s>","single_word":false,"lstrip":false,"rstrip":false,
            "normalized":false,"special":true}],"model":{"type":"WordLevel","vocab":{"a":0,"b":1,"</s>":2},"unk_token":"a"}}"#;
        std::fs::write(&path, json).unwrap();
        let ends = |ends: &[u32], chosen| ModelIds {
            vocab_size: 3,
            ends: ends.to_vec(),
            chosen,
            given: None,
            splits: Splits::AsWritten,
        };
        let encoder = Encoder::open(&path, &ends(&[], false)).unwrap();
        assert_eq!((encoder.vocab_size, encoder.eos_id, encoder.json.as_slice()), (3, 2, json.as_bytes()));
        assert_eq!(Encoder::open(&path, &ends(&[9, 1], false)).unwrap().eos_id, 1);
        std::fs::write(dir.path().join(model_dir::TOKENIZER_CONFIG), r#"{"eos_token":"a"}"#).unwrap();
        assert_eq!(Encoder::open(&path, &ends(&[1], false)).unwrap().eos_id, 0, "the tokenizer's own");
        assert_eq!(Encoder::open(&path, &ends(&[1], true)).unwrap().eos_id, 1, "the job's");
        std::fs::write(&path, "{}").unwrap();
        let error = Encoder::open(&path, &ends(&[], false)).err().unwrap().to_string();
        assert!(
            error.contains(&path.display().to_string()) && error.contains("not a tokenizer.json"),
            "{error}"
        );
    }

    #[test]
    fn what_a_post_processor_adds_stands_around_each_text() {
        let special = |id: u32, content: &str| {
            serde_json::json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true})
        };
        let with = |single: &str| {
            let piece = |name: &str| match name {
                "$A" => serde_json::json!({"Sequence": {"id": "A", "type_id": 0}}),
                name => serde_json::json!({"SpecialToken": {"id": name, "type_id": 0}}),
            };
            let pieces: Vec<_> = single.split(' ').map(piece).collect();
            let tokens = serde_json::json!({"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]},
                "</s>": {"id": "</s>", "ids": [2], "tokens": ["</s>"]}});
            let json = serde_json::json!({"version": "1.0", "added_tokens": [special(1, "<s>"), special(2, "</s>")],
                "post_processor": {"type": "TemplateProcessing", "single": pieces, "pair": pieces, "special_tokens": tokens},
                "model": {"type": "WordLevel", "vocab": {"a": 0, "<s>": 1, "</s>": 2}, "unk_token": "a"}});
            Encoder::trained(json.to_string().into_bytes()).unwrap()
        };
        let ids =
            ModelIds { vocab_size: 3, ends: vec![2], chosen: false, given: None, splits: Splits::AsWritten };
        let plain = with("$A");
        assert_eq!((ids_of(&plain, &["a"]), plain.ends_texts()), (vec![vec![0]], false));
        assert!(plain.name(&ids).ends_with("eos Some(2)"), "as it always was: {}", plain.name(&ids));
        let begin = with("<s> $A");
        assert_eq!((ids_of(&begin, &["a"]), begin.ends_texts()), (vec![vec![1, 0]], false));
        let both = with("<s> $A </s>");
        assert_eq!((ids_of(&both, &["a"]), both.ends_texts()), (vec![vec![1, 0, 2]], true));
        let end_first = with("</s> $A");
        assert_eq!((ids_of(&end_first, &["a"]), end_first.ends_texts()), (vec![vec![2, 0]], false));
        assert_ne!(begin.name(&ids), both.name(&ids));
    }

    /// A directory with a tokenizer of single characters, `<s>` before every text, and `</s>` and `<x>` special.
    fn of_characters() -> (tempfile::TempDir, PathBuf) {
        let special = |id: u32, content: &str| {
            serde_json::json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true})
        };
        let pieces = serde_json::json!([{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]);
        let vocab: serde_json::Map<String, serde_json::Value> =
            ["<s>", "</s>", "<x>", "a", "b", "<", "x", ">", "/", "s"]
                .iter()
                .zip(0..)
                .map(|(name, id)| ((*name).into(), id.into()))
                .collect();
        let json = serde_json::json!({"version": "1.0", "added_tokens": [special(0, "<s>"), special(1, "</s>"), special(2, "<x>")],
            "post_processor": {"type": "TemplateProcessing", "single": pieces, "pair": pieces,
                "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}}},
            "decoder": {"type": "BPEDecoder", "suffix": "</w>"},
            "model": {"type": "BPE", "vocab": vocab, "merges": []}});
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tokenizer.json");
        std::fs::write(&path, json.to_string()).unwrap();
        (dir, path)
    }

    #[test]
    fn special_tokens_in_data_are_those_of_prompts() {
        let (_dir, path) = of_characters();
        let ids =
            ModelIds { vocab_size: 10, ends: vec![], chosen: false, given: None, splits: Splits::AsWritten };
        let encoder = Encoder::open(&path, &ids).unwrap();
        let texts = ["a<x>b", "<s>a", "ab</s>", "\u{e9}", ""];
        let all = encoder.encode(&texts).unwrap();
        let encoded = ids_of(&encoder, &texts);
        assert_eq!(encoded, [vec![0, 3, 2, 4], vec![0, 3], vec![0, 3, 4, 1], vec![0], vec![0]]);
        let given = GivenTokenizer::open(&path, u32::MAX).unwrap();
        for (text, ids) in texts.iter().zip(&encoded) {
            assert_eq!(given.encode(text).unwrap().ids, *ids, "{text}");
        }
        assert_eq!(
            encoded.iter().map(|ids| encoder.lacks_end(ids)).collect::<Vec<_>>(),
            [true, true, false, true, true]
        );
        let coverage = encoder.coverage(&texts, &all).unwrap();
        assert_eq!((coverage.text_bytes, coverage.lost_bytes), (17, 2), "the names of tokens are said");
        assert!(
            encoder.name(&ids).ends_with("special tokens in texts"),
            "a cache of its own: {}",
            encoder.name(&ids)
        );
    }

    #[test]
    fn what_has_no_text_is_decoded_without_a_panic() {
        let (_dir, path) = of_characters();
        let tokenizer = GivenTokenizer::open(&path, u32::MAX).unwrap().tokenizer;
        for ids in [&[][..], &[0, 1], &[999]] {
            assert_eq!(decode(&tokenizer, ids, true).unwrap(), "");
        }
        assert_eq!(decode(&tokenizer, &[0, 3], true).unwrap(), "a");
    }

    #[test]
    fn a_tokenizer_that_is_too_large_for_a_given_model_has_a_cure_that_can_be_done() {
        let of = |given| ModelIds {
            vocab_size: 97,
            ends: vec![],
            chosen: false,
            given,
            splits: Splits::AsWritten,
        };
        let said = |given| of(given).check_holds(300).unwrap_err().to_string();
        assert!(said(None).contains("set vocab_size = 300 in [model]"));
        let given = said(Some("/m".into()));
        assert!(
            given.contains("its own tokenizer.json, which belongs in /m") && !given.contains("[model]"),
            "{given}"
        );
        of(None).check_holds(97).unwrap();
    }
}
