//! The cluster's certificate authority, and its replacement. The state has certificates and standings; keys are with the coordinators
//! (`server/custody.rs`) and go through no log.
//!
//! | standing | who issues | whom members trust | what coordinators show | how it goes on |
//! |---|---|---|---|---|
//! | settled | the CA | the CA | a certificate of the CA | `IntroduceCa` |
//! | introduced | the CA | the CA | the same | by itself, when every registered coordinator holds the new CA's key (`HoldCa`); or anew by `IntroduceCa` |
//! | moving | the new CA | both | a certificate of the old CA, which all know | `FinishCa`: the new CA is the CA |
//!
//! Nobody depends on a single coordinator: while the new CA is only introduced it has issued nothing, and if all that held its key are gone
//! another is introduced; afterwards everyone holds it. What was moved cannot be moved back, only finished.

use super::State;
use fleet_common::ids::ReplicaId;
use fleet_common::net::Authorities;
use fleet_common::protocol::Member;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// The CA, and the one that is to follow it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cas {
    /// Counts CAs from 1. 0 where the cluster began without one, as in a simulation.
    pub number: u64,
    /// Its certificate, DER.
    pub der: Vec<u8>,
    pub next: Option<NextCa>,
    /// Certificate of the one that it replaced. A coordinator that was away when that ended still shows what it signed; it is known by its key.
    pub previous: Option<Vec<u8>>,
}

/// A CA that is to replace the present one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NextCa {
    pub der: Vec<u8>,
    /// Coordinators that have its key on their disks.
    pub holders: BTreeSet<ReplicaId>,
    /// It issues, and members trust both.
    pub moving: bool,
    pub since_unix_ms: u64,
}

impl Cas {
    /// What members are to trust; `None` where there is no CA at all.
    pub fn trusted(&self) -> Option<Authorities> {
        let own = self.der.clone();
        match &self.next {
            _ if own.is_empty() => None,
            Some(next) if next.moving => Some(Authorities::new(next.der.clone(), [own])),
            _ => Some(Authorities::one(own)),
        }
    }

    /// Whose certificates coordinators accept: also of a CA of which some have not heard yet.
    pub fn accepted(&self) -> Option<Authorities> {
        let next = self.next.as_ref().map(|next| next.der.clone());
        self.trusted().map(|trusted| {
            let others = trusted.iter().map(<[u8]>::to_vec).chain(next).collect::<Vec<_>>();
            Authorities::new(trusted.issuing().to_vec(), others)
        })
    }
}

impl State {
    pub fn cas(&self) -> &Cas {
        &self.cas
    }

    /// The number of the CA that issues.
    pub(super) fn issuing_ca(&self) -> u64 {
        self.cas.number + u64::from(self.cas.next.as_ref().is_some_and(|next| next.moving))
    }

    /// Registered coordinators that do not hold the next CA's key.
    pub fn without_next_key(&self) -> Vec<ReplicaId> {
        let Some(next) = &self.cas.next else { return Vec::new() };
        self.replicas.keys().filter(|replica| !next.holders.contains(replica)).copied().collect()
    }

    /// Workers and clients that have not shown a certificate of the CA that issues.
    pub fn not_moved(&self) -> impl Iterator<Item = Member> {
        let issuing = self.issuing_ca();
        let behind = self.admitted.iter().filter(move |(member, admitted)| {
            !matches!(member, Member::Coordinator(_)) && admitted.ca < issuing
        });
        behind.map(|(member, _)| *member)
    }

    /// Goes on to `moving` when nobody is missing any more. Called whenever that may have become true.
    pub(super) fn move_when_ready(&mut self) -> bool {
        let ready = self.without_next_key().is_empty();
        match &mut self.cas.next {
            Some(next) if ready && !next.moving => {
                next.moving = true;
                true
            }
            _ => false,
        }
    }

    /// The first state's CA, and the keys of its coordinators.
    pub fn trusting(
        mut self,
        ca_der: Vec<u8>,
        keys: BTreeMap<ReplicaId, fleet_common::net::KeyHash>,
    ) -> State {
        self.cas = Cas { number: self.cas.number.max(1), der: ca_der, next: None, previous: None };
        for (replica, key) in keys {
            self.admit(Member::Coordinator(replica), key);
        }
        self
    }
}
