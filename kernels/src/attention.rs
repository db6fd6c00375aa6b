//! Skeleton.
pub use crate::reference::{attention, attention_backward, attention_decode};
