//! What is posted, and the thread that carries it out: one after the other, in the order of the posts.

use crate::collective::Ticket;
use crate::error::{CollectiveError, Result};
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
#[cfg(target_os = "linux")]
use std::time::Duration;

/// Posts in flight; beyond it `post` waits.
const POSTS_MAX: u64 = 256;

/// The end of the one who posts. Nothing is done after a failure.
pub(crate) struct Posts<W> {
    shared: Arc<Shared<W>>,
    posted: u64,
    worker: Option<JoinHandle<()>>,
}

struct Shared<W> {
    queue: Mutex<Queue<W>>,
    changed: Condvar,
}

struct Queue<W> {
    waiting: VecDeque<W>,
    /// Number of the last that is over.
    done: u64,
    failed: Option<CollectiveError>,
    /// No more is posted.
    closed: bool,
}

impl<W: Send + 'static> Posts<W> {
    pub fn new() -> Posts<W> {
        let queue = Queue { waiting: VecDeque::new(), done: 0, failed: None, closed: false };
        let shared = Shared { queue: Mutex::new(queue), changed: Condvar::new() };
        Posts { shared: Arc::new(shared), posted: 0, worker: None }
    }

    /// `worker` gives what carries out, of which the first one is kept.
    pub fn post<F>(&mut self, work: W, worker: impl FnOnce() -> F) -> Result<Ticket>
    where
        F: FnMut(W) -> Result<()> + Send + 'static,
    {
        if let Some(oldest) = (self.posted + 1).checked_sub(POSTS_MAX) {
            self.wait_for(oldest)?;
        }
        if self.worker.is_none() {
            let (shared, mut carry_out) = (self.shared.clone(), worker());
            let thread = std::thread::Builder::new().name("fleet-posts".into());
            let started = thread.spawn(move || shared.work_off(&mut carry_out));
            self.worker = Some(started.map_err(|source| CollectiveError::Network {
                what: "cannot start a thread",
                source: Arc::new(source),
            })?);
        }
        self.posted += 1;
        self.shared.queue().waiting.push_back(work);
        self.shared.changed.notify_all();
        Ok(Ticket(self.posted))
    }

    /// Waits until `number` posts are over, or one has failed.
    pub fn wait_for(&self, number: u64) -> Result<()> {
        let mut queue = self.shared.queue();
        loop {
            if let Some(error) = &queue.failed {
                return Err(error.clone());
            }
            if queue.done >= number {
                return Ok(());
            }
            queue = self.shared.wait(queue);
        }
    }

    /// Waits until all are over.
    pub fn finish(&self) -> Result<()> {
        self.wait_for(self.posted)
    }

    /// Waits for so long until all are over.
    #[cfg(target_os = "linux")]
    pub fn finish_within(&self, limit: Duration) {
        let queue = self.shared.queue();
        let unfinished = |queue: &mut Queue<W>| queue.done < self.posted && queue.failed.is_none();
        drop(self.shared.changed.wait_timeout_while(queue, limit, unfinished));
    }

    /// Posts that are not over.
    pub fn pending(&self) -> usize {
        (self.posted - self.shared.queue().done) as usize
    }

    pub fn has_failed(&self) -> bool {
        self.shared.queue().failed.is_some()
    }

    /// Ends the thread; `abort` has to end what it is in the middle of.
    pub fn close(&mut self, abort: impl FnOnce()) {
        let Some(worker) = self.worker.take() else { return };
        let unfinished = {
            let mut queue = self.shared.queue();
            queue.closed = true;
            queue.waiting.clear();
            queue.done < self.posted && queue.failed.is_none()
        };
        self.shared.changed.notify_all();
        if unfinished {
            abort();
        }
        let _ = worker.join();
    }
}

impl<W> Shared<W> {
    fn queue(&self) -> MutexGuard<'_, Queue<W>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, queue: MutexGuard<'a, Queue<W>>) -> MutexGuard<'a, Queue<W>> {
        self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner)
    }

    fn work_off(&self, carry_out: &mut dyn FnMut(W) -> Result<()>) {
        let mut queue = self.queue();
        loop {
            let Some(work) = queue.waiting.pop_front() else {
                if queue.closed {
                    return;
                }
                queue = self.wait(queue);
                continue;
            };
            drop(queue);
            // Who waits for a post waits for this thread.
            let result = catch_unwind(AssertUnwindSafe(|| carry_out(work))).unwrap_or_else(|_| {
                let message = "fleet's own thread panicked; this rank's log says where: please report it";
                Err(CollectiveError::Refused { operation: "posted exchange", message: message.into() })
            });
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_ends_what_is_posted_instead_of_letting_it_wait() {
        let mut posts = Posts::new();
        let carry_out = || |number: u32| -> Result<()> { if number == 2 { panic!("two") } else { Ok(()) } };
        let tickets = [1, 2, 3].map(|number| posts.post(number, carry_out).unwrap());
        posts.wait_for(tickets[0].0).ok();
        assert!(posts.wait_for(tickets[1].0).unwrap_err().to_string().contains("panicked"));
        assert!(posts.finish().is_err() && posts.has_failed());
        posts.close(|| unreachable!("it has ended"));
    }
}
