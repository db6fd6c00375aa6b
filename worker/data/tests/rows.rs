//! Rows of instructions as agent and ranks use them: ids and masks against what TRL makes of the same rows (`golden/rows`, made by
//! `tests/parity/rows.py`), and what is refused, counted and told.

#![allow(clippy::unwrap_used)] // helpers of tests panic as tests do

use fleet_common::events::Level;
use fleet_common::job::{Job, RowFormat, parse_toml};
use fleet_data::{DataError, DataFiles, Item, Note, TokenCache, Windows};
use serde_json::Value;
use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

fn here() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).to_owned()
}

fn golden() -> Value {
    let text = fs::read_to_string(here().join("tests/golden/rows/expected.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

/// A directory with a file of data, and a job for it with the tokenizer of the golden files; nothing is held out unless `lines` say so.
fn job(file: &str, text: &str, lines: &str) -> (tempfile::TempDir, Job) {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join(file), text).unwrap();
    let model = here().join("../../tests/parity/golden/foreign/byte_level");
    let held_out = if lines.contains("validation_fraction") { "" } else { "validation_fraction = 0" };
    let toml = format!(
        "task_name = \"sft\"\noutput_dir = \"out\"\nmax_seq_len = 4096\nmodel = {{ path = {model:?} }}\n[data]\npath = {file:?}\n{held_out}\n{lines}"
    );
    let job = parse_toml(&toml, dir.path()).unwrap_or_else(|e| panic!("{e}\n{toml}")).0;
    (dir, job)
}

/// The cache of a job, and what is said while it is made.
fn build(job: &Job) -> Result<(TokenCache, Vec<Note>), DataError> {
    let notes = RefCell::new(Vec::new());
    let tell = |note: Note| notes.borrow_mut().push(note);
    let (cache, _) = TokenCache::build_or_open(job, &DataFiles::find(job, &|_| {})?, &tell)?;
    Ok((cache, notes.into_inner()))
}

fn read(windows: &Windows) -> Vec<Item> {
    let item = |index| {
        let mut item = Item::default();
        windows.append(index, &mut item);
        assert_eq!(item.lengths, windows.lengths(index));
        assert!(item.ids.len() == item.lengths.iter().sum::<usize>() && item.learnt.len() == item.ids.len());
        item
    };
    (0..windows.len()).map(item).collect()
}

fn told(notes: &[Note]) -> String {
    notes.iter().map(|note| note.line.as_str()).collect::<Vec<_>>().join("\n")
}

/// Ids and mask of each sequence as the golden file writes them.
fn written(item: &Item) -> Vec<(String, String)> {
    let (mut ids, mut learnt) = (item.ids.iter(), item.learnt.iter());
    let sequence = |len: &usize| {
        let ids: Vec<String> = ids.by_ref().take(*len).map(i64::to_string).collect();
        let mask = learnt.by_ref().take(*len).map(|learnt| if *learnt { '1' } else { '0' });
        (ids.join(" "), mask.collect())
    };
    item.lengths.iter().map(sequence).collect()
}

#[test]
fn rows_give_the_ids_and_masks_that_trl_gives_them() {
    let golden = golden();
    let templates = here().join("tests/golden/chat/templates");
    let mut sequences = 0;
    for (name, case) in golden["cases"].as_object().unwrap() {
        let template = match case["chat_template"].as_str() {
            None => "\"none\"".to_owned(),
            Some("chatml") => "\"chatml\"".to_owned(),
            Some(file) => format!("{:?}", templates.join(file).with_extension("jinja")),
        };
        let loss_on = case["loss_on"].as_str().unwrap_or("answers");
        let lines = format!("chat_template = {template}\nloss_on = {loss_on:?}");
        let (_dir, mut job) = job("rows.json", &case["rows"].to_string(), &lines);
        let format: RowFormat = serde_json::from_value(case["format"].clone()).unwrap();
        // The format is found, but for preferences.
        job.data.rows.as_mut().unwrap().format =
            Some(format).filter(|format| *format == RowFormat::Preference);
        let (cache, notes) = build(&job).unwrap_or_else(|e| panic!("{name}: {e}"));
        let items = read(cache.train());
        let expected = case["expected"].as_array().unwrap();
        assert_eq!(items.len(), expected.len(), "{name}: {}", told(&notes));
        for (at, (item, expected)) in items.iter().zip(expected).enumerate() {
            let text = |value: &Value| value.as_str().unwrap().to_owned();
            let pair = |sequence: &Value| (text(&sequence["ids"]), text(&sequence["mask"]));
            let expected: Vec<_> = expected.as_array().unwrap().iter().map(pair).collect();
            assert_eq!(written(item), expected, "{name}, row {at}");
            sequences += expected.len();
        }
    }
    assert!(sequences > 40, "{sequences} sequences");
}

#[test]
fn the_same_conversations_are_the_same_in_every_form_and_file() {
    let messages = "[{\"role\":\"user\",\"content\":\"a, b\"},{\"role\":\"assistant\",\"content\":\"c\"}]";
    let turns = messages.replace("role", "from").replace("content", "value").replace("user", "human");
    let turns = turns.replace("assistant", "gpt");
    let in_csv = format!("\"{}\"", messages.replace('"', "\"\""));
    let files = [
        ("a.jsonl", format!("{{\"messages\":{messages}}}\n")),
        ("a.json", format!("[{{\"conversations\":{turns},\"system\":\"\"}}]")),
        ("a.json", format!("{{\"messages\":[{messages}]}}")),
        ("a.csv", format!("id,messages\n1,{in_csv}\n")),
        ("a.json", "[{\"instruction\":\"a, b\",\"input\":\"\",\"output\":\"c\"}]".to_owned()),
        ("a.tsv", "instruction\toutput\na, b\tc\n".to_owned()),
    ];
    let item = |(file, text): &(&str, String)| {
        let (_dir, job) = job(file, text, "chat_template = \"chatml\"");
        let (cache, _) = build(&job).unwrap_or_else(|e| panic!("{text}: {e}"));
        read(cache.train())
    };
    let all: Vec<Vec<Item>> = files.iter().map(item).collect();
    assert!(all[0].len() == 1 && all[0][0].learnt.contains(&true));
    for (items, (file, text)) in all.iter().zip(&files) {
        assert_eq!(*items, all[0], "{file}: {text}");
    }
}

#[test]
fn a_turn_of_weight_zero_carries_no_loss() {
    let learnt = |weight: &str| {
        let text = r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b" WEIGHT},
            {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]}"#;
        let text = text.replace('\n', " ").replace("WEIGHT", weight);
        let (_dir, job) = job("a.jsonl", &text, "chat_template = \"chatml\"");
        read(build(&job).unwrap().0.train()).remove(0)
    };
    let (all, one) = (learnt(", \"weight\": 1"), learnt(", \"weight\": 0"));
    assert_eq!((all.clone().ids, all.learnt.clone()), (learnt("").ids, learnt("").learnt));
    let count = |item: &Item| item.learnt.iter().filter(|learnt| **learnt).count();
    assert!(one.ids == all.ids && count(&one) * 2 == count(&all));
    assert_eq!(one.learnt.iter().rposition(|learnt| *learnt), all.learnt.iter().rposition(|learnt| *learnt));
}

/// Rows of prompts and completions of these lengths, told apart by their letters.
fn rows(lengths: &[usize]) -> String {
    let letter = |at: usize| char::from(b'a' + (at % 26) as u8);
    let row = |(at, len): (usize, &usize)| {
        let answer = format!(" {}{}", letter(at), " x".repeat(*len));
        serde_json::json!({"prompt": format!("row {at}:"), "completion": answer}).to_string()
    };
    lengths.iter().enumerate().map(row).collect::<Vec<_>>().join("\n")
}

#[test]
fn packs_hold_whole_examples_once_and_no_more_than_they_may() {
    let lengths: Vec<usize> = (0..60).map(|n| (n * 37) % 41).collect();
    let (_alone, single) = job("a.jsonl", &rows(&lengths), "chat_template = \"none\"");
    let (_packs, mut packed) = job("a.jsonl", &rows(&lengths), "chat_template = \"none\"\npacking = true");
    packed.max_seq_len = 128;
    let (single, _) = build(&single).unwrap();
    let (packed, notes) = build(&packed).unwrap();
    assert!(single.train().len() == 60 && packed.train().len() < 50);
    assert!(
        told(&notes).contains(&format!("packed into {} sequences", packed.train().len())),
        "{}",
        told(&notes)
    );
    let sequences =
        |cache: &TokenCache| -> BTreeSet<_> { read(cache.train()).iter().flat_map(written).collect() };
    assert_eq!(sequences(&packed), sequences(&single), "each as it is alone");
    let all = read(packed.train());
    assert_eq!(all.iter().map(|item| item.lengths.len()).sum::<usize>(), 60);
    assert!(all.iter().all(|item| item.ids.len() <= 128));
    assert_eq!(packed.stats().train_tokens, single.stats().train_tokens);
}

#[test]
fn rows_are_held_out_by_what_they_say_and_found_again() {
    let (dir, job) = job("a.jsonl", &rows(&[3; 40]), "chat_template = \"none\"\nvalidation_fraction = 0.2");
    let (cache, _) = build(&job).unwrap();
    assert_eq!((cache.train().len(), cache.validation().len()), (32, 8));
    assert!(cache.stats().validation_bytes_per_token > 0.5, "{:?}", cache.stats());
    let files = DataFiles::find(&job, &|_| {}).unwrap();
    let (again, stats) = TokenCache::build_or_open(&job, &files, &|_| {}).unwrap();
    assert!(stats.cached && again.hash() == cache.hash() && stats.fingerprint == cache.stats().fingerprint);
    let held =
        |cache: &TokenCache| -> BTreeSet<_> { read(cache.validation()).iter().flat_map(written).collect() };
    let (kept, before) = (held(&cache), cache.hash().to_owned());
    // In another order the same ones are held out.
    let turned: Vec<String> = rows(&[3; 40]).lines().rev().map(str::to_owned).collect();
    fs::write(dir.path().join("a.jsonl"), turned.join("\n")).unwrap();
    let (other, _) = build(&job).unwrap();
    assert!(held(&other) == kept && other.hash() != before);
    // Every setting of rows is part of the name, and a damaged file is made again.
    let mut all = job.clone();
    all.data.rows.as_mut().unwrap().packing = true;
    assert_ne!(build(&all).unwrap().0.hash(), other.hash());
    let loss = other.dir().join("loss.bin");
    let mut bytes = fs::read(&loss).unwrap();
    bytes[0] ^= 1;
    fs::write(&loss, bytes).unwrap();
    let (_, stats) =
        TokenCache::build_or_open(&job, &DataFiles::find(&job, &|_| {}).unwrap(), &|_| {}).unwrap();
    assert!(!stats.cached);
}

#[test]
fn bad_rows_stop_the_job_or_are_left_out_and_counted() {
    let good = rows(&[3, 4]);
    for (file, bad, what) in [
        ("a.jsonl", "{\"prompt\": \"p\"}", "a.jsonl, line 2: no field `completion`"),
        ("a.jsonl", "{\"prompt\": \"p\", ", "a.jsonl, line 2: not JSON"),
        (
            "a.jsonl",
            "{\"prompt\": [{\"role\": \"elf\"}], \"completion\": \"x\"}",
            "line 2: `prompt`[0] has the role `elf`",
        ),
        (
            "a.jsonl",
            "{\"prompt\": [{\"role\": \"assistant\", \"content\": \"a\"}], \"completion\": \"x\"}",
            "line 2: the conversation begins with the assistant",
        ),
    ] {
        let text = good.replace('\n', &format!("\n{bad}\n"));
        let (_dir, mut job) = job(file, &text, "");
        let error = build(&job).unwrap_err().to_string();
        assert!(
            error.contains(what) && error.contains("data.bad_rows = \"skip\"") && !error.contains('\n'),
            "{error}"
        );
        job.data.rows.as_mut().unwrap().bad_rows = fleet_common::job::BadRows::Skip;
        let (cache, notes) = build(&job).unwrap();
        assert_eq!(cache.train().len(), 2);
        let left_out = notes.iter().find(|note| note.line.starts_with("left out: 1 row that cannot be read"));
        assert!(
            left_out.is_some_and(|note| note.level == Level::Warn && note.line.contains(what)),
            "{}",
            told(&notes)
        );
    }
    let (dir, job) = job("a.csv", "prompt,completion\na,b\nragged\nc,d\n", "bad_rows = \"skip\"");
    assert_eq!(build(&job).unwrap().0.train().len(), 2);
    fs::write(dir.path().join("a.csv"), b"prompt,completion\na,caf\xe9\nc,d\n").unwrap();
    let (cache, notes) = build(&job).unwrap();
    assert!(
        cache.train().len() == 1 && told(&notes).contains("1 row with bytes that are not UTF-8"),
        "{}",
        told(&notes)
    );
}

#[test]
fn what_is_cut_empty_and_twice_is_told() {
    let long = rows(&[1, 200]) + "\n" + &rows(&[1]) + "\n{\"prompt\": \"p\", \"completion\": \"\"}\n";
    let behind = serde_json::json!({"prompt": "long ".repeat(99), "completion": "x"}).to_string();
    let joined = serde_json::json!({"prompt": "One ", "completion": "two"}).to_string();
    let (_dir, mut job) = job("a.jsonl", &(long + &behind + "\n" + &joined), "");
    job.max_seq_len = 48;
    let (cache, notes) = build(&job).unwrap();
    let report = &cache.meta().rows.as_ref().unwrap().report;
    assert_eq!((report.rows, report.examples, report.empty, report.duplicates), (6, 4, 1, 1));
    assert_eq!((report.truncated, report.cut_off), (2, 1));
    assert!(report.unjoined >= 1 && report.first_unjoined.is_some());
    assert_eq!(report.tokens, read(cache.train()).iter().map(|item| item.ids.len() as u64).sum::<u64>());
    assert!(read(cache.train()).iter().all(|item| item.ids.len() <= 48));
    let told = told(&notes);
    assert!(
        told.contains("cut at max_seq_len, 48 tokens: 2 rows")
            && told.contains("do not join at a token boundary"),
        "{told}"
    );
    assert!(
        told.contains("4 rows of prompt and completion make")
            && told.contains("1 row without text or answer"),
        "{told}"
    );
}

#[test]
fn data_that_teach_nothing_are_refused_with_the_reason() {
    let refused = |text: &str, lines: &str| {
        let (_dir, job) = job("a.jsonl", text, lines);
        build(&job).unwrap_err().to_string()
    };
    let empty = refused("{\"prompt\": \"a\", \"completion\": \"\"}", "");
    assert!(
        empty.contains("no token of the rows carries loss") && empty.contains("1 have no text or no answer"),
        "{empty}"
    );
    assert!(
        refused("{\"body\": \"a\"}", "")
            .contains("a.jsonl: what its rows are cannot be told by their fields (body)")
    );
    let silent = "{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}, {\"role\": \"assistant\", \"content\": \"b\", \"weight\": 0}]}";
    let masked = refused(silent, "chat_template = \"chatml\"");
    assert!(masked.contains("of 1 rows 1 have no token that carries loss"), "{masked}");
    let kto = refused("{\"prompt\": \"a\", \"completion\": \"b\", \"label\": true}", "");
    assert!(kto.contains("KTO"), "{kto}");
    let good = "{\"prompt\": \"a\", \"completion\": \" b\"}\n".repeat(20);
    let later = refused(&(good + "{\"prompt\": \"a\", \"completion\": \" c\", \"label\": false}\n"), "");
    assert!(later.contains("line 21") && later.contains("KTO"), "{later}");
    let chat = "{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}, {\"role\": \"assistant\", \"content\": \"b\"}]}";
    let none = refused(chat, "chat_template = \"none\"");
    assert!(none.contains("need a chat template") && none.contains("chatml, llama3"), "{none}");
    assert!(
        refused(chat, "chat_template = \"chatlm\"")
            .contains("data.chat_template: there is no chat template chatlm")
    );
    let all = refused(&rows(&[1]), "validation_fraction = 0.5");
    assert!(all.contains("none is left to train on"), "{all}");
    let (dir, mut job) = job("a.jsonl", &rows(&[1]), "");
    fs::write(dir.path().join("notes.txt"), "no rows").unwrap();
    job.data.paths.push(dir.path().join("notes.txt"));
    let error = build(&job).unwrap_err().to_string();
    assert!(error.contains("notes.txt is a text, and this job learns rows"), "{error}");
}

#[test]
fn a_cache_has_the_template_that_the_model_lacks_and_says_what_does_not_fit() {
    let chat = "{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}, {\"role\": \"assistant\", \"content\": \"b\"}]}";
    let (_dir, chatml) = job("a.jsonl", chat, "chat_template = \"chatml\"");
    let (cache, notes) = build(&chatml).unwrap();
    assert!(cache.chat_template().unwrap().contains("<|im_start|>"));
    let files = DataFiles::find(&chatml, &|_| {}).unwrap();
    let again = RefCell::new(Vec::new());
    let (_, stats) =
        TokenCache::build_or_open(&chatml, &files, &|note| again.borrow_mut().push(note)).unwrap();
    for told in [told(&notes), told(&again.into_inner())] {
        assert!(told.contains("chat template chatml: <|im_end|>, <|im_start|> are no token"), "{told}");
    }
    assert!(stats.cached);
    let (_dir, text) = job("a.jsonl", &rows(&[3]), "");
    let (cache, notes) = build(&text).unwrap();
    assert!(cache.chat_template().is_none() && !told(&notes).contains("chat template"), "{}", told(&notes));
}

#[test]
fn answers_that_begin_within_a_token_are_counted() {
    let chat = "{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}, {\"role\": \"assistant\", \"content\": \"river\"}]}";
    let source = |between: &str| {
        format!(
            "{{% for m in messages %}}{{{{ m.role }}}}:{between}{{% if m.role == 'assistant' %}}{{% generation %}}{{{{ m.content }}}}<|endoftext|>{{% endgeneration %}}\
             {{% else %}}{{{{ m.content }}}}\n{{% endif %}}{{% endfor %}}{{% if add_generation_prompt %}}assistant:{between}{{% endif %}}"
        )
    };
    for (between, unjoined) in [(" ", 1), ("\n", 0)] {
        let (dir, mut job) = job("a.jsonl", chat, "");
        let template = dir.path().join("own.jinja");
        fs::write(&template, source(between)).unwrap();
        job.data.rows.as_mut().unwrap().chat_template = Some(fleet_common::job::ChatTemplate::File(template));
        let (cache, notes) = build(&job).unwrap();
        let report = &cache.meta().rows.as_ref().unwrap().report;
        assert_eq!(report.unjoined, unjoined, "{between:?}: {}", told(&notes));
        assert_eq!(told(&notes).contains("do not join at a token boundary"), unjoined > 0);
    }
}

/// A conversation in which a function is called, and nothing is said beside.
const CALLS: &str = r#"{"tools": [{"type": "function", "function": {"name": "rain"}}], "messages": [{"role": "user", "content": "q"},
    {"role": "assistant", "content": null, "tool_calls": [{"type": "function", "function": {"name": "rain", "arguments": {}}}]},
    {"role": "tool", "content": "3 mm"}, {"role": "assistant", "content": "some", "reasoning_content": "hm"}]}"#;

