//! A worker or client has shown a certificate of this CA: it needs the one before no more.

use crate::cluster::{Answer, Context, Effect, State};
use fleet_common::protocol::Member;
use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ShowCa {
    pub member: Member,
    /// Its number.
    pub ca: u64,
}

impl ShowCa {
    pub(super) fn apply(self, state: &mut State, context: &mut Context) -> Answer {
        let issuing = state.issuing_ca();
        if let Some(admitted) = state.admitted.get_mut(&self.member) {
            admitted.ca = admitted.ca.max(self.ca.min(issuing));
            context.effects.push(Effect::Admitted(self.member));
        }
        Answer::Done
    }
}
