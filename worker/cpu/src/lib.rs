//! The CPU executor: a decoder, as `fleet_common::model` describes it, with an explicit forward and backward over flat buffers. It takes its
//! memory once, has a fixed order of sums, and costs a fraction of what autograd does; `product` says what computes the products.
//!
//! Legend: b sequences, s tokens of a sequence, t = b s tokens, h hidden, e width of the embedding, q = heads * head_dim, f feed-forward,
//! v vocabulary.

mod adapter;
mod attention;
mod block;
mod decode;
mod dora;
mod embedding;
mod executor;
mod head;
mod mlp;
mod network;
mod norm;
mod packed;
pub mod product;
pub mod shim;
mod workspace;

pub use decode::Cache;
pub use executor::CpuExecutor;
pub use network::Network;
pub use product::{Products, Storage};
pub use workspace::{Workspace, activation_bytes};

use fleet_learn::Workers;
use std::sync::Arc;

/// The threads of a rank. Products are cut here, not inside the libraries: one pool, one order.
pub fn workers(threads: u32) -> fleet_learn::Result<Arc<Workers>> {
    let failed = |e| fleet_learn::Error::Environment(format!("cannot start {threads} threads: {e}"));
    Workers::new(threads, || shim::set_threads(1)).map(Arc::new).map_err(failed)
}
