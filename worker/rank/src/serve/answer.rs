//! Answers in OpenAI's words. Pure.

use super::api::Kind;
use crate::generate::{End, Generated};
use serde_json::{Value, json};

/// What all parts of an answer have in common.
#[derive(Clone, Debug)]
pub struct Head {
    pub kind: Kind,
    pub id: String,
    /// Seconds since 1970.
    pub created: u64,
    pub model: String,
}

impl Head {
    /// The answer at once.
    pub fn whole(&self, generated: &Generated) -> Value {
        let finish = finish(generated.end);
        let choice = match self.kind {
            Kind::Chat => json!({"index": 0, "message": {"role": "assistant", "content": generated.text},
                "logprobs": null, "finish_reason": finish}),
            Kind::Completion => {
                json!({"index": 0, "text": generated.text, "logprobs": null, "finish_reason": finish})
            }
        };
        let mut answer = self.part(false, vec![choice]);
        answer["usage"] = usage(generated);
        answer
    }

    /// Who speaks, before the first piece; a completion has no such part.
    pub fn begin(&self) -> Option<Value> {
        let delta = json!({"role": "assistant", "content": ""});
        (self.kind == Kind::Chat).then(|| self.delta(delta, None))
    }

    /// More of the text.
    pub fn piece(&self, text: &str) -> Value {
        match self.kind {
            Kind::Chat => self.delta(json!({"content": text}), None),
            Kind::Completion => self.text(text, None),
        }
    }

    /// Why it ends.
    pub fn end(&self, end: End) -> Value {
        match self.kind {
            Kind::Chat => self.delta(json!({}), Some(finish(end))),
            Kind::Completion => self.text("", Some(finish(end))),
        }
    }

    /// How many tokens there were.
    pub fn usage(&self, generated: &Generated) -> Value {
        let mut part = self.part(true, Vec::new());
        part["usage"] = usage(generated);
        part
    }

    fn delta(&self, delta: Value, finish: Option<&str>) -> Value {
        self.part(true, vec![json!({"index": 0, "delta": delta, "logprobs": null, "finish_reason": finish})])
    }

    fn text(&self, text: &str, finish: Option<&str>) -> Value {
        self.part(true, vec![json!({"index": 0, "text": text, "logprobs": null, "finish_reason": finish})])
    }

    fn part(&self, streamed: bool, choices: Vec<Value>) -> Value {
        let object = match (self.kind, streamed) {
            (Kind::Chat, false) => "chat.completion",
            (Kind::Chat, true) => "chat.completion.chunk",
            (Kind::Completion, _) => "text_completion",
        };
        json!({"id": self.id, "object": object, "created": self.created, "model": self.model, "choices": choices})
    }
}

fn usage(generated: &Generated) -> Value {
    let Generated { prompt_tokens, new_tokens, .. } = generated;
    json!({"prompt_tokens": prompt_tokens, "completion_tokens": new_tokens, "total_tokens": prompt_tokens + new_tokens})
}

fn finish(end: End) -> &'static str {
    match end {
        End::EndOfText | End::StopString => "stop",
        End::MaxNewTokens | End::Context | End::Unread => "length",
    }
}

/// A model that can be asked.
pub fn model(name: &str, created: u64, context: usize) -> Value {
    json!({"id": name, "object": "model", "created": created, "owned_by": "fleet", "max_model_len": context})
}
