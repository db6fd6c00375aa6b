//! The network: connections as QUIC has them, over paths that can be cut, slow and lossy.
//!
//! Within a connection what arrives does so in order and once. A cut shorter than the idle timeout delays; a longer one ends the
//! connection at each end by itself, and with it is lost what had not arrived: a suffix, never something in between. Packets that get
//! lost cost time. A process that was killed says no goodbye.

use super::queue::{MS, Micros, SECOND};
use super::random::Random;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt;

/// An end that hears nothing for so long gives the connection up; `fleet_common::net` has the same.
pub const IDLE: Micros = 2 * SECOND;
/// For a connection that does not come about; likewise.
pub const CONNECT_DEADLINE: Micros = SECOND;

/// A process that takes part. Its name stays when it is started again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Site {
    /// Runs a coordinator.
    Host(u32),
    /// Runs an agent and ranks.
    Machine(u32),
    Client(u32),
}

impl fmt::Display for Site {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Site::Host(n) => write!(f, "host-{n}"),
            Site::Machine(n) => write!(f, "machine-{n}"),
            Site::Client(n) => write!(f, "client-{n}"),
        }
    }
}

pub type ConnId = u64;

/// One direction between two sites.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Path {
    pub cut: bool,
    pub latency: Micros,
    /// Added to the latency, up to so much.
    pub jitter: Micros,
    /// Of a thousand packets so many have to be sent again.
    pub loss: u64,
    pub bytes_per_ms: u64,
}

/// Machines in one room.
pub const GOOD: Path = Path { cut: false, latency: 100, jitter: 400, loss: 0, bytes_per_ms: 100_000 };

#[derive(Clone, Copy, Debug)]
struct Life {
    number: u64,
    paused: bool,
}

#[derive(Clone, Copy, Debug)]
struct End {
    site: Site,
    life: u64,
    open: bool,
    heard: Micros,
}

#[derive(Debug)]
struct Conn<P> {
    ends: [End; 2],
    /// By receiving end: when the last message arrives, and what waits for the path to come back.
    last_arrival: [Micros; 2],
    held: [VecDeque<(P, usize)>; 2],
}

/// What comes of looking at the network.
#[derive(Debug)]
pub enum NetEvent<P> {
    Arrives {
        at: Micros,
        conn: ConnId,
        end: usize,
        payload: P,
    },
    /// This end has given up, or hears that the other has.
    Lost {
        conn: ConnId,
        site: Site,
    },
}

#[derive(Debug)]
pub struct Net<P> {
    conns: BTreeMap<ConnId, Conn<P>>,
    next: ConnId,
    paths: BTreeMap<(Site, Site), Path>,
    lives: BTreeMap<Site, Life>,
    /// The last time when each path was not good, for those who ask whether it was.
    bad_until: BTreeMap<(Site, Site), Micros>,
}

impl<P> Default for Net<P> {
    fn default() -> Self {
        Net {
            conns: BTreeMap::new(),
            next: 1,
            paths: BTreeMap::new(),
            lives: BTreeMap::new(),
            bad_until: BTreeMap::new(),
        }
    }
}

impl<P> Net<P> {
    /// A process starts under this name.
    pub fn up(&mut self, site: Site, life: u64) {
        self.lives.insert(site, Life { number: life, paused: false });
    }

    /// It is gone, and with it its ends of all connections.
    pub fn down(&mut self, site: Site) {
        self.lives.remove(&site);
        for end in self.conns.values_mut().flat_map(|conn| &mut conn.ends).filter(|end| end.site == site) {
            end.open = false;
        }
    }

    pub fn pause(&mut self, site: Site, paused: bool) {
        if let Some(life) = self.lives.get_mut(&site) {
            life.paused = paused;
        }
    }

    pub fn path(&self, from: Site, to: Site) -> Path {
        self.paths.get(&(from, to)).copied().unwrap_or(GOOD)
    }

    pub fn set_path(&mut self, from: Site, to: Site, path: Path, now: Micros) {
        if path == GOOD {
            if self.paths.remove(&(from, to)).is_some() {
                self.bad_until.insert((from, to), now);
            }
        } else {
            self.paths.insert((from, to), path);
        }
    }

