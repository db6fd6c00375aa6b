//! How much of the history is kept from now on.

use crate::cluster::retention::Limits;
use crate::cluster::{Answer, Context, State};
use serde::{Deserialize, Serialize};

/// What is not given stays as it is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SetRetention {
    pub age_ms: Option<u64>,
    pub bytes: Option<u64>,
}

impl SetRetention {
    pub(super) fn apply(self, state: &mut State, _: &mut Context) -> Answer {
        let known = state.retention.limits();
        state.retention.limit(Limits {
            age_ms: self.age_ms.unwrap_or(known.age_ms),
            bytes: self.bytes.unwrap_or(known.bytes),
        });
        Answer::Done
    }
}
