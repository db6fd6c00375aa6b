//! What grows: the history and its end, output that stays on the nodes, and a disk that is nearly full.

use super::net::*;
use crate::cluster::Answer;
use crate::cluster::commands::{Change, MarkNodeLost, RemoveReplica};
use crate::cluster::retention::Limits;
use crate::cluster::tests::{finished, step, token};
use crate::control::*;
use fleet_common::events::{EventBody, Level};
use fleet_common::ids::JobId;
use fleet_common::protocol::{FromAgent, OutputPiece, OutputWish, Reply, Request, Role, ToAgent};

fn line(text: &str) -> EventBody {
    EventBody::Log { rank: Some(0), level: Level::Info, line: text.into() }
}

fn why(reply: &Reply) -> &str {
    match reply {
        Reply::Refused(refusal) => &refusal.message,
        other => panic!("{other:?}"),
    }
}

#[test]
fn in_the_reserve_a_job_is_cancelled_and_ends_and_nothing_new_begins() {
    let mut net = Net::new(1);
    let at = net.leading();
    let node = net.admit_node();
    let session = net.welcome(at, node, vec![]);
    let job = net.submit(at);
    net.run_until("the gang's start", |net| net.started(session) == [job]);
    net.handle(at, Input::Room(Room::Little("only 20 MiB are free".into())));
    net.settle();
    assert!(why(&net.ask(at, frame(9, 10, program()))).contains("20 MiB"));
    net.say(session, events(job, 1, vec![line("talk"), step(1)]));
    net.run(1_000);
    assert_eq!(net.acknowledged(session), 0, "it runs, and nobody wants it to stop");
    assert_eq!(net.ask(at, frame(9, 11, Request::Cancel { job, now: true })), Reply::Done);
    net.run_until("the order to stop", |net| {
        net.told[&session].contains(&ToAgent::StopGang { job, generation: 1, now: true })
    });
    net.say(session, events(job, 3, vec![line("last words"), finished()]));
    net.run_until("the end", |net| net.state(at).jobs()[&job].state.is_final());
    assert_eq!(net.steps(at, job), [1], "its steps are recorded, its lines are not");
    let history = net.controls[&at].history().events(job, 1, 99).unwrap();
    assert!(history.iter().all(|(_, event)| !matches!(event.body, EventBody::Log { .. })), "{history:?}");
    for (seq, request) in [
        Request::SetRetention { age_s: Some(7_200), bytes: None },
        Request::Drain { node, now: false },
        Request::Revoke(fleet_common::protocol::Member::Worker(node)),
    ]
    .into_iter()
    .enumerate()
    {
        assert_eq!(net.ask(at, frame(9, 12 + seq as u64, request)), Reply::Done);
    }
    net.handle(at, Input::Room(Room::None("nothing is free".into())));
    net.settle();
    let cancel = Request::Cancel { job, now: true };
    assert!(why(&net.ask(at, frame(9, 20, cancel))).contains("nothing is free"));
    net.handle(at, Input::Room(Room::Enough));
    net.settle();
    assert!(matches!(net.ask(at, frame(9, 21, program())), Reply::Submitted { .. }));
}

#[test]
fn the_leader_removes_what_ended_long_ago_and_every_coordinator_says_so() {
    let mut net = Net::new(3);
    let node = net.admit_node();
    let follower = net.follower();
    let session = net.welcome(follower, node, vec![]);
    let job = net.submit(net.leading());
    net.run_until("the gang's start", |net| net.started(session) == [job]);
    net.say(session, events(job, 1, vec![step(1), finished()]));
    net.run_until("the end", |net| net.state(follower).jobs()[&job].state.is_final());
    assert_eq!(net.controls[&follower].history().events(job, 1, 9).unwrap().len(), 2);
    net.now.unix_ms += Limits::default().age_ms + 3_600_000;
    net.run_until("it is removed", |net| net.controls.values().all(|it| it.state().jobs().is_empty()));
    net.run(500);
    for at in [1, 2, 3] {
        assert!(net.controls[&at].history().events(job, 1, 9).unwrap().is_empty());
    }
    for (seq, request) in
        [Request::Job(job), Request::Watch { job, from: 1, follow: false }].into_iter().enumerate()
    {
        let reply = net.ask(follower, frame(9, 30 + seq as u64, request));
        assert!(why(&reply).contains("job-1 was removed: what ended 90 days or longer ago"), "{reply:?}");
    }
    let never = net.ask(follower, frame(9, 40, Request::Job(JobId(7))));
    assert!(why(&never).contains("there is no job-7"));
}

