//! Checkpoints of a run. Every rank copies what it writes of one and goes on training; a thread of its own writes the copy. That of the first
//! rank on a disk waits there for the parts of the others. One checkpoint is in flight at a time: the next one, and the end of the run, wait for
//! it.
//!
//! On one disk that thread publishes as well. On several a checkpoint goes through stages, each of which the first rank on every disk does by a
//! thread, while a few numbers that all ranks sum between steps say when all are done with it, or one has failed:
//!
//! ```text
//! Writing ──what was written travels──▶ Preparing ──all have the manifest──▶ Publishing ──all have renamed──▶ Recording ──▶ older ones go
//!    └──────────────────── one failed: nobody goes on, what was written is removed ────────────────────┘
//! ```

use super::companions::Companions;
use super::in_flight::{Done, InFlight, Written};
use super::pen::Pen;
use super::{Trainer, disks};
use crate::agent_link::AgentLink;
use crate::error::{Error, Result};
use crate::snapshot::{Snapshot, not_copied};
use crate::stopwatch::Phase;
use crate::trace::What;
use fleet_checkpoint::{CheckpointError, Disks, PartWriter, RunDir, Ticket, Writer};
use fleet_collectives::{Activity, Op};
use fleet_common::events::{CheckpointRecord, EventBody, Level};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

/// Longest wait for the cluster to record a checkpoint before older ones may go. At the end of a run they are left to the next one then.
pub(super) const RECORD_WAIT: Duration = Duration::from_secs(5);
/// The same in a run that was told to stop, and has not long for it.
pub(super) const STOPPED_WAIT: Duration = Duration::from_secs(1);

/// What a rank has for checkpoints.
pub(super) struct Saving {
    /// Where they lie.
    pub dir: PathBuf,
    disks: Disks,
    /// The one that this rank sees.
    pub disk: usize,
    /// Ranks that write, the first ones.
    writers: usize,
    in_flight: Option<InFlight>,
    /// Between two stages.
    held: Option<Box<Writer>>,
    /// Published on this disk, and perhaps not yet on the others.
    published: Option<CheckpointRecord>,
    /// Dropped after what is in flight, which writes to its directory.
    pub lead: Option<Lead>,
    /// What all ranks know of a save that may not be done.
    stage: Option<Stage>,
    /// Of the newest save: its step, the loss there, and since when it waits to be recorded.
    step: u64,
    loss: f64,
    since: Option<Instant>,
    /// The memory of copies.
    spare: Option<Snapshot>,
    /// How the newest one went here.
    outcome: Result<()>,
    failed: bool,
    /// The newest one found the disk full, and there is room now.
    again: bool,
    /// What rank 0 has told of the newest one that is recorded.
    pub recorded: Option<u64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Writing,
    Preparing,
    Publishing,
    Recording,
}

/// What the first rank on a disk has, which publishes them there.
pub(super) struct Lead {
    pub dir: RunDir,
    /// Rank 0's.
    pub companions: Option<Arc<Companions>>,
}

impl Saving {
    /// For rank `rank`, one of those of which the first `writers` write.
    pub fn new(dir: PathBuf, disks: Disks, rank: usize, writers: usize, lead: Option<Lead>) -> Saving {
        Saving {
            dir,
            disk: disks.of_rank(rank),
            disks,
            writers,
            in_flight: None,
            held: None,
            published: None,
            lead,
            stage: None,
            step: 0,
            loss: f64::NAN,
            since: None,
            spare: None,
            outcome: Ok(()),
            failed: false,
            again: false,
            recorded: None,
        }
    }

    /// Of the ranks that write, those that do so to this disk, and all.
    pub fn share(&self) -> (usize, usize) {
        (self.disks.ranks(self.disk).filter(|rank| *rank < self.writers).count(), self.writers)
    }

    /// Hosts that see this rank's disk.
    pub fn hosts(&self) -> Vec<u32> {
        self.disks.hosts(self.disk).collect()
    }

