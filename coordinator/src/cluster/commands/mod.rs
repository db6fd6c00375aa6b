//! The commands: every way in which the state can change, one file each.
//!
//! Variants are only ever added at the end: their position is how they are stored in the log. A new one gets a higher level, so that
//! it is proposed only once every coordinator knows it.

mod assign_gang;
mod break_off;
mod cancel_job;
mod change_secrets;
mod create_token;
mod describe_node;
mod describe_replica;
mod drain_node;
mod fail_job;
mod finish_ca;
mod finish_run;
mod force_stop;
mod forget;
mod hold_ca;
mod introduce_ca;
mod mark_node_lost;
mod promote_replica;
mod record_events;
mod record_export;
mod record_metrics;
mod record_profile;
mod redeem_token;
mod register_replica;
mod remove_replica;
mod revoke_member;
mod revoke_token;
mod set_retention;
mod settle_superseded;
mod show_ca;
mod start_run;
mod submit_job;
mod submit_once;
mod undrain_node;

pub use assign_gang::AssignGang;
pub use break_off::BreakOff;
pub use cancel_job::CancelJob;
pub use change_secrets::ChangeSecrets;
pub use create_token::CreateToken;
pub use describe_node::DescribeNode;
pub use describe_replica::DescribeReplica;
pub use drain_node::DrainNode;
pub use fail_job::FailJob;
pub use finish_ca::FinishCa;
pub use finish_run::FinishRun;
pub use force_stop::ForceStop;
pub use forget::Forget;
pub use hold_ca::HoldCa;
pub use introduce_ca::IntroduceCa;
pub use mark_node_lost::MarkNodeLost;
pub use promote_replica::PromoteReplica;
pub use record_events::RecordEvents;
pub use record_export::RecordExport;
pub use record_metrics::RecordMetrics;
pub use record_profile::RecordProfile;
pub use redeem_token::RedeemToken;
pub use register_replica::RegisterReplica;
pub use remove_replica::RemoveReplica;
pub use revoke_member::RevokeMember;
pub use revoke_token::RevokeToken;
pub use set_retention::SetRetention;
pub use settle_superseded::SettleSuperseded;
pub use show_ca::ShowCa;
pub use start_run::StartRun;
pub use submit_job::SubmitJob;
pub use submit_once::SubmitOnce;
pub use undrain_node::UndrainNode;

use super::{Answer, Context, State};
use serde::{Deserialize, Serialize};

