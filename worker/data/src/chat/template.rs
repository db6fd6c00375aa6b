//! A template, and what it makes of a conversation.

use super::conversation::Object;
use super::generation::{self, Marked};
use super::{ChatError, Conversation, python, strftime};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Serde, Value};
use minijinja::{AutoEscape, Environment, Error, ErrorKind};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use time::OffsetDateTime;

/// Bytes of a template. The largest that are known have 30 KiB.
const TEMPLATE_MAX: usize = 1 << 20;

/// Bytes of what a template renders.
const RENDERED_MAX: usize = 64 << 20;

/// Steps of a rendering; 64 bytes that are computed count as one. A thousand messages take some ten thousand.
const FUEL: u64 = 4 << 20;

/// Of the thread that renders: values within values, as deep as so many steps can nest them, are compared and dropped by recursion.
const STACK: usize = 1 << 30;

/// Calls within calls.
const RECURSION_MAX: usize = 100;

const MARK: &str = "CONTINUE_FINAL_MESSAGE_TAG ";

const CURE_TEMPLATE: &str = "correct the template, or choose another one";
const CURE_VALUE: &str = "change what the conversation has there, or correct the template";
const CURE_CONVERSATION: &str = "change the conversation, or choose another template";

/// A chat template that parses, with the special tokens of its model.
pub struct Template {
    name: String,
    env: Environment<'static>,
    source: String,
    has_blocks: bool,
    /// It asks whether the `content` of a message is none.
    asks_for_null: bool,
    /// The line of a generation block whose place in the text is not known.
    misplaced: Option<usize>,
    special: BTreeMap<String, String>,
}

/// What stands behind the last message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// What the template writes there.
    Complete,
    /// The beginning of an answer (`add_generation_prompt`).
    Prompt,
    /// Nothing, not even the end of the message: the model shall continue it (`continue_final_message`).
    Open,
}

/// A conversation as text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rendered {
    pub text: String,
    /// Where the assistant speaks, as bytes of the text, in order.
    pub assistant: Vec<Range<usize>>,
}

impl Template {
    /// Of a template's text. `name` stands in errors; `special` are the variables `bos_token`, `eos_token` and their like.
    pub fn parse(name: &str, source: &str, special: BTreeMap<String, String>) -> Result<Template, ChatError> {
        if source.len() > TEMPLATE_MAX {
            let what = format!("it has {} bytes; the most is {TEMPLATE_MAX}", source.len());
            return Err(ChatError::new(what, CURE_TEMPLATE).of_template(name, None));
        }
        let source = source.replace("\r\n", "\n").replace('\r', "\n");
        let Marked { source: engines, has_blocks, misplaced } = generation::marked(&source);
        let mut env = Environment::new();
        env.set_auto_escape_callback(|_| AutoEscape::None);
        env.set_fuel(Some(FUEL));
        env.set_recursion_limit(RECURSION_MAX);
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        env.set_syntax(syntax.expect("the usual delimiters"));
        python::add_to(&mut env);
        env.add_function("raise_exception", python::raise_exception);
        env.remove_global("debug");
        env.set_debug(true); // names what is undefined
        let empty = Environment::empty();
        let (name, asks_for_null) = (name.to_owned(), tests_for_null(&source));
        let template = Template { name, env: empty, source, has_blocks, asks_for_null, misplaced, special };
        let name = template.name.clone();
        env.add_template_owned(name, engines).map_err(|e| template.failed(&e))?;
        Ok(Template { env, ..template })
    }

    /// The file, or the name, of it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its text.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// All that decides what it renders.
    pub(crate) fn described(&self) -> String {
        format!("{} {:?}", self.source, self.special)
    }

    /// Whether the template itself marks what the assistant says.
    pub fn marks_assistant(&self) -> bool {
        self.has_blocks
    }

    /// The line of a generation block in a macro or the like, whose place in the text is not known.
    pub(super) fn misplaced(&self) -> Option<usize> {
        self.misplaced
    }

    /// As `apply_chat_template(conversation, tokenize=False)`. `now` is what `strftime_now` writes; the spans are those of generation
    /// blocks.
    pub fn render(
        &self,
        conversation: &Conversation,
        ending: Ending,
        now: OffsetDateTime,
    ) -> Result<Rendered, ChatError> {
        if ending == Ending::Open {
            return self.open(conversation, now);
        }
        let rendered = self.attempt(conversation, ending, now);
        let rendered = rendered.map_err(|error| self.located(error, conversation, now))?;
        self.check_roles(conversation, &rendered.text)?;
        Ok(rendered)
    }

