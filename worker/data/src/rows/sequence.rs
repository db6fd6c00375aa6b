//! From what a row teaches to sequences of tokens, and which of them carry loss.

use super::Unused;
use super::example::{Example, Given, Said, Talk};
use super::messages;
use super::templates::Chosen;
use crate::Encoded;
use crate::chat::{Conversation, Ending, LeftOut, Rendered, Template};
use crate::model_dir::GivenTokenizer;
use crate::near::{self, Signature};
use crate::tokenizer::Encoder;
use fleet_common::job::LossOn;
use serde_json::Value;
use std::collections::HashMap;
use time::OffsetDateTime;

/// What templates write as the present day, so that a row gives the same tokens on every day and host: 26 July 2024, which those of Llama
/// name where they are given none.
const TODAY: i64 = 1_721_952_000;

/// Token ids, and which of them are to be predicted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Sequence {
    pub ids: Vec<u32>,
    pub learnt: Vec<bool>,
    /// Bytes of the text that is learnt.
    pub said: u64,
}

impl Sequence {
    /// Tokens that carry loss: nothing predicts the first one.
    pub fn loss_tokens(&self) -> u64 {
        self.learnt.iter().skip(1).filter(|learnt| **learnt).count() as u64
    }

    /// Keeps the first `max` tokens; tells how many are gone.
    pub fn cut(&mut self, max: usize) -> u64 {
        let gone = self.ids.len().saturating_sub(max);
        if gone > 0 {
            let before = self.loss_tokens().max(1);
            self.ids.truncate(max);
            self.learnt.truncate(max);
            self.said = self.said * self.loss_tokens() / before;
        }
        gone as u64
    }
}

/// The sequences of a row: one, or one for each answer.
#[derive(Default)]
pub(super) struct Made {
    pub sequences: Vec<Sequence>,
    /// The tokens of each prompt are the first ones of its sequence; of messages, each turn of the assistant begins with a token.
    pub is_joined: bool,
    /// A chat template has written it.
    pub is_templated: bool,
    /// What was tokenised.
    pub texts: Vec<(String, Encoded)>,
    /// What the row has and the chat template does not write.
    pub left_out: Vec<LeftOut>,
    /// A turn of the assistant says nothing, and its end is learnt.
    pub has_silent_turn: bool,
}

impl Made {
    /// Of all that it says.
    pub fn signature(&self) -> Signature {
        let texts: Vec<&str> = self.texts.iter().map(|(text, _)| text.as_str()).collect();
        near::signature(&texts.join("\n"))
    }
}

/// Writes rows in the tokens of a model.
pub(super) struct Maker {
    pub given: GivenTokenizer,
    pub encoder: Encoder,
    pub templates: Option<Chosen>,
    pub loss_on: LossOn,
    /// Bytes of the special tokens' names, which templates write and nobody says.
    markers: HashMap<u32, u64>,
}

impl Maker {
    pub fn new(given: GivenTokenizer, encoder: Encoder, templates: Option<Chosen>, loss_on: LossOn) -> Maker {
        let added = given.tokenizer.get_added_tokens_decoder();
        let special = added.into_iter().filter(|(_, token)| token.special);
        let markers = special.map(|(id, token)| (id, token.content.len() as u64)).collect();
        Maker { given, encoder, templates, loss_on, markers }
    }

    pub fn make(&self, example: &Example) -> Result<Made, Unused> {
        let mut made = Made { is_joined: true, ..Made::default() };
        match example {
            Example::Text(text) => {
                let encoded = self.ended(text)?;
                made.add(text.clone(), encoded, |ids| vec![true; ids], text.len());
            }
            Example::Turns(talk) => {
                made.is_templated = true;
                self.turns(talk, &mut made)?;
            }
            Example::Answers { prompt, answers, given } => {
                made.is_templated = matches!(prompt, Said::Messages(_));
                let joined = answers.iter().map(|answer| self.joined(prompt, answer, given));
                let joined = joined.collect::<Result<Vec<Joined>, Unused>>()?;
                made.left_out = joined.iter().flat_map(|joined| joined.left_out.iter().copied()).collect();
                made.has_silent_turn = answers.iter().any(Said::has_silent_turn);
                // An answer begins where its tokens are no longer those of the prompt alone; all of a row begin at the same token.
                let same = joined
                    .iter()
                    .map(|joined| common(&joined.prompt, &joined.encoded.ids))
                    .min()
                    .unwrap_or(0);
                let is_all = self.loss_on == LossOn::All && answers.len() == 1;
                let first = if is_all { 0 } else { same };
                for Joined { prompt, prompt_bytes, text, encoded, .. } in joined {
                    made.is_joined &= same == prompt.len();
                    let bytes = text.len().saturating_sub(if is_all { 0 } else { prompt_bytes });
                    made.add(text, encoded, |ids| (0..ids).map(|at| at >= first).collect(), bytes);
                }
            }
        }
        if made.is_templated {
            for Sequence { ids, learnt, said } in &mut made.sequences {
                let learnt = ids.iter().zip(learnt).filter(|(_, learnt)| **learnt);
                let marked: u64 = learnt.filter_map(|(id, _)| self.markers.get(id)).sum();
                *said = said.saturating_sub(marked);
            }
        }
        Ok(made)
    }

