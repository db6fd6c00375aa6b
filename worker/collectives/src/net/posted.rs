//! What is posted, and what the thread that calls and the gang's own share.

use super::driver::{Driver, Job, Stop};
use super::links::Wake;
use crate::abort::Abort;
use crate::algorithm::Plan;
use crate::call::Signature;
use crate::dtype::{DType, Op};
use crate::error::Result;
use crate::memory::Claim;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

pub struct Shared {
    driver: Mutex<Driver>,
    pub stop: Stop,
    pub waker: Arc<dyn Wake>,
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
        Shared { driver: Mutex::new(driver), stop, waker }
    }

    pub fn driver(&self) -> MutexGuard<'_, Driver> {
        self.driver.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn carry_out(&self, mut posting: Posting) -> Result<()> {
        let Posting { ref plan, reduction, signature, deadline, .. } = posting;
        let job = Job { plan, reduction, signature, deadline };
        self.driver().run(&job, posting.claim.bytes())
    }

    /// Ends the calls of this rank. The first reason stays.
    pub fn abort(&self, abort: Abort) {
        let _ = self.stop.compare_exchange(0, abort.word(), SeqCst, SeqCst);
        self.waker.wake();
    }
}
