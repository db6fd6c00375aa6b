//! What is learnt: files, or rows and texts that are in memory.

use crate::TextCleaning;
use fleet_common::job::ROW_FIELDS;
use fleet_data::{Report, TokenCache};
use fleet_learn::{Error, Result};
use serde_json::{Map, Value, json};
use std::ffi::OsStr;
use std::fs;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

/// Data of a run. Files may be text, CSV, TSV, JSON, JSONL and Parquet, also packed; a data set of the Hugging Face hub is the folder to which
/// `hf download` puts it. Bytes decide what a file is, its name whether it has rows or is text. Long texts are cut into sequences by the trainer.
///
/// ```
/// use fleet_tune::{Dataset, Pipeline, TextCleaning};
/// use serde_json::json;
///
/// let files = Dataset::from("alpaca.csv").field("instruction", "question")?;
/// let rows = Dataset::of_rows(vec![json!({"prompt": "2 + 2?", "completion": " 4"})]);
/// let pipeline = Pipeline::default().add_processor(TextCleaning::default()).filter(|text| text.len() > 10);
/// let texts = ["<p>Kept  as it is long enough.</p>", "short"].map(str::to_owned);
/// let texts = Dataset::of_texts(texts.into_iter().filter_map(|text| pipeline.process(text)));
/// # let _ = (files, rows, texts);
/// # Ok::<(), fleet_tune::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Dataset {
    source: Source,
    /// Keys of a job's `[data]`.
    settings: Map<String, Value>,
}

#[derive(Clone, Debug, PartialEq)]
enum Source {
    Files { paths: Vec<PathBuf>, has_rows: bool },
    Rows(Vec<Value>),
}

impl Dataset {
    /// Files and folders of plain text.
    pub fn text_files(paths: impl IntoIterator<Item = PathBuf>) -> Dataset {
        Dataset::of(Source::Files { paths: paths.into_iter().collect(), has_rows: false })
    }

    /// Files and folders of rows: instructions with answers, messages, texts, preferences.
    pub fn row_files(paths: impl IntoIterator<Item = PathBuf>) -> Dataset {
        Dataset::of(Source::Files { paths: paths.into_iter().collect(), has_rows: true })
    }

    /// Rows, each an object. They are written to the run's folder as JSONL and read from there.
    pub fn of_rows(rows: Vec<Value>) -> Dataset {
        Dataset::of(Source::Rows(rows))
    }

    /// Texts, each of which is a row.
    pub fn of_texts(texts: impl IntoIterator<Item = String>) -> Dataset {
        Dataset::of_rows(texts.into_iter().map(|text| json!({"text": text})).collect())
    }

    fn of(source: Source) -> Dataset {
        Dataset { source, settings: Map::new() }
    }

    /// The field that a usual field (`prompt`, `completion`, `instruction`, `input`, `output`, `messages`, `chosen`, ...) is called in the data.
    pub fn field(mut self, usual: &str, name: &str) -> Result<Dataset> {
        if usual == "text" {
            self.settings.insert("text_field".into(), name.into());
            return Ok(self);
        }
        if !ROW_FIELDS.contains(&usual) {
            let known = ROW_FIELDS.join(", ");
            return Err(Error::Input(format!("{usual} is no field of rows; take text, {known}")));
        }
        let fields = self.settings.entry("fields").or_insert_with(|| json!({}));
        fields[usual] = name.into();
        Ok(self)
    }

    /// Cleans texts of files before they are cut.
    #[must_use]
    pub fn cleaned(mut self, cleaning: TextCleaning) -> Dataset {
        let TextCleaning { remove_html, normalize_whitespace } = cleaning;
        let clean = json!({"remove_html": remove_html, "normalize_whitespace": normalize_whitespace});
        self.settings.insert("clean".into(), clean);
        self
    }

    /// Whether it is made of rows, of which answers are learnt, and not of plain text.
    pub fn has_rows(&self) -> bool {
        !matches!(self.source, Source::Files { has_rows: false, .. })
    }

    /// Rows that are in memory.
    pub fn len_in_memory(&self) -> Option<usize> {
        match &self.source {
            Source::Rows(rows) => Some(rows.len()),
            Source::Files { .. } => None,
        }
    }

    /// The keys of a job's `[data]`. Rows in memory are written to `file`.
    pub(crate) fn in_a_file(&self, file: &Path) -> Result<Map<String, Value>> {
        let paths = match &self.source {
            Source::Files { paths, .. } => paths.clone(),
            Source::Rows(rows) => {
                write(rows, file)?;
                vec![file.to_owned()]
            }
        };
        let mut settings = self.settings.clone();
        settings
            .insert("path".into(), paths.iter().map(|path| text(path)).collect::<Result<Vec<_>>>()?.into());
        Ok(settings)
    }
}

