//! What raft promises in its messages, checked as they leave: one leader per term, one vote per term and replica, and nothing
//! forgotten over a restart that was said before it.

use fleet_coordinator::raft::disk::Table;
use fleet_coordinator::raft::memory::MemoryDisk;
use raft::eraftpb::{Message, MessageType};
use std::collections::BTreeMap;

#[derive(Debug, Default)]
pub struct Watch {
    leaders: BTreeMap<u64, u64>,
    votes: BTreeMap<(u64, u64), u64>,
    /// By replica, the highest term that it spoke in.
    terms: BTreeMap<u64, u64>,
    /// By replica, the term in which it last acknowledged entries, and up to which one.
    acknowledged: BTreeMap<u64, (u64, u64)>,
}

impl Watch {
    /// A message leaves its sender.
    pub fn sent(&mut self, message: &Message) -> Result<(), String> {
        let (from, term) = (message.from, message.term);
        match message.msg_type() {
            MessageType::MsgRequestPreVote | MessageType::MsgRequestPreVoteResponse => return Ok(()),
            MessageType::MsgAppend | MessageType::MsgHeartbeat | MessageType::MsgSnapshot => {
                let known = *self.leaders.entry(term).or_insert(from);
                if known != from {
                    return Err(format!("replica-{from} leads in term {term}, and replica-{known} did too"));
                }
            }
            MessageType::MsgRequestVote => self.vote(from, term, from)?,
            MessageType::MsgRequestVoteResponse if !message.reject => self.vote(from, term, message.to)?,
            MessageType::MsgAppendResponse if !message.reject => {
                let known = self.acknowledged.entry(from).or_default();
                if (term, message.index) > *known {
                    *known = (term, message.index);
                }
            }
            _ => {}
        }
        let highest = self.terms.entry(from).or_default();
        *highest = term.max(*highest);
        Ok(())
    }

    fn vote(&mut self, voter: u64, term: u64, candidate: u64) -> Result<(), String> {
        let known = *self.votes.entry((voter, term)).or_insert(candidate);
        if known == candidate {
            return Ok(());
        }
        Err(format!("replica-{voter} voted for replica-{known} and for replica-{candidate} in term {term}"))
    }

    /// A replica starts again from its disk, in this term and with this commit index.
    pub fn restarted(&self, replica: u64, term: u64, commit: u64, disk: &MemoryDisk) -> Result<(), String> {
        let spoken = self.terms.get(&replica).copied().unwrap_or(0);
        if term < spoken {
            return Err(format!("replica-{replica} spoke in term {spoken} and starts again in term {term}"));
        }
        let last = disk.last_key(Table::Log).map_or(0, |key| index_of(&key)).max(commit);
        match self.acknowledged.get(&replica) {
            Some(&(in_term, index)) if in_term == term && index > last => Err(format!(
                "replica-{replica} acknowledged entry {index} and starts again with a log that ends at {last}"
            )),
            _ => Ok(()),
        }
    }
}

pub fn index_of(key: &[u8]) -> u64 {
    key.iter().take(8).fold(0, |n, byte| n << 8 | u64::from(*byte))
}
