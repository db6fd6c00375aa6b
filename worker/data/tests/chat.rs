//! Chat templates of public models against what transformers renders: `golden/chat`, made by `tests/parity/chat.py`.

#![allow(clippy::unwrap_used)] // in a test an unwrap is an assertion

use fleet_data::chat::{Conversation, Ending, Template};
use fleet_data::model_dir::{GivenTokenizer, SpecialTokens};
use serde_json::{Map, Value};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use time::OffsetDateTime;

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/chat")
}

fn read(path: &Path) -> Map<String, Value> {
    let text = std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_str(&text).unwrap()
}

/// That of the generator: 7 March 2026, 14:05:09.
fn now() -> OffsetDateTime {
    OffsetDateTime::from_unix_timestamp(1_772_892_309).unwrap()
}

fn conversation(given: &Value) -> Conversation {
    let mut made = Conversation::new(given["messages"].as_array().unwrap()).unwrap();
    made.tools = given["tools"].as_array().cloned();
    made.documents = given["documents"].as_array().cloned();
    made.variables = given["variables"].as_object().cloned().unwrap_or_default();
    made
}

fn ending(name: &str) -> Ending {
    match name {
        "complete" => Ending::Complete,
        "prompt" => Ending::Prompt,
        "open" => Ending::Open,
        other => panic!("no ending {other}"),
    }
}

fn tokenizer() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/parity/golden/foreign/byte_level/tokenizer.json")
}

/// What differs between a rendering and the expected one, in one line.
fn difference(
    template: &Template,
    given: &Value,
    case: &str,
    expected: &Value,
    tokenizer: &GivenTokenizer,
) -> Option<String> {
    let rendered = template.render(&conversation(given), ending(case.split(' ').nth(1)?), now());
    let Some(text) = expected["text"].as_str() else {
        let error = expected["error"].as_str().unwrap();
        // A template that asks whether content is none is told so, as by transformers before 5.24; that one leaves the key out, and it fails.
        let asks_for_none = error.contains("no attribute 'content'");
        return rendered.ok().filter(|_| !asks_for_none).map(|_| format!("transformers fails ({error})"));
    };
    let rendered = match rendered {
        Ok(rendered) => rendered,
        Err(e) => return Some(e.to_string()),
    };
    if rendered.text != text {
        let same = rendered.text.bytes().zip(text.bytes()).take_while(|(a, b)| a == b).count();
        let around = |text: &str| {
            String::from_utf8_lossy(&text.as_bytes()[same.saturating_sub(30)..(same + 50).min(text.len())])
                .into_owned()
        };
        return Some(format!("{:?} and not {:?}", around(&rendered.text), around(text)));
    }
    let spans = expected["spans"].as_array()?;
    let found: Vec<Value> = rendered.assistant.iter().map(|span| vec![span.start, span.end].into()).collect();
    if found != *spans {
        return Some(format!("spans {found:?} and not {spans:?}"));
    }
    let tokens = rendered.tokens(tokenizer).unwrap();
    let ids: Vec<String> = tokens.encoded.ids.iter().map(u32::to_string).collect();
    let mask: String = tokens.assistant.iter().map(|inside| if *inside { '1' } else { '0' }).collect();
    (ids.join(" ") != expected["ids"] || mask != expected["mask"])
        .then(|| format!("tokens {ids:?} or mask {mask}"))
}

#[test]
fn templates_of_public_models_are_rendered_as_transformers_renders_them() {
    let dir = golden();
    let conversations = read(&dir.join("conversations.json"));
    let special = SpecialTokens::beside(&tokenizer()).unwrap().named;
    let tokenizer = GivenTokenizer::open(&tokenizer(), u32::MAX).unwrap();
    let (mut templates, mut cases, mut masks, mut different) = (0, 0, 0, Vec::new());
    let files: BTreeSet<PathBuf> =
        std::fs::read_dir(dir.join("expected")).unwrap().map(|entry| entry.unwrap().path()).collect();
    for file in files {
        let name = file.file_stem().unwrap().to_str().unwrap();
        let source = match name.strip_prefix("fleet_") {
            Some(own) => Path::new(env!("CARGO_MANIFEST_DIR")).join("src/chat/templates").join(own),
            None => dir.join("templates").join(name),
        };
        let source = format!("{}.jinja", source.display()); // a name may have a dot
        let template = match Template::parse(name, &std::fs::read_to_string(source).unwrap(), special.clone())
        {
            Ok(template) => template,
            Err(e) => {
                different.push(e.to_string());
                continue;
            }
        };
        templates += 1;
        for (case, expected) in read(&file) {
            cases += 1;
            masks += usize::from(expected["mask"].is_string());
            let given = &conversations[case.split(' ').next().unwrap()];
            let differs = difference(&template, given, &case, &expected, &tokenizer);
            different.extend(differs.map(|what| format!("{name}, {case}: {what}")));
        }
    }
    assert!(different.is_empty(), "{} of {cases}\n{}", different.len(), different.join("\n"));
    assert!(
        templates >= 40 && cases > 700 && masks > 60,
        "{templates} templates, {cases} cases, {masks} masks"
    );
}