/// Job 1 runs on a node whose agent is held by a follower.
fn printing(net: &mut Net) -> (u64, Session, JobId) {
    let (node, follower) = (net.admit_node(), net.follower());
    let session = net.welcome(follower, node, vec![]);
    let job = net.submit(net.leading());
    net.run_until("the gang's start", |net| net.started(session) == [job]);
    (follower, session, job)
}

fn asked(net: &Net, session: Session) -> Vec<OutputWish> {
    let wish = |told: &ToAgent| match told {
        ToAgent::ReadOutput(wish) => Some(*wish),
        _ => None,
    };
    net.told[&session].iter().filter_map(wish).collect()
}

#[test]
fn output_comes_from_the_agent_wherever_it_is_held_and_whoever_is_asked() {
    let mut net = Net::new(3);
    let (_, session, job) = printing(&mut net);
    for (at, result) in [
        (1, Ok(OutputPiece { start: 7, bytes: vec![1, 2], end: 99 })),
        (2, Err("rank-0.log is not there any more".to_owned())),
        (3, Ok(OutputPiece { start: 0, bytes: vec![], end: 0 })),
    ] {
        let before = asked(&net, session).len();
        let call = net.send(at, frame(9, at, Request::Output { job, rank: 0, from: 7 }));
        net.run_until("the agent is asked", |net| asked(net, session).len() > before);
        let wish = asked(&net, session)[before];
        assert_eq!((wish.job, wish.generation, wish.local_rank, wish.from), (job, 1, 0, 7));
        // An answer that nobody asked for changes nothing.
        net.say(session, FromAgent::Output { ticket: wish.ticket ^ 1, result: Err("what?".into()) });
        net.say(session, FromAgent::Output { ticket: wish.ticket, result: result.clone() });
        net.run_until("the answer", |net| net.reply(call).is_some());
        let reply = net.reply(call).unwrap();
        match result {
            Ok(piece) => assert_eq!(*reply, Reply::Output(piece)),
            Err(gone) => assert_eq!(why(reply), format!("box: {gone}")),
        }
    }
}

#[test]
fn output_that_cannot_come_is_refused_in_one_line() {
    let mut net = Net::new(3);
    let (follower, session, job) = printing(&mut net);
    let mut seq = 0;
    let mut ask = |net: &mut Net, job, rank| {
        seq += 1;
        net.ask(net.leading(), frame(9, seq, Request::Output { job, rank, from: 0 }))
    };
    assert!(why(&ask(&mut net, JobId(7), 0)).contains("there is no job-7"));
    assert!(why(&ask(&mut net, job, 5)).contains("job-1 has no rank 5; its ranks are 0 to 0"));
    assert!(why(&ask(&mut net, job, 0)).contains("did not come in time"), "the agent says nothing");
    net.handle(follower, Input::AgentLost { session });
    net.settle();
    let away = ask(&mut net, job, 0);
    assert!(
        why(&away).contains("box is not connected, and what its ranks printed is only there"),
        "{away:?}"
    );
}

#[test]
fn in_the_reserve_a_worker_comes_back_and_the_leader_can_be_taken_out() {
    let mut net = Net::new(3);
    let node = net.admit_node();
    net.welcome(net.follower(), node, vec![]);
    let little = Room::Little("the disk is nearly full".to_owned());
    for id in 1..=3 {
        net.handle(id, Input::Room(little.clone()));
    }
    net.propose(net.leading(), Change::MarkNodeLost(MarkNodeLost { node, silent_ms: 10_000 })).unwrap();
    // It is described anew, as every worker is that was lost or was started again.
    net.welcome(net.follower(), node, vec![]);
    let leader = net.leading();
    assert!(!net.state(leader).nodes()[&node].lost);
    let refused = net.propose(leader, token("t", Role::Worker, 1)).unwrap_err();
    assert_eq!(refused.message, "the disk is nearly full");
    net.run(2_000);
    let remove = Change::RemoveReplica(RemoveReplica { replica: ReplicaId(leader) });
    assert_eq!(net.propose(net.follower(), remove), Ok(Answer::Done));
}
