use super::*;
use crate::files::tests::data;
use crate::rows::Row;
use proptest::prelude::*;
use serde_json::json;

/// `template`: none, the model's own, or one that the job names.
fn read(format: RowFormat, template: u8, row: Value) -> Result<Example, Unused> {
    let (data, rows) = (data(vec![], &[], &[]), Rows::default());
    let reader = Reader { data: &data, rows: &rows, has_template: template > 0, is_templated: template > 1 };
    reader.read(format, &Fields::of(row.as_object().unwrap()))
}

fn text(text: &str) -> Said {
    Said::Text(text.into())
}

fn turns(list: Value) -> Said {
    Said::Messages(list.as_array().unwrap().clone())
}

fn answers(prompt: Said, answers: &[Said]) -> Result<Example, Unused> {
    Ok(Example::Answers { prompt, answers: answers.to_vec(), given: Given::default() })
}

fn user(text: &str) -> Value {
    messages::one("user", text)
}

fn assistant(text: &str) -> Value {
    messages::one("assistant", text)
}

fn said(result: Result<Example, Unused>) -> String {
    match result {
        Err(Unused::Bad(what)) => what,
        other => panic!("{other:?}"),
    }
}

#[test]
fn prompts_and_completions_stay_texts_unless_a_template_is_asked_for() {
    let row = json!({"prompt": "a ", "completion": "b", "system": "s"});
    let plain = answers(text("a "), &[text("b")]);
    assert_eq!(read(RowFormat::PromptCompletion, 1, row.clone()), plain);
    let asked =
        answers(turns(json!([messages::one("system", "s"), user("a ")])), &[turns(json!([assistant("b")]))]);
    assert_eq!(read(RowFormat::PromptCompletion, 2, row), asked);
    let mixed = json!({"prompt": [user("a")], "completion": "b"});
    let wanted = answers(turns(json!([user("a")])), &[turns(json!([assistant("b")]))]);
    assert_eq!(read(RowFormat::PromptCompletion, 0, mixed), wanted);
    assert_eq!(
        read(RowFormat::PromptCompletion, 0, json!({"prompt": "a", "completion": " "})),
        Err(Unused::Empty)
    );
    let missing = said(read(RowFormat::PromptCompletion, 0, json!({"prompt": "a"})));
    assert!(missing.contains("no field `completion` (it has prompt)"), "{missing}");
}

#[test]
fn rows_of_alpaca_are_conversations_or_its_text() {
    let row =
        json!({"instruction": "i", "input": "x", "output": "o", "history": [["q", "a"]], "system": "s"});
    let list = json!([messages::one("system", "s"), user("q"), assistant("a"), user("i\nx"), assistant("o")]);
    let talk = Talk { messages: list.as_array().unwrap().clone(), given: Given::default() };
    assert_eq!(read(RowFormat::Alpaca, 1, row.clone()), Ok(Example::Turns(talk)));
    assert!(said(read(RowFormat::Alpaca, 0, row)).contains("`system` needs a chat template"));
    let row = json!({"instruction": "i", "input": "", "output": "o", "system": "", "history": []});
    let Ok(Example::Answers { prompt: Said::Text(prompt), answers, .. }) = read(RowFormat::Alpaca, 0, row)
    else {
        panic!("a text");
    };
    assert!(prompt.ends_with("the request.\n\n### Instruction:\ni\n\n### Response:\n"), "{prompt}");
    assert_eq!(answers, [text("o")]);
    assert!(
        said(read(RowFormat::Alpaca, 1, json!({"instruction": "i", "output": 3})))
            .contains("`output` is no text")
    );
}

#[test]
fn conversations_are_checked() {
    let list = |turns: Value| json!({"messages": turns, "tools": "[{\"name\": \"f\"}]"});
    let Ok(Example::Turns(talk)) = read(RowFormat::Messages, 1, list(json!([user("a"), assistant("b")])))
    else {
        panic!("a conversation");
    };
    assert_eq!(talk.given.tools, Some(vec![json!({"name": "f"})]));
    assert_eq!(read(RowFormat::Messages, 1, list(json!([]))), Err(Unused::Empty));
    let begins = said(read(RowFormat::Messages, 1, list(json!([assistant("a"), user("b")]))));
    assert!(begins.contains("begins with the assistant"), "{begins}");
    assert!(said(read(RowFormat::Messages, 1, list(json!([user("a")])))).contains("nothing to learn"));
    let sharegpt = json!({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]});
    let Ok(Example::Turns(talk)) = read(RowFormat::Conversations, 1, sharegpt) else {
        panic!("a conversation")
    };
    assert_eq!(talk.messages, [user("a"), assistant("b")]);
}

