//! Tokenizers of models that transformers 5 splits texts for in a way of its own, whatever their `tokenizer.json` says.

use fleet_common::model::Splits;
use serde_json::{Value, json};
use tokenizers::normalizers::NFC;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{PreTokenizerWrapper, SplitDelimiterBehavior, Tokenizer};

/// Of `Qwen2Tokenizer` in transformers.
const BY_DIGIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Puts what splits a text into a new byte-level tokenizer.
pub fn put(tokenizer: &mut Tokenizer, splits: Splits) -> tokenizers::Result<()> {
    match splits {
        Splits::AsWritten => tokenizer.with_pre_tokenizer(Some(ByteLevel::new(false, true, true))),
        Splits::ByDigit => {
            let pattern = SplitPattern::Regex(BY_DIGIT.to_owned());
            let words = Split::new(pattern, SplitDelimiterBehavior::Isolated, false)?;
            let parts: Vec<PreTokenizerWrapper> =
                vec![words.into(), ByteLevel::new(false, true, false).into()];
            tokenizer.with_normalizer(Some(NFC)).with_pre_tokenizer(Some(Sequence::new(parts)))
        }
    };
    Ok(())
}

/// Whether transformers 5 reads a given tokenizer otherwise than it is written, and what to do.
pub fn warning(json: &[u8], splits: Splits) -> Option<String> {
    let tokenizer: Value = serde_json::from_slice(json).ok()?;
    let parts = &tokenizer["pre_tokenizer"]["pretokenizers"];
    let is_so = tokenizer["normalizer"]["type"] == "NFC"
        && parts[0]["pattern"] == json!({"Regex": BY_DIGIT})
        && parts[0]["behavior"] == "Isolated"
        && parts[1]["type"] == "ByteLevel"
        && parts.as_array().is_some_and(|parts| parts.len() == 2);
    (splits == Splits::ByDigit && !is_so).then(|| {
        "transformers 5 takes another tokenizer for models of this model_type than its tokenizer.json describes, which fleet and transformers 4 \
         take: load it there with PreTrainedTokenizerFast(tokenizer_file=\"DIR/tokenizer.json\")"
            .to_owned()
    })
}

#[cfg(test)]
mod tests {
    use crate::tokenizer::Encoder;
    use fleet_common::model::Splits;

    /// Of AutoTokenizer of transformers 5.17 and 4.57, for the files that a run of such a model writes.
    #[test]
    fn digits_stand_alone_and_letters_are_composed() {
        let text = "in 1234 and 1234 he'd say caf\u{e9}, it's 1234\n".repeat(20);
        let encoder = Encoder::train([&text].into_iter(), 270, Splits::ByDigit).unwrap();
        let tokens = |text: &str| encoder.encode(&[text]).unwrap()[0].ids.len();
        assert_eq!(tokens("1234"), 4);
        assert_eq!(encoder.encode(&["caf\u{e9}"]).unwrap(), encoder.encode(&["cafe\u{301}"]).unwrap());
        assert_eq!(super::warning(&encoder.json, Splits::ByDigit), None);
        let other = Encoder::train([&text].into_iter(), 270, Splits::AsWritten).unwrap();
        assert!(other.encode(&[" 1234"]).unwrap()[0].ids.len() < 4);
        assert!(super::warning(&other.json, Splits::ByDigit).unwrap().contains("PreTrainedTokenizerFast"));
        assert_eq!(super::warning(&other.json, Splits::AsWritten), None);
    }
}