    pub fn heal(&mut self, now: Micros) {
        let all: Vec<(Site, Site)> = self.paths.keys().copied().collect();
        all.into_iter().for_each(|(from, to)| self.set_path(from, to, GOOD, now));
    }

    /// Whether the path was good all the time since `since`.
    pub fn good_since(&self, from: Site, to: Site, since: Micros) -> bool {
        !self.paths.contains_key(&(from, to))
            && self.bad_until.get(&(from, to)).is_none_or(|until| *until < since)
    }

    fn is_running(&self, site: Site) -> bool {
        self.lives.get(&site).is_some_and(|life| !life.paused)
    }

    /// Makes a connection. Both ends may use it from the returned times on; `None` when it does not come about.
    pub fn connect(
        &mut self,
        from: Site,
        to: Site,
        now: Micros,
        random: &mut Random,
    ) -> Option<(ConnId, [Micros; 2])> {
        if !self.is_running(from) || !self.is_running(to) {
            return None;
        }
        let (there, back) = (self.path(from, to), self.path(to, from));
        if there.cut || back.cut {
            return None;
        }
        let round = there.delay(random, 0) + back.delay(random, 0);
        if round > CONNECT_DEADLINE {
            return None;
        }
        let end = |site| End { site, life: self.lives[&site].number, open: true, heard: now + round };
        let at = [now + round, now + round + there.delay(random, 0)];
        let conn = Conn {
            ends: [end(from), end(to)],
            last_arrival: [at[0], at[1]],
            held: [VecDeque::new(), VecDeque::new()],
        };
        let id = self.next;
        self.next += 1;
        self.conns.insert(id, conn);
        Some((id, at))
    }

    /// Whether the process that this end belongs to still has it.
    pub fn is_open(&self, conn: ConnId, end: usize) -> bool {
        self.conns.get(&conn).is_some_and(|conn| {
            let end = &conn.ends[end];
            end.open && self.lives.get(&end.site).is_some_and(|life| life.number == end.life)
        })
    }

    pub fn site(&self, conn: ConnId, end: usize) -> Option<Site> {
        self.conns.get(&conn).map(|conn| conn.ends[end].site)
    }

    /// Sends from one end to the other. Says when it arrives, if it is on its way at once.
    pub fn send(
        &mut self,
        conn: ConnId,
        from_end: usize,
        payload: P,
        bytes: usize,
        now: Micros,
        random: &mut Random,
    ) -> Option<NetEvent<P>> {
        let end = 1 - from_end;
        let known = self.conns.get(&conn)?;
        if !known.ends[from_end].open {
            return None;
        }
        let path = self.path(known.ends[from_end].site, known.ends[end].site);
        let known = self.conns.get_mut(&conn)?;
        if path.cut || !known.held[end].is_empty() {
            known.held[end].push_back((payload, bytes));
            return None;
        }
        let at = (now + path.delay(random, bytes)).max(known.last_arrival[end] + 1);
        known.last_arrival[end] = at;
        Some(NetEvent::Arrives { at, conn, end, payload })
    }

    /// This end is done with the connection; the other hears of it if it can.
    pub fn close(&mut self, conn: ConnId, end: usize) {
        if let Some(conn) = self.conns.get_mut(&conn) {
            conn.ends[end].open = false;
        }
    }

