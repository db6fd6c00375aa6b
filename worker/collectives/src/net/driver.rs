//! Carries out the steps of a plan over connections, in the thread that calls it.
//!
//! Every connection makes progress by itself: a rank takes what its peers send as soon as its own steps let it, and never waits for one peer
//! while another could go on. What a rank may not take yet stays with the sender.

use super::frame::{Body, FRAME_MAX, Farewell, HEADER, Header};
use super::links::{Links, Want};
use super::rate::Rate;
use super::verdict::Last;
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
/// What is received to be reduced.
const STAGING: usize = 64 << 10;

/// The same for all who may end a gang's calls: 0, or the word of the first `Abort`.
pub type Stop = Arc<AtomicU64>;

pub struct Driver {
    pub(super) links: Box<dyn Links>,
    pub(super) rank: usize,
    pub(super) generation: u64,
    pub(super) peers: Vec<Peer>,
    pub(super) staging: Vec<u8>,
    stop: Stop,
}

/// The state of one connection, between frames and in the middle of them.
pub(super) struct Peer {
    pub incoming: Incoming,
    pub outgoing: Outgoing,
    pub heard: Instant,
    /// At which it takes what this rank sends.
    pub rate: Rate,
    pub last: Option<Last>,
    /// All that it sent was read.
    pub gone: bool,
}

#[derive(Default)]
pub(super) struct Incoming {
    pub header: Vec<u8>,
    /// Bytes of the frame that are still to come.
    pub left: usize,
    /// Of an element that came in part.
    rest: Vec<u8>,
}

#[derive(Default)]
pub(super) struct Outgoing {
    /// Of the header, what is still to be sent.
    header: Vec<u8>,
    /// Bytes of the frame that are still to be sent.
    pub left: usize,
}

/// One call.
pub struct Job<'a> {
    pub plan: &'a Plan,
    pub reduction: Option<(DType, Op)>,
    pub signature: Signature,
    pub deadline: Duration,
}

/// Where a call stands.
pub(super) struct Run<'a> {
    pub job: &'a Job<'a>,
    pub positions: Vec<usize>,
    /// Of each peer, its steps that are not over.
    pub sends: Vec<VecDeque<usize>>,
    pub receives: Vec<VecDeque<usize>>,
    busy: Vec<usize>,
    /// To whom something is sent.
    targets: Vec<usize>,
    pub waited: Duration,
}

/// Why a call cannot go on.
pub(super) enum Trouble {
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
            rate: Rate::default(),
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
        for (peer, want) in wants.iter_mut().enumerate() {
            let goes = |at: &usize| run.room(*at) > 0 || run.is_empty(*at);
            let begun = self.peers[peer].outgoing.is_begun();
            want.read = run.receives[peer].front().is_some_and(goes);
            want.write = run.sends[peer].front().is_some_and(|at| begun || goes(at));
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
            let Peer { outgoing, rate, .. } = &mut self.peers[to];
            if !outgoing.is_begun() {
                let room = run.room(at).min(FRAME_MAX);
                if room == 0 && !run.is_empty(at) {
                    rate.is_idle();
                    break;
                }
                outgoing.begin(self.generation, run.job.signature, room);
            }
            let position = run.positions[at];
            let payload = &buffer[position..position + outgoing.left];
            let sent = outgoing.send(&mut *self.links, to, payload).map_err(|_| Trouble::Ended(to))?;
            let Some(sent) = sent else {
                rate.is_full(Instant::now());
                break;
            };
            rate.took(sent, Instant::now());
            moved = true;
            run.positions[at] += sent;
            if !self.peers[to].outgoing.is_begun() && run.is_over(at) {
                run.sends[to].pop_front();
            }
        }
        if run.sends[to].is_empty() {
            self.peers[to].rate.is_idle();
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

    pub(super) fn header(&mut self, from: usize) -> Result<Option<Header>, Trouble> {
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
}

impl Outgoing {
    pub fn is_begun(&self) -> bool {
        !self.header.is_empty() || self.left > 0
    }

    fn begin(&mut self, generation: u64, signature: Signature, bytes: usize) {
        let header = Header { generation, signature, body: Body::Data(bytes) };
        self.header.extend_from_slice(&header.encode());
        self.left = bytes;
    }

    /// Sends some of the frame; `None` where nothing goes, otherwise how many bytes of the payload went. Header and first bytes go as one.
    pub fn send(&mut self, links: &mut dyn Links, to: usize, payload: &[u8]) -> io::Result<Option<usize>> {
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