    /// What of the template does not fit the tokenizer.
    pub fn misfits(&self, chosen: &Chosen) -> Vec<String> {
        chosen.template(false).misfits(&self.given, today())
    }

    fn turns(&self, talk: &Talk, made: &mut Made) -> Result<(), Unused> {
        let (conversation, silent) = conversation(&talk.messages, &talk.given)?;
        let template = self.template(&talk.given)?;
        let learnt = talk.messages.iter().filter(|message| messages::is_answer(message)).zip(&silent);
        made.has_silent_turn =
            learnt.filter(|(_, silent)| !**silent).any(|(message, _)| messages::is_silent(message));
        if self.loss_on == LossOn::All {
            let rendered = template.render(&conversation, Ending::Complete, today())?;
            made.left_out = template.left_out(&conversation, &rendered, 0, today());
            let text = rendered.text;
            let (encoded, bytes) = (self.bare(&text)?, text.len());
            made.add(text, encoded, |ids| vec![true; ids], bytes);
            return Ok(());
        }
        let mut rendered = template.render_marked(&conversation, today())?;
        made.left_out = template.left_out(&conversation, &rendered, 0, today());
        leave_out(&mut rendered, &silent)?;
        let tokens = rendered.tokens(&self.given).map_err(|e| Unused::Bad(e.to_string()))?;
        let bytes = rendered.assistant.iter().map(ExactSizeIterator::len).sum();
        made.is_joined &= tokens.is_joined;
        made.add(rendered.text, tokens.encoded, |_| tokens.assistant, bytes);
        Ok(())
    }

    fn joined(&self, prompt: &Said, answer: &Said, given: &Given) -> Result<Joined, Unused> {
        match (prompt, answer) {
            (Said::Text(prompt), Said::Text(answer)) => {
                let text = format!("{prompt}{answer}");
                let (asked, encoded) = (self.plain(prompt)?.open().to_vec(), self.ended(&text)?);
                Ok(Joined { prompt: asked, prompt_bytes: prompt.len(), text, encoded, left_out: Vec::new() })
            }
            (Said::Messages(prompt), Said::Messages(answer)) => {
                let template = self.template(given)?;
                let (asked, _) = conversation(prompt, given)?;
                let (whole, _) = conversation(&[prompt.as_slice(), answer].concat(), given)?;
                let asked = template.render(&asked, Ending::Prompt, today())?.text;
                let rendered = template.render(&whole, Ending::Complete, today())?;
                let left_out = template.left_out(&whole, &rendered, prompt.len(), today());
                let text = rendered.text;
                let (prompt, encoded) = (self.bare(&asked)?.ids, self.bare(&text)?);
                Ok(Joined { prompt, prompt_bytes: asked.len(), text, encoded, left_out })
            }
            _ => super::bad("one of prompt and answer is a text, and the other one messages"),
        }
    }

    fn template(&self, given: &Given) -> Result<&Template, Unused> {
        let chosen = self.templates.as_ref().ok_or(Unused::NoTemplate)?;
        Ok(chosen.template(given.tools.is_some()))
    }

    /// A text with what the tokenizer puts around it.
    fn plain(&self, text: &str) -> Result<Encoded, Unused> {
        let encoded = self.encoder.encode(&[text]).map_err(|e| Unused::Bad(e.to_string()))?;
        Ok(encoded.into_iter().next().expect("one for each text"))
    }

    /// The same with the end of a text behind it.
    fn ended(&self, text: &str) -> Result<Encoded, Unused> {
        let mut encoded = self.plain(text)?;
        if !self.encoder.ends_texts() && self.encoder.lacks_end(&encoded.ids) {
            encoded.ids.push(self.encoder.eos_id);
        }
        Ok(encoded)
    }

    /// What a template has written, special tokens included.
    fn bare(&self, text: &str) -> Result<Encoded, Unused> {
        let cannot = |e| Unused::Bad(format!("the tokenizer cannot encode the conversation: {e}"));
        let encoding = self.given.tokenizer.encode_fast(text, false).map_err(cannot)?;
        Ok(Encoded::bare(encoding.get_ids().to_vec()))
    }
}

