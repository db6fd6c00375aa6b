//! What a row teaches.

use super::fields::Fields;
use super::messages::{self, is_list};
use super::{Unused, bad};
use fleet_common::job::{Data, RowFormat, Rows};
use serde_json::{Map, Value};

#[derive(Clone, Debug, PartialEq)]
pub(super) enum Example {
    /// Every token of it.
    Text(String),
    /// What the assistant says in these messages.
    Turns(Talk),
    /// An answer to a prompt; of two, the first is better.
    Answers { prompt: Said, answers: Vec<Said>, given: Given },
}

/// Messages, and what a template may want beside them.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Talk {
    pub messages: Vec<Value>,
    pub given: Given,
}

#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Given {
    pub tools: Option<Vec<Value>>,
    pub variables: Map<String, Value>,
}

#[derive(Clone, Debug, PartialEq)]
pub(super) enum Said {
    Text(String),
    Messages(Vec<Value>),
}

impl Said {
    /// Whether the assistant has a turn in it and says nothing there.
    pub fn has_silent_turn(&self) -> bool {
        let Said::Messages(messages) = self else { return false };
        messages.iter().any(|message| messages::is_answer(message) && messages::is_silent(message))
    }
}

/// How rows are read.
#[derive(Clone, Copy)]
pub(super) struct Reader<'a> {
    pub data: &'a Data,
    pub rows: &'a Rows,
    /// There is a chat template, with which Alpaca's rows become conversations.
    pub has_template: bool,
    /// The job asks for one, so that texts of a prompt and its answer become messages.
    pub is_templated: bool,
}

