//! What an agent has to be told, worked out from the state alone: the same after a lost wake-up, a reconnect or a new leader.

use super::State;
use super::records::Stop;
use fleet_common::ids::{Generation, JobId, NodeId};
use fleet_common::protocol::{Gang, ToAgent};

impl State {
    /// The gangs that `node` should have, and those that it should stop, oldest job first.
    pub fn orders(&self, node: NodeId) -> Vec<ToAgent> {
        let mut orders = Vec::new();
        for (job, record) in self.active_jobs(node) {
            let Some((at, work)) = record.placement.zip(record.work.clone()) else { continue };
            let generation = at.generation;
            orders.push(ToAgent::StartGang(Gang { job, generation, world_size: record.world_size, work }));
            if let Some(stop) = record.stop {
                orders.push(ToAgent::StopGang { job, generation, now: stop == Stop::Now });
            }
        }
        orders
    }

    /// How a reconnected agent's gang stands: whether it is still wanted, and the last event of it that is recorded.
    pub fn gang_standing(&self, node: NodeId, job: JobId, generation: Generation) -> GangStanding {
        let Some(record) = self.jobs.get(&job) else { return GangStanding::Unwanted };
        match record.placement {
            Some(at) if at.node == node && at.generation == generation => {
                if record.state.is_final() {
                    GangStanding::Over { seq: at.next_seq - 1 }
                } else {
                    GangStanding::Wanted { seq: at.next_seq - 1 }
                }
            }
            _ => GangStanding::Unwanted,
        }
    }

    /// Jobs placed on `node` that an agent which knows only `gangs` has lost: they had begun to report.
    pub fn lost_gangs(&self, node: NodeId, gangs: &[(JobId, Generation)]) -> Vec<(JobId, Generation)> {
        self.active_jobs(node)
            .filter_map(|(job, record)| record.placement.map(|at| (job, at)))
            .filter(|(job, at)| at.next_seq > 1 && !gangs.contains(&(*job, at.generation)))
            .map(|(job, at)| (job, at.generation))
            .collect()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GangStanding {
    /// It should run on; events up to `seq` are recorded.
    Wanted { seq: u64 },
    /// The job is final; events up to `seq` were recorded before.
    Over { seq: u64 },
    /// The cluster knows no such gang on this node.
    Unwanted,
}
