//! From files to batches: reading, cleaning, tokenising, packing, and the order in which windows of text or rows are trained on.
//!
//! The agent finds the `DataFiles` and builds a `TokenCache` once per data set, before the ranks start; every rank opens it and computes from `Order`
//! alone which windows are its own. Nothing here knows of tensors or of the cluster.

mod added;
mod array;
mod blocks;
mod build;
mod cache;
pub mod chat;
mod chunks;
mod clean;
mod counts;
mod coverage;
mod documents;
mod error;
mod files;
mod formats;
mod json;
mod left_out;
pub mod model_dir;
mod near;
mod note;
mod order;
mod parquet;
mod permutation;
mod prefix_space;
mod rows;
mod separator;
mod split;
mod splits;
mod stream;
mod survey;
mod table;
mod text;
mod tokenise;
mod tokenizer;
mod unpack;
mod weights;
mod windows;

pub use cache::{Meta, RowMeta, TokenCache};
pub use clean::{Pipeline, Processor, TextCleaning};
pub use counts::Counts;
pub use coverage::Coverage;
pub use error::DataError;
pub use files::DataFiles;
pub use note::Note;
pub use order::{Cursor, Order, Rest, evaluation_part};
pub use rows::{Report, holds_rows};
pub use stream::Stream;
pub use tokenizer::{END_OF_TEXT, Encoded, decode, guarded};
pub use windows::{Item, Windows};
