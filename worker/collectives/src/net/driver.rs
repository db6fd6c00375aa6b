//! Carries out the steps of a plan over connections, in the thread that calls it.
//!
//! Every connection makes progress by itself: a rank takes what its peers send as soon as its own steps let it, and never waits for one peer
//! while another could go on. What a rank may not take yet stays with the sender.

use super::frame::{Body, FRAME_MAX, Farewell, HEADER, Header};
use super::links::{Links, Want};
use super::verdict::{Last, Met, verdict};
use crate::abort::Abort;
use crate::algorithm::{Kind, Plan};
use crate::call::Signature;
use crate::dtype::{DType, Op};
use crate::error::CollectiveError;
use crate::memory::reduce::reduce_into;
use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};

/// At one go; what a wait takes beyond it does not count, so that a gang that stands still as a whole has missed nothing.
const WAIT_MAX: Duration = Duration::from_millis(250);
/// For the last words of the others, when a call has failed.
const GRACE: Duration = Duration::from_millis(300);
/// For bytes that others have to read before they know that this rank is done, when it goes.
const LINGER: Duration = Duration::from_secs(2);
/// What is received to be reduced.
const STAGING: usize = 64 << 10;
/// Of a call that waited longer it is certain that it waits.
const WAITED: Duration = Duration::from_millis(20);

/// The same for all who may end a gang's calls: 0, or the word of the first `Abort`.
pub type Stop = Arc<AtomicU64>;

pub struct Driver {
    links: Box<dyn Links>,
    rank: usize,
    generation: u64,
    peers: Vec<Peer>,
    staging: Vec<u8>,
    stop: Stop,
}

/// The state of one connection, between frames and in the middle of them.
struct Peer {
    incoming: Incoming,
    outgoing: Outgoing,
    heard: Instant,
    last: Option<Last>,
    /// All that it sent was read.
    gone: bool,
}

#[derive(Default)]
struct Incoming {
    header: Vec<u8>,
    /// Bytes of the frame that are still to come.
    left: usize,
    /// Of an element that came in part.
    rest: Vec<u8>,
}

#[derive(Default)]
struct Outgoing {
    /// Of the header, what is still to be sent.
    header: Vec<u8>,
    /// Bytes of the frame that are still to be sent.
    left: usize,
}

/// One call.
pub struct Job<'a> {
    pub plan: &'a Plan,
    pub reduction: Option<(DType, Op)>,
    pub signature: Signature,
    pub deadline: Duration,
}

/// Where a call stands.
struct Run<'a> {
    job: &'a Job<'a>,
    positions: Vec<usize>,
    /// Of each peer, its steps that are not over.
    sends: Vec<VecDeque<usize>>,
    receives: Vec<VecDeque<usize>>,
    busy: Vec<usize>,
    /// To whom something is sent.
    targets: Vec<usize>,
    waited: Duration,
}

/// Why a call cannot go on.
enum Trouble {
    Ended(usize),
    Said(usize),
    Differs(usize),
    Deadline,
    Stopped(Abort),
}

impl Driver {
    pub fn new(links: Box<dyn Links>, rank: usize, world: usize, generation: u64, stop: Stop) -> Driver {
        let peer = || Peer {
            incoming: Incoming::default(),
            outgoing: Outgoing::default(),
            heard: Instant::now(),
            last: None,
            gone: false,
        };
        let peers = (0..world).map(|_| peer()).collect();
        Driver { links, rank, generation, peers, staging: vec![0; STAGING], stop }
    }

    /// Carries out the plan on `buffer`. After an error nothing can be done with this driver any more.
    pub fn run(&mut self, job: &Job<'_>, buffer: &mut [u8]) -> Result<(), CollectiveError> {
        let mut run = Run::new(job, self.peers.len());
        match self.go(&mut run, buffer) {
            Ok(()) => Ok(()),
            Err(trouble) => {
                self.complete_frames(&run, buffer);
                Err(self.part(&run, trouble))
            }
        }
    }

    fn go(&mut self, run: &mut Run<'_>, buffer: &mut [u8]) -> Result<(), Trouble> {
        let mut left = run.job.deadline;
        loop {
            let mut moved = false;
            for at in 0..run.busy.len() {
                let peer = run.busy[at];
                moved |= self.send(run, buffer, peer)?;
                moved |= self.receive(run, buffer, peer)?;
            }
            run.busy.retain(|peer| !run.sends[*peer].is_empty() || !run.receives[*peer].is_empty());
            if run.busy.is_empty() && self.flushed(run)? {
                return Ok(());
            }
            if moved {
                left = run.job.deadline;
                continue;
            }
            if left.is_zero() {
                return Err(Trouble::Deadline);
            }
            let (since, slice) = (Instant::now(), left.min(WAIT_MAX));
            let wants = self.wants(run);
            self.links.wait(&wants, slice).map_err(|_| Trouble::Stopped(Abort::RankFailed(self.rank)))?;
            let waited = since.elapsed().min(slice);
            (left, run.waited) = (left - waited, run.waited + waited);
            match self.stop.load(SeqCst) {
                0 => {}
                word => return Err(Trouble::Stopped(Abort::of(word))),
            }
            for peer in self.links.ended() {
                self.look_for_farewell(peer)?;
            }
        }
    }

