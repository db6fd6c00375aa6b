//! The cluster's state machine: what fleet has decided, as a function of the commands in the log.
//!
//! Pure. It never reads a clock, a random number or a file, and never iterates a hash map: two replicas that apply the same log
//! hold equal states. A refused command is an `Answer::Rejected`, not an error.

pub mod admitted;
pub mod authorities;
pub mod checkpoints;
pub mod commands;
pub mod ends;
pub mod epochs;
pub mod fit;
pub mod history;
pub mod jobs;
pub mod meeting;
pub mod members;
pub mod orders;
pub mod records;
pub mod retention;
pub mod runs;
pub mod session;
pub mod submissions;
pub mod superseded;
pub mod tally;

use admitted::Admitted;
use authorities::Cas;
use checkpoints::Resumed;
use commands::Change;
use epochs::Epochs;
use fleet_common::ids::{ExportId, JobId, NodeId, ProfileId, ReplicaId, RunId, UserId};
use fleet_common::protocol::{Member, Refusal, RefusalKind, Superseded, Work};
use history::{Decision, HistoryRow};
use members::{NodeRecord, ReplicaRecord, TokenRecord, UserRecord};
use records::JobRecord;
use retention::{Removal, Retention};
use runs::RunRecord;
use serde::{Deserialize, Serialize};
use session::{Lookup, RequestId, Sessions, Stamp};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use submissions::Submissions;

/// All that the cluster has decided. Invariants: the slots of a node are never promised twice; a job that is final has no work,
/// a finish time, and a `Finished` event as the last of its history; ids are never reused.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct State {
    cluster_id: String,
    epochs: Epochs,
    replicas: BTreeMap<ReplicaId, ReplicaRecord>,
    nodes: BTreeMap<NodeId, NodeRecord>,
    users: BTreeMap<UserId, UserRecord>,
    /// Whom certificates are held against.
    admitted: BTreeMap<Member, Admitted>,
    cas: Cas,
    /// Cut off for ever. A coordinator that was taken out is one of them.
    revoked: BTreeSet<Member>,
    /// The unfinished ones and those that ended last.
    jobs: BTreeMap<JobId, JobRecord>,
    /// Jobs that have ended and are still in `jobs`, in the order of their ends.
    finished: VecDeque<JobId>,
    /// Checkpoints that training jobs left which are not in `jobs` any more: step and hash of the manifest.
    archived: BTreeMap<JobId, Vec<(u64, String)>>,
    /// Checkpoints that nodes need not keep and have not removed yet, oldest first.
    superseded: BTreeMap<NodeId, Vec<Superseded>>,
    /// The open ones and those that ended last.
    runs: BTreeMap<RunId, RunRecord>,
    finished_runs: VecDeque<RunId>,
    tokens: BTreeMap<String, TokenRecord>,
    sessions: Sessions,
    submissions: Submissions,
    retention: Retention,
    last_replica: u64,
    last_node: u64,
    last_user: u64,
    last_job: u64,
    last_run: u64,
    last_export: u64,
    last_profile: u64,
    last_decision: u64,
}

/// One entry of the log: a change, when its proposer made it, and whose request it is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Command {
    /// The proposer's wall clock, milliseconds since 1970.
    pub unix_ms: u64,
    /// Set for clients' requests, which may arrive more than once.
    pub request: Option<Stamp>,
    /// The user who asked for it, where one did: he must be let do it when it is applied.
    pub by: Option<UserId>,
    /// Why the planner wants it. Kept in the history if the change is made.
    pub why: Option<String>,
    pub change: Change,
}

/// What came of a command.
#[derive(Clone, Debug, PartialEq)]
pub struct Applied {
    pub answer: Answer,
    pub effects: Vec<Effect>,
    pub history: Vec<HistoryRow>,
    /// Rows of earlier commands that are not kept any more.
    pub removed: Vec<Removal>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    Done,
    Submitted {
        job: JobId,
    },
    TokenCreated {
        id: String,
    },
    /// The holder of the token may have a certificate as this new member.
    Redeemed {
        member: Member,
    },
    /// All events up to `seq` are recorded, or belong to a generation that is over.
    EventsTaken {
        seq: u64,
    },
    /// Nothing was recorded: events from `next_seq` on are missing.
    EventsGap {
        next_seq: u64,
    },
    RunStarted {
        run: RunId,
    },
    ExportRecorded {
        export: ExportId,
    },
    ProfileRecorded {
        profile: ProfileId,
    },
    Rejected(Refusal),
}

/// A wake-up. Losing one is harmless: everything outstanding follows from the state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Effect {
    /// There may be something new for the planner.
    Plan,
    /// There may be new orders for this node.
    Node(NodeId),
    /// The job has new events.
    Job(JobId),
    /// Coordinators, their addresses, revocations or CAs have changed.
    Members,
    /// There is a new member.
    Admitted(Member),
}

/// What a command sees besides the state, and where it leaves what is to be done.
pub(crate) struct Context {
    pub unix_ms: u64,
    pub effects: Vec<Effect>,
    pub history: Vec<HistoryRow>,
    pub removed: Vec<Removal>,
    /// Bytes of what was added to the history.
    pub kept: u64,
    /// Checkpoints that are not recorded any more, where they lie on nodes that their job has left.
    pub superseded: Vec<Resumed>,
}

