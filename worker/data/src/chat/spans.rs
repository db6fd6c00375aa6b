//! Where the assistant speaks, for a template that does not say it. Two ways:
//!
//! 1. By beginnings: from the text of all that is said before, with the beginning of an answer, to the text with the answer, where both are
//!    beginnings of the whole.
//! 2. By changes, where a template writes an answer otherwise once there are later messages (as those that drop earlier thoughts do), or asks
//!    otherwise than it writes: the text changes where the answer does, and behind a mark at the answer's end stands what ends it.
//!
//! Where neither tells, nothing is guessed.

use super::{ChatError, Conversation, Ending, Rendered, Template};
use std::ops::Range;
use time::OffsetDateTime;

const CURE: &str = "choose a template with generation blocks ({% generation %} ... {% endgeneration %} around what the assistant writes)";

/// Stands in no text, and no template writes it otherwise.
pub(super) const MARK: &str = "\u{f0f0}\u{f0f1}\u{f0f2}";

impl Template {
    /// A whole conversation to learn from, with the assistant's parts: by the template's generation blocks, or by the texts of changed
    /// conversations. A part ends with what the template writes behind an answer.
    pub fn render_marked(
        &self,
        conversation: &Conversation,
        now: OffsetDateTime,
    ) -> Result<Rendered, ChatError> {
        let mut rendered = self.render(conversation, Ending::Complete, now)?;
        if let Some(line) = self.misplaced() {
            return Err(ChatError::new(MISPLACED, CURE).of_template(self.name(), Some(line)));
        }
        if self.marks_assistant() {
            return Ok(rendered);
        }
        let text = &rendered.text;
        let asked = Asked { template: self, conversation, text, ending: Ending::Complete, now };
        let mut spans: Vec<Range<usize>> = Vec::new();
        for index in (0..conversation.len()).filter(|index| conversation.role(*index) == "assistant") {
            let after = spans.last().map_or(0, |span| span.end);
            let span = asked.by_beginnings(index).or_else(|| asked.by_changes(index));
            spans.push(span.filter(|span| span.start >= after && span.start < span.end).ok_or_else(
                || {
                    ChatError::new(UNKNOWN, CURE)
                        .of_template(self.name(), None)
                        .at_message(index, "assistant")
                },
            )?);
        }
        rendered.assistant = spans;
        Ok(rendered)
    }
}

const MISPLACED: &str =
    "a generation block in a macro, a set block or the like: where its text stands is not known";
const UNKNOWN: &str = "where this answer stands in what the template writes cannot be told, by the text of the conversation up to here or by what changes with the answer";

/// A conversation, and what the template writes of it.
struct Asked<'a> {
    template: &'a Template,
    conversation: &'a Conversation,
    text: &'a str,
    ending: Ending,
    now: OffsetDateTime,
}

/// What a message says: its text, or the name of its last call of a function.
#[derive(Clone, Copy)]
enum Said {
    Text,
    Call,
}