    fn flushed(&mut self, run: &Run<'_>) -> Result<bool, Trouble> {
        let mut all = true;
        for to in run.targets.iter().copied() {
            all &= self.links.flush(to).map_err(|_| Trouble::Ended(to))?;
        }
        Ok(all)
    }

    fn wants(&mut self, run: &Run<'_>) -> Vec<Want> {
        let mut wants = vec![Want::default(); self.peers.len()];
        for peer in 0..self.peers.len() {
            let sends = run.sends[peer].front().is_some_and(|at| {
                self.peers[peer].outgoing.is_begun() || run.room(*at) > 0 || run.is_empty(*at)
            });
            let receives = run.receives[peer].front();
            wants[peer].read = receives.is_some_and(|at| run.room(*at) > 0 || run.is_empty(*at));
            wants[peer].write = sends;
        }
        for to in run.targets.iter().copied() {
            wants[to].write |= !self.links.flush(to).unwrap_or(true);
        }
        wants
    }

    /// Sends what the steps let go and the connection takes.
    fn send(&mut self, run: &mut Run<'_>, buffer: &[u8], to: usize) -> Result<bool, Trouble> {
        let mut moved = false;
        while let Some(at) = run.sends[to].front().copied() {
            let outgoing = &mut self.peers[to].outgoing;
            if !outgoing.is_begun() {
                let room = run.room(at).min(FRAME_MAX);
                if room == 0 && !run.is_empty(at) {
                    break;
                }
                outgoing.begin(self.generation, run.job.signature, room);
            }
            let position = run.positions[at];
            let payload = &buffer[position..position + outgoing.left];
            let sent = outgoing.send(&mut *self.links, to, payload).map_err(|_| Trouble::Ended(to))?;
            let Some(sent) = sent else { break };
            moved = true;
            run.positions[at] += sent;
            if !self.peers[to].outgoing.is_begun() && run.is_over(at) {
                run.sends[to].pop_front();
            }
        }
        Ok(moved)
    }

    /// Takes what has come and the steps let in.
    fn receive(&mut self, run: &mut Run<'_>, buffer: &mut [u8], from: usize) -> Result<bool, Trouble> {
        let mut moved = false;
        while let Some(at) = run.receives[from].front().copied() {
            if self.peers[from].incoming.left == 0 {
                // Not before the step may go on: what is not wanted yet stays where it is.
                if run.room(at) == 0 && !run.is_empty(at) || !self.begin_frame(run, from)? {
                    break;
                }
                moved = true;
            }
            if !run.is_empty(at) {
                match self.payload(run, buffer, from, at)? {
                    0 => break,
                    _ => moved = true,
                }
            }
            if run.is_over(at) {
                run.receives[from].pop_front();
            }
        }
        Ok(moved)
    }

    /// Some bytes of the frame that has begun, to where they belong.
    fn payload(
        &mut self,
        run: &mut Run<'_>,
        buffer: &mut [u8],
        from: usize,
        at: usize,
    ) -> Result<usize, Trouble> {
        let (step, position) = (&run.job.plan.steps[at], run.positions[at]);
        let incoming = &mut self.peers[from].incoming;
        let room = run.room(at).min(incoming.left + incoming.rest.len());
        let (Kind::Reduce(first), Some((dtype, op))) = (step.kind, run.job.reduction) else {
            let into = &mut buffer[position..position + room];
            let received = self.links.receive(from, into).map_err(|_| Trouble::Ended(from))?;
            incoming.left -= received;
            run.positions[at] += received;
            return Ok(received);
        };
        let had = incoming.rest.len();
        let room = room.min(STAGING);
        if room <= had {
            return Ok(0);
        }
        self.staging[..had].copy_from_slice(&incoming.rest);
        let received =
            self.links.receive(from, &mut self.staging[had..room]).map_err(|_| Trouble::Ended(from))?;
        incoming.left -= received;
        let whole = (had + received) / dtype.size() * dtype.size();
        incoming.rest.clear();
        incoming.rest.extend_from_slice(&self.staging[whole..had + received]);
        reduce_into(&mut buffer[position..position + whole], &self.staging[..whole], dtype, op, first);
        run.positions[at] += whole;
        Ok(received)
    }

