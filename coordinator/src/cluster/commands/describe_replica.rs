//! A coordinator has started and says where it is reached and what it knows.

use super::register_replica::flaw;
use crate::cluster::members::clip;
use crate::cluster::{Answer, Context, Effect, State};
use fleet_common::protocol::CoordinatorAddress;
use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DescribeReplica {
    pub address: CoordinatorAddress,
    pub version: String,
    pub level: u32,
}

impl DescribeReplica {
    pub(super) fn apply(self, state: &mut State, context: &mut Context) -> Answer {
        if let Some(why) = flaw(&self.address, self.level) {
            return Answer::invalid(why);
        }
        let Some(record) = state.replicas.get_mut(&self.address.replica) else {
            return Answer::not_found(format!(
                "{} is not a coordinator of this cluster",
                self.address.replica
            ));
        };
        record.address = self.address;
        record.version = clip(&self.version);
        record.level = self.level;
        context.effects.push(Effect::Members);
        Answer::Done
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::commands::{COMMAND_LEVEL, Change};
    use crate::cluster::tests::{Script, address, why};

    #[test]
    fn the_cluster_knows_only_what_its_oldest_coordinator_knows() {
        let mut script = Script::with_replicas(3);
        assert_eq!(script.state.level(), COMMAND_LEVEL);
        let describe = |id, level| {
            Change::DescribeReplica(DescribeReplica { address: address(id), version: "0".into(), level })
        };
        script.run(describe(2, COMMAND_LEVEL - 1));
        assert_eq!(script.state.level(), COMMAND_LEVEL - 1);
        script.run(describe(2, COMMAND_LEVEL));
        assert_eq!(script.state.level(), COMMAND_LEVEL);
        assert!(why(script.run(describe(9, 1))).contains("replica-9"));
    }
}
