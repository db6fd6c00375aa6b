use super::*;
use fleet_common::codec;
use fleet_common::ids::JobId;
use proptest::prelude::*;
use std::collections::BTreeSet;

fn stamp(client: u128, seq: u64, answered_below: u64) -> Stamp {
    Stamp { id: RequestId { client: ClientId(client), seq }, answered_below, since: 0 }
}

fn answer(n: u64) -> Answer {
    Answer::Submitted { job: JobId(n) }
}

#[test]
fn answers_are_kept_until_the_client_has_them_however_late_it_asks() {
    let mut sessions = Sessions::default();
    for seq in 1..=CHANGES_IN_FLIGHT_MAX {
        assert_eq!(sessions.look_up(&stamp(1, seq, 1)), Lookup::New);
        sessions.remember(&stamp(1, seq, 1), answer(seq), seq);
    }
    for seq in 1..=CHANGES_IN_FLIGHT_MAX {
        assert_eq!(sessions.look_up(&stamp(1, seq, 1)), Lookup::Answered(answer(seq)));
    }
    assert_eq!(sessions.look_up(&stamp(1, CHANGES_IN_FLIGHT_MAX + 1, 1)), Lookup::Crowded);
    assert_eq!(sessions.look_up(&stamp(1, CHANGES_IN_FLIGHT_MAX + 1, 2)), Lookup::New);
    assert_eq!(sessions.look_up(&stamp(1, 1, 1)), Lookup::Forgotten, "its client has had the answer");
    assert_eq!(sessions.look_up(&stamp(1, 2, 1)), Lookup::Answered(answer(2)));
    assert_eq!(sessions.look_up(&stamp(2, 1, 1)), Lookup::New);
}

#[test]
fn a_client_that_was_forgotten_is_not_taken_for_a_new_one() {
    let mut sessions = Sessions::default();
    sessions.remember(&stamp(1, 1, 1), answer(1), 10);
    sessions.remember(&stamp(2, 1, 1), answer(2), 11);
    sessions.expire(10 + EXPIRE_AFTER);
    assert_eq!(sessions.len(), 2);
    sessions.expire(11 + EXPIRE_AFTER);
    assert_eq!(sessions.len(), 1);
    assert_eq!(sessions.look_up(&stamp(1, 1, 1)), Lookup::Forgotten);
    assert_eq!(sessions.look_up(&stamp(1, 2, 2)), Lookup::Forgotten);
    assert_eq!(sessions.look_up(&stamp(2, 1, 1)), Lookup::Answered(answer(2)));
    let later = Stamp { since: 10, ..stamp(3, 1, 1) };
    assert_eq!(sessions.look_up(&later), Lookup::New, "it began after all that was forgotten");
}

#[test]
fn memory_is_bounded_also_for_one_client_with_long_answers() {
    let mut sessions = Sessions::bounded(100 * SESSION_BYTES);
    let long = || Answer::invalid("x".repeat(SESSION_BYTES));
    for n in 0..200 {
        sessions.remember(&stamp(n / 20, 1 + (n % 20) as u64, 1), long(), n as u64 + 1);
        sessions.expire(n as u64 + 1);
        assert!(sessions.bytes <= sessions.bytes_max, "after {n}");
    }
    assert!(sessions.len() < 10 && !sessions.is_empty());
    assert_eq!(sessions.look_up(&stamp(0, 1, 1)), Lookup::Forgotten);
}

/// A request under way: what it asks is done at most once, and all its answers are one.
#[derive(Clone, Debug)]
enum Step {
    /// A client sends its next change.
    Send(usize),
    /// One that is unanswered, or was answered and is on its way a second time, arrives again.
    Again(usize, prop::sample::Index),
    /// A client takes an answer that has arrived.
    Take(usize, prop::sample::Index),
    /// The process is gone; another one takes its place.
    Die(usize),
    /// The state goes through a snapshot.
    Snapshot,
}

fn any_step() -> impl Strategy<Value = Step> {
    let any = any::<prop::sample::Index>;
    prop_oneof![
        6 => (0..4usize).prop_map(Step::Send),
        6 => (0..4usize, any()).prop_map(|(client, which)| Step::Again(client, which)),
        3 => (0..4usize, any()).prop_map(|(client, which)| Step::Take(client, which)),
        1 => (0..4usize).prop_map(Step::Die),
        1 => Just(Step::Snapshot),
    ]
}

/// A client that follows the rules, and all frames that it ever sent: each may arrive again at any time.
#[derive(Default)]
struct Process {
    id: u128,
    since: u64,
    next: u64,
    /// Sent, and the answer not taken.
    open: BTreeSet<u64>,
    sent: Vec<Stamp>,
}

