//! What clients ask and what they are answered.

use super::environment::*;
use super::output::OutputPiece;
use super::records::*;
use super::views::*;
use super::{CoordinatorAddress, Member, PROTOCOL_VERSION, Role};
use crate::codec::{self, Versioned};
use crate::events::Event;
use crate::ids::{ClientId, ExportId, JobId, NodeId, ProfileId, Rank, ReplicaId, RunId};
use crate::net::Authorities;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ClientFrame {
    pub version: u32,
    /// With `seq`, makes a change happen once however often it is sent. Queries ignore all that is said of changes.
    pub client: ClientId,
    /// Rises by one with every new change; the same on a retry.
    pub seq: u64,
    /// The client has the answers to its changes below this number, or has given them up: it will not ask for them again.
    pub answered_below: u64,
    /// Where the log was before the client's first change, from `Request::Position`. Tells a new client from one that was forgotten.
    pub since: u64,
    /// A query may be answered from what this coordinator has, which may be old, without asking the others.
    pub stale: bool,
    pub request: Request,
}

impl Versioned for ClientFrame {
    fn version(bytes: &[u8]) -> Option<u32> {
        codec::head(bytes)
    }
}

impl ClientFrame {
    /// A query that sees everything which was acknowledged before it.
    pub fn query(request: Request) -> ClientFrame {
        ClientFrame {
            version: PROTOCOL_VERSION,
            client: ClientId(0),
            seq: 0,
            answered_below: 0,
            since: 0,
            stale: false,
            request,
        }
    }

