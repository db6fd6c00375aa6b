//! Queries: what the cluster shows of itself, as seen from this coordinator here and now.

use super::{Control, Now};
use crate::raft::disk::Disk;
use crate::views::{Raft, View};
use fleet_common::ids::ReplicaId;
use fleet_common::protocol::{Refusal, Reply, Request};
use std::collections::BTreeMap;

impl<D: Disk> Control<D> {
    pub(super) fn query(&mut self, now: Now, request: &Request) -> Result<Reply, Refusal> {
        let status = self.status();
        let progress = self.replica.progress().into_iter();
        let mut writers: BTreeMap<ReplicaId, bool> = match self.lead {
            Some(_) => self.observations.writers(now).collect(),
            None => BTreeMap::new(),
        };
        writers.insert(self.me(), status.read_only.is_none());
        let raft = Raft {
            writers,
            alarms: self.contradicting.clone(),
            leader: status.leader,
            term: status.term,
            commit_index: status.commit_index,
            applied_index: status.applied_index,
            read_only: status.read_only,
            progress: progress
                .map(|of| (ReplicaId(of.id), of.matched, self.is_active(&of, now)))
                .chain(self.lead.as_ref().map(|_| (self.me(), status.commit_index, true)))
                .collect(),
        };
        let seen = self.seen.take().unwrap_or_else(|| self.observed(now));
        let view = View {
            state: self.replica.state(),
            observed: &seen,
            history: &self.history,
            raft,
            now_ms: now.mono_ms,
            unix_ms: now.unix_ms,
        };
        let answer = view.answer(request);
        self.seen = Some(seen);
        answer
    }
}