impl Process {
    fn new(id: u128, since: u64) -> Process {
        Process { id, since, next: 1, ..Process::default() }
    }

    fn send(&mut self) -> Option<Stamp> {
        let lowest = self.open.first().copied().unwrap_or(self.next);
        if self.next - lowest >= CHANGES_IN_FLIGHT_MAX {
            return None;
        }
        let id = RequestId { client: ClientId(self.id), seq: self.next };
        let stamp = Stamp { id, answered_below: lowest, since: self.since };
        self.open.insert(self.next);
        self.next += 1;
        self.sent.push(stamp);
        Some(stamp)
    }
}

proptest! {
    #[test]
    fn every_request_is_done_once_and_never_answered_otherwise(
        steps in prop::collection::vec(any_step(), 1..400),
        room in 3..40usize,
    ) {
        let bound = room * (SESSION_BYTES + ANSWER_BYTES);
        let mut sessions = Sessions::bounded(bound);
        let (mut index, mut processes, mut last) = (0u64, Vec::new(), 0u128);
        processes.extend((0..4).map(|n| Process::new(n, 0)));
        let mut done = BTreeMap::new();
        for step in steps {
            let arrives = match step {
                Step::Send(client) => processes[client].send(),
                Step::Again(client, which) => {
                    let sent = &processes[client].sent;
                    (!sent.is_empty()).then(|| sent[which.index(sent.len())])
                }
                Step::Take(client, which) => {
                    let process = &mut processes[client];
                    if !process.open.is_empty() {
                        let seq = *process.open.iter().nth(which.index(process.open.len())).unwrap();
                        process.open.remove(&seq);
                    }
                    None
                }
                Step::Die(client) => {
                    last += 1;
                    // What it sent may still arrive: a copy stays among those of the next one's neighbours.
                    let ghosts = std::mem::take(&mut processes[client].sent);
                    processes[(client + 1) % 4].sent.extend(ghosts);
                    processes[client] = Process::new(1_000 + last, index);
                    None
                }
                Step::Snapshot => {
                    let bytes = codec::encode(&sessions).unwrap();
                    let restored: Sessions = codec::decode(&bytes).unwrap();
                    let restored = Sessions { bytes_max: bound, ..restored };
                    prop_assert_eq!(&restored, &sessions);
                    sessions = restored;
                    None
                }
            };
            let Some(stamp) = arrives else { continue };
            index += 1;
            match sessions.look_up(&stamp) {
                Lookup::New => {
                    prop_assert!(done.insert(stamp.id, index).is_none(), "{:?} was done twice", stamp);
                    sessions.remember(&stamp, answer(index), index);
                }
                Lookup::Answered(known) => prop_assert_eq!(&known, &answer(done[&stamp.id])),
                // Unknown is never wrong. That it is rare is shown where there is room.
                Lookup::Forgotten => {}
                Lookup::Crowded => prop_assert!(false, "{:?} keeps to the rules", stamp),
            }
            sessions.expire(index);
            prop_assert!(sessions.bytes <= sessions.bytes_max);
            let bytes: usize = sessions.clients.values().map(Session::bytes).sum();
            prop_assert_eq!(bytes, sessions.bytes);
            prop_assert_eq!(sessions.by_age.len(), sessions.clients.len());
        }
    }

    #[test]
    fn where_there_is_room_nothing_that_is_still_wanted_is_forgotten(
        steps in prop::collection::vec(any_step(), 1..400),
    ) {
        let mut sessions = Sessions::default();
        let mut processes: Vec<Process> = (0..4).map(|n| Process::new(n, 0)).collect();
        let mut index = 0;
        for step in steps {
            let (client, stamp) = match step {
                Step::Send(client) => (client, processes[client].send()),
                Step::Again(client, which) => {
                    let open: Vec<u64> = processes[client].open.iter().copied().collect();
                    let seq = open.get(which.index(open.len().max(1)));
                    let sent = |seq: &u64| processes[client].sent.iter().find(|sent| sent.id.seq == *seq).copied();
                    (client, seq.and_then(sent))
                }
                Step::Take(client, which) => {
                    let open: Vec<u64> = processes[client].open.iter().copied().collect();
                    if let Some(seq) = open.get(which.index(open.len().max(1))) {
                        processes[client].open.remove(seq);
                    }
                    continue;
                }
                Step::Die(_) | Step::Snapshot => continue,
            };
            let Some(stamp) = stamp else { continue };
            index += 1;
            match sessions.look_up(&stamp) {
                Lookup::New => sessions.remember(&stamp, answer(stamp.id.seq), index),
                found => prop_assert_eq!(found, Lookup::Answered(answer(stamp.id.seq)), "client {}", client),
            }
            sessions.expire(index);
        }
    }
}
