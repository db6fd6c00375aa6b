//! Rows of instruction data: how they are read, and which of their tokens are learnt.

use super::Tokenizer;
use super::error::JobFileError;
use super::fields::Fields;
use super::load::absolute;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// What a job says of its rows.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rows {
    /// `None`: what the first rows of each file are.
    pub format: Option<RowFormat>,
    /// By the usual name of a field (one of `ROW_FIELDS`), the name that it has in the data.
    pub fields: BTreeMap<String, String>,
    pub loss_on: LossOn,
    /// `None`: the model's own for messages, and for Alpaca's rows where it has one; other texts are joined as they stand.
    pub chat_template: Option<ChatTemplate>,
    /// Several whole examples share a sequence; none of them sees the others.
    pub packing: bool,
    /// The sequences at the end of an epoch that are too few for a step are left out; else they make a smaller one.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub drop_last: bool,
    pub bad_rows: BadRows,
}

impl BadRows {
    pub(super) fn stops(&self) -> bool {
        *self == BadRows::Stop
    }
}

/// What a row is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RowFormat {
    /// A text, of which every token is learnt.
    Text,
    /// Messages with `role` and `content`, as OpenAI has them.
    Messages,
    /// Turns with `from` and `value`, as ShareGPT has them.
    Conversations,
    /// Two texts, or two lists of messages.
    PromptCompletion,
    /// `instruction`, perhaps `input`, and `output`.
    Alpaca,
    /// A prompt with an answer that is chosen and one that is rejected.
    Preference,
}

/// Which tokens carry loss.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LossOn {
    /// Completions and the assistant's turns, where a row has such; else all.
    #[default]
    Answers,
    All,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ChatTemplate {
    /// That of the model.
    Model,
    /// None, although the model may have one.
    None,
    /// One of the model, or a built-in one.
    Named(String),
    /// Absolute path of a Jinja file.
    File(PathBuf),
}

/// What happens at a row that cannot be read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BadRows {
    /// The job is refused.
    #[default]
    Stop,
    /// It is left out and counted.
    Skip,
}

/// Names of fields that `data.fields` may give another name.
pub const ROW_FIELDS: [&str; 13] = [
    "messages",
    "role",
    "content",
    "prompt",
    "completion",
    "instruction",
    "input",
    "output",
    "system",
    "history",
    "tools",
    "chosen",
    "rejected",
];

/// Names of the files with rows that are read from a folder where `data.include` is not given.
pub(super) const READABLE: [&str; 2] =
    ["**/*.{json,jsonl,ndjson,csv,tsv,parquet}", "**/*.{json,jsonl,ndjson,csv,tsv}.{gz,zst}"];

/// What people call the task of learning from rows.
const TASKS: [&str; 5] = ["sft", "instruction", "instruction-tuning", "instruct", "chat"];

/// The settings that only rows have, beside `data.format`, in the order of `settings::SETTINGS`.
const SETTINGS: [&str; 6] = [
    "data.loss_on",
    "data.completion_only_loss",
    "data.train_on_inputs",
    "data.chat_template",
    "data.packing",
    "data.drop_last",
];

const FIELDS: [&str; ROW_FIELDS.len()] = [
    "data.fields.messages",
    "data.fields.role",
    "data.fields.content",
    "data.fields.prompt",
    "data.fields.completion",
    "data.fields.instruction",
    "data.fields.input",
    "data.fields.output",
    "data.fields.system",
    "data.fields.history",
    "data.fields.tools",
    "data.fields.chosen",
    "data.fields.rejected",
];

/// Whether a task of this name learns from rows.
pub(super) fn is_task(name: &str) -> bool {
    let plain = name.to_lowercase().replace(['_', ' '], "-");
    TASKS.contains(&plain.as_str())
}