#[test]
fn what_a_template_does_not_write_is_told() {
    let rows = CALLS.replace('\n', " ") + "\n";
    let (_dir, chatml) = job("a.jsonl", &rows.repeat(2), "chat_template = \"chatml\"");
    let (cache, notes) = build(&chatml).unwrap();
    let report = &cache.meta().rows.as_ref().unwrap().report;
    let expected = ["reasoning_content", "tool_calls", "tools"].map(|name| (format!("the `{name}`"), 2));
    assert_eq!(report.left_out, expected.into());
    for name in ["tools", "tool_calls", "reasoning_content"] {
        let line = format!("the chat template does not write the `{name}` of 2 rows");
        let note = notes.iter().find(|note| note.line.starts_with(&line));
        assert!(note.is_some_and(|note| note.level == Level::Warn), "{name}: {}", told(&notes));
    }
    let source = "{{ tools | tojson }}{% for m in messages %}{{ m.role }}:{% if m.role == 'assistant' and m.tool_calls %}{% generation %}\
        {{ m.tool_calls[0].function.name }}<|endoftext|>{% endgeneration %}{% elif m.role == 'assistant' %}{% generation %}{{ m.reasoning_content }}{{ m.content }}\
        <|endoftext|>{% endgeneration %}{% else %}{{ m.content }}\n{% endif %}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}";
    let (dir, mut own) = job("a.jsonl", &rows, "");
    let template = dir.path().join("own.jinja");
    fs::write(&template, source).unwrap();
    own.data.rows.as_mut().unwrap().chat_template = Some(fleet_common::job::ChatTemplate::File(template));
    let (cache, notes) = build(&own).unwrap();
    assert!(!told(&notes).contains("does not write"), "{}", told(&notes));
    let item = &read(cache.train())[0];
    let model = here().join("../../tests/parity/golden/foreign/byte_level/tokenizer.json");
    let ids: Vec<u32> = item.ids.iter().map(|id| *id as u32).collect();
    let given = fleet_data::model_dir::GivenTokenizer::open(&model, u32::MAX).unwrap();
    let text = fleet_data::decode(&given.tokenizer, &ids, false).unwrap();
    assert!(text.contains("assistant:rain") && text.contains("assistant:hmsome"), "{text}");
    assert!(text.starts_with("[{\"type\": \"function\""), "{text}");
}

