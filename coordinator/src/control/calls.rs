//! Requests from outside: clients', joiners' and the driver's. Each is open until it was answered or its caller is gone.

use super::asks::{ASK_DEADLINE_MS, Asker, Outcome, What, invalid, unavailable, undecided};
use super::outputs::{OUTPUT_DEADLINE_MS, OutputOf};
use super::reads::Reader;
use super::watches::Watch;
use super::{Action, Admission, CALLS_MAX, Call, Control, Now};
use crate::cluster::admitted::cut_off;
use crate::cluster::commands::{Change, RedeemToken};
use crate::cluster::members::REPLICAS_MAX;
use crate::cluster::members::clean_name;
use crate::cluster::session::{ANSWER_BYTES, MEMORY_MAX, RequestId, SESSION_BYTES, Stamp};
use crate::cluster::{Answer, State};
use crate::raft::disk::Disk;
use crate::requests;
use fleet_common::ids::{ClientId, UserId};
use fleet_common::protocol::{
    CHANGES_IN_FLIGHT_MAX, ClientFrame, Member, PROTOCOL_VERSION, Refusal, RefusalKind, Reply, Request, Role,
};
use std::collections::BTreeMap;

/// Open calls of one certificate: a quarter of all.
const CALLS_PER_MEMBER_MAX: usize = CALLS_MAX / 4;

/// If every open call of every coordinator is another client's change, the state remembers all of them, and as many that ask again.
const _: () = assert!(MEMORY_MAX / (SESSION_BYTES + ANSWER_BYTES) >= 2 * CALLS_MAX * REPLICAS_MAX);

/// Who asks over HTTP. Ids begin with 1, so nobody is let in as this, and to cut it off is no reason to show nothing.
pub const READER: Member = Member::Client(UserId(0));

/// For a look at the state and for the change after it.
const JOIN_DEADLINE_MS: u64 = 2 * ASK_DEADLINE_MS;

pub(super) struct OpenCall {
    caller: Option<Member>,
    kind: Kind,
}

enum Kind {
    /// Answered by its ask.
    Once,
    /// A change of this client.
    Change(ClientId),
    Watch(Watch),
    /// A piece of what a rank printed.
    Output(OutputOf),
    Join {
        redeem: Box<RedeemToken>,
        request: RequestId,
        deadline_ms: u64,
    },
    /// Wants a state that is new enough.
    Look,
}

/// All open calls, counted.
#[derive(Default)]
pub(super) struct Calls {
    open: BTreeMap<Call, OpenCall>,
    of_member: BTreeMap<Member, usize>,
    /// Changes under way, of each client.
    of_client: BTreeMap<ClientId, usize>,
}

impl Calls {
    pub fn len(&self) -> usize {
        self.open.len()
    }

    fn insert(&mut self, id: Call, call: OpenCall) -> Result<(), Refusal> {
        if self.open.contains_key(&id) {
            return Err(invalid(format!(
                "the number {id} of a call was given twice; this is a bug in fleet"
            )));
        }
        if self.open.len() >= CALLS_MAX {
            return Err(unavailable(format!(
                "this coordinator has {CALLS_MAX} requests open already; try again, or ask another one"
            )));
        }
        let of_member = call.caller.map(|member| self.of_member.entry(member).or_default());
        if of_member.as_ref().is_some_and(|open| **open >= CALLS_PER_MEMBER_MAX) {
            return Err(unavailable(format!(
                "you have {CALLS_PER_MEMBER_MAX} requests open already; try again"
            )));
        }
        if let Kind::Change(client) = call.kind {
            let of_client = self.of_client.entry(client).or_default();
            if *of_client >= CHANGES_IN_FLIGHT_MAX as usize {
                return Err(unavailable(format!(
                    "this client has {CHANGES_IN_FLIGHT_MAX} changes under way already; wait for some of them"
                )));
            }
            *of_client += 1;
        }
        of_member.into_iter().for_each(|open| *open += 1);
        self.open.insert(id, call);
        Ok(())
    }

    pub fn remove(&mut self, id: Call) -> Option<OpenCall> {
        let call = self.open.remove(&id)?;
        if let Some(member) = call.caller {
            decrement(&mut self.of_member, member);
        }
        if let Kind::Change(client) = call.kind {
            decrement(&mut self.of_client, client);
        }
        Some(call)
    }

