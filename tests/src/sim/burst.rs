//! Processes that want many things at once: a client with dozens of changes under way, each of which is asked for again until it is
//! answered, some of them late, at any coordinator. Some processes die on the way, and another one asks again for what had a name.

use super::client::OPERATOR;
use super::jobs;
use super::net::{ConnId, Site};
use super::queue::{MINUTE, MS, Micros, SECOND};
use super::world::{Answered, Event, Payload, Purpose, Question, World};
use fleet_common::ids::{ClientId, UserId};
use fleet_common::protocol::{ClientFrame, Member, RefusalKind, Reply, Request};
use fleet_coordinator::cluster::session::RequestId;
use std::collections::BTreeMap;

/// For an answer; longer than a coordinator takes to give up itself.
const PATIENCE: Micros = 7 * SECOND;
/// Between the ends of a process's changes and the next process.
const THINK: Micros = 4 * MINUTE;
/// Changes of one process.
const CHANGES_MAX: u64 = 80;
/// Jobs that were submitted under a name by processes that died.
const NAMED_MAX: usize = 4;

pub enum BurstEvent {
    Begin { client: u32 },
    Retry { burst: u64, seq: u64, tries: u32 },
    Die { burst: u64 },
}

/// All such processes.
#[derive(Default)]
pub struct Bursts {
    last: u64,
    live: BTreeMap<u64, Burst>,
    by_conn: BTreeMap<ConnId, (u64, u64)>,
    /// Who died may have submitted these, or not.
    orphans: Vec<(String, Request)>,
}

struct Burst {
    client: u32,
    id: ClientId,
    /// Where the log was when it began.
    since: u64,
    next: u64,
    open: BTreeMap<u64, Ask>,
}

struct Ask {
    want: Want,
    request: Request,
    conn: Option<ConnId>,
    tries: u32,
    /// Then it is given up.
    tries_max: u32,
    sent: bool,
    /// A try may have been done, and no answer came.
    in_doubt: bool,
    /// An answer came, and the same is asked again before it counts as taken.
    known: Option<Reply>,
}

#[derive(Clone, Debug)]
enum Want {
    Start(String),
    Finish,
    Job(String),
}

impl Bursts {
    pub fn owns(&self, conn: ConnId) -> bool {
        self.by_conn.contains_key(&conn)
    }

    pub fn is_empty(&self) -> bool {
        self.live.is_empty()
    }

    fn ask(&mut self, burst: u64, seq: u64) -> Option<&mut Ask> {
        self.live.get_mut(&burst)?.open.get_mut(&seq)
    }

    /// The one that waits on this connection.
    fn waits(&mut self, conn: ConnId) -> Option<(u64, u64, &mut Ask)> {
        let (burst, seq) = *self.by_conn.get(&conn)?;
        let ask = self.live.get_mut(&burst)?.open.get_mut(&seq)?;
        (ask.conn == Some(conn)).then_some((burst, seq, ask))
    }
}

impl Burst {
    fn frame(&self, seq: u64) -> Option<Question> {
        let request = self.open.get(&seq)?.request.clone();
        let answered_below = *self.open.first_key_value()?.0;
        let frame =
            ClientFrame { since: self.since, answered_below, ..ClientFrame::change(self.id, seq, request) };
        Some(Question::Client { caller: Member::Client(UserId(u64::from(self.client) + 1)), frame })
    }
}

impl World {
    pub fn begin_bursts(&mut self) {
        let clients: Vec<u32> = self.clients.keys().copied().filter(|client| *client != OPERATOR).collect();
        for client in clients {
            let after = self.random.around(THINK);
            self.queue.after(after, Event::Burst(BurstEvent::Begin { client }));
        }
    }

    pub fn on_burst(&mut self, event: BurstEvent) {
        match event {
            BurstEvent::Begin { client } => self.burst_begins(client),
            BurstEvent::Retry { burst, seq, tries } => self.burst_retries(burst, seq, tries),
            BurstEvent::Die { burst } => self.burst_dies(burst),
        }
    }

