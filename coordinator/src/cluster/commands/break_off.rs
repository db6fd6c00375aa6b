//! A part of a gang has not said in time where its ranks can be called: the gang will never meet. Its parts are told to stop, and the job
//! fails once they have.

use crate::cluster::records::node_error;
use crate::cluster::{Answer, Context, State};
use fleet_common::ids::{Generation, JobId, NodeId};
use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BreakOff {
    pub job: JobId,
    /// Only if this is still the job's generation.
    pub generation: Generation,
    /// Which has not reported.
    pub node: NodeId,
    pub waited_ms: u64,
}

impl BreakOff {
    pub(super) fn apply(self, state: &mut State, context: &mut Context) -> Answer {
        let overdue = |(gang, node): &((JobId, Generation), NodeId)| {
            *gang == (self.job, self.generation) && *node == self.node
        };
        if state.unreported().any(|part| overdue(&part)) {
            let name = state.node_name(self.node);
            let message = format!(
                "node {name} has not said within {} s where its ranks can be called; look into its worker's log, then submit the job again",
                self.waited_ms / 1_000
            );
            state.break_off(self.job, node_error(name, message), context);
        }
        Answer::Done
    }
}