    /// What has come about by the mere passing of time. To be asked every so often.
    pub fn look(&mut self, now: Micros, random: &mut Random) -> Vec<NetEvent<P>> {
        let mut found = Vec::new();
        let mut gone = BTreeSet::new();
        for (&id, conn) in &mut self.conns {
            for end in [0, 1] {
                let other = 1 - end;
                let (mine, theirs) = (conn.ends[end], conn.ends[other]);
                let alive = |end: End| self.lives.get(&end.site).is_some_and(|life| life.number == end.life);
                let paused = |end: End| self.lives.get(&end.site).is_some_and(|life| life.paused);
                if !mine.open || !alive(mine) || paused(mine) {
                    continue;
                }
                let path = self.paths.get(&(theirs.site, mine.site)).copied().unwrap_or(GOOD);
                if !path.cut {
                    for (payload, bytes) in std::mem::take(&mut conn.held[end]) {
                        let at = (now + path.delay(random, bytes)).max(conn.last_arrival[end] + 1);
                        conn.last_arrival[end] = at;
                        found.push(NetEvent::Arrives { at, conn: id, end, payload });
                    }
                }
                let closed = !theirs.open && alive(theirs) && !path.cut && !paused(theirs);
                if theirs.open && alive(theirs) && !paused(theirs) && !path.cut {
                    conn.ends[end].heard = conn.ends[end].heard.max(now);
                } else if closed && now > conn.last_arrival[end] || now > mine.heard + IDLE {
                    conn.ends[end].open = false;
                    found.push(NetEvent::Lost { conn: id, site: mine.site });
                }
            }
            if conn.ends.iter().all(|end| !end.open || !self.lives.contains_key(&end.site)) {
                gone.insert(id);
            }
        }
        gone.into_iter().for_each(|id| drop(self.conns.remove(&id)));
        found
    }
}

impl Path {
    fn delay(self, random: &mut Random, bytes: usize) -> Micros {
        let mut delay =
            self.latency + random.range(0..self.jitter + 1) + bytes as u64 * MS / self.bytes_per_ms;
        // A lost packet is noticed after a while and sent again, perhaps more than once.
        while self.loss > 0 && random.chance(self.loss, 1000) && delay < 2 * SECOND {
            delay += 30 * MS + self.latency * 2 + random.range(0..100 * MS);
        }
        delay
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: Site = Site::Host(1);
    const B: Site = Site::Host(2);

    fn pair() -> (Net<u32>, Random, ConnId) {
        let (mut net, mut random) = (Net::default(), Random::new(1));
        net.up(A, 1);
        net.up(B, 1);
        let (conn, _) = net.connect(A, B, 0, &mut random).unwrap();
        (net, random, conn)
    }

    fn cut(net: &mut Net<u32>, from: Site, to: Site, cut: bool, now: Micros) {
        net.set_path(from, to, Path { cut, ..GOOD }, now);
    }

    fn arrivals(events: Vec<NetEvent<u32>>) -> Vec<u32> {
        let one = |event| if let NetEvent::Arrives { payload, .. } = event { Some(payload) } else { None };
        events.into_iter().filter_map(one).collect()
    }

    #[test]
    fn a_short_cut_delays_and_keeps_the_order() {
        let (mut net, mut random, conn) = pair();
        cut(&mut net, A, B, true, 0);
        assert!(net.send(conn, 0, 1, 10, SECOND, &mut random).is_none());
        cut(&mut net, A, B, false, 0);
        assert!(net.send(conn, 0, 2, 10, SECOND, &mut random).is_none(), "not past the first");
        assert_eq!(arrivals(net.look(SECOND + 1, &mut random)), [1, 2]);
        assert!(net.is_open(conn, 0) && net.is_open(conn, 1));
    }

    #[test]
    fn a_long_cut_one_way_ends_it_at_both_ends_one_after_the_other() {
        let (mut net, mut random, _) = pair();
        cut(&mut net, A, B, true, 0);
        let lost = |events: Vec<NetEvent<u32>>| -> Vec<Site> {
            let by = |event| if let NetEvent::Lost { site, .. } = event { Some(site) } else { None };
            events.into_iter().filter_map(by).collect()
        };
        assert_eq!(lost(net.look(SECOND, &mut random)), []);
        assert_eq!(lost(net.look(4 * SECOND, &mut random)), [B]);
        assert_eq!(lost(net.look(5 * SECOND, &mut random)), [A], "the other end closed and says so");
    }

    #[test]
    fn a_killed_process_is_missed_after_the_idle_timeout() {
        let (mut net, mut random, conn) = pair();
        net.look(SECOND, &mut random);
        net.down(B);
        net.up(B, 2);
        assert!(net.look(2 * SECOND, &mut random).is_empty());
        assert!(matches!(net.look(3 * SECOND + 2, &mut random)[..], [NetEvent::Lost { site: A, .. }]));
        assert!(!net.is_open(conn, 1));
    }
}
