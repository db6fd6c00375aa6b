//! One gang's events on their way to the coordinator: numbered from 1, sent until committed, bounded.
//!
//! An event gets its number when it is first sent, so that log lines can still be left out before that without a gap in the numbers.
//! Ranks' lines are left out beyond their budget, and where the coordinator is too slow for them; how many is said in their place.
//! Steps, evaluations, checkpoints and the outcome never are. Knows nothing of connections beyond "there is a new one".

use crate::budget::{Budget, Rates};
use crate::figures::Figures;
use fleet_common::events::{Event, EventBatch, EventBody, line_cost};
use fleet_common::ids::{Generation, JobId};
use std::collections::VecDeque;
use std::time::Duration;

/// Numbered events that the coordinator has not committed yet. Above it events wait, so a slow coordinator is not flooded.
pub const IN_FLIGHT_MAX: usize = 4096;
/// Bytes of the lines among them, in case they are long.
pub const IN_FLIGHT_BYTES_MAX: usize = 8 << 20;
/// Events in one message.
pub const BATCH_MAX: usize = 256;
/// A message ends with the line that brings it to so many bytes: far below the codec's frame limit.
pub const BATCH_BYTES_MAX: usize = 1 << 20;
/// Log lines that wait unnumbered; above it the older half goes. A minute of a talkative gang.
pub const WAITING_LINES_MAX: usize = 16_384;
/// Bytes of those lines, in case they are long.
pub const WAITING_BYTES_MAX: usize = 8 << 20;
/// Between two notices of lines that are left out, while they are.
pub const NOTICE_EVERY: Duration = Duration::from_secs(10);
/// The same once nothing of the budget will come back.
pub const NOTICE_EVERY_SPENT: Duration = Duration::from_secs(600);

/// Bytes, as `line_cost` counts them, of the newest lines over the budget, which go all the same where nothing follows them: what a program
/// says last is what is looked for first.
pub const LAST_WORDS_MAX: u64 = 8 << 10;

/// The coordinator's idea of the stream cannot be served: it wants numbers that were committed and dropped, or never given.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("the coordinator asks for event {wanted} of a stream that is at {first}..{end}")]
pub struct Diverged {
    wanted: u64,
    first: u64,
    end: u64,
}

#[derive(Debug)]
enum Waiting {
    Event(Event),
    /// Stands where the coordinator did not take lines in time.
    Dropped(u64, LeftOut),
}

#[derive(Clone, Copy, Debug, Default)]
struct LeftOut {
    lines: u64,
    bytes: u64,
}

impl LeftOut {
    fn add(&mut self, lines: u64, bytes: u64) {
        self.lines += lines;
        self.bytes += bytes;
    }

    fn event(self, unix_ms: u64) -> Event {
        Event { unix_ms, body: EventBody::LeftOut { lines: self.lines, bytes: self.bytes } }
    }
}

/// Invariant: `in_flight` holds the numbers `first..first + in_flight.len()`, and the first `sent` of them went out on this connection.
#[derive(Debug)]
pub struct EventStream {
    job: JobId,
    generation: Generation,
    first: u64,
    in_flight: VecDeque<Event>,
    in_flight_bytes: usize,
    sent: usize,
    waiting: VecDeque<Waiting>,
    waiting_lines: usize,
    waiting_bytes: usize,
    budget: Budget,
    /// Over the budget, and not yet said.
    left_out: LeftOut,
    /// The newest lines over the budget, not yet left out.
    held: VecDeque<Event>,
    held_cost: u64,
    /// When it was said last, or there was something to say again.
    told_at: Duration,
    figures: Figures,
}

impl EventStream {
    pub fn new(job: JobId, generation: Generation, lines: Rates) -> EventStream {
        EventStream {
            job,
            generation,
            first: 1,
            in_flight: VecDeque::new(),
            in_flight_bytes: 0,
            sent: 0,
            waiting: VecDeque::new(),
            waiting_lines: 0,
            waiting_bytes: 0,
            budget: Budget::new(lines),
            left_out: LeftOut::default(),
            held: VecDeque::new(),
            held_cost: 0,
            told_at: Duration::ZERO,
            figures: Figures::default(),
        }
    }

    /// Takes an event that happened at `now` of the agent's clock.
    pub fn push(&mut self, event: Event, now: Duration) {
        self.figures.note(&event.body);
        match &event.body {
            EventBody::Log { rank, line, .. } => {
                if rank.is_some() && !self.budget.admits(line_cost(line), now) {
                    return self.hold(event, now);
                }
                if rank.is_some() {
                    self.keep_held(0, now);
                }
                self.tell(event.unix_ms, now);
            }
            EventBody::Finished(_) => self.send_held(event.unix_ms, now),
            _ => {}
        }
        self.wait(event);
    }

