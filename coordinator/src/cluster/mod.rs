//! The cluster's state machine: what fleet has decided, as a function of the commands in the log.
//!
//! Pure. It never reads a clock, a random number or a file, and never iterates a hash map: two replicas that apply the same log
//! hold equal states. A refused command is an `Answer::Rejected`, not an error.

pub mod commands;
pub mod history;
pub mod members;
pub mod orders;
pub mod records;
pub mod session;

use commands::Change;
use fleet_common::ids::{JobId, NodeId, ReplicaId, UserId};
use fleet_common::protocol::{JobState, Member, Refusal, RefusalKind};
use history::{Decision, HistoryRow};
use members::{NodeRecord, ReplicaRecord, TokenRecord, UserRecord};
use records::JobRecord;
use serde::{Deserialize, Serialize};
use session::{Lookup, RequestId, Sessions};
use std::collections::{BTreeMap, BTreeSet};

/// All that the cluster has decided. Invariants: the slots of a node are never promised twice; a job that is final has no work,
/// a finish time, and a `Finished` event as the last of its history; ids are never reused.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct State {
    cluster_id: String,
    replicas: BTreeMap<ReplicaId, ReplicaRecord>,
    nodes: BTreeMap<NodeId, NodeRecord>,
    users: BTreeMap<UserId, UserRecord>,
    /// Cut off for ever. A coordinator that was taken out is one of them.
    revoked: BTreeSet<Member>,
    jobs: BTreeMap<JobId, JobRecord>,
    tokens: BTreeMap<String, TokenRecord>,
    sessions: Sessions,
    last_replica: u64,
    last_node: u64,
    last_user: u64,
    last_job: u64,
}

/// One entry of the log: a change, when its proposer made it, and whose request it is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Command {
    /// The proposer's wall clock, milliseconds since 1970.
    pub unix_ms: u64,
    /// Set for clients' requests, which may arrive more than once.
    pub request: Option<RequestId>,
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
    /// Coordinators, their addresses or revocations have changed.
    Members,
}

/// What a command sees besides the state, and where it leaves what is to be done.
pub(crate) struct Context {
    pub unix_ms: u64,
    pub effects: Vec<Effect>,
    pub history: Vec<HistoryRow>,
}

impl State {
    pub fn new(cluster_id: String) -> Self {
        State {
            cluster_id,
            replicas: BTreeMap::new(),
            nodes: BTreeMap::new(),
            users: BTreeMap::new(),
            revoked: BTreeSet::new(),
            jobs: BTreeMap::new(),
            tokens: BTreeMap::new(),
            sessions: Sessions::default(),
            last_replica: 0,
            last_node: 0,
            last_user: 0,
            last_job: 0,
        }
    }

    /// Applies the command at position `index` of the log. A request that was applied before gets its earlier answer and changes
    /// nothing.
    pub fn apply(&mut self, index: u64, command: Command) -> Applied {
        let mut context = Context { unix_ms: command.unix_ms, effects: Vec::new(), history: Vec::new() };
        let answer = match command.request.map(|request| self.sessions.look_up(request)) {
            Some(Lookup::Answered(answer)) => answer,
            Some(Lookup::Forgotten) => Answer::invalid(
                "this request is older than what the cluster remembers of its client; send it with a new sequence number",
            ),
            Some(Lookup::New) | None => {
                let answer = command.change.apply(self, &mut context);
                if let Some(why) = command.why.filter(|_| !matches!(answer, Answer::Rejected(_))) {
                    context.history.push(HistoryRow::Decision {
                        index,
                        decision: Decision {
                            unix_ms: command.unix_ms,
                            why: why.chars().take(history::WHY_MAX).collect(),
                        },
                    });
                }
                if let Some(request) = command.request {
                    self.sessions.remember(request, answer.clone(), index);
                }
                answer
            }
        };
        self.sessions.expire(index);
        Applied { answer, effects: context.effects, history: context.history }
    }

    pub fn cluster_id(&self) -> &str {
        &self.cluster_id
    }

    pub fn jobs(&self) -> &BTreeMap<JobId, JobRecord> {
        &self.jobs
    }

    /// Slots of `node` that unfinished jobs hold.
    pub fn slots_used(&self, node: NodeId) -> u32 {
        self.active_jobs(node).map(|(_, job)| job.world_size).sum()
    }

    /// Slots that unfinished jobs hold, by node.
    pub fn slots_in_use(&self) -> BTreeMap<NodeId, u32> {
        let mut used = BTreeMap::new();
        for job in self.jobs.values().filter(|job| !job.state.is_final()) {
            if let Some(at) = job.placement {
                *used.entry(at.node).or_default() += job.world_size;
            }
        }
        used
    }

    /// Unfinished jobs placed on `node`, oldest first.
    pub fn active_jobs(&self, node: NodeId) -> impl Iterator<Item = (JobId, &JobRecord)> {
        self.jobs
            .iter()
            .filter(move |(_, job)| !job.state.is_final() && job.placement.is_some_and(|at| at.node == node))
            .map(|(id, job)| (*id, job))
    }

    /// Jobs that wait for a place, oldest first.
    pub fn queued_jobs(&self) -> impl Iterator<Item = (JobId, &JobRecord)> {
        self.jobs.iter().filter(|(_, job)| job.state == JobState::Queued).map(|(id, job)| (*id, job))
    }
}

impl Answer {
    pub(crate) fn invalid(message: impl Into<String>) -> Answer {
        Answer::Rejected(Refusal { kind: RefusalKind::Invalid, message: message.into() })
    }

    pub(crate) fn not_found(message: impl Into<String>) -> Answer {
        Answer::Rejected(Refusal { kind: RefusalKind::NotFound, message: message.into() })
    }

    pub(crate) fn forbidden(message: impl Into<String>) -> Answer {
        Answer::Rejected(Refusal { kind: RefusalKind::Forbidden, message: message.into() })
    }
}

#[cfg(test)]
pub(crate) mod tests;
