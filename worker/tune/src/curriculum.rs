//! Topics that are learnt in their order, each evaluated before and after.

use crate::{Dataset, Trainer, TrainingResult};
use fleet_learn::{Error, Result};
use serde::Deserialize;
use std::path::{Path, PathBuf};

/// Bytes of a file of topics.
const FILE_MAX: u64 = 1 << 20;

/// Topics, one after the other. In a file, TOML with a table for each:
///
/// ```toml
/// [[topics]]
/// id = "greetings"
/// data = "greetings.jsonl"
///
/// [[topics]]
/// id = "counting"
/// data = "counting.jsonl"
/// ```
///
/// What is learnt of one topic is gone on from with the next. A part of each is held out (`TrainingConfig::validation_fraction`) and evaluated before
/// and after the topic.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Curriculum {
    topics: Vec<Topic>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Topic {
    /// Its run is called so.
    pub id: String,
    pub data: Dataset,
}

/// How the topics went.
#[derive(Clone, Debug, PartialEq)]
pub struct CurriculumResult {
    /// All did.
    pub success: bool,
    /// Up to the first that failed.
    pub topics: Vec<TopicResult>,
    /// Of that one.
    pub error_message: Option<String>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct TopicResult {
    pub id: String,
    pub result: TrainingResult,
}

impl TopicResult {
    /// Loss on what is held out of the topic before and after it was learnt, where something is.
    pub fn evaluations(&self) -> Option<(f64, f64)> {
        let of = |name| self.result.metrics.get(name).copied();
        of("initial_eval_loss").zip(of("eval_loss"))
    }
}

impl Curriculum {
    /// With another topic behind the others.
    #[must_use]
    pub fn topic(mut self, id: &str, data: impl Into<Dataset>) -> Curriculum {
        self.topics.push(Topic { id: id.to_owned(), data: data.into() });
        self
    }

    pub fn topics(&self) -> &[Topic] {
        &self.topics
    }

    /// That of a file, whose folder the topics' paths are taken from.
    pub fn read(path: &Path) -> Result<Curriculum> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct File {
            topics: Vec<Entry>,
        }
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Entry {
            id: String,
            data: PathBuf,
        }
        let refuse = |what: String| Error::Input(format!("{}: {what}", path.display()));
        let bytes = std::fs::metadata(path).map_err(|e| refuse(format!("cannot be read: {e}")))?.len();
        if bytes > FILE_MAX {
            return Err(refuse(format!("has more than {FILE_MAX} bytes; topics are a few lines each")));
        }
        let text = std::fs::read_to_string(path).map_err(|e| refuse(format!("cannot be read: {e}")))?;
        let file: File = toml::from_str(&text).map_err(|e| refuse(e.to_string().replace('\n', " ")))?;
        let folder = path.parent().unwrap_or(Path::new(""));
        let topic = |Entry { id, data }| Topic { id, data: folder.join(data).into() };
        Ok(Curriculum { topics: file.topics.into_iter().map(topic).collect() })
    }

    /// Trains all topics in their order, up to the first that fails.
    pub fn train(&self, trainer: &mut Trainer) -> Result<CurriculumResult> {
        let mut done = CurriculumResult { success: true, topics: Vec::new(), error_message: None };
        for Topic { id, data } in &self.topics {
            let result = trainer.train_on_topic(data.clone(), id).map_err(|error| match error {
                Error::Input(why) => Error::Input(format!("topic {id}: {why}")),
                other => other,
            })?;
            (done.success, done.error_message) = (result.success, result.error_message.clone());
            done.topics.push(TopicResult { id: id.clone(), result });
            if !done.success {
                break;
            }
        }
        Ok(done)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // in a test an unwrap is an assertion
mod tests {
    use super::*;

    #[test]
    fn topics_are_read_from_a_file() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("topics.toml");
        std::fs::write(
            &file,
            "[[topics]]\nid = \"a\"\ndata = \"a.jsonl\"\n[[topics]]\nid = \"b\"\ndata = \"/b.txt\"\n",
        )
        .unwrap();
        let wanted = Curriculum::default().topic("a", dir.path().join("a.jsonl")).topic("b", "/b.txt");
        assert_eq!(Curriculum::read(&file).unwrap(), wanted);
        std::fs::write(&file, "[[topics]]\nname = \"a\"\n").unwrap();
        let error = Curriculum::read(&file).unwrap_err().to_string();
        assert!(error.contains("topics.toml") && error.contains("name") && !error.contains('\n'), "{error}");
    }
}
