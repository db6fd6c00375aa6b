//! Server-sent events: the cluster and its queue as they change, and a job with its events. (HTML Standard, "Server-sent events".)
//!
//! A stream outlives a leader: while nobody leads it says so, shows what this coordinator has, and goes on.

use super::Shared;
use super::calls::{Watching, unavailable};
use super::http::ask;
use crate::control::READER;
use crate::page::Overview;
use bytes::Bytes;
use fleet_common::events::Event;
use fleet_common::http::{Body, Feed, Left};
use fleet_common::ids::JobId;
use fleet_common::protocol::{ClientFrame, JobView, Refusal, Reply, Request};
use serde::Serialize;
use serde_json::json;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::{Instant, interval, sleep, timeout};

/// Streams at once: fewer than HTTP has connections, so that others can ask.
const STREAMS_MAX: usize = 32;
/// Pieces that wait for a reader; one that leaves more of them is cut.
const PIECES_MAX: usize = 16;
/// For a reader to make room when there is much to catch up with.
const GIVE: Duration = Duration::from_secs(10);
/// Between two looks at what has changed.
const LOOK: Duration = Duration::from_secs(1);
/// For a leader's answer; without it what this coordinator has is shown.
const LEADER: Duration = Duration::from_millis(1_500);
/// Between two signs of life of a stream on which nothing happens.
const BEAT: Duration = Duration::from_secs(10);
/// Before a watch that this coordinator could not go on with is begun anew.
const AGAIN: Duration = Duration::from_millis(500);
/// Events in one message, and about their bytes.
const EVENTS_MAX: usize = 256;
const EVENTS_BYTES: usize = 256 << 10;
/// Events in one answer that is no stream.
const PAGE_MAX: usize = 1_000;

/// All streams of this coordinator.
pub struct Streams {
    room: Arc<Semaphore>,
    /// The last look at the cluster, as a message; empty while nobody wants it.
    overview: watch::Sender<Bytes>,
    wanted: Notify,
}

impl Default for Streams {
    fn default() -> Streams {
        Streams {
            room: Arc::new(Semaphore::new(STREAMS_MAX)),
            overview: watch::channel(Bytes::new()).0,
            wanted: Notify::new(),
        }
    }
}

impl Streams {
    /// How many there are now.
    pub fn open(&self) -> usize {
        STREAMS_MAX - self.room.available_permits()
    }

    fn place(&self) -> Result<OwnedSemaphorePermit, Refusal> {
        self.room.clone().try_acquire_owned().map_err(|_| {
            unavailable(format!(
                "{STREAMS_MAX} pages are open at this coordinator; close one, or open another coordinator's"
            ))
        })
    }
}

/// Looks at the cluster for all that watch it, as long as somebody does.
pub async fn look_out(shared: Arc<Shared>) {
    let streams = &shared.streams;
    loop {
        if streams.overview.receiver_count() == 0 {
            streams.overview.send_replace(Bytes::new());
            streams.wanted.notified().await;
        }
        if let Some(seen) = overview(&shared).await {
            let message = message("overview", None, &seen);
            streams.overview.send_if_modified(|before| {
                let differs = *before != message;
                *before = message;
                differs
            });
        }
        sleep(LOOK).await;
    }
}

async fn overview(shared: &Shared) -> Option<Overview> {
    let (cluster, stale) = fresh(shared, Request::ClusterStatus).await;
    let (coordinators, nodes, jobs) = tokio::join!(
        look(shared, Request::Coordinators, stale),
        look(shared, Request::Nodes, stale),
        look(shared, Request::Jobs { all: None }, stale),
    );
    match (cluster, coordinators, nodes, jobs) {
        (
            Reply::Cluster(cluster),
            Reply::Coordinators(coordinators),
            Reply::Nodes(nodes),
            Reply::Jobs(jobs),
        ) => Some(Overview::new(stale, cluster, coordinators, nodes, jobs.items)),
        _ => None,
    }
}

/// What the leader says, or what this coordinator has and that it is old.
async fn fresh(shared: &Shared, request: Request) -> (Reply, bool) {
    if shared.status.borrow().leader.is_some()
        && let Ok(reply) = timeout(LEADER, ask(shared, request.clone(), false)).await
        && !matches!(&reply, Reply::Refused(refusal) if refusal.kind.is_passing())
    {
        return (reply, false);
    }
    (ask(shared, request, true).await, true)
}

async fn look(shared: &Shared, request: Request, stale: bool) -> Reply {
    match timeout(LEADER, ask(shared, request, stale)).await {
        Ok(reply) => reply,
        Err(_) => Reply::Refused(unavailable("no answer in time")),
    }
}

