use super::*;
use crate::cluster::commands::{CancelJob, Change, DrainNode, FailJob, MarkNodeLost};
use crate::cluster::orders::GangStanding;
use crate::cluster::tests::{Script, checkpoint, finished, job, step, stopped, training};
use fleet_common::events::{EventBody, FailureKind, JobError};
use fleet_common::protocol::{ToAgent, Wish};

fn failed(message: &str) -> EventBody {
    let error = node_error("n2".into(), message.into());
    EventBody::Finished(Outcome::Failed(JobError { rank: Some(3), ..error }))
}

/// A job of four ranks, two on node 1 and two on node 2.
fn on_two_nodes() -> (Script, JobId) {
    let mut script = Script::with_nodes(&[2, 2]);
    let job = script.submit(4);
    script.place(job, &[(1, 2), (2, 2)]);
    (script, job)
}

#[test]
fn a_job_is_over_when_all_its_parts_are_and_their_slots_are_free_before() {
    let (mut script, job) = on_two_nodes();
    script.tell(job, 2, 1, vec![finished()]);
    assert_eq!(script.state.jobs()[&job].state, JobState::Starting);
    assert_eq!(script.state.slots_used(NodeId(2)), 0);
    assert_eq!(script.state.gang_standing(NodeId(2), job, 1), GangStanding::Over { seq: 1 });
    assert!(script.state.orders(NodeId(2)).is_empty());
    script.tell(job, 1, 1, vec![step(7), finished()]);
    assert_eq!(script.state.jobs()[&job].state, JobState::Succeeded);
    let ends = script.events(job).iter().filter(|e| matches!(e.body, EventBody::Finished(_))).count();
    assert_eq!(ends, 1);
    assert!(script.last_event_is_finished(job));
}

#[test]
fn the_first_failure_stops_the_others_and_is_the_job_s() {
    let (mut script, job) = on_two_nodes();
    script.tell(job, 2, 1, vec![failed("rank 3 broke")]);
    let orders = script.state.orders(NodeId(1));
    assert!(matches!(orders[1], ToAgent::StopGang { now: false, generation: 1, .. }), "{orders:?}");
    script.tell(job, 1, 1, vec![failed("rank 0 lost its peer")]);
    let record = &script.state.jobs()[&job];
    assert_eq!(
        (record.state, record.error.as_ref().unwrap().message.as_str()),
        (JobState::Failed, "rank 3 broke")
    );
}

#[test]
fn only_the_part_with_rank_0_speaks_for_the_job() {
    let (mut script, job) = on_two_nodes();
    script.tell(job, 2, 1, vec![step(9)]);
    script.tell(job, 1, 1, vec![step(3)]);
    assert_eq!(script.steps_in_history(job), [3]);
    assert_eq!(script.state.jobs()[&job].progress.step, 3);
}

#[test]
fn each_part_has_a_stream_of_its_own() {
    let (mut script, job) = on_two_nodes();
    let log = || EventBody::Log { rank: Some(0), level: fleet_common::events::Level::Info, line: "l".into() };
    script.tell(job, 1, 1, vec![log(), log()]);
    script.tell(job, 2, 1, vec![log()]);
    assert_eq!(script.state.gang_standing(NodeId(1), job, 1), GangStanding::Wanted { seq: 2 });
    assert_eq!(script.state.gang_standing(NodeId(2), job, 1), GangStanding::Wanted { seq: 1 });
    assert_eq!(script.state.lost_gangs(NodeId(2), &[(job, 1)]), [(job, 1)]);
    assert_eq!(script.state.lost_gangs(NodeId(2), &[(job, 2), (JobId(9), 1)]), []);
    assert_eq!(script.state.jobs()[&job].events, 3);
}

#[test]
fn a_lost_node_fails_the_job_once_the_others_have_ended() {
    let (mut script, job) = on_two_nodes();
    script.run(Change::MarkNodeLost(MarkNodeLost { node: NodeId(2), silent_ms: 10_000 }));
    assert_eq!(script.state.jobs()[&job].state, JobState::Stopping);
    assert_eq!(script.state.gang_standing(NodeId(2), job, 1), GangStanding::Over { seq: 0 });
    script.tell(job, 1, 1, vec![stopped(3)]);
    let record = &script.state.jobs()[&job];
    assert_eq!(record.state, JobState::Failed);
    assert!(record.error.as_ref().unwrap().message.contains("n2 was lost"));
}

