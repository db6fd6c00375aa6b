//! Checkpoints of a run. Every rank copies what it writes of one and goes on training; a thread of its own writes the copy. Rank 0's waits
//! there for the others' parts and publishes. One checkpoint is in flight at a time: the next one, and the end of the run, wait for it.

use super::Trainer;
use super::companions::Companions;
use super::in_flight::{InFlight, Written};
use crate::agent_link::AgentLink;
use crate::error::{Error, Result};
use crate::snapshot::{Snapshot, not_copied};
use crate::stopwatch::Phase;
use crate::trace::What;
use fleet_checkpoint::{CheckpointError, PartWriter, RunDir, Ticket, TrainerState, Writer};
use fleet_collectives::{Activity, Op};
use fleet_common::events::{CheckpointRecord, EventBody, Level};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// In a checkpoint: the weight and the two moments of AdamW.
const NUMBERS_PER_PARAMETER: u64 = 3;

/// Longest wait for the cluster to record a checkpoint before older ones may go. At the end of a run they are left to the next one then.
pub(super) const RECORD_WAIT: Duration = Duration::from_secs(5);
/// The same in a run that was told to stop, and has not long for it.
pub(super) const STOPPED_WAIT: Duration = Duration::from_secs(1);

/// Longest wait for the part of a rank that is slower to write than rank 0. A rank that dies ends the gang, and the wait, at once.
const PART_WAIT: Duration = Duration::from_secs(900);

/// What a rank has for checkpoints.
pub(super) struct Saving {
    /// Where they lie.
    pub dir: PathBuf,
    in_flight: Option<InFlight>,
    /// Dropped after what is in flight, which writes to its directory.
    pub lead: Option<Lead>,
    /// All ranks know of a save that may not be done.
    is_open: bool,
    /// The memory of an earlier copy.
    spare: Option<Snapshot>,
    /// How the newest one went.
    outcome: Result<()>,
    /// The newest one found the disk full, and there is room now.
    again: bool,
}

/// What rank 0 has, which publishes them.
pub(super) struct Lead {
    pub dir: RunDir,
    pub companions: Arc<Companions>,
}

impl Saving {
    pub fn new(dir: PathBuf, lead: Option<Lead>) -> Saving {
        Saving { dir, lead, in_flight: None, is_open: false, spare: None, outcome: Ok(()), again: false }
    }
}

/// For people.
fn size(bytes: u64) -> String {
    match bytes >> 20 {
        0..10 => format!("{} KiB", bytes.div_ceil(1 << 10)),
        mib => format!("{mib} MiB"),
    }
}

/// What a rank writes with.
enum Pen {
    Lead(Writer, Arc<Companions>, Box<TrainerState>),
    Other(PartWriter),
}

impl Pen {
    fn write(
        self,
        snapshot: &mut Snapshot,
        given_up: &AtomicBool,
    ) -> Result<Option<CheckpointRecord>, CheckpointError> {
        match self {
            Pen::Lead(mut writer, companions, state) => {
                snapshot.write(writer.part())?;
                companions.write(&mut writer)?;
                writer.write_state(&state)?;
                let written = Instant::now();
                let wait = || !given_up.load(Ordering::Relaxed) && written.elapsed() < PART_WAIT;
                writer.finish_together(state.loss, &wait).map(Some)
            }
            Pen::Other(mut part) => match snapshot.write(&mut part) {
                Ok(()) => part.hand_in().map(|()| None),
                Err(e) => {
                    part.fail(&e);
                    Err(e)
                }
            },
        }
    }

