//! Checkpoints of a run: rank 0 writes while its peers compute the next gradients, which change nothing that it reads.

use super::Trainer;
use crate::agent_link::AgentLink;
use crate::error::{Error, Result};
use crate::product::Storage;
use fleet_checkpoint::{CheckpointError, MODEL_FILE, OPTIMIZER_FILE, TOKENIZER_FILE, Writer};
use fleet_collectives::Activity;
use fleet_common::events::{CheckpointRecord, EventBody, Level};

impl<E: Storage> Trainer<E> {
    /// Saves, and reports how it went. A failure ends nothing; the last valid checkpoint stays.
    pub(super) fn save(&mut self, link: &mut AgentLink) -> Result<()> {
        if self.rank != 0 {
            return Ok(());
        }
        self.engine.collective().note(Activity::Saving);
        let step = self.state.step;
        match self.write() {
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

    fn write(&self) -> Result<CheckpointRecord, CheckpointError> {
        let tokenizer = self.cache.tokenizer_path();
        let tokenizer =
            std::fs::read(&tokenizer).map_err(|source| CheckpointError::Read { path: tokenizer, source })?;
        let mut writer = Writer::begin(&self.job.checkpoint_dir(), self.state.step)?;
        writer.write_safetensors(MODEL_FILE, &self.engine.weight_refs())?;
        let names = self.engine.moment_names();
        writer.write_safetensors(OPTIMIZER_FILE, &self.engine.moment_refs(&names))?;
        writer.write_bytes(TOKENIZER_FILE, &tokenizer)?;
        if let Some(companions) = &self.companions {
            companions.write(&mut writer)?;
        }
        writer.write_state(&self.state)?;
        writer.finish(self.state.loss)
    }

    /// Removes what `save_total_limit` leaves no room for, once a newer checkpoint is recorded.
    pub(super) fn rotate(&mut self, link: &mut AgentLink) {
        let committed = link.committed();
        if self.rank != 0 || committed == self.rotated {
            return;
        }
        self.rotated = committed;
        let (dir, keep) = (self.job.checkpoint_dir(), self.job.checkpoint.save_total_limit);
        if let Err(e) = fleet_checkpoint::rotate(&dir, keep, committed.unwrap_or(0)) {
            link.log(Level::Warn, format!("an old checkpoint stays: {e}"));
        }
    }
}
