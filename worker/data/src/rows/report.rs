//! What became of the rows of a job: told before it trains, and with every start.

use crate::chat::LeftOut;
use crate::{DataError, Note};
use fleet_common::events::Level;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Names of fields that are counted.
const NAMES_MAX: usize = 64;

/// Of those the ones that a line names.
const NAMED_MAX: usize = 8;

/// Fields that belong to what is asked, by the names that people have for them.
const OF_PROMPTS: [&str; 10] = [
    "system",
    "history",
    "tools",
    "input",
    "context",
    "instruction",
    "question",
    "documents",
    "images",
    "functions",
];

/// Counts of rows, unless tokens are said.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Report {
    /// What the rows are, in words.
    pub formats: Vec<String>,
    pub rows: u64,
    /// Examples of which something is learnt.
    pub examples: u64,
    /// Of the examples, as far as they fit into `max_seq_len`.
    pub tokens: u64,
    /// Those of them that carry loss.
    pub loss_tokens: u64,
    /// Without text or without an answer.
    pub empty: u64,
    /// Whose rejected answer is the chosen one.
    pub same: u64,
    /// Examples that were there before, token for token.
    pub duplicates: u64,
    /// Left out, because an example before them is nearly the same.
    #[serde(default)]
    pub near_duplicates: u64,
    /// Left out, because they cannot be read.
    pub bad: u64,
    /// Left out, because they hold bytes that are not UTF-8.
    pub not_utf8: u64,
    /// Cut at `max_seq_len`, those of which nothing was left to learn included.
    pub truncated: u64,
    pub truncated_tokens: u64,
    /// Left out, because all that was to be learnt of them lies behind `max_seq_len`.
    pub cut_off: u64,
    /// Left out, because no token of them carries loss, cut or not.
    pub masked: u64,
    /// Whose prompt has other tokens alone than with the answer behind it, or of whose turns of the assistant one begins within a token.
    pub unjoined: u64,
    /// By what they have and the chat template does not write, such as "the `tool_calls`".
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub left_out: BTreeMap<String, u64>,
    /// By the same the first of them.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub first_left_out: BTreeMap<String, String>,
    /// With a turn of the assistant that says nothing, of which the end is learnt.
    #[serde(default)]
    pub silent_turns: u64,
    /// By a field with something in it that is not read.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub unread: BTreeMap<String, u64>,
    /// What of the chat template does not fit the model's tokenizer, a line each.
    pub template: Vec<String>,
    /// The first bad row and the first unjoined one: where, and what is wrong.
    pub first_bad: Option<String>,
    pub first_unjoined: Option<String>,
}

impl Report {
    /// Counts the fields of a row that were not read, whose names are taken as long as there are few.
    pub(super) fn count_unread(&mut self, fields: Vec<String>) {
        for name in fields {
            if self.unread.len() < NAMES_MAX || self.unread.contains_key(&name) {
                *self.unread.entry(name).or_default() += 1;
            }
        }
    }

    /// Counts a row of which a chat template does not write everything.
    pub(super) fn count_left_out(&mut self, what: LeftOut, place: impl FnOnce() -> String) {
        let what = match what {
            LeftOut::Every(name) => format!("the `{name}`"),
            LeftOut::Some(name) => format!("the `{name}` of every answer"),
            LeftOut::Thoughts => "the thoughts (<think>) in the text of every answer".to_owned(),
            LeftOut::BesideCall => "the text beside every call of a function".to_owned(),
        };
        *self.left_out.entry(what.clone()).or_default() += 1;
        self.first_left_out.entry(what).or_insert_with(place);
    }

    /// Refuses data from which nothing can be learnt.
    pub(super) fn check(&self, max_seq_len: u32) -> Result<(), DataError> {
        if self.examples > 0 {
            return Ok(());
        }
        let bad = self.first_bad.as_ref().map(|first| format!(" (the first: {first})")).unwrap_or_default();
        let counts = [
            (self.bad, format!("cannot be read{bad}")),
            (self.not_utf8, "are not UTF-8".into()),
            (self.empty, "have no text or no answer".into()),
            (self.same, "reject what they choose".into()),
            (self.masked, "have no token that carries loss".into()),
            (self.cut_off, format!("have their answer behind max_seq_len, {max_seq_len} tokens")),
        ];
        let why: Vec<String> = counts
            .into_iter()
            .filter(|(count, _)| *count > 0)
            .map(|(count, what)| format!("{count} {what}"))
            .collect();
        if self.rows == 0 && why.is_empty() {
            return Err(DataError::Rows(
                "there is no row in any file of the data (the first row of a table names its fields); see what data.path names".into(),
            ));
        }
        let why = if why.is_empty() { "there are none".to_owned() } else { why.join(", ") };
        Err(DataError::Rows(format!(
            "no token of the rows carries loss, so there is nothing to learn: of {} rows {why}",
            self.rows
        )))
    }

