//! An agent has greeted: what its node offers from now on.

use crate::cluster::members::{LABELS_MAX, NAME_MAX, clean_name, clip, is_label};
use crate::cluster::{Answer, Context, Effect, State};
use fleet_common::ids::NodeId;
use fleet_common::protocol::Member;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Slots of one node: far above any machine, low enough that sums do not overflow.
pub const SLOTS_MAX: u32 = 4_096;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DescribeNode {
    pub node: NodeId,
    pub name: String,
    pub slots: u32,
    pub device: String,
    pub version: String,
    pub labels: BTreeMap<String, String>,
    pub host: String,
    pub process: u64,
}

impl DescribeNode {
    pub(super) fn apply(self, state: &mut State, context: &mut Context) -> Answer {
        if self.slots == 0 || self.slots > SLOTS_MAX {
            return Answer::invalid(format!("a node offers 1 to {SLOTS_MAX} slots, not {}", self.slots));
        }
        if self.labels.len() > LABELS_MAX || self.labels.iter().any(|(name, value)| !is_label(name, value)) {
            return Answer::invalid(format!(
                "a node has at most {LABELS_MAX} labels like `gpu=h200` of at most {NAME_MAX} characters each"
            ));
        }
        let Some(node) = state.nodes.get_mut(&self.node) else {
            return Answer::not_found(format!(
                "{} is not registered in this cluster; join again with a token",
                self.node
            ));
        };
        node.name = clean_name(&self.name, Member::Worker(self.node));
        node.slots = self.slots;
        node.device = clip(&self.device);
        node.version = clip(&self.version);
        node.labels = self.labels;
        node.host = clip(&self.host);
        node.process = self.process;
        node.lost = false;
        context.effects.extend([Effect::Plan, Effect::Node(self.node)]);
        Answer::Done
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::commands::Change;
    use crate::cluster::tests::{Script, why};

    #[test]
    fn a_node_that_never_joined_is_refused() {
        let mut script = Script::new();
        let describe = DescribeNode {
            node: NodeId(9),
            name: "n".into(),
            slots: 4,
            device: "cpu".into(),
            version: "1".into(),
            labels: BTreeMap::new(),
            host: "h".into(),
            process: 1,
        };
        assert!(why(script.run(Change::DescribeNode(describe))).contains("node-9 is not registered"));
    }

    #[test]
    fn a_greeting_brings_a_lost_node_back() {
        let mut script = Script::with_node(4);
        script.lose_node();
        assert!(script.state.nodes()[&NodeId(1)].lost);
        script.describe(8);
        assert!(!script.state.nodes()[&NodeId(1)].lost);
        assert_eq!(script.state.nodes()[&NodeId(1)].slots, 8);
    }
}
