//! A node has removed checkpoints that newer ones have replaced, or cannot, or has not got them.

use crate::cluster::{Answer, Context, State};
use fleet_common::ids::NodeId;
use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SettleSuperseded {
    pub node: NodeId,
    /// Hashes of their manifests, in hex.
    pub manifests: Vec<String>,
}

impl SettleSuperseded {
    pub(super) fn apply(self, state: &mut State, _context: &mut Context) -> Answer {
        state.settle_superseded(self.node, &self.manifests);
        Answer::Done
    }
}