/// The cluster, whenever it has changed.
pub fn cluster(shared: &Arc<Shared>) -> Result<Body, Refusal> {
    let place = shared.streams.place()?;
    let (feed, body) = Body::growing(PIECES_MAX);
    let mut seen = shared.streams.overview.subscribe();
    seen.mark_changed();
    shared.streams.wanted.notify_one();
    tokio::spawn(async move {
        let _place = place;
        let mut beat = interval(BEAT);
        loop {
            let sent = tokio::select! {
                changed = seen.changed() => match changed {
                    Ok(()) => {
                        let message = seen.borrow_and_update().clone();
                        if message.is_empty() { Ok(()) } else { feed.send(message) }
                    }
                    Err(_) => return,
                },
                _ = beat.tick() => feed.send(BEAT_MESSAGE),
                () = feed.left() => return,
            };
            if sent.is_err() {
                return;
            }
        }
    });
    Ok(body)
}

const BEAT_MESSAGE: &str = "event: beat\ndata: 0\n\n";

/// A job whenever it has changed, and its events from the `from`-th on, each once.
pub fn job(shared: &Arc<Shared>, job: JobId, from: u64) -> Result<Body, Refusal> {
    let place = shared.streams.place()?;
    let (feed, body) = Body::growing(PIECES_MAX);
    let stream = JobStream { shared: shared.clone(), feed, job, next: from.max(1), shown: Bytes::new() };
    tokio::spawn(async move {
        let _place = place;
        // A reader that has left, or is too slow, has no more questions.
        let _ = stream.run().await;
    });
    Ok(body)
}

struct JobStream {
    shared: Arc<Shared>,
    feed: Feed,
    job: JobId,
    /// Index of the next event.
    next: u64,
    /// The job as it was told last.
    shown: Bytes,
}

/// Why a watch came to its end.
enum Over {
    /// The job has ended, and all its events were told.
    Done,
    /// This coordinator could not go on: it may later.
    Again,
    Refused(Refusal),
}

#[derive(Serialize)]
struct Told<'a> {
    index: u64,
    #[serde(flatten)]
    event: &'a Event,
}

impl JobStream {
    async fn run(mut self) -> Result<(), Left> {
        loop {
            let over = match self.watching() {
                Ok(watching) => self.follow(watching).await?,
                Err(_) => Over::Again,
            };
            match over {
                Over::Again => {
                    self.show().await?;
                    sleep(AGAIN).await;
                }
                Over::Done => {
                    self.show().await?;
                    return self.give(message("end", Some(self.next - 1), &json!({}))).await;
                }
                Over::Refused(refusal) => {
                    return self.give(message("refused", None, &refusal.message)).await;
                }
            }
        }
    }

    fn watching(&self) -> Result<Watching, Refusal> {
        let stale = self.shared.status.borrow().leader.is_none();
        let request = Request::Watch { job: self.job, from: self.next, follow: true };
        self.shared.calls.watch(READER, ClientFrame { stale, ..ClientFrame::query(request) })
    }

    async fn follow(&mut self, mut watching: Watching) -> Result<Over, Left> {
        let (mut look, mut heard) = (interval(LOOK), Instant::now());
        loop {
            tokio::select! {
                reply = watching.next() => {
                    let (events, after) = batch(reply, || watching.try_next(), EVENTS_MAX);
                    if let Some((last, _)) = events.last() {
                        let last = *last;
                        self.give(message("events", Some(last), &told(&events))).await?;
                        (self.next, heard) = (last + 1, Instant::now());
                    }
                    match after {
                        None => {}
                        Some(Some(Reply::EndOfEvents)) => return Ok(Over::Done),
                        Some(Some(Reply::Refused(refusal))) if refusal.kind.is_passing() => return Ok(Over::Again),
                        Some(Some(Reply::Refused(refusal))) => return Ok(Over::Refused(refusal)),
                        // This coordinator stops.
                        Some(_) => return Err(Left),
                    }
                }
                _ = look.tick() => {
                    if self.show().await? {
                        heard = Instant::now();
                    } else if heard.elapsed() >= BEAT {
                        self.feed.send(BEAT_MESSAGE)?;
                        heard = Instant::now();
                    }
                }
                () = self.feed.left() => return Err(Left),
            }
        }
    }

    /// Tells how the job stands, if that has changed.
    async fn show(&mut self) -> Result<bool, Left> {
        let (reply, stale) = fresh(&self.shared, Request::Job(self.job)).await;
        let Reply::Job(view) = reply else { return Ok(false) };
        let view = JobView { job_json: String::new(), ..*view };
        let message = message("job", None, &json!({"job": view, "stale": stale}));
        if message == self.shown {
            return Ok(false);
        }
        self.shown = message.clone();
        self.give(message).await.map(|()| true)
    }

