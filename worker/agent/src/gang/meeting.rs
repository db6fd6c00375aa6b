//! From prepared data to ranks that start. On one node the first is enough; of several, all must be known to each other before: the cluster
//! tells when every node has said where its ranks can be called and has its data.

use super::{Kind, Phase, Prepared, Supervised};
use crate::agent::{Action, Config, Now};
use fleet_common::events::{EventBody, Level};
use fleet_common::protocol::{Peer, RankStart, ToRank};

/// Which of a gang's nodes this is, and how many there are.
#[derive(Clone, Copy, Debug)]
pub(super) struct Hosts {
    pub index: u32,
    pub count: u32,
}

impl Supervised {
    pub(super) fn on_prepared(
        &mut self,
        prepared: Prepared,
        config: &Config,
        now: Now,
        out: &mut Vec<Action>,
    ) {
        if self.may_not_start() || self.prepared.is_some() {
            return;
        }
        self.push(now, EventBody::DataReady(prepared.stats.clone()));
        self.prepared = Some(prepared);
        self.start_ranks(config, now, out);
    }

    /// Where all ranks of the gang can be called. What is told again changes nothing.
    pub fn meet(&mut self, peers: Vec<Peer>, config: &Config, now: Now, out: &mut Vec<Action>) {
        if self.may_not_start() || self.met || peers.len() != self.world_size as usize {
            return;
        }
        self.met = true;
        out.push(Action::Meet { gang: self.id, peers });
        self.start_ranks(config, now, out);
    }

    /// They have started, or never will.
    fn may_not_start(&self) -> bool {
        let ending = self.stop.is_some() || self.own_error.is_some() || !self.suspicions.is_empty();
        ending || self.phase != Phase::Preparing
    }

    fn start_ranks(&mut self, config: &Config, now: Now, out: &mut Vec<Action>) {
        let Kind::Train(job) = &self.kind else { return };
        let Some(prepared) = self.prepared.take_if(|_| self.met) else { return };
        let ranks = self.ranks.len() as u32;
        let job_json = job.to_json();
        let threads = config.threads(job, ranks);
        for (rank, place) in (0..ranks).zip(&self.places) {
            let start = RankStart {
                job: self.id.job,
                generation: self.id.generation,
                rank: self.first_rank + rank,
                world_size: self.world_size,
                local_rank: rank,
                local_world_size: ranks,
                host: self.hosts.index,
                hosts: self.hosts.count,
                job_json: job_json.clone(),
                cache_dir: prepared.cache_dir.to_string_lossy().into_owned(),
                resume: prepared.resume.as_ref().map(|path| path.to_string_lossy().into_owned()),
                run: prepared.run.clone(),
                threads,
                device: place.device.clone(),
                shm_fd: None,
                network: None,
            };
            out.push(Action::ToRank { gang: self.id, rank, message: ToRank::Start(Box::new(start)) });
        }
        self.phase = Phase::Running;
        if let Some(line) = self.places.iter().find_map(|place| place.note.clone()) {
            self.push(now, EventBody::Log { rank: None, level: Level::Warn, line });
        }
    }
}
