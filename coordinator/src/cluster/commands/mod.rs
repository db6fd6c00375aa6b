//! The commands: every way in which the state can change, one file each.
//!
//! Variants are only ever added at the end: their position is how they are stored in the log.

mod assign_gang;
mod cancel_job;
mod create_token;
mod describe_node;
mod fail_job;
mod mark_node_lost;
mod record_events;
mod redeem_token;
mod submit_job;

pub use assign_gang::AssignGang;
pub use cancel_job::CancelJob;
pub use create_token::CreateToken;
pub use describe_node::DescribeNode;
pub use fail_job::FailJob;
pub use mark_node_lost::MarkNodeLost;
pub use record_events::RecordEvents;
pub use redeem_token::RedeemToken;
pub use submit_job::SubmitJob;

use super::{Answer, Context, State};
use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Change {
    CreateToken(CreateToken),
    RedeemToken(RedeemToken),
    DescribeNode(DescribeNode),
    MarkNodeLost(MarkNodeLost),
    SubmitJob(SubmitJob),
    AssignGang(AssignGang),
    RecordEvents(RecordEvents),
    CancelJob(CancelJob),
    FailJob(FailJob),
}

impl Change {
    pub(super) fn apply(self, state: &mut State, context: &mut Context) -> Answer {
        match self {
            Change::CreateToken(command) => command.apply(state, context),
            Change::RedeemToken(command) => command.apply(state, context),
            Change::DescribeNode(command) => command.apply(state, context),
            Change::MarkNodeLost(command) => command.apply(state, context),
            Change::SubmitJob(command) => command.apply(state, context),
            Change::AssignGang(command) => command.apply(state, context),
            Change::RecordEvents(command) => command.apply(state, context),
            Change::CancelJob(command) => command.apply(state, context),
            Change::FailJob(command) => command.apply(state, context),
        }
    }

    /// For logs and metrics.
    pub fn name(&self) -> &'static str {
        match self {
            Change::CreateToken(_) => "create_token",
            Change::RedeemToken(_) => "redeem_token",
            Change::DescribeNode(_) => "describe_node",
            Change::MarkNodeLost(_) => "mark_node_lost",
            Change::SubmitJob(_) => "submit_job",
            Change::AssignGang(_) => "assign_gang",
            Change::RecordEvents(_) => "record_events",
            Change::CancelJob(_) => "cancel_job",
            Change::FailJob(_) => "fail_job",
        }
    }
}
