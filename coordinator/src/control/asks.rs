//! Changes and queries under way. Whoever wants one, the leader does it: this coordinator if it leads, otherwise the ask is passed on,
//! and again when the leader changes or is silent. An ask ends with an outcome, a refusal or its deadline.
//!
//! Asking twice is harmless: a change carries a request id, or is idempotent (`RecordEvents`, `DescribeNode`, `FailJob` ...).

use super::reads::Reader;
use super::{Action, Call, Control, Now, PeerMessage, Room, Session, Told};
use crate::cluster::commands::Change;
use crate::cluster::session::Stamp;
use crate::cluster::{Answer, Command};
use crate::planner::Why;
use crate::raft::disk::Disk;
use crate::raft::replica::{COMMAND_MAX, Declined, Ticket};
use fleet_common::codec;
use fleet_common::ids::{ReplicaId, UserId};
use fleet_common::protocol::{Refusal, RefusalKind, Reply, Request};

/// An ask is given up after this long: two elections and then some.
pub(super) const ASK_DEADLINE_MS: u64 = 5_000;
/// A leader that has not done an ask after this long may not have got it.
const ASK_RETRY_MS: u64 = 1_000;
/// Before asking again one who said that it does not lead.
const ELSEWHERE_RETRY_MS: u64 = 100;
/// Asks under way: every call and one batch of every agent.
const ASKS_MAX: usize = super::CALLS_MAX + super::AGENTS_MAX;

const TOO_LARGE: &str = "this request is too large";

pub(super) enum What {
    Change(Box<Command>),
    Query(Box<Request>),
}

/// Who hears what came of it.
pub(super) enum Asker {
    /// A client's request.
    Client(Call),
    Join(Call),
    Driver(Call),
    /// A greeting or a batch of events.
    Agent(Session),
    /// The leader's own decisions: with the leadership they are dropped, and made anew by the next leader.
    Planner(Why),
    Members(Why),
    /// This coordinator's record of itself.
    Myself,
    /// The leader removes what is over the limits of the history.
    History,
}

pub(super) enum Outcome {
    Answer(Answer),
    Reply(Box<Reply>),
}

pub(super) struct Ask {
    pub what: What,
    pub asker: Asker,
    deadline_ms: u64,
    place: Place,
    /// How often it was handed to a leader who has not said that it did nothing with it.
    handed: u32,
}

enum Place {
    Nowhere {
        since_ms: u64,
    },
    /// In this leader's log or reads.
    Here {
        term: u64,
    },
    There {
        leader: u64,
        term: u64,
        sent_ms: u64,
    },
}

/// Why a change was not proposed.
pub(super) enum Unproposed {
    Elsewhere,
    Refused(Refusal),
}

pub(super) fn unavailable(message: impl Into<String>) -> Refusal {
    Refusal { kind: RefusalKind::Unavailable, message: message.into() }
}

pub(super) fn undecided(message: impl Into<String>) -> Refusal {
    Refusal { kind: RefusalKind::Undecided, message: message.into() }
}

pub(super) fn invalid(message: impl Into<String>) -> Refusal {
    Refusal { kind: RefusalKind::Invalid, message: message.into() }
}

impl What {
    pub fn change(request: Option<Stamp>, change: Change) -> What {
        What::Change(Box::new(Command { unix_ms: 0, request, by: None, why: None, change }))
    }

    /// A change that this user wants, who must be let make it.
    pub fn by(user: Option<UserId>, request: Stamp, change: Change) -> What {
        What::Change(Box::new(Command { unix_ms: 0, request: Some(request), by: user, why: None, change }))
    }

    pub fn decision(change: Change, why: Why) -> What {
        What::Change(Box::new(Command { unix_ms: 0, request: None, by: None, why: Some(why), change }))
    }
}

impl What {
    /// The leader would take it, and it can travel there.
    fn fits(&self) -> bool {
        match self {
            What::Change(command) => codec::encode(command).is_ok_and(|bytes| bytes.len() <= COMMAND_MAX),
            // Small: questions have no lists.
            What::Query(_) => true,
        }
    }
}

impl Ask {
    /// Nothing was done now. Of a change that was handed on before that is not known.
    fn refused(&self, refusal: Refusal) -> Refusal {
        let open = matches!(self.what, What::Change(_)) && self.handed > 0;
        match refusal.kind {
            RefusalKind::Unavailable if open => Refusal { kind: RefusalKind::Undecided, ..refusal },
            _ => refusal,
        }
    }
}

impl Asker {
    /// Only of use while this replica leads.
    fn is_leaders_own(&self) -> bool {
        matches!(self, Asker::Planner(_) | Asker::Members(_) | Asker::History)
    }
}

impl<D: Disk> Control<D> {
    pub(super) fn next_ticket(&mut self) -> Ticket {
        self.last_ticket = self.last_ticket.wrapping_add(1);
        self.last_ticket
    }