    fn wait(&mut self, event: Event) {
        if let EventBody::Log { line, .. } = &event.body {
            self.waiting_lines += 1;
            self.waiting_bytes += line.len();
        }
        self.waiting.push_back(Waiting::Event(event));
        if self.waiting_lines > WAITING_LINES_MAX || self.waiting_bytes > WAITING_BYTES_MAX {
            self.drop_older_half_of_the_lines();
        }
    }

    /// Says how much was left out, if that was not said for a while, and the last words of who has been silent since.
    pub fn tell_in_time(&mut self, unix_ms: u64, now: Duration) {
        let every = if self.budget.is_spent() { NOTICE_EVERY_SPENT } else { NOTICE_EVERY };
        if now.saturating_sub(self.told_at) < every {
            return;
        }
        match !self.held.is_empty() && self.budget.admits(self.held_cost, now) {
            true => self.send_held(unix_ms, now),
            false => self.tell(unix_ms, now),
        }
    }

    /// A line over the budget.
    fn hold(&mut self, event: Event, now: Duration) {
        let unix_ms = event.unix_ms;
        self.held_cost += cost(&event);
        self.held.push_back(event);
        self.keep_held(LAST_WORDS_MAX, now);
        self.tell_in_time(unix_ms, now);
    }

    /// Leaves out what is held beyond `most` bytes.
    fn keep_held(&mut self, most: u64, now: Duration) {
        while self.held_cost > most
            && let Some(event) = self.held.pop_front()
        {
            if self.left_out.lines == 0 {
                self.told_at = now;
            }
            self.held_cost -= cost(&event);
            self.left_out.add(1, line_bytes(&event) as u64);
            self.figures.counts.lines_left_out += 1;
        }
    }

    fn send_held(&mut self, unix_ms: u64, now: Duration) {
        self.tell(unix_ms, now);
        self.held_cost = 0;
        std::mem::take(&mut self.held).into_iter().for_each(|event| self.wait(event));
    }

    fn tell(&mut self, unix_ms: u64, now: Duration) {
        if self.left_out.lines > 0 {
            self.told_at = now;
            self.waiting.push_back(Waiting::Event(std::mem::take(&mut self.left_out).event(unix_ms)));
        }
    }

    /// What went by.
    pub fn figures(&self) -> &Figures {
        &self.figures
    }

    /// Whether the backlog is so long that more lines would soon cause a drop.
    pub fn is_crowded(&self) -> bool {
        self.waiting_lines > WAITING_LINES_MAX / 2 || self.waiting_bytes > WAITING_BYTES_MAX / 2
    }

    /// The next events to send on the present connection.
    pub fn next_batch(&mut self) -> Option<EventBatch> {
        while self.in_flight.len() < IN_FLIGHT_MAX
            && self.in_flight_bytes < IN_FLIGHT_BYTES_MAX
            && let Some(waiting) = self.waiting.pop_front()
        {
            self.number(waiting);
        }
        let mut bytes = 0;
        let fits = |event: &&Event| {
            let begun = bytes < BATCH_BYTES_MAX;
            bytes += line_bytes(event);
            begun
        };
        let events: Vec<Event> =
            self.in_flight.range(self.sent..).take(BATCH_MAX).take_while(fits).cloned().collect();
        if events.is_empty() {
            return None;
        }
        let first_seq = self.first + self.sent as u64;
        self.sent += events.len();
        Some(EventBatch { job: self.job, generation: self.generation, first_seq, events })
    }

    /// A new connection: what was sent on the old one may be lost.
    pub fn reconnected(&mut self) {
        self.sent = 0;
    }

    /// Events up to `seq` are committed. Returns those that were not known to be.
    pub fn committed(&mut self, seq: u64) -> Vec<Event> {
        let count =
            seq.saturating_add(1).saturating_sub(self.first).min(self.in_flight.len() as u64) as usize;
        self.first += count as u64;
        self.sent = self.sent.saturating_sub(count);
        let committed: Vec<Event> = self.in_flight.drain(..count).collect();
        self.in_flight_bytes -= committed.iter().map(line_bytes).sum::<usize>();
        committed
    }

    /// The coordinator expects `next_seq` next. Returns the events that it thereby commits.
    pub fn resend_from(&mut self, next_seq: u64) -> Result<Vec<Event>, Diverged> {
        let end = self.first + self.in_flight.len() as u64;
        if next_seq < self.first || next_seq > end {
            return Err(Diverged { wanted: next_seq, first: self.first, end });
        }
        let committed = self.committed(next_seq - 1);
        self.sent = 0;
        Ok(committed)
    }

