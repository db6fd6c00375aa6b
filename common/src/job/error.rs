//! Why a job file was refused: one line that names the place, the key and the cure.

use super::value::Place;
use std::io;
use std::path::PathBuf;

/// The job file, or a `--set` beside it, cannot become a valid job. Exit code 2.
#[derive(Debug, thiserror::Error)]
pub enum JobFileError {
    #[error("cannot read the job file `{}`", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("`{}` is larger than {limit} bytes; a job file is a few lines of settings", path.display())]
    TooLarge { path: PathBuf, limit: u64 },
    #[error("`{}` is not a job file: its name must end in .toml, .yaml, .yml, .json or .jsonc", path.display())]
    Extension { path: PathBuf },
    #[error("{place}: {message}")]
    Syntax { place: Place, message: String },
    #[error("`--set {text}` is not of the form key=value, such as --set learning_rate=1e-3")]
    Set { text: String },
    #[error("{place}: unknown key `{key}`{}", did_you_mean(suggestion))]
    UnknownKey { place: Place, key: String, suggestion: Option<String> },
    #[error("{place}: `{key}` is given twice")]
    Twice { place: Place, key: String },
    #[error("{place}: `{key}` is {given}; {wanted} is wanted")]
    Value { place: Place, key: String, given: String, wanted: String },
    #[error(
        "{place}: `{key}` is {given}, but `{other}` ({other_place}), another name of it, is {other_given}; keep one"
    )]
    Aliases {
        place: Place,
        key: String,
        given: String,
        other_place: Place,
        other: String,
        other_given: String,
    },
    #[error("{place}: `{key}` is not in this version of fleet: {instead}")]
    Later { place: Place, key: String, instead: String },
    #[error("{place}: `{key}` is a key of other tools: {instead}")]
    Elsewhere { place: Place, key: String, instead: String },
    /// Fields that are fine alone and not together, or a value that this version cannot train with.
    #[error("{place}: {message}")]
    Refused { place: Place, message: String },
    #[error("{file}: `{key}` is missing: {cure}")]
    Missing { file: Place, key: String, cure: String },
}

fn did_you_mean(suggestion: &Option<String>) -> String {
    suggestion.as_ref().map_or(String::new(), |s| format!("; did you mean `{s}`?"))
}

/// Something that the user should know and that does not stop the job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Warning(pub String);

impl std::fmt::Display for Warning {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}