#[test]
fn ranks_that_an_agent_lost_end_its_part_only() {
    let (mut script, job) = on_two_nodes();
    let fail = FailJob { job, generation: 1, node: NodeId(1), message: "agent restarted".into() };
    script.run(Change::FailJob(fail));
    assert_eq!(script.state.jobs()[&job].state, JobState::Stopping);
    script.tell(job, 2, 1, vec![stopped(0)]);
    assert_eq!(script.state.jobs()[&job].error.as_ref().unwrap().message, "agent restarted");
}

#[test]
fn a_node_that_shuts_down_takes_the_rest_of_the_gang_along() {
    let (mut script, job) = on_two_nodes();
    script.tell(job, 1, 1, vec![stopped(2)]);
    assert!(matches!(script.state.orders(NodeId(2))[1], ToAgent::StopGang { now: false, .. }));
    script.tell(job, 2, 1, vec![stopped(2)]);
    assert_eq!(script.state.jobs()[&job].state, JobState::Cancelled);
}

#[test]
fn a_cancelled_gang_is_told_everywhere_and_saves_what_it_has() {
    let (mut script, job) = on_two_nodes();
    script.run(Change::CancelJob(CancelJob { job, stop: Stop::AfterCheckpoint }));
    script.tell(job, 1, 1, vec![stopped(2)]);
    let orders = script.state.orders(NodeId(2));
    assert!(matches!(orders[1], ToAgent::StopGang { now: false, .. }), "{orders:?}");
    script.tell(job, 2, 1, vec![stopped(2)]);
    assert_eq!(script.state.jobs()[&job].state, JobState::Cancelled);
}

/// A training job of four ranks, two on each of two nodes.
fn trains_on_two_nodes() -> (Script, JobId) {
    let mut script = Script::with_nodes(&[2, 2]);
    let wish = Wish { nodes: Some(2), ..Wish::default() };
    let job = script.submit_as(job(training(), 4, wish));
    script.place(job, &[(1, 2), (2, 2)]);
    (script, job)
}

fn blames(kind: FailureKind, rank: u32, message: &str) -> EventBody {
    let error = node_error("whoever says it".into(), message.into());
    EventBody::Finished(Outcome::Failed(JobError { kind, rank: Some(rank), ..error }))
}

#[test]
fn who_failed_is_shown_and_not_those_that_noticed_it_first() {
    let (mut script, job) = trains_on_two_nodes();
    script.tell(job, 1, 1, vec![blames(FailureKind::Told, 3, "aborted: rank 3 is gone")]);
    script.tell(job, 2, 1, vec![blames(FailureKind::Signal, 3, "rank 3 was killed")]);
    let error = script.state.jobs()[&job].error.clone().unwrap();
    assert_eq!((error.kind, error.message.as_str()), (FailureKind::Signal, "rank 3 was killed"));
}

#[test]
fn a_rank_that_only_others_know_to_have_failed_is_named_with_its_own_node() {
    let (mut script, job) = trains_on_two_nodes();
    script.tell(job, 1, 1, vec![blames(FailureKind::Peer, 3, "rank 3 did not come")]);
    let orders = script.state.orders(NodeId(2));
    assert!(matches!(orders[1], ToAgent::StopGang { now: true, .. }), "nothing can be saved: {orders:?}");
    script.tell(job, 2, 1, vec![stopped(5)]);
    let error = script.state.jobs()[&job].error.clone().unwrap();
    assert_eq!((error.rank, error.node.as_deref()), (Some(3), Some("n2")));
}

#[test]
fn what_goes_back_to_the_queue_says_how_far_it_had_come() {
    let said = |bodies: Vec<EventBody>| {
        let mut script = Script::with_node(2);
        let gang = script.submit_as(job(training(), 2, Wish::default()));
        script.place(gang, &[(1, 2)]);
        let next = bodies.len() as u64 + 1;
        script.tell(gang, 1, 1, bodies);
        script.run(Change::DrainNode(DrainNode { node: NodeId(1), now: true }));
        script.tell(gang, 1, next, vec![stopped(0)]);
        match &script.events(gang).last().unwrap().body {
            EventBody::Log { line, .. } => line.clone(),
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(said(Vec::new()), "back in the queue before its first step");
    assert_eq!(said(vec![step(3), checkpoint(3)]), "back in the queue after step 3");
    assert!(
        said(vec![checkpoint(3), step(5)])
            .ends_with("after step 5, without a checkpoint of it; goes on from step 3")
    );
    assert!(said(vec![step(5)]).ends_with("after step 5, without a checkpoint; begins as it did before"));
}
