//! What must hold, whoever fails: a state machine of its own that gets every committed command once, from whichever replica commits it
//! first, and compares. It also remembers what clients and agents were told.
//!
//! - All replicas commit the same entries, and at equal positions hold equal states and equal histories.
//! - A request changes something at most once.
//! - Whatever was acknowledged is committed, and a read sees all that was acknowledged before it was asked.
//! - Slots are never promised twice, and no gang is placed on a node that is drained or lost.
//! - The steps that a gang tells are recorded without a gap, and a job fails only for a reason that the simulation knows of.
//! - No node is called lost that a healthy coordinator heard within the lease, nor one of which its leader was told so, whatever became
//!   of who told it; nor before a whole lease since the node came, since its leader began to lead, and since it stood still last.

use super::queue::{MS, Micros, SECOND};
use fleet_common::codec;
use fleet_common::events::{EventBody, FailureKind, Outcome};
use fleet_common::ids::{ExportId, Generation, JobId, NodeId, ProfileId, RunId};
use fleet_common::protocol::{JobState, JobView, Member, RunKey};
use fleet_coordinator::cluster::commands::{Change, DrainNode, RevokeMember, UndrainNode};
use fleet_coordinator::cluster::history::HistoryRow;
use fleet_coordinator::cluster::retention::Removal;
use fleet_coordinator::cluster::session::RequestId;
use fleet_coordinator::cluster::{Answer, Command, Effect, State};
use fleet_coordinator::planner::LEASE_MS;
use fleet_coordinator::raft::disk::{Batch, Disk, Durability, Table};
use fleet_coordinator::raft::history;
use fleet_coordinator::raft::memory::MemoryDisk;
use prost::Message as _;
use raft::eraftpb::{ConfChange, Entry, EntryType};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// Times at which a coordinator heard a node that are remembered.
const HEARD_KEPT: usize = 16;
/// What was heard has reached the leader after so long.
const REPORTED: Micros = 2 * SECOND;
/// A connection that broke before is there again, and a new leader known.
pub const SETTLED: Micros = 6 * SECOND;

pub struct Oracle {
    state: State,
    applied: u64,
    /// Content of each committed entry.
    entries: BTreeMap<u64, u64>,
    rows: MemoryDisk,
    changed_by: BTreeSet<RequestId>,
    /// Done, whether that left a trace or not.
    done: BTreeSet<RequestId>,
    /// Of which somebody was told for certain that they were not done.
    never: BTreeSet<RequestId>,
    runs: BTreeMap<String, RunId>,
    jobs: BTreeMap<JobId, JobFacts>,
    by_name: BTreeMap<String, JobId>,
    exports: BTreeMap<ExportId, (JobId, u64)>,
    profiles: BTreeMap<ProfileId, RunKey>,
    /// What the cluster has forgotten.
    removed: Vec<Removal>,
    /// Since which index each node is drained, or not.
    drains: BTreeMap<NodeId, Vec<(u64, bool)>>,
    /// When something that had been acknowledged was in the log at this index; both rise.
    floor: VecDeque<(Micros, u64)>,
    heard: BTreeMap<(NodeId, u32), VecDeque<Micros>>,
    /// What each coordinator, while it led, was told of when a node was heard last; and when it was told so.
    told: BTreeMap<(NodeId, u32), VecDeque<(Micros, Micros)>>,
    /// When a leader took each node's last registration or return.
    came: BTreeMap<NodeId, Micros>,
    /// When a leader put an entry into its log, by term and index.
    proposed: BTreeMap<(u64, u64), Proposed>,
    pub commands: u64,
    /// Of all committed entries.
    pub log_bytes: u64,
    /// A worker came back without its records: nobody knows what it had started.
    pub records_lost: bool,
}

#[derive(Debug, Default)]
struct JobFacts {
    /// Index of the log, and how many events the job had from then on.
    events: Vec<(u64, u64)>,
    /// The last index of each generation's streams.
    cancelled_at: Option<u64>,
    excuse: Option<&'static str>,
    last_step: BTreeMap<Generation, u64>,
}

/// A node was called lost: by whom and when, to be judged by who knows the network.
pub struct Loss {
    pub node: NodeId,
    pub by: Proposed,
}

/// Who proposed something, when, and since when it had led then without standing still for long.
#[derive(Clone, Copy, Debug)]
pub struct Proposed {
    pub at: Micros,
    pub leader: u32,
    pub leads_since: Micros,
}