#[test]
fn fields_that_nothing_reads_are_named() {
    let notes = |lines: &str| {
        let row = "{\"prompt\": \"a\", \"completion\": \" b\", \"system\": \"be kind\", \"id\": \"7\", \"score\": 3}\n";
        let (_dir, job) = job("a.jsonl", &row.repeat(3), lines);
        build(&job).unwrap().1
    };
    let plain = notes("");
    let line = plain.iter().find(|note| note.line.starts_with("fields that are not read")).unwrap();
    assert!(
        line.level == Level::Warn && line.line.contains("`id` (3 rows), `system` (3 rows)"),
        "{}",
        line.line
    );
    let told = told(&notes("chat_template = \"chatml\""));
    assert!(told.contains("learnt: `id` (3 rows); data.fields says what a field is"), "{told}");
}

#[test]
fn a_turn_that_says_nothing_is_counted_where_its_end_is_learnt() {
    let row = |weight: u8| {
        format!(
            "{{\"messages\": [{{\"role\": \"user\", \"content\": \"a\"}}, {{\"role\": \"assistant\", \"content\": \"\", \"weight\": {weight}}}, \
             {{\"role\": \"user\", \"content\": \"b\"}}, {{\"role\": \"assistant\", \"content\": \"c\"}}]}}\n"
        )
    };
    let (_dir, job) = job("a.jsonl", &(row(1) + &row(0)), "chat_template = \"chatml\"");
    let (cache, notes) = build(&job).unwrap();
    assert_eq!(cache.meta().rows.as_ref().unwrap().report.silent_turns, 1);
    assert!(
        told(&notes).contains("1 row with a turn of the assistant that says nothing"),
        "{}",
        told(&notes)
    );
}