impl Reader<'_> {
    pub fn read(&self, format: RowFormat, row: &Fields) -> Result<Example, Unused> {
        match format {
            RowFormat::Text => Ok(Example::Text(self.filled(row, &self.data.text_field)?)),
            RowFormat::Messages => self.turns(row, self.rows.field("messages")),
            RowFormat::Conversations => {
                let is_named = self.rows.fields.contains_key("messages");
                self.turns(row, if is_named { self.rows.field("messages") } else { "conversations" })
            }
            RowFormat::PromptCompletion => self.pair(row),
            RowFormat::Alpaca => self.alpaca(row),
            RowFormat::Preference => self.preference(row),
        }
    }

    fn turns(&self, row: &Fields, field: &str) -> Result<Example, Unused> {
        let found = messages::of(self.rows, field, self.value(row, field)?)?;
        if found.is_empty() {
            return Err(Unused::Empty);
        }
        let messages = messages::with_system(self.rows, row, found)?;
        messages::check_beginning(&messages)?;
        if !messages.iter().any(messages::is_answer) {
            return bad(format!("no message in `{field}` is the assistant's, so there is nothing to learn"));
        }
        if messages.iter().filter(|message| messages::is_answer(message)).all(messages::is_silent) {
            return Err(Unused::Empty);
        }
        Ok(Example::Turns(Talk { messages, given: self.given(row)? }))
    }

    fn pair(&self, row: &Fields) -> Result<Example, Unused> {
        let prompt = self.said(row, self.rows.field("prompt"))?;
        let answer = self.answer(row, self.rows.field("completion"))?;
        self.answers(row, prompt, vec![answer])
    }

    fn alpaca(&self, row: &Fields) -> Result<Example, Unused> {
        let (instruction, input) = self.instruction(row)?;
        let output = self.filled(row, self.rows.field("output"))?;
        if !self.has_template {
            let beside = ["system", "history"].map(|usual| self.rows.field(usual));
            if let Some(name) = beside.into_iter().find(|name| row.peek(name).is_some_and(is_filled)) {
                return bad(format!(
                    "`{name}` needs a chat template, and the model has none: name one in data.chat_template"
                ));
            }
            let prompt = Said::Text(alpaca_text(&instruction, &input));
            return Ok(Example::Answers {
                prompt,
                answers: vec![Said::Text(output)],
                given: Given::default(),
            });
        }
        let mut turns = self.history(row)?;
        turns.push(messages::one("user", &asked(&instruction, &input)));
        turns.push(messages::one("assistant", &output));
        let messages = messages::with_system(self.rows, row, turns)?;
        Ok(Example::Turns(Talk { messages, given: self.given(row)? }))
    }

    fn preference(&self, row: &Fields) -> Result<Example, Unused> {
        let [chosen, rejected] = ["chosen", "rejected"].map(|usual| self.rows.field(usual));
        let chosen = self.answer(row, chosen)?;
        let rejected = self.answer(row, rejected)?;
        if chosen == rejected {
            return Err(Unused::Same);
        }
        let has = |usual: &str| row.peek(self.rows.field(usual)).is_some_and(|value| !value.is_null());
        let conversation = ["conversations", self.rows.field("messages")];
        let conversation = conversation.into_iter().find(|name| row.peek(name).is_some_and(is_list));
        let (prompt, answers) = match conversation {
            _ if has("prompt") => {
                let prompt = self.said(row, self.rows.field("prompt"))?;
                let answers = [chosen, rejected].map(|answer| without_prompt(answer, &prompt));
                (prompt, answers)
            }
            Some(name) => {
                let found = messages::of(self.rows, name, self.value(row, name)?)?;
                (Said::Messages(messages::with_system(self.rows, row, found)?), [chosen, rejected])
            }
            None if has("instruction") => {
                let (instruction, input) = self.instruction(row)?;
                match self.has_template {
                    true => {
                        let mut turns = self.history(row)?;
                        turns.push(messages::one("user", &asked(&instruction, &input)));
                        (Said::Messages(messages::with_system(self.rows, row, turns)?), [chosen, rejected])
                    }
                    false => (Said::Text(alpaca_text(&instruction, &input)), [chosen, rejected]),
                }
            }
            None => {
                let is_text = [&chosen, &rejected].iter().all(|said| matches!(said, Said::Text(_)));
                let asks = |name: &&str| is_text && row.peek(name).is_some_and(is_filled);
                if let Some(name) = ASKS.into_iter().find(asks) {
                    return bad(format!(
                        "there is no `{}` beside chosen and rejected, and `{name}` may be what was asked; set data.fields.prompt = \"{name}\"",
                        self.rows.field("prompt")
                    ));
                }
                common_prompt(chosen, rejected)?
            }
        };
        self.answers(row, prompt, answers.into())
    }

    /// Prompt and answers in one form: all texts, or all messages.
    fn answers(&self, row: &Fields, prompt: Said, answers: Vec<Said>) -> Result<Example, Unused> {
        let all_text = answers.iter().chain([&prompt]).all(|said| matches!(said, Said::Text(_)));
        if all_text && !self.is_templated {
            return Ok(Example::Answers { prompt, answers, given: Given::default() });
        }
        let as_messages = |said: Said, role| match said {
            Said::Text(text) => vec![messages::one(role, &text)],
            Said::Messages(messages) => messages,
        };
        let prompt = messages::with_system(self.rows, row, as_messages(prompt, "user"))?;
        messages::check_beginning(&prompt)?;
        match prompt.last().map(messages::role) {
            None | Some("system" | "developer") => return bad("the prompt has no message of the user"),
            Some("assistant") => {
                return bad("the prompt ends with the assistant; it shall end with what is to be answered");
            }
            Some(_) => {}
        }
        let answers: Vec<Vec<Value>> =
            answers.into_iter().map(|answer| as_messages(answer, "assistant")).collect();
        if !answers.iter().flatten().any(messages::is_answer) {
            return bad("no message of the answer is the assistant's");
        }
        let answers = answers.into_iter().map(Said::Messages).collect();
        Ok(Example::Answers { prompt: Said::Messages(prompt), answers, given: self.given(row)? })
    }

    fn given(&self, row: &Fields) -> Result<Given, Unused> {
        let field = self.rows.field("tools");
        let tools = match row.get(field) {
            None | Some(Value::Null) => None,
            Some(Value::Array(tools)) => Some(tools.clone()),
            Some(Value::String(text)) if text.trim().is_empty() => None,
            Some(Value::String(text)) => match serde_json::from_str(text) {
                Ok(Value::Array(tools)) => Some(tools),
                _ => return bad(format!("`{field}` is a text that is no JSON list of functions")),
            },
            Some(_) => return bad(format!("`{field}` is no list of functions")),
        };
        let variables =
            row.get("chat_template_kwargs").and_then(Value::as_object).cloned().unwrap_or_default();
        Ok(Given { tools: tools.filter(|tools| !tools.is_empty()), variables })
    }

    fn instruction(&self, row: &Fields) -> Result<(String, String), Unused> {
        let instruction = self.filled(row, self.rows.field("instruction"));
        let input = match row.get(self.rows.field("input")) {
            None | Some(Value::Null) => String::new(),
            Some(Value::String(text)) => text.clone(),
            Some(_) => return bad(format!("`{}` is no text", self.rows.field("input"))),
        };
        match instruction {
            // All that is asked stands in the input.
            Err(Unused::Empty) if !input.trim().is_empty() => Ok((input, String::new())),
            instruction => Ok((instruction?, input)),
        }
    }

    /// Earlier turns: pairs of what was asked and answered.
    fn history(&self, row: &Fields) -> Result<Vec<Value>, Unused> {
        let field = self.rows.field("history");
        let Some(history) = row.get(field).filter(|history| is_filled(history)) else {
            return Ok(Vec::new());
        };
        // As JSON in a text, as in a CSV.
        let parsed = history.as_str().and_then(|text| serde_json::from_str::<Value>(text).ok());
        let history = parsed.as_ref().unwrap_or(history);
        let pair =
            |pair: &Value| Some((pair.get(0)?.as_str()?.to_owned(), pair.get(1)?.as_str()?.to_owned()));
        let pairs: Option<Vec<_>> = history.as_array().and_then(|pairs| pairs.iter().map(pair).collect());
        let Some(pairs) = pairs else {
            return bad(format!("`{field}` is no list of pairs, [[\"question\", \"answer\"], ...]"));
        };
        let turns = pairs
            .iter()
            .flat_map(|(asked, said)| [messages::one("user", asked), messages::one("assistant", said)]);
        Ok(turns.collect())
    }

    fn value<'r>(&self, row: &Fields<'r>, field: &str) -> Result<&'r Value, Unused> {
        row.get(field).ok_or_else(|| {
            let names: Vec<&str> = row.names().take(12).collect();
            Unused::Bad(format!("no field `{field}` (it has {})", names.join(", ")))
        })
    }

    fn said(&self, row: &Fields, field: &str) -> Result<Said, Unused> {
        match self.value(row, field)? {
            Value::String(text) => Ok(Said::Text(text.clone())),
            list if is_list(list) => Ok(Said::Messages(messages::of(self.rows, field, list)?)),
            _ => bad(format!("`{field}` is neither a text nor a list of messages")),
        }
    }

    /// What is said in answer; without anything in it the row teaches nothing.
    fn answer(&self, row: &Fields, field: &str) -> Result<Said, Unused> {
        match self.said(row, field)? {
            Said::Text(text) if text.trim().is_empty() => Err(Unused::Empty),
            Said::Messages(messages) if messages.iter().all(messages::is_silent) => Err(Unused::Empty),
            said => Ok(said),
        }
    }

    fn filled(&self, row: &Fields, field: &str) -> Result<String, Unused> {
        match self.value(row, field)? {
            Value::String(text) if text.trim().is_empty() => Err(Unused::Empty),
            Value::String(text) => Ok(text.clone()),
            _ => bad(format!("`{field}` is no text")),
        }
    }
}

