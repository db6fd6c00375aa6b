//! A coordinator that has caught up gets its vote. Travels in the entry that makes it a voter.

use crate::cluster::members::Standing;
use crate::cluster::{Answer, Context, Effect, State};
use fleet_common::ids::ReplicaId;
use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PromoteReplica {
    pub replica: ReplicaId,
}

impl PromoteReplica {
    pub(super) fn apply(self, state: &mut State, context: &mut Context) -> Answer {
        let Some(record) = state.replicas.get_mut(&self.replica) else {
            return Answer::not_found(format!("{} is not a coordinator of this cluster", self.replica));
        };
        record.standing = Standing::Voter;
        context.effects.push(Effect::Members);
        Answer::Done
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::commands::Change;
    use crate::cluster::tests::{Script, replica, why};

    #[test]
    fn a_learner_becomes_a_voter_and_a_stranger_does_not() {
        let mut script = Script::with_replicas(1);
        script.admit_coordinator();
        script.run(Change::RegisterReplica(replica(2)));
        let promote = |id| Change::PromoteReplica(PromoteReplica { replica: ReplicaId(id) });
        assert_eq!(script.run(promote(2)), Answer::Done);
        assert_eq!(script.state.voters(), 2);
        assert!(why(script.run(promote(3))).contains("replica-3"));
    }
}
