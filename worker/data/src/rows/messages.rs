//! Messages in the form of OpenAI, whichever form a row has them in.

use super::fields::Fields;
use super::{Unused, bad};
use crate::chat::REASONING;
use fleet_common::job::Rows;
use serde_json::{Map, Value, json};

/// The messages in a value: a list of them, one alone, or either as JSON in a text, as in a CSV.
pub(super) fn of(rows: &Rows, field: &str, value: &Value) -> Result<Vec<Value>, Unused> {
    match value {
        Value::Array(list) => {
            (0..).zip(list).map(|(index, turn)| message(rows, field, index, turn)).collect()
        }
        Value::Object(_) => Ok(vec![message(rows, field, 0, value)?]),
        Value::String(text) if text.trim_start().starts_with(['[', '{']) => {
            match serde_json::from_str(text) {
                Ok(value @ (Value::Array(_) | Value::Object(_))) => of(rows, field, &value),
                _ => bad(format!("`{field}` is a text that is no JSON of messages")),
            }
        }
        Value::Null => Err(Unused::Empty),
        _ => bad(format!(
            "`{field}` holds no messages, which are a list such as [{{\"role\": \"user\", \"content\": \"...\"}}]"
        )),
    }
}

/// Whether a value is messages rather than a text.
pub(super) fn is_list(value: &Value) -> bool {
    matches!(value, Value::Array(_) | Value::Object(_))
}

pub(super) fn one(role: &str, content: &str) -> Value {
    json!({"role": role, "content": content})
}

pub(super) fn role(message: &Value) -> &str {
    message.get("role").and_then(Value::as_str).unwrap_or_default()
}

/// Whether a message is what is to be learnt.
pub(super) fn is_answer(message: &Value) -> bool {
    role(message) == "assistant"
}

/// Whether a message says nothing, and neither thinks nor calls a function.
pub(super) fn is_silent(message: &Value) -> bool {
    let text = |name: &str| message.get(name).and_then(Value::as_str).unwrap_or_default();
    let says = ["content"].iter().chain(&REASONING).any(|name| !text(name).trim().is_empty());
    !says && !message.as_object().is_some_and(calls)
}

/// Whether a message calls a function, also as OpenAI had it before there were tools.
fn calls(message: &Map<String, Value>) -> bool {
    let has_list = message.get("tool_calls").and_then(Value::as_array).is_some_and(|list| !list.is_empty());
    has_list || message.get("function_call").is_some_and(Value::is_object)
}

/// With the keys `role` and `content` and a role that templates know.
fn message(rows: &Rows, field: &str, index: usize, turn: &Value) -> Result<Value, Unused> {
    let at = format!("`{field}`[{index}]");
    let Value::Object(turn) = turn else {
        return bad(format!("{at} is no message, which is an object with `role` and `content`"));
    };
    let key = |usual: &str, other: &str| {
        let named = rows.field(usual);
        let is_other = !turn.contains_key(named) && turn.contains_key(other);
        if is_other { other.to_owned() } else { named.to_owned() }
    };
    let (role_key, content_key) = (key("role", "from"), key("content", "value"));
    let Some(Value::String(said)) = turn.get(&role_key) else {
        return bad(format!("{at} has no `{role_key}`, which says who speaks"));
    };
    let content = match turn.get(&content_key) {
        Some(Value::Array(parts)) => Some(joined(&at, &content_key, parts)?.into()),
        other => other.cloned(),
    };
    let Some(role) = known_role(said) else {
        let short: String = said.chars().take(40).flat_map(char::escape_debug).collect();
        return bad(format!(
            "{at} has the role `{short}`; known are system, developer, user, assistant and tool"
        ));
    };
    let mut message = Map::new();
    message.insert("role".into(), role.into());
    match content {
        content if said == "function_call" => {
            let calls = tool_calls(&at, &content.unwrap_or_default())?;
            message.insert("tool_calls".into(), calls);
        }
        Some(Value::String(text)) => drop(message.insert("content".into(), text.into())),
        // What calls functions need not say anything.
        None if calls(turn) => {}
        Some(Value::Null) if calls(turn) => drop(message.insert("content".into(), Value::Null)),
        None | Some(Value::Null) => {
            return bad(format!(
                "{at} has no `{content_key}`; what an assistant says may be missing where it has `tool_calls`"
            ));
        }
        Some(_) => {
            return bad(format!("{at}.{content_key} is neither a text nor a list of parts with texts"));
        }
    }
    let others = turn.iter().filter(|(key, _)| **key != role_key && **key != content_key);
    message.extend(others.map(|(key, value)| (key.clone(), value.clone())));
    Ok(Value::Object(message))
}

/// The text of a content in parts, as OpenAI has it: those of text, one behind the other.
fn joined(at: &str, key: &str, parts: &[Value]) -> Result<String, Unused> {
    let text = |(number, part): (usize, &Value)| {
        let kind = part.get("type").and_then(Value::as_str).unwrap_or("text");
        match (kind, part.get("text"), part) {
            ("text" | "input_text" | "output_text", Some(Value::String(text)), _) => Ok(text.clone()),
            ("text", None, Value::String(text)) => Ok(text.clone()),
            ("text" | "input_text" | "output_text", ..) => {
                bad(format!("{at}.{key}[{number}] is a part without `text`"))
            }
            _ => {
                let short: String = kind.chars().take(40).flat_map(char::escape_debug).collect();
                bad(format!("{at}.{key}[{number}] is a part of type `{short}`, and only text is learnt"))
            }
        }
    };
    parts.iter().enumerate().map(text).collect()
}

