//! A checkpoint that is being written while training goes on.

use crate::snapshot::Snapshot;
use fleet_checkpoint::CheckpointError;
use fleet_common::events::CheckpointRecord;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{Builder, JoinHandle};

/// Of one step. Dropped, it is given up: nobody is waited for any more, and what was written goes.
pub(super) struct InFlight {
    pub step: u64,
    given_up: Arc<AtomicBool>,
    thread: Option<JoinHandle<Written>>,
}

/// How it went; the record is rank 0's. The copy's memory is for the next one.
pub(super) struct Written {
    pub result: Result<Option<CheckpointRecord>, CheckpointError>,
    pub spare: Snapshot,
}

impl InFlight {
    /// Writes on a thread of its own. `work` is told whether the save was given up.
    pub fn start(
        step: u64,
        work: impl FnOnce(&AtomicBool) -> Written + Send + 'static,
    ) -> io::Result<InFlight> {
        let given_up = Arc::new(AtomicBool::new(false));
        let told = given_up.clone();
        let thread = Builder::new().name("checkpoint".into()).spawn(move || work(&told))?;
        Ok(InFlight { step, given_up, thread: Some(thread) })
    }

    pub fn is_done(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Waits for its end.
    pub fn wait(mut self) -> Written {
        let thread = self.thread.take().expect("only this and the end take it");
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.given_up.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join(); // a panic in it has been printed, and what runs now ends by an error of its own
        }
    }
}
