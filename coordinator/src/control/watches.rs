//! Those who watch a job: its recorded events in order, then what comes. Served from the local history by whoever is asked; events are
//! facts, so a replica that is behind sends the same ones later.
//!
//! Never more than `REPLIES_MAX` events of a watch are with the driver, and each round reads only some: neither a slow client nor many
//! fast ones hold up the log.

use super::asks::unavailable;
use super::reads::Reader;
use super::{Action, Call, Control, Now, REPLIES_MAX};
use crate::raft::disk::Disk;
use crate::views::{events_of, unreadable};
use fleet_common::ids::JobId;
use fleet_common::protocol::{Refusal, Reply};
use std::collections::BTreeSet;

/// Events of one watch that are read at once.
const CHUNK: usize = 128;
/// Events of all watches that are read in one round.
const ROUND_MAX: usize = 1_024;
/// A watch has its first look at the state within this time; later, a coordinator without a leader sends its watchers elsewhere after
/// this time.
const WATCH_PATIENCE_MS: u64 = 5_000;

pub(super) struct Watch {
    job: JobId,
    /// Index of the next event to be sent.
    next: u64,
    follow: bool,
    /// Set by the first look: whether the job exists is known from then on.
    started: bool,
    /// Replies that the driver has not passed on.
    untaken: usize,
    opened_ms: u64,
    /// The wall clock then.
    unix_ms: u64,
}

impl Watch {
    pub fn new(job: JobId, from: u64, follow: bool, now: Now) -> Watch {
        Watch {
            job,
            next: from.max(1),
            follow,
            started: false,
            untaken: 0,
            opened_ms: now.mono_ms,
            unix_ms: now.unix_ms,
        }
    }
}

/// Watches that have something to do.
#[derive(Default)]
pub(super) struct Watches {
    ready: BTreeSet<Call>,
}

impl Watches {
    pub fn are_busy(&self) -> bool {
        !self.ready.is_empty()
    }
}

enum Served {
    /// All there is was sent, or the driver has enough.
    Waits,
    More,
    Ended,
}

impl<D: Disk> Control<D> {
    pub(super) fn start_watch(&mut self, call: Call, stale: bool) {
        match stale {
            true => self.watch_read(call),
            false => self.reads.add(Reader::Watch(call)),
        }
    }

    /// The state has all that was acknowledged before the watch began.
    pub(super) fn watch_read(&mut self, call: Call) {
        let Some(watch) = self.calls.watch(call) else { return };
        watch.started = true;
        self.watches.ready.insert(call);
    }

    pub(super) fn replies_taken(&mut self, call: Call, replies: usize) {
        if let Some(watch) = self.calls.watch(call) {
            watch.untaken = watch.untaken.saturating_sub(replies);
            if watch.started {
                self.watches.ready.insert(call);
            }
        }
    }

    pub(super) fn wake_watches(&mut self, jobs: &BTreeSet<JobId>) {
        let woken = self.calls.watches().filter(|(_, watch)| watch.started && jobs.contains(&watch.job));
        self.watches.ready.extend(woken.map(|(call, _)| call));
    }

    pub(super) fn wake_all_watches(&mut self) {
        let woken = self.calls.watches().filter(|(_, watch)| watch.started);
        self.watches.ready.extend(woken.map(|(call, _)| call));
    }

    /// Ends those that this coordinator cannot serve: their clients find another one. Looks at the others again, in case the history
    /// lagged behind the state.
    pub(super) fn look_after_watches(&mut self, now: Now) {
        let out_of_touch = now.mono_ms.saturating_sub(self.in_touch_ms) >= WATCH_PATIENCE_MS;
        let late = self.calls.watches().filter(|(_, watch)| match watch.started {
            true => out_of_touch,
            false => now.mono_ms.saturating_sub(watch.opened_ms) >= WATCH_PATIENCE_MS,
        });
        for call in late.map(|(call, _)| call).collect::<Vec<_>>() {
            self.end_watch(call, Err(unavailable("no coordinator leads at the moment; try again")));
        }
        self.wake_all_watches();
    }

    /// Sends what is there, in turns.
    pub(super) fn serve_watches(&mut self) {
        let mut read = 0;
        for call in std::mem::take(&mut self.watches.ready) {
            if read >= ROUND_MAX {
                self.watches.ready.insert(call);
                continue;
            }
            match self.serve_watch(call, &mut read) {
                Ok(Served::Waits) => {}
                Ok(Served::More) => drop(self.watches.ready.insert(call)),
                Ok(Served::Ended) => self.end_watch(call, Ok(())),
                Err(refusal) => self.end_watch(call, Err(refusal)),
            }
        }
    }

    fn serve_watch(&mut self, call: Call, read: &mut usize) -> Result<Served, Refusal> {
        let Some(watch) = self.calls.watch(call) else { return Ok(Served::Waits) };
        let (recorded, over) = events_of(self.replica.state(), &self.history, watch.job, watch.unix_ms)?;
        let left = (recorded + 1).saturating_sub(watch.next);
        let room = REPLIES_MAX.saturating_sub(watch.untaken).min(CHUNK);
        if left > 0 && room > 0 {
            let events = self.history.events(watch.job, watch.next, room.min(left as usize));
            let events = events.map_err(unreadable)?;
            *read += events.len();
            if events.is_empty() && self.replica.full().is_none() {
                // They are not there: a restored backup may leave some out.
                watch.next = recorded + 1;
            }
            for (index, event) in events {
                watch.next = index + 1;
                watch.untaken += 1;
                self.out.push(Action::Reply { call, reply: Reply::Event { index, event } });
            }
        }
        let now_left = (recorded + 1).saturating_sub(watch.next);
        Ok(match (now_left, watch.follow && !over) {
            (0, false) => Served::Ended,
            // Recorded, but not in the history yet because the disk is full, or the driver has enough.
            (0, true) => Served::Waits,
            (after, _) if after == left || watch.untaken >= REPLIES_MAX => Served::Waits,
            _ => Served::More,
        })
    }

    fn end_watch(&mut self, call: Call, result: Result<(), Refusal>) {
        if self.calls.remove(call).is_some() {
            let reply = result.map_or_else(Reply::Refused, |()| Reply::EndOfEvents);
            self.out.push(Action::Reply { call, reply });
        }
    }
}