/// What the job says of rows; `None` where it learns plain text.
pub(super) fn rows(f: &Fields, dir: &Path, tokenizer: &Tokenizer) -> Result<Option<Rows>, JobFileError> {
    let task = f.text("task_name", "a name")?.is_some_and(|name| is_task(&name));
    let format = format(f)?;
    if !task && format.is_none_or(|format| format == RowFormat::Text) {
        let given = SETTINGS.iter().chain(&FIELDS).find(|name| f.is_given(name));
        return match given {
            None => Ok(None),
            Some(name) => {
                let spelling = f.spelling(name);
                let message = format!(
                    "`{spelling}` is for rows of instructions, and this job learns plain text, which is always packed, in full steps; write `task_name` = \"sft\" for \
                     rows, or take the key out"
                );
                Err(f.refuse(&[name], message))
            }
        };
    }
    if let Tokenizer::Train { .. } = tokenizer {
        let message = "rows of instructions need a tokenizer that is there; set `model.path` to the model to train on, or `tokenizer.path`";
        return Err(f.refuse(&["data.format", "task_name"], message.to_owned()));
    }
    let name = |key| f.text(key, "the name of a field");
    let fields = ROW_FIELDS.iter().zip(FIELDS).map(|(field, key)| Ok((*field, name(key)?)));
    let fields = fields.collect::<Result<Vec<_>, JobFileError>>()?;
    let given = fields.into_iter().filter_map(|(field, name)| Some((field.to_owned(), name?)));
    let packing = f.flag("data.packing")?.unwrap_or(false);
    if packing && format == Some(RowFormat::Preference) {
        let message = "`data.packing` is for rows of one answer; leave it out".to_owned();
        return Err(f.refuse(&["data.packing"], message));
    }
    let loss_on = loss_on(f)?;
    if loss_on == LossOn::All && format == Some(RowFormat::Preference) {
        let keys = ["data.loss_on", "data.completion_only_loss", "data.train_on_inputs"];
        let said = keys.into_iter().find(|key| f.is_given(key)).map_or("data.loss_on", |key| f.spelling(key));
        let message = format!(
            "`{said}` is for rows of one answer: of preferences two answers to the same prompt are compared, and nothing else; leave it out"
        );
        return Err(f.refuse(&keys, message));
    }
    Ok(Some(Rows {
        format,
        fields: given.collect(),
        loss_on,
        chat_template: chat_template(f, dir)?,
        packing,
        drop_last: f.flag("data.drop_last")?.unwrap_or(false),
        bad_rows: bad_rows(f)?,
    }))
}

/// What is done with rows that cannot be read, of instructions or of plain text.
pub(super) fn bad_rows(f: &Fields) -> Result<BadRows, JobFileError> {
    let words = [("stop", BadRows::Stop), ("skip", BadRows::Skip)];
    let others = [("error", BadRows::Stop), ("fail", BadRows::Stop), ("drop", BadRows::Skip)];
    Ok(f.word_of("data.bad_rows", &words, &others, |_| true)?.unwrap_or_default())
}

fn format(f: &Fields) -> Result<Option<RowFormat>, JobFileError> {
    use RowFormat::{Alpaca, Conversations, Messages, Preference, PromptCompletion, Text};
    let words = [
        ("text", Text),
        ("messages", Messages),
        ("conversations", Conversations),
        ("prompt_completion", PromptCompletion),
        ("alpaca", Alpaca),
        ("preference", Preference),
    ];
    let others = [
        ("chat", Messages),
        ("openai", Messages),
        ("conversational", Messages),
        ("chat_template", Messages),
        ("sharegpt", Conversations),
        ("instruction", Alpaca),
    ];
    let format = f.word_of("data.format", &words, &others, |_| true)?;
    let is_dpo = super::dpo::is_wanted(f)?;
    match format {
        None if is_dpo => Ok(Some(Preference)),
        Some(Preference) if !is_dpo => {
            let message = "`data.format` is of preferences, and the job does not learn them; write `task_name` = \"dpo\", or their chosen answers as prompt and completion";
            Err(f.refuse(&["data.format"], message.to_owned()))
        }
        Some(format) if is_dpo && format != Preference => {
            let message =
                "`data.format` is another than \"preference\", and the job learns preferences; leave it out";
            Err(f.refuse(&["data.format"], message.to_owned()))
        }
        format => Ok(format),
    }
}