/// The newest commands that this program knows. At 6 there is none: coordinators tell each other where they are asked over HTTP.
pub const COMMAND_LEVEL: u32 = 6;

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
    RevokeToken(RevokeToken),
    RegisterReplica(RegisterReplica),
    PromoteReplica(PromoteReplica),
    RemoveReplica(RemoveReplica),
    DescribeReplica(DescribeReplica),
    RevokeMember(RevokeMember),
    DrainNode(DrainNode),
    UndrainNode(UndrainNode),
    StartRun(StartRun),
    RecordMetrics(RecordMetrics),
    FinishRun(FinishRun),
    RecordExport(RecordExport),
    RecordProfile(RecordProfile),
    SubmitOnce(SubmitOnce),
    ChangeSecrets(ChangeSecrets),
    IntroduceCa(IntroduceCa),
    HoldCa(HoldCa),
    ShowCa(ShowCa),
    FinishCa(FinishCa),
    Forget(Forget),
    SetRetention(SetRetention),
    BreakOff(BreakOff),
    SettleSuperseded(SettleSuperseded),
    ForceStop(ForceStop),
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
            Change::RevokeToken(command) => command.apply(state, context),
            Change::RegisterReplica(command) => command.apply(state, context),
            Change::PromoteReplica(command) => command.apply(state, context),
            Change::RemoveReplica(command) => command.apply(state, context),
            Change::DescribeReplica(command) => command.apply(state, context),
            Change::RevokeMember(command) => command.apply(state, context),
            Change::DrainNode(command) => command.apply(state, context),
            Change::UndrainNode(command) => command.apply(state, context),
            Change::StartRun(command) => command.apply(state, context),
            Change::RecordMetrics(command) => command.apply(state, context),
            Change::FinishRun(command) => command.apply(state, context),
            Change::RecordExport(command) => command.apply(state, context),
            Change::RecordProfile(command) => command.apply(state, context),
            Change::SubmitOnce(command) => command.apply(state, context),
            Change::ChangeSecrets(command) => command.apply(state, context),
            Change::IntroduceCa(command) => command.apply(state, context),
            Change::HoldCa(command) => command.apply(state, context),
            Change::ShowCa(command) => command.apply(state, context),
            Change::FinishCa(command) => command.apply(state, context),
            Change::Forget(command) => command.apply(state, context),
            Change::SetRetention(command) => command.apply(state, context),
            Change::BreakOff(command) => command.apply(state, context),
            Change::SettleSuperseded(command) => command.apply(state, context),
            Change::ForceStop(command) => command.apply(state, context),
        }
    }

    /// What a coordinator must know to apply it: 1 is membership and jobs, 2 adds what is recorded of runs, 3 training on several
    /// nodes, 4 what nodes need not keep, 5 stops that are forced. Proposed only where `State::level` is at least that.
    pub fn level(&self) -> u32 {
        match self {
            Change::StartRun(_)
            | Change::RecordMetrics(_)
            | Change::FinishRun(_)
            | Change::RecordExport(_)
            | Change::RecordProfile(_) => 2,
            Change::BreakOff(_) => 3,
            Change::SettleSuperseded(_) => 4,
            Change::ForceStop(_) => 5,
            _ => 1,
        }
    }

    /// Whether it ends something, cuts somebody off or makes room: what a coordinator still takes whose disk is nearly full.
    pub fn frees(&self, state: &State) -> bool {
        match self {
            Change::MarkNodeLost(_)
            | Change::CancelJob(_)
            | Change::FailJob(_)
            | Change::BreakOff(_)
            | Change::ForceStop(_)
            | Change::RevokeToken(_)
            | Change::PromoteReplica(_)
            | Change::RemoveReplica(_)
            | Change::RevokeMember(_)
            | Change::DrainNode(_)
            | Change::FinishRun(_)
            | Change::Forget(_)
            | Change::SettleSuperseded(_)
            | Change::SetRetention(_)
            // Small, and they end the trust in a CA that has leaked.
            | Change::IntroduceCa(_)
            | Change::HoldCa(_)
            | Change::ShowCa(_)
            | Change::FinishCa(_) => true,
            Change::ChangeSecrets(change) => change.values.is_none(),
            // A worker that comes back, without which its jobs cannot be ended.
            Change::DescribeNode(described) => state.nodes().contains_key(&described.node),
            // Without its lines (`thinned`): what leads to the end of a job that shall end.
            Change::RecordEvents(told) => told.ends_a_job(state),
            Change::CreateToken(_)
            | Change::RedeemToken(_)
            | Change::SubmitJob(_)
            | Change::SubmitOnce(_)
            | Change::AssignGang(_)
            | Change::RegisterReplica(_)
            | Change::DescribeReplica(_)
            | Change::UndrainNode(_)
            | Change::StartRun(_)
            | Change::RecordMetrics(_)
            | Change::RecordExport(_)
            | Change::RecordProfile(_) => false,
        }
    }

    /// Takes out what is only for people to read.
    pub fn thin(&mut self) {
        if let Change::RecordEvents(told) = self {
            told.thin();
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
            Change::RevokeToken(_) => "revoke_token",
            Change::RegisterReplica(_) => "register_replica",
            Change::PromoteReplica(_) => "promote_replica",
            Change::RemoveReplica(_) => "remove_replica",
            Change::DescribeReplica(_) => "describe_replica",
            Change::RevokeMember(_) => "revoke_member",
            Change::DrainNode(_) => "drain_node",
            Change::UndrainNode(_) => "undrain_node",
            Change::StartRun(_) => "start_run",
            Change::RecordMetrics(_) => "record_metrics",
            Change::FinishRun(_) => "finish_run",
            Change::RecordExport(_) => "record_export",
            Change::RecordProfile(_) => "record_profile",
            Change::SubmitOnce(_) => "submit_once",
            Change::ChangeSecrets(_) => "change_secrets",
            Change::IntroduceCa(_) => "introduce_ca",
            Change::HoldCa(_) => "hold_ca",
            Change::ShowCa(_) => "show_ca",
            Change::FinishCa(_) => "finish_ca",
            Change::Forget(_) => "forget",
            Change::SetRetention(_) => "set_retention",
            Change::BreakOff(_) => "break_off",
            Change::SettleSuperseded(_) => "settle_superseded",
            Change::ForceStop(_) => "force_stop",
        }
    }
}
