//! The training engine: one process per device, a child of the node agent.
//!
//! An executor computes (`fleet_cpu`, `fleet_torch`), `engine` holds weights and optimizer and takes steps with its peers, `trainer` decides what happens when, `agent_link`
//! speaks with the agent. `generate` continues a text from a model directory, `logits` shows what one computes,
//! `eval` how well it predicts.

pub mod agent_link;
pub mod engine;
pub mod error;
pub mod eval;
pub mod generate;
pub mod logits;
pub mod model;
pub mod shim;
mod stored;
#[doc(hidden)]
pub mod testing;
pub mod trainer;
