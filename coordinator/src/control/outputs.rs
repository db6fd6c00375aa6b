//! What ranks printed, whole, for who asks: read from the file on the node, through the coordinator that holds its agent. One piece is
//! asked for at a time, so the reader's pace is that of all others.
//!
//! Whoever is asked and does not hold the agent asks all others at once: those that do answer, the rest says so.

use super::asks::unavailable;
use super::peer::OutputSaid;
use super::{Action, Call, Control, Now, PeerMessage, Session};
use crate::raft::disk::Disk;
use crate::raft::replica::Ticket;
use fleet_common::ids::{JobId, NodeId, Rank, ReplicaId};
use fleet_common::protocol::{
    OUTPUT_ASKED_MAX, OutputPiece, OutputWish, Refusal, RefusalKind, Reply, ToAgent,
};
use std::collections::BTreeMap;

/// For a piece to come: a node that is in touch reads it in milliseconds.
pub(super) const OUTPUT_DEADLINE_MS: u64 = 5_000;
/// Pieces under way, all askers together.
const ASKED_MAX: usize = 64;

/// What a client asked for.
#[derive(Clone, Copy)]
pub(super) struct OutputOf {
    pub job: JobId,
    pub rank: Rank,
    pub from: u64,
    pub deadline_ms: u64,
}

/// Who waits for a piece.
#[derive(Clone, Copy)]
enum Whom {
    Call(Call),
    /// Another coordinator, under its own ticket.
    Peer(ReplicaId, Ticket),
}

struct Asked {
    whom: Whom,
    node: NodeId,
    /// Of the agent that was asked; `None` where the others were.
    session: Option<Session>,
    /// Coordinators that have not said yet that they do not hold the agent.
    left: usize,
    deadline_ms: u64,
}

#[derive(Default)]
pub(super) struct Outputs {
    asked: BTreeMap<Ticket, Asked>,
}

impl<D: Disk> Control<D> {
    /// A look at a state that has all that was acknowledged before the question.
    pub(super) fn output_read(&mut self, now: Now, call: Call) {
        let Some(of) = self.calls.output(call) else { return };
        match self.where_printed(of, now) {
            Ok((node, wish)) => self.want_output(now, Whom::Call(call), node, wish),
            Err(refusal) => self.tell_output(Whom::Call(call), Err(refusal)),
        }
    }

    /// On which node the rank's file lies.
    fn where_printed(&self, of: OutputOf, now: Now) -> Result<(NodeId, OutputWish), Refusal> {
        let OutputOf { job, rank, from, .. } = of;
        let record = crate::views::job_record(self.replica.state(), &self.history, job, now.unix_ms)?;
        let not_found = |message: String| Refusal { kind: RefusalKind::NotFound, message };
        let at = record
            .placement
            .as_ref()
            .ok_or_else(|| not_found(format!("{job} has no ranks at the moment, so nothing is printed")))?;
        let here = |first: Rank, ranks: u32| rank >= first && rank - first < ranks;
        let part = at.parts.iter().find(|part| here(part.first_rank, part.ranks)).ok_or_else(|| {
            not_found(format!("{job} has no rank {rank}; its ranks are 0 to {}", record.world_size - 1))
        })?;
        let wish = OutputWish {
            ticket: 0,
            job,
            generation: at.generation,
            local_rank: rank - part.first_rank,
            from,
        };
        Ok((part.node, wish))
    }

    fn want_output(&mut self, now: Now, whom: Whom, node: NodeId, wish: OutputWish) {
        let session = self.session_of(node);
        let others: Vec<ReplicaId> = match (session, whom) {
            (None, Whom::Call(_)) => {
                let all = self.replica.state().replicas().keys().copied();
                all.filter(|replica| *replica != self.me()).collect()
            }
            _ => Vec::new(),
        };
        let of_agent =
            self.outputs.asked.values().filter(|asked| session.is_some() && asked.session == session);
        if self.outputs.asked.len() >= ASKED_MAX || of_agent.count() >= OUTPUT_ASKED_MAX {
            return self.tell_output(whom, Err(busy()));
        }
        if session.is_none() && others.is_empty() {
            return self.output_is_elsewhere(whom, node);
        }
        let ticket = self.next_ticket();
        let wish = OutputWish { ticket, ..wish };
        match session {
            Some(session) => {
                self.out.push(Action::ToAgent { session, message: ToAgent::ReadOutput(wish) });
            }
            None => {
                for to in &others {
                    let message = PeerMessage::Output { ticket, said: OutputSaid::Wanted { node, wish } };
                    self.out.push(Action::ToPeer { to: *to, message });
                }
            }
        }
        let deadline_ms = now.mono_ms + OUTPUT_DEADLINE_MS;
        let asked = Asked { whom, node, session, left: others.len(), deadline_ms };
        self.outputs.asked.insert(ticket, asked);
    }

