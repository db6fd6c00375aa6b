//! What a template is given: messages as JSON, brought into the form in which transformers hands them over.

use super::ChatError;
use serde_json::{Map, Value};

pub(super) type Object = Map<String, Value>;

/// Names under which the thoughts of an answer are known, the standard one first.
pub(crate) const REASONING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

const SHAPE: &str = "a message is an object such as {\"role\": \"user\", \"content\": \"...\"}";

/// Messages, and what a template may want beside them.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Conversation {
    messages: Vec<Object>,
    /// JSON schemas of functions.
    pub tools: Option<Vec<Value>>,
    /// What is to be answered from, usually with `title` and `text`.
    pub documents: Option<Vec<Value>>,
    /// Variables of one family's templates, such as `enable_thinking`.
    pub variables: Object,
}

impl Conversation {
    /// Of messages as they stand in a file: objects with a role, and with content (text, or a list of blocks) or whatever else the
    /// template reads. A null is a key that is not there.
    pub fn new(messages: &[Value]) -> Result<Conversation, ChatError> {
        if messages.is_empty() {
            return Err(ChatError::new("the conversation has no messages", "give it at least one"));
        }
        let messages = messages.iter().enumerate().map(|(index, message)| checked(index, message));
        Ok(Conversation { messages: messages.collect::<Result<_, _>>()?, ..Conversation::default() })
    }

    /// One question of a user.
    pub fn ask(system: Option<&str>, question: &str) -> Conversation {
        let messages =
            system.map(|text| message("system", text)).into_iter().chain([message("user", question)]);
        Conversation { messages: messages.collect(), ..Conversation::default() }
    }

    /// A message at the end.
    pub(super) fn add(&mut self, role: &str, text: &str) {
        self.messages.push(message(role, text));
    }

    /// What the last message says, where that is one text.
    pub fn last_text(&self) -> &str {
        let content = self.messages.last().and_then(|message| message.get("content"));
        content.and_then(Value::as_str).unwrap_or_default()
    }

    pub fn len(&self) -> usize {
        self.messages.len()
    }

    pub fn is_empty(&self) -> bool {
        self.messages.is_empty()
    }

    pub(super) fn messages(&self) -> &[Object] {
        &self.messages
    }

    pub(super) fn messages_mut(&mut self) -> &mut Vec<Object> {
        &mut self.messages
    }

    pub(super) fn role(&self, index: usize) -> &str {
        self.messages[index].get("role").and_then(Value::as_str).unwrap_or_default()
    }

    /// The first `len` messages.
    pub(super) fn prefix(&self, len: usize) -> Conversation {
        let Conversation { messages, tools, documents, variables } = self;
        Conversation {
            messages: messages[..len].to_vec(),
            tools: tools.clone(),
            documents: documents.clone(),
            variables: variables.clone(),
        }
    }
}

fn message(role: &str, text: &str) -> Object {
    Object::from_iter([("role".into(), role.into()), ("content".into(), text.into())])
}

fn checked(index: usize, message: &Value) -> Result<Object, ChatError> {
    let wrong = |what: String| ChatError::new(format!("messages[{index}] {what}"), SHAPE);
    let object = message.as_object().ok_or_else(|| wrong("is no object".into()))?;
    let mut message: Object = object.clone();
    message.retain(|_, value| !value.is_null());
    match message.get("role") {
        Some(Value::String(role)) if !role.is_empty() => {}
        Some(role) => return Err(wrong(format!("has the role {role}"))),
        None => return Err(wrong("has no role".into())),
    }
    match message.get("content") {
        None | Some(Value::String(_)) => {}
        Some(Value::Array(blocks)) if blocks.iter().all(Value::is_object) => {}
        Some(_) => return Err(wrong("has content that is neither text nor a list of blocks".into())),
    }
    let thoughts = REASONING.iter().find_map(|name| message.get(*name)).cloned();
    if let Some(thoughts) = thoughts {
        message.entry("thinking").or_insert_with(|| thoughts.clone());
        message.insert("reasoning_content".into(), thoughts);
    }
    Ok(message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn nulls_are_absent_and_thoughts_have_both_names() {
        let given = json!([{"role": "assistant", "content": null, "reasoning": "hm", "tool_calls": [null]}]);
        let made = Conversation::new(given.as_array().unwrap()).unwrap();
        let expected = json!({"role": "assistant", "reasoning": "hm", "tool_calls": [null], "thinking": "hm", "reasoning_content": "hm"});
        assert_eq!(Value::Object(made.messages()[0].clone()), expected);
    }

    #[test]
    fn what_is_no_message_is_named_by_its_index() {
        let said = |last: Value| {
            Conversation::new(&[json!({"role": "user", "content": "a"}), last]).unwrap_err().to_string()
        };
        for (bad, what) in [
            (json!("text"), "messages[1] is no object"),
            (json!({"content": "a"}), "messages[1] has no role"),
            (json!({"role": 3}), "messages[1] has the role 3"),
            (json!({"role": "user", "content": 3}), "messages[1] has content that is neither"),
            (json!({"role": "user", "content": ["a"]}), "messages[1] has content that is neither"),
        ] {
            assert!(said(bad.clone()).starts_with(what), "{}", said(bad));
        }
        assert!(Conversation::new(&[]).unwrap_err().to_string().contains("no messages"));
    }
}
