//! The steps of all ranks under a virtual clock.
//!
//! A message occupies what it goes out by for its bytes: a rank's own port inside a host, the host's port across. Its first byte may go when
//! the first bytes that it waits for have come, its last byte when the last has; so a chain of messages flows, as it does in `driver.rs`.

use super::{Link, Links, PACKET};
use crate::algorithm::{Kind, Plan, Step, Topology};
use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::time::Duration;

/// Bytes that are handed on at once: below it a message waits for the whole of what it depends on.
const FLOW: f64 = 16384.0;

/// When the first byte and the last one of a step are through, in seconds; `None` while it is not known.
type Times = Option<(f64, f64)>;

/// A peer, its messages that have come and are not received, and the steps that receive.
type Incoming = (usize, VecDeque<(f64, f64)>, VecDeque<usize>);

struct Rank {
    plan: Plan,
    times: Vec<Times>,
    peers: Vec<Incoming>,
    /// Steps that send, in their order.
    sends: VecDeque<usize>,
    /// When the last that it received was through.
    end: f64,
}

/// Seconds as whole picoseconds, to be ordered.
fn key(seconds: f64) -> u64 {
    (seconds * 1e12) as u64
}

pub fn time(steps: impl Fn(usize) -> Vec<Step>, topology: &Topology, links: &Links) -> Duration {
    let world = topology.world();
    let mut ranks: Vec<Rank> = (0..world).map(|rank| Rank::new(steps(rank))).collect();
    let mut ports = vec![0.0f64; world];
    let mut host_ports = vec![0.0f64; topology.hosts()];
    let mut lost = 0x9e37_79b9_7f4a_7c15u64;
    // Ranks that may be able to go on, by time.
    let mut ready: BinaryHeap<Reverse<(u64, usize)>> = (0..world).map(|rank| Reverse((0, rank))).collect();
    let mut end = 0.0f64;
    while let Some(Reverse((_, me))) = ready.pop() {
        ranks[me].receive(links.reduce);
        while let Some((place, from)) = ranks[me].next_send() {
            let Some(at) = ranks[me].sends.remove(place) else { break };
            let step = ranks[me].plan.steps[at].clone();
            let inside = topology.host_of(me) == topology.host_of(step.peer);
            let (link, port) = match inside {
                true => (&links.inside, &mut ports[me]),
                false => (&links.across, &mut host_ports[topology.host_of(me)]),
            };
            let length = step.range.len() as f64 / link.bandwidth;
            let first = from.0.max(*port);
            let last = (first + length).max(from.1 + length.min(FLOW / link.bandwidth));
            *port = first + length;
            ranks[me].times[at] = Some((first, last));
            let late = delay(link, step.range.len(), &mut lost) + link.latency.as_secs_f64();
            let came = (first + late, last + late);
            if let Some((_, messages, _)) = ranks[step.peer].peers.iter_mut().find(|peer| peer.0 == me) {
                messages.push_back(came);
            }
            ready.push(Reverse((key(came.0), step.peer)));
            // Its first byte is received when the last is on its way.
            end = end.max(last + late);
        }
        end = end.max(ranks[me].end);
    }
    Duration::from_secs_f64(end)
}

/// What losses cost this message.
fn delay(link: &Link, bytes: usize, chance: &mut u64) -> f64 {
    if link.loss == 0.0 {
        return 0.0;
    }
    let packets = bytes.div_ceil(PACKET).max(1) as f64;
    *chance = chance.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    let drawn = (*chance >> 11) as f64 / (1u64 << 53) as f64;
    let none_lost = (1.0 - link.loss).powf(packets);
    if drawn < none_lost { 0.0 } else { link.retransmit.as_secs_f64() }
}

impl Rank {
    fn new(steps: Vec<Step>) -> Rank {
        let mut rank = Rank {
            times: vec![None; steps.len()],
            peers: Vec::new(),
            sends: (0..steps.len()).filter(|at| steps[*at].kind == Kind::Send).collect(),
            plan: Plan::new(Vec::new()),
            end: 0.0,
        };
        for (at, step) in steps.iter().enumerate().filter(|(_, step)| step.kind != Kind::Send) {
            match rank.peers.iter_mut().find(|peer| peer.0 == step.peer) {
                Some((_, _, receives)) => receives.push_back(at),
                None => rank.peers.push((step.peer, VecDeque::new(), VecDeque::from([at]))),
            }
        }
        rank.plan = Plan::new(steps);
        rank
    }

    /// When everything that step `at` waits for is through; `None` while something is not known.
    fn from(&self, at: usize) -> Times {
        self.plan.earlier(at).try_fold((0.0f64, 0.0f64), |from, other| {
            let (first, last) = self.times[other]?;
            Some((from.0.max(first), from.1.max(last)))
        })
    }

    fn receive(&mut self, reduce: f64) {
        loop {
            let mut moved = false;
            for peer in 0..self.peers.len() {
                let (_, messages, receives) = &self.peers[peer];
                let (Some(came), Some(at)) = (messages.front().copied(), receives.front().copied()) else {
                    continue;
                };
                let Some(from) = self.from(at) else { continue };
                let step = &self.plan.steps[at];
                let work = if step.kind == Kind::Receive { 0.0 } else { step.range.len() as f64 * reduce };
                let first = came.0.max(from.0);
                let last = came.1.max(from.1).max(first + work);
                self.times[at] = Some((first, last));
                self.end = self.end.max(last);
                self.peers[peer].1.pop_front();
                self.peers[peer].2.pop_front();
                moved = true;
            }
            if !moved {
                return;
            }
        }
    }

    /// The place of the first step that sends and waits for nothing that is not known, and from when on it may.
    fn next_send(&self) -> Option<(usize, (f64, f64))> {
        // A rank has few sends open at a time; those far behind wait for what is not known.
        let near = self.sends.iter().take(SENDS_AHEAD).enumerate();
        near.into_iter().find_map(|(place, at)| Some((place, self.from(*at)?)))
    }
}

/// How far a rank looks for sends that need not wait for earlier ones.
const SENDS_AHEAD: usize = 16;