/// The last lines of what an applied entry did.
pub struct Done {
    pub line: Option<String>,
    pub loss: Option<Loss>,
}

impl Oracle {
    /// `state` as the first replica was made with.
    pub fn new(state: State, applied: u64) -> Oracle {
        Oracle {
            state,
            applied,
            entries: BTreeMap::new(),
            rows: MemoryDisk::default(),
            changed_by: BTreeSet::new(),
            done: BTreeSet::new(),
            never: BTreeSet::new(),
            runs: BTreeMap::new(),
            jobs: BTreeMap::new(),
            by_name: BTreeMap::new(),
            exports: BTreeMap::new(),
            profiles: BTreeMap::new(),
            removed: Vec::new(),
            drains: BTreeMap::new(),
            floor: VecDeque::new(),
            heard: BTreeMap::new(),
            told: BTreeMap::new(),
            came: BTreeMap::new(),
            proposed: BTreeMap::new(),
            commands: 0,
            log_bytes: 0,
            records_lost: false,
        }
    }

    pub fn state(&self) -> &State {
        &self.state
    }

    pub fn applied(&self) -> u64 {
        self.applied
    }

    // ---- what replicas do ---------------------------------------------------------------------------------------------

    /// A leader has put this entry into its log. It decided before by as much as its wall clock says, which shows `wall_ms` now: a full disk
    /// keeps entries waiting, and what is heard meanwhile takes none of them back.
    pub fn logged(&mut self, leader: u32, leads_since: Micros, entry: &Entry, (wall_ms, now): (u64, Micros)) {
        let decided_ms = command_of(entry).ok().flatten().map_or(wall_ms, |command| command.unix_ms);
        let at = now.saturating_sub(wall_ms.saturating_sub(decided_ms) * MS);
        let proposed = Proposed { at, leader, leads_since };
        self.proposed.entry((entry.term, entry.index)).or_insert(proposed);
    }

    /// A replica has committed this entry.
    pub fn committed(&mut self, entry: &Entry) -> Result<Option<Done>, String> {
        let index = entry.index;
        let content = hash(&[&entry.term.to_be_bytes()[..], &entry.data, &entry.context].concat());
        if let Some(known) = self.entries.get(&index) {
            if *known != content {
                return Err(format!(
                    "entry {index} of term {} was committed with another content before",
                    entry.term
                ));
            }
            return Ok(None);
        }
        if index != self.applied + 1 {
            return Ok(None); // somebody else will show the ones between
        }
        self.entries.insert(index, content);
        self.applied = index;
        self.log_bytes += (entry.data.len() + entry.context.len()) as u64;
        self.state.reach(index, entry.term);
        match command_of(entry)? {
            Some(command) => self.apply(entry, command).map(Some),
            None => Ok(None),
        }
    }