fn is_filled(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::String(text) => !text.trim().is_empty(),
        Value::Array(list) => !list.is_empty(),
        _ => true,
    }
}

/// What a user asks, as LLaMA-Factory joins it.
fn asked(instruction: &str, input: &str) -> String {
    if input.trim().is_empty() { instruction.to_owned() } else { format!("{instruction}\n{input}") }
}

/// Where there is no chat template: the text of Stanford Alpaca, up to where the answer begins.
fn alpaca_text(instruction: &str, input: &str) -> String {
    match input.trim().is_empty() {
        true => format!(
            "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n### \
             Instruction:\n{instruction}\n\n### Response:\n"
        ),
        false => format!(
            "Below is an instruction that describes a task, paired with an input that provides further context. Write a response that \
             appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
        ),
    }
}

/// An answer that repeats the prompt before it, as whole conversations do.
fn without_prompt(answer: Said, prompt: &Said) -> Said {
    let Said::Messages(messages) = answer else { return answer };
    let repeated = match prompt {
        Said::Messages(prompt) if messages.starts_with(prompt) => prompt.len(),
        Said::Text(prompt) => usize::from(messages.first() == Some(&messages::one("user", prompt))),
        Said::Messages(_) => 0,
    };
    match repeated < messages.len() {
        true => Said::Messages(messages[repeated..].to_vec()),
        false => Said::Messages(messages),
    }
}

/// How others call what was asked.
const ASKS: [&str; 7] = ["question", "input", "query", "instruction", "problem", "user", "context"];

/// The prompt that both begin with, as TRL finds it: of texts up to the space before what differs.
fn common_prompt(chosen: Said, rejected: Said) -> Result<(Said, [Said; 2]), Unused> {
    const NONE: &str = "chosen and rejected have no beginning in common, and there is no `prompt`";
    match (chosen, rejected) {
        (Said::Messages(a), Said::Messages(b)) => {
            let same = a.iter().zip(&b).take_while(|(a, b)| a == b).count();
            match same {
                0 => bad(NONE),
                _ if same == a.len().min(b.len()) => {
                    bad("one of chosen and rejected is the beginning of the other")
                }
                _ => Ok((
                    Said::Messages(a[..same].to_vec()),
                    [a, b].map(|all| Said::Messages(all[same..].to_vec())),
                )),
            }
        }
        (Said::Text(a), Said::Text(b)) => {
            let same: usize =
                a.chars().zip(b.chars()).take_while(|(a, b)| a == b).map(|(a, _)| a.len_utf8()).sum();
            let same = if a[..same].ends_with(' ') { same - 1 } else { same };
            match same {
                0 => bad(NONE),
                _ => Ok((
                    Said::Text(a[..same].to_owned()),
                    [a, b].map(|all| Said::Text(all[same..].to_owned())),
                )),
            }
        }
        _ => bad("one of chosen and rejected is a text, and the other one messages"),
    }
}

#[cfg(test)]
mod tests;