/// Said by `data.loss_on`, or by one of the flags that other tools have for it.
fn loss_on(f: &Fields) -> Result<LossOn, JobFileError> {
    let words = [("answers", LossOn::Answers), ("all", LossOn::All)];
    let others = [("completions", LossOn::Answers), ("assistant", LossOn::Answers)];
    let of = |answers: bool| if answers { LossOn::Answers } else { LossOn::All };
    let said = [
        ("data.loss_on", f.word_of("data.loss_on", &words, &others, |_| true)?),
        ("data.completion_only_loss", f.flag("data.completion_only_loss")?.map(of)),
        ("data.train_on_inputs", f.flag("data.train_on_inputs")?.map(|all| of(!all))),
    ];
    let mut said = said.into_iter().filter_map(|(key, loss)| Some((key, loss?)));
    let Some((first, loss)) = said.next() else { return Ok(LossOn::default()) };
    match said.find(|(_, other)| *other != loss) {
        None => Ok(loss),
        Some((other, _)) => {
            let (a, b) = (f.spelling(first), f.spelling(other));
            Err(f.refuse(&[other], format!("`{a}` and `{b}` contradict each other; keep one")))
        }
    }
}

fn chat_template(f: &Fields, dir: &Path) -> Result<Option<ChatTemplate>, JobFileError> {
    const KEY: &str = "data.chat_template";
    let wanted = "\"model\", \"none\", the name of a chat template or a .jinja file";
    let Some(name) = f.text(KEY, wanted)? else { return Ok(None) };
    Ok(Some(match name.as_str() {
        "model" => ChatTemplate::Model,
        "none" => ChatTemplate::None,
        path if path.ends_with(".jinja") => ChatTemplate::File(absolute(f, KEY, dir, path)?),
        _ => ChatTemplate::Named(name),
    }))
}

impl Rows {
    /// As the keys of a job file's `[data]`.
    pub(super) fn in_a_file(&self) -> Map<String, Value> {
        let template = match &self.chat_template {
            None => Value::Null,
            Some(ChatTemplate::Model) => json!("model"),
            Some(ChatTemplate::None) => json!("none"),
            Some(ChatTemplate::Named(name)) => json!(name),
            Some(ChatTemplate::File(path)) => json!(path),
        };
        let keys = json!({
            "format": self.format,
            "loss_on": self.loss_on,
            "chat_template": template,
            "packing": self.packing,
            "drop_last": self.drop_last,
            "bad_rows": self.bad_rows,
            "fields": (!self.fields.is_empty()).then_some(&self.fields),
        });
        super::render::table(keys)
    }

    /// What a field is called in the data.
    pub fn field<'a>(&'a self, usual: &'a str) -> &'a str {
        self.fields.get(usual).map_or(usual, String::as_str)
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Job, Warning, parse_toml};
    use super::*;

    fn parsed(lines: &str) -> Result<(Job, Vec<Warning>), String> {
        let text = format!("model = {{ path = \"m\" }}\n[data]\npath = \"x.json\"\n{lines}");
        parse_toml(&text, "/work/dir".as_ref()).map_err(|e| e.to_string())
    }

    /// With what the top of the file says before `[data]`.
    fn rows(top: &str, lines: &str) -> Option<Rows> {
        let text = format!("{top}\nmodel = {{ path = \"m\" }}\n[data]\npath = \"x.json\"\n{lines}");
        let (job, warnings) = parse_toml(&text, "/work/dir".as_ref()).map_err(|e| e.to_string()).unwrap();
        assert!(warnings.is_empty(), "{warnings:?}");
        let again = parse_toml(&job.to_toml(), "/work/dir".as_ref()).unwrap().0;
        assert_eq!(again, job, "as a job file");
        assert_eq!(Job::from_json(&job.to_json()).unwrap(), job);
        job.data.rows
    }

    #[test]
    fn the_task_or_the_format_says_that_rows_are_learnt() {
        assert_eq!(rows("", ""), None);
        assert_eq!(rows("", "format = \"text\""), None);
        assert_eq!(rows("task_name = \"sft\"", ""), Some(Rows::default()));
        assert_eq!(rows("task_name = \"Instruction Tuning\"", ""), Some(Rows::default()));
        let format = |format| Some(Rows { format: Some(format), ..Rows::default() });
        assert_eq!(rows("task_name = \"mine\"", "format = \"alpaca\""), format(RowFormat::Alpaca));
        assert_eq!(rows("", "formatting = \"sharegpt\""), format(RowFormat::Conversations));
        assert_eq!(rows("task_name = \"sft\"", "format = \"text\""), format(RowFormat::Text));
        assert_eq!(parsed("format = \"alpaca\"").unwrap().0.task_name, "sft");
    }