/// A prompt alone, and with its answer.
struct Joined {
    prompt: Vec<u32>,
    prompt_bytes: usize,
    text: String,
    encoded: Encoded,
    left_out: Vec<LeftOut>,
}

/// How many tokens both begin with.
fn common(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

impl Made {
    fn add(&mut self, text: String, encoded: Encoded, learnt: impl FnOnce(usize) -> Vec<bool>, said: usize) {
        let learnt = learnt(encoded.ids.len());
        self.sequences.push(Sequence { ids: encoded.ids.clone(), learnt, said: said as u64 });
        self.texts.push((text, encoded));
    }
}

fn today() -> OffsetDateTime {
    OffsetDateTime::from_unix_timestamp(TODAY).expect("a day of this century")
}

/// What says in a message whether it is learnt: OpenAI's name, and those of axolotl and others.
const LEARNS: [&str; 5] = ["weight", "train", "training", "loss", "loss_weight"];

/// Whether a message is learnt, as far as it says that, which is taken from it.
fn is_learnt(index: usize, message: &mut serde_json::Map<String, Value>) -> Result<bool, Unused> {
    let mut is_learnt = true;
    for name in LEARNS {
        let Some(value) = message.remove(name) else { continue };
        let said = match &value {
            Value::Null => continue,
            Value::Bool(said) => Some(*said),
            Value::String(text) => match text.trim().to_lowercase().as_str() {
                "0" | "false" => Some(false),
                "1" | "true" => Some(true),
                _ => None,
            },
            value => value.as_f64().filter(|number| [0.0, 1.0].contains(number)).map(|number| number == 1.0),
        };
        match said {
            Some(said) => is_learnt &= said,
            None => {
                return super::bad(format!(
                    "message {index} has a `{name}` of {value}; a turn is learnt (1, true) or not (0, false)"
                ));
            }
        }
    }
    Ok(is_learnt)
}

/// Messages for a template, and which turns of the assistant are not to be learnt.
fn conversation(messages: &[Value], given: &Given) -> Result<(Conversation, Vec<bool>), Unused> {
    let mut messages = messages.to_vec();
    let mut silent = Vec::new();
    for (index, message) in messages.iter_mut().filter_map(Value::as_object_mut).enumerate() {
        let is_learnt = is_learnt(index, message)?;
        if message.get("role").is_some_and(|role| role == "assistant") {
            silent.push(!is_learnt);
        }
    }
    let mut conversation = Conversation::new(&messages)?;
    conversation.tools = given.tools.clone();
    conversation.variables = given.variables.clone();
    Ok((conversation, silent))
}

/// Takes away the parts of turns that are not to be learnt.
fn leave_out(rendered: &mut Rendered, silent: &[bool]) -> Result<(), Unused> {
    if !silent.contains(&true) {
        return Ok(());
    }
    if rendered.assistant.len() != silent.len() {
        return super::bad(
            "a message has a `weight` of 0, and the template does not mark each turn of the assistant by itself",
        );
    }
    let mut is_silent = silent.iter();
    rendered.assistant.retain(|_| is_silent.next() == Some(&false));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_turn_is_learnt_or_not_by_the_names_that_there_are() {
        let said =
            |json: Value| is_learnt(1, &mut json.as_object().unwrap().clone()).map_err(|e| format!("{e:?}"));
        for no in [json!(0), json!(0.0), json!(false), json!("0"), json!("false")] {
            for name in LEARNS {
                assert_eq!(said(json!({name: no})), Ok(false), "{name}: {no}");
            }
        }
        for yes in [json!(1), json!(true), json!("1"), json!(null)] {
            assert_eq!(said(json!({"train": yes})), Ok(true), "{yes}");
        }
        assert_eq!(said(json!({"content": "a"})), Ok(true));
        let refused = said(json!({"weight": 0.5})).unwrap_err();
        assert!(refused.contains("message 1 has a `weight` of 0.5"), "{refused}");
    }

    #[test]
    fn a_cut_sequence_counts_what_is_left() {
        let mut sequence =
            Sequence { ids: vec![1, 2, 3, 4, 5], learnt: vec![true, false, true, true, true], said: 9 };
        assert_eq!(sequence.loss_tokens(), 3, "the first token is predicted by nothing");
        assert_eq!((sequence.cut(5), sequence.said), (0, 9));
        assert_eq!((sequence.cut(4), sequence.loss_tokens(), sequence.said), (1, 2, 6));
        assert_eq!((sequence.cut(2), sequence.loss_tokens(), sequence.said), (2, 0, 0));
    }
}