    /// For people, before what happened there: which disk this is, where there are several.
    pub fn place(&self) -> String {
        match self.written() {
            1 => String::new(),
            _ => format!("on {}: ", self.disks.name(self.disk)),
        }
    }

    fn written(&self) -> usize {
        self.disks.written(self.writers)
    }
}

impl Trainer {
    /// Begins to save when the save before is done. A failure ends nothing; the last valid checkpoint stays. A collective call.
    pub(super) fn save(&mut self, link: &mut AgentLink) -> Result<()> {
        let watch = self.watch.clone();
        watch.during(Phase::Checkpoint, || self.save_now(link))
    }

    fn save_now(&mut self, link: &mut AgentLink) -> Result<()> {
        self.settle(link);
        while self.saving.stage.is_some_and(|stage| stage != Stage::Recording) {
            self.agree(link)?;
            self.settle(link);
        }
        self.learner.gang().note(Activity::Saving);
        let (step, loss) = (self.state.step, self.state.loss);
        let saving = &mut self.saving;
        (saving.step, saving.loss, saving.failed, saving.again) = (step, loss, false, false);
        let begun = match self.begin(link) {
            Ok(writer) => writer,
            Err(e) => {
                self.failed(&e, link);
                None
            }
        };
        let Some(tickets) = self.tickets(begun.as_ref())? else {
            self.saving.stage = None;
            return Ok(());
        };
        self.saving.stage = Some(Stage::Writing);
        if self.rank as usize >= self.saving.writers {
            return Ok(());
        }
        self.state.base_sha256 = self.base.wait()?;
        let pen = match (begun, &self.saving.lead) {
            (Some(mut writer), Some(lead)) => {
                writer.numbered(tickets.iter().map(|ticket| ticket.serial).max().unwrap_or(1));
                let own = lead.companions.clone().map(|files| (files, Box::new(self.state.clone())));
                Pen::Lead(Box::new(writer), own)
            }
            _ => {
                let ticket = tickets[self.saving.disk];
                Pen::Other(PartWriter::join(&self.saving.dir, step, ticket, self.rank as u32))
            }
        };
        let mut snapshot = match self.learner.snapshot(&self.saving.disks, self.saving.spare.take()) {
            Ok(snapshot) => snapshot,
            Err(e @ Error::Collective(_)) => return Err(e),
            Err(e) => {
                let error = not_copied(&e);
                pen.give_up(&error);
                self.failed(&error, link);
                return Ok(());
            }
        };
        let alone = (self.saving.written() == 1).then_some(loss);
        self.start(link, move |given_up| {
            let result = pen.write(&mut snapshot, alone, given_up);
            Written { result, spare: Some(snapshot) }
        });
        Ok(())
    }

    /// Takes the memory of copies while training goes on, so that the first save stands still no longer than others. Where there is too
    /// little, that save tells it.
    pub(super) fn take_room(&mut self, link: &mut AgentLink) {
        if self.rank as usize >= self.saving.writers || self.saving.in_flight.is_some() {
            return;
        }
        let mut room = match self.learner.room(&self.saving.disks) {
            Ok(room) => room,
            Err(error) => {
                let line = format!("as things are, no checkpoint can be saved: {error}");
                return link.log(Level::Warn, line);
            }
        };
        let taken = InFlight::start(move |_| {
            room.take_memory();
            Written { result: Ok(Done::Room), spare: Some(room) }
        });
        self.saving.in_flight = taken.ok();
    }

    /// Names of the directories on all disks; none where there is nothing to write. A collective call.
    fn tickets(&mut self, begun: Option<&Writer>) -> Result<Option<Vec<Ticket>>> {
        let mut numbers = vec![[0.0; 3]; self.saving.written()];
        if let Some(writer) = begun {
            numbers[self.saving.disk] = writer.ticket().numbers();
        }
        self.learner.gang().all_reduce_f64(numbers.as_flattened_mut(), Op::Sum)?;
        Ok(numbers.into_iter().map(Ticket::of_numbers).collect())
    }

