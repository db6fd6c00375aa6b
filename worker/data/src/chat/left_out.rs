//! What a conversation has and a template does not write: the calls of functions, the functions, the thoughts of an answer, its text beside a
//! call. Templates leave out without a word what they do not know, and what they take to be of no use behind the next question.

use super::spans::MARK;
use super::{Conversation, Ending, Rendered, Template};
use serde_json::{Map, Value};
use time::OffsetDateTime;

/// What a message or its conversation may have, each with the names under which templates ask for it, the first of which is the usual one.
const PARTS: [&[&str]; 4] = [&["tools"], &["tool_calls"], &["function_call"], &super::REASONING];

/// Behind thoughts within a text.
const THOUGHT: &str = "</think>";

/// Something that is not written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum LeftOut {
    /// All that has this name.
    Every(&'static str),
    /// What some answers have under this name, and not that of others.
    Some(&'static str),
    /// The thoughts within the text of an answer.
    Thoughts,
    /// The text of an answer that calls a function.
    BesideCall,
}

impl Template {
    /// What of the conversation its rendering (`Ending::Complete`) would be the same without. Of single messages those from `first` on count, of
    /// which something is learnt.
    pub(crate) fn left_out(
        &self,
        conversation: &Conversation,
        rendered: &Rendered,
        first: usize,
        now: OffsetDateTime,
    ) -> Vec<LeftOut> {
        let same = |other: &Conversation| {
            self.attempt(other, Ending::Complete, now).is_ok_and(|it| it.text == rendered.text)
        };
        let answers = (first..conversation.len()).filter(|index| conversation.role(*index) == "assistant");
        let answers: Vec<usize> = answers.collect();
        let of_names = |names: &[&'static str]| {
            let all = conversation.without(names, None)?;
            let is_known = names.iter().any(|name| self.source().contains(name));
            if !is_known || same(&all) {
                return Some(LeftOut::Every(names[0]));
            }
            let mut others = answers.iter().filter_map(|index| conversation.without(names, Some(*index)));
            others.any(|other| same(&other)).then_some(LeftOut::Some(names[0]))
        };
        let some = |what, changed: fn(&Message, &str) -> Option<String>| {
            let mut others = answers.iter().filter_map(|index| conversation.saying(*index, changed));
            others.any(|other| same(&other)).then_some(what)
        };
        let of_texts =
            [some(LeftOut::Thoughts, other_thoughts), some(LeftOut::BesideCall, other_beside_call)];
        PARTS.into_iter().map(of_names).chain(of_texts).flatten().collect()
    }
}

type Message = Map<String, Value>;

fn other_thoughts(_: &Message, text: &str) -> Option<String> {
    text.contains(THOUGHT).then(|| text.replacen(THOUGHT, &format!("{MARK}{THOUGHT}"), 1))
}

fn other_beside_call(message: &Message, text: &str) -> Option<String> {
    let calls = ["tool_calls", "function_call"].iter().any(|name| message.get(*name).is_some_and(says));
    (calls && !text.trim().is_empty()).then(|| format!("{MARK}{text}"))
}

fn says(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::String(text) => !text.trim().is_empty(),
        Value::Array(list) => !list.is_empty(),
        _ => true,
    }
}

impl Conversation {
    /// The same without what has one of these names, in all messages and beside them or in one; `None` where there is no such thing.
    fn without(&self, names: &[&str], of: Option<usize>) -> Option<Conversation> {
        let mut without = self.clone();
        let mut is_there = false;
        if of.is_none() && names.contains(&"tools") {
            is_there |= without.tools.take().is_some_and(|tools| !tools.is_empty());
        }
        let messages = without.messages_mut().iter_mut().enumerate();
        for (_, message) in messages.filter(|(index, _)| of.is_none_or(|of| of == *index)) {
            for name in names {
                is_there |= message.remove(*name).is_some_and(|value| says(&value));
            }
        }
        is_there.then_some(without)
    }