#[test]
fn preferences_of_every_shape_have_one_prompt_and_two_answers() {
    let two = |prompt: Said, a: Value, b: Value| answers(prompt, &[turns(json!([a])), turns(json!([b]))]);
    let wanted = two(turns(json!([user("q")])), assistant("yes"), assistant("no"));
    let implicit = json!({"chosen": [user("q"), assistant("yes")], "rejected": [user("q"), assistant("no")]});
    let explicit =
        json!({"prompt": [user("q")], "chosen": [assistant("yes")], "rejected": [assistant("no")]});
    let mut repeated = implicit.clone();
    repeated["prompt"] = json!("q");
    let factory = json!({"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "yes"},
        "rejected": {"from": "gpt", "value": "no"}});
    let alpaca = json!({"instruction": "q", "input": "", "chosen": "yes", "rejected": "no"});
    for row in [implicit, explicit, repeated, factory, alpaca] {
        assert_eq!(read(RowFormat::Preference, 1, row.clone()), wanted, "{row}");
    }
    let texts = answers(text("q"), &[text(" yes"), text(" no")]);
    for row in [
        json!({"prompt": "q", "chosen": " yes", "rejected": " no"}),
        json!({"chosen": "q yes", "rejected": "q no"}),
    ] {
        assert_eq!(read(RowFormat::Preference, 1, row.clone()), texts, "{row}");
    }
}

#[test]
fn preferences_that_say_nothing_are_named() {
    let of = |row: Value| read(RowFormat::Preference, 1, row);
    assert!(said(of(json!({"prompt": "q", "chosen": "a"}))).contains("no field `rejected`"));
    assert!(
        said(of(json!({"prompt": "q", "chosen": "a", "rejected": null}))).contains("`rejected` is neither")
    );
    assert_eq!(of(json!({"prompt": "q", "chosen": "a", "rejected": "a"})), Err(Unused::Same));
    assert!(said(of(json!({"chosen": "a", "rejected": "b"}))).contains("no beginning in common"));
    // The answers' first words are no prompt where there is a better one.
    for name in ASKS.into_iter().filter(|name| *name != "instruction") {
        let row =
            json!({name: "Capital?", "chosen": "The capital is Paris.", "rejected": "The capital is Rome."});
        assert!(said(of(row)).contains(&format!("set data.fields.prompt = \"{name}\"")), "{name}");
    }
    let shorter = json!({"chosen": [user("q")], "rejected": [user("q"), assistant("a")]});
    assert!(said(of(shorter)).contains("the beginning of the other"));
    let ends = json!({"prompt": [user("q"), assistant("a")], "chosen": [assistant("b")], "rejected": [assistant("c")]});
    assert!(said(of(ends)).contains("ends with the assistant"));
}

#[test]
fn answers_that_say_nothing_are_none_and_calls_are_answers() {
    let call = json!({"role": "assistant", "content": null, "tool_calls": [{"function": {"name": "f"}}]});
    let of = |turns: Value| read(RowFormat::Messages, 1, json!({"messages": turns}));
    let Ok(Example::Turns(talk)) = of(json!([user("a"), call])) else { panic!("a call is an answer") };
    assert_eq!(talk.messages[1], call);
    assert_eq!(of(json!([user("a"), assistant(" ")])), Err(Unused::Empty));
    let no_content = said(of(json!([user("a"), {"role": "assistant", "content": null}])));
    assert!(no_content.contains("`messages`[1] has no `content`"), "{no_content}");
    assert!(of(json!([user("a"), assistant(""), user("b"), assistant("c")])).is_ok());
    let pair = json!({"prompt": [user("q")], "chosen": [assistant("yes")], "rejected": [assistant("")]});
    assert_eq!(read(RowFormat::Preference, 1, pair), Err(Unused::Empty));
    let Said::Messages(some) = turns(json!([user("a"), assistant("")])) else { unreachable!() };
    assert!(Said::Messages(some).has_silent_turn() && !text("").has_silent_turn());
}

#[test]
fn a_history_may_be_json_in_a_text() {
    let row = |history: &str| json!({"instruction": "i", "output": "o", "history": history});
    for (history, turns) in [("[[\"q\", \"a\"]]", 4), (" ", 2), ("[]", 2)] {
        let Ok(Example::Turns(talk)) = read(RowFormat::Alpaca, 1, row(history)) else { panic!("{history}") };
        assert_eq!(talk.messages.len(), turns, "{history}");
    }
    assert!(said(read(RowFormat::Alpaca, 1, row("q"))).contains("no list of pairs"));
}

/// Values as people put them where others belong.
fn any_value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<i8>().prop_map(Value::from),
        "[a \\[{]{0,4}".prop_map(Value::from),
        Just(user("q")),
        Just(assistant("a")),
        Just(json!({"from": "gpt", "value": 3})),
    ];
    leaf.prop_recursive(2, 12, 4, |inner| proptest::collection::vec(inner, 0..4).prop_map(Value::Array))
}

proptest! {
    #[test]
    fn no_row_makes_a_reader_panic(values in proptest::collection::vec(any_value(), 13), format in 0usize..6, template in 0u8..3) {
        use RowFormat::{Alpaca, Conversations, Messages, Preference, PromptCompletion, Text};
        let format = [Text, Messages, Conversations, PromptCompletion, Alpaca, Preference][format];
        let names = fleet_common::job::ROW_FIELDS.iter().zip(values.clone());
        let mut row: Row = names.map(|(name, value)| ((*name).to_owned(), value)).collect();
        row.insert("conversations".into(), values[0].clone());
        let _ = read(format, template, Value::Object(row));
    }
}
