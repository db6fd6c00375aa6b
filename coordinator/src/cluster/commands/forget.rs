//! The oldest of what has ended is removed from the history, as far as there is more of it than the cluster keeps.

use crate::cluster::{Answer, Context, State};
use serde::{Deserialize, Serialize};

/// Ages are reckoned from the proposer's clock.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Forget;

impl Forget {
    pub(super) fn apply(self, state: &mut State, context: &mut Context) -> Answer {
        state.forget(context);
        Answer::Done
    }
}