impl From<&str> for Dataset {
    fn from(path: &str) -> Dataset {
        Path::new(path).into()
    }
}

impl From<PathBuf> for Dataset {
    fn from(path: PathBuf) -> Dataset {
        path.as_path().into()
    }
}

impl From<&Path> for Dataset {
    fn from(path: &Path) -> Dataset {
        match is_text(path) {
            true => Dataset::text_files([path.to_owned()]),
            false => Dataset::row_files([path.to_owned()]),
        }
    }
}

impl From<Vec<Value>> for Dataset {
    fn from(rows: Vec<Value>) -> Dataset {
        Dataset::of_rows(rows)
    }
}

/// By its name; a folder by those of the files in it.
fn is_text(path: &Path) -> bool {
    const ROWS: [&str; 6] = ["json", "jsonl", "ndjson", "csv", "tsv", "parquet"];
    let has_rows = |path: &Path| {
        let unpacked = path.with_extension("");
        let packed = path.extension().is_some_and(|end| end == "gz" || end == "zst");
        let end = if packed { unpacked.extension() } else { path.extension() };
        end.and_then(OsStr::to_str).is_some_and(|end| ROWS.contains(&end.to_ascii_lowercase().as_str()))
    };
    match fs::read_dir(path) {
        Ok(entries) => !entries.flatten().any(|entry| has_rows(&entry.path())),
        Err(_) => !has_rows(path),
    }
}

/// As a job has paths.
pub(crate) fn text(path: &Path) -> Result<String> {
    let name = path.to_str().map(str::to_owned);
    name.ok_or_else(|| Error::Input(format!("{} has a name that is not UTF-8; rename it", path.display())))
}

fn write(rows: &[Value], file: &Path) -> Result<()> {
    if let Some(at) = rows.iter().position(|row| !row.is_object()) {
        return Err(Error::Input(format!("row {} is no object of fields", at + 1)));
    }
    let written = || {
        fs::create_dir_all(file.parent().unwrap_or(Path::new(".")))?;
        let mut out = BufWriter::new(fs::File::create(file)?);
        rows.iter().try_for_each(|row| writeln!(out, "{row}"))?;
        out.flush()
    };
    written().map_err(|e| Error::Environment(format!("cannot write rows to {}: {e}", file.display())))
}

/// What is known of data before anything is trained on them.
#[derive(Clone, Debug, PartialEq)]
pub struct Quality {
    /// Documents of text, or rows of which something is learnt.
    pub documents: u64,
    /// To train on.
    pub tokens: u64,
    /// To train on.
    pub sequences: u64,
    /// Held out.
    pub held_out: u64,
    /// Of rows: how many are empty, bad, cut, there twice, without loss.
    pub rows: Option<Report>,
    /// What is to know of them, a line each.
    pub notes: Vec<String>,
}

impl Quality {
    pub(crate) fn of(cache: &TokenCache, notes: Vec<String>) -> Quality {
        let stats = cache.stats();
        Quality {
            documents: stats.documents,
            tokens: stats.train_tokens,
            sequences: stats.train_windows,
            held_out: stats.validation_windows,
            rows: cache.meta().rows.as_ref().map(|rows| rows.report.clone()),
            notes,
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // in a test an unwrap is an assertion
mod tests {
    use super::*;

    #[test]
    fn a_name_says_whether_a_file_has_rows() {
        for rows in ["a.jsonl", "a.CSV", "b/a.json.gz", "a.parquet", "a.tsv.zst"] {
            assert!(Dataset::from(rows).has_rows(), "{rows}");
        }
        for text in ["a.txt", "a.md", "notes", "a.txt.gz"] {
            assert!(!Dataset::from(text).has_rows(), "{text}");
        }
        let dir = tempfile::tempdir().unwrap();
        assert!(!Dataset::from(dir.path()).has_rows());
        fs::write(dir.path().join("a.csv"), "text\na\n").unwrap();
        assert!(Dataset::from(dir.path()).has_rows());
    }

    #[test]
    fn rows_in_memory_become_a_file_that_the_job_names() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("data/rows.jsonl");
        let data = Dataset::of_texts(["a\nb".to_owned()]).field("text", "body").unwrap();
        let settings = data.field("prompt", "question").unwrap().in_a_file(&file).unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), "{\"text\":\"a\\nb\"}\n");
        let wanted = json!({"text_field": "body", "fields": {"prompt": "question"}, "path": [file]});
        assert_eq!(Value::Object(settings), wanted);
        let wrong = Dataset::of_rows(vec![json!({}), json!("text")]).in_a_file(&file).unwrap_err();
        assert!(wrong.to_string().contains("row 2"), "{wrong}");
        assert!(Dataset::from("a.csv").field("promt", "x").unwrap_err().to_string().contains("prompt"));
    }
}
