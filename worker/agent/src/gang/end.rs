//! How a gang ended: what the job is told of it.

use super::{Kind, Phase, Supervised};
use crate::agent::{Config, Now};
use crate::verdict::{self, Cause, Exit};
use fleet_common::events::{EventBody, FailureKind, JobError, Level, Outcome};
use fleet_common::exit::Fault;
use nix::sys::signal::Signal;
use std::collections::BTreeMap;

impl Supervised {
    /// Of a program of which one rank has failed: how the others ended, but for those that did so well, as that one, or by the SIGTERM.
    fn push_other_ends(&mut self, outcome: &Outcome, now: Now) {
        let Outcome::Failed(JobError { rank: Some(blamed), exit_code, signal, .. }) = *outcome else {
            return;
        };
        let mut ends: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for (rank, state) in (self.first_rank..).zip(&self.ranks).filter(|(rank, _)| *rank != blamed) {
            let end = match state.exit {
                None | Some(Exit::Code(0)) => continue,
                _ if state.struck => "killed".to_owned(),
                Some(Exit::Signal(by)) if signal == Some(by) || by == Signal::SIGTERM as i32 => continue,
                Some(Exit::Signal(by)) => verdict::signal_name(by),
                Some(Exit::Code(code)) if exit_code == Some(code) => continue,
                Some(Exit::Code(code)) => format!("exit code {code}"),
            };
            ends.entry(end).or_default().push(rank.to_string());
        }
        if matches!(self.kind, Kind::Train(_)) || ends.is_empty() {
            return;
        }
        let ends: Vec<String> =
            ends.iter().map(|(end, ranks)| format!("{end} (rank {})", ranks.join(", "))).collect();
        let line = format!("of the other ranks: {}", ends.join("; "));
        self.push(now, EventBody::Log { rank: None, level: Level::Warn, line });
    }

    pub(super) fn finish(&mut self, config: &Config, now: Now) {
        let outcome = self.outcome(config);
        self.push_other_ends(&outcome, now);
        self.push_memory(now);
        self.push(now, EventBody::Finished(outcome));
        self.phase = Phase::Finished;
        self.kill_at = None;
    }

    fn outcome(&self, config: &Config) -> Outcome {
        if let Some(error) = &self.own_error {
            return Outcome::Failed(error.clone());
        }
        let suspicion = match self.kind {
            Kind::Train(_) => verdict::culprit(&self.suspicions),
            Kind::Program => self.suspicions.iter().min_by_key(|suspicion| suspicion.at),
        };
        if let Some(suspicion) = suspicion {
            // Where it is on this node.
            let local = suspicion.blamed().checked_sub(self.first_rank);
            let state = local.and_then(|rank| self.ranks.get(rank as usize));
            let lines = state.map(|state| state.last_lines.to_vec()).unwrap_or_default();
            // How it ended after it was struck says nothing about it.
            let exit = state.filter(|state| !state.struck).and_then(|state| state.exit);
            let trains = matches!(self.kind, Kind::Train(_));
            let mut error = verdict::sentence(suspicion, trains, &config.name, exit, lines);
            if !trains && matches!(suspicion.cause, Cause::Code(_)) {
                error.fault = Fault::Job; // the codes are the program's own
            }
            return Outcome::Failed(error);
        }
        let done = self.ranks.first().and_then(|rank| rank.done.clone());
        if let Some(seconds) = self.expired.filter(|_| !matches!(done, Some(Outcome::Succeeded { .. }))) {
            let message = format!(
                "the job had its maximum time of {seconds} s and was stopped; give it more with --max-time, or go on from its last checkpoint"
            );
            let error = verdict::agent_error(FailureKind::Time, Fault::Job, &config.name, message);
            return Outcome::Failed(error);
        }
        match (done, self.stop) {
            (Some(outcome), _) => outcome,
            (None, Some(_)) => Outcome::Stopped { steps: self.last_step },
            (None, None) => Outcome::Succeeded { steps: 0, final_loss: None, tokens_per_s: 0.0 },
        }
    }
}