    /// What the user should know. `packs`: how many sequences the examples share, if they do.
    pub(crate) fn notes(&self, max_seq_len: u32, packs: Option<u64>) -> Vec<Note> {
        let mut notes = vec![Note::info(self.told(packs))];
        let mut warn = |count: u64, line: String| {
            if count > 0 {
                notes.push(Note::warning(line));
            }
        };
        let first = |place: &Option<String>| {
            place.as_ref().map(|place| format!(" (the first: {place})")).unwrap_or_default()
        };
        warn(self.bad, format!("left out: {} that cannot be read{}", rows(self.bad), first(&self.first_bad)));
        warn(self.not_utf8, format!("left out: {} with bytes that are not UTF-8", rows(self.not_utf8)));
        let all = self.tokens + self.truncated_tokens;
        let nothing = match self.cut_off {
            0 => String::new(),
            count => format!("; {count} of them are left out, because nothing was left to learn"),
        };
        warn(
            self.truncated,
            format!(
                "cut at max_seq_len, {max_seq_len} tokens: {}, which lost {}{nothing}; raise max_seq_len to learn them whole",
                rows(self.truncated),
                percent(self.truncated_tokens, all)
            ),
        );
        warn(self.masked, format!("left out: {} of which no token carries loss", rows(self.masked)));
        warn(
            self.unjoined,
            format!(
                "prompt and answer do not join at a token boundary in {}{}: the model sees other tokens there than when it is asked; end \
                 prompts without a space and begin answers with it, of messages take a template that ends so",
                rows(self.unjoined),
                first(&self.first_unjoined)
            ),
        );
        warn(
            self.silent_turns,
            format!(
                "{} with a turn of the assistant that says nothing: its end is learnt, so that the model answers nothing; give it a text, or a `weight` of 0",
                rows(self.silent_turns)
            ),
        );
        for (what, count) in &self.left_out {
            // Most leave out what was thought before the last question.
            let cure = match what.ends_with("of every answer") {
                true => "make a row of each answer, which is the last one there",
                false => "say it in the texts of the messages",
            };
            warn(
                *count,
                format!(
                    "the chat template does not write {what} of {}{}, so what is left out is not learnt; name a template that does in \
                     data.chat_template, or {cure}",
                    rows(*count),
                    first(&self.first_left_out.get(what).cloned())
                ),
            );
        }
        notes.extend(self.template.iter().map(Note::warning));
        notes.extend(self.unread());
        notes
    }

    /// The fields that are not read, the most frequent first.
    fn unread(&self) -> Option<Note> {
        let mut fields: Vec<(&String, &u64)> = self.unread.iter().collect();
        fields.sort_by_key(|(_, count)| std::cmp::Reverse(**count));
        let short = |name: &str| name.chars().take(40).flat_map(char::escape_debug).collect::<String>();
        let named = fields.iter().take(NAMED_MAX);
        let named: Vec<String> =
            named.map(|(name, count)| format!("`{}` ({})", short(name), rows(**count))).collect();
        let more = fields.len().saturating_sub(NAMED_MAX);
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        let is_asked = fields.iter().any(|(name, _)| OF_PROMPTS.contains(&name.as_str()));
        let cure = match self.unread.contains_key("system") || self.unread.contains_key("tools") {
            true => "name a template in data.chat_template, with which `system` and `tools` are written",
            false => "data.fields says what a field is",
        };
        let line = format!(
            "fields that are not read, so nothing of them is learnt: {}{more}; {cure}",
            named.join(", ")
        );
        let level = if is_asked { Level::Warn } else { Level::Info };
        (!fields.is_empty()).then_some(Note { level, line })
    }

