//! How the parts of a training gang on several nodes come to know each other.
//!
//! Each part says where its ranks can be called and, when its data are ready, what they are. Once all have, and their data are the same, every
//! node is told of all ranks: an order that follows from the state, so that whoever is asked, and however often, gives the same list for a
//! generation. What was said once stays, and goes with the generation.

use super::ends::wake_parts;
use super::members::clip;
use super::records::{JobRecord, Part, Placement, node_error};
use super::{Context, State};
use fleet_common::events::{Endpoint, EventBody};
use fleet_common::ids::{Generation, JobId, NodeId};
use fleet_common::protocol::Peer;

impl State {
    /// What a part of a gang says of itself before its ranks start, if it is that.
    pub(crate) fn take_report(&mut self, id: JobId, node: NodeId, body: &EventBody, context: &mut Context) {
        let Some(job) = self.jobs.get_mut(&id).filter(|job| job.meets()) else { return };
        let Some(at) = &mut job.placement else { return };
        let Some(part) = at.parts.iter_mut().find(|part| part.node == node && !part.finished) else { return };
        let flawed = match body {
            EventBody::Listening(_) if !part.report.endpoints.is_empty() => return, // it may have been told to the others
            EventBody::Listening(endpoints) => {
                part.report.endpoints = endpoints.clone();
                part.report.address = self.nodes.get(&node).map(|node| node.host.clone()).unwrap_or_default();
                endpoints.len() != part.ranks as usize || !endpoints.iter().all(Endpoint::is_sound)
            }
            EventBody::DataReady(stats) if part.report.data.is_none() => {
                part.report.data = Some(clip(&stats.fingerprint));
                false
            }
            _ => return,
        };
        let complete = at.all_report();
        let unlike = at.unlike_data();
        if flawed {
            let name = self.node_name(node);
            let message = format!(
                "node {name} does not say for each of its ranks where it can be called, by a fault of fleet; see that all nodes have the same version"
            );
            self.break_off(id, node_error(name, message), context);
        } else if let Some((one, other)) = unlike {
            let (one, other) = (self.node_name(one), self.node_name(other));
            let message = format!(
                "the data of {id} are not the same on node {one} and node {other}; copy the same files to both, with the same tokenizer and model, and submit it again"
            );
            self.break_off(id, node_error(other, message), context);
        } else if complete {
            wake_parts(job, context);
        }
    }

    /// Parts of training gangs on several nodes that have yet to say where their ranks can be called.
    pub fn unreported(&self) -> impl Iterator<Item = ((JobId, Generation), NodeId)> {
        let meeting = self.jobs.iter().filter(|(_, job)| job.meets());
        meeting.filter_map(|(id, job)| Some((*id, job.placement.as_ref()?))).flat_map(|(id, at)| {
            let silent = at.parts.iter().filter(|part| !part.finished && part.report.endpoints.is_empty());
            silent.map(move |part| ((id, at.generation), part.node))
        })
    }
}

impl JobRecord {
    /// Its ranks train on several nodes, and it shall not stop.
    fn meets(&self) -> bool {
        let apart = self.placement.as_ref().is_some_and(|at| at.parts.len() > 1);
        self.trains && apart && self.stop.is_none() && !self.state.is_final()
    }

    /// Where all its ranks can be called, in rank order, once all nodes have said so and have the same data.
    pub(super) fn peers(&self) -> Option<Vec<Peer>> {
        let at = self.placement.as_ref().filter(|at| self.meets() && at.all_report())?;
        let of = |(host, part): (u32, &Part)| {
            let address = part.report.address.clone();
            let peer = move |Endpoint { port, key }| Peer { host, address: address.clone(), port, key };
            part.report.endpoints.clone().into_iter().map(peer)
        };
        Some((0..).zip(&at.parts).flat_map(of).collect())
    }
}

impl Placement {
    fn all_report(&self) -> bool {
        let reports =
            |part: &Part| !part.finished && !part.report.endpoints.is_empty() && part.report.data.is_some();
        self.parts.iter().all(reports)
    }

