//! Who was let into the cluster, and which key each of them has: the allow-list that every certificate is held against.
//!
//! A certificate is worth nothing by itself: whoever has a copy of the CA's key can make any. So a member is known by its number and the
//! hash of its own key, which was recorded when it joined, and stays the same through all renewals. Serial numbers would not do: they are in
//! the log and in backups, and who has the CA's key can give one of them to a certificate over another key.

use super::State;
use super::commands::Change;
use super::members::UserRecord;
use fleet_common::ids::UserId;
use fleet_common::net::KeyHash;
use fleet_common::protocol::{Member, Refusal, RefusalKind, Role};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Coordinators that were admitted, registered or not: some dozens of replacements between two clean-ups.
pub const COORDINATORS_MAX: usize = 100;

/// A member, as it was let in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Admitted {
    pub key: KeyHash,
    /// Number of the newest CA by which it has shown a certificate; at first of the one that issued then.
    pub ca: u64,
}

/// Whether a number of this cluster may do anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Membership {
    Known,
    /// Cut off for ever: ids are never reused.
    Revoked,
    /// This state has not heard of the member; a newer one may have.
    Unknown,
}

impl State {
    pub fn membership(&self, member: Member) -> Membership {
        if self.revoked.contains(&member) {
            Membership::Revoked
        } else if self.admitted.contains_key(&member) {
            Membership::Known
        } else {
            Membership::Unknown
        }
    }

    /// Everybody who is let in.
    pub fn admitted(&self) -> &BTreeMap<Member, Admitted> {
        &self.admitted
    }

    pub fn user(&self, user: UserId) -> Option<&UserRecord> {
        self.users.get(&user)
    }

    /// Whether this is a client with an operator's right.
    pub fn is_admin(&self, member: Member) -> bool {
        match member {
            Member::Client(user) => self.users.get(&user).is_some_and(|record| record.admin),
            Member::Worker(_) | Member::Coordinator(_) => false,
        }
    }

    /// Whether this user may make this change. Asked when it is requested, so that what is refused does not fill the log, and again when it
    /// is applied, which alone counts: a right that has ended does not outlive its end at a coordinator that has not heard of it.
    pub fn may_change(&self, user: UserId, change: &Change) -> Result<(), Refusal> {
        let member = Member::Client(user);
        if self.revoked.contains(&member) {
            return Err(forbidden(cut_off(member)));
        }
        let Some(what) = operators_work(change) else { return Ok(()) };
        if self.is_admin(member) {
            return Ok(());
        }
        Err(forbidden(format!(
            "only an admin {what}, and {user} is none; use a coordinator's data directory as --cluster on its own machine, or a login made with `fleet token create --role admin`"
        )))
    }

    /// Lets a member in that was not known, or known with this key.
    pub(super) fn admit(&mut self, member: Member, key: KeyHash) {
        let ca = self.issuing_ca();
        self.admitted.insert(member, Admitted { key, ca });
    }
}

/// What an ordinary client may not do, in words that follow `only an admin`.
fn operators_work(change: &Change) -> Option<&'static str> {
    match change {
        Change::CreateToken(create) => match create.role {
            Role::Coordinator => Some("makes tokens for coordinators"),
            Role::Admin => Some("makes tokens for admins"),
            Role::Worker | Role::Client => None,
        },
        Change::RevokeToken(_) => Some("revokes tokens"),
        Change::RevokeMember(_) => Some("revokes members"),
        Change::RemoveReplica(_) => Some("takes coordinators out"),
        Change::IntroduceCa(_) | Change::FinishCa(_) => Some("replaces the CA"),
        // It removes what others have recorded.
        Change::SetRetention(_) => Some("sets how much history is kept"),
        _ => None,
    }
}

fn forbidden(message: String) -> Refusal {
    Refusal { kind: RefusalKind::Forbidden, message }
}

/// What somebody is told who was cut off.
pub fn cut_off(member: Member) -> String {
    match member.role() {
        Role::Coordinator => format!(
            "{member} was removed from the cluster; set its directory aside and join again with a token"
        ),
        Role::Worker => {
            format!("{member} was revoked; set its data directory aside and join again with a new token")
        }
        Role::Client | Role::Admin => format!("{member} was revoked; `fleet login` again with a new token"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::Answer;
    use crate::cluster::commands::{RemoveReplica, RevokeMember, RevokeToken, SetRetention};
    use crate::cluster::tests::{Script, redeem, token, why};
    use fleet_common::ids::{NodeId, ReplicaId};

    #[test]
    fn a_member_is_known_from_its_admission_on_and_until_it_is_cut_off() {
        let mut script = Script::new();
        let user = Member::Client(UserId(1));
        assert_eq!(script.state.membership(user), Membership::Unknown);
        script.run(token("u", Role::Client, 1));
        script.run(redeem("u", "ann"));
        assert_eq!(script.state.membership(user), Membership::Known);
        assert_eq!(script.state.membership(Member::Client(UserId(2))), Membership::Unknown);
        script.run(Change::RevokeMember(RevokeMember { member: user }));
        assert_eq!(script.state.membership(user), Membership::Revoked);
        assert!(script.state.admitted().is_empty());
    }

    #[test]
    fn an_operators_work_is_an_admins_and_his_right_ends_with_him() {
        let mut script = Script::with_replicas(2);
        script.run(token("u", Role::Client, 1));
        script.run(token("a", Role::Admin, 1));
        for id in ["u", "a"] {
            script.run(redeem(id, "x"));
        }
        let (ordinary, admin) = (UserId(1), UserId(2));
        let revoke = |member| Change::RevokeMember(RevokeMember { member });
        let operators = [
            token("c", Role::Coordinator, 1),
            token("b", Role::Admin, 1),
            Change::RevokeToken(RevokeToken { id: "c".into() }),
            revoke(Member::Worker(NodeId(7))),
            Change::RemoveReplica(RemoveReplica { replica: ReplicaId(2) }),
            Change::SetRetention(SetRetention { age_ms: Some(3_600_000), bytes: None }),
        ];
        for change in operators {
            let refusal = why(script.run_by(ordinary, change.clone()));
            assert!(refusal.contains("only an admin") && refusal.contains("user-1"), "{refusal}");
            assert!(!matches!(script.run_by(admin, change), Answer::Rejected(_)));
        }
        for role in [Role::Worker, Role::Client] {
            let id = format!("{role:?}");
            assert_eq!(script.run_by(ordinary, token(&id, role, 1)), Answer::TokenCreated { id: id.clone() });
        }
        script.run(revoke(Member::Client(admin)));
        let late = why(script.run_by(admin, token("d", Role::Worker, 1)));
        assert!(late.contains("was revoked"), "{late}");
    }
}
