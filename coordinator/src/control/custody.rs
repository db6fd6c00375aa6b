//! The key of a CA that is to replace the present one: coordinators fetch it from each other and record that they have it. This decides who
//! asks whom; the keys themselves are with the driver. `cluster/authorities.rs` says how a replacement goes on.

use super::{Action, Control, Now, PeerMessage};
use crate::cluster::commands::{Change, HoldCa};
use crate::raft::disk::Disk;
use fleet_common::ids::ReplicaId;
use fleet_common::net::PrivateKey;

impl<D: Disk> Control<D> {
    /// Asks one of those that have the next CA's key for it, another one each time.
    pub(super) fn look_after_ca(&mut self, now: Now) {
        let Some(next) = self.replica.state().cas().next.as_ref() else { return };
        if self.holds_ca.as_ref() == Some(&next.der) {
            return;
        }
        let holders: Vec<ReplicaId> =
            next.holders.iter().copied().filter(|holder| *holder != self.me()).collect();
        let turn = now.mono_ms / super::HOUSEKEEPING_MS;
        if let Some(at) = turn.checked_rem(holders.len() as u64) {
            let message = PeerMessage::WantCa { der: next.der.clone() };
            self.out.push(Action::ToPeer { to: holders[at as usize], message });
        }
    }

    /// What the cluster does not know yet of this coordinator's keys.
    pub(super) fn ca_to_report(&self) -> Option<Change> {
        let next = self.replica.state().cas().next.as_ref()?;
        let held = self.holds_ca.as_ref() == Some(&next.der) && !next.holders.contains(&self.me());
        held.then(|| Change::HoldCa(HoldCa { replica: self.me(), der: next.der.clone() }))
    }

    /// Only a registered coordinator gets a key, and only that of a CA of this cluster.
    pub(super) fn ca_is_wanted(&mut self, from: ReplicaId, der: Vec<u8>) {
        let state = self.replica.state();
        let known = state.cas().accepted().is_some_and(|accepted| accepted.iter().any(|ca| ca == der));
        if known && state.replicas().contains_key(&from) {
            self.out.push(Action::SendCa { to: from, der });
        }
    }

    pub(super) fn ca_came(&mut self, der: Vec<u8>, key: PrivateKey) {
        let wanted = self.replica.state().cas().next.as_ref().is_some_and(|next| next.der == der);
        if wanted && self.holds_ca.as_ref() != Some(&der) {
            self.out.push(Action::KeepCa { der, key });
        }
    }
}