    fn burst_begins(&mut self, client: u32) {
        if self.calm {
            return;
        }
        let after = self.random.around(THINK);
        self.queue.after(after, Event::Burst(BurstEvent::Begin { client }));
        self.bursts.last += 1;
        let burst = self.bursts.last;
        let id = ClientId(0xB025_0000_0000 + u128::from(burst));
        let (since, open) = (self.oracle.applied(), BTreeMap::new());
        self.bursts.live.insert(burst, Burst { client, id, since, next: 1, open });
        let many = 2 + self.random.range(0..CHANGES_MAX);
        for n in 1..=many {
            let name = format!("b{burst}-{n}");
            self.burst_wants(burst, Want::Start(name.clone()), Request::StartRun { name });
        }
        let adopted = std::mem::take(&mut self.bursts.orphans);
        for (name, request) in adopted {
            self.burst_wants(burst, Want::Job(name), request);
        }
        if self.oracle.unfinished().len() < 8 {
            let name = format!("b{burst}");
            if let Request::Submit(job) = jobs::submit(&name, &mut self.random, &self.machines) {
                let request = Request::SubmitOnce { name: name.clone(), job };
                self.burst_wants(burst, Want::Job(name), request);
            }
        }
        if self.random.chance(1, 3) {
            let after = self.random.range(100 * MS..15 * SECOND);
            self.queue.after(after, Event::Burst(BurstEvent::Die { burst }));
        }
        self.say(format_args!("client-{client} begins process {burst} with {many} changes"));
    }

    fn burst_wants(&mut self, number: u64, want: Want, request: Request) {
        // Some give up early, as commands do, and some hold on.
        let tries_max = if self.random.chance(1, 4) { 1 + self.random.range(0..3) as u32 } else { 20 };
        let first = self.random.range(0..SECOND);
        let Some(burst) = self.bursts.live.get_mut(&number) else { return };
        let seq = burst.next;
        burst.next += 1;
        let (conn, known) = (None, None);
        let ask = Ask { want, request, conn, tries: 0, tries_max, sent: false, in_doubt: false, known };
        burst.open.insert(seq, ask);
        self.queue.after(first, Event::Burst(BurstEvent::Retry { burst: number, seq, tries: 0 }));
    }

    fn burst_retries(&mut self, burst: u64, seq: u64, tries: u32) {
        let Some(ask) = self.bursts.ask(burst, seq).filter(|ask| ask.tries == tries) else { return };
        // Whatever it was that went out was not answered.
        ask.in_doubt |= ask.sent;
        ask.sent = false;
        if tries >= ask.tries_max {
            return self.burst_gives_up(burst, seq);
        }
        ask.tries += 1;
        let (tries, old) = (ask.tries, ask.conn.take());
        if let Some(old) = old {
            self.hang_up(old);
        }
        let Some(client) = self.bursts.live.get(&burst).map(|burst| burst.client) else { return };
        let targets: Vec<u32> = self.addresses.values().copied().collect();
        let target = self.random.pick(&targets).copied();
        let (now, site) = (self.queue.now(), Site::Client(client));
        let connected = target.and_then(|to| self.net.connect(site, Site::Host(to), now, &mut self.random));
        let again = Event::Burst(BurstEvent::Retry { burst, seq, tries });
        let Some((conn, at)) = connected else { return self.queue.after(SECOND, again) };
        if let Some(ask) = self.bursts.ask(burst, seq) {
            ask.conn = Some(conn);
        }
        self.bursts.by_conn.insert(conn, (burst, seq));
        self.purposes.insert(conn, Purpose::Call);
        self.queue.at(at[0], Event::Connected { conn, end: 0 });
        self.queue.after(PATIENCE, again);
    }

    fn hang_up(&mut self, conn: ConnId) {
        self.bursts.by_conn.remove(&conn);
        self.net.close(conn, 0);
    }

    pub fn burst_connected(&mut self, conn: ConnId) {
        let Some((burst, seq, ask)) = self.bursts.waits(conn) else { return };
        ask.sent = true;
        if let Some(question) = self.bursts.live.get(&burst).and_then(|burst| burst.frame(seq)) {
            self.send(conn, 0, Payload::Question(question), 500);
        }
    }

