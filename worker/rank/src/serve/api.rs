//! What a request asks for, in OpenAI's words. Pure: bytes in, what is wanted out.

use super::Refusal;
use fleet_data::chat::Conversation;
use serde_json::{Map, Value, json};

/// Tokens of an answer where nobody says how many; of a completion as OpenAI has it.
const ANSWER_TOKENS: usize = 1024;
const COMPLETION_TOKENS: usize = 16;

/// Of the strings at which a text shall end.
const STOPS_MAX: usize = 16;
const STOP_BYTES_MAX: usize = 1024;

/// Which of the two interfaces is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Chat,
    Completion,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Question {
    Text(String),
    Chat(Conversation),
}

/// What is wanted of which model.
#[derive(Clone, Debug, PartialEq)]
pub struct Asked {
    pub kind: Kind,
    /// `None`: the model that is served under its own name.
    pub model: Option<String>,
    pub question: Question,
    pub max_tokens: usize,
    pub temperature: f64,
    pub top_p: f64,
    /// 0: all.
    pub top_k: usize,
    pub seed: Option<u64>,
    pub stop: Vec<String>,
    /// Piece by piece.
    pub stream: bool,
    /// At the end of a stream, how many tokens there were.
    pub usage: bool,
}

/// The body of a request.
pub fn asked(kind: Kind, body: &[u8]) -> Result<Asked, Refusal> {
    let value: Value =
        serde_json::from_slice(body).map_err(|e| Refusal::new(400, format!("the body is no JSON: {e}")))?;
    let Value::Object(mut object) = value else {
        return Err(Refusal::new(400, "the body is no JSON object"));
    };
    object.retain(|_, value| !value.is_null());
    let fields = Fields(&object);
    fields.refuse_what_there_is_not()?;
    let tokens = match kind {
        Kind::Chat => fields.whole("max_completion_tokens", 1)?.or(fields.whole("max_tokens", 1)?),
        Kind::Completion => fields.whole("max_tokens", 1)?,
    };
    let usual = if kind == Kind::Chat { ANSWER_TOKENS } else { COMPLETION_TOKENS };
    let temperature = fields.number("temperature", 0.0, 2.0)?.unwrap_or(1.0);
    let top_p = fields.number("top_p", 0.0, 1.0)?.unwrap_or(1.0);
    if top_p == 0.0 {
        return Err(Refusal::of("top_p", "top_p is 0; give a number above 0, at most 1"));
    }
    let usage = object.get("stream_options").and_then(|options| options.get("include_usage"));
    Ok(Asked {
        kind,
        model: fields.text("model")?.map(str::to_owned),
        question: match kind {
            Kind::Chat => Question::Chat(fields.conversation()?),
            Kind::Completion => Question::Text(fields.prompt()?),
        },
        max_tokens: tokens.map_or(usual, |tokens| tokens as usize),
        temperature,
        top_p,
        top_k: fields.whole("top_k", -1)?.map_or(0, |k| k.max(0) as usize),
        seed: fields.whole("seed", i64::MIN)?.map(i64::cast_unsigned),
        stop: fields.stop()?,
        stream: fields.flag("stream")?,
        usage: usage.and_then(Value::as_bool).unwrap_or(false),
    })
}

/// The values with which a key that is not served changes no answer. Keys of OpenAI, and those of vLLM, llama.cpp and others that clients send.
fn neutral(key: &str) -> Option<Vec<Value>> {
    Some(match key {
        "n" | "best_of" | "num_beams" | "length_penalty" | "repetition_penalty" | "repeat_penalty"
        | "typical_p" | "tfs_z" => vec![json!(1)],
        "frequency_penalty"
        | "presence_penalty"
        | "min_p"
        | "top_logprobs"
        | "min_tokens"
        | "mirostat"
        | "no_repeat_ngram_size"
        | "epsilon_cutoff"
        | "eta_cutoff"
        | "xtc_probability"
        | "dry_multiplier" => {
            vec![json!(0)]
        }
        "logprobs"
        | "echo"
        | "ignore_eos"
        | "use_beam_search"
        | "include_stop_str_in_output"
        | "continue_final_message"
        | "return_tokens_as_token_ids"
        | "return_token_ids" => vec![json!(false)],
        "do_sample" | "add_generation_prompt" | "skip_special_tokens" => vec![json!(true)],
        "logit_bias" => vec![json!({})],
        "suffix" => vec![json!("")],
        "tools" | "functions" | "documents" | "stop_token_ids" | "bad_words" | "allowed_token_ids" => {
            vec![json!([])]
        }
        "tool_choice" | "function_call" => vec![json!("none"), json!("auto")],
        "response_format" => vec![json!({"type": "text"})],
        "modalities" => vec![json!(["text"])],
        "audio"
        | "prediction"
        | "web_search_options"
        | "reasoning"
        | "reasoning_effort"
        | "thinking"
        | "chat_template"
        | "enable_thinking"
        | "guided_choice"
        | "guided_json"
        | "guided_regex"
        | "guided_grammar"
        | "structured_outputs"
        | "grammar"
        | "json_schema"
        | "truncate_prompt_tokens"
        | "prompt_logprobs" => vec![],
        _ => return None,
    })
}

