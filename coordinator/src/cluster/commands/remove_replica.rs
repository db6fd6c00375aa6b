//! A coordinator leaves the cluster for ever. Travels in the entry that takes it out of raft.

use crate::cluster::members::{REVOKED_MAX, Standing};
use crate::cluster::{Answer, Context, Effect, State};
use fleet_common::ids::ReplicaId;
use fleet_common::protocol::Member;
use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RemoveReplica {
    pub replica: ReplicaId,
}

impl RemoveReplica {
    pub(super) fn apply(self, state: &mut State, context: &mut Context) -> Answer {
        let member = Member::Coordinator(self.replica);
        if state.revoked.contains(&member) {
            return Answer::Done;
        }
        let Some(record) = state.replicas.get(&self.replica) else {
            return Answer::not_found(format!(
                "{} is not a coordinator of this cluster; `fleet coordinators ls` lists them",
                self.replica
            ));
        };
        if record.standing == Standing::Voter && state.voters() == 1 {
            return Answer::invalid(format!(
                "{} is the only coordinator that votes; add another one first",
                self.replica
            ));
        }
        if state.revoked.len() >= REVOKED_MAX {
            return Answer::invalid(format!(
                "{REVOKED_MAX} members were cut off already, which is the limit"
            ));
        }
        state.replicas.remove(&self.replica);
        state.admitted.remove(&member);
        state.revoked.insert(member);
        // It may have been the last one to wait for.
        state.move_when_ready();
        context.effects.push(Effect::Members);
        Answer::Done
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::commands::Change;
    use crate::cluster::tests::{Script, replica, why};

    fn remove(id: u64) -> Change {
        Change::RemoveReplica(RemoveReplica { replica: ReplicaId(id) })
    }

    #[test]
    fn who_left_never_comes_back_under_the_same_id() {
        let mut script = Script::with_replicas(3);
        assert_eq!(script.run(remove(2)), Answer::Done);
        assert_eq!(script.run(remove(2)), Answer::Done, "asking twice does it once");
        assert!(why(script.run(Change::RegisterReplica(replica(2)))).contains("new token"));
        assert_eq!(script.state.replicas().len(), 2);
    }

    #[test]
    fn the_last_voter_stays() {
        let mut script = Script::with_replicas(1);
        assert!(why(script.run(remove(1))).contains("only coordinator that votes"));
        assert!(why(script.run(remove(7))).contains("replica-7 is not a coordinator"));
    }
}