    /// On a thread of its own: its stack is reserved and not used, and should the engine panic, it is an error.
    pub(super) fn attempt(
        &self,
        conversation: &Conversation,
        ending: Ending,
        now: OffsetDateTime,
    ) -> Result<Rendered, ChatError> {
        let failed = |what: String| ChatError::new(what, CURE_TEMPLATE).of_template(&self.name, None);
        std::thread::scope(|scope| {
            let thread = std::thread::Builder::new()
                .name("chat template".into())
                .stack_size(STACK)
                .spawn_scoped(scope, || self.attempt_here(conversation, ending, now))
                .map_err(|e| failed(format!("there is no thread to render it: {e}")))?;
            thread.join().unwrap_or_else(|_| Err(failed("the template engine fails at it".into())))
        })
    }

    fn attempt_here(
        &self,
        conversation: &Conversation,
        ending: Ending,
        now: OffsetDateTime,
    ) -> Result<Rendered, ChatError> {
        let template = self.env.get_template(&self.name).map_err(|e| self.failed(&e))?;
        let written = Arc::new(AtomicUsize::new(0));
        let spans: Arc<Mutex<Vec<Range<usize>>>> = Arc::default();
        let mut context: BTreeMap<String, Value> =
            self.special.iter().map(|(name, token)| (name.clone(), Value::from(token.as_str()))).collect();
        let variables = conversation.variables.iter();
        context.extend(variables.map(|(name, value)| (name.clone(), Value::from(Serde(value)))));
        let mut add = |name: &str, value: Value| context.insert(name.to_owned(), value);
        let messages = self.with_nulls(conversation);
        add("messages", Value::from(Serde(&messages)));
        add("tools", Value::from(Serde(&conversation.tools)));
        add("documents", Value::from(Serde(&conversation.documents)));
        add("add_generation_prompt", Value::from(ending == Ending::Prompt));
        add(
            "strftime_now",
            Value::from_function(move |format: &str| {
                strftime::strftime(format, now).map_err(|what| Error::new(ErrorKind::InvalidOperation, what))
            }),
        );
        if self.has_blocks {
            add(generation::CALLEE, mark(written.clone(), spans.clone()));
        }
        let mut writer = Writer { text: Vec::new(), written };
        template.render_captured_to(context, &mut writer).map(drop).map_err(|e| self.failed(&e))?;
        let text = String::from_utf8(writer.text).expect("templates write texts");
        let assistant = std::mem::take(&mut *spans.lock().unwrap_or_else(PoisonError::into_inner));
        Ok(Rendered { text, assistant })
    }