    fn apply(&mut self, entry: &Entry, command: Command) -> Result<Done, String> {
        let index = entry.index;
        self.commands += 1;
        let (request, change) = (command.request.map(|stamp| stamp.id), command.change.clone());
        let given_up = match &change {
            Change::MarkNodeLost(lost) => Some((lost.node, "its node was lost")),
            Change::RevokeMember(RevokeMember { member: Member::Worker(node) }) => {
                Some((*node, "its node was cut off"))
            }
            _ => None,
        };
        if let Some((node, why)) = given_up {
            let on_it: Vec<JobId> = self.state.active_jobs(node).map(|(job, _)| job).collect();
            on_it.into_iter().for_each(|job| self.excuse(job, why));
        }
        let applied = self.state.apply(index, command);
        let rejected = matches!(applied.answer, Answer::Rejected(_));
        if let Some(request) = request
            && !(applied.effects.is_empty() && applied.history.is_empty())
            && !self.changed_by.insert(request)
        {
            return Err(format!(
                "request {} of client {:x} was applied twice, now as entry {index}",
                request.seq, request.client.0
            ));
        }
        if let Some(request) = request.filter(|_| !rejected) {
            self.done.insert(request);
            self.must_not_be(request)?;
        }
        if let (Change::StartRun(start), Answer::RunStarted { run }) = (&change, &applied.answer)
            && let Some(other) = self.runs.insert(start.name.clone(), *run).filter(|other| other != run)
        {
            return Err(format!("the request for `{}` made both {other} and {run}", start.name));
        }
        let mut batch = Batch::default();
        for row in &applied.history {
            history::stage(row, &mut batch).map_err(|error| error.to_string())?;
            match row {
                HistoryRow::Event { job, event, .. } => self.recorded(*job, &event.body)?,
                HistoryRow::Export { export, record } => {
                    self.exports.insert(*export, (record.record.job, record.record.step));
                }
                HistoryRow::Profile { profile, record } => {
                    self.profiles.insert(*profile, record.record.run);
                }
                _ => {}
            }
        }
        for removal in &applied.removed {
            history::stage_removal(removal, &mut batch);
        }
        self.removed.extend(applied.removed);
        self.rows.write(&batch, Durability::Synced).map_err(|error| error.to_string())?;
        for effect in &applied.effects {
            if let Effect::Job(job) = effect {
                self.job_changed(*job, index)?;
            }
        }
        let proposed = self.proposed.get(&(entry.term, index)).copied();
        let mut done = Done { line: None, loss: None };
        match &change {
            Change::MarkNodeLost(lost) if !rejected => {
                done.loss = proposed.map(|by| Loss { node: lost.node, by });
            }
            Change::DrainNode(DrainNode { node, .. }) | Change::UndrainNode(UndrainNode { node })
                if !rejected =>
            {
                let drained = self.state.nodes().get(node).is_some_and(|record| record.drained);
                self.drains.entry(*node).or_default().push((index, drained));
            }
            Change::CancelJob(cancel) if !rejected => {
                self.jobs.entry(cancel.job).or_default().cancelled_at.get_or_insert(index);
            }
            _ => {}
        }
        let came = match (&change, &applied.answer) {
            (Change::DescribeNode(describe), Answer::Done) => Some(describe.node),
            (_, Answer::Redeemed { member: Member::Worker(node) }) => Some(*node),
            _ => None,
        };
        if let (Some(node), Some(Proposed { at, .. })) = (came, proposed) {
            self.came.insert(node, at);
        }
        if !rejected {
            self.check_slots(&change)?;
        }
        if !matches!(change, Change::RecordEvents(_)) {
            done.line = Some(format!("entry {index}: {} {}", change.name(), short(&applied.answer)));
        }
        Ok(done)
    }

    fn check_slots(&self, change: &Change) -> Result<(), String> {
        let Change::AssignGang(assign) = change else { return Ok(()) };
        for node in nodes_of(assign) {
            let Some(record) = self.state.nodes().get(&node) else {
                return Err(format!("{} was placed on {node}, which there is not", assign.job));
            };
            let used = self.state.slots_used(node);
            if used > record.slots {
                return Err(format!("{used} slots of {node} are promised and it has {}", record.slots));
            }
            if record.lost || record.drained {
                let how = if record.lost { "lost" } else { "drained" };
                return Err(format!("{} was placed on {node}, which is {how}", assign.job));
            }
        }
        Ok(())
    }

    fn job_changed(&mut self, id: JobId, index: u64) -> Result<(), String> {
        let Some(job) = self.state.jobs().get(&id) else { return Ok(()) };
        if let Some(other) = self.by_name.insert(job.name.clone(), id).filter(|other| *other != id) {
            return Err(format!("the request for `{}` made both {other} and {id}", job.name));
        }
        let facts = self.jobs.entry(id).or_default();
        if facts.events.last().is_none_or(|(_, events)| *events != job.events) {
            facts.events.push((index, job.events));
        }
        Ok(())
    }

    fn recorded(&mut self, id: JobId, body: &EventBody) -> Result<(), String> {
        let generation = self.state.jobs().get(&id).map_or(0, |job| job.generation);
        let facts = self.jobs.entry(id).or_default();
        match body {
            EventBody::Started { step, .. } => drop(facts.last_step.insert(generation, *step)),
            EventBody::Step(step) => {
                let known = facts.last_step.insert(generation, step.step).unwrap_or(0);
                if step.step != known + 1 {
                    return Err(format!("{id}.{generation} recorded step {} after step {known}", step.step));
                }
            }
            EventBody::Finished(Outcome::Failed(error))
                if facts.excuse.is_none()
                    && error.kind != FailureKind::Time
                    && !(self.records_lost && error.kind == FailureKind::Node) =>
            {
                return Err(format!("{id} failed and nothing had happened to it: {}", error.message));
            }
            _ => {}
        }
        Ok(())
    }

