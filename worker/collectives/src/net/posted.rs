//! What is posted, and the thread that carries it out.

use super::driver::{Driver, Job, Stop};
use super::links::Wake;
use crate::algorithm::Plan;
use crate::call::Signature;
use crate::dtype::{DType, Op};
use crate::error::{CollectiveError, Result};
use crate::memory::Claim;
use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// What the thread that calls and the gang's own share.
pub struct Shared {
    driver: Mutex<Driver>,
    queue: Mutex<Queue>,
    pub changed: Condvar,
    pub stop: Stop,
    pub waker: Arc<dyn Wake>,
}

#[derive(Default)]
pub struct Queue {
    pub waiting: VecDeque<Posting>,
    /// Number of the last that is over.
    pub done: u64,
    pub failed: Option<CollectiveError>,
    /// No more is posted.
    pub closed: bool,
}

pub struct Posting {
    pub plan: Arc<Plan>,
    pub reduction: Option<(DType, Op)>,
    pub signature: Signature,
    pub deadline: Duration,
    pub claim: Claim,
}

impl Shared {
    pub fn new(driver: Driver, stop: Stop, waker: Arc<dyn Wake>) -> Shared {
        Shared { driver: Mutex::new(driver), queue: Mutex::default(), changed: Condvar::new(), stop, waker }
    }

    pub fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn driver(&self) -> MutexGuard<'_, Driver> {
        self.driver.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `number` posts are over, or one has failed.
    pub fn wait_for(&self, number: u64) -> Result<()> {
        let mut queue = self.queue();
        loop {
            if let Some(error) = &queue.failed {
                return Err(error.clone());
            }
            if queue.done >= number {
                return Ok(());
            }
            queue = self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// The gang's own thread.
    pub fn work_off(&self) {
        let mut queue = self.queue();
        loop {
            let Some(mut posting) = queue.waiting.pop_front() else {
                if queue.closed {
                    return;
                }
                queue = self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            drop(queue);
            let Posting { ref plan, reduction, signature, deadline, .. } = posting;
            let job = Job { plan, reduction, signature, deadline };
            let result = self.driver().run(&job, posting.claim.bytes());
            queue = self.queue();
            match result {
                Ok(()) => queue.done += 1,
                Err(error) => {
                    queue.failed = Some(error);
                    queue.waiting.clear();
                    queue.closed = true;
                }
            }
            self.changed.notify_all();
        }
    }
}
