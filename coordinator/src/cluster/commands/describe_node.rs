//! An agent has greeted: what its node offers from now on, and which process speaks for it.
//!
//! A part of a gang belongs to the process of the worker that the node had when it was placed there: only that one is told to start it.
//! Another process takes it over only if it has the records of the earlier one, and so can say what that one started. Otherwise nobody
//! knows what was started, and the part is over.

use crate::cluster::members::{FORMER_MAX, LABELS_MAX, NAME_MAX, clean_name, clip, is_label};
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
    pub checkpoint_port: u16,
    pub process: u64,
    /// The earlier processes whose records this one has.
    pub earlier: Vec<u64>,
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
        if node.former.contains(&self.process) {
            return Answer::forbidden(format!(
                "another worker speaks for {} since; every worker joins with a data directory of its own, never with a copy",
                self.node
            ));
        }
        let heir = node.process == self.process || self.earlier.contains(&node.process);
        node.name = clean_name(&self.name, Member::Worker(self.node));
        node.slots = self.slots;
        node.device = clip(&self.device);
        node.version = clip(&self.version);
        node.labels = self.labels;
        node.host = clip(&self.host);
        node.checkpoint_port = self.checkpoint_port;
        if ![0, self.process].contains(&node.process) {
            node.former.push_back(node.process);
            node.former.drain(..node.former.len().saturating_sub(FORMER_MAX));
        }
        node.process = self.process;
        node.lost = false;
        let name = node.name.clone();
        context.effects.extend([Effect::Plan, Effect::Node(self.node)]);
        if !heir {
            state.give_up_node(self.node, &unknown_ranks(&name), context);
        }
        Answer::Done
    }
}

/// Why the parts of an earlier process are over of which the present one has no records.
fn unknown_ranks(name: &str) -> String {
    format!(
        "agent restarted: the worker on {name} came back without its records, so nobody knows which ranks it had started; submit the job again"
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::commands::Change;
    use crate::cluster::tests::{Script, describe, stopped, why};
    use fleet_common::ids::JobId;
    use fleet_common::protocol::{JobState, ToAgent};

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
            checkpoint_port: 0,
            process: 1,
            earlier: vec![],
        };
        assert!(why(script.run(Change::DescribeNode(describe))).contains("node-9 is not registered"));
    }

    /// Process `process` greets for node 1, with the records of these earlier ones.
    fn greet(script: &mut Script, process: u64, earlier: &[u64]) -> Answer {
        let Change::DescribeNode(described) = describe(NodeId(1), "box", 4, &[]) else { unreachable!() };
        let described = DescribeNode { process, earlier: earlier.to_vec(), ..described };
        script.run(Change::DescribeNode(described))
    }

    /// A job of two ranks, one of them on node 1, whose worker is process 1. Nothing was heard of it.
    fn placed() -> (Script, JobId) {
        let mut script = Script::with_nodes(&[4, 4]);
        let job = script.submit(2);
        script.place(job, &[(1, 1), (2, 1)]);
        (script, job)
    }

    #[test]
    fn a_process_that_cannot_say_what_an_earlier_one_started_gets_none_of_it() {
        let (mut script, job) = placed();
        assert_eq!(greet(&mut script, 2, &[]), Answer::Done);
        assert!(script.state.orders(NodeId(1)).is_empty(), "nobody knows whether it was started");
        let orders = script.state.orders(NodeId(2));
        assert!(
            matches!(orders[1], ToAgent::StopGang { now: false, .. }),
            "the other part is stopped: {orders:?}"
        );
        script.tell(job, 2, 1, vec![stopped(0)]);
        let error = script.state.jobs()[&job].error.clone().unwrap();
        assert!(error.message.contains("box came back without its records"), "{}", error.message);
        assert_eq!(script.state.jobs()[&job].state, JobState::Failed);
    }

    #[test]
    fn a_process_with_the_records_of_the_last_one_takes_its_gangs_over() {
        let (mut script, job) = placed();
        assert_eq!(greet(&mut script, 3, &[1, 2]), Answer::Done);
        assert!(matches!(&script.state.orders(NodeId(1))[..], [ToAgent::StartGang(gang)] if gang.job == job));
        // The next one must have the records of that one.
        assert_eq!(greet(&mut script, 4, &[1, 2]), Answer::Done);
        assert!(script.state.orders(NodeId(1)).is_empty());
    }

    #[test]
    fn a_word_of_a_process_that_was_followed_comes_too_late() {
        let (mut script, job) = placed();
        assert_eq!(greet(&mut script, 2, &[1]), Answer::Done);
        assert!(why(greet(&mut script, 1, &[])).contains("another worker speaks for node-1"));
        assert_eq!(script.state.nodes()[&NodeId(1)].process, 2);
        assert!(matches!(&script.state.orders(NodeId(1))[..], [ToAgent::StartGang(gang)] if gang.job == job));
        assert_eq!(greet(&mut script, 2, &[]), Answer::Done, "the same one greets again");
        assert_eq!(script.state.orders(NodeId(1)).len(), 1);
        for process in 3..100 {
            greet(&mut script, process, &[process - 1]);
        }
        assert_eq!(script.state.nodes()[&NodeId(1)].former.len(), FORMER_MAX);
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