    /// Compares a replica that has come as far as this.
    pub fn compare(&self, state: &State, applied: u64) -> Result<(), String> {
        if applied == self.applied && *state != self.state {
            let (mine, theirs) = (format!("{:?}", self.state), format!("{state:?}"));
            let at = mine.bytes().zip(theirs.bytes()).position(|(a, b)| a != b).unwrap_or(0);
            let part = |text: &str| text.chars().skip(at.saturating_sub(80)).take(200).collect::<String>();
            return Err(format!(
                "its state at {applied} differs: {} instead of {}",
                part(&theirs),
                part(&mine)
            ));
        }
        Ok(())
    }

    /// Compares the whole history of a replica that has come as far as this.
    pub fn compare_history(&self, disk: &MemoryDisk, applied: u64) -> Result<(), String> {
        if applied != self.applied {
            return Ok(());
        }
        for table in Table::ALL.into_iter().filter(|table| !matches!(table, Table::Meta | Table::Log)) {
            let (mine, theirs) = (all_rows(&self.rows, table), all_rows(disk, table));
            if mine != theirs {
                let missing = mine.iter().find(|(key, value)| theirs.get(*key) != Some(*value));
                let what = missing.map_or("has too many".to_owned(), |(key, _)| format!("lacks row {key:?}"));
                return Err(format!(
                    "its table {} with {} rows instead of {} {what}",
                    table.name(),
                    theirs.len(),
                    mine.len()
                ));
            }
        }
        Ok(())
    }

    // ---- what was told ------------------------------------------------------------------------------------------------

    /// Something that is in the log at `index` was acknowledged at this time.
    pub fn acknowledged(&mut self, now: Micros, index: u64) {
        if self.floor.back().is_none_or(|(_, known)| *known < index) {
            self.floor.push_back((now, index));
        }
        while self.floor.len() > 4096 {
            self.floor.pop_front();
        }
    }

    /// How far the log must be seen by who asks at this time.
    fn floor_at(&self, asked: Micros) -> u64 {
        let before = self.floor.partition_point(|(at, _)| *at < asked);
        before.checked_sub(1).map_or(0, |last| self.floor[last].1)
    }

    /// A client was told that its job has this number.
    pub fn submitted(&mut self, name: &str, job: JobId, now: Micros) -> Result<(), String> {
        match self.by_name.get(name) {
            Some(known) if *known == job => {
                let index = self.jobs[&job].events.first().map_or(0, |(index, _)| *index);
                self.acknowledged(now, index);
                Ok(())
            }
            Some(known) => Err(format!("`{name}` was acknowledged as {job} and is {known}")),
            None => Err(format!("`{name}` was acknowledged as {job} and is not committed")),
        }
    }

    /// A client was told at every try that nothing was done, and has given it up.
    pub fn never_done(&mut self, request: RequestId) -> Result<(), String> {
        self.never.insert(request);
        self.must_not_be(request)
    }

    fn must_not_be(&self, request: RequestId) -> Result<(), String> {
        match self.never.contains(&request) && self.done.contains(&request) {
            true => Err("it was said for certain that it was not done, and it was".to_owned()),
            false => Ok(()),
        }
    }

    /// Whether a row was removed because it was too old or there was too much: then nobody need find it.
    pub fn is_removed(&self, table: Table, number: u64) -> bool {
        let has = |removal: &Removal| removal.table == table && (removal.from..removal.to).contains(&number);
        self.removed.iter().any(has)
    }

    /// A client was told that its run has this number.
    pub fn run_started(&mut self, name: &str, run: RunId) -> Result<(), String> {
        match self.state.runs().get(&run) {
            Some(record) if record.name == name => Ok(()),
            Some(record) => Err(format!("`{name}` was acknowledged as {run}, which is `{}`", record.name)),
            None if self.is_removed(Table::Runs, run.0) => Ok(()),
            None => Err(format!("`{name}` was acknowledged as {run} and is not committed")),
        }
    }

    /// A client was told that its export has this number.
    pub fn export_recorded(&self, export: ExportId, job: JobId, step: u64) -> Result<(), String> {
        match self.exports.get(&export) {
            Some(known) if *known == (job, step) => Ok(()),
            known => Err(format!("{export} of {job} at step {step} was acknowledged, and is of {known:?}")),
        }
    }

