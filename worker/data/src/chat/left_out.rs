//! What a conversation has beside its texts and a template does not write: the calls of functions, the functions, the thoughts of an answer.
//! Templates leave out without a word what they do not know.

use super::{Conversation, Ending, Rendered, Template};
use serde_json::Value;
use time::OffsetDateTime;

/// What a message or its conversation may have, each with the names under which templates ask for it, the first of which is the usual one.
const PARTS: [&[&str]; 4] = [&["tools"], &["tool_calls"], &["function_call"], &super::REASONING];

impl Template {
    /// The usual names of what the conversation has and its rendering (`Ending::Complete`) would be the same without.
    pub(crate) fn left_out(
        &self,
        conversation: &Conversation,
        rendered: &Rendered,
        now: OffsetDateTime,
    ) -> Vec<&'static str> {
        let is_left_out = |names: &[&str]| {
            let Some(without) = conversation.without(names) else { return false };
            let is_known = names.iter().any(|name| self.source().contains(name));
            let same =
                || self.attempt(&without, Ending::Complete, now).is_ok_and(|it| it.text == rendered.text);
            !is_known || same()
        };
        PARTS.into_iter().filter(|names| is_left_out(names)).map(|names| names[0]).collect()
    }
}

impl Conversation {
    /// The same without what has one of these names; `None` where there is no such thing.
    fn without(&self, names: &[&str]) -> Option<Conversation> {
        let says = |value: &Value| match value {
            Value::Null => false,
            Value::String(text) => !text.trim().is_empty(),
            Value::Array(list) => !list.is_empty(),
            _ => true,
        };
        let mut without = self.clone();
        let mut is_there = false;
        if names.contains(&"tools") {
            is_there |= without.tools.take().is_some_and(|tools| !tools.is_empty());
        }
        for message in without.messages_mut() {
            for name in names {
                is_there |= message.remove(*name).is_some_and(|value| says(&value));
            }
        }
        is_there.then_some(without)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::collections::BTreeMap;

    const NOW: OffsetDateTime = OffsetDateTime::UNIX_EPOCH;

    fn left_out(source: &str) -> Vec<&'static str> {
        let call = json!({"type": "function", "function": {"name": "f", "arguments": {}}});
        let messages = json!([{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "3", "tool_calls": []}, {"role": "assistant", "content": "three", "thinking": "hm"}]);
        let mut talk = Conversation::new(messages.as_array().unwrap()).unwrap();
        talk.tools = Some(vec![json!({"type": "function", "function": {"name": "f"}})]);
        let template = Template::parse("t", source, BTreeMap::new()).unwrap();
        let rendered = template.render(&talk, Ending::Complete, NOW).unwrap();
        template.left_out(&talk, &rendered, NOW)
    }

    #[test]
    fn what_changes_nothing_in_the_text_is_left_out() {
        let said = "{% for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}";
        assert_eq!(left_out(said), ["tools", "tool_calls", "reasoning_content"]);
        let calls = "{% for m in messages %}{{ m.role }}{{ m.content }}{% for c in m.tool_calls %}{{ c.function.name }}{% endfor %}{% endfor %}";
        assert_eq!(left_out(calls), ["tools", "reasoning_content"]);
        assert_eq!(
            left_out(&format!("{{{{ tools | tojson }}}}{calls}{{{{ messages[-1].thinking }}}}")),
            [""; 0]
        );
        // Thoughts before a question that came later are known to a template that leaves them out.
        let earlier = format!("{{{{ tools }}}}{calls}{{{{ messages[1].reasoning_content }}}}");
        assert_eq!(left_out(&earlier), ["reasoning_content"]);
    }
}
