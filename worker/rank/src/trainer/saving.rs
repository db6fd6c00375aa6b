//! Checkpoints of a run: rank 0 writes while its peers compute the next gradients, which change nothing that it reads.

use super::Trainer;
use super::companions::Companions;
use crate::agent_link::AgentLink;
use crate::error::{Error, Result};
use fleet_checkpoint::{CheckpointError, MODEL_FILE, OPTIMIZER_FILE, RunDir, TOKENIZER_FILE, Writer};
use fleet_collectives::Activity;
use fleet_common::events::{CheckpointRecord, EventBody, Level};
use fleet_cpu::Storage;

/// In a checkpoint: the weight and the two moments of AdamW, in fp32.
const BYTES_PER_PARAMETER: u64 = 12;

/// What the rank has that writes the checkpoints.
pub(super) struct Saving {
    pub dir: RunDir,
    pub companions: Companions,
}

impl<E: Storage> Trainer<E> {
    /// Saves, and reports how it went. A failure ends nothing; the last valid checkpoint stays.
    pub(super) fn save(&mut self, link: &mut AgentLink) -> Result<()> {
        let Some(saving) = &self.saving else { return Ok(()) };
        self.engine.collective().note(Activity::Saving);
        let step = self.state.step;
        match self.write(saving) {
            Ok(record) => {
                link.event(EventBody::Checkpoint(record));
                Ok(())
            }
            Err(e) => {
                link.event(EventBody::CheckpointFailed { step, error: e.to_string() });
                Err(Error::Environment(format!("the run ended without its last checkpoint: {e}")))
            }
        }
    }

    /// A save that will fail is told of before the hours that it is to save. Compression and quotas are not known here: nothing is refused.
    pub(super) fn warn_of_a_small_disk(&self, link: &mut AgentLink) {
        const MIB: u64 = 1 << 20;
        let needed = self.engine.model().layout.count() * BYTES_PER_PARAMETER;
        let Some(Saving { dir, .. }) = &self.saving else { return };
        if let Some(free) = dir.free_bytes().filter(|free| *free < needed) {
            let line = format!(
                "a checkpoint takes {} MiB, and {} has room for {}: make room, or saving will fail",
                needed.div_ceil(MIB),
                dir.path().display(),
                free / MIB
            );
            link.log(Level::Warn, line);
        }
    }

    fn write(&self, Saving { dir, companions }: &Saving) -> Result<CheckpointRecord, CheckpointError> {
        let tokenizer = self.cache.tokenizer_path();
        let tokenizer =
            std::fs::read(&tokenizer).map_err(|source| CheckpointError::Read { path: tokenizer, source })?;
        let mut writer = Writer::begin(dir, self.state.step)?;
        writer.write_safetensors(MODEL_FILE, &self.engine.weight_refs())?;
        let names = self.engine.moment_names();
        writer.write_safetensors(OPTIMIZER_FILE, &self.engine.moment_refs(&names))?;
        writer.write_bytes(TOKENIZER_FILE, &tokenizer)?;
        companions.write(&mut writer)?;
        writer.write_state(&self.state)?;
        writer.finish(self.state.loss)
    }

    /// Removes what `save_total_limit` leaves no room for, once a newer checkpoint is recorded.
    pub(super) fn rotate(&mut self, link: &mut AgentLink) {
        let committed = link.committed();
        let Some(Saving { dir, .. }) = self.saving.as_ref().filter(|_| committed != self.rotated) else {
            return;
        };
        self.rotated = committed;
        if let Err(e) = dir.rotate(self.job.checkpoint.save_total_limit, committed.unwrap_or(0)) {
            link.log(Level::Warn, format!("an old checkpoint stays: {e}"));
        }
    }
}