/// The keys of a request, without nulls.
struct Fields<'a>(&'a Map<String, Value>);

impl<'a> Fields<'a> {
    /// What changes an answer, and is not served, where it is wanted.
    fn refuse_what_there_is_not(&self) -> Result<(), Refusal> {
        let is_wanted = |key: &str, value: &Value| {
            let nothing = neutral(key)?;
            let is_same = |other: &Value| match (value.as_f64(), other.as_f64()) {
                (Some(value), Some(other)) => value == other,
                _ => value == other,
            };
            Some(!nothing.iter().any(is_same))
        };
        match self.0.iter().find(|(key, value)| is_wanted(key, value) == Some(true)) {
            None => Ok(()),
            Some((key, _)) => {
                let message = format!("`{key}` is not served with this value by fleet; leave it out");
                Err(Refusal::of(key, message).coded("unsupported_parameter"))
            }
        }
    }

    fn number(&self, key: &str, least: f64, most: f64) -> Result<Option<f64>, Refusal> {
        let Some(value) = self.0.get(key) else { return Ok(None) };
        match value.as_f64() {
            Some(number) if (least..=most).contains(&number) => Ok(Some(number)),
            _ => Err(wrong(key, value, &format!("a number from {least} to {most}"))),
        }
    }

    fn whole(&self, key: &str, least: i64) -> Result<Option<i64>, Refusal> {
        let Some(value) = self.0.get(key) else { return Ok(None) };
        match value.as_i64() {
            Some(number) if number >= least => Ok(Some(number)),
            _ if least == i64::MIN => Err(wrong(key, value, "a whole number")),
            _ => Err(wrong(key, value, &format!("a whole number of at least {least}"))),
        }
    }

    fn flag(&self, key: &str) -> Result<bool, Refusal> {
        match self.0.get(key) {
            None => Ok(false),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(value) => Err(wrong(key, value, "true or false")),
        }
    }

    fn text(&self, key: &str) -> Result<Option<&'a str>, Refusal> {
        match self.0.get(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(value) => Err(wrong(key, value, "a text")),
        }
    }

    fn stop(&self) -> Result<Vec<String>, Refusal> {
        let wanted = "a text, or a list of texts, none of them empty";
        let stops = match self.0.get("stop") {
            None => return Ok(Vec::new()),
            Some(Value::Array(list)) => list.as_slice(),
            Some(one) => std::slice::from_ref(one),
        };
        if stops.len() > STOPS_MAX {
            return Err(Refusal::of(
                "stop",
                format!("stop has {} texts; give at most {STOPS_MAX}", stops.len()),
            ));
        }
        let stop = |value: &Value| match value.as_str() {
            Some(text) if !text.is_empty() && text.len() <= STOP_BYTES_MAX => Ok(text.to_owned()),
            _ => Err(wrong("stop", value, wanted)),
        };
        stops.iter().map(stop).collect()
    }

    fn prompt(&self) -> Result<String, Refusal> {
        let wanted = "one text: several, and lists of tokens, are not served";
        match self.0.get("prompt") {
            None => Err(Refusal::of("prompt", "`prompt` is missing: the text to continue")),
            Some(Value::String(text)) => Ok(text.clone()),
            Some(Value::Array(list)) => match &list[..] {
                [Value::String(text)] => Ok(text.clone()),
                _ => Err(Refusal::of("prompt", format!("`prompt` is no list of {wanted}"))),
            },
            Some(value) => Err(wrong("prompt", value, wanted)),
        }
    }

    fn conversation(&self) -> Result<Conversation, Refusal> {
        let mut messages = match self.0.get("messages") {
            None => return Err(Refusal::of("messages", "`messages` is missing: the conversation to answer")),
            Some(Value::Array(messages)) => messages.clone(),
            Some(value) => return Err(wrong("messages", value, "a list of messages")),
        };
        for (at, message) in messages.iter_mut().enumerate() {
            if let Some(content) = message.get_mut("content") {
                join_parts(content).map_err(|what| {
                    Refusal::of("messages", format!("messages[{at}].content has {what}; give text alone"))
                })?;
            }
        }
        let conversation = Conversation::new(&messages);
        let mut conversation = conversation.map_err(|e| Refusal::of("messages", e.to_string()))?;
        match self.0.get("chat_template_kwargs") {
            None => {}
            Some(Value::Object(variables)) => conversation.variables = variables.clone(),
            Some(value) => return Err(wrong("chat_template_kwargs", value, "an object")),
        }
        Ok(conversation)
    }
}

