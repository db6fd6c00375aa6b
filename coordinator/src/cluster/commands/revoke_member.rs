//! A member is cut off for ever: its certificate opens nothing any more. The jobs of a node that is cut off fail.

use crate::cluster::members::REVOKED_MAX;
use crate::cluster::{Answer, Context, Effect, State};
use fleet_common::protocol::Member;
use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RevokeMember {
    pub member: Member,
}

impl RevokeMember {
    pub(super) fn apply(self, state: &mut State, context: &mut Context) -> Answer {
        let member = self.member;
        if state.revoked.contains(&member) {
            return Answer::Done;
        }
        // Any other number may be cut off, also one that was never given out: it is not given out later either.
        if let Member::Coordinator(replica) = member
            && state.replicas.contains_key(&replica)
        {
            return Answer::invalid(format!(
                "{replica} is a coordinator; take it out with `fleet coordinators remove {replica}`"
            ));
        }
        if state.revoked.len() >= REVOKED_MAX {
            return Answer::invalid(format!(
                "{REVOKED_MAX} members were cut off already, which is the limit"
            ));
        }
        if let Member::Worker(node) = member {
            let name = state.node_name(node);
            let message = format!("node {name} was cut off from the cluster");
            state.give_up_node(node, &message, context);
            state.nodes.remove(&node);
            state.superseded.remove(&node);
            context.effects.push(Effect::Node(node));
        }
        if let Member::Client(user) = member {
            state.users.remove(&user);
        }
        state.admitted.remove(&member);
        state.revoked.insert(member);
        context.effects.extend([Effect::Members, Effect::Plan]);
        Answer::Done
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::admitted::Membership;
    use crate::cluster::commands::Change;
    use crate::cluster::tests::{Script, redeem, token, why};
    use fleet_common::ids::{ReplicaId, UserId};
    use fleet_common::protocol::{JobState, Role};

    fn revoke(member: Member) -> Change {
        Change::RevokeMember(RevokeMember { member })
    }

    #[test]
    fn a_node_is_gone_with_its_jobs() {
        let mut script = Script::with_node(4);
        let job = script.submit(2);
        script.assign(job);
        let node = Member::Worker(script.node());
        assert_eq!(script.run(revoke(node)), Answer::Done);
        assert_eq!(script.run(revoke(node)), Answer::Done, "asking twice does it once");
        assert_eq!(script.state.membership(node), Membership::Revoked);
        assert!(script.state.nodes().is_empty());
        let job = &script.state.jobs()[&job];
        assert_eq!(job.state, JobState::Failed);
        assert!(job.error.as_ref().unwrap().message.contains("node box was cut off"));
    }

    #[test]
    fn a_coordinator_is_removed_instead_and_a_stranger_s_number_is_never_given_out() {
        let mut script = Script::with_replicas(1);
        let refusal = why(script.run(revoke(Member::Coordinator(ReplicaId(1)))));
        assert!(refusal.contains("fleet coordinators remove"), "{refusal}");
        for stranger in [1, 2, 77_777_777] {
            assert_eq!(script.run(revoke(Member::Client(UserId(stranger)))), Answer::Done);
        }
        script.run(token("u", Role::Client, 1));
        let member = Member::Client(UserId(3));
        assert_eq!(script.run(redeem("u", "ann")), Answer::Redeemed { member });
    }
}
