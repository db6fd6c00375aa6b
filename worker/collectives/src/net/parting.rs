//! How a rank leaves a gang: done, or because a call has failed. It tells all others what it has met, hears what they say, and finds who is to
//! blame.

use super::driver::{Driver, Peer, Run, Trouble};
use super::frame::{Body, Farewell, HEADER, Header};
use super::links::Want;
use super::verdict::{Last, Met, verdict};
use crate::abort::Abort;
use crate::call::Signature;
use crate::error::CollectiveError;
use std::time::{Duration, Instant};

/// For the last words of the others, when a call has failed.
const GRACE: Duration = Duration::from_millis(300);
/// For bytes that others have to read before they know that this rank is done, when it goes.
const LINGER: Duration = Duration::from_secs(2);
/// Of a call that waited longer it is certain that it waits.
const WAITED: Duration = Duration::from_millis(20);

impl Driver {
    /// A peer has ended its side, perhaps behind what this call still needs.
    pub(super) fn look_for_farewell(&mut self, from: usize) -> Result<(), Trouble> {
        let Peer { incoming, .. } = &self.peers[from];
        let (partial, left) = (incoming.header.clone(), incoming.left);
        let ahead = self.links.look_ahead(from).map_err(|_| Trouble::Ended(from))?;
        match farewell_in(&partial, left, ahead) {
            Some((signature, farewell)) => {
                self.peers[from].last = Some(Last::Said(signature, farewell));
                farewell.reason.map_or(Ok(()), |_| Err(Trouble::Said(from)))
            }
            None => Err(Trouble::Ended(from)),
        }
    }

    /// Ends frames that were sent in part, so that a farewell can follow.
    pub(super) fn complete_frames(&mut self, run: &Run<'_>, buffer: &[u8]) {
        let until = Instant::now() + GRACE / 2;
        for to in 0..self.peers.len() {
            let Some(at) = run.sends[to].front() else { continue };
            let mut position = run.positions[*at];
            while self.peers[to].outgoing.is_begun() && Instant::now() < until {
                let payload = &buffer[position..position + self.peers[to].outgoing.left];
                match self.peers[to].outgoing.send(&mut *self.links, to, payload) {
                    Ok(Some(sent)) => position += sent,
                    Ok(None) => self.pause(to, until),
                    Err(_) => break,
                }
            }
        }
    }

    /// Waits until `to` takes more.
    fn pause(&mut self, to: usize, until: Instant) {
        let mut wants = vec![Want::default(); self.peers.len()];
        wants[to].write = true;
        let left = until.saturating_duration_since(Instant::now());
        let _ = self.links.wait(&wants, left.min(Duration::from_millis(20)));
    }

    /// Tells all others, hears what they say, and finds who is to blame.
    pub(super) fn part(&mut self, run: &Run<'_>, trouble: Trouble) -> CollectiveError {
        let waits_for = (0..self.peers.len()).find(|peer| !run.receives[*peer].is_empty());
        let waits_for = waits_for.filter(|_| run.waited > WAITED.min(run.job.deadline / 2));
        let mut deadline = None;
        let reason = match trouble {
            Trouble::Ended(peer) => {
                self.peers[peer].last.get_or_insert(Last::Ended);
                Abort::RankDied(peer)
            }
            Trouble::Said(peer) => match self.peers[peer].last {
                // Who has just come and hears that somebody is late is the one.
                Some(Last::Said(_, Farewell { reason: Some(Abort::RankLate(_)), .. }))
                    if waits_for.is_none() =>
                {
                    Abort::RankLate(self.rank)
                }
                Some(Last::Said(_, Farewell { reason: Some(reason), .. })) => reason,
                _ => Abort::RankFailed(peer),
            },
            Trouble::Differs(peer) => Abort::RankDiffers(peer),
            Trouble::Deadline => {
                deadline = Some(run.job.deadline);
                Abort::RankLate(waits_for.unwrap_or(self.rank))
            }
            Trouble::Stopped(abort) => abort,
        };
        self.say_farewell(run.job.signature, Farewell { reason: Some(reason), waits_for });
        if !matches!(trouble, Trouble::Stopped(_)) {
            self.hear_farewells();
        }
        let lasts: Vec<Last> = self
            .peers
            .iter()
            .map(|peer| peer.last.unwrap_or_else(|| Last::Silent(peer.heard.elapsed())))
            .collect();
        verdict(Met { rank: self.rank, signature: run.job.signature, reason, waits_for, deadline }, &lasts)
    }

