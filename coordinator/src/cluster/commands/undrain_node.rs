//! A drained node may get work again.

use crate::cluster::{Answer, Context, Effect, State};
use fleet_common::ids::NodeId;
use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct UndrainNode {
    pub node: NodeId,
}

impl UndrainNode {
    pub(super) fn apply(self, state: &mut State, context: &mut Context) -> Answer {
        let Some(node) = state.nodes.get_mut(&self.node) else {
            return Answer::not_found(format!("there is no {}; `fleet nodes` lists them", self.node));
        };
        node.drained = false;
        context.effects.push(Effect::Plan);
        Answer::Done
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::commands::{Change, DrainNode};
    use crate::cluster::tests::{Script, why};

    #[test]
    fn it_undoes_a_drain_and_nothing_else() {
        let mut script = Script::with_node(1);
        let node = script.node();
        script.run(Change::DrainNode(DrainNode { node, now: true }));
        assert_eq!(script.run(Change::UndrainNode(UndrainNode { node })), Answer::Done);
        assert!(!script.state.nodes()[&node].drained);
        assert!(why(script.run(Change::UndrainNode(UndrainNode { node: NodeId(2) }))).contains("node-2"));
    }
}
