//! Clients: they ask any coordinator, ask again elsewhere when it is not heard of, under the same number, and keep in mind that what
//! failed may have happened. The first of them is the operator, who lets machines and coordinators join and takes them out.

use super::jobs;
use super::net::{ConnId, Site};
use super::queue::{MS, Micros, SECOND};
use super::world::{Answered, Event, Payload, Purpose, Question, World};
use fleet_common::ids::{ClientId, ExportId, JobId, NodeId, ProfileId, ReplicaId, RunId, UserId};
use fleet_common::protocol::{ClientFrame, Member, Point, RefusalKind, Reply, Request, RunKey};
use fleet_coordinator::cluster::commands::{Change, CreateToken, RedeemToken};
use fleet_coordinator::cluster::session::RequestId;
use fleet_coordinator::raft::disk::Table;
use std::collections::{BTreeMap, VecDeque};

/// The operator's number.
pub const OPERATOR: u32 = 0;
/// For an answer; longer than a coordinator takes to give up itself.
const PATIENCE: Micros = 7 * SECOND;
/// Open runs of one client.
const RUNS_MAX: usize = 2;
/// Exports and profiles that one client looks at again.
const RECORDS_MAX: usize = 8;
/// Tries of an ordinary client before it gives up and does not know.
const TRIES: u32 = 12;

/// What is wanted.
#[derive(Clone, Debug, PartialEq)]
pub enum Want {
    Submit {
        name: String,
    },
    Cancel(JobId),
    Job(JobId),
    /// Whatever the coordinator that is asked knows of it.
    OldJob(JobId),
    Jobs,
    Nodes,
    Status,
    Watch {
        job: JobId,
        seen: u64,
    },
    Drain(NodeId),
    Undrain(NodeId),
    StartRun {
        name: String,
    },
    /// One more point of a run that nobody else writes.
    Record(RunId),
    Run(RunId),
    FinishRun(RunId),
    /// Of a checkpoint.
    Export(JobId, u64),
    /// One that was acknowledged to this client, with what it is of.
    OwnExport(ExportId, JobId, u64),
    Profile(RunId),
    OwnProfile(ProfileId, RunId),
    /// For those who join.
    Token,
    JoinMachine(u32),
    JoinHost(u32),
    /// Takes a coordinator out, however often it has to be asked for.
    Remove(ReplicaId),
    /// Cuts a machine's node off.
    Revoke(u32),
}

impl Want {
    fn is_read(&self) -> bool {
        matches!(
            self,
            Want::Job(_)
                | Want::OldJob(_)
                | Want::Jobs
                | Want::Nodes
                | Want::Status
                | Want::Run(_)
                | Want::OwnExport(..)
                | Want::OwnProfile(..)
                | Want::Watch { .. }
        )
    }
}

struct Pending {
    want: Want,
    question: Question,
    /// When this try began.
    asked: Micros,
    tries: u32,
    conn: Option<ConnId>,
    /// An answer came already, and the same question is asked again to see that nothing happens twice.
    again: Option<JobId>,
}

pub struct Client {
    id: ClientId,
    user: UserId,
    seq: u64,
    pending: Option<Pending>,
    tasks: VecDeque<(Want, Question)>,
    think: Micros,
    /// Its open runs: how many points it asked to record, and how many were acknowledged.
    runs: BTreeMap<RunId, (u64, u64)>,
    /// The newest that were acknowledged, as questions for them.
    records: VecDeque<(Want, Request)>,
}

impl Client {
    pub fn new(number: u32, think: Micros) -> Client {
        let (id, user) = (ClientId(0xC11E_0000 + u128::from(number)), UserId(u64::from(number) + 1));
        Client {
            id,
            user,
            seq: 0,
            pending: None,
            tasks: VecDeque::new(),
            think,
            runs: BTreeMap::new(),
            records: VecDeque::new(),
        }
    }

    fn frame(&mut self, request: Request) -> Question {
        self.seq += 1;
        let frame = ClientFrame::change(self.id, self.seq, request);
        Question::Client { caller: Member::Client(self.user), frame }
    }

    /// Will look at this again.
    fn remember(&mut self, want: Want, question: Request) {
        if self.records.len() == RECORDS_MAX {
            self.records.pop_front();
        }
        self.records.push_back((want, question));
    }