/// What a role is called by the templates, of all that people call it.
fn known_role(said: &str) -> Option<&'static str> {
    Some(match said {
        "system" => "system",
        "developer" => "developer",
        "user" | "human" => "user",
        "assistant" | "gpt" | "chatgpt" | "bing" | "bard" | "model" | "bot" | "function_call" => "assistant",
        "tool" | "observation" | "ipython" => "tool",
        "function" => "function",
        _ => return None,
    })
}

/// Of ShareGPT's turn of a call: its value is the JSON of one call, or of several.
fn tool_calls(at: &str, content: &Value) -> Result<Value, Unused> {
    let parsed = match content {
        Value::String(text) => serde_json::from_str(text).unwrap_or_default(),
        other => other.clone(),
    };
    let calls = match parsed {
        Value::Array(calls) => calls,
        call => vec![call],
    };
    let call = |call: &Value| {
        let name = call.get("name").filter(|name| name.is_string())?;
        Some(json!({"type": "function", "function": {"name": name, "arguments": call.get("arguments")}}))
    };
    let made: Option<Vec<Value>> = calls.iter().map(call).collect();
    made.filter(|calls| !calls.is_empty()).map(Value::Array).ok_or_else(|| {
        Unused::Bad(format!(
            "{at} is a function_call without the JSON of a call, {{\"name\": ..., \"arguments\": ...}}"
        ))
    })
}

/// The row's `system` text before its messages, where these have none.
pub(super) fn with_system(rows: &Rows, row: &Fields, mut messages: Vec<Value>) -> Result<Vec<Value>, Unused> {
    let system = match row.get(rows.field("system")) {
        None | Some(Value::Null) => return Ok(messages),
        Some(Value::String(text)) => text,
        Some(_) => return bad(format!("`{}` is no text", rows.field("system"))),
    };
    let has = messages.first().is_some_and(|first| ["system", "developer"].contains(&role(first)));
    if !has && !system.trim().is_empty() {
        messages.insert(0, one("system", system));
    }
    Ok(messages)
}

/// A conversation begins with a user, perhaps after a system message.
pub(super) fn check_beginning(messages: &[Value]) -> Result<(), Unused> {
    let first = messages.iter().find(|message| !["system", "developer"].contains(&role(message)));
    match first.map(role) {
        Some("assistant") => {
            bad("the conversation begins with the assistant; it needs a message of the user before")
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(value: Value) -> Result<Value, Unused> {
        of(&Rows::default(), "messages", &value).map(Value::Array)
    }

    #[test]
    fn all_forms_become_one() {
        let wanted =
            json!([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]);
        assert_eq!(read(wanted.clone()).unwrap(), wanted);
        let sharegpt = json!([{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "weight": 0}]);
        assert_eq!(read(sharegpt.clone()).unwrap(), wanted);
        assert_eq!(read(sharegpt.to_string().into()).unwrap(), wanted, "as in a CSV");
        assert_eq!(read(sharegpt[0].clone()).unwrap(), json!([wanted[0]]), "one alone");
        let call =
            json!([{"from": "function_call", "value": "{\"name\": \"f\", \"arguments\": {\"x\": 1}}"}]);
        let calls = json!([{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]);
        assert_eq!(read(call).unwrap(), json!([{"role": "assistant", "tool_calls": calls}]));
        let parts = json!([{"type": "text", "text": "a"}]);
        let in_parts = json!([{"role": "user", "content": parts}, {"role": "assistant", "content": [{"type": "text", "text": ""}, "b"], "weight": 0}]);
        assert_eq!(read(in_parts).unwrap(), wanted, "texts in parts are joined");
        let named = Rows {
            fields: [("role", "who"), ("content", "what")].map(|(a, b)| (a.into(), b.into())).into(),
            ..Rows::default()
        };
        let said = of(&named, "m", &json!([{"who": "user", "what": "a"}])).unwrap();
        assert_eq!(said, [wanted[0].clone()]);
    }

    #[test]
    fn what_is_no_message_is_named() {
        for (value, what) in [
            (json!("hello"), "`messages` holds no messages"),
            (json!("[{"), "no JSON of messages"),
            (json!([{"role": "user", "content": "a"}, "b"]), "`messages`[1] is no message"),
            (json!([{"content": "a"}]), "`messages`[0] has no `role`"),
            (json!([{"role": "narrator", "content": "a"}]), "the role `narrator`; known are system"),
            (json!([{"from": "function_call", "value": "f(1)"}]), "without the JSON of a call"),
            (
                json!([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {}}]}]),
                "`messages`[0].content[1] is a part of type `image_url`, and only text is learnt",
            ),
            (json!([{"role": "user", "content": [{"type": "text"}]}]), "content[0] is a part without `text`"),
            (json!([{"role": "user", "content": null}]), "`messages`[0] has no `content`"),
            (json!([{"from": "gpt"}]), "`messages`[0] has no `content`"),
            (json!([{"role": "assistant", "tool_calls": []}]), "`messages`[0] has no `content`"),
            (json!([{"role": "user", "content": 3}]), "`messages`[0].content is neither a text nor a list"),
        ] {
            let said = read(value.clone());
            assert!(matches!(&said, Err(Unused::Bad(said)) if said.contains(what)), "{value}: {said:?}");
        }
        assert_eq!(read(Value::Null), Err(Unused::Empty));
        let begins = |value: Value| check_beginning(value.as_array().unwrap());
        assert!(begins(json!([{"role": "system"}, {"role": "user"}])).is_ok());
        assert!(begins(json!([{"role": "system"}, {"role": "assistant"}])).is_err());
    }
}