    /// A client was told that its profile has this number.
    pub fn profile_recorded(&self, profile: ProfileId, run: RunId) -> Result<(), String> {
        match self.profiles.get(&profile) {
            Some(known) if *known == RunKey::Own(run) => Ok(()),
            known => Err(format!("{profile} of {run} was acknowledged, and is of {known:?}")),
        }
    }

    /// A client was told that so many points of its run are recorded.
    pub fn recorded_points(&self, run: RunId, least: u64) -> Result<(), String> {
        let points = self.state.runs().get(&run).map_or(0, |record| record.points);
        match points >= least || self.is_removed(Table::Runs, run.0) {
            true => Ok(()),
            false => Err(format!("{least} points of {run} were acknowledged and {points} are committed")),
        }
    }

    /// A client was told that its job will be cancelled.
    pub fn cancelled(&mut self, job: JobId, now: Micros) -> Result<(), String> {
        let Some(index) = self.jobs.get(&job).and_then(|facts| facts.cancelled_at) else {
            return Err(format!("the end of {job} was acknowledged and is not committed"));
        };
        self.acknowledged(now, index);
        Ok(())
    }

    /// A client who asked at `asked` was shown this job, or that there is none.
    pub fn shown(
        &mut self,
        id: JobId,
        view: Option<&JobView>,
        asked: Micros,
        now: Micros,
    ) -> Result<(), String> {
        let floor = self.floor_at(asked);
        let Some(facts) = self.jobs.get(&id) else {
            return match view {
                Some(_) => Err(format!("{id} was shown and is not committed")),
                None => Ok(()),
            };
        };
        let then = facts.events.partition_point(|(index, _)| *index <= floor);
        let Some(view) = view else {
            return match then {
                0 => Ok(()),
                _ if self.is_removed(Table::Jobs, id.0) => Ok(()),
                _ => Err(format!("{id} was not found by who asked after entry {floor} was acknowledged")),
            };
        };
        let least = then.checked_sub(1).map_or(0, |last| facts.events[last].1);
        if view.events < least {
            return Err(format!(
                "{id} was shown with {} events to who asked after entry {floor} was acknowledged, when it had {least}",
                view.events
            ));
        }
        let ended = view.state.is_final() || view.state == JobState::Stopping;
        if facts.cancelled_at.is_some_and(|index| index <= floor) && !ended {
            return Err(format!("{id} was shown as {:?} after its end was acknowledged", view.state));
        }
        let seen = facts.events.iter().find(|(_, events)| *events == view.events).map(|(index, _)| *index);
        match seen {
            Some(index) => self.acknowledged(now, index),
            None => return Err(format!("{id} was shown with {} events, which it never had", view.events)),
        }
        Ok(())
    }

    /// A client who asked at `asked` was shown so many events of this job, all that there were.
    pub fn watched(&mut self, id: JobId, seen: u64, asked: Micros) -> Result<(), String> {
        let floor = self.floor_at(asked);
        let Some(facts) = self.jobs.get(&id) else { return Ok(()) };
        let then = facts.events.partition_point(|(index, _)| *index <= floor);
        let least = then.checked_sub(1).map_or(0, |last| facts.events[last].1);
        if seen < least {
            return Err(format!(
                "a watch of {id} ended after {seen} events, and it had {least} at entry {floor}, which was acknowledged"
            ));
        }
        Ok(())
    }

    /// A client was told that a node is drained, or not any more.
    pub fn drained(&mut self, node: NodeId, now: Micros) -> Result<(), String> {
        let Some((index, _)) = self.drains.get(&node).and_then(|changes| changes.first()).copied() else {
            return Err(format!("the drain of {node} was acknowledged and is not committed"));
        };
        // The first is surely among those that are acknowledged; which of the later ones, nobody knows.
        self.acknowledged(now, index);
        Ok(())
    }

    /// A client who asked at `asked` was shown whether this node is drained.
    pub fn node_shown(&self, node: NodeId, drained: bool, asked: Micros) -> Result<(), String> {
        let floor = self.floor_at(asked);
        let Some(changes) = self.drains.get(&node) else {
            return if drained { Err(format!("{node} was shown as drained and never was")) } else { Ok(()) };
        };
        let then = changes.partition_point(|(index, _)| *index <= floor);
        let before = then.checked_sub(1).is_some_and(|last| changes[last].1);
        if before == drained || changes[then..].iter().any(|(_, later)| *later == drained) {
            return Ok(());
        }
        Err(format!(
            "{node} was shown with drained = {drained} to who asked after entry {floor} was acknowledged"
        ))
    }

