//! A coordinator has the key of the CA that is to follow, on its disk. When all have it, members begin to move.

use crate::cluster::{Answer, Context, Effect, State};
use fleet_common::ids::ReplicaId;
use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HoldCa {
    pub replica: ReplicaId,
    /// The CA's certificate.
    pub der: Vec<u8>,
}

impl HoldCa {
    pub(super) fn apply(self, state: &mut State, context: &mut Context) -> Answer {
        match &mut state.cas.next {
            Some(next) if next.der == self.der => drop(next.holders.insert(self.replica)),
            // Of a CA that was replaced by another one, or is the present one by now.
            _ => return Answer::Done,
        }
        state.move_when_ready();
        context.effects.push(Effect::Members);
        Answer::Done
    }
}