    fn told(&self, packs: Option<u64>) -> String {
        let share = percent(self.loss_tokens, self.tokens);
        let mut line = format!(
            "{} of {} make {} tokens, of which {share} carry loss",
            rows(self.examples),
            self.formats.join(" | "),
            self.tokens
        );
        if let Some(packs) = packs {
            line += &format!(", packed into {packs} sequences");
        }
        for (count, what) in [
            (self.empty, "without text or answer"),
            (self.same, "whose answers are the same"),
            (self.near_duplicates, "left out as near duplicates"),
            (self.duplicates, "that were there before"),
        ] {
            if count > 0 {
                line += &format!("; {} {what}", rows(count));
            }
        }
        line
    }
}

fn rows(count: u64) -> String {
    format!("{count} row{}", if count == 1 { "" } else { "s" })
}

fn percent(part: u64, of: u64) -> String {
    format!("{:.1} %", part as f64 * 100.0 / of.max(1) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use fleet_common::events::Level;

    #[test]
    fn what_is_to_know_is_said_in_lines() {
        let report = Report {
            formats: vec!["messages".into()],
            rows: 10,
            examples: 7,
            tokens: 400,
            loss_tokens: 100,
            empty: 1,
            duplicates: 2,
            bad: 1,
            truncated: 3,
            truncated_tokens: 100,
            cut_off: 1,
            first_bad: Some("a.jsonl, line 3: no".into()),
            ..Report::default()
        };
        report.check(64).unwrap();
        let notes = report.notes(64, Some(5));
        let lines: Vec<&str> = notes.iter().map(|note| note.line.as_str()).collect();
        assert_eq!(
            lines,
            [
                "7 rows of messages make 400 tokens, of which 25.0 % carry loss, packed into 5 sequences; 1 row without text or answer; 2 \
                 rows that were there before",
                "left out: 1 row that cannot be read (the first: a.jsonl, line 3: no)",
                "cut at max_seq_len, 64 tokens: 3 rows, which lost 20.0 %; 1 of them are left out, because nothing was left to learn; raise \
                 max_seq_len to learn them whole",
            ]
        );
        assert!(notes[0].level == Level::Info && notes[1].level == Level::Warn);
    }

    #[test]
    fn what_is_lost_on_the_way_is_named() {
        let counts = |list: &[(&str, u64)]| list.iter().map(|(name, n)| ((*name).to_owned(), *n)).collect();
        let mut report =
            Report { silent_turns: 1, unread: counts(&[("id", 9), ("context", 2)]), ..Report::default() };
        for line in [4, 7, 9] {
            report.count_left_out(LeftOut::Every("tool_calls"), || format!("a.jsonl, line {line}"));
        }
        report.count_left_out(LeftOut::Some("reasoning_content"), || "a.jsonl, line 2".into());
        let told = |report: &Report| {
            let notes = report.notes(64, None);
            notes[1..].iter().map(|note| (note.level, note.line.clone())).collect::<Vec<_>>()
        };
        let lines = told(&report);
        assert!(lines[0].1.starts_with("1 row with a turn of the assistant that says nothing"), "{lines:?}");
        assert!(
            lines[1].1.starts_with("the chat template does not write the `reasoning_content` of every answer of 1 row (the first: a.jsonl, line 2), so"),
            "{lines:?}"
        );
        assert!(
            lines[1].1.ends_with("or make a row of each answer, which is the last one there"),
            "{lines:?}"
        );
        assert!(
            lines[2].1.starts_with(
                "the chat template does not write the `tool_calls` of 3 rows (the first: a.jsonl, line 4), so"
            ),
            "{lines:?}"
        );
        let unread = "fields that are not read, so nothing of them is learnt: `id` (9 rows), `context` (2 rows); data.fields says what a field is";
        assert_eq!(lines[3], (Level::Warn, unread.to_owned()));
        report.unread = counts(&[("id", 9)]);
        assert_eq!(told(&report)[3].0, Level::Info, "a name of a row is seldom missed");
        report.unread = (0..100).map(|n| (format!("f{n}"), 1)).collect();
        assert!(told(&report)[3].1.contains("and 92 more"));
        report.count_unread(vec!["another".into(), "f1".into()]);
        assert_eq!((report.unread.len(), report.unread["f1"]), (100, 2));
    }

    #[test]
    fn data_without_loss_are_refused_with_the_reasons() {
        let report = Report { rows: 5, empty: 2, cut_off: 3, ..Report::default() };
        let error = report.check(8).unwrap_err().to_string();
        assert!(
            error.contains(
                "of 5 rows 2 have no text or no answer, 3 have their answer behind max_seq_len, 8 tokens"
            ),
            "{error}"
        );
    }
}