    pub fn burst_loses(&mut self, conn: ConnId) {
        if let Some((burst, seq, ask)) = self.bursts.waits(conn) {
            let tries = ask.tries;
            self.burst_asks_again(burst, seq, tries);
        }
    }

    /// Soon, or when its answer is old.
    fn burst_asks_again(&mut self, burst: u64, seq: u64, tries: u32) {
        let late = self.random.chance(1, 6);
        let wait = if late { self.random.range(SECOND..MINUTE) } else { self.random.range(10 * MS..SECOND) };
        self.queue.after(wait, Event::Burst(BurstEvent::Retry { burst, seq, tries }));
    }

    /// All that it was told is that nothing was done: then nothing may ever be.
    fn burst_gives_up(&mut self, burst: u64, seq: u64) {
        let Some(of) = self.bursts.live.get_mut(&burst) else { return };
        let Some(ask) = of.open.remove(&seq) else { return };
        let request = RequestId { client: of.id, seq };
        if !ask.in_doubt
            && ask.known.is_none()
            && let Err(what) = self.oracle.never_done(request)
        {
            self.violated(format!("{:?} of process {burst}: {what}", ask.want));
        }
        if let Some(conn) = ask.conn {
            self.hang_up(conn);
        }
        self.burst_ends_if_done(burst);
    }

    fn burst_ends_if_done(&mut self, burst: u64) {
        if self.bursts.live.get(&burst).is_some_and(|burst| burst.open.is_empty()) {
            self.bursts.live.remove(&burst);
        }
    }

    fn burst_dies(&mut self, burst: u64) {
        let Some(dead) = self.bursts.live.remove(&burst) else { return };
        self.say(format_args!("process {burst} dies with {} changes under way", dead.open.len()));
        for ask in dead.open.into_values() {
            if let Some(conn) = ask.conn {
                self.hang_up(conn);
            }
            if let Want::Job(name) = ask.want
                && self.bursts.orphans.len() < NAMED_MAX
            {
                self.bursts.orphans.push((name, ask.request));
            }
        }
    }

    pub fn burst_hears(&mut self, conn: ConnId, answered: Answered) {
        let now = self.queue.now();
        let Some((burst, seq, ask)) = self.bursts.waits(conn) else { return };
        let Answered::Reply(reply) = answered else { return };
        let (want, tries) = (ask.want.clone(), ask.tries);
        ask.sent = false;
        if let Reply::Refused(refusal) = &reply
            && refusal.kind.is_passing()
        {
            ask.in_doubt |= refusal.kind == RefusalKind::Undecided;
            ask.conn = None;
            self.hang_up(conn);
            return self.burst_asks_again(burst, seq, tries);
        }
        let verdict = match (&ask.known, &want, &reply) {
            (Some(known), _, reply) if known != reply => {
                Err(format!("it was answered with {known:?} before, and now with {reply:?}"))
            }
            (_, Want::Start(name), Reply::RunStarted(run)) => self.oracle.run_started(name, *run),
            (_, Want::Job(name), Reply::Submitted { job }) => self.oracle.submitted(name, *job, now),
            (_, Want::Finish, Reply::Done) => Ok(()),
            (_, _, Reply::Refused(refusal)) if refusal.kind == RefusalKind::Later => Ok(()),
            (_, _, reply) => Err(format!("it was answered with {reply:?}")),
        };
        if let Err(what) = verdict {
            return self.violated(format!("{want:?} of process {burst}: {what}"));
        }
        let again = self.random.chance(1, 5);
        if let Some(ask) = self.bursts.ask(burst, seq).filter(|ask| again && ask.known.is_none()) {
            ask.known = Some(reply);
            ask.conn = None;
            self.hang_up(conn);
            return self.burst_asks_again(burst, seq, tries);
        }
        self.hang_up(conn);
        if let Some(burst) = self.bursts.live.get_mut(&burst) {
            burst.open.remove(&seq);
        }
        if let Reply::RunStarted(run) = reply {
            self.burst_wants(burst, Want::Finish, Request::FinishRun { run, succeeded: true });
        }
        self.burst_ends_if_done(burst);
    }
}
