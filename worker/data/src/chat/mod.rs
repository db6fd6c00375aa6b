//! Chat templates: a conversation as the text on which a model was trained, as transformers' `apply_chat_template` renders it, and where in
//! it the assistant speaks.
//!
//! A template is a program of others, so it has a budget: what it computes, how deep it calls, what it writes. Nothing here reads a clock;
//! `strftime_now` writes the time that the caller gives.

mod builtin;
mod conversation;
mod dir;
mod error;
mod generation;
mod json;
mod left_out;
mod python;
mod spans;
mod strftime;
mod template;
mod tokens;
mod turns;

pub(crate) use builtin::names as built_in;
pub use conversation::Conversation;
pub(crate) use conversation::REASONING;
pub use dir::{CHAT_TEMPLATE, Templates};
pub use error::ChatError;
pub(crate) use left_out::LeftOut;
pub use template::{Ending, Rendered, Template};
pub use tokens::Tokens;
pub use turns::{TurnEnd, end_token};
