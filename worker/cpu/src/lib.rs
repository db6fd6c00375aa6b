//! The CPU executor: a decoder, as `fleet_common::model` describes it, with an explicit forward and backward over flat buffers. It takes its
//! memory once, has a fixed order of sums, and costs a fraction of what autograd does; libtorch's libraries give the products.
//!
//! Legend: b sequences, s tokens of a sequence, t = b s tokens, h hidden, e width of the embedding, q = heads * head_dim, f feed-forward,
//! v vocabulary.

mod attention;
mod block;
mod decode;
mod embedding;
mod head;
mod mlp;
mod network;
mod norm;
pub mod product;
pub mod shim;
mod workers;
mod workspace;

pub use decode::Cache;
pub use head::{Loss, Score};
pub use network::{Batch, Network, Sink, Weights};
pub use product::{Products, Storage};
pub use workers::Workers;
pub use workspace::Workspace;
