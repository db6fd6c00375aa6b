//! What the rows of a file are: as the job says, or as the fields of its first rows show.

use super::Row;
use fleet_common::job::{Data, RowFormat, Rows};
use serde_json::Value;
use std::collections::BTreeSet;

/// Rows of a file that are looked at.
pub(super) const FIRST: usize = 16;

/// Names of fields that a refusal lists.
const NAMES_MAX: usize = 12;

/// The format of rows that begin so. Preferences are such only where the job says it.
pub(super) fn of(data: &Data, rows: &Rows, first: &[&Row]) -> Result<RowFormat, String> {
    use RowFormat::{Alpaca, Conversations, Messages, PromptCompletion, Text};
    if let Some(format) = rows.format.filter(|format| *format != RowFormat::Preference) {
        return Ok(format);
    }
    let present = present(first.iter().copied());
    let has = |usual: &str| present.contains(rows.field(usual));
    match () {
        () if rows.format.is_some() => match first.iter().any(|row| is_labelled(row)) && !has("rejected") {
            true => Err(format!(
                "{KTO}; task_name = \"dpo\" wants pairs, {PAIR}: put a good and a bad answer to the same prompt into one row"
            )),
            false => Ok(RowFormat::Preference),
        },
        () if first.iter().any(|row| is_labelled(row)) => Err(format!(
            "{KTO}; take those with a good answer, without the label, or say with data.format that all are learnt"
        )),
        () if has("messages") => Ok(Messages),
        () if has("prompt") && has("completion") => Ok(PromptCompletion),
        () if has("chosen") && has("rejected") => Err(preferences(&present)),
        () if present.contains("conversations") => Ok(Conversations),
        () if has("instruction") && has("output") => Ok(Alpaca),
        () if present.contains(data.text_field.as_str()) => Ok(Text),
        () => Err(unknown(&present)),
    }
}

/// Names of the fields in which something stands.
fn present<'r>(rows: impl Iterator<Item = &'r Row>) -> BTreeSet<&'r str> {
    let names =
        |row: &'r Row| row.iter().filter(|(_, value)| !value.is_null()).map(|(name, _)| name.as_str());
    rows.flat_map(names).collect()
}

/// Whether rows that begin so are those of instructions rather than texts, be they of a kind that is learnt or not.
pub(super) fn are_instructions(data: &Data, rows: &Rows, first: &[Row]) -> bool {
    let present = present(first.iter());
    let has = |name: &&str| present.contains(name);
    let is_pair = || PAIRS.iter().any(|(question, answer, ..)| has(question) && has(answer));
    let is_preference = || has(&"chosen") && has(&"rejected");
    let is_known = || of(data, rows, &first.iter().collect::<Vec<_>>()).is_ok();
    let is_labelled = || first.iter().any(is_labelled);
    !has(&data.text_field.as_str()) && (is_known() || is_preference() || is_pair() || is_labelled())
}

const KTO: &str = "rows with a label for each answer (KTO) are not learnt in this version";
const PAIR: &str = "{\"prompt\": ..., \"chosen\": ..., \"rejected\": ...}";

/// Why a row of a file whose first rows are of this format is none: it has a label, which the first ones have not.
pub(super) fn labelled(rows: &Rows, format: RowFormat, row: &Row) -> Option<String> {
    let is_of_answers = !matches!(format, RowFormat::Preference | RowFormat::Text);
    (rows.format.is_none() && is_of_answers && is_labelled(row)).then(|| {
        format!("it has a label; {KTO}; say with data.format that all are learnt, if that is wanted")
    })
}

/// Whether a row says of its answer whether it is a good one: by a truth value, of a table also as a text or a number.
fn is_labelled(row: &Row) -> bool {
    let has_answer =
        || ["completion", "messages", "conversations"].iter().any(|name| row.contains_key(*name));
    match row.get("label").or_else(|| row.get("kto_tag")) {
        Some(Value::Bool(_)) => true,
        Some(Value::String(label)) => {
            let words = ["true", "false", "1", "0", "desirable", "undesirable", "good", "bad"];
            has_answer() && words.contains(&label.trim().to_lowercase().as_str())
        }
        Some(Value::Number(label)) => has_answer() && matches!(label.as_u64(), Some(0 | 1)),
        _ => false,
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
        // As in Dolly, where what is asked has a text beside it.
        let context =
            (*first == "instruction" && present.contains("context")).then(|| name("input", "context"));
        let set = [name(first, question), context.flatten(), name(second, answer)];
        let set: Vec<String> = set.into_iter().flatten().collect();
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
    fn instructions_are_told_from_texts() {
        let are = |row: serde_json::Value| {
            let first: Vec<Row> = serde_json::from_value(json!([row])).unwrap();
            are_instructions(&data(vec![], &[], &[]), &Rows::default(), &first)
        };
        for row in [
            json!({"messages": []}),
            json!({"instruction": "a", "output": "b"}),
            json!({"question": "a", "answer": "b"}),
            json!({"chosen": "a", "rejected": "b"}),
        ] {
            assert!(are(row.clone()), "{row}");
        }
        for row in [json!({"text": "a", "messages": []}), json!({"body": "a"}), json!({})] {
            assert!(!are(row.clone()), "{row}");
        }
    }

    #[test]
    fn what_is_not_known_is_said_with_what_to_do() {
        let said = |row: serde_json::Value| told(&Rows::default(), json!([row])).unwrap_err();
        assert!(said(json!({"prompt": "", "completion": "", "label": true})).contains("(KTO)"));
        assert!(said(json!({"messages_": [], "kto_tag": false})).contains("(KTO)"));
        for label in [json!(true), json!("False"), json!(1), json!("0"), json!("undesirable")] {
            assert!(
                said(json!({"messages": [], "label": label})).contains("(KTO)"),
                "as LLaMA-Factory has them"
            );
        }
        let dpo = Rows { format: Some(RowFormat::Preference), ..Rows::default() };
        let labelled = told(&dpo, json!([{"prompt": "", "completion": "", "label": false}])).unwrap_err();
        assert!(
            labelled.contains("(KTO)") && labelled.contains("\"chosen\": ..., \"rejected\": ..."),
            "{labelled}"
        );
        let pair = json!([{"chosen": "", "rejected": "", "label": true}]);
        assert_eq!(told(&dpo, pair), Ok(RowFormat::Preference));
        assert!(
            said(json!({"instruction": "", "context": "", "response": ""}))
                .ends_with("set data.fields.input = \"context\" and data.fields.output = \"response\"")
        );
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