    pub fn watch(&mut self, id: Call) -> Option<&mut Watch> {
        match &mut self.open.get_mut(&id)?.kind {
            Kind::Watch(watch) => Some(watch),
            _ => None,
        }
    }

    pub fn watches(&mut self) -> impl Iterator<Item = (Call, &mut Watch)> {
        self.open.iter_mut().filter_map(|(id, call)| match &mut call.kind {
            Kind::Watch(watch) => Some((*id, watch)),
            _ => None,
        })
    }

    pub fn output(&self, id: Call) -> Option<OutputOf> {
        match self.open.get(&id)?.kind {
            Kind::Output(of) => Some(of),
            _ => None,
        }
    }

    /// Those that wait for output and have waited too long.
    pub fn late_outputs(&self, now_ms: u64) -> Vec<Call> {
        let late = |call: &OpenCall| matches!(call.kind, Kind::Output(of) if now_ms >= of.deadline_ms);
        self.open.iter().filter(|(_, call)| late(call)).map(|(id, _)| *id).collect()
    }

    pub fn ids(&self) -> Vec<Call> {
        self.open.keys().copied().collect()
    }
}

fn decrement<K: Ord>(counts: &mut BTreeMap<K, usize>, key: K) {
    if let Some(count) = counts.get_mut(&key) {
        *count -= 1;
        if *count == 0 {
            counts.remove(&key);
        }
    }
}

impl<D: Disk> Control<D> {
    pub(super) fn take_client(&mut self, now: Now, call: Call, caller: Member, frame: ClientFrame) {
        if let Err(refusal) = self.begin(now, call, caller, frame) {
            self.calls.remove(call);
            self.out.push(Action::Reply { call, reply: Reply::Refused(refusal) });
        }
    }

    fn begin(&mut self, now: Now, call: Call, caller: Member, frame: ClientFrame) -> Result<(), Refusal> {
        // What it knows it tells whoever does not mind that others may know more: how else would anybody learn that it is stuck?
        if !frame.stale || frame.request.is_change() || matches!(frame.request, Request::Watch { .. }) {
            self.is_serving()?;
        }
        self.has_not_left()?;
        self.may_ask(caller)?;
        if frame.version != PROTOCOL_VERSION {
            return Err(invalid(format!(
                "this cluster speaks version {PROTOCOL_VERSION} of the protocol, the client {}; install the same version of fleet",
                frame.version
            )));
        }
        if let Request::Environment { values: true, .. } = frame.request {
            self.may_see_secrets(caller)?;
        }
        let stamp = stamp(&frame);
        let mut open = |kind| self.calls.insert(call, OpenCall { caller: Some(caller), kind });
        match frame.request {
            Request::Watch { job, from, follow } => {
                open(Kind::Watch(Watch::new(job, from, follow, now)))?;
                self.start_watch(call, frame.stale);
            }
            Request::Output { job, rank, from } => {
                open(Kind::Output(OutputOf {
                    job,
                    rank,
                    from,
                    deadline_ms: now.mono_ms + OUTPUT_DEADLINE_MS,
                }))?;
                // Who goes on reading has seen before that the job is there.
                match from {
                    0 if !frame.stale => self.reads.add(Reader::Output(call)),
                    _ => self.output_read(now, call),
                }
            }
            request if !request.is_change() => {
                open(Kind::Once)?;
                if frame.stale {
                    let reply = self.query(now, &request);
                    self.reply_to_client(call, reply.map(|reply| Outcome::Reply(Box::new(reply))));
                } else {
                    self.ask(now, Asker::Client(call), What::Query(Box::new(request)));
                }
            }
            request => {
                let change = requests::change(request)?;
                let by = user(caller);
                if let Some(user) = by {
                    self.replica.state().may_change(user, &change)?;
                }
                self.calls
                    .insert(call, OpenCall { caller: Some(caller), kind: Kind::Change(frame.client) })?;
                self.ask(now, Asker::Client(call), What::by(by, stamp, change));
            }
        }
        Ok(())
    }