    pub fn is_idle(&self) -> bool {
        self.pending.is_none() && self.tasks.is_empty()
    }
}

impl World {
    /// The operator does this when it comes to it.
    fn order(&mut self, want: Want, question: impl FnOnce(RequestId) -> Question) {
        let Some(operator) = self.clients.get_mut(&OPERATOR) else { return };
        operator.seq += 1;
        let request = RequestId { client: operator.id, seq: operator.seq };
        operator.tasks.push_back((want, question(request)));
        self.queue.after(0, Event::ClientNext { client: OPERATOR });
    }

    pub fn order_request(&mut self, want: Want, request: Request) {
        let Some(operator) = self.clients.get_mut(&OPERATOR) else { return };
        let question = operator.frame(request);
        operator.tasks.push_back((want, question));
        self.queue.after(0, Event::ClientNext { client: OPERATOR });
    }

    /// All nodes may have work again.
    pub fn order_undrain(&mut self) {
        let nodes: Vec<NodeId> = self.oracle.state().nodes().keys().copied().collect();
        nodes.into_iter().for_each(|node| self.order_request(Want::Undrain(node), Request::Undrain(node)));
    }

    /// A drain that somebody wanted before all faults ended came late.
    fn undrain_in_the_calm(&mut self, want: &Want) {
        if let Want::Drain(node) = *want
            && self.calm
        {
            self.order_request(Want::Undrain(node), Request::Undrain(node));
        }
    }

    pub fn order_cancel(&mut self, job: JobId) {
        self.order_request(Want::Cancel(job), Request::Cancel { job, now: false });
    }

    /// The node's jobs go back to the queue at once.
    pub fn order_drain(&mut self, node: NodeId) {
        self.order_request(Want::Drain(node), Request::Drain { node, now: true });
    }

    pub fn order_join(&mut self, want: Want, redeem: RedeemToken) {
        self.order(want, |request| Question::Join { redeem, request });
    }

    pub fn order_token(&mut self, token: CreateToken) {
        let change = Change::CreateToken(token);
        self.order(Want::Token, |request| Question::Propose { request, change });
    }

    pub fn order_revocation(&mut self, machine: u32, node: NodeId) {
        self.order_request(Want::Revoke(machine), Request::Revoke(Member::Worker(node)));
    }

    pub fn order_removal(&mut self, replica: ReplicaId) {
        self.order_request(Want::Remove(replica), Request::RemoveCoordinator(replica));
    }

    pub fn on_client_next(&mut self, number: u32) {
        let now = self.queue.now();
        let idle = self.clients.get(&number).is_some_and(|client| client.pending.is_none());
        if !idle {
            return;
        }
        let next = match self.clients.get_mut(&number) {
            Some(client) if number == OPERATOR => client.tasks.pop_front(),
            Some(_) if self.calm => None,
            _ => self.choose(number),
        };
        let Some((want, question)) = next else { return };
        let pending = Pending { want, question, asked: now, tries: 0, conn: None, again: None };
        if let Some(client) = self.clients.get_mut(&number) {
            client.pending = Some(pending);
        }
        self.ask(number);
    }