    async fn give(&self, message: Bytes) -> Result<(), Left> {
        timeout(GIVE, self.feed.give(message)).await.unwrap_or(Err(Left))
    }
}

/// Events of a job from the `from`-th on, as many as one answer takes, and where to go on.
pub async fn events(shared: &Shared, job: JobId, from: u64) -> Result<serde_json::Value, Refusal> {
    let stale = shared.status.borrow().leader.is_none();
    let request = Request::Watch { job, from, follow: false };
    let mut watching = shared.calls.watch(READER, ClientFrame { stale, ..ClientFrame::query(request) })?;
    let mut all = Vec::new();
    while all.len() < PAGE_MAX {
        let reply = watching.next().await;
        let (events, after) = batch(reply, || watching.try_next(), PAGE_MAX - all.len());
        all.extend(events);
        match after {
            None => {}
            Some(Some(Reply::Refused(refusal))) => return Err(refusal),
            Some(_) => break,
        }
    }
    let next = all.last().map(|(index, _)| index + 1);
    Ok(json!({"events": told(&all), "next": next}))
}

/// The events that wait, at most `max`, and what came behind them if that was no event; it is `None` where this coordinator stops.
fn batch(
    first: Option<Reply>,
    mut more: impl FnMut() -> Option<Reply>,
    max: usize,
) -> (Vec<(u64, Event)>, Option<Option<Reply>>) {
    let (mut events, mut bytes) = (Vec::new(), 0);
    let mut reply = first;
    loop {
        match reply {
            Some(Reply::Event { index, event }) => {
                bytes += cost(&event);
                events.push((index, event));
            }
            other => return (events, Some(other)),
        }
        if events.len() >= max || bytes >= EVENTS_BYTES {
            return (events, None);
        }
        match more() {
            Some(next) => reply = Some(next),
            None => return (events, None),
        }
    }
}

/// About the bytes of an event.
fn cost(event: &Event) -> usize {
    match &event.body {
        fleet_common::events::EventBody::Log { line, .. } => line.len() + 100,
        _ => 300,
    }
}

fn told(events: &[(u64, Event)]) -> Vec<Told<'_>> {
    events.iter().map(|(index, event)| Told { index: *index, event }).collect()
}

/// One event of a stream. JSON has no line breaks of its own, so it is one line of data.
fn message(name: &str, id: Option<u64>, data: &impl Serialize) -> Bytes {
    let id = id.map_or_else(String::new, |id| format!("id: {id}\n"));
    // What is sent has text for keys and nothing that fails to be written.
    let data = serde_json::to_string(data).unwrap_or_else(|_| "null".to_owned());
    Bytes::from(format!("event: {name}\n{id}data: {data}\n\n"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use fleet_common::events::{EventBody, Level};

    fn line(index: u64, text: &str) -> Reply {
        let body = EventBody::Log { rank: Some(0), level: Level::Info, line: text.to_owned() };
        Reply::Event { index, event: Event { unix_ms: 5, body } }
    }

    #[test]
    fn what_waits_is_one_message_and_its_end_is_kept() {
        let mut waiting = vec![Reply::EndOfEvents, line(3, "c"), line(2, "b")];
        let (events, after) = batch(Some(line(1, "a")), || waiting.pop(), 256);
        assert_eq!(events.iter().map(|(index, _)| *index).collect::<Vec<_>>(), [1, 2, 3]);
        assert_eq!(after, Some(Some(Reply::EndOfEvents)));
        let mut endless = || Some(line(2, &"x".repeat(100_000)));
        let (events, after) = batch(Some(line(1, "a")), &mut endless, 256);
        assert!(events.len() < 5 && after.is_none());
        assert_eq!(batch(None, || None, 256), (Vec::new(), Some(None)));
    }

    #[test]
    fn a_message_is_one_line_whatever_a_rank_printed() {
        let Reply::Event { index, event } = line(7, "a\ndata: {}\n\nevent: job") else { panic!() };
        let message = message("events", Some(7), &told(&[(index, event)]));
        let text = String::from_utf8(message.to_vec()).unwrap();
        assert_eq!(text.lines().count(), 4, "{text}");
        assert!(
            text.starts_with("event: events\nid: 7\ndata: [{\"index\":7,\"unix_ms\":5,\"body\":{\"Log\":"),
            "{text}"
        );
    }
}