    /// A change, which happens once for this client and number. Of a client that makes one after the other and began with the log; others
    /// set `answered_below` and `since`.
    pub fn change(client: ClientId, seq: u64, request: Request) -> ClientFrame {
        ClientFrame { client, seq, answered_below: seq, ..ClientFrame::query(request) }
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Request {
    Submit(SubmitJob),
    /// The first stops with a checkpoint, `now` at once.
    Cancel {
        job: JobId,
        now: bool,
    },
    CreateToken {
        role: Role,
        ttl_s: u64,
        uses: u32,
    },
    ClusterStatus,
    Nodes,
    /// The unfinished jobs and the newest of the others; `Some`: all jobs there ever were, in pages.
    Jobs {
        all: Option<Page>,
    },
    Job(JobId),
    /// Of one job, or of all jobs in pages by job.
    Checkpoints {
        job: Option<JobId>,
        page: Page,
    },
    /// Where the coordinators are. The only request that a worker may make.
    Addresses,
    /// A new certificate over the same key is wanted, because the client's ends soon or the CA is another one. DER of a PKCS#10 request.
    Renew {
        csr_der: Vec<u8>,
    },
    /// The job's events from the `from`-th on (1 is the first); the stream stays open until the job's `Finished` event was sent if `follow`.
    Watch {
        job: JobId,
        from: u64,
        follow: bool,
    },
    Coordinators,
    RemoveCoordinator(ReplicaId),
    Tokens,
    RevokeToken {
        id: String,
    },
    /// Cuts a worker or a client off for ever.
    Revoke(Member),
    /// The node gets no more work. With `now` its jobs write a checkpoint and go back to the queue.
    Drain {
        node: NodeId,
        now: bool,
    },
    Undrain(NodeId),
    /// What the planner decided and why.
    Decisions(Page),
    /// One checkpoint with its shards.
    Checkpoint {
        job: JobId,
        step: u64,
    },
    StartRun {
        name: String,
    },
    /// At most `POINTS_MAX` points.
    RecordMetrics {
        run: RunId,
        points: Vec<Point>,
    },
    FinishRun {
        run: RunId,
        succeeded: bool,
    },
    Runs(Page),
    Run(RunKey),
    /// Points of a run from the `from`-th batch on (1 is the first).
    RunMetrics {
        run: RunKey,
        from: u64,
    },
    RecordExport(NewExport),
    Exports(Page),
    Export(ExportId),
    RecordProfile(NewProfile),
    Profiles(Page),
    Profile(ProfileId),
    /// How far the log is: what a client asks before its first change, to send it along as `ClientFrame::since`.
    Position,
    /// A submit under a name of the user's own. The same name with the same job is the same job, whoever asks and whenever, for as long as
    /// the name is remembered; with another job it is refused.
    SubmitOnce {
        name: String,
        job: SubmitJob,
    },
    /// Of an unfinished or finished job. With `values`, which needs a right of its own, also what the secrets are.
    Environment {
        job: JobId,
        values: bool,
    },
    /// Values of secrets of an unfinished job, by name. They count from its next start.
    GiveSecrets {
        job: JobId,
        values: Vec<(String, Secret)>,
    },
    /// Nothing but the names of an unfinished job's secrets is kept.
    RemoveSecrets(JobId),
    /// A new CA is made, which is to replace the present one.
    RotateCa,
    /// The one before is not trusted any more. With `force` also if some have not moved, who join again then.
    FinishCa {
        force: bool,
    },
    /// How far the CA's replacement is.
    Authority,
    /// A piece of what a rank of a job's last start printed, from this byte on: from the file on its node.
    Output {
        job: JobId,
        rank: Rank,
        from: u64,
    },
    /// How much of the history is kept.
    Retention,
    /// Everybody who is let in.
    Members,
    /// What is given replaces what was.
    SetRetention {
        age_s: Option<u64>,
        bytes: Option<u64>,
    },
    /// A login for the page, which lets its holder look as this client for so long, and with `operates` cancel jobs and drain nodes.
    WebLogin {
        ttl_s: u64,
        operates: bool,
    },
}

/// Changes that one client may have under way at once: as many as the streams of a connection.
pub const CHANGES_IN_FLIGHT_MAX: u64 = 256;

/// `uses` of a token that is not used up.
pub const UNLIMITED_USES: u32 = u32::MAX;

impl Request {
    /// Whether it changes anything, and so needs a number of its own.
    pub fn is_change(&self) -> bool {
        match self {
            Request::Submit(_)
            | Request::Cancel { .. }
            | Request::CreateToken { .. }
            | Request::RemoveCoordinator(_)
            | Request::RevokeToken { .. }
            | Request::Revoke(_)
            | Request::Drain { .. }
            | Request::Undrain(_)
            | Request::StartRun { .. }
            | Request::RecordMetrics { .. }
            | Request::FinishRun { .. }
            | Request::RecordExport(_)
            | Request::RecordProfile(_)
            | Request::SubmitOnce { .. }
            | Request::GiveSecrets { .. }
            | Request::RemoveSecrets(_)
            | Request::RotateCa
            | Request::FinishCa { .. }
            | Request::SetRetention { .. } => true,
            Request::ClusterStatus
            | Request::Nodes
            | Request::Jobs { .. }
            | Request::Job(_)
            | Request::Checkpoints { .. }
            | Request::Watch { .. }
            | Request::Coordinators
            | Request::Addresses
            | Request::Renew { .. }
            | Request::Tokens
            | Request::Decisions(_)
            | Request::Checkpoint { .. }
            | Request::Runs(_)
            | Request::Run(_)
            | Request::RunMetrics { .. }
            | Request::Exports(_)
            | Request::Export(_)
            | Request::Profiles(_)
            | Request::Profile(_)
            | Request::Position
            | Request::Environment { .. }
            | Request::Authority
            | Request::Output { .. }
            | Request::Retention
            | Request::Members
            | Request::WebLogin { .. } => false,
        }
    }
}

/// Part of a long list, newest first: what has a number below `before`, at most `max` items and `PAGE_MAX`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Page {
    /// `None`: from the newest on.
    pub before: Option<u64>,
    pub max: u32,
}

/// Items of one page: a page of full jobs stays far below a frame.
pub const PAGE_MAX: u32 = 200;

impl Default for Page {
    fn default() -> Self {
        Page { before: None, max: PAGE_MAX }
    }
}

/// One page, and how to ask for the next one, if there is one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Listing<T> {
    pub items: Vec<T>,
    /// For `Page::before`.
    pub next: Option<u64>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SubmitJob {
    /// Ranks to start.
    pub world_size: u32,
    pub work: Work,
    pub wish: Wish,
}

/// Where and when a job may run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wish {
    /// Higher ones first; among equals the older job.
    pub priority: i32,
    /// On exactly so many nodes, with as many ranks on each; `None`: on as few as possible.
    pub nodes: Option<u32>,
    /// Slots that each rank takes.
    pub slots_per_rank: u32,
    /// Labels that each node must have.
    pub labels: BTreeMap<String, String>,
    /// The job ends after this long at the latest. Lets it go ahead where that delays nobody.
    pub max_time_s: Option<u64>,
    /// Wait for nodes to join where all those that are registered could never hold the job.
    pub queue: bool,
}

