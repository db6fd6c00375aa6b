//! Looking at jobs: what is placed where, what waits, what is free.

use super::State;
use super::records::{JobRecord, Placement};
use fleet_common::ids::{Generation, JobId, NodeId};
use fleet_common::protocol::JobState;
use std::collections::{BTreeMap, BTreeSet};

/// Ports at which ranks of a gang on several nodes meet begin here, as torchrun's do.
const PORT_FIRST: u16 = 29_500;
/// Jobs that can have rank 0 on one node at a time are fewer, by far.
const PORTS: u16 = 1_000;

impl State {
    pub fn jobs(&self) -> &BTreeMap<JobId, JobRecord> {
        &self.jobs
    }

    /// Jobs that there ever were, numbered from 1.
    pub fn last_job(&self) -> u64 {
        self.last_job
    }

    /// Slots of `node` that unfinished jobs hold.
    pub fn slots_used(&self, node: NodeId) -> u32 {
        self.slots_in_use().get(&node).copied().unwrap_or_default()
    }

    /// Slots that unfinished jobs hold, by node.
    pub fn slots_in_use(&self) -> BTreeMap<NodeId, u32> {
        let mut used = BTreeMap::new();
        for (node, slots) in self.jobs.values().flat_map(JobRecord::slots) {
            *used.entry(node).or_default() += slots;
        }
        used
    }

    /// Unfinished jobs with ranks on `node`, oldest first.
    pub fn active_jobs(&self, node: NodeId) -> impl Iterator<Item = (JobId, &JobRecord)> {
        self.jobs.iter().filter(move |(_, job)| job.live_part(node).is_some()).map(|(id, job)| (*id, job))
    }

    /// Jobs that wait for a place, in the order in which they get one: priority, then age.
    pub fn queued_jobs(&self) -> Vec<(JobId, &JobRecord)> {
        let waiting = self.jobs.iter().filter(|(_, job)| job.state == JobState::Queued);
        let mut waiting: Vec<_> = waiting.map(|(id, job)| (*id, job)).collect();
        waiting.sort_by_key(|(id, job)| (std::cmp::Reverse(job.wish.priority), *id));
        waiting
    }

    /// The job's present gang, if it is of this generation.
    pub(crate) fn placement(&self, job: JobId, generation: Generation) -> Option<&Placement> {
        self.jobs.get(&job)?.placement.as_ref().filter(|at| at.generation == generation)
    }

    /// A port for the ranks of `job` to meet at on `node`, which no other job has there.
    pub(crate) fn free_port(&self, job: JobId, node: NodeId) -> Option<u16> {
        let taken: BTreeSet<u16> = self
            .active_jobs(node)
            .filter_map(|(_, other)| other.placement.as_ref())
            .filter(|at| at.parts.first().is_some_and(|part| part.node == node))
            .filter_map(|at| at.port)
            .collect();
        let first = (job.0 % u64::from(PORTS)) as u16;
        (0..PORTS).map(|n| PORT_FIRST + (first + n) % PORTS).find(|port| !taken.contains(port))
    }
}
