//! A stage of a checkpoint that is done while training goes on.

use crate::snapshot::Snapshot;
use fleet_checkpoint::{CheckpointError, Writer};
use fleet_common::events::CheckpointRecord;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{Builder, JoinHandle};

/// Dropped, it is given up: nobody is waited for any more, and what was written goes.
pub(super) struct InFlight {
    given_up: Arc<AtomicBool>,
    thread: Option<JoinHandle<Written>>,
}

/// How it went. The copy's memory is for the next one.
pub(super) struct Written {
    pub result: Result<Done, CheckpointError>,
    pub spare: Option<Snapshot>,
}

pub(super) enum Done {
    /// There is memory for copies.
    Room,
    /// What this rank has to write is written; others do the rest.
    Part,
    /// For the next stage.
    Ready(Box<Writer>),
    Published(CheckpointRecord),
}

impl InFlight {
    /// Writes on a thread of its own. `work` is told whether the save was given up.
    pub fn start(work: impl FnOnce(&AtomicBool) -> Written + Send + 'static) -> io::Result<InFlight> {
        let given_up = Arc::new(AtomicBool::new(false));
        let told = given_up.clone();
        let thread = Builder::new().name("checkpoint".into()).spawn(move || work(&told))?;
        Ok(InFlight { given_up, thread: Some(thread) })
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
