//! What an agent has to be told, worked out from the state alone: the same after a lost wake-up, a reconnect or a new leader.

use super::State;
use super::records::{JobRecord, Part, Placement, Stop};
use fleet_common::ids::{Generation, JobId, NodeId};
use fleet_common::protocol::{Gang, Meeting, ToAgent, Work};
use std::collections::BTreeSet;

impl State {
    /// The gangs that `node` should have, and those that it should stop, oldest job first.
    pub fn orders(&self, node: NodeId) -> Vec<ToAgent> {
        let mut orders = Vec::new();
        for (job, record) in self.active_jobs(node) {
            let (Some(at), Some(work)) = (&record.placement, &record.work) else { continue };
            let Some(part) = at.part(node) else { continue };
            let generation = at.generation;
            orders.push(ToAgent::StartGang(self.gang(job, record, at, part, work)));
            if let Some(peers) = record.peers() {
                orders.push(ToAgent::MeetPeers { job, generation, peers });
            }
            if let Some(stop) = record.stop {
                orders.push(ToAgent::StopGang { job, generation, now: stop == Stop::Now });
            }
        }
        orders
    }

    fn gang(&self, job: JobId, record: &JobRecord, at: &Placement, part: &Part, work: &Work) -> Gang {
        let leader = at.parts.first().and_then(|part| self.nodes.get(&part.node));
        let meeting = at.port.zip(leader).map(|(port, leader)| Meeting { host: leader.host.clone(), port });
        Gang {
            job,
            generation: at.generation,
            world_size: record.world_size,
            first_rank: part.first_rank,
            ranks: part.ranks,
            nodes: at.parts.len() as u32,
            node_index: at.parts.iter().take_while(|other| other.node != part.node).count() as u32,
            meeting,
            max_time_ms: record.wish.max_time_s.map(|seconds| seconds.saturating_mul(1_000)),
            resume: at.resume.as_ref().map(|resumed| self.resume_point(resumed)),
            work: work.clone(),
        }
    }

    /// How a reconnected agent's gang stands: whether it is still wanted, and the last event of it that is recorded.
    pub fn gang_standing(&self, node: NodeId, job: JobId, generation: Generation) -> GangStanding {
        let Some(part) = self.placement(job, generation).and_then(|at| at.part(node)) else {
            return GangStanding::Unwanted;
        };
        let seq = part.next_seq - 1;
        match self.jobs.get(&job).and_then(|record| record.live_part(node)) {
            Some(_) => GangStanding::Wanted { seq },
            None => GangStanding::Over { seq },
        }
    }

    /// Of the gangs that the agent of `node` says it has lost, those of which the cluster still waits to hear.
    pub fn lost_gangs(&self, node: NodeId, lost: &[(JobId, Generation)]) -> Vec<(JobId, Generation)> {
        let lost: BTreeSet<_> = lost.iter().copied().collect();
        let active = self.active_jobs(node).map(|(job, record)| (job, record.generation));
        active.filter(|gang| lost.contains(gang)).collect()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GangStanding {
    /// It should run on; events up to `seq` are recorded.
    Wanted { seq: u64 },
    /// The gang, or this node's part of it, is over; events up to `seq` were recorded before.
    Over { seq: u64 },
    /// The cluster knows no such gang on this node.
    Unwanted,
}