    /// A coordinator that was taken out, or cannot follow the others because it cannot write, sends everybody elsewhere.
    fn is_serving(&self) -> Result<(), Refusal> {
        self.has_not_left()?;
        match self.replica.full() {
            Some(why) if self.is_stuck() => {
                Err(unavailable(format!("this coordinator cannot go on: {why}; ask another one")))
            }
            _ => Ok(()),
        }
    }

    fn has_not_left(&self) -> Result<(), Refusal> {
        self.leaving.as_ref().map_or(Ok(()), |leaving| Err(unavailable(leaving.why.clone())))
    }

    /// The driver has seen the certificate; whether it still counts is in the state.
    fn may_ask(&self, caller: Member) -> Result<(), Refusal> {
        let forbidden = |message: String| Err(Refusal { kind: RefusalKind::Forbidden, message });
        if caller.role() != Role::Client {
            return forbidden(format!(
                "the certificate of {caller} is not a client's; join with a token for clients"
            ));
        }
        if caller != READER && self.is_revoked(caller) {
            return forbidden(cut_off(caller));
        }
        Ok(())
    }

    /// Whoever may submit can give and remove secrets; to read them is an operator's right.
    fn may_see_secrets(&self, caller: Member) -> Result<(), Refusal> {
        if self.is_admin(caller) {
            return Ok(());
        }
        let message = format!("{caller} may see the names of secrets and not their values; an admin may");
        Err(Refusal { kind: RefusalKind::Forbidden, message })
    }

    pub(super) fn take_join(&mut self, now: Now, call: Call, redeem: RedeemToken, request: RequestId) {
        let deadline_ms = now.mono_ms + JOIN_DEADLINE_MS;
        let kind = Kind::Join { redeem: Box::new(redeem), request, deadline_ms };
        let opened =
            self.is_serving().and_then(|()| self.calls.insert(call, OpenCall { caller: None, kind }));
        match opened {
            Ok(()) => self.reads.add(Reader::Join(call)),
            Err(refusal) => self.out.push(Action::Joined { call, result: Err(refusal) }),
        }
    }

    /// Guesses of a token are turned away here, so that they do not fill the log.
    pub(super) fn join_read(&mut self, now: Now, call: Call) {
        let Some(Kind::Join { redeem, request, .. }) = self.calls.open.get(&call).map(|call| &call.kind)
        else {
            return;
        };
        let (redeem, request) = (redeem.clone(), *request);
        let token = self.replica.state().tokens().get(&redeem.id);
        if token.is_some_and(|token| token.secret_sha256 == redeem.secret_sha256) {
            return self.ask(
                now,
                Asker::Join(call),
                What::change(Some(request.into()), Change::RedeemToken(*redeem)),
            );
        }
        let why = "this token is not known here: it was used up, has expired, or is not of this cluster; create a new one";
        self.admit(call, Err(Refusal { kind: RefusalKind::Forbidden, message: why.into() }));
    }

    pub(super) fn look_after_joins(&mut self, now: Now) {
        let late = |(id, call): (&Call, &OpenCall)| match call.kind {
            Kind::Join { deadline_ms, .. } if now.mono_ms >= deadline_ms => Some(*id),
            _ => None,
        };
        for call in self.calls.open.iter().filter_map(late).collect::<Vec<_>>() {
            self.admit(call, Err(unavailable("no coordinator leads at the moment; try again")));
        }
    }

    pub(super) fn admit(&mut self, call: Call, result: Result<Outcome, Refusal>) {
        let Some(OpenCall { kind: Kind::Join { redeem, .. }, .. }) = self.calls.remove(call) else { return };
        let result = result.and_then(|outcome| match outcome {
            // The answer to a request that was sent before, by somebody who was cut off since: nobody's certificate, and no CA's key, is
            // given out again.
            Outcome::Answer(Answer::Redeemed { member }) if self.is_revoked(member) => Err(Refusal {
                kind: RefusalKind::Forbidden,
                message: format!("{member} was cut off; join again with a new token"),
            }),
            Outcome::Answer(Answer::Redeemed { member }) => Ok(Admission {
                member,
                name: match member {
                    Member::Worker(node) => self.replica.state().node_name(node),
                    Member::Client(_) | Member::Coordinator(_) => clean_name(&redeem.name, member),
                },
            }),
            Outcome::Answer(answer) => Err(refusal_in(answer)),
            Outcome::Reply(reply) => Err(misfit(&reply)),
        });
        self.out.push(Action::Joined { call, result });
    }