    /// Sees to it that `what` is done; the asker hears of it through `settle`.
    pub(super) fn ask(&mut self, now: Now, asker: Asker, what: What) {
        let ticket = self.next_ticket();
        let place = Place::Nowhere { since_ms: now.mono_ms };
        let ask = Ask { what, asker, deadline_ms: now.mono_ms + ASK_DEADLINE_MS, place, handed: 0 };
        if self.asks.len() >= ASKS_MAX {
            return self.settle(
                now,
                ask,
                Err(unavailable("too much is under way at this coordinator; try again")),
            );
        }
        self.place(now, ticket, ask);
    }

    /// Hands an ask to who leads now.
    fn place(&mut self, now: Now, ticket: Ticket, mut ask: Ask) {
        let term = self.replica.term();
        ask.place = match self.whom_to_ask(now) {
            None => Place::Nowhere { since_ms: now.mono_ms },
            Some(leader) if leader == self.replica.id() => match &mut ask.what {
                What::Change(command) => match self.propose(now, ticket, command) {
                    Ok(()) => {
                        ask.handed += 1;
                        Place::Here { term }
                    }
                    Err(Unproposed::Elsewhere) => Place::Nowhere { since_ms: now.mono_ms },
                    Err(Unproposed::Refused(refusal)) => {
                        let refusal = ask.refused(refusal);
                        return self.settle(now, ask, Err(refusal));
                    }
                },
                What::Query(request) => {
                    let request = request.clone();
                    self.reads.add(Reader::Query { ticket, request });
                    Place::Here { term }
                }
            },
            // Dropped: the leader decides for itself.
            Some(_) if ask.asker.is_leaders_own() => return,
            Some(_) if !ask.what.fits() => return self.settle(now, ask, Err(invalid(TOO_LARGE))),
            Some(leader) => {
                let message = match &ask.what {
                    What::Change(command) => PeerMessage::Propose { ticket, command: command.clone() },
                    What::Query(request) => PeerMessage::Query { ticket, request: request.clone() },
                };
                self.out.push(Action::ToPeer { to: ReplicaId(leader), message });
                ask.handed += 1;
                Place::There { leader, term, sent_ms: now.mono_ms }
            }
        };
        self.asks.insert(ticket, ask);
    }

    pub(super) fn is_asked_here(&self, ticket: Ticket) -> bool {
        self.asks.get(&ticket).is_some_and(|ask| matches!(ask.place, Place::Here { .. }))
    }

    /// The leader. A coordinator to which nobody can say who leads, because it is no member yet or has another address than the others
    /// know, asks those it knows of, one each second.
    fn whom_to_ask(&self, now: Now) -> Option<u64> {
        self.replica.leader().or_else(|| {
            let is_reached = self.is_member() && !self.has_moved();
            let seeds = if is_reached { &[][..] } else { &self.myself.seeds[..] };
            let turn = now.mono_ms / ASK_RETRY_MS;
            turn.checked_rem(seeds.len() as u64).map(|at| seeds[at as usize].0)
        })
    }

    /// Passes on again what may be lost, and gives up what took too long.
    pub(super) fn look_after_asks(&mut self, now: Now) {
        let (target, term) = (self.whom_to_ask(now), self.replica.term());
        let leads = target == Some(self.replica.id());
        let mut late = Vec::new();
        let mut astray = Vec::new();
        for (ticket, ask) in &self.asks {
            let age = |since_ms: u64| now.mono_ms.saturating_sub(since_ms);
            let lost = match ask.place {
                Place::Nowhere { since_ms } => target.is_some() && age(since_ms) >= ELSEWHERE_RETRY_MS,
                Place::Here { term: then } => !leads || then != term,
                Place::There { leader, term: then, sent_ms } => {
                    target.is_some_and(|target| target != leader)
                        || then != term
                        || age(sent_ms) >= ASK_RETRY_MS
                }
            };
            if now.mono_ms >= ask.deadline_ms {
                late.push(*ticket);
            } else if lost {
                astray.push(*ticket);
            }
        }
        for ask in late.into_iter().filter_map(|ticket| self.asks.remove(&ticket)).collect::<Vec<_>>() {
            let why = match target {
                Some(_) => "not done in time; try again",
                None => "no coordinator leads at the moment; try again",
            };
            let refusal = ask.refused(unavailable(why));
            self.settle(now, ask, Err(refusal));
        }
        for ticket in astray {
            if let Some(ask) = self.asks.remove(&ticket) {
                self.place(now, ticket, ask);
            }
        }
    }

    /// The next leader decides anew.
    pub(super) fn drop_leaders_asks(&mut self) {
        self.asks.retain(|_, ask| !ask.asker.is_leaders_own());
    }

    /// Asks that this leader cannot make durable for lack of room: people are told, agents wait.
    pub(super) fn refuse_for_lack_of_room(&mut self, now: Now, why: &str) {
        let people = |ask: &Ask| matches!(ask.asker, Asker::Client(_) | Asker::Join(_) | Asker::Driver(_));
        let waiting = self.asks.iter().filter(|(_, ask)| {
            matches!((&ask.place, &ask.what), (Place::Here { .. }, What::Change(_))) && people(ask)
        });
        let waiting: Vec<Ticket> = waiting.map(|(ticket, _)| *ticket).collect();
        for ask in waiting.into_iter().filter_map(|ticket| self.asks.remove(&ticket)).collect::<Vec<_>>() {
            let message = format!("{why}; this is recorded when there is room, if it still can be");
            let refusal = ask.refused(unavailable(message));
            self.settle(now, ask, Err(refusal));
        }
    }

