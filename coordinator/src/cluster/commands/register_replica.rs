//! A coordinator becomes part of the cluster, at first without a vote. Travels in the entry that makes it a learner.

use crate::cluster::admitted::Membership;
use crate::cluster::members::{REPLICAS_MAX, ReplicaRecord, Standing, clean_name, clip};
use crate::cluster::{Answer, Context, Effect, State};
use fleet_common::protocol::{CoordinatorAddress, Member};
use serde::{Deserialize, Serialize};

/// Bytes of an address: a name of the longest kind, and a port.
const ADDRESS_MAX: usize = 300;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RegisterReplica {
    pub address: CoordinatorAddress,
    pub name: String,
    pub version: String,
    pub level: u32,
}

impl RegisterReplica {
    pub(super) fn apply(self, state: &mut State, context: &mut Context) -> Answer {
        let replica = self.address.replica;
        let member = Member::Coordinator(replica);
        if state.membership(member) != Membership::Known {
            return Answer::forbidden(format!(
                "{replica} is no coordinator that this cluster admitted; join with a new token"
            ));
        }
        if !state.replicas.contains_key(&replica) && state.replicas.len() >= REPLICAS_MAX {
            return Answer::later(format!(
                "the cluster has {REPLICAS_MAX} coordinators, which is its limit; remove one first"
            ));
        }
        if let Some(why) = flaw(&self.address, self.level) {
            return Answer::invalid(why);
        }
        if self.level < state.level() {
            return Answer::invalid(format!(
                "{replica} knows the commands up to level {}, and the cluster uses those up to {}; update it first",
                self.level,
                state.level()
            ));
        }
        // Asked a second time it is described anew and keeps its vote.
        let known = state.replicas.get(&replica);
        let record = ReplicaRecord {
            address: self.address,
            name: clean_name(&self.name, member),
            version: clip(&self.version),
            level: self.level,
            joined_unix_ms: known.map_or(context.unix_ms, |known| known.joined_unix_ms),
            standing: known.map_or(Standing::Learner, |known| known.standing),
        };
        state.replicas.insert(replica, record);
        context.effects.push(Effect::Members);
        Answer::Done
    }
}

/// What is wrong with how a coordinator describes itself.
pub(super) fn flaw(address: &CoordinatorAddress, level: u32) -> Option<String> {
    let wrong =
        |text: &String| text.is_empty() || text.len() > ADDRESS_MAX || text.contains(char::is_control);
    if wrong(&address.client) || wrong(&address.member) {
        return Some(format!("the addresses of {} must be HOST:PORT", address.replica));
    }
    // Nothing could be proposed any more, not even what mends it.
    (level == 0).then(|| format!("{} cannot know no command at all", address.replica))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::commands::{COMMAND_LEVEL, Change, PromoteReplica};
    use crate::cluster::tests::{Script, replica, why};
    use fleet_common::ids::ReplicaId;

    #[test]
    fn one_that_knows_less_than_the_cluster_uses_or_nothing_is_not_taken_in() {
        let mut script = Script::with_replicas(1);
        script.admit_coordinator();
        let register = |level, client: &str| {
            let mut it = replica(2);
            (it.level, it.address.client) = (level, client.to_owned());
            Change::RegisterReplica(it)
        };
        assert!(why(script.run(register(COMMAND_LEVEL - 1, "b:1"))).contains("update it first"));
        assert!(why(script.run(register(0, "b:1"))).contains("no command at all"));
        assert!(why(script.run(register(COMMAND_LEVEL, &"b".repeat(400)))).contains("HOST:PORT"));
        assert!(!script.state.replicas().contains_key(&ReplicaId(2)));
        assert_eq!(script.run(register(COMMAND_LEVEL + 1, "b:1")), Answer::Done);
    }

    #[test]
    fn an_admitted_coordinator_begins_as_a_learner_and_asking_twice_is_once() {
        let mut script = Script::with_replicas(1);
        script.admit_coordinator();
        assert_eq!(script.run(Change::RegisterReplica(replica(2))), Answer::Done);
        assert_eq!(script.state.replicas()[&ReplicaId(2)].standing, Standing::Learner);
        script.run(Change::PromoteReplica(PromoteReplica { replica: ReplicaId(2) }));
        assert_eq!(script.run(Change::RegisterReplica(replica(2))), Answer::Done);
        assert_eq!(script.state.replicas()[&ReplicaId(2)].standing, Standing::Voter);
    }

    #[test]
    fn one_that_never_joined_is_refused() {
        let mut script = Script::with_replicas(1);
        assert!(why(script.run(Change::RegisterReplica(replica(2)))).contains("new token"));
        assert!(why(script.run(Change::RegisterReplica(replica(0)))).contains("new token"));
    }
}