    /// Does a stage of the save on a thread of its own.
    fn start(&mut self, link: &mut AgentLink, work: impl FnOnce(&AtomicBool) -> Written + Send + 'static) {
        let (watch, step) = (self.watch.clone(), self.saving.step);
        let started = InFlight::start(move |given_up| {
            let (began, _) = watch.now();
            let written = work(given_up);
            watch.keep(What::Writing(step), began);
            written
        });
        match started {
            Ok(in_flight) => self.saving.in_flight = Some(in_flight),
            Err(source) => {
                let error = CheckpointError::Write { step, path: self.saving.dir.clone(), source };
                self.failed(&error, link);
            }
        }
    }

    /// Looks how far the save in flight is, and saves again where there was no room and now is some. A collective call.
    pub(super) fn look_at_save(&mut self, link: &mut AgentLink) -> Result<()> {
        if self.saving.in_flight.as_ref().is_some_and(InFlight::is_done) {
            self.settle(link);
        }
        if self.agree(link)? {
            self.save(link)?;
        }
        Ok(())
    }

    /// Waits for the last save, and at most for `longest` until it is recorded. A collective call.
    pub(super) fn end_saving(&mut self, longest: Duration, link: &mut AgentLink) -> Result<()> {
        while self.saving.stage.is_some() {
            self.settle(link);
            if self.saving.stage == Some(Stage::Recording) {
                self.await_record(link, longest);
                self.saving.since = None;
            }
            if self.agree(link)? {
                self.save(link)?;
            }
        }
        self.await_record(link, longest);
        Ok(())
    }

    /// What the first ranks on all disks know of the save is what all know: whether it goes on, has failed, or is done with a stage, and then
    /// the next one begins. Whether it is to be tried again. A collective call, while there is a save.
    fn agree(&mut self, link: &mut AgentLink) -> Result<bool> {
        let Some(stage) = self.saving.stage else { return Ok(false) };
        let saving = &self.saving;
        let recorded = link.committed().filter(|_| self.rank == 0);
        let waits = stage == Stage::Recording
            && self.rank == 0
            && recorded < Some(saving.step)
            && saving.since.is_some_and(|since| since.elapsed() < RECORD_WAIT);
        let busy = saving.lead.is_some() && saving.in_flight.is_some() || waits;
        let [busy, failed, again] = [busy, saving.failed, saving.again].map(|flag| f64::from(u8::from(flag)));
        let mut numbers = [busy, failed, again, recorded.map_or(-1.0, |step| step as f64)];
        self.learner.gang().all_reduce_f64(&mut numbers, Op::Max)?;
        let [busy, failed, again, recorded] = numbers;
        self.saving.recorded = (recorded >= 0.0).then_some(recorded as u64).or(self.saving.recorded);
        if busy > 0.0 {
            return Ok(false);
        }
        let several = self.saving.written() > 1;
        self.saving.stage = match stage {
            _ if failed > 0.0 => {
                self.take_back(link);
                None
            }
            Stage::Writing if several => {
                self.exchange(link)?;
                Some(Stage::Preparing)
            }
            Stage::Preparing => {
                if let Some(writer) = self.saving.held.take() {
                    self.start(link, move |_| Written {
                        result: writer.publish().map(Done::Published),
                        spare: None,
                    });
                }
                Some(Stage::Publishing)
            }
            Stage::Publishing => {
                self.saving.since = Some(Instant::now());
                if let Some(record) = self.saving.published.take() {
                    self.tell(record, link);
                }
                Some(Stage::Recording)
            }
            Stage::Writing | Stage::Recording => None,
        };
        Ok(again > 0.0)
    }

    /// Each disk gets what was written to the others, and prepares. A collective call.
    fn exchange(&mut self, link: &mut AgentLink) -> Result<()> {
        let mut others = Vec::new();
        for disk in 0..self.saving.written() {
            let held = self.saving.held.as_ref().filter(|_| disk == self.saving.disk);
            let handed = held.map(|writer| writer.handed());
            let bytes = disks::from_one(handed.as_deref(), self.learner.gang())?;
            if disk != self.saving.disk {
                others.push((disk, bytes));
            }
        }
        let loss = self.saving.loss;
        if let Some(mut writer) = self.saving.held.take() {
            self.start(link, move |_| {
                let taken = others.iter().try_for_each(|(disk, bytes)| writer.take_in(*disk, bytes));
                let result = taken.and_then(|()| writer.prepare(loss)).map(|()| Done::Ready(writer));
                Written { result, spare: None }
            });
        }
        Ok(())
    }