    /// An entry with this ticket was applied here, whoever proposed it.
    pub(super) fn answered(&mut self, now: Now, ticket: Ticket, answer: Answer) {
        if let Some(ask) = self.asks.remove(&ticket) {
            self.settle(now, ask, Ok(Outcome::Answer(answer)));
        }
    }

    pub(super) fn replied(&mut self, now: Now, ticket: Ticket, result: Result<Reply, Refusal>) {
        if let Some(ask) = self.asks.remove(&ticket) {
            self.settle(now, ask, result.map(|reply| Outcome::Reply(Box::new(reply))));
        }
    }

    /// What another coordinator says of an ask that was passed on to it.
    pub(super) fn told(&mut self, now: Now, from: ReplicaId, ticket: Ticket, told: Told) {
        let Some(ask) = self.asks.get_mut(&ticket) else { return };
        if !matches!(ask.place, Place::There { leader, .. } if leader == from.0) {
            return;
        }
        match told {
            Told::Elsewhere => {
                ask.handed = ask.handed.saturating_sub(1);
                ask.place = Place::Nowhere { since_ms: now.mono_ms };
            }
            Told::Reply(reply) => self.replied(now, ticket, Ok(*reply)),
            Told::Refused(refusal) => {
                ask.handed = ask.handed.saturating_sub(1);
                let refusal = ask.refused(refusal);
                self.replied(now, ticket, Err(refusal));
            }
        }
    }

    fn settle(&mut self, now: Now, ask: Ask, result: Result<Outcome, Refusal>) {
        let Ask { what, asker, .. } = ask;
        match asker {
            Asker::Client(call) => self.reply_to_client(call, result),
            Asker::Join(call) => self.admit(call, result),
            Asker::Driver(call) => self.tell_driver(call, result),
            Asker::Agent(session) => self.agents_change_settled(now, session, what, result),
            Asker::Planner(why) => self.planned(why, result),
            Asker::Members(why) => self.members_changed(why, result),
            Asker::Myself => self.described(),
            Asker::History => self.forgets.under_way = false,
        }
    }

    /// Puts a change into this leader's log, if it may be there.
    pub(super) fn propose(
        &mut self,
        now: Now,
        ticket: Ticket,
        command: &mut Command,
    ) -> Result<(), Unproposed> {
        let refuse = |refusal| Err(Unproposed::Refused(refusal));
        match &self.room {
            Room::Enough => {}
            Room::Little(_) if command.change.frees(self.replica.state()) => command.change.thin(),
            Room::Little(why) | Room::None(why) => return refuse(unavailable(why.clone())),
        }
        let (wanted, known) = (command.change.level(), self.replica.state().level());
        if wanted > known {
            return refuse(unavailable(format!(
                "not all coordinators know this yet (level {wanted}, the oldest knows {known}); update them first"
            )));
        }
        command.unix_ms = now.unix_ms;
        self.raft_touched = true;
        match self.propose_by_kind(now, ticket, command)? {
            Ok(()) => Ok(()),
            Err(Declined::NotLeader) => Err(Unproposed::Elsewhere),
            Err(Declined::Busy) => refuse(unavailable("too much is waiting to be written; try again")),
            Err(Declined::Pending) => refuse(unavailable(
                "another change of the coordinators is under way; try again when it is done",
            )),
            Err(Declined::DiskFull(why)) => refuse(unavailable(why)),
            Err(Declined::TooLarge) => refuse(invalid(TOO_LARGE)),
            Err(Declined::Misfit(why)) => refuse(invalid(why)),
        }
    }

    /// A change that another coordinator passes on.
    pub(super) fn propose_for(&mut self, now: Now, from: ReplicaId, ticket: Ticket, mut command: Command) {
        let told = match self.propose(now, ticket, &mut command) {
            Ok(()) => return,
            Err(Unproposed::Elsewhere) => Told::Elsewhere,
            Err(Unproposed::Refused(refusal)) => Told::Refused(refusal),
        };
        self.out.push(Action::ToPeer { to: from, message: PeerMessage::Told { ticket, told } });
    }

    /// A query that another coordinator passes on.
    pub(super) fn query_for(&mut self, from: ReplicaId, ticket: Ticket, request: Box<Request>) {
        let told = if self.replica.leader() != Some(self.replica.id()) {
            Told::Elsewhere
        } else if self.reads.is_crowded() {
            Told::Refused(unavailable("too much is under way at the leader; try again"))
        } else {
            return self.reads.add(Reader::PassedOn { from, ticket, request });
        };
        self.out.push(Action::ToPeer { to: from, message: PeerMessage::Told { ticket, told } });
    }
}
