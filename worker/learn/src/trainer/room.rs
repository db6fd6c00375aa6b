//! Room for checkpoints: what this disk has, and old ones that go.

use super::Trainer;
use super::saving::{Lead, RECORD_WAIT};
use crate::agent_link::AgentLink;
use fleet_checkpoint::CheckpointError;
use fleet_common::events::{EventBody, Level};

/// In a checkpoint, beside the weight.
const MOMENTS: u64 = 2;

/// For people.
fn size(bytes: u64) -> String {
    match bytes >> 20 {
        0..10 => format!("{} KiB", bytes.div_ceil(1 << 10)),
        mib => format!("{mib} MiB"),
    }
}

impl Trainer {
    /// A save that will fail is told of before the hours that it is to save. Compression and quotas are not known here: nothing is refused.
    pub(super) fn warn_of_a_small_disk(&self, link: &mut AgentLink) {
        let needed = self.bytes_here();
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

    /// What a checkpoint has on this rank's disk.
    pub(super) fn bytes_here(&self) -> u64 {
        let (here, all) = self.saving.share();
        let one = self.learner.layout().count() * self.learner.dtype().bitsize() as u64 / 8;
        let weights = if self.saving.disk == 0 { one } else { 0 };
        weights + (MOMENTS * one * here as u64).div_ceil(all as u64)
    }

    pub(super) fn what_is_needed(&self, error: &CheckpointError) -> String {
        let free = self.saving.lead.as_ref().and_then(|lead| lead.dir.free_bytes());
        match free.filter(|_| error.is_full_disk()) {
            Some(free) => {
                format!(": a checkpoint takes {} bytes, and {free} are free", self.bytes_here())
            }
            None => String::new(),
        }
    }

    /// The newest checkpoint that is recorded, as far as this rank knows.
    pub(super) fn recorded(&self, link: &AgentLink) -> Option<u64> {
        if self.rank == 0 { link.committed() } else { self.saving.recorded }
    }

    /// On a full disk: removes the oldest checkpoints before `save_total_limit` asks for it, but never the newest that is known to be good.
    /// Whether there is room now that there was not.
    pub(super) fn make_room(&mut self, link: &mut AgentLink) -> bool {
        self.await_record(link, RECORD_WAIT);
        self.spare_best();
        let (bytes, step) = (self.bytes_here(), self.state.step);
        let good = self.recorded(link).or(self.resumed);
        let place = self.saving.place();
        let Some(Lead { dir, .. }) = &mut self.saving.lead else { return false };
        let (line, made) = match dir.make_room(bytes, good) {
            Ok(removed) if removed.is_empty() => return false,
            Ok(removed) => {
                let names: Vec<String> = removed.iter().map(|path| path.display().to_string()).collect();
                (
                    format!(
                        "{place}the disk is full: removed {} for the checkpoint of step {step}",
                        names.join(", ")
                    ),
                    true,
                )
            }
            Err(e) => (format!("{place}the disk is full, and an old checkpoint stays: {e}"), false),
        };
        link.log(Level::Warn, line);
        self.tell_removed(link);
        made
    }

    /// Removes from this disk what `save_total_limit` leaves no room for, once a newer checkpoint is recorded.
    pub(super) fn rotate(&mut self, link: &mut AgentLink) {
        let (committed, place) = (self.recorded(link), self.saving.place());
        if committed == self.rotated {
            return;
        }
        self.spare_best();
        let Some(Lead { dir, .. }) = &mut self.saving.lead else { return };
        self.rotated = committed;
        let stopped = committed.is_some() && committed == self.stopped_at;
        if let Err(e) = dir.rotate(self.job.checkpoint.save_total_limit, committed.unwrap_or(0), stopped) {
            link.log(Level::Warn, format!("{place}an old checkpoint stays: {e}"));
        }
        self.tell_removed(link);
    }

    /// What this disk has no more.
    fn tell_removed(&mut self, link: &mut AgentLink) {
        let hosts = self.saving.hosts();
        let Some(Lead { dir, .. }) = &mut self.saving.lead else { return };
        let manifests = dir.take_removed();
        if !manifests.is_empty() {
            link.event(EventBody::CheckpointsRemoved { hosts, manifests });
        }
    }
}