    /// The same with another text in one message, where there is one to change.
    fn saying(&self, index: usize, change: fn(&Message, &str) -> Option<String>) -> Option<Conversation> {
        let message = &self.messages()[index];
        let text = change(message, message.get("content")?.as_str()?)?;
        let mut saying = self.clone();
        saying.messages_mut()[index].insert("content".into(), text.into());
        Some(saying)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::collections::BTreeMap;
    use std::path::Path;

    const NOW: OffsetDateTime = OffsetDateTime::UNIX_EPOCH;

    fn left_out(source: &str) -> Vec<LeftOut> {
        let call = json!({"type": "function", "function": {"name": "f", "arguments": {}}});
        let messages = json!([{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "3", "tool_calls": []}, {"role": "assistant", "content": "three", "thinking": "hm"}]);
        let mut talk = Conversation::new(messages.as_array().unwrap()).unwrap();
        talk.tools = Some(vec![json!({"type": "function", "function": {"name": "f"}})]);
        let template = Template::parse("t", source, BTreeMap::new()).unwrap();
        let rendered = template.render(&talk, Ending::Complete, NOW).unwrap();
        template.left_out(&talk, &rendered, 0, NOW)
    }

    fn every(names: &[&'static str]) -> Vec<LeftOut> {
        names.iter().map(|name| LeftOut::Every(name)).collect()
    }

    #[test]
    fn what_changes_nothing_in_the_text_is_left_out() {
        let said = "{% for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}";
        assert_eq!(left_out(said), every(&["tools", "tool_calls", "reasoning_content"]));
        let calls = "{% for m in messages %}{{ m.role }}{{ m.content }}{% for c in m.tool_calls %}{{ c.function.name }}{% endfor %}{% endfor %}";
        assert_eq!(left_out(calls), every(&["tools", "reasoning_content"]));
        assert_eq!(
            left_out(&format!("{{{{ tools | tojson }}}}{calls}{{{{ messages[-1].thinking }}}}")),
            every(&[])
        );
        // Thoughts before a question that came later are known to a template that leaves them out.
        let earlier = format!("{{{{ tools }}}}{calls}{{{{ messages[1].reasoning_content }}}}");
        assert_eq!(left_out(&earlier), every(&["reasoning_content"]));
    }

    /// Of several answers a template may write the thoughts of the last one alone, and of one with a call not its text.
    #[test]
    fn what_is_left_out_of_single_answers_is_found() {
        let templates = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/chat/templates");
        let found = |name: &str, messages: Value, first: usize| {
            let source = std::fs::read_to_string(templates.join(format!("{name}.jinja"))).unwrap();
            let template = Template::parse(name, &source, BTreeMap::new()).unwrap();
            let talk = Conversation::new(messages.as_array().unwrap()).unwrap();
            let rendered = template.render(&talk, Ending::Complete, NOW).unwrap();
            template.left_out(&talk, &rendered, first, NOW)
        };
        let thinks = |key: &str, said: [&str; 2]| {
            let mut talk = json!([{"role": "user", "content": "a"}, {"role": "assistant", "content": said[0]},
                {"role": "user", "content": "b"}, {"role": "assistant", "content": said[1]}]);
            for at in [1, 3].into_iter().filter(|_| !key.is_empty()) {
                talk[at][key] = "hm".into();
            }
            talk
        };
        let apart = thinks("reasoning_content", ["x", "y"]);
        assert_eq!(found("qwen3", apart.clone(), 0), [LeftOut::Some("reasoning_content")]);
        assert_eq!(found("qwen3", apart, 3), [], "the first answer is asked with, and not learnt");
        let within = thinks("", ["<think>\nhm\n</think>\n\nx", "<think>\nso\n</think>\n\ny"]);
        assert_eq!(found("qwen3", within.clone(), 0), [LeftOut::Thoughts]);
        assert_eq!(found("qwen2_5", within, 0), []);
        let call = json!({"type": "function", "function": {"name": "f", "arguments": "{}"}});
        let talk = json!([{"role": "user", "content": "a"}, {"role": "assistant", "content": "I look.", "tool_calls": [call]},
            {"role": "tool", "content": "3"}, {"role": "assistant", "content": "three"}]);
        assert_eq!(found("gptoss", talk.clone(), 0), [LeftOut::BesideCall]);
        assert_eq!(found("deepseek_r1_distill", talk.clone(), 0), every(&["tool_calls"]));
        assert_eq!(found("deepseekv3", talk, 0), []);
    }
}