impl Asked<'_> {
    fn by_beginnings(&self, index: usize) -> Option<Range<usize>> {
        let beginning = |len: usize, ending| {
            let text = self.written(&self.conversation.prefix(len), ending)?;
            self.text.starts_with(&text).then_some(text.len())
        };
        Some(beginning(index, Ending::Prompt)?..beginning(index + 1, Ending::Complete)?)
    }

    fn by_changes(&self, index: usize) -> Option<Range<usize>> {
        let last = self.marked_end(index)?;
        let asks = self.asks(index)?;
        let behind = &self.text[last..];
        // What ends the answer where it is the last message, or else (some end a last one otherwise) where another answer is asked for.
        let as_last = self.behind(index, Ending::Complete)?;
        let as_earlier = || Some(self.behind(index, Ending::Prompt)?.strip_suffix(asks.as_str())?.to_owned());
        let len = match behind.starts_with(&as_last) {
            true => as_last.len(),
            false => {
                [Some(as_last), as_earlier()].iter().flatten().filter_map(|end| both(end, behind)).max()?
            }
        };
        Some(self.first_change(index, last, &asks)?..last + len)
    }

    /// What the template writes behind an answer, where the conversation goes no further.
    fn behind(&self, index: usize, ending: Ending) -> Option<String> {
        let alone = self.conversation.prefix(index + 1);
        let text = self.written(&alone, ending)?;
        let alone = Asked { conversation: &alone, text: &text, ending, ..*self };
        Some(text[alone.marked_end(index)?..].to_owned())
    }

    /// What the template writes to ask for an answer.
    fn asks(&self, index: usize) -> Option<String> {
        let before = self.conversation.prefix(index);
        let asks = self.written(&before, Ending::Prompt)?;
        Some(asks[common(&asks, &self.written(&before, Ending::Complete)?)..].to_owned())
    }

    /// Where an answer begins that ends at `last`: behind what `asks` for it, if that stands there, else where the text changes with the
    /// answer.
    fn first_change(&self, index: usize, last: usize, asks: &str) -> Option<usize> {
        let change = |said| {
            let changed = self.written(&self.changed(index, said, |_| MARK.to_owned())?, self.ending)?;
            changed.contains(MARK).then(|| common(&changed, self.text))
        };
        let (text, call) = (change(Said::Text), change(Said::Call));
        let change = text.into_iter().chain(call).min()?;
        // Not within the message before, which may say what asks.
        let floor = if index == 0 { Some(0) } else { self.marked_end(index - 1) };
        let header = floor.filter(|floor| *floor <= change).and_then(|floor| {
            // As much of it as stands there: some ask with the beginning of a thought, and write none where there is none.
            let found = |asks: &str| self.text[floor..change].rfind(asks).map(|at| floor + at + asks.len());
            parts(asks).find_map(found)
        });
        // What a call of a function begins with does not change with it.
        header.or(text).filter(|start| *start <= last)
    }

    /// Where what a message says ends, by a mark behind it: behind its last call where the template writes that.
    fn marked_end(&self, index: usize) -> Option<usize> {
        let marked_end = |said| {
            let marked = self.changed(index, said, |text| format!("{text}{MARK}"))?;
            let marked = self.written(&marked, self.ending)?;
            let (_, behind) = marked.split_once(MARK)?;
            // What a function answers may have its name, too.
            let behind = if let Said::Call = said { behind.replace(MARK, "") } else { behind.to_owned() };
            let is_end = self.text.ends_with(&behind) && !behind.contains(MARK);
            is_end.then(|| self.text.len() - behind.len())
        };
        [Said::Call, Said::Text].into_iter().find_map(marked_end)
    }

    /// The conversation with something changed that a message says.
    fn changed(&self, index: usize, said: Said, change: impl Fn(&str) -> String) -> Option<Conversation> {
        let mut conversation = self.conversation.clone();
        let message = &mut conversation.messages_mut()[index];
        let said = match said {
            Said::Call => {
                let call = message.get_mut("tool_calls")?.as_array_mut()?.last_mut()?;
                match call.get("function").is_some() {
                    true => call.get_mut("function")?.get_mut("name")?,
                    false => call.get_mut("name")?,
                }
            }
            Said::Text => message.get_mut("content")?,
        };
        *said = change(said.as_str()?).into();
        Some(conversation)
    }

    fn written(&self, conversation: &Conversation, ending: Ending) -> Option<String> {
        self.template.attempt(conversation, ending, self.now).ok().map(|rendered| rendered.text)
    }
}

/// How much of what may end an answer stands behind one. A marker or a word of which both have the beginning alone is another one.
fn both(end: &str, behind: &str) -> Option<usize> {
    Some(end[..common(end, behind)].rfind([' ', '\n', '>', ']'])? + 1)
}

/// A text, and its beginnings that end behind a line or a marker, the longest first.
fn parts(text: &str) -> impl Iterator<Item = &str> {
    let ends = text.rmatch_indices(['\n', '>', ']']).map(|(at, end)| at + end.len());
    [text.len()].into_iter().chain(ends).filter(|end| *end > 0).map(|end| &text[..end])
}

