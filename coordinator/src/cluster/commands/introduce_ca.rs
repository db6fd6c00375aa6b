//! A CA is to replace the present one. The coordinator that made it has its key; the others fetch it.

use crate::cluster::authorities::NextCa;
use crate::cluster::{Answer, Context, Effect, State};
use fleet_common::ids::ReplicaId;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// Bytes of a CA's certificate: some hundreds.
const DER_MAX: usize = 4 << 10;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct IntroduceCa {
    /// Its certificate.
    pub der: Vec<u8>,
    /// Who made it.
    pub holder: ReplicaId,
}

impl IntroduceCa {
    pub(super) fn apply(self, state: &mut State, context: &mut Context) -> Answer {
        if state.cas.next.as_ref().is_some_and(|next| next.moving) {
            return Answer::invalid(
                "the CA is being replaced already and members move to the new one; end that first with `coordinator rotate-ca --finish`",
            );
        }
        if !state.replicas.contains_key(&self.holder) {
            return Answer::invalid(format!("{} is not a coordinator of this cluster", self.holder));
        }
        if self.der.is_empty() || self.der.len() > DER_MAX || self.der == state.cas.der {
            return Answer::invalid("this is no certificate of a new CA");
        }
        // One that was introduced before has issued nothing: its key may be lost with who made it.
        state.cas.next = Some(NextCa {
            der: self.der,
            holders: BTreeSet::from([self.holder]),
            moving: false,
            since_unix_ms: context.unix_ms,
        });
        state.move_when_ready();
        context.effects.push(Effect::Members);
        Answer::Done
    }
}