    fn say_farewell(&mut self, signature: Signature, farewell: Farewell) {
        let header = Header { generation: self.generation, signature, body: Body::Farewell(farewell) };
        let encoded = header.encode();
        for to in (0..self.peers.len()).filter(|to| *to != self.rank) {
            if !self.peers[to].outgoing.is_begun() {
                let _ = self.links.send(to, &encoded);
                let _ = self.links.flush(to);
            }
            self.links.finish(to);
        }
    }

    /// Throws away what others still send, up to their last words.
    fn hear_farewells(&mut self) {
        let until = Instant::now() + GRACE;
        let me = self.rank;
        loop {
            for from in (0..self.peers.len()).filter(|from| *from != me) {
                self.drain(from);
            }
            let open: Vec<bool> = self
                .peers
                .iter()
                .enumerate()
                .map(|(rank, peer)| {
                    let said =
                        matches!(peer.last, Some(Last::Said(_, farewell)) if farewell.reason.is_some());
                    rank != self.rank && !said && !peer.gone
                })
                .collect();
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() || !open.contains(&true) {
                return;
            }
            let wants: Vec<Want> = open.iter().map(|open| Want { read: *open, write: false }).collect();
            if self.links.wait(&wants, left).is_err() {
                return;
            }
            self.links.ended();
        }
    }

    fn drain(&mut self, from: usize) {
        loop {
            let left = self.peers[from].incoming.left;
            if left > 0 {
                let room = left.min(self.staging.len());
                match self.links.receive(from, &mut self.staging[..room]) {
                    Ok(0) => return,
                    Ok(count) => self.peers[from].incoming.left -= count,
                    Err(_) => return self.is_gone(from),
                }
                continue;
            }
            match self.header(from) {
                Ok(Some(Header { body: Body::Data(bytes), .. })) => self.peers[from].incoming.left = bytes,
                Ok(Some(Header { body: Body::Farewell(farewell), signature, .. })) => {
                    self.peers[from].last = Some(Last::Said(signature, farewell));
                }
                Ok(None) => return,
                Err(_) => return self.is_gone(from),
            }
        }
    }

    fn is_gone(&mut self, from: usize) {
        self.peers[from].gone = true;
        self.peers[from].last.get_or_insert(Last::Ended);
    }

    /// Tells all others that this rank fails for a reason of its own.
    pub fn fail(&mut self, abort: Abort) {
        self.say_farewell(Signature::NONE, Farewell { reason: Some(abort), waits_for: None });
    }

    /// Tells all others that this rank has made all of its calls, and waits a little for what they have not read yet.
    pub fn leave(&mut self) {
        let farewell = Farewell { reason: None, waits_for: None };
        let signature = Signature::NONE;
        let header = Header { generation: self.generation, signature, body: Body::Farewell(farewell) };
        let (until, me) = (Instant::now() + LINGER, self.rank);
        for to in (0..self.peers.len()).filter(|to| *to != me) {
            let _ = self.links.send(to, &header.encode());
            while matches!(self.links.flush(to), Ok(false)) && Instant::now() < until {
                self.pause(to, until);
            }
            self.links.finish(to);
        }
    }
}

/// The farewell at the end of what has come from a peer, if there is one: behind `left` bytes of a frame, or a header that came in part.
fn farewell_in(partial: &[u8], left: usize, ahead: &[u8]) -> Option<(Signature, Farewell)> {
    let mut at = left;
    let mut begun = partial.to_vec();
    loop {
        let missing = HEADER - begun.len();
        begun.extend_from_slice(ahead.get(at..at.checked_add(missing)?)?);
        at += missing;
        let header = Header::decode(begun.as_slice().try_into().ok()?)?;
        match header.body {
            Body::Farewell(farewell) => return Some((header.signature, farewell)),
            Body::Data(bytes) => at += bytes,
        }
        begun.clear();
    }
}
