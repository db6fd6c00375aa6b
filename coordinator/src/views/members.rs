//! Coordinators, tokens and nodes.

use super::View;
use crate::cluster::members::Standing;
use crate::raft::disk::Disk;
use fleet_common::protocol::{
    AuthorityView, CoordinatorView, Member, MemberView, NextAuthorityView, NodeView, Role, TokenView,
};
use sha2::{Digest, Sha256};

/// Members that are named in one answer.
const NAMED_MAX: usize = 100;

impl<D: Disk + ?Sized> View<'_, D> {
    pub(super) fn coordinators(&self) -> Vec<CoordinatorView> {
        let known = |replica| self.raft.progress.iter().find(|(of, _, _)| *of == replica);
        let views = self.state.replicas().iter().map(|(id, replica)| CoordinatorView {
            address: replica.address.clone(),
            name: replica.name.clone(),
            version: replica.version.clone(),
            voter: replica.standing == Standing::Voter,
            leads: self.raft.leader == Some(*id),
            matched_index: known(*id).map(|(_, matched, _)| *matched),
            alive: known(*id).map(|(_, _, alive)| *alive),
            read_only: self.raft.writers.get(id).map(|writes| !writes),
            alarm: self.raft.alarms.get(id).cloned(),
        });
        views.collect()
    }

    pub(super) fn authority(&self) -> AuthorityView {
        let cas = self.state.cas();
        let next = cas.next.as_ref().map(|next| NextAuthorityView {
            ca_sha256: sha256(&next.der),
            since_unix_ms: next.since_unix_ms,
            moving: next.moving,
            without_key: self.state.without_next_key(),
            not_moved: self.state.not_moved().count() as u64,
            first_not_moved: self.state.not_moved().take(NAMED_MAX).collect(),
        });
        AuthorityView { ca_sha256: sha256(&cas.der), next }
    }

    /// Everybody who is let in.
    pub(super) fn members(&self) -> Vec<MemberView> {
        let view = |member: &Member| {
            let (name, joined_unix_ms) = match member {
                Member::Client(user) => self.state.user(*user).map(|user| (&user.name, user.joined_unix_ms)),
                Member::Coordinator(replica) => {
                    self.state.replicas().get(replica).map(|known| (&known.name, known.joined_unix_ms))
                }
                Member::Worker(_) => None,
            }
            .unzip();
            let node = match member {
                Member::Worker(node) => self.state.nodes().get(node).map(|node| &node.name),
                Member::Client(_) | Member::Coordinator(_) => None,
            };
            let role = if self.state.is_admin(*member) { Role::Admin } else { member.role() };
            let name = name.or(node).cloned().unwrap_or_default();
            // The first coordinator never joined.
            let joined_unix_ms = joined_unix_ms.filter(|at| *at > 0);
            MemberView { member: *member, role, name, joined_unix_ms }
        };
        self.state.admitted().keys().map(view).collect()
    }

    /// Those that are still of use.
    pub(super) fn tokens(&self) -> Vec<TokenView> {
        let useful = self
            .state
            .tokens()
            .iter()
            .filter(|(_, token)| token.expires_unix_ms > self.unix_ms && token.uses_left > 0);
        let views = useful.map(|(id, token)| TokenView {
            id: id.clone(),
            role: token.role,
            expires_unix_ms: token.expires_unix_ms,
            uses_left: token.uses_left,
        });
        views.collect()
    }

    pub(super) fn nodes(&self) -> Vec<NodeView> {
        let used = self.state.slots_in_use();
        let views = self.state.nodes().iter().map(|(id, node)| {
            let seen = self.observed.nodes.get(id);
            NodeView {
                node: *id,
                name: node.name.clone(),
                connected: seen.is_some_and(|seen| seen.connected),
                slots: node.slots,
                slots_used: used.get(id).copied().unwrap_or_default(),
                lost: node.lost,
                drained: node.drained,
                labels: node.labels.clone(),
                host: node.host.clone(),
                device: node.device.clone(),
                version: node.version.clone(),
                heard_ms_ago: seen.map(|seen| self.now_ms.saturating_sub(seen.heard_ms)),
            }
        });
        views.collect()
    }
}

fn sha256(der: &[u8]) -> String {
    hex::encode(Sha256::digest(der))
}