    fn choose(&mut self, number: u32) -> Option<(Want, Question)> {
        let jobs: Vec<JobId> = self.oracle.state().jobs().keys().copied().collect();
        let unfinished = self.oracle.unfinished();
        // Mostly jobs on which something happens.
        let of_interest =
            if self.random.chance(3, 4) && !unfinished.is_empty() { &unfinished } else { &jobs };
        let job = self.random.pick(of_interest).copied();
        let draw = self.random.range(0..100);
        let many = unfinished.len() >= 8;
        let nodes: Vec<NodeId> = self.oracle.state().nodes().keys().copied().collect();
        let client = self.clients.get_mut(&number)?;
        let runs: Vec<RunId> = client.runs.keys().copied().collect();
        let run = self.random.pick(&runs).copied();
        let saved =
            job.and_then(|job| Some((job, self.oracle.state().jobs()[&job].checkpoints.last()?.record.step)));
        let record = client.records.get(self.random.index(client.records.len().max(1))).cloned();
        let (want, request) = match (draw, job) {
            (0..6, _) if !many => {
                let name = format!("c{number}-{}", client.seq + 1);
                (Want::Submit { name: name.clone() }, jobs::submit(&name, &mut self.random, &self.machines))
            }
            (6..8, Some(job)) => {
                let now = self.random.chance(1, 2);
                (Want::Cancel(job), Request::Cancel { job, now })
            }
            (8..9, _) if !nodes.is_empty() => {
                let node = nodes[self.random.index(nodes.len())];
                (Want::Drain(node), Request::Drain { node, now: self.random.chance(1, 2) })
            }
            (9..11, _) if !nodes.is_empty() => {
                let node = nodes[self.random.index(nodes.len())];
                (Want::Undrain(node), Request::Undrain(node))
            }
            (11..50, Some(job)) => (Want::Job(job), Request::Job(job)),
            (50..60, Some(job)) => (Want::OldJob(job), Request::Job(job)),
            (60..75, _) => (Want::Jobs, Request::Jobs { all: None }),
            (75..79, _) => (Want::Nodes, Request::Nodes),
            (79..80, _) if saved.is_some() => {
                let (job, step) = saved?;
                (Want::Export(job, step), Request::RecordExport(jobs::export(job, step)))
            }
            (80..81, _) if run.is_some() => {
                (Want::Profile(run?), Request::RecordProfile(jobs::profile(RunKey::Own(run?))))
            }
            (81..82, _) if record.is_some() => record?,
            (82..90, Some(job)) => {
                (Want::Watch { job, seen: 0 }, Request::Watch { job, from: 1, follow: false })
            }
            (90..91, _) if runs.len() < RUNS_MAX => {
                let name = format!("c{number}-{}", client.seq + 1);
                (Want::StartRun { name: name.clone() }, Request::StartRun { name })
            }
            (91..96, _) if run.is_some() => {
                let run = run?;
                let (asked, _) = client.runs.get_mut(&run)?;
                *asked += 1;
                let (step, value) = (*asked, *asked as f64);
                let points = vec![Point { series: "n".into(), step, value, unix_ms: step }];
                (Want::Record(run), Request::RecordMetrics { run, points })
            }
            (96..98, _) if run.is_some() => (Want::Run(run?), Request::Run(RunKey::Own(run?))),
            (98..99, _) if runs.len() == RUNS_MAX => {
                (Want::FinishRun(run?), Request::FinishRun { run: run?, succeeded: true })
            }
            _ => (Want::Status, Request::ClusterStatus),
        };
        let mut question = client.frame(request);
        if let (Want::OldJob(_), Question::Client { frame, .. }) = (&want, &mut question) {
            frame.stale = true;
        }
        Some((want, question))
    }

    /// Tries the pending question at any coordinator.
    fn ask(&mut self, number: u32) {
        let now = self.queue.now();
        let targets: Vec<u32> = self.addresses.values().copied().collect();
        let target = self.random.pick(&targets).copied();
        let site = Site::Client(number);
        let connected = target.and_then(|to| self.net.connect(site, Site::Host(to), now, &mut self.random));
        let Some(pending) = self.clients.get_mut(&number).and_then(|client| client.pending.as_mut()) else {
            return;
        };
        pending.asked = now;
        pending.tries += 1;
        let tries = pending.tries;
        if let Want::Watch { seen, .. } = &mut pending.want {
            *seen = 0;
        }
        if let Some(old) = pending.conn.take() {
            self.net.close(old, 0);
        }
        match connected {
            Some((conn, at)) => {
                pending.conn = Some(conn);
                self.purposes.insert(conn, Purpose::Call);
                self.queue.at(at[0], Event::Connected { conn, end: 0 });
                self.queue.after(PATIENCE, Event::ClientRetry { client: number, tries });
            }
            None => self.queue.after(SECOND, Event::ClientRetry { client: number, tries }),
        }
    }

    pub fn client_connected(&mut self, number: u32, conn: ConnId) {
        let pending = self.clients.get(&number).and_then(|client| client.pending.as_ref());
        if let Some(pending) = pending.filter(|pending| pending.conn == Some(conn)) {
            let question = pending.question.clone();
            self.send(conn, 0, Payload::Question(question), 500);
        }
    }

    pub fn client_loses(&mut self, number: u32, conn: ConnId) {
        let pending = self.clients.get(&number).and_then(|client| client.pending.as_ref());
        if let Some(pending) = pending.filter(|pending| pending.conn == Some(conn)) {
            let tries = pending.tries;
            self.queue.after(10 * MS, Event::ClientRetry { client: number, tries });
        }
    }

