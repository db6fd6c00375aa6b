//! Checkpoints of a run: rank 0 writes while its peers compute the next gradients, which change nothing that it reads.

use super::Trainer;
use super::companions::Companions;
use crate::agent_link::AgentLink;
use crate::error::{Error, Result};
use fleet_checkpoint::{CheckpointError, RunDir, Writer};
use fleet_collectives::Activity;
use fleet_common::events::{CheckpointRecord, EventBody, Level};
use std::time::Duration;

/// In a checkpoint: the weight and the two moments of AdamW, in fp32.
const BYTES_PER_PARAMETER: u64 = 12;

/// What the rank has that writes the checkpoints.
pub(super) struct Saving {
    pub dir: RunDir,
    pub companions: Companions,
}

/// For people.
fn size(bytes: u64) -> String {
    match bytes >> 20 {
        0..10 => format!("{} KiB", bytes.div_ceil(1 << 10)),
        mib => format!("{mib} MiB"),
    }
}

/// Longest wait for the cluster to record a checkpoint before older ones may go. At the end of a run they are left to the next one then.
pub(super) const RECORD_WAIT: Duration = Duration::from_secs(5);
/// The same in a run that was told to stop, and has not long for it.
pub(super) const STOPPED_WAIT: Duration = Duration::from_secs(1);

impl Trainer {
    /// Saves, and reports how it went. A failure ends nothing; the last valid checkpoint stays.
    pub(super) fn save(&mut self, link: &mut AgentLink) -> Result<()> {
        if self.saving.is_none() {
            return Ok(());
        }
        self.learner.gang().note(Activity::Saving);
        let step = self.state.step;
        let mut written = self.write();
        if written.as_ref().is_err_and(|e| e.is_full_disk()) && self.make_room(link) {
            written = self.write();
        }
        match written {
            Ok(record) => {
                self.saved = Some(step);
                link.event(EventBody::Checkpoint(record));
                Ok(())
            }
            Err(e) => {
                let error = format!("{e}{}", self.what_is_needed(&e));
                let last = Error::Environment(format!("the run ended without its last checkpoint: {error}"));
                link.event(EventBody::CheckpointFailed { step, error });
                Err(last)
            }
        }
    }

    /// A save that will fail is told of before the hours that it is to save. Compression and quotas are not known here: nothing is refused.
    pub(super) fn warn_of_a_small_disk(&self, link: &mut AgentLink) {
        let needed = self.checkpoint_bytes();
        let Some(Saving { dir, .. }) = &self.saving else { return };
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
        self.learner.layout().count() * BYTES_PER_PARAMETER
    }

    fn what_is_needed(&self, error: &CheckpointError) -> String {
        let free = self.saving.as_ref().and_then(|saving| saving.dir.free_bytes());
        match free.filter(|_| error.is_full_disk()) {
            Some(free) => {
                format!(": a checkpoint takes {} bytes, and {free} are free", self.checkpoint_bytes())
            }
            None => String::new(),
        }
    }

    fn write(&mut self) -> Result<CheckpointRecord, CheckpointError> {
        let Saving { dir, companions } = self.saving.as_ref().expect("only rank 0 writes, and it has this");
        let mut writer = Writer::begin(dir, self.state.step)?;
        self.learner.save(&mut writer)?;
        companions.write(&mut writer)?;
        writer.write_state(&self.state)?;
        writer.finish(self.state.loss)
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
        let Some(Saving { dir, .. }) = &mut self.saving else { return false };
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
        let Some(Saving { dir, .. }) = self.saving.as_mut().filter(|_| committed != self.rotated) else {
            return;
        };
        self.rotated = committed;
        let stopped = committed.is_some() && committed == self.stopped_at;
        if let Err(e) = dir.rotate(self.job.checkpoint.save_total_limit, committed.unwrap_or(0), stopped) {
            link.log(Level::Warn, format!("an old checkpoint stays: {e}"));
        }
    }
}
