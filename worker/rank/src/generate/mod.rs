//! Text from a model directory.

mod model;
mod prompt;
mod sampler;
mod stop;
mod text;
mod writing;

pub use model::TextModel;
pub use prompt::{Ask, Chat, Prompt};
pub use sampler::Sampling;
pub use text::TextStream;

/// How to continue a text.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    pub max_new_tokens: usize,
    pub sampling: Sampling,
    /// The text ends before the first of these.
    pub stop: Vec<String>,
}

impl Default for Settings {
    fn default() -> Settings {
        Settings { max_new_tokens: 128, sampling: Sampling::default(), stop: Vec::new() }
    }
}

/// Why a text ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum End {
    EndOfText,
    StopString,
    MaxNewTokens,
    /// The model was made for no more positions.
    Context,
    /// Whoever read it has gone.
    Unread,
}

/// What becomes of a text as it is written.
pub enum Said<'a> {
    /// More of it, whole UTF-8.
    Piece(&'a str),
    Whole(Generated),
}

/// What was generated.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Generated {
    pub text: String,
    pub prompt_tokens: usize,
    /// Those of a stop string included.
    pub new_tokens: usize,
    pub end: End,
    pub tokens_per_s: f64,
    /// What the user should know.
    #[serde(skip)]
    pub notes: Vec<String>,
}