    /// Nothing waits and nothing is unacknowledged.
    pub fn is_drained(&self) -> bool {
        self.in_flight.is_empty() && self.waiting.is_empty()
    }

    fn number(&mut self, waiting: Waiting) {
        let event = match waiting {
            Waiting::Event(event) => event,
            Waiting::Dropped(unix_ms, left_out) => left_out.event(unix_ms),
        };
        if let EventBody::Log { line, .. } = &event.body {
            self.waiting_lines = self.waiting_lines.saturating_sub(1);
            self.waiting_bytes = self.waiting_bytes.saturating_sub(line.len());
        }
        self.in_flight_bytes += line_bytes(&event);
        self.in_flight.push_back(event);
    }

    fn drop_older_half_of_the_lines(&mut self) {
        let mut to_drop = self.waiting_lines / 2 + 1;
        let (mut dropped, mut since) = (LeftOut::default(), 0);
        let mut place = None;
        let mut kept = VecDeque::with_capacity(self.waiting.len());
        for waiting in self.waiting.drain(..) {
            match waiting {
                Waiting::Event(Event { unix_ms, body: EventBody::Log { line, .. } }) if to_drop > 0 => {
                    to_drop -= 1;
                    dropped.add(1, line.len() as u64);
                    self.figures.counts.lines_left_out += 1;
                    since = unix_ms;
                    place.get_or_insert(kept.len());
                    self.waiting_lines -= 1;
                    self.waiting_bytes -= line.len();
                }
                Waiting::Dropped(unix_ms, LeftOut { lines, bytes }) => {
                    dropped.add(lines, bytes);
                    since = unix_ms.max(since);
                    place.get_or_insert(kept.len());
                }
                other => kept.push_back(other),
            }
        }
        if let Some(place) = place {
            kept.insert(place, Waiting::Dropped(since, dropped));
        }
        self.waiting = kept;
    }
}

fn cost(event: &Event) -> u64 {
    match &event.body {
        EventBody::Log { line, .. } => line_cost(line),
        _ => 0,
    }
}

