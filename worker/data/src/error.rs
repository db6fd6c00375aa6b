//! What can be wrong with data, each in one line that names the thing and the cure.

use fleet_common::exit::Fault;
use std::io;
use std::path::PathBuf;

#[derive(Debug, thiserror::Error)]
pub enum DataError {
    #[error("the data path {0} does not exist; relative paths start where `fleet` was started")]
    Missing(PathBuf),
    #[error("cannot read {path}: {source}")]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("`{glob}` in data.{key} is not a glob: {what}")]
    Glob { key: &'static str, glob: String, what: String },
    #[error("{path} is a link to {target}, which is not there; fetch it, or remove the link")]
    Nowhere { path: PathBuf, target: PathBuf },
    #[error(
        "{0} is no file and no folder but a FIFO, a socket or a device; write what it gives to a file first"
    )]
    Special(PathBuf),
    #[error("{0}")]
    Empty(String),
    /// Known by its first bytes.
    #[error("{path} is {name}; {cure}, or leave it out of data.path, or of its folder with data.exclude")]
    Foreign { path: PathBuf, name: &'static str, cure: &'static str },
    #[error("{path} is not text: {what}")]
    NotText { path: PathBuf, what: String },
    /// Of what is held as a whole.
    #[error("{path} has more than {most} bytes, and {what}")]
    TooLarge { path: PathBuf, most: usize, what: &'static str },
    #[error(
        "{path} is not UTF-8 text: bad byte at offset {offset}; convert it (`iconv -f WINDOWS-1252 -t UTF-8`, if it is older text \
         of Western Europe), or leave it out with data.exclude"
    )]
    NotUtf8 { path: PathBuf, offset: usize },
    /// A row of JSON, CSV or TSV; `line` counts from 1.
    #[error("{path}, line {line}: {what}")]
    Row { path: PathBuf, line: u64, what: String },
    /// A row of instructions; `place` is a line or the number of a row.
    #[error(
        "{path}, {place}: {what}; correct the row, or set data.bad_rows = \"skip\" to leave such rows out"
    )]
    BadRow { path: PathBuf, place: String, what: String },
    /// Rows from which nothing can be learnt.
    #[error("{0}")]
    Rows(String),
    #[error("{0} changed while it was being read; start the job again when it is complete")]
    Changed(PathBuf),
    /// Of a model directory.
    #[error("{path} {what}; restore the file")]
    Settings { path: PathBuf, what: String },
    #[error("{path}: {what}")]
    Model { path: PathBuf, what: String },
    #[error("tokenizer {path}: {what}")]
    Tokenizer { path: PathBuf, what: String },
    #[error("{0}")]
    Vocabulary(String),
    #[error(transparent)]
    Chat(crate::chat::ChatError),
    #[error("{0}")]
    TooLittle(String),
    /// Writing the cache.
    #[error("cannot write the token cache {path}: {source}; make room or choose another output_dir")]
    Write {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the token cache {path} cannot be used: {what}; delete the directory and start again")]
    Cache { path: PathBuf, what: String },
}

impl DataError {
    /// A disk that fails is the environment's; everything else is the input's.
    pub fn fault(&self) -> Fault {
        match self {
            DataError::Write { .. } | DataError::Cache { .. } => Fault::Environment,
            _ => Fault::Input,
        }
    }
}
