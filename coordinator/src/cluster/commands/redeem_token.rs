//! A token is used to join. This decides the joiner's id, whatever its role; a worker or a client is a member with it, a coordinator
//! when it is registered.

use crate::cluster::admitted::COORDINATORS_MAX;
use crate::cluster::members::{NODES_MAX, NodeRecord, USERS_MAX, UserRecord, clean_name};
use crate::cluster::{Answer, Context, Effect, State};
use fleet_common::ids::{NodeId, ReplicaId, UserId};
use fleet_common::net::KeyHash;
use fleet_common::protocol::{Member, Role, UNLIMITED_USES};
use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RedeemToken {
    pub id: String,
    pub secret_sha256: [u8; 32],
    /// The joiner's wish.
    pub name: String,
    /// Of the joiner's key, by which it is known from then on.
    pub key: KeyHash,
}

impl RedeemToken {
    pub(super) fn apply(self, state: &mut State, context: &mut Context) -> Answer {
        let token = match state.tokens.get_mut(&self.id) {
            Some(token) if token.secret_sha256 == self.secret_sha256 => token,
            _ => {
                return Answer::forbidden(
                    "this token is not known here: it was used up, has expired, or is not of this cluster; create a new one",
                );
            }
        };
        if token.expires_unix_ms <= context.unix_ms {
            return Answer::forbidden("this token has expired; create a new one");
        }
        if token.uses_left == 0 {
            return Answer::forbidden("this token has been used up; create a new one");
        }
        let full = match token.role {
            Role::Worker => (state.nodes.len() >= NODES_MAX).then(|| format!("{NODES_MAX} nodes")),
            Role::Client | Role::Admin => {
                (state.users.len() >= USERS_MAX).then(|| format!("{USERS_MAX} clients"))
            }
            Role::Coordinator => {
                let known = |member: &&Member| matches!(member, Member::Coordinator(_));
                (state.admitted.keys().filter(known).count() >= COORDINATORS_MAX)
                    .then(|| format!("admitted {COORDINATORS_MAX} coordinators"))
            }
        };
        if let Some(full) = full {
            return Answer::later(format!("the cluster has {full}, which is its limit; revoke some"));
        }
        if token.uses_left != UNLIMITED_USES {
            token.uses_left -= 1;
        }
        let role = token.role;
        let member = state.next_member(role);
        let name = clean_name(&self.name, member);
        match member {
            Member::Coordinator(_) => {}
            Member::Worker(node) => {
                state.nodes.insert(node, NodeRecord::joined(name, context.unix_ms));
            }
            Member::Client(user) => {
                let admin = role == Role::Admin;
                state.users.insert(user, UserRecord { name, admin, joined_unix_ms: context.unix_ms });
            }
        }
        state.admit(member, self.key);
        context.effects.push(Effect::Admitted(member));
        Answer::Redeemed { member }
    }
}

impl State {
    /// A number that nobody had, and that nobody cut off in advance.
    fn next_member(&mut self, role: Role) -> Member {
        loop {
            let member = match role {
                Role::Coordinator => {
                    self.last_replica += 1;
                    Member::Coordinator(ReplicaId(self.last_replica))
                }
                Role::Worker => {
                    self.last_node += 1;
                    Member::Worker(NodeId(self.last_node))
                }
                Role::Client | Role::Admin => {
                    self.last_user += 1;
                    Member::Client(UserId(self.last_user))
                }
            };
            if !self.revoked.contains(&member) {
                return member;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::commands::Change;
    use crate::cluster::tests::{Script, redeem, token, why};

    #[test]
    fn each_use_makes_a_member_until_none_is_left() {
        for (role, members) in [
            (Role::Worker, [Member::Worker(NodeId(1)), Member::Worker(NodeId(2))]),
            (Role::Client, [Member::Client(UserId(1)), Member::Client(UserId(2))]),
            (Role::Admin, [Member::Client(UserId(1)), Member::Client(UserId(2))]),
            (Role::Coordinator, [Member::Coordinator(ReplicaId(1)), Member::Coordinator(ReplicaId(2))]),
        ] {
            let mut script = Script::new();
            script.run(token("t", role, 2));
            for member in members {
                assert_eq!(script.run(redeem("t", "gpu box")), Answer::Redeemed { member });
                assert_eq!(script.state.is_admin(member), role == Role::Admin);
            }
            assert!(why(script.run(redeem("t", "gpu box"))).contains("used up"));
        }
    }

    #[test]
    fn a_wish_for_a_name_is_cleaned() {
        let mut script = Script::new();
        script.run(token("t", Role::Worker, 1));
        script.run(redeem("t", "gpu box"));
        assert_eq!(script.state.nodes()[&NodeId(1)].name, "gpubox");
    }

    #[test]
    fn a_wrong_secret_looks_like_an_unknown_token() {
        let mut script = Script::new();
        script.run(token("t", Role::Worker, 1));
        let wrong = RedeemToken { id: "t".into(), secret_sha256: [8; 32], name: "n".into(), key: [0; 32] };
        let wrong = why(script.run(Change::RedeemToken(wrong)));
        assert_eq!(wrong, why(script.run(redeem("other", "n"))));
        assert_eq!(script.state.tokens()["t"].uses_left, 1);
    }

    #[test]
    fn an_unlimited_token_stays_unlimited() {
        let mut script = Script::new();
        script.run(token("t", Role::Worker, UNLIMITED_USES));
        script.run(redeem("t", "n"));
        assert_eq!(script.state.tokens()["t"].uses_left, UNLIMITED_USES);
    }

    #[test]
    fn an_expired_token_is_refused() {
        let mut script = Script::new();
        script.run(token("t", Role::Worker, 1));
        script.now += 1 << 40;
        assert!(why(script.run(redeem("t", "n"))).contains("expired"));
    }
}
