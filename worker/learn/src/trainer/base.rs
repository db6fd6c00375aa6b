//! The model beside which an adapter is trained, as checkpoints refer to it: by a hash, which takes as long as reading the model.

use crate::error::{Error, Result};
use fleet_checkpoint::weights_sha256;
use std::path::Path;
use std::thread::JoinHandle;

/// The hash, while it is computed and afterwards.
pub(super) enum BaseHash {
    /// The whole model is trained.
    None,
    Coming(JoinHandle<std::result::Result<String, String>>),
    Known(String),
}

impl BaseHash {
    /// Begins to read the model in `base`.
    pub fn of(base: Option<&Path>) -> Result<BaseHash> {
        let Some(dir) = base.map(Path::to_owned) else { return Ok(BaseHash::None) };
        let work = move || weights_sha256(&dir).map_err(|e| e.to_string());
        let thread = std::thread::Builder::new().name("base hash".into()).spawn(work);
        thread.map(BaseHash::Coming).map_err(|e| Error::Environment(format!("no thread can be started: {e}")))
    }

    /// Waits for it.
    pub fn wait(&mut self) -> Result<Option<String>> {
        if let BaseHash::Coming(_) = self
            && let BaseHash::Coming(thread) = std::mem::replace(self, BaseHash::None)
        {
            let hash = thread.join().unwrap_or_else(|_| Err("the thread that reads it panicked".into()));
            *self = BaseHash::Known(
                hash.map_err(|e| Error::Environment(format!("the base cannot be read: {e}")))?,
            );
        }
        Ok(match self {
            BaseHash::Known(hash) => Some(hash.clone()),
            _ => None,
        })
    }
}