impl Context {
    fn new(unix_ms: u64) -> Context {
        Context {
            unix_ms,
            effects: Vec::new(),
            history: Vec::new(),
            removed: Vec::new(),
            kept: 0,
            superseded: Vec::new(),
        }
    }
}

impl State {
    pub fn new(cluster_id: String) -> Self {
        State {
            cluster_id,
            epochs: Epochs::default(),
            replicas: BTreeMap::new(),
            nodes: BTreeMap::new(),
            users: BTreeMap::new(),
            admitted: BTreeMap::new(),
            cas: Cas::default(),
            revoked: BTreeSet::new(),
            jobs: BTreeMap::new(),
            finished: VecDeque::new(),
            archived: BTreeMap::new(),
            superseded: BTreeMap::new(),
            runs: BTreeMap::new(),
            finished_runs: VecDeque::new(),
            tokens: BTreeMap::new(),
            sessions: Sessions::default(),
            submissions: Submissions::default(),
            retention: Retention::default(),
            last_replica: 0,
            last_node: 0,
            last_user: 0,
            last_job: 0,
            last_run: 0,
            last_export: 0,
            last_profile: 0,
            last_decision: 0,
        }
    }

    /// The entry at this position, with or without a command, is of this term. Comes before the command is applied.
    pub fn reach(&mut self, index: u64, term: u64) {
        self.epochs.note(index, term);
    }

    /// For tests that compare what was decided, over elections.
    #[cfg(test)]
    pub fn without_epochs(&self) -> State {
        let mut state = self.clone();
        state.epochs.forget();
        state
    }

    /// What it knows of the terms of the log.
    pub fn epochs(&self) -> &Epochs {
        &self.epochs
    }

    /// Applies the command at position `index` of the log. A request that was applied before gets its earlier answer and changes
    /// nothing.
    pub fn apply(&mut self, index: u64, command: Command) -> Applied {
        let mut context = Context::new(command.unix_ms);
        let answer = match command.request.map(|stamp| self.sessions.look_up(&stamp)) {
            Some(Lookup::Answered(answer)) => answer,
            Some(Lookup::Forgotten) => Answer::rejected(
                RefusalKind::Forgotten,
                "the cluster does not remember this request any more, so it may or may not have been done",
            ),
            Some(Lookup::Crowded) => Answer::rejected(
                RefusalKind::Unavailable,
                "this client has more changes under way than it may; wait for the answers to the first ones",
            ),
            Some(Lookup::New) | None => {
                let may = command.by.map_or(Ok(()), |user| self.may_change(user, &command.change));
                let answer = match may {
                    Ok(()) => command.change.apply(self, &mut context),
                    Err(refusal) => Answer::Rejected(refusal),
                };
                if let Some(why) = command.why.filter(|_| !matches!(answer, Answer::Rejected(_))) {
                    self.decided(command.unix_ms, &why, &mut context);
                }
                if let Some(stamp) = command.request {
                    self.sessions.remember(&stamp, answer.clone(), index);
                }
                answer
            }
        };
        let superseded = std::mem::take(&mut context.superseded);
        self.supersede(superseded, &mut context);
        self.sessions.expire(index);
        self.retention.added(context.kept);
        Applied { answer, effects: context.effects, history: context.history, removed: context.removed }
    }

    /// Whether this request was applied, and its client may not know.
    pub fn has_answered(&self, request: RequestId) -> bool {
        self.sessions.has_answered(request)
    }

    /// Keeps the reason of what was done.
    fn decided(&mut self, unix_ms: u64, why: &str, context: &mut Context) {
        self.last_decision += 1;
        let why = why.chars().take(history::WHY_MAX).collect();
        let (number, decision) = (self.last_decision, Decision { unix_ms, why });
        let bytes = context.keep(HistoryRow::Decision { number, decision });
        self.retention.decided(number, bytes, unix_ms);
    }

    /// As a backup has it: of the secrets in the environments of jobs only the names.
    pub fn without_secrets(mut self) -> State {
        for job in self.jobs.values_mut() {
            job.work = job.work.take().map(Work::without_secrets);
        }
        self
    }

    /// Decisions so far; they are numbered from 1.
    pub fn last_decision(&self) -> u64 {
        self.last_decision
    }

    pub fn cluster_id(&self) -> &str {
        &self.cluster_id
    }
}

impl Answer {
    pub(crate) fn rejected(kind: RefusalKind, message: impl Into<String>) -> Answer {
        Answer::Rejected(Refusal { kind, message: message.into() })
    }

    pub(crate) fn invalid(message: impl Into<String>) -> Answer {
        Answer::rejected(RefusalKind::Invalid, message)
    }

    pub(crate) fn not_found(message: impl Into<String>) -> Answer {
        Answer::rejected(RefusalKind::NotFound, message)
    }

    pub(crate) fn forbidden(message: impl Into<String>) -> Answer {
        Answer::rejected(RefusalKind::Forbidden, message)
    }

    /// The cluster is at one of its limits; the same may be granted when it is not.
    pub(crate) fn later(message: impl Into<String>) -> Answer {
        Answer::rejected(RefusalKind::Later, message)
    }
}

#[cfg(test)]
mod properties;
#[cfg(test)]
pub(crate) mod tests;