    /// Reads a header; whether one is there.
    fn begin_frame(&mut self, run: &Run<'_>, from: usize) -> Result<bool, Trouble> {
        let Some(header) = self.header(from)? else { return Ok(false) };
        match header.body {
            Body::Data(bytes) if header.signature == run.job.signature => {
                self.peers[from].incoming.left = bytes;
                Ok(true)
            }
            Body::Data(bytes) => {
                self.peers[from].incoming.left = bytes;
                let differs = Farewell { reason: None, waits_for: None };
                self.peers[from].last = Some(Last::Said(header.signature, differs));
                Err(Trouble::Differs(from))
            }
            Body::Farewell(farewell) => {
                self.peers[from].last = Some(Last::Said(header.signature, farewell));
                Err(match farewell.reason {
                    Some(_) => Trouble::Said(from),
                    // It has made fewer calls than this rank.
                    None => Trouble::Ended(from),
                })
            }
        }
    }

    fn header(&mut self, from: usize) -> Result<Option<Header>, Trouble> {
        let peer = &mut self.peers[from];
        let mut bytes = [0; HEADER];
        while peer.incoming.header.len() < HEADER {
            let missing = HEADER - peer.incoming.header.len();
            let received = self.links.receive(from, &mut bytes[..missing]);
            match received.map_err(|_| Trouble::Ended(from))? {
                0 => return Ok(None),
                count => peer.incoming.header.extend_from_slice(&bytes[..count]),
            }
        }
        peer.heard = Instant::now();
        bytes.copy_from_slice(&peer.incoming.header);
        peer.incoming.header.clear();
        let header = Header::decode(&bytes).filter(|header| header.generation == self.generation);
        header.map(Some).ok_or(Trouble::Ended(from))
    }

    /// A peer has ended its side, perhaps behind what this call still needs.
    fn look_for_farewell(&mut self, from: usize) -> Result<(), Trouble> {
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
    fn complete_frames(&mut self, run: &Run<'_>, buffer: &[u8]) {
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
    fn part(&mut self, run: &Run<'_>, trouble: Trouble) -> CollectiveError {
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
                let room = left.min(STAGING);
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
    pub fn fail(&mut self, signature: Signature, abort: Abort) {
        self.say_farewell(signature, Farewell { reason: Some(abort), waits_for: None });
    }

    /// Tells all others that this rank has made all of its calls, and waits a little for what they have not read yet.
    pub fn leave(&mut self, signature: Signature) {
        let farewell = Farewell { reason: None, waits_for: None };
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

impl Outgoing {
    fn is_begun(&self) -> bool {
        !self.header.is_empty() || self.left > 0
    }

    fn begin(&mut self, generation: u64, signature: Signature, bytes: usize) {
        let header = Header { generation, signature, body: Body::Data(bytes) };
        self.header.extend_from_slice(&header.encode());
        self.left = bytes;
    }

    /// Sends some of the frame; `None` where nothing goes, otherwise how many bytes of the payload went. Header and first bytes go as one.
    fn send(&mut self, links: &mut dyn Links, to: usize, payload: &[u8]) -> io::Result<Option<usize>> {
        if self.header.is_empty() {
            let sent = links.send(to, payload)?;
            self.left -= sent;
            return Ok((sent > 0).then_some(sent));
        }
        let header = self.header.len();
        self.header.extend_from_slice(&payload[..payload.len().min(FIRST_MAX)]);
        let sent = links.send(to, &self.header)?;
        self.header.truncate(header);
        let of_header = sent.min(header);
        self.header.drain(..of_header);
        self.left -= sent - of_header;
        Ok((sent > 0).then_some(sent - of_header))
    }
}

/// Bytes that are copied behind a header, so that a small message is one.
const FIRST_MAX: usize = 4 << 10;

impl<'a> Run<'a> {
    fn new(job: &'a Job<'a>, world: usize) -> Run<'a> {
        let mut run = Run {
            job,
            positions: job.plan.steps.iter().map(|step| step.range.start).collect(),
            sends: vec![VecDeque::new(); world],
            receives: vec![VecDeque::new(); world],
            busy: Vec::new(),
            targets: Vec::new(),
            waited: Duration::ZERO,
        };
        for (at, step) in job.plan.steps.iter().enumerate() {
            let queues = if step.kind == Kind::Send { &mut run.sends } else { &mut run.receives };
            queues[step.peer].push_back(at);
            if step.kind == Kind::Send && !run.targets.contains(&step.peer) {
                run.targets.push(step.peer);
            }
            if !run.busy.contains(&step.peer) {
                run.busy.push(step.peer);
            }
        }
        run
    }

    /// Bytes by which step `at` may go on now.
    fn room(&self, at: usize) -> usize {
        self.job.plan.limit(at, &self.positions).saturating_sub(self.positions[at])
    }

    /// A message without bytes.
    fn is_empty(&self, at: usize) -> bool {
        self.job.plan.steps[at].range.is_empty()
    }

    fn is_over(&self, at: usize) -> bool {
        self.positions[at] == self.job.plan.steps[at].range.end
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
