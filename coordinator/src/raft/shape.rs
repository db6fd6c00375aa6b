//! Is a message one that raft-rs can take? It panics on some that no honest replica sends, and a peer must not be able to stop this one.

use raft::eraftpb::{ConfState, Entry, EntryType, Message, MessageType};
use std::collections::BTreeSet;

/// A message that does not fit. It was dropped and has changed nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a message of a peer was dropped: {0}")]
pub struct BadMessage(pub &'static str);

impl BadMessage {
    /// No coordinator says so in this term whose disk, and this one's, have all that was acknowledged.
    pub fn contradicts(self) -> bool {
        [CONTRADICTS, NEVER_SENT].contains(&self.0)
    }
}

const CONTRADICTS: &str = "it contradicts what is committed";
const NEVER_SENT: &str = "it acknowledges entries that were never sent";

/// Terms and indexes of messages are below this: no cluster lives so long, and raft-rs adds to them without looking.
pub(super) const NUMBER_MAX: u64 = 1 << 62;

/// What this replica's log is like, as far as a message has to fit it.
pub struct Fits {
    pub id: u64,
    pub last_index: u64,
    pub committed: u64,
    pub committed_term: u64,
    /// It leads, or all of its log is on its disk. raft-rs panics when it comes to lead with entries that are not.
    pub settled: bool,
}

impl Fits {
    pub fn check(&self, message: &Message) -> Result<(), BadMessage> {
        use MessageType::*;
        let ensure = |fits: bool, why: &'static str| if fits { Ok(()) } else { Err(BadMessage(why)) };
        ensure(message.to == self.id, "it is for another replica")?;
        ensure(message.from != raft::INVALID_ID && message.from != self.id, "its sender is nobody")?;
        // Only numbers that mean something may be asked for by name.
        let kind = MessageType::from_i32(message.msg_type).ok_or(BadMessage("its kind is unknown"))?;
        let known = |entry: &Entry| EntryType::from_i32(entry.entry_type).is_some();
        ensure(message.entries.iter().all(known), "the kind of an entry is unknown")?;
        ensure(numbers(message).all(|number| number < NUMBER_MAX), "a number in it is too large")?;
        // fleet uses neither. A replica without a term cannot refuse one with less priority, and who asks for snapshots gets no rest.
        let plain =
            message.priority == 0 && message.deprecated_priority == 0 && message.request_snapshot == 0;
        ensure(plain, "it has a priority or asks for a snapshot")?;
        // A term of zero marks messages that never travel, and questions about the commit index.
        ensure((message.term == 0) == (kind == MsgReadIndex), "its term does not fit its kind")?;
        match kind {
            MsgAppend => {
                // A term of zero is what raft-rs takes for that of entries that are not there.
                ensure(message.log_term > 0 || message.index == 0, "it follows an entry without a term")?;
                let mut previous = (message.index, message.log_term);
                for entry in &message.entries {
                    ensure(entry.index == previous.0 + 1, "its entries are not contiguous")?;
                    ensure(entry.term >= previous.1.max(1), "the terms of its entries fall")?;
                    ensure(entry.term <= message.term, "an entry is younger than its leader")?;
                    previous = (entry.index, entry.term);
                }
                let agrees = message.index < self.committed || message.log_term >= self.committed_term;
                ensure(agrees, CONTRADICTS)
            }
            MsgAppendResponse => ensure(message.reject || message.index <= self.last_index, NEVER_SENT),
            MsgSnapshot => {
                let metadata = message.snapshot.as_ref().and_then(|snapshot| snapshot.metadata.as_ref());
                let metadata = metadata.ok_or(BadMessage("its snapshot has no position"))?;
                ensure(metadata.index > 0 && metadata.term > 0, "its snapshot has no position")?;
                ensure(metadata.term <= message.term, "its snapshot is younger than its leader")?;
                let agrees = metadata.index < self.committed || metadata.term >= self.committed_term;
                ensure(agrees, CONTRADICTS)?;
                let conf = metadata.conf_state.as_ref().ok_or(BadMessage("its snapshot has no members"))?;
                ensure(is_consistent(conf), "the members of its snapshot contradict each other")
            }
            MsgReadIndex | MsgReadIndexResp => {
                ensure(message.entries.len() == 1, "a question for the commit index has one entry")
            }
            MsgRequestVoteResponse | MsgRequestPreVoteResponse | MsgTimeoutNow => {
                ensure(self.settled, "it makes a leader of one whose log is not on the disk yet")
            }
            MsgRequestVote | MsgRequestPreVote | MsgHeartbeat | MsgHeartbeatResponse => Ok(()),
            _ => Err(BadMessage("its kind does not travel between replicas")),
        }
    }
}

/// All that raft-rs counts with.
fn numbers(message: &Message) -> impl Iterator<Item = u64> {
    let Message { term, log_term, index, commit, commit_term, reject_hint, .. } = *message;
    let position = message.snapshot.as_ref().and_then(|snapshot| snapshot.metadata.as_ref());
    let positions = position.map(|metadata| [metadata.index, metadata.term]).into_iter();
    let entries = message.entries.iter().map(|entry| [entry.index, entry.term]);
    let rest = positions.chain(entries).flatten();
    [term, log_term, index, commit, commit_term, reject_hint].into_iter().chain(rest)
}

/// fleet changes one member at a time, so there are never joint members.
pub(super) fn is_consistent(conf: &ConfState) -> bool {
    let members: BTreeSet<u64> = conf.voters.iter().chain(&conf.learners).copied().collect();
    !conf.voters.is_empty()
        && members.len() == conf.voters.len() + conf.learners.len()
        && !members.contains(&raft::INVALID_ID)
        && conf.voters_outgoing.is_empty()
        && conf.learners_next.is_empty()
        && !conf.auto_leave
}

#[cfg(test)]
mod tests {
    use super::*;
    use raft::eraftpb::{Snapshot, SnapshotMetadata};

    const HERE: Fits = Fits { id: 1, last_index: 10, committed: 8, committed_term: 3, settled: true };
    /// One that has just joined and knows nothing.
    const NEW: Fits = Fits { id: 1, last_index: 0, committed: 0, committed_term: 0, settled: true };

    fn message(kind: MessageType) -> Message {
        let mut message = Message { to: 1, from: 2, term: 5, ..Message::default() };
        message.set_msg_type(kind);
        message
    }

    fn append(index: u64, log_term: u64, entries: &[(u64, u64)]) -> Message {
        let entry = |(index, term): &(u64, u64)| Entry { index: *index, term: *term, ..Entry::default() };
        Message {
            index,
            log_term,
            entries: entries.iter().map(entry).collect(),
            ..message(MessageType::MsgAppend)
        }
    }

    fn snapshot(voters: &[u64], learners: &[u64]) -> Message {
        let conf = ConfState { voters: voters.into(), learners: learners.into(), ..ConfState::default() };
        let metadata = SnapshotMetadata { conf_state: Some(conf), index: 20, term: 4 };
        let snapshot = Some(Snapshot { data: Vec::new(), metadata: Some(metadata) });
        Message { snapshot, ..message(MessageType::MsgSnapshot) }
    }

    #[test]
    fn honest_messages_fit() {
        for kind in [MessageType::MsgHeartbeat, MessageType::MsgRequestVote, MessageType::MsgTimeoutNow] {
            assert_eq!(HERE.check(&message(kind)), Ok(()));
        }
        assert_eq!(HERE.check(&append(8, 3, &[(9, 3), (10, 5)])), Ok(()));
        assert_eq!(HERE.check(&append(3, 1, &[])), Ok(()));
    }

    #[test]
    fn appends_that_raft_would_panic_on_are_refused() {
        for (bad, why) in [
            (append(8, 3, &[(10, 3)]), "contiguous"),
            (append(8, 3, &[(9, 2)]), "fall"),
            (append(8, 3, &[(9, 6)]), "younger"),
            (append(9, 2, &[]), "contradicts"),
            (append(8, 2, &[]), "contradicts"),
        ] {
            assert!(HERE.check(&bad).unwrap_err().to_string().contains(why), "{bad:?}");
        }
    }

    #[test]
    fn numbers_near_the_end_are_refused_wherever_they_are() {
        for number in [NUMBER_MAX, u64::MAX - 1, u64::MAX] {
            let heartbeat = || message(MessageType::MsgHeartbeat);
            let mut snapshot = snapshot(&[2, 3], &[1]);
            let metadata = snapshot.snapshot.as_mut().unwrap().metadata.as_mut().unwrap();
            metadata.index = number;
            for bad in [
                append(number, 3, &[(number.wrapping_add(1), 3)]),
                append(8, number, &[]),
                append(8, 3, &[(9, number)]),
                Message { term: number, ..message(MessageType::MsgRequestVote) },
                Message { commit: number, ..heartbeat() },
                Message { commit_term: number, ..heartbeat() },
                Message { reject: true, reject_hint: number, ..message(MessageType::MsgAppendResponse) },
                snapshot,
            ] {
                let why = HERE.check(&bad).unwrap_err().to_string();
                assert!(why.contains("too large"), "{why}: {bad:?}");
            }
        }
    }

    #[test]
    fn one_that_knows_nothing_is_not_told_what_follows_nothing() {
        assert!(NEW.check(&Message { commit: 5, ..append(5, 0, &[]) }).is_err());
        assert!(NEW.check(&append(0, 0, &[(1, 0)])).is_err());
        assert!(NEW.check(&Message { priority: -1, ..message(MessageType::MsgRequestPreVote) }).is_err());
        assert_eq!(NEW.check(&append(0, 0, &[(1, 1)])), Ok(()));
        assert_eq!(NEW.check(&append(5, 3, &[(6, 3)])), Ok(()));
    }

    #[test]
    fn nobody_is_made_a_leader_whose_log_is_not_on_its_disk() {
        let writing = Fits { settled: false, ..HERE };
        for kind in [
            MessageType::MsgTimeoutNow,
            MessageType::MsgRequestVoteResponse,
            MessageType::MsgRequestPreVoteResponse,
        ] {
            assert_eq!(HERE.check(&message(kind)), Ok(()));
            assert!(writing.check(&message(kind)).is_err());
        }
        assert_eq!(writing.check(&message(MessageType::MsgHeartbeat)), Ok(()));
    }

    #[test]
    fn nobody_speaks_for_this_replica_or_with_messages_that_do_not_travel() {
        let bad = [
            Message { from: 1, ..message(MessageType::MsgHeartbeat) },
            Message { to: 2, ..message(MessageType::MsgHeartbeat) },
            Message { term: 0, ..message(MessageType::MsgHeartbeat) },
            Message { msg_type: 99, ..message(MessageType::MsgHeartbeat) },
            Message {
                entries: vec![Entry { entry_type: 7, index: 9, term: 3, ..Entry::default() }],
                ..append(8, 3, &[])
            },
            Message { index: 11, ..message(MessageType::MsgAppendResponse) },
            message(MessageType::MsgHup),
            message(MessageType::MsgPropose),
            message(MessageType::MsgSnapStatus),
            message(MessageType::MsgReadIndexResp),
            message(MessageType::MsgSnapshot),
        ];
        for bad in bad {
            assert!(HERE.check(&bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_snapshot_names_members_that_can_be() {
        assert_eq!(HERE.check(&snapshot(&[2, 3], &[1])), Ok(()));
        let at = |index: u64, term: u64| {
            let mut message = snapshot(&[2, 3], &[1]);
            let metadata = message.snapshot.as_mut().unwrap().metadata.as_mut().unwrap();
            (metadata.index, metadata.term) = (index, term);
            message
        };
        for bad in [
            snapshot(&[], &[1]),
            snapshot(&[2, 2], &[1]),
            snapshot(&[1, 2], &[1]),
            snapshot(&[0], &[1]),
            at(20, 6),
            at(8, 2),
        ] {
            assert!(HERE.check(&bad).is_err(), "{bad:?}");
        }
    }
}