/// A list of parts of text becomes one text, as most templates want it.
fn join_parts(content: &mut Value) -> Result<(), String> {
    let Value::Array(parts) = content else { return Ok(()) };
    let text = |part: &Value| match (part.get("type").and_then(Value::as_str), part.get("text")) {
        (Some("text"), Some(Value::String(text))) => Ok(text.clone()),
        (Some(kind), _) => Err(format!("a part of the type {}", short(&json!(kind)))),
        (None, _) => Err("a part without a type".to_owned()),
    };
    let texts = parts.iter().map(text).collect::<Result<Vec<String>, String>>()?;
    *content = texts.join("\n").into();
    Ok(())
}

fn wrong(key: &str, value: &Value, wanted: &str) -> Refusal {
    Refusal::of(key, format!("`{key}` is {}; give {wanted}", short(value)))
}

fn short(value: &Value) -> String {
    const MOST: usize = 60;
    let text = value.to_string();
    match text.char_indices().nth(MOST) {
        Some((end, _)) => format!("{} ...", &text[..end]),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chat(more: Value) -> Result<Asked, Refusal> {
        let mut body = json!({"messages": [{"role": "user", "content": "hi"}]});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        asked(Kind::Chat, body.to_string().as_bytes())
    }

    #[test]
    fn what_is_not_said_is_openais_default() {
        let plain = chat(json!({})).unwrap();
        assert_eq!((plain.temperature, plain.top_p, plain.top_k, plain.max_tokens), (1.0, 1.0, 0, 1024));
        assert_eq!((plain.model, plain.seed, plain.stream, plain.stop), (None, None, false, vec![]));
        let body = json!({"prompt": ["a"], "stop": "b", "max_tokens": null, "seed": -1, "user": "x"});
        let plain = asked(Kind::Completion, body.to_string().as_bytes()).unwrap();
        assert_eq!(plain.question, Question::Text("a".into()));
        assert_eq!((plain.max_tokens, plain.stop, plain.seed), (16, vec!["b".to_owned()], Some(u64::MAX)));
        assert_eq!(chat(json!({"max_tokens": 3, "max_completion_tokens": 4})).unwrap().max_tokens, 4);
        let neutral = json!({"n": 1, "logprobs": false, "presence_penalty": 0.0, "tools": [], "top_k": -1,
            "response_format": {"type": "text"}, "repetition_penalty": 1.0, "ignore_eos": false});
        assert!(chat(neutral).is_ok());
    }

    #[test]
    fn parts_of_text_are_joined() {
        let parts = json!([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]);
        let Question::Chat(conversation) =
            chat(json!({"messages": [{"role": "user", "content": parts}]})).unwrap().question
        else {
            panic!("a conversation")
        };
        assert_eq!(conversation.last_text(), "a\nb");
        let image = json!({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]});
        assert!(chat(image).unwrap_err().message.contains("messages[0].content has a part of the type"));
    }

    #[test]
    fn what_is_wrong_is_named_by_its_key() {
        for (wrong, key) in [
            (json!({"temperature": "hot"}), "temperature"),
            (json!({"temperature": 3}), "temperature"),
            (json!({"top_p": 0}), "top_p"),
            (json!({"max_tokens": 0}), "max_tokens"),
            (json!({"max_tokens": 1.5}), "max_tokens"),
            (json!({"stream": "yes"}), "stream"),
            (json!({"stop": [""]}), "stop"),
            (json!({"stop": vec!["a"; 17]}), "stop"),
            (json!({"seed": "x"}), "seed"),
            (json!({"model": 3}), "model"),
            (json!({"messages": null}), "messages"),
            (json!({"messages": []}), "messages"),
            (json!({"messages": "hi"}), "messages"),
            (json!({"messages": [{"content": "no role"}]}), "messages"),
            (json!({"n": 2}), "n"),
            (json!({"tools": [{}]}), "tools"),
            (json!({"response_format": {"type": "json_object"}}), "response_format"),
            (json!({"logprobs": true}), "logprobs"),
            (json!({"continue_final_message": true}), "continue_final_message"),
            (json!({"guided_choice": ["yes", "no"]}), "guided_choice"),
            (json!({"min_p": 0.1}), "min_p"),
        ] {
            let refused = chat(wrong.clone()).expect_err(&wrong.to_string());
            assert_eq!((refused.status, refused.param.as_deref()), (400, Some(key)), "{refused:?}");
            assert!(!refused.message.contains('\n'));
        }
        for (body, what) in [("", "no JSON"), ("[1]", "no JSON object"), ("{\"a\": ", "no JSON")] {
            assert!(asked(Kind::Chat, body.as_bytes()).unwrap_err().message.contains(what), "{body}");
        }
        let deep = "[".repeat(100_000);
        assert!(asked(Kind::Chat, deep.as_bytes()).is_err());
        let two = asked(Kind::Completion, b"{\"prompt\": [\"a\", \"b\"]}").unwrap_err();
        assert_eq!(two.param.as_deref(), Some("prompt"));
    }
}