/// Bytes with which both begin, whole characters.
fn common(a: &str, b: &str) -> usize {
    a.chars().zip(b.chars()).take_while(|(a, b)| a == b).map(|(a, _)| a.len_utf8()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};
    use std::collections::BTreeMap;
    use std::fs;
    use std::path::Path;

    const NOW: OffsetDateTime = OffsetDateTime::UNIX_EPOCH;

    fn golden(name: &str) -> Template {
        let path =
            Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/chat/templates/{name}.jinja"));
        let special = [("bos_token", "<s>"), ("eos_token", "</s>")];
        let special = special.map(|(name, token)| (name.to_owned(), token.to_owned()));
        Template::parse(name, &fs::read_to_string(path).unwrap(), BTreeMap::from(special)).unwrap()
    }

    fn talk(messages: Value) -> Conversation {
        Conversation::new(messages.as_array().unwrap()).unwrap()
    }

    fn two_turns() -> Conversation {
        talk(json!([
            {"role": "user", "content": "<|im_start|>assistant\nWho?"}, {"role": "assistant", "content": "Me.  "},
            {"role": "user", "content": "ASSISTANT: And?"}, {"role": "assistant", "content": "You, \u{1f600}"},
        ]))
    }

    fn learnt(template: &Template, conversation: &Conversation) -> Vec<String> {
        let rendered =
            template.render_marked(conversation, NOW).unwrap_or_else(|e| panic!("{}: {e}", template.name()));
        rendered.assistant.iter().map(|span| rendered.text[span.clone()].to_owned()).collect()
    }

    /// Those of public models that write an earlier answer otherwise than a last one, or ask otherwise than they write.
    #[test]
    fn answers_are_found_where_beginnings_are_written_otherwise() {
        for (name, first, last) in [
            ("qwen3", "Me.  <|im_end|>\n", "<think>\n\n</think>\n\nYou, \u{1f600}<|im_end|>\n"),
            (
                "deepseek_r1_distill",
                "Me.  <\u{ff5c}end\u{2581}of\u{2581}sentence\u{ff5c}>",
                "You, \u{1f600}<\u{ff5c}end\u{2581}of\u{2581}sentence\u{ff5c}>",
            ),
            ("vicuna", "Me.</s>\n\n\n", "You, \u{1f600}</s>\n\n\n"),
            ("phi3", "Me.  <|end|>\n", "You, \u{1f600}<|end|>\n</s>"),
        ] {
            assert_eq!(learnt(&golden(name), &two_turns()), [first, last], "{name}");
        }
    }

    #[test]
    fn thoughts_and_calls_are_part_of_an_answer() {
        let call = json!({"type": "function", "function": {"name": "look", "arguments": {"at": "sky"}}});
        let conversation = talk(json!([
            {"role": "user", "content": "Weather?"}, {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "blue"}, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nFine."},
        ]));
        let found = learnt(&golden("qwen3"), &conversation);
        let called =
            "<tool_call>\n{\"name\": \"look\", \"arguments\": {\"at\": \"sky\"}}\n</tool_call><|im_end|>\n";
        assert_eq!(found, [called, "<think>\nhm\n</think>\n\nFine.<|im_end|>\n"]);
    }

    #[test]
    fn an_answer_begins_behind_as_much_of_what_asks_as_stands_there() {
        let call = json!({"type": "function", "function": {"name": "look", "arguments": {"at": "sky"}}});
        let conversation = talk(json!([
            {"role": "user", "content": "Weather?"}, {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "blue"}, {"role": "assistant", "content": "Fine."},
            {"role": "user", "content": "And?"}, {"role": "assistant", "content": "<p>", "reasoning_content": "hm"},
        ]));
        for name in ["qwen3_5_think", "nemotron_3_nano"] {
            let found = learnt(&golden(name), &conversation);
            assert!(
                found.len() == 3 && found.iter().all(|said| said.ends_with("<|im_end|>\n")),
                "{name}: {found:?}"
            );
            assert!(found[0].contains("look") && found[0].contains("<tool_call>"), "{name}: {found:?}");
            assert!(
                !found.concat().contains("assistant") && !found.concat().contains("blue"),
                "{name}: {found:?}"
            );
            assert!(found[2].contains("hm") && found[2].contains("<p>"), "{name}: {found:?}");
        }
    }

    /// Ends of an earlier answer that a last one has otherwise are those that the makers of a template with generation blocks mark.
    #[test]
    fn a_last_answer_may_end_otherwise_than_earlier_ones() {
        let call = json!({"type": "function", "function": {"name": "look", "arguments": {"at": "sky"}}});
        let calls = talk(json!([
            {"role": "user", "content": "Weather?"}, {"role": "assistant", "thinking": "hm", "tool_calls": [call]},
            {"role": "tool", "content": "blue"}, {"role": "assistant", "content": "Fine."},
            {"role": "user", "content": "And?"}, {"role": "assistant", "content": "More.", "thinking": "so"},
        ]));
        for conversation in [two_turns(), calls] {
            let marked = golden("gptoss_training").render_marked(&conversation, NOW).unwrap();
            assert_eq!(learnt(&golden("gptoss"), &conversation).len(), marked.assistant.len());
            let found = golden("gptoss").render_marked(&conversation, NOW).unwrap();
            let said =
                |span: &Range<usize>| marked.text[span.clone()].trim_start_matches("<|start|>assistant");
            let expected: Vec<&str> = marked.assistant.iter().map(said).collect();
            assert_eq!(learnt(&golden("gptoss"), &conversation), expected, "{}", found.text);
        }
    }

    /// DeepSeek's templates ask whether the content is none.
    #[test]
    fn a_call_with_a_text_and_one_without_are_learnt() {
        let call =
            json!({"type": "function", "function": {"name": "look", "arguments": "{\"at\": \"sky\"}"}});
        let (calls, end) =
            ("tool\u{2581}calls\u{2581}begin", "<\u{ff5c}end\u{2581}of\u{2581}sentence\u{ff5c}>");
        for said in [json!({}), json!({"content": null}), json!({"content": "I look."})] {
            let mut answer = json!({"role": "assistant", "tool_calls": [call]});
            answer.as_object_mut().unwrap().extend(said.as_object().unwrap().clone());
            let talk = |answer: &Value| {
                talk(json!([
                    {"role": "user", "content": "Weather?"}, answer, {"role": "tool", "content": "blue"},
                    {"role": "assistant", "content": "Fine."},
                ]))
            };
            let found = learnt(&golden("deepseekv3"), &talk(&answer));
            assert!(found[0].contains(calls) && found[0].ends_with(end), "{said}: {found:?}");
            assert!(said["content"].is_null() || found[0].starts_with("I look."), "{found:?}");
            assert_eq!(found[1], format!("Fine.{end}"));
            // The other one writes calls alone or the text alone, and ends no turn with one call.
            let found = learnt(&golden("deepseek_r1_distill"), &talk(&answer));
            assert_eq!(found[0].contains(calls), said["content"].is_null(), "{found:?}");
            assert_eq!(found[1], format!("Fine.{end}"));
        }
    }

    /// Where beginnings tell, changes tell the same.
    #[test]
    fn both_ways_agree() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/chat/templates");
        let conversation = two_turns();
        let mut compared = 0;
        for entry in fs::read_dir(dir).unwrap() {
            let name = entry.unwrap().path().file_stem().unwrap().to_str().unwrap().to_owned();
            let template = golden(&name);
            let Ok(rendered) = template.render(&conversation, Ending::Complete, NOW) else { continue };
            let (template, conversation, text) = (&template, &conversation, &rendered.text);
            let asked = Asked { template, conversation, text, ending: Ending::Complete, now: NOW };
            for index in [1, 3] {
                let Some(span) = asked.by_beginnings(index) else { continue };
                let other = asked.by_changes(index).unwrap_or_else(|| panic!("{name}, {index}"));
                // A template that asks with nothing does not tell its spaces from the answer's.
                let [span, other] = [span, other].map(|span| rendered.text[span].trim_start());
                assert_eq!(span, other, "{name}, {index}");
                compared += 1;
            }
        }
        assert!(compared > 20, "{compared}");
    }

    #[test]
    fn what_cannot_be_told_is_refused() {
        let twice = "{% for m in messages %}{{ m.content }}|{% endfor %}{{ messages[1].content }}";
        let twice = Template::parse("twice", twice, BTreeMap::new()).unwrap();
        let error = twice.render_marked(&two_turns(), NOW).unwrap_err().to_string();
        assert!(error.contains("messages[1]") && error.contains("cannot be told"), "{error}");
    }
}