impl Default for Wish {
    fn default() -> Self {
        Wish {
            priority: 0,
            nodes: None,
            slots_per_rank: 1,
            labels: BTreeMap::new(),
            max_time_s: None,
            queue: false,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Work {
    /// `Job::to_json`.
    Train { job_json: String },
    /// Any program, as torchrun would run it.
    Program(Program),
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Program {
    /// Program and arguments; found by the agent in `PATH` or relative to `working_dir`.
    pub argv: Vec<String>,
    pub working_dir: String,
    /// Set over what the node gives to programs, below RANK and the like.
    pub env: Vec<Variable>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Reply {
    Submitted {
        job: JobId,
    },
    Token {
        text: String,
    },
    Cluster(ClusterView),
    Nodes(Vec<NodeView>),
    Jobs(Listing<JobView>),
    Job(Box<JobView>),
    Checkpoints(Listing<CheckpointView>),
    Addresses(Vec<CoordinatorAddress>),
    /// And who is to be trusted from now on.
    Certificate {
        certificate_der: Vec<u8>,
        authorities: Authorities,
    },
    /// One item of a `Watch`; `index` counts the job's events from 1 over all generations.
    Event {
        index: u64,
        event: Event,
    },
    /// The end of a `Watch`.
    EndOfEvents,
    Refused(Refusal),
    /// The change is made; there is nothing to say about it.
    Done,
    Coordinators(Vec<CoordinatorView>),
    Tokens(Vec<TokenView>),
    Decisions(Listing<DecisionView>),
    Checkpoint(Box<CheckpointView>),
    RunStarted(RunId),
    Runs(Listing<RunView>),
    Run(Box<RunView>),
    Points {
        points: Vec<Point>,
        /// For `RunMetrics::from`, if there are more.
        next: Option<u64>,
    },
    ExportRecorded(ExportId),
    Exports(Listing<ExportView>),
    Export(Box<ExportView>),
    ProfileRecorded(ProfileId),
    Profiles(Listing<ProfileView>),
    Profile(Box<ProfileView>),
    Position(u64),
    Environment(Vec<VariableView>),
    Authority(Box<AuthorityView>),
    Output(OutputPiece),
    Retention(RetentionView),
    Members(Vec<MemberView>),
}

/// One line, and what kind of refusal it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    pub kind: RefusalKind,
    pub message: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum RefusalKind {
    /// The request cannot be carried out as it is.
    Invalid,
    NotFound,
    /// The certificate's role does not allow it.
    Forbidden,
    /// Not here and now: no leader, disk full. This try has changed nothing. Try again, or ask another coordinator.
    Unavailable,
    /// The request was carried out before, and what it gave cannot be given again. Ask anew, as another request.
    Spent,
    /// Certain, and for now: the cluster is at one of its limits. The same may be granted later, as another request.
    Later,
    /// The change may or may not be made: it was handed on, and its answer did not come here in time. Asking again under the same number
    /// does no harm and finds out.
    Undecided,
    /// The change may or may not have been made, and asking again does not find out: what came of it is not known any more.
    Forgotten,
}

impl RefusalKind {
    /// The same request may be granted if it is sent again, as it is.
    pub fn is_passing(self) -> bool {
        matches!(self, RefusalKind::Unavailable | RefusalKind::Undecided)
    }
}
