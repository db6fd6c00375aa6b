//! What the rows of a file are: as the job says, or as the fields of its first rows show.

use super::Row;
use fleet_common::job::{Data, RowFormat, Rows};
use std::collections::BTreeSet;

/// Rows of a file that are looked at.
pub(super) const FIRST: usize = 16;

/// Names of fields that a refusal lists.
const NAMES_MAX: usize = 12;

/// The format of rows that begin so. Preferences are such only where the job says it.
pub(super) fn of(data: &Data, rows: &Rows, first: &[&Row]) -> Result<RowFormat, String> {
    use RowFormat::{Alpaca, Conversations, Messages, PromptCompletion, Text};
    if let Some(format) = rows.format {
        return Ok(format);
    }
    let present: BTreeSet<&str> = first
        .iter()
        .flat_map(|row| row.iter().filter(|(_, value)| !value.is_null()).map(|(name, _)| name.as_str()))
        .collect();
    let has = |usual: &str| present.contains(rows.field(usual));
    let is_label =
        |row: &&Row| row.get("label").or_else(|| row.get("kto_tag")).is_some_and(|label| label.is_boolean());
    match () {
        () if has("messages") => Ok(Messages),
        () if first.iter().any(is_label) => Err(
            "rows with a label for each answer (KTO) are not learnt in this version; take those with a good one as prompt and completion"
                .to_owned(),
        ),
        () if has("prompt") && has("completion") => Ok(PromptCompletion),
        () if has("chosen") && has("rejected") => Err(preferences(&present)),
        () if present.contains("conversations") => Ok(Conversations),
        () if has("instruction") && has("output") => Ok(Alpaca),
        () if present.contains(data.text_field.as_str()) => Ok(Text),
        () => Err(unknown(&present)),
    }
}

fn preferences(present: &BTreeSet<&str>) -> String {
    let prompt = ["conversations", "instruction"].into_iter().find(|name| present.contains(name));
    let prompt = prompt.map(|name| format!("data.fields.prompt = \"{name}\" and ")).unwrap_or_default();
    format!(
        "rows with chosen and rejected answers are learnt with task_name = \"dpo\"; to learn alone what is chosen, set \
         {prompt}data.fields.completion = \"chosen\""
    )
}

/// What people call a question and its answer, and the fields that these are.
const PAIRS: [(&str, &str, &str, &str); 7] = [
    ("prompt", "response", "prompt", "completion"),
    ("prompt", "answer", "prompt", "completion"),
    ("question", "answer", "prompt", "completion"),
    ("question", "response", "prompt", "completion"),
    ("query", "response", "prompt", "completion"),
    ("input", "output", "prompt", "completion"),
    ("instruction", "response", "instruction", "output"),
];

fn unknown(present: &BTreeSet<&str>) -> String {
    let known = "messages | conversations | prompt and completion | instruction, input and output | text | chosen and rejected (task_name = \"dpo\")";
    let pair =
        PAIRS.iter().find(|(question, answer, ..)| present.contains(question) && present.contains(answer));
    if let Some((question, answer, first, second)) = pair {
        let name =
            |field: &str, name: &str| (field != name).then(|| format!("data.fields.{field} = \"{name}\""));
        let set: Vec<String> = [name(first, question), name(second, answer)].into_iter().flatten().collect();
        return format!("its rows have `{question}` and `{answer}`; set {}", set.join(" and "));
    }
    let short = |name: &&str| name.chars().take(40).flat_map(char::escape_debug).collect::<String>();
    let names: Vec<String> = present.iter().take(NAMES_MAX).map(short).collect();
    match names.as_slice() {
        [] => format!("its first rows have no fields; wanted are {known}"),
        names => format!(
            "what its rows are cannot be told by their fields ({}); wanted are {known}: say in data.fields what these are called",
            names.join(", ")
        ),
    }
}

/// For lines about the data.
pub(super) fn name(format: RowFormat) -> &'static str {
    match format {
        RowFormat::Text => "text",
        RowFormat::Messages => "messages",
        RowFormat::Conversations => "conversations",
        RowFormat::PromptCompletion => "prompt and completion",
        RowFormat::Alpaca => "instruction and output",
        RowFormat::Preference => "chosen and rejected",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::tests::data;
    use serde_json::json;

    fn told(rows: &Rows, first: serde_json::Value) -> Result<RowFormat, String> {
        let first: Vec<Row> = serde_json::from_value(first).unwrap();
        of(&data(vec![], &[], &[]), rows, &first.iter().collect::<Vec<_>>())
    }

    #[test]
    fn fields_show_what_rows_are() {
        use RowFormat::{Alpaca, Conversations, Messages, PromptCompletion, Text};
        for (row, format) in [
            (json!({"messages": [], "prompt": "a", "chosen": [], "rejected": []}), Messages),
            (json!({"conversations": [], "system": "s"}), Conversations),
            (json!({"prompt": "a", "completion": "b", "text": "c"}), PromptCompletion),
            (json!({"instruction": "a", "output": "b"}), Alpaca),
            (json!({"text": "a", "label": 3}), Text),
        ] {
            assert_eq!(told(&Rows::default(), json!([row])), Ok(format), "{row}");
        }
        let later = json!([{"text": "a", "messages": null}, {"text": "a", "messages": []}]);
        assert_eq!(told(&Rows::default(), later), Ok(Messages), "a null is no field");
        let named = |field: &str, name: &str| Rows {
            fields: [(field.into(), name.into())].into(),
            ..Rows::default()
        };
        assert_eq!(
            told(&named("completion", "chosen"), json!([{"prompt": "", "chosen": "", "rejected": ""}])),
            Ok(PromptCompletion)
        );
        assert_eq!(told(&named("messages", "chat"), json!([{"chat": []}])), Ok(Messages));
    }

    #[test]
    fn what_is_not_known_is_said_with_what_to_do() {
        let said = |row: serde_json::Value| told(&Rows::default(), json!([row])).unwrap_err();
        assert!(said(json!({"prompt": "", "completion": "", "label": true})).contains("(KTO)"));
        assert!(said(json!({"messages_": [], "kto_tag": false})).contains("(KTO)"));
        assert!(
            said(json!({"chosen": [], "rejected": []})).ends_with("set data.fields.completion = \"chosen\"")
        );
        let turns = said(json!({"conversations": [], "chosen": {}, "rejected": {}}));
        assert!(
            turns.contains("data.fields.prompt = \"conversations\" and data.fields.completion"),
            "{turns}"
        );
        let pair = said(json!({"question": "", "answer": ""}));
        assert!(
            pair.ends_with("set data.fields.prompt = \"question\" and data.fields.completion = \"answer\""),
            "{pair}"
        );
        assert!(
            said(json!({"instruction": "", "response": ""}))
                .ends_with("set data.fields.output = \"response\"")
        );
        let other = said(json!({"id": 1, "body": ""}));
        assert!(other.contains("(body, id)") && other.contains("data.fields"), "{other}");
        assert!(said(json!({})).contains("no fields"));
    }
}
