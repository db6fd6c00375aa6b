//! The CA that members have moved to is the only one from now on. Tokens of before are of no use: they name the old one.

use crate::cluster::{Answer, Context, Effect, State};
use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FinishCa {
    /// Also if workers or clients have not moved, which join again then.
    pub force: bool,
}

/// Members that are named.
const NAMED_MAX: usize = 5;

impl FinishCa {
    pub(super) fn apply(self, state: &mut State, context: &mut Context) -> Answer {
        let missing = state.without_next_key();
        let Some(next) = &state.cas.next else {
            return Answer::invalid("the CA is not being replaced; `coordinator rotate-ca` begins that");
        };
        if !next.moving || !missing.is_empty() {
            let missing: Vec<String> = missing.iter().map(ToString::to_string).collect();
            return Answer::invalid(format!(
                "{} has no key of the new CA yet; bring it back, or take it out with `fleet coordinators remove`",
                missing.join(", ")
            ));
        }
        if !self.force {
            let behind: Vec<String> = state.not_moved().map(|member| member.to_string()).collect();
            if let Some(first) = behind.get(..behind.len().min(NAMED_MAX)).filter(|first| !first.is_empty()) {
                let more = if behind.len() > NAMED_MAX { ", ..." } else { "" };
                return Answer::invalid(format!(
                    "{} of the workers and clients have not moved to the new CA: {}{more}; connect them once, revoke those that are gone, or add --force, after which they join again with a token",
                    behind.len(),
                    first.join(", ")
                ));
            }
        }
        let new = next.der.clone();
        state.cas.previous = Some(std::mem::replace(&mut state.cas.der, new));
        state.cas.number += 1;
        state.cas.next = None;
        state.tokens.clear();
        context.effects.push(Effect::Members);
        Answer::Done
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::commands::{Change, HoldCa, IntroduceCa, RemoveReplica, ShowCa};
    use crate::cluster::tests::{Script, redeem, token, why};
    use fleet_common::ids::{ReplicaId, UserId};
    use fleet_common::net::Authorities;
    use fleet_common::protocol::{Member, Role};

    const OLD: &[u8] = &[1];
    const NEW: &[u8] = &[2];

    fn begun() -> Script {
        let mut script = Script::with_replicas(3);
        script.state = script.state.trusting(OLD.to_vec(), Default::default());
        script.run(token("u", Role::Client, 9));
        script.run(redeem("u", "ann"));
        script
    }

    fn introduce(der: &[u8], holder: u64) -> Change {
        Change::IntroduceCa(IntroduceCa { der: der.to_vec(), holder: ReplicaId(holder) })
    }

    fn hold(replica: u64, der: &[u8]) -> Change {
        Change::HoldCa(HoldCa { replica: ReplicaId(replica), der: der.to_vec() })
    }

    fn finish(force: bool) -> Change {
        Change::FinishCa(FinishCa { force })
    }

    fn trusted(script: &Script) -> Authorities {
        script.state.cas().trusted().unwrap()
    }

    #[test]
    fn members_move_when_every_coordinator_has_the_key_and_the_old_ca_ends_when_they_have() {
        let mut script = begun();
        assert!(why(script.run(finish(true))).contains("not being replaced"));
        assert_eq!(script.run(introduce(NEW, 2)), Answer::Done);
        script.run(hold(1, NEW));
        script.run(hold(3, OLD));
        assert_eq!(trusted(&script), Authorities::one(OLD.to_vec()), "replica-3 has none");
        assert!(script.state.cas().accepted().unwrap().iter().any(|der| der == NEW));
        assert!(why(script.run(finish(true))).contains("replica-3 has no key"));
        script.run(hold(3, NEW));
        assert_eq!(trusted(&script), Authorities::new(NEW.to_vec(), [OLD.to_vec()]));
        assert!(why(script.run(introduce(&[3], 1))).contains("--finish"));

        let refusal = why(script.run(finish(false)));
        assert!(refusal.contains("1 of the workers and clients") && refusal.contains("user-1"), "{refusal}");
        script.run(token("late", Role::Worker, 9));
        let user = Member::Client(UserId(1));
        script.run(Change::ShowCa(ShowCa { member: user, ca: 2 }));
        assert_eq!(script.run(finish(false)), Answer::Done);
        assert_eq!(trusted(&script), Authorities::one(NEW.to_vec()));
        assert!(script.state.tokens().is_empty(), "they name the old CA");
        script.run(token("new", Role::Worker, 9));
        assert_eq!(script.state.not_moved().count(), 0);
    }

    #[test]
    fn a_coordinator_that_is_lost_in_between_strands_nobody() {
        // The only one that has the key is gone: another CA takes its place.
        let mut script = begun();
        script.run(introduce(NEW, 3));
        script.run(Change::RemoveReplica(RemoveReplica { replica: ReplicaId(3) }));
        assert_eq!(script.state.without_next_key(), [ReplicaId(1), ReplicaId(2)]);
        assert_eq!(script.run(introduce(&[9], 1)), Answer::Done);
        script.run(hold(2, NEW));
        assert_eq!(script.state.without_next_key(), [ReplicaId(2)], "that was the other one");
        // The only one that has not is gone: the others go on.
        script.run(Change::RemoveReplica(RemoveReplica { replica: ReplicaId(2) }));
        assert_eq!(trusted(&script).issuing(), [9]);
        assert_eq!(script.run(finish(true)), Answer::Done);
    }
}
