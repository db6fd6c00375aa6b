//! Models on disk: what a directory describes, its weights in the flat buffer, and fresh ones.

pub mod config;
pub mod init;
pub mod weights;

use fleet_common::job::LlamaConfig;
use fleet_common::model::{Family, Layout};
use fleet_cpu::Network;

/// The model of a job, for sequences of at most `positions` tokens.
pub fn network(config: &LlamaConfig, positions: usize) -> Network {
    let json = config::config_json(config, &Default::default());
    let (family, decoder) =
        Family::of_config(&json).expect("a job's model was checked when the job was read");
    let layout = Layout::new(&decoder, family);
    Network::new(decoder, layout, positions)
}