    /// There is nothing to write.
    fn give_up(self, why: &CheckpointError) {
        if let Pen::Other(part) = self {
            part.fail(why);
        }
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
        self.saving.again = false;
        self.learner.gang().note(Activity::Saving);
        let step = self.state.step;
        let begun = match self.begin(link) {
            Ok(writer) => writer,
            Err(e) => {
                self.failed(step, &e, link);
                None
            }
        };
        // Whether there is something to write, and where.
        let mut numbers = begun.as_ref().map_or([0.0; 3], |writer| writer.ticket().numbers());
        self.learner.gang().all_reduce_f64(&mut numbers, Op::Sum)?;
        let ticket = Ticket::of_numbers(numbers);
        self.saving.is_open = ticket.is_some();
        let Some(ticket) = ticket else { return Ok(()) };
        if self.rank as usize >= self.learner.writers() {
            return self.learner.accompany_snapshot();
        }
        let pen = match (begun, &self.saving.lead) {
            (Some(writer), Some(lead)) => {
                Pen::Lead(writer, lead.companions.clone(), Box::new(self.state.clone()))
            }
            _ => Pen::Other(PartWriter::join(&self.saving.dir, step, ticket, self.rank as u32)),
        };
        let mut snapshot = match self.learner.snapshot(self.saving.spare.take()) {
            Ok(snapshot) => snapshot,
            Err(e @ Error::Collective(_)) => return Err(e),
            Err(e) => {
                let error = not_copied(&e);
                pen.give_up(&error);
                self.failed(step, &error, link);
                return Ok(());
            }
        };
        let watch = self.watch.clone();
        let started = InFlight::start(step, move |given_up| {
            let (began, _) = watch.now();
            let result = pen.write(&mut snapshot, given_up);
            watch.keep(What::Writing(step), began);
            Written { result, spare: snapshot }
        });
        match started {
            Ok(in_flight) => self.saving.in_flight = Some(in_flight),
            Err(source) => {
                let error = CheckpointError::Write { step, path: self.saving.dir.clone(), source };
                self.failed(step, &error, link);
            }
        }
        Ok(())
    }

    /// Looks whether the save in flight is done, and saves again where there was no room and now is some. A collective call.
    pub(super) fn look_at_save(&mut self, link: &mut AgentLink) -> Result<()> {
        if self.saving.in_flight.as_ref().is_some_and(InFlight::is_done) {
            self.settle(link);
        }
        if self.saving.is_open && self.agree()? {
            self.save(link)?;
        }
        Ok(())
    }

    /// Waits for the last save. A collective call.
    pub(super) fn end_saving(&mut self, link: &mut AgentLink) -> Result<()> {
        while self.saving.is_open {
            self.settle(link);
            if self.agree()? {
                self.save(link)?;
            }
        }
        Ok(())
    }

    /// What rank 0 knows of the save in flight is what all know: whether it goes on, and whether it is to be tried again.
    fn agree(&mut self) -> Result<bool> {
        let Saving { lead, in_flight, again, .. } = &self.saving;
        let goes_on = lead.is_some() && in_flight.is_some();
        let mut numbers = [goes_on, *again].map(|flag| f64::from(u8::from(flag)));
        self.learner.gang().all_reduce_f64(&mut numbers, Op::Max)?;
        self.saving.is_open = numbers[0] > 0.0;
        Ok(numbers[1] > 0.0)
    }

    /// How the last save went.
    pub(super) fn last_save(&mut self) -> Result<()> {
        std::mem::replace(&mut self.saving.outcome, Ok(()))
    }

    /// Waits for the save in flight, if there is one, and tells how it went.
    fn settle(&mut self, link: &mut AgentLink) {
        let Some(in_flight) = self.saving.in_flight.take() else { return };
        self.learner.gang().note(Activity::Saving);
        let step = in_flight.step;
        let Written { result, spare } = in_flight.wait();
        self.saving.spare = Some(spare);
        match result {
            Ok(Some(record)) => {
                self.saved = Some(step);
                self.saving.outcome = Ok(());
                link.event(EventBody::Checkpoint(record));
            }
            Ok(None) => {}
            Err(e) if e.is_full_disk() && self.make_room(link) => self.saving.again = true,
            Err(e) => self.failed(step, &e, link),
        }
    }