fn line_bytes(event: &Event) -> usize {
    match &event.body {
        EventBody::Log { line, .. } => line.len(),
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fleet_common::events::{Level, Outcome, Step};
    use proptest::prelude::*;

    fn log(line: &str) -> Event {
        Event {
            unix_ms: 0,
            body: EventBody::Log { rank: Some(0), level: Level::Info, line: line.to_owned() },
        }
    }

    fn step(step: u64) -> Event {
        let body =
            Step { step, total_steps: 9, epoch: 0.0, loss: 1.0, lr: 0.1, grad_norm: 1.0, tokens_per_s: 1.0 };
        Event { unix_ms: 0, body: EventBody::Step(body) }
    }

    fn stream() -> EventStream {
        EventStream::new(JobId(1), 1, Rates::UNLIMITED)
    }

    fn push(stream: &mut EventStream, event: Event) {
        stream.push(event, Duration::ZERO);
    }

    /// All that there is to be sent, which is committed.
    fn drained(stream: &mut EventStream) -> Vec<Event> {
        let mut seen = Vec::new();
        while let Some(batch) = stream.next_batch() {
            stream.committed(batch.first_seq + batch.events.len() as u64 - 1);
            seen.extend(batch.events);
        }
        seen
    }

    #[test]
    fn events_are_numbered_from_one_and_forgotten_once_committed() {
        let mut stream = stream();
        push(&mut stream, step(1));
        push(&mut stream, step(2));
        let batch = stream.next_batch().unwrap();
        assert_eq!((batch.first_seq, batch.events.len()), (1, 2));
        assert_eq!(stream.next_batch(), None, "an event is sent once per connection");
        assert_eq!(stream.committed(1), vec![step(1)]);
        assert!(!stream.is_drained());
        assert_eq!(stream.committed(2), vec![step(2)]);
        assert_eq!(stream.committed(2), vec![], "an acknowledgement may be repeated");
        assert!(stream.is_drained());
    }

    #[test]
    fn a_new_connection_gets_everything_that_is_not_committed() {
        let mut stream = stream();
        (1..=3).for_each(|n| push(&mut stream, step(n)));
        stream.next_batch();
        stream.committed(1);
        stream.reconnected();
        push(&mut stream, step(4));
        let batch = stream.next_batch().unwrap();
        assert_eq!((batch.first_seq, batch.events), (2, vec![step(2), step(3), step(4)]));
    }

    #[test]
    fn the_coordinator_can_ask_again_for_what_it_did_not_commit_but_for_nothing_else() {
        let mut stream = stream();
        (1..=3).for_each(|n| push(&mut stream, step(n)));
        stream.next_batch();
        assert_eq!(stream.resend_from(3), Ok(vec![step(1), step(2)]));
        assert_eq!(stream.next_batch().unwrap().first_seq, 3);
        assert!(stream.resend_from(2).is_err());
        assert!(stream.resend_from(5).is_err());
    }

    #[test]
    fn a_flood_of_lines_loses_the_oldest_with_a_notice_and_no_step() {
        let mut stream = stream();
        push(&mut stream, step(1));
        let lines = WAITING_LINES_MAX * 3;
        for n in 0..lines {
            push(&mut stream, log(&n.to_string()));
            if n % 1000 == 0 {
                push(&mut stream, step(n as u64 + 2));
            }
        }
        let seen = drained(&mut stream);
        let steps = seen.iter().filter(|event| matches!(event.body, EventBody::Step(_))).count();
        assert_eq!(steps, 1 + lines.div_ceil(1000));
        let texts: Vec<&str> = seen
            .iter()
            .filter_map(
                |e| if let EventBody::Log { line, .. } = &e.body { Some(line.as_str()) } else { None },
            )
            .collect();
        let notices: Vec<u64> = seen
            .iter()
            .filter_map(|e| if let EventBody::LeftOut { lines, .. } = e.body { Some(lines) } else { None })
            .collect();
        assert_eq!(notices.len(), 1, "the notices of several drops become one");
        assert_eq!(texts.len() + notices[0] as usize, lines, "every line was delivered or is counted");
        assert_eq!(*texts.last().unwrap(), (lines - 1).to_string(), "the newest lines stay");
    }

    #[test]
    fn lines_over_the_budget_are_left_out_and_counted_where_they_were_and_nothing_else_is() {
        let rates = Rates { per_s: 1_000, burst: 8_000, total: 1 << 20 };
        let mut stream = EventStream::new(JobId(1), 1, rates);
        let line = "x".repeat(136);
        for n in 0..100_000u64 {
            let now = Duration::from_millis(n);
            stream.push(log(&line), now);
            if n % 1_000 == 0 {
                stream.push(step(n / 1_000), now);
            }
        }
        stream.push(
            Event { unix_ms: 0, body: EventBody::Finished(Outcome::Stopped { steps: 1 }) },
            Duration::from_secs(100),
        );
        let seen = drained(&mut stream);
        let steps = seen.iter().filter(|event| matches!(event.body, EventBody::Step(_))).count();
        assert_eq!(steps, 100);
        assert!(matches!(seen.last().unwrap().body, EventBody::Finished(_)));
        let lines = seen.iter().filter(|event| matches!(event.body, EventBody::Log { .. })).count() as u64;
        assert!(lines * 200 <= 8_000 + 100 * 1_000 + LAST_WORDS_MAX && lines * 200 > 90_000, "{lines}");
        let gaps: Vec<u64> = seen
            .iter()
            .filter_map(|event| match event.body {
                EventBody::LeftOut { lines, bytes } => {
                    assert_eq!(bytes, lines * 136);
                    Some(lines)
                }
                _ => None,
            })
            .collect();
        assert_eq!(lines + gaps.iter().sum::<u64>(), 100_000, "every line went or is counted");
        assert!(gaps.len() < 120, "passages, not single lines: {} gaps", gaps.len());
    }

    #[test]
    fn long_lines_travel_few_at_a_time_and_wait_for_those_before_them() {
        let mut stream = stream();
        let line = "x".repeat(BATCH_BYTES_MAX - 1);
        let mut sent = 0;
        for _ in 0..2 {
            (0..6).for_each(|_| push(&mut stream, log(&line)));
            while let Some(batch) = stream.next_batch() {
                assert!(batch.events.len() <= 2, "{} lines in one message", batch.events.len());
                sent += batch.events.len();
            }
        }
        assert_eq!(sent, 9, "so many fill what may be in flight");
        stream.committed(sent as u64);
        assert_eq!(stream.in_flight_bytes, 0);
        assert_eq!(drained(&mut stream).len(), 12 - sent);
        assert_eq!(stream.in_flight_bytes, 0);
    }

    #[test]
    fn what_was_left_out_is_said_though_nothing_more_is_printed() {
        let mut stream = EventStream::new(JobId(1), 1, Rates { per_s: 1, burst: 800, total: 1 << 20 });
        let line = "x".repeat(336);
        (0..2 + 20 + 3).for_each(|_| push(&mut stream, log(&line))); // the budget's, the last words, and three between them
        let said = |stream: &mut EventStream| {
            drained(stream).iter().any(|event| event.body == EventBody::LeftOut { lines: 3, bytes: 3 * 336 })
        };
        stream.tell_in_time(0, NOTICE_EVERY / 2);
        assert!(!said(&mut stream));
        stream.tell_in_time(0, NOTICE_EVERY);
        assert!(said(&mut stream));
    }

    #[test]
    fn the_last_words_go_whatever_was_said_before_them() {
        let texts = |events: &[Event]| -> Vec<String> {
            let text = |event: &Event| match &event.body {
                EventBody::Log { line, .. } => Some(line.clone()),
                EventBody::LeftOut { lines, .. } => Some(format!("{lines} left out")),
                _ => None,
            };
            events.iter().filter_map(text).collect()
        };
        let flooded = |per_s| {
            let mut stream = EventStream::new(JobId(1), 1, Rates { per_s, burst: 80_000, total: 1 << 20 });
            (0..10_000).for_each(|n| push(&mut stream, log(&format!("{n:036}"))));
            push(&mut stream, log("accuracy 0.97"));
            stream
        };
        // It ends.
        let mut stream = flooded(1);
        push(&mut stream, Event { unix_ms: 0, body: EventBody::Finished(Outcome::Stopped { steps: 1 }) });
        let seen = texts(&drained(&mut stream));
        assert_eq!(seen[800], "9119 left out");
        assert_eq!((seen.len(), seen[801..].join(" ").len() < LAST_WORDS_MAX as usize), (800 + 1 + 82, true));
        assert_eq!(seen.last().map(String::as_str), Some("accuracy 0.97"));
        // It goes on, and says nothing.
        let mut stream = flooded(10_000);
        stream.tell_in_time(0, NOTICE_EVERY);
        assert_eq!(texts(&drained(&mut stream)).last().map(String::as_str), Some("accuracy 0.97"));
        // It goes on, and says more: nothing is shown twice or out of its order.
        let mut stream = flooded(10_000);
        stream.push(log("more"), NOTICE_EVERY / 2);
        let seen = texts(&drained(&mut stream));
        assert_eq!(seen[800..], ["9201 left out", "more"]);
    }

    /// What can happen to a stream, in any order.
    #[derive(Clone, Debug)]
    enum Happening {
        Push(u16),
        /// The agent sends what it has; `lost` of the batches never arrive because the connection breaks.
        Send {
            arrive: usize,
        },
        /// The coordinator's acknowledgement arrives.
        Acknowledge,
        Reconnect,
        /// A new leader says where it is.
        AskAgain,
    }

    fn happening() -> impl Strategy<Value = Happening> {
        prop_oneof![
            3 => (1u16..400).prop_map(Happening::Push),
            3 => (0usize..4).prop_map(|arrive| Happening::Send { arrive }),
            2 => Just(Happening::Acknowledge),
            1 => Just(Happening::Reconnect),
            1 => Just(Happening::AskAgain),
        ]
    }

    proptest! {
        #[test]
        fn no_event_is_lost_or_doubled_however_often_the_connection_breaks(script in prop::collection::vec(happening(), 0..80)) {
            let mut stream = stream();
            let mut recorded: Vec<Event> = Vec::new();
            let mut pushed = 0;
            let record = |recorded: &mut Vec<Event>, batch: EventBatch| {
                let next = recorded.len() as u64 + 1;
                assert!(batch.first_seq <= next, "a gap would be refused");
                let known = (next - batch.first_seq) as usize;
                recorded.extend(batch.events.into_iter().skip(known));
            };
            for happening in script {
                match happening {
                    Happening::Push(count) => (0..count).for_each(|_| { pushed += 1; push(&mut stream, step(pushed)); }),
                    Happening::Send { arrive } => {
                        let mut arrived = 0;
                        while let Some(batch) = stream.next_batch() {
                            if arrived < arrive { record(&mut recorded, batch); }
                            arrived += 1;
                        }
                        if arrived > arrive { stream.reconnected(); }
                    }
                    Happening::Acknowledge => { stream.committed(recorded.len() as u64); }
                    Happening::Reconnect => stream.reconnected(),
                    Happening::AskAgain => { stream.resend_from(recorded.len() as u64 + 1).unwrap(); }
                }
            }
            stream.reconnected();
            while !stream.is_drained() {
                let batch = stream.next_batch().expect("what is not drained can be sent");
                record(&mut recorded, batch);
                stream.committed(recorded.len() as u64);
            }
            prop_assert_eq!(recorded, (1..=pushed).map(step).collect::<Vec<_>>());
        }
    }
}
