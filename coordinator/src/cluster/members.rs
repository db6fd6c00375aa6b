//! Who belongs to the cluster: coordinators, nodes, holders of clients' certificates, and the tokens by which they come.

use super::State;
use fleet_common::ids::{NodeId, ReplicaId, UserId, is_id};
use fleet_common::net::KeyHash;
use fleet_common::protocol::{CoordinatorAddress, Member, Role, Wish};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// Registered coordinators: five that vote, and room for those that replace them.
pub const REPLICAS_MAX: usize = 9;
/// Nodes that a cluster can know.
pub const NODES_MAX: usize = 20_000;
/// Clients' certificates that a cluster can know.
pub const USERS_MAX: usize = 20_000;
/// Members that were cut off. Certificates run out, so this bounds what an operator can do in their lifetime.
pub const REVOKED_MAX: usize = 100_000;
/// Characters of a member's name.
pub const NAME_MAX: usize = 63;
/// Former processes of a node's worker that are known. A word of an older one does not come any more.
pub const FORMER_MAX: usize = 16;
/// Labels of a node, and labels that a job asks for.
pub const LABELS_MAX: usize = 16;
/// Characters of an address, a version, a device.
pub const TEXT_MAX: usize = 256;
/// Numbers of each kind that a restored cluster passes over: more than any cluster gives out between two backups.
pub const RESTORE_GAP: u64 = 1_000_000;
/// Likewise of coordinators, which are few; each of these numbers is cut off by name.
pub const RESTORE_GAP_REPLICAS: u64 = 1_000;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ReplicaRecord {
    pub address: CoordinatorAddress,
    pub name: String,
    /// Of the coordinator program.
    pub version: String,
    /// The newest commands that it knows (`Change::level`).
    pub level: u32,
    pub joined_unix_ms: u64,
    pub standing: Standing,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Standing {
    /// Is being brought up to date; does not count for majorities.
    Learner,
    Voter,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NodeRecord {
    pub name: String,
    pub slots: u32,
    /// `cpu`, `cuda`, `mps`; empty until the agent's first greeting.
    pub device: String,
    /// Of the worker program.
    pub version: String,
    /// What jobs may ask for.
    pub labels: BTreeMap<String, String>,
    /// Where other nodes reach it.
    pub host: String,
    /// Of UDP, where its agent lends checkpoints; 0: nowhere.
    pub checkpoint_port: u16,
    /// Its worker's process, as `AgentHello::process`; 0 before the first greeting. All unfinished parts of gangs on this node are this
    /// process's, or an earlier one's whose records it has.
    pub process: u64,
    /// Processes of its worker that another one has followed, oldest first: what they say comes too late.
    pub former: VecDeque<u64>,
    /// Not heard for a lease; true until it greets again.
    pub lost: bool,
    /// Gets no more work, until an operator says otherwise.
    pub drained: bool,
    pub joined_unix_ms: u64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TokenRecord {
    pub role: Role,
    pub secret_sha256: [u8; 32],
    pub expires_unix_ms: u64,
    pub uses_left: u32,
}

impl NodeRecord {
    /// Whether it has the labels that a job wants.
    pub fn suits(&self, wish: &Wish) -> bool {
        wish.labels.iter().all(|(name, value)| self.labels.get(name) == Some(value))
    }

    /// Before its agent's first greeting.
    pub(crate) fn joined(name: String, unix_ms: u64) -> NodeRecord {
        NodeRecord {
            name,
            slots: 0,
            device: String::new(),
            version: String::new(),
            labels: BTreeMap::new(),
            host: String::new(),
            checkpoint_port: 0,
            process: 0,
            former: VecDeque::new(),
            lost: false,
            drained: false,
            joined_unix_ms: unix_ms,
        }
    }
}

/// The holder of a client's certificate.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct UserRecord {
    pub name: String,
    /// Has an operator's right.
    pub admin: bool,
    pub joined_unix_ms: u64,
}

impl State {
    /// The first state of a new cluster with these coordinators, which all vote. See `trusting` for their keys.
    pub fn founded(cluster_id: String, founders: BTreeMap<ReplicaId, ReplicaRecord>) -> State {
        let last_replica = founders.keys().last().map_or(0, |replica| replica.0);
        let mut state = State { last_replica, ..State::new(cluster_id) };
        for replica in founders.keys() {
            state.admit(Member::Coordinator(*replica), KeyHash::default());
        }
        State { replicas: founders, ..state }
    }

    /// The state of a backup as the first one of a cluster of one: the coordinators of then are gone for ever, and so are those that
    /// joined later.
    ///
    /// What the cluster gave out after the backup is not in it: certificates that still hold, jobs that agents still run, numbers that
    /// people wrote down. So every counter goes on behind a gap, and no id is given a second time. Whoever has one from within the gap
    /// is a stranger, who joins again; the jobs of such a node are stopped.
    ///
    /// `key` is the founder's own, and `held` are the certificates of the CAs besides the present one whose keys the backup has: a
    /// replacement that was under way goes on with one of them, or ends.
    pub fn restored(mut self, founder: ReplicaRecord, key: KeyHash, held: &[&[u8]]) -> State {
        let id = founder.address.replica;
        let later = (self.last_replica + 1..id.0).map(ReplicaId);
        for gone in std::mem::take(&mut self.replicas).into_keys().chain(later) {
            self.revoked.insert(Member::Coordinator(gone));
        }
        self.admitted.retain(|member, _| !matches!(member, Member::Coordinator(_)));
        if let Some(next) = &mut self.cas.next {
            next.holders = BTreeSet::from([id]);
        }
        self.cas.next = self.cas.next.take_if(|next| held.contains(&next.der.as_slice()));
        self.admit(Member::Coordinator(id), key);
        self.last_replica = self.last_replica.max(id.0);
        self.replicas.insert(id, founder);
        for last in [
            &mut self.last_node,
            &mut self.last_user,
            &mut self.last_job,
            &mut self.last_run,
            &mut self.last_export,
            &mut self.last_profile,
            &mut self.last_decision,
        ] {
            *last += RESTORE_GAP;
        }
        self.move_when_ready();
        self
    }

    /// The id of the first coordinator after a restore, which no coordinator has had.
    pub fn restored_replica(&self) -> ReplicaId {
        ReplicaId(self.last_replica + RESTORE_GAP_REPLICAS + 1)
    }

    pub fn replicas(&self) -> &BTreeMap<ReplicaId, ReplicaRecord> {
        &self.replicas
    }

    pub fn nodes(&self) -> &BTreeMap<NodeId, NodeRecord> {
        &self.nodes
    }

    pub fn users(&self) -> &BTreeMap<UserId, UserRecord> {
        &self.users
    }

    pub fn tokens(&self) -> &BTreeMap<String, TokenRecord> {
        &self.tokens
    }

    pub fn revoked(&self) -> impl Iterator<Item = Member> {
        self.revoked.iter().copied()
    }

    /// The newest commands that every coordinator knows. Nothing above it may be proposed.
    pub fn level(&self) -> u32 {
        self.replicas.values().map(|replica| replica.level).min().unwrap_or(super::commands::COMMAND_LEVEL)
    }

    pub fn node_name(&self, node: NodeId) -> String {
        self.nodes.get(&node).map_or_else(|| node.to_string(), |record| record.name.clone())
    }

    pub(crate) fn voters(&self) -> usize {
        self.replicas.values().filter(|replica| replica.standing == Standing::Voter).count()
    }
}

/// Whether this can be a label: two words without spaces or signs that mean something elsewhere.
pub(crate) fn is_label(name: &str, value: &str) -> bool {
    let word = |text: &str| {
        let fine = |c: char| c.is_ascii_alphanumeric() || "._-/".contains(c);
        (1..=NAME_MAX).contains(&text.len()) && text.chars().all(fine)
    };
    word(name) && word(value)
}

/// A wish for a name with only letters, digits, `.`, `_`, `-` and `@`, or the id where nothing is left. What reads as another one's id gets
/// the member's own behind it: `node-2@node-7`.
pub fn clean_name(wish: &str, member: Member) -> String {
    let name: String =
        wish.chars().filter(|c| c.is_ascii_alphanumeric() || "._-@".contains(*c)).take(NAME_MAX).collect();
    let own = member.to_string();
    match name.is_empty() || name == own {
        true => own,
        false if is_id(&name) => {
            let room = NAME_MAX.saturating_sub(own.len() + 1);
            format!("{}@{own}", &name[..name.len().min(room)])
        }
        false => name,
    }
}

/// A title without signs that break a line; `None` where nothing is left or it is too long.
pub(crate) fn clean_text(text: &str) -> Option<String> {
    let text = text.trim();
    let fits = !text.is_empty() && text.chars().count() <= TEXT_MAX && is_plain(text);
    fits.then(|| text.to_owned())
}

/// Whether it can be shown as it is: no signs that break a line or tell a terminal what to do.
pub(crate) fn is_plain(text: &str) -> bool {
    !text.chars().any(char::is_control)
}

/// The beginning of a text that a member says of itself.
pub(crate) fn clip(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(TEXT_MAX).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::admitted::Membership;
    use crate::cluster::commands::{Change, RevokeMember};
    use crate::cluster::tests::{Script, describe, redeem, replica, token, why};
    use crate::cluster::{Answer, HistoryRow};
    use fleet_common::ids::JobId;

    /// What a restore makes of the state of a script.
    fn restored(state: &State) -> Script {
        let id = state.restored_replica();
        let record = ReplicaRecord {
            address: replica(id.0).address,
            name: "new".into(),
            version: "0".into(),
            level: 1,
            joined_unix_ms: 0,
            standing: Standing::Voter,
        };
        Script { state: state.clone().restored(record, [5; 32], &[]), ..Script::new() }
    }

    #[test]
    fn a_restored_cluster_gives_out_nothing_that_was_given_out_after_the_backup() {
        let mut old = Script::with_replicas(2);
        for (id, role) in [("w", Role::Worker), ("u", Role::Client), ("c", Role::Coordinator)] {
            old.run(token(id, role, 999));
        }
        let give_out = |script: &mut Script| {
            let members = ["w", "u", "c"].map(|id| match script.run(redeem(id, "n")) {
                Answer::Redeemed { member } => member,
                other => panic!("{other:?}"),
            });
            let Member::Worker(node) = members[0] else { panic!("the token of a worker makes one") };
            script.run(describe(node, "n", 4, &[]));
            (members, script.submit(1))
        };
        give_out(&mut old);
        let backup = old.state.clone();
        let later: Vec<_> = (0..20).map(|_| give_out(&mut old)).collect();

        let mut new = restored(&backup);
        let (members, job) = give_out(&mut new);
        for (given, ran) in &later {
            assert!(members.iter().all(|member| !given.contains(member)) && job != *ran);
        }
        assert!(new.history.iter().all(|row| !matches!(row, HistoryRow::Work { job: JobId(1..=21), .. })));

        let ([worker, user, coordinator], _) = later[7];
        assert_eq!(new.state.membership(coordinator), Membership::Revoked, "the old cluster's");
        let Member::Worker(node) = worker else { panic!("the token of a worker makes one") };
        assert!(why(new.run(describe(node, "n", 4, &[]))).contains("join again with a token"));
        assert_eq!(new.state.membership(user), Membership::Unknown, "it joins again");
        assert_eq!(new.run(Change::RevokeMember(RevokeMember { member: user })), Answer::Done);
        assert_eq!(new.state.membership(user), Membership::Revoked);
        assert_eq!(new.state.membership(members[2]), Membership::Known);
    }

    #[test]
    fn a_name_never_breaks_a_line_or_a_path() {
        let node = Member::Worker(NodeId(3));
        assert_eq!(clean_name("a/../b\n", node), "a..b");
        assert_eq!(clean_name("///", node), "node-3");
        assert_eq!(clean_name(&"x".repeat(500), node).len(), NAME_MAX);
    }

    #[test]
    fn nobody_is_called_by_another_ones_id() {
        let node = Member::Worker(NodeId(3));
        for (wish, name) in [
            ("node-3", "node-3"),
            ("node-2", "node-2@node-3"),
            ("node-2@node-3", "node-2@node-3"),
            ("no de-0/2", "node-02@node-3"),
            ("job-1", "job-1@node-3"),
            ("replica-1", "replica-1@node-3"),
            ("user-1", "user-1@node-3"),
            ("3", "3@node-3"),
            ("node-2.local", "node-2.local"),
        ] {
            assert_eq!(clean_name(wish, node), name, "{wish}");
        }
        assert_eq!(clean_name("replica-1", Member::Coordinator(ReplicaId(2))), "replica-1@replica-2");
        assert_eq!(clean_name("node-1", Member::Client(UserId(2))), "node-1@user-2");
        let long = clean_name(&format!("{}7", "0".repeat(NAME_MAX - 1)), node);
        assert!(long.len() == NAME_MAX && long.ends_with("0@node-3"), "{long}");
    }
}