    /// The messages of a conversation. A message that says nothing has no `content`, as transformers 5.24 has it, whose templates write it
    /// as it is; but one that asks whether `content` is none has null there, as it was before.
    fn with_nulls<'a>(&self, conversation: &'a Conversation) -> Cow<'a, [Object]> {
        let messages = conversation.messages();
        let lacks = |message: &Object| !message.contains_key("content");
        if !self.asks_for_null || !messages.iter().any(lacks) {
            return messages.into();
        }
        let mut messages = messages.to_vec();
        for message in messages.iter_mut().filter(|message| lacks(message)) {
            message.insert("content".into(), serde_json::Value::Null);
        }
        messages.into()
    }

    /// The text up to what the last message says, found by a mark behind it, as transformers does it.
    fn open(&self, conversation: &Conversation, now: OffsetDateTime) -> Result<Rendered, ChatError> {
        let index = conversation.len() - 1; // a conversation has messages
        let refused = |what: &str| {
            ChatError::new(what, CURE_CONVERSATION)
                .of_template(&self.name, None)
                .at_message(index, conversation.role(index))
        };
        let mut marked = conversation.clone();
        let said = marked.messages_mut()[index].get_mut("content").and_then(last_text);
        let said = said.ok_or_else(|| refused("there is no text to continue in the last message"))?;
        let last = said.trim().to_owned();
        said.push_str(MARK);
        let Rendered { mut text, .. } = self.render(&marked, Ending::Complete, now)?;
        let at = text.rfind(MARK.trim()).filter(|_| text.contains(&last));
        let at = at.ok_or_else(|| {
            refused("the template changes what the last message says, so it cannot be continued")
        })?;
        let keeps_spaces = text[at..].starts_with(MARK);
        text.truncate(at);
        if !keeps_spaces {
            text.truncate(text.trim_end().len());
        }
        Ok(Rendered { text, assistant: Vec::new() })
    }

    /// With the message at which it fails: the last of the shortest beginning of the conversation that fails alike.
    fn located(&self, error: ChatError, conversation: &Conversation, now: OffsetDateTime) -> ChatError {
        let fails_alike = |len: &usize| {
            let shorter = self.attempt(&conversation.prefix(*len), Ending::Complete, now);
            shorter.is_err_and(|other| other.is_as(&error))
        };
        let len = conversation.len();
        if error.line.is_none() {
            return error;
        }
        match (1..=len.min(LOCATED_MAX)).find(fails_alike) {
            Some(len) => error.at_message(len - 1, conversation.role(len - 1)),
            None => error,
        }
    }

    /// Templates leave out what they do not know; that a message is left out is said.
    fn check_roles(&self, conversation: &Conversation, text: &str) -> Result<(), ChatError> {
        if !self.source.contains("role") {
            return Ok(());
        }
        for (index, message) in conversation.messages().iter().enumerate() {
            let role = conversation.role(index);
            let said = message.get("content").and_then(|content| content.as_str()).unwrap_or_default().trim();
            if !said.is_empty() && !self.source.contains(role) && !text.contains(said) {
                let what = "the template writes nothing of this message, whose role it does not know";
                return Err(ChatError::new(
                    what,
                    "name the role as the template does, or choose another template",
                )
                .of_template(&self.name, None)
                .at_message(index, role));
            }
        }
        Ok(())
    }

    fn failed(&self, error: &Error) -> ChatError {
        let source = std::error::Error::source(error);
        let raised = source.is_some_and(|source| source.is::<python::Raised>());
        let detail = error.detail();
        let (what, cure) = match error.kind() {
            _ if raised => {
                let text = detail.unwrap_or_default().to_owned();
                (format!("it refuses the conversation: {text}"), CURE_CONVERSATION)
            }
            ErrorKind::OutOfFuel => {
                return ChatError::new(format!("it computes for more than {FUEL} steps"), CURE_TEMPLATE)
                    .of_template(&self.name, None);
            }
            ErrorKind::WriteFailure => {
                return ChatError::new(format!("it writes more than {RENDERED_MAX} bytes"), CURE_TEMPLATE)
                    .of_template(&self.name, None);
            }
            ErrorKind::SyntaxError => {
                (format!("it is no template: {}", detail.unwrap_or("syntax error")), CURE_TEMPLATE)
            }
            ErrorKind::UndefinedError if detail.is_some() => {
                (detail.unwrap_or_default().to_owned(), CURE_VALUE)
            }
            kind => {
                let detail = detail.map(|detail| format!(": {detail}")).unwrap_or_default();
                (format!("{kind}{detail}"), CURE_VALUE)
            }
        };
        ChatError::new(what, cure).of_template(&self.name, error.line())
    }
}

/// Whether a template has `content is none`, also of a key in brackets and with `not`.
fn tests_for_null(source: &str) -> bool {
    let is_asked = |(at, name): (usize, &str)| {
        let behind = source[at + name.len()..].trim_start_matches(['\'', '"', ']']).trim_start();
        let test = behind.strip_prefix("is ").map(str::trim_start);
        test.is_some_and(|test| test.strip_prefix("not ").unwrap_or(test).trim_start().starts_with("none"))
    };
    source.match_indices("content").any(is_asked)
}

/// Of the beginnings of a conversation that are looked at for the message at which a template fails.
const LOCATED_MAX: usize = 256;

/// What a generation block calls: notes how much is written where it begins (true) and ends.
fn mark(written: Arc<AtomicUsize>, spans: Arc<Mutex<Vec<Range<usize>>>>) -> Value {
    Value::from_function(move |begins: bool| {
        let at = written.load(Ordering::Relaxed);
        let mut spans = spans.lock().unwrap_or_else(PoisonError::into_inner);
        match spans.last_mut() {
            _ if begins => spans.push(at..at),
            Some(last) => last.end = at,
            None => {}
        }
    })
}

fn last_text(content: &mut serde_json::Value) -> Option<&mut String> {
    use serde_json::Value;
    match content {
        Value::String(text) => Some(text),
        Value::Array(blocks) => {
            let texts = blocks.iter_mut().rev().filter_map(|block| block.get_mut("text"));
            texts.filter_map(|text| if let Value::String(text) = text { Some(text) } else { None }).next()
        }
        _ => None,
    }
}

/// Takes what a template writes, up to a limit, and tells how much that is.
struct Writer {
    text: Vec<u8>,
    written: Arc<AtomicUsize>,
}

impl io::Write for Writer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.text.len() + bytes.len() > RENDERED_MAX {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.text.extend_from_slice(bytes);
        self.written.store(self.text.len(), Ordering::Relaxed);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests;