    /// Rank 0 tells it for all.
    fn failed(&mut self, step: u64, error: &CheckpointError, link: &mut AgentLink) {
        if self.saving.lead.is_none() {
            return;
        }
        let error = format!("{error}{}", self.what_is_needed(error));
        let last = Error::Environment(format!("the run ended without its last checkpoint: {error}"));
        self.saving.outcome = Err(last);
        link.event(EventBody::CheckpointFailed { step, error });
    }

    /// A save that will fail is told of before the hours that it is to save. Compression and quotas are not known here: nothing is refused.
    pub(super) fn warn_of_a_small_disk(&self, link: &mut AgentLink) {
        let needed = self.checkpoint_bytes();
        let Some(Lead { dir, .. }) = &self.saving.lead else { return };
        if let Some(free) = dir.free_bytes().filter(|free| *free < needed) {
            let line = format!(
                "a checkpoint takes {}, and {} has room for {}: make room, or saving may fail",
                size(needed),
                dir.path().display(),
                size(free)
            );
            link.log(Level::Warn, line);
        }
    }

    fn checkpoint_bytes(&self) -> u64 {
        self.learner.layout().count() * NUMBERS_PER_PARAMETER * self.learner.dtype().bitsize() as u64 / 8
    }

    fn what_is_needed(&self, error: &CheckpointError) -> String {
        let free = self.saving.lead.as_ref().and_then(|lead| lead.dir.free_bytes());
        match free.filter(|_| error.is_full_disk()) {
            Some(free) => {
                format!(": a checkpoint takes {} bytes, and {free} are free", self.checkpoint_bytes())
            }
            None => String::new(),
        }
    }

    /// On rank 0: the checkpoint's directory, where there is room or room can be made.
    fn begin(&mut self, link: &mut AgentLink) -> Result<Option<Writer>, CheckpointError> {
        let needed = self.checkpoint_bytes();
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
        let writers = self.learner.writers() as u32;
        Ok(Some(writer?.of(self.learner.strategy(), writers)))
    }

    /// Waits a moment for the newest checkpoint to be recorded: only then may older ones go.
    pub(super) fn await_record(&self, link: &AgentLink, longest: Duration) {
        if let Some(step) = self.saved {
            link.wait_committed(step, longest);
        }
    }

    /// On a full disk: removes the oldest checkpoints before `save_total_limit` asks for it, but never the newest that is known to be good.
    /// Whether there is room now that there was not.
    fn make_room(&mut self, link: &mut AgentLink) -> bool {
        self.await_record(link, RECORD_WAIT);
        let (bytes, step) = (self.checkpoint_bytes(), self.state.step);
        let good = link.committed().or(self.resumed);
        let Some(Lead { dir, .. }) = &mut self.saving.lead else { return false };
        let (line, made) = match dir.make_room(bytes, good) {
            Ok(removed) if removed.is_empty() => return false,
            Ok(removed) => {
                let names: Vec<String> = removed.iter().map(|path| path.display().to_string()).collect();
                (
                    format!(
                        "the disk is full: removed {} for the checkpoint of step {step}",
                        names.join(", ")
                    ),
                    true,
                )
            }
            Err(e) => (format!("the disk is full, and an old checkpoint stays: {e}"), false),
        };
        link.log(Level::Warn, line);
        made
    }

    /// Removes what `save_total_limit` leaves no room for, once a newer checkpoint is recorded.
    pub(super) fn rotate(&mut self, link: &mut AgentLink) {
        let committed = link.committed();
        let Some(Lead { dir, .. }) = self.saving.lead.as_mut().filter(|_| committed != self.rotated) else {
            return;
        };
        self.rotated = committed;
        let stopped = committed.is_some() && committed == self.stopped_at;
        if let Err(e) = dir.rotate(self.job.checkpoint.save_total_limit, committed.unwrap_or(0), stopped) {
            link.log(Level::Warn, format!("an old checkpoint stays: {e}"));
        }
    }
}