    /// A stage failed on some disk: what was written goes, also what was published on this one.
    fn take_back(&mut self, link: &mut AgentLink) {
        self.saving.held = None;
        let published = self.saving.published.take();
        if let (Some(record), Some(lead)) = (published, &mut self.saving.lead)
            && let Err(e) = lead.dir.withdraw(record.step)
        {
            link.log(Level::Warn, format!("a checkpoint that is not whole stays: {e}"));
        }
    }

    /// How the last save went.
    pub(super) fn last_save(&mut self) -> Result<()> {
        std::mem::replace(&mut self.saving.outcome, Ok(()))
    }

    /// Waits for what is in flight, if anything is, and tells how it went.
    fn settle(&mut self, link: &mut AgentLink) {
        let Some(in_flight) = self.saving.in_flight.take() else { return };
        self.learner.gang().note(Activity::Saving);
        let Written { result, spare } = in_flight.wait();
        self.saving.spare = spare.or(self.saving.spare.take());
        match result {
            Ok(Done::Published(record)) if self.saving.written() == 1 => self.tell(record, link),
            Ok(Done::Published(record)) => self.saving.published = Some(record),
            Ok(Done::Ready(writer)) => self.saving.held = Some(writer),
            Ok(Done::Part | Done::Room) => {}
            Err(e) if e.is_full_disk() && self.make_room(link) => {
                (self.saving.failed, self.saving.again) = (true, true);
            }
            Err(e) => self.failed(&e, link),
        }
    }

    /// It is on all disks. Rank 0 tells the cluster.
    fn tell(&mut self, record: CheckpointRecord, link: &mut AgentLink) {
        self.saving.outcome = Ok(());
        if self.rank == 0 {
            self.saved = Some(record.step);
            link.event(EventBody::Checkpoint(record));
        }
    }

    /// The first rank on a disk tells it for all there.
    fn failed(&mut self, error: &CheckpointError, link: &mut AgentLink) {
        if self.saving.lead.is_none() {
            return;
        }
        self.saving.failed = true;
        let error = format!("{}{error}{}", self.saving.place(), self.what_is_needed(error));
        let last = Error::Environment(format!("the run ended without its last checkpoint: {error}"));
        self.saving.outcome = Err(last);
        link.event(EventBody::CheckpointFailed { step: self.saving.step, error });
    }

    /// On the first rank of a disk: the checkpoint's directory, where there is room or room can be made.
    fn begin(&mut self, link: &mut AgentLink) -> Result<Option<Writer>, CheckpointError> {
        let needed = self.bytes_here();
        let Some(Lead { dir, .. }) = &self.saving.lead else { return Ok(None) };
        if dir.free_bytes().is_some_and(|free| free < needed) {
            self.make_room(link);
        }
        let Some(Lead { dir, .. }) = &self.saving.lead else { return Ok(None) };
        let mut writer = Writer::begin(dir, self.state.step);
        if writer.as_ref().is_err_and(CheckpointError::is_full_disk) && self.make_room(link) {
            let Some(Lead { dir, .. }) = &self.saving.lead else { return Ok(None) };
            writer = Writer::begin(dir, self.state.step);
        }
        let Saving { disks, disk, writers, .. } = &self.saving;
        let writer = writer?.of(self.learner.strategy(), *writers as u32);
        Ok(Some(writer.among(disks.clone(), *disk)))
    }

    /// On rank 0: waits a moment for the newest checkpoint to be recorded: only then may older ones go.
    pub(super) fn await_record(&self, link: &AgentLink, longest: Duration) {
        if let Some(step) = self.saved {
            link.wait_committed(step, longest);
        }
    }
}