    /// Two nodes that have different data, the first in rank order among them.
    fn unlike_data(&self) -> Option<(NodeId, NodeId)> {
        let mut ready = self.parts.iter().filter_map(|part| Some((part.node, part.report.data.as_ref()?)));
        let (first, data) = ready.next()?;
        ready.find(|(_, other)| *other != data).map(|(other, _)| (first, other))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::commands::{BreakOff, Change, DescribeNode, DrainNode, FailJob, UndrainNode};
    use crate::cluster::tests::{Script, describe, job, stopped, training};
    use fleet_common::events::DataStats;
    use fleet_common::protocol::{JobState, ToAgent, Wish};

    fn listening(first: u16, ranks: u16) -> EventBody {
        let endpoint = |port| Endpoint { port, key: vec![port as u8; 44] };
        EventBody::Listening((first..first + ranks).map(endpoint).collect())
    }

    fn ready(fingerprint: &str) -> EventBody {
        EventBody::DataReady(DataStats { fingerprint: fingerprint.into(), ..DataStats::default() })
    }

    /// A training job of four ranks, two on node 1 and two on node 2.
    fn on_two_nodes() -> (Script, JobId) {
        let mut script = Script::with_nodes(&[2, 2]);
        let wish = Wish { nodes: Some(2), ..Wish::default() };
        let job = script.submit_as(job(training(), 4, wish));
        script.place(job, &[(1, 2), (2, 2)]);
        (script, job)
    }

    fn told(script: &Script, node: u64) -> Option<Vec<Peer>> {
        script.state.orders(NodeId(node)).into_iter().find_map(|order| match order {
            ToAgent::MeetPeers { peers, .. } => Some(peers),
            _ => None,
        })
    }

    fn error(script: &Script, job: JobId) -> String {
        script.state.jobs()[&job].error.clone().map(|error| error.message).unwrap_or_default()
    }

    #[test]
    fn when_all_parts_have_reported_every_node_is_told_the_same_of_all_ranks() {
        let (mut script, job) = on_two_nodes();
        assert_eq!(script.state.unreported().count(), 2);
        script.tell(job, 2, 1, vec![listening(500, 2), ready("d")]);
        script.tell(job, 1, 1, vec![listening(100, 2)]);
        assert_eq!((script.state.unreported().count(), told(&script, 1)), (0, None), "one has no data yet");
        script.tell(job, 1, 2, vec![ready("d")]);
        let peers = told(&script, 1).unwrap();
        let seen: Vec<_> = peers.iter().map(|peer| (peer.host, peer.address.as_str(), peer.port)).collect();
        assert_eq!(seen, [(0, "host-1", 100), (0, "host-1", 101), (1, "host-2", 500), (1, "host-2", 501)]);
        assert_eq!(told(&script, 2), Some(peers.clone()));
        // Neither a second report nor a node's new address changes what may have been told already.
        script.tell(job, 1, 3, vec![listening(900, 2)]);
        let Change::DescribeNode(described) = describe(NodeId(2), "n2", 2, &[]) else { unreachable!() };
        script.run(Change::DescribeNode(DescribeNode { host: "moved".into(), ..described }));
        assert_eq!((told(&script, 1), told(&script, 2)), (Some(peers.clone()), Some(peers)));
        let kept = script.events(job).iter().any(|event| matches!(event.body, EventBody::Listening(_)));
        assert!(!kept, "it is for this generation alone");
    }

    #[test]
    fn a_generation_knows_nothing_of_the_last_one() {
        let (mut script, job) = on_two_nodes();
        for node in [1, 2] {
            script.tell(job, node, 1, vec![listening(100, 2), ready("d")]);
        }
        script.run(Change::DrainNode(DrainNode { node: NodeId(2), now: true }));
        assert_eq!(told(&script, 1), None, "what shall stop meets nobody");
        for node in [1, 2] {
            script.tell(job, node, 3, vec![stopped(0)]);
        }
        assert_eq!(script.state.jobs()[&job].state, JobState::Queued);
        script.run(Change::UndrainNode(UndrainNode { node: NodeId(2) }));
        script.place(job, &[(1, 2), (2, 2)]);
        script.tell(job, 1, 1, vec![listening(200, 2), ready("d")]);
        assert_eq!(told(&script, 1), None);
        script.tell(job, 2, 1, vec![listening(300, 2), ready("d")]);
        let ports: Vec<u16> = told(&script, 2).unwrap().iter().map(|peer| peer.port).collect();
        assert_eq!(ports, [200, 201, 300, 301]);
    }

    #[test]
    fn nodes_with_different_data_are_named_before_anything_starts() {
        let (mut script, job) = on_two_nodes();
        script.tell(job, 1, 1, vec![listening(100, 2), ready("d")]);
        script.tell(job, 2, 1, vec![listening(500, 2), ready("other")]);
        assert_eq!(script.state.jobs()[&job].state, JobState::Stopping);
        for node in [1, 2] {
            let orders = script.state.orders(NodeId(node));
            assert!(matches!(orders[1], ToAgent::StopGang { now: true, .. }), "{orders:?}");
            script.tell(job, node, 3, vec![stopped(0)]);
        }
        assert!(
            error(&script, job).contains("not the same on node n1 and node n2"),
            "{}",
            error(&script, job)
        );
    }

    #[test]
    fn a_part_that_does_not_report_is_named_and_the_others_are_stopped() {
        let (mut script, job) = on_two_nodes();
        script.tell(job, 1, 1, vec![listening(100, 2)]);
        let late = |generation, node| {
            Change::BreakOff(BreakOff { job, generation, node: NodeId(node), waited_ms: 60_000 })
        };
        script.run(late(2, 2));
        script.run(late(1, 1));
        assert_eq!(
            script.state.jobs()[&job].state,
            JobState::Starting,
            "it has reported, or it is another one"
        );
        script.run(late(1, 2));
        assert_eq!(script.state.jobs()[&job].state, JobState::Stopping);
        for node in [1, 2] {
            script.tell(job, node, if node == 1 { 2 } else { 1 }, vec![stopped(0)]);
        }
        assert!(error(&script, job).contains("node n2 has not said within 60 s"), "{}", error(&script, job));
    }

    #[test]
    fn a_node_that_is_lost_meanwhile_ends_it_and_a_report_for_too_few_ranks_too() {
        let (mut script, job) = on_two_nodes();
        script.tell(job, 1, 1, vec![listening(100, 2), ready("d")]);
        script.run(Change::FailJob(FailJob {
            job,
            generation: 1,
            node: NodeId(2),
            message: "agent restarted".into(),
        }));
        script.tell(job, 2, 1, vec![listening(500, 2), ready("d")]);
        assert_eq!(told(&script, 1), None);
        script.tell(job, 1, 3, vec![stopped(0)]);
        assert_eq!(error(&script, job), "agent restarted");

        let (mut script, job) = on_two_nodes();
        script.tell(job, 2, 1, vec![listening(500, 1)]);
        for node in [1, 2] {
            script.tell(job, node, if node == 2 { 2 } else { 1 }, vec![stopped(0)]);
        }
        assert!(error(&script, job).contains("node n2 does not say for each of its ranks"));
    }
}