    /// Another coordinator wants something, or answers.
    pub(super) fn output_said(&mut self, now: Now, from: ReplicaId, ticket: Ticket, said: OutputSaid) {
        if let OutputSaid::Wanted { node, wish } = said {
            return self.want_output(now, Whom::Peer(from, ticket), node, wish);
        }
        let Some(asked) = self.outputs.asked.get_mut(&ticket).filter(|asked| asked.session.is_none()) else {
            return;
        };
        match said {
            OutputSaid::Elsewhere if asked.left > 1 => asked.left -= 1,
            OutputSaid::Elsewhere => {
                let (whom, node) = (asked.whom, asked.node);
                self.outputs.asked.remove(&ticket);
                self.output_is_elsewhere(whom, node);
            }
            OutputSaid::Answered(result) => self.output_is_here(ticket, *result),
            OutputSaid::Busy => {
                let whom = asked.whom;
                self.outputs.asked.remove(&ticket);
                self.tell_output(whom, Err(busy()));
            }
            OutputSaid::Wanted { .. } => {}
        }
    }

    /// An agent has answered.
    pub(super) fn output_came(
        &mut self,
        session: Session,
        ticket: Ticket,
        result: Result<OutputPiece, String>,
    ) {
        if self.outputs.asked.get(&ticket).is_some_and(|asked| asked.session == Some(session)) {
            self.output_is_here(ticket, result);
        }
    }

    fn output_is_here(&mut self, ticket: Ticket, result: Result<OutputPiece, String>) {
        let Some(Asked { whom, node, .. }) = self.outputs.asked.remove(&ticket) else { return };
        match whom {
            Whom::Peer(to, ticket) => self.say_of_output(to, ticket, OutputSaid::Answered(Box::new(result))),
            Whom::Call(_) => {
                let name = self.replica.state().node_name(node);
                let gone = |why| Refusal { kind: RefusalKind::NotFound, message: format!("{name}: {why}") };
                self.tell_output(whom, result.map_err(gone));
            }
        }
    }

    fn output_is_elsewhere(&mut self, whom: Whom, node: NodeId) {
        let name = self.replica.state().node_name(node);
        let why = format!(
            "{name} is not connected, and what its ranks printed is only there, in the worker's data directory under gangs/"
        );
        match whom {
            Whom::Peer(to, ticket) => self.say_of_output(to, ticket, OutputSaid::Elsewhere),
            Whom::Call(_) => self.tell_output(whom, Err(unavailable(why))),
        }
    }

    fn tell_output(&mut self, whom: Whom, result: Result<OutputPiece, Refusal>) {
        match whom {
            Whom::Call(call) => {
                if self.calls.remove(call).is_some() {
                    let reply = result.map_or_else(Reply::Refused, Reply::Output);
                    self.out.push(Action::Reply { call, reply });
                }
            }
            // Only that there is too much to do is refused to a coordinator.
            Whom::Peer(to, ticket) => self.say_of_output(to, ticket, OutputSaid::Busy),
        }
    }

    fn say_of_output(&mut self, to: ReplicaId, ticket: Ticket, said: OutputSaid) {
        self.out.push(Action::ToPeer { to, message: PeerMessage::Output { ticket, said } });
    }

    /// Gives up what has not come.
    pub(super) fn look_after_outputs(&mut self, now: Now) {
        self.outputs.asked.retain(|_, asked| now.mono_ms < asked.deadline_ms);
        for call in self.calls.late_outputs(now.mono_ms) {
            let why = "the output did not come in time: its node is not in touch, or its coordinator is away";
            self.tell_output(Whom::Call(call), Err(unavailable(why)));
        }
    }
}

fn busy() -> Refusal {
    unavailable("much output is read at the moment; try again")
}