    #[test]
    fn the_words_of_other_tools_are_understood() {
        let sft = |top: &str, lines: &str| rows(&format!("task_name = \"sft\"\n{top}"), lines).unwrap();
        assert!(sft("packing = true", "").packing && sft("", "sample_packing = true").packing);
        assert!(sft("dataloader_drop_last = true", "").drop_last && !sft("", "drop_last = false").drop_last);
        for all in ["completion_only_loss = false", "train_on_inputs = true", "train_on_prompt = true"] {
            assert_eq!(sft(all, "").loss_on, LossOn::All, "{all}");
        }
        assert_eq!(sft("assistant_only_loss = true", "loss_on = \"completions\"").loss_on, LossOn::Answers);
        let said = sft("", "fields = { prompt = \"question\" }\nfield_output = \"answer\"");
        assert_eq!(
            (said.field("prompt"), said.field("output"), said.field("input")),
            ("question", "answer", "input")
        );
        assert_eq!(
            sft("chat_template = \"chatml\"", "").chat_template,
            Some(ChatTemplate::Named("chatml".into()))
        );
        let file = ChatTemplate::File("/work/dir/a.jinja".into());
        assert_eq!(sft("", "chat_template = \"a.jinja\"").chat_template, Some(file));
        assert_eq!(sft("", "bad_rows = \"skip\"").bad_rows, BadRows::Skip);
    }

    #[test]
    fn what_rows_cannot_have_is_refused_in_one_line() {
        let refused = |lines: &str| parsed(lines).unwrap_err();
        assert!(refused("packing = true").contains("`data.packing` is for rows of instructions"));
        assert!(refused("fields.prompt = \"a\"").contains("write `task_name` = \"sft\""));
        assert!(refused("format = \"preference\"").contains("the job does not learn them"));
        assert!(refused("format = \"alpca\"").contains("\"alpaca\""));
        assert!(refused("format = \"alpaca\"\nbad_row = \"skip\"").contains("did you mean `data.bad_rows`"));
        assert!(
            refused("format = \"alpaca\"\nfields.promt = \"a\"")
                .contains("did you mean `data.fields.prompt`")
        );
        let both = refused("format = \"alpaca\"\nloss_on = \"all\"\ntrain_on_inputs = false");
        assert!(both.contains("`data.loss_on` and `data.train_on_inputs` contradict"), "{both}");
        let new = parse_toml("task_name = \"sft\"\ndata.path = \"x\"", "/work/dir".as_ref())
            .unwrap_err()
            .to_string();
        assert!(new.contains("need a tokenizer that is there") && new.contains("`model.path`"), "{new}");
    }

    #[test]
    fn text_too_may_have_bad_rows_weights_and_near_duplicates() {
        let read = |lines: &str| {
            let text = format!("model = {{ path = \"m\" }}\n[data]\n{lines}");
            let parsed = parse_toml(&text, "/work/dir".as_ref()).map_err(|e| e.to_string());
            parsed.inspect(|(job, _)| {
                assert_eq!(
                    parse_toml(&job.to_toml(), "/work/dir".as_ref()).unwrap().0,
                    *job,
                    "as a job file"
                );
            })
        };
        let data = |lines: &str| read(lines).unwrap().0.data;
        let all = data(
            "path = [\"a\", \"b\"]\nweights = [2, 0.5]\nbad_rows = \"skip\"\nclean = { near_duplicates = 0.8 }",
        );
        assert_eq!((all.weights, all.bad_rows), (vec![2.0, 0.5], BadRows::Skip));
        assert_eq!(all.clean.near_duplicates, Some(0.8));
        assert_eq!(data("path = [\"a\", \"b\"]\nweights = [1, 1]"), data("path = [\"a\", \"b\"]"));
        let refused = |lines: &str| read(lines).unwrap_err();
        assert!(
            refused("path = \"a\"\nweights = [1, 2]")
                .contains("`data.weights` has 2 numbers, and `data.path` names 1")
        );
        assert!(refused("path = \"a\"\nweights = [0]").contains("from above 0 to 100"));
        assert!(
            refused("path = \"a\"\nclean.near_duplicates = 1.5").contains("a similarity from above 0 to 1")
        );
    }

    #[test]
    fn a_job_of_before_is_a_job() {
        let (job, _) = parsed("").unwrap();
        assert!(!job.to_json().contains("rows"), "as earlier versions wrote it");
    }
}