    pub fn on_client_retry(&mut self, number: u32, tries: u32) {
        let pending = self.clients.get(&number).and_then(|client| client.pending.as_ref());
        let Some(pending) = pending.filter(|pending| pending.tries == tries) else { return };
        if number != OPERATOR && (tries >= TRIES || pending.want.is_read() && self.calm) {
            let want = pending.want.clone();
            self.say(format_args!("client-{number} gives up {want:?}"));
            self.undrain_in_the_calm(&want);
            self.finish_call(number);
        } else {
            self.ask(number);
        }
    }

    fn finish_call(&mut self, number: u32) {
        let Some(client) = self.clients.get_mut(&number) else { return };
        if let Some(conn) = client.pending.take().and_then(|pending| pending.conn) {
            self.net.close(conn, 0);
        }
        let think = if number == OPERATOR { 10 * MS } else { self.random.around(client.think) };
        self.queue.after(think, Event::ClientNext { client: number });
    }

    pub fn client_hears(&mut self, number: u32, conn: ConnId, answered: Answered) {
        let now = self.queue.now();
        let pending = self.clients.get_mut(&number).and_then(|client| client.pending.as_mut());
        let Some(pending) = pending.filter(|pending| pending.conn == Some(conn)) else { return };
        let (asked, tries) = (pending.asked, pending.tries);
        let refused = match &answered {
            Answered::Reply(Reply::Refused(refusal)) => Some(refusal.clone()),
            Answered::Joined(Err(refusal)) | Answered::Proposed(Err(refusal)) => Some(refusal.clone()),
            _ => None,
        };
        if refused.as_ref().is_some_and(|refusal| refusal.kind.is_passing()) {
            pending.conn = None;
            self.net.close(conn, 0);
            let wait = self.random.range(50 * MS..SECOND);
            self.queue.after(wait, Event::ClientRetry { client: number, tries });
            return;
        }
        let want = pending.want.clone();
        let again = pending.again;
        let verdict = match (&want, answered) {
            (Want::Submit { name }, Answered::Reply(Reply::Submitted { job })) => {
                if again.is_some_and(|known| known != job) {
                    Err(format!("`{name}` was acknowledged twice, as {again:?} and as {job}"))
                } else {
                    let verdict = self.oracle.submitted(name, job, now);
                    self.say(format_args!("client-{number} has {job} for `{name}`"));
                    if verdict.is_ok() && again.is_none() && self.random.chance(1, 6) {
                        if let Some(pending) =
                            self.clients.get_mut(&number).and_then(|client| client.pending.as_mut())
                        {
                            pending.again = Some(job);
                        }
                        self.ask(number);
                        return;
                    }
                    verdict
                }
            }
            (Want::Cancel(job), Answered::Reply(Reply::Done)) => self.oracle.cancelled(*job, now),
            (Want::OldJob(job), Answered::Reply(Reply::Job(view))) => {
                self.oracle.shown(*job, Some(&view), 0, now)
            }
            (Want::StartRun { name }, Answered::Reply(Reply::RunStarted(run))) => {
                let (name, run) = (name.clone(), run);
                if let Some(client) = self.clients.get_mut(&number) {
                    client.runs.insert(run, (0, 0));
                }
                self.oracle.run_started(&name, run)
            }
            (Want::Record(run), Answered::Reply(Reply::Done)) => {
                let run = *run;
                let known = self.clients.get_mut(&number).and_then(|client| client.runs.get_mut(&run));
                let least = known.map_or(0, |(_, acknowledged)| {
                    *acknowledged += 1;
                    *acknowledged
                });
                self.oracle.recorded_points(run, least)
            }
            (Want::Run(run), Answered::Reply(Reply::Run(view))) => {
                let known = self.clients.get(&number).and_then(|client| client.runs.get(run));
                let (most, least) = known.copied().unwrap_or_default();
                match (least..=most).contains(&view.points) {
                    true => Ok(()),
                    false => Err(format!(
                        "{run} was shown with {} points to who recorded {least} and tried {most}",
                        view.points
                    )),
                }
            }
            (Want::FinishRun(run), Answered::Reply(Reply::Done)) => {
                let run = *run;
                if let Some(client) = self.clients.get_mut(&number) {
                    client.runs.remove(&run);
                }
                Ok(())
            }
            (Want::Export(job, step), Answered::Reply(Reply::ExportRecorded(export))) => {
                let (job, step) = (*job, *step);
                if let Some(client) = self.clients.get_mut(&number) {
                    client.remember(Want::OwnExport(export, job, step), Request::Export(export));
                }
                self.oracle.export_recorded(export, job, step)
            }
            (Want::Profile(run), Answered::Reply(Reply::ProfileRecorded(profile))) => {
                let run = *run;
                if let Some(client) = self.clients.get_mut(&number) {
                    client.remember(Want::OwnProfile(profile, run), Request::Profile(profile));
                }
                self.oracle.profile_recorded(profile, run)
            }
            (Want::OwnExport(export, job, step), Answered::Reply(reply)) => match &reply {
                Reply::Export(view) if (view.record.job, view.record.step) == (*job, *step) => Ok(()),
                Reply::Refused(_) if self.oracle.is_removed(Table::Exports, export.0) => Ok(()),
                _ => Err(format!("{export} of {job} at step {step} was acknowledged and shown as {reply:?}")),
            },
            (Want::OwnProfile(profile, run), Answered::Reply(reply)) => match &reply {
                Reply::Profile(view) if view.record.run == RunKey::Own(*run) => Ok(()),
                Reply::Refused(_) if self.oracle.is_removed(Table::Profiles, profile.0) => Ok(()),
                _ => Err(format!("{profile} of {run} was acknowledged and shown as {reply:?}")),
            },
            (Want::Drain(node) | Want::Undrain(node), Answered::Reply(Reply::Done)) => {
                let node = *node;
                self.say(format_args!("client-{number} has done {want:?}"));
                self.undrain_in_the_calm(&want);
                self.oracle.drained(node, now)
            }
            (Want::Nodes, Answered::Reply(Reply::Nodes(views))) => {
                views.iter().try_for_each(|view| self.oracle.node_shown(view.node, view.drained, asked))
            }
            (Want::Job(job), Answered::Reply(Reply::Job(view))) => {
                self.oracle.shown(*job, Some(&view), asked, now)
            }
            (Want::Jobs, Answered::Reply(Reply::Jobs(views))) => {
                views.items.iter().try_for_each(|view| self.oracle.shown(view.job, Some(view), asked, now))
            }
            (Want::Watch { job, seen }, Answered::Reply(Reply::Event { index, .. })) => {
                let (job, seen) = (*job, *seen);
                if index != seen + 1 {
                    Err(format!("a watch of {job} showed event {index} after {seen}"))
                } else {
                    if let Some(pending) =
                        self.clients.get_mut(&number).and_then(|client| client.pending.as_mut())
                    {
                        pending.want = Want::Watch { job, seen: index };
                    }
                    return;
                }
            }
            (Want::Watch { job, seen }, Answered::Reply(Reply::EndOfEvents)) => {
                self.oracle.watched(*job, *seen, asked)
            }
            (Want::Job(job), Answered::Reply(Reply::Refused(refusal)))
                if refusal.kind == RefusalKind::NotFound =>
            {
                self.oracle.shown(*job, None, asked, now)
            }
            (Want::JoinMachine(machine), Answered::Joined(Ok(admission))) => {
                let (machine, member) = (*machine, admission.member);
                self.machine_joined(machine, member);
                Ok(())
            }
            (Want::JoinHost(host), Answered::Joined(Ok(admission))) => {
                let (host, member) = (*host, admission.member);
                self.host_joined(host, member);
                Ok(())
            }
            (Want::Remove(replica), Answered::Reply(reply)) => {
                let replica = *replica;
                let rejected = match reply {
                    Reply::Refused(refusal) => Some(refusal.message),
                    _ => None,
                };
                self.removal_answered(replica, rejected);
                Ok(())
            }
            (Want::Revoke(machine), Answered::Reply(Reply::Done)) => {
                let machine = *machine;
                self.machine_revoked(machine);
                Ok(())
            }
            (want, answered) => {
                if let Some(refusal) = refused {
                    self.say(format_args!("client-{number} is refused {want:?}: {}", refusal.message));
                } else if !want.is_read() {
                    self.say(format_args!("client-{number} has {answered:?} for {want:?}"));
                }
                Ok(())
            }
        };
        if let Err(what) = verdict {
            self.violated(what);
        }
        self.finish_call(number);
    }
}