    // ---- what happens to nodes and gangs ------------------------------------------------------------------------------

    /// A coordinator heard a node.
    pub fn heard(&mut self, node: NodeId, host: u32, now: Micros) {
        let times = self.heard.entry((node, host)).or_default();
        if times.back().is_none_or(|last| *last + 100 * MS < now) {
            times.push_back(now);
        }
        if times.len() > HEARD_KEPT {
            times.pop_front();
        }
    }

    /// A leader is told by another coordinator that a node was heard at this time.
    pub fn told(&mut self, node: NodeId, leader: u32, heard: Micros, now: Micros) {
        let told = self.told.entry((node, leader)).or_default();
        told.push_back((heard, now));
        if told.len() > HEARD_KEPT {
            told.pop_front();
        }
    }

    /// A coordinator's process has ended, and with it what it was told.
    pub fn forgets(&mut self, host: u32) {
        self.told.retain(|(_, leader), _| *leader != host);
    }

    /// Why this loss came too early.
    pub fn too_early(&self, loss: &Loss) -> Option<String> {
        let Proposed { at, leader, leads_since } = loss.by;
        let least = LEASE_MS * MS - SECOND / 2;
        let early = |since: Micros| at < since + least;
        let known = self.told.get(&(loss.node, leader)).into_iter().flatten().filter(|(_, told)| *told < at);
        let told = known.map(|(heard, _)| *heard).max().unwrap_or(0);
        let came = self.came.get(&loss.node).copied().unwrap_or(0);
        let causes = [
            (told, "its leader was told that it was heard"),
            (came, "it came"),
            (leads_since, "its leader could hear anybody"),
        ];
        let (since, what) = causes.into_iter().find(|(since, _)| early(*since))?;
        let seconds = |at: Micros| at as f64 / 1e6;
        Some(format!(
            "{} was called lost at {:.3}, and {what} at {:.3}",
            loss.node,
            seconds(at),
            seconds(since)
        ))
    }

    /// Who heard a lost node lately enough that its leader should have known, and when.
    pub fn witnesses(&self, loss: &Loss) -> Vec<(u32, Micros)> {
        let lease = LEASE_MS * MS - SECOND / 2;
        let recent = |at: &&Micros| **at + REPORTED < loss.by.at && loss.by.at < **at + lease;
        let of = self.heard.iter().filter(|((node, _), _)| *node == loss.node);
        of.filter_map(|((_, host), times)| Some((*host, *times.iter().rfind(recent)?))).collect()
    }

    /// Whatever becomes of this job is no wonder.
    pub fn excuse(&mut self, job: JobId, why: &'static str) {
        self.jobs.entry(job).or_default().excuse.get_or_insert(why);
    }

    pub fn unfinished(&self) -> Vec<JobId> {
        self.state.jobs().iter().filter(|(_, job)| !job.state.is_final()).map(|(id, _)| *id).collect()
    }
}

/// Nodes that a gang is placed on.
fn nodes_of(assign: &fleet_coordinator::cluster::commands::AssignGang) -> Vec<NodeId> {
    assign.parts.iter().map(|(node, _)| *node).collect()
}

fn short(answer: &Answer) -> String {
    let mut text = format!("{answer:?}");
    if text.len() > 160 {
        text.truncate((0..=160).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0));
    }
    text
}

pub fn command_of(entry: &Entry) -> Result<Option<Command>, String> {
    let unreadable = |why: String| format!("entry {} cannot be read: {why}", entry.index);
    let bytes = match entry.get_entry_type() {
        EntryType::EntryConfChange => {
            ConfChange::decode(&entry.data[..]).map_err(|error| unreadable(error.to_string()))?.context
        }
        _ => entry.data.clone(),
    };
    if bytes.is_empty() {
        return Ok(None);
    }
    codec::decode(&bytes).map(Some).map_err(|error| unreadable(error.to_string()))
}

fn all_rows(disk: &MemoryDisk, table: Table) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let mut rows = BTreeMap::new();
    let scanned = disk.scan(table, &[], &[0xFF; 40], &mut |key, value| {
        rows.insert(key.to_vec(), value.to_vec());
        true
    });
    scanned.expect("a disk in memory can be read");
    rows
}

/// FNV-1a.
fn hash(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3))
}
