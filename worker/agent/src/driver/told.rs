//! What a scrape asks of the driver: what the agent knows, which ranks live, and what stands in their memory. No file is read here.

use super::Driver;
use crate::http::Told;
use crate::machine::RankProcess;
use fleet_collectives::Segment;
use fleet_common::ids::Rank;
use fleet_common::metrics::Page;
use fleet_common::metrics::worker::*;

impl Driver {
    pub(super) fn told(&self) -> Told {
        let (mut page, mut ranks) = (Page::default(), Vec::new());
        let node = self.identity.borrow().member.to_string();
        page.put(&WORKER_INFO, &[&node, env!("CARGO_PKG_VERSION")], 1.0);
        self.agent.measure(&mut page);
        for (id, gang) in self.agent.present() {
            let Some(running) = self.gangs.get(&id) else { continue };
            let reports = running.segment.as_ref().map(Segment::report).unwrap_or_default();
            for (local, child) in running.ranks.iter().enumerate() {
                let living = child.as_ref().filter(|child| self.attended.contains_key(&child.pid));
                let Some(child) = living else { continue };
                let (job, rank) = (id.job.to_string(), gang.global(local as Rank).to_string());
                let labels = [job.as_str(), rank.as_str()];
                page.put(&RANK_RESTARTS, &labels, id.generation.saturating_sub(1) as f64);
                let alone = gang.figures().step.filter(|_| rank == "0").map(|step| step.step);
                let report = reports.get(local);
                let step = report.map(|report| report.step).or(alone);
                page.put_some(&RANK_STEP, &labels, step.map(|step| step as f64));
                if let Some(exchanged) = report.map(|report| report.exchanged) {
                    page.put(&RANK_COLLECTIVE_BYTES, &labels, exchanged.bytes as f64);
                    page.put(&RANK_COLLECTIVE_SECONDS, &labels, exchanged.time.as_secs_f64());
                }
                ranks.push(RankProcess { job, rank, pid: child.pid });
            }
        }
        Told { is_connected: self.agent.is_connected(), page, ranks }
    }
}