    pub(super) fn take_change(
        &mut self,
        now: Now,
        call: Call,
        request: Stamp,
        by: Option<UserId>,
        change: Change,
    ) {
        let open = OpenCall { caller: None, kind: Kind::Once };
        let may = |state: &State| by.map_or(Ok(()), |user| state.may_change(user, &change));
        let opened = self.is_serving().and_then(|()| may(self.replica.state()));
        match opened.and_then(|()| self.calls.insert(call, open)) {
            Ok(()) => self.ask(now, Asker::Driver(call), What::by(by, request, change)),
            Err(refusal) => self.out.push(Action::Proposed { call, result: Err(refusal) }),
        }
    }

    /// Whether this is a client with an operator's right, as far as is known here. Everybody who is connected here is known here.
    pub fn is_admin(&self, caller: Member) -> bool {
        self.replica.state().is_admin(caller)
    }

    pub(super) fn take_look(&mut self, call: Call) {
        let open = OpenCall { caller: None, kind: Kind::Look };
        match self.is_serving().and_then(|()| self.calls.insert(call, open)) {
            Ok(()) => self.reads.add(Reader::Look(call)),
            Err(refusal) => self.out.push(Action::Looked { call, result: Err(refusal) }),
        }
    }

    pub(super) fn looked(&mut self, call: Call, result: Result<(), Refusal>) {
        if self.calls.remove(call).is_some() {
            self.out.push(Action::Looked { call, result });
        }
    }

    pub(super) fn tell_driver(&mut self, call: Call, result: Result<Outcome, Refusal>) {
        if self.calls.remove(call).is_none() {
            return;
        }
        let result = result.and_then(|outcome| match outcome {
            Outcome::Answer(Answer::Rejected(refusal)) => Err(refusal),
            Outcome::Answer(answer) => Ok(answer),
            Outcome::Reply(reply) => Err(misfit(&reply)),
        });
        self.out.push(Action::Proposed { call, result });
    }

    pub(super) fn reply_to_client(&mut self, call: Call, result: Result<Outcome, Refusal>) {
        if self.calls.remove(call).is_none() {
            return;
        }
        let reply = match result {
            Ok(Outcome::Answer(answer)) => requests::reply(answer).unwrap_or_else(Reply::Refused),
            Ok(Outcome::Reply(reply)) => *reply,
            Err(refusal) => Reply::Refused(refusal),
        };
        self.out.push(Action::Reply { call, reply });
    }

    /// Answers everybody who waits: this coordinator serves nobody any more.
    pub(super) fn refuse_all(&mut self, why: &str) {
        for call in self.calls.ids() {
            let Some(open) = self.calls.remove(call) else { continue };
            // A change may be in the log already.
            let refusal = match open.kind {
                Kind::Change(_) => undecided(why),
                Kind::Once if open.caller.is_none() => undecided(why),
                _ => unavailable(why),
            };
            self.out.push(match open.kind {
                Kind::Join { .. } => Action::Joined { call, result: Err(refusal) },
                Kind::Look => Action::Looked { call, result: Err(refusal) },
                _ if open.caller.is_none() => Action::Proposed { call, result: Err(refusal) },
                _ => Action::Reply { call, reply: Reply::Refused(refusal) },
            });
        }
    }
}

/// What the frame of a change says of it.
pub fn stamp(frame: &ClientFrame) -> Stamp {
    let id = RequestId { client: frame.client, seq: frame.seq };
    Stamp { id, answered_below: frame.answered_below, since: frame.since }
}

/// Who is asking, where it is a user.
fn user(caller: Member) -> Option<UserId> {
    match caller {
        Member::Client(user) => Some(user),
        Member::Worker(_) | Member::Coordinator(_) => None,
    }
}

/// Why an answer is none of those that were expected.
fn refusal_in(answer: Answer) -> Refusal {
    match answer {
        Answer::Rejected(refusal) => refusal,
        other => misfit(&other),
    }
}

fn misfit(answer: &impl std::fmt::Debug) -> Refusal {
    undecided(format!("the cluster gave an answer that does not fit: {answer:?}"))
}
