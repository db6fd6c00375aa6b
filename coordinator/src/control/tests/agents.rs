//! Agents: greetings, orders and events at any coordinator, and who is called lost.

use super::net::*;
use crate::cluster::commands::{Change, RevokeMember};
use crate::cluster::tests::{finished, step};
use crate::control::*;
use crate::planner::LEASE_MS;
use fleet_common::ids::{JobId, NodeId};
use fleet_common::protocol::{AgentHello, FromAgent, JobState, Reply, Request, ToAgent};

/// A job that runs on a new node whose agent is held by a follower.
fn running(net: &mut Net) -> (u64, NodeId, Session, JobId) {
    let follower = net.follower();
    let node = net.admit_node();
    let session = net.welcome(follower, node, vec![]);
    let job = net.submit(net.leading());
    net.run_until("the gang's start", |net| net.started(session) == [job]);
    (follower, node, session, job)
}

#[test]
fn an_agent_at_a_follower_gets_its_orders_and_its_events_are_recorded() {
    let mut net = Net::new(3);
    let (follower, _, session, job) = running(&mut net);
    net.say(session, events(job, 1, vec![step(1), step(2)]));
    net.say(session, events(job, 3, vec![step(3)]));
    net.run_until("the acknowledgement", |net| net.acknowledged(session) == 3);
    assert_eq!(net.taken[&session], 2);
    assert_eq!(net.steps(follower, job), [1, 2, 3]);
    let cancel = Request::Cancel { job, now: true };
    net.ask(net.leading(), frame(8, 1, cancel));
    net.run_until("the order to stop", |net| {
        net.told[&session].contains(&ToAgent::StopGang { job, generation: 1, now: true })
    });
    net.say(session, events(job, 4, vec![finished()]));
    net.run_until("the end", |net| net.acknowledged(session) == 4);
    assert!(net.state(follower).jobs()[&job].state.is_final());
}

#[test]
fn events_survive_a_leader_that_dies_at_any_moment_none_lost_none_doubled() {
    for kill_after in 0..8 {
        let mut net = Net::new(3);
        let (follower, _, session, job) = running(&mut net);
        for first_seq in [1, 3, 5] {
            net.say(session, events(job, first_seq, vec![step(first_seq), step(first_seq + 1)]));
        }
        for _ in 0..kill_after {
            net.exchange();
        }
        net.kill(net.leading());
        net.run_until("the acknowledgement", |net| net.acknowledged(session) == 6);
        assert!(!net.closed.contains_key(&session), "the agent stayed where it is");
        assert_eq!(net.steps(follower, job), [1, 2, 3, 4, 5, 6], "after {kill_after}");
        net.run(1_000);
        let leader = net.leading();
        assert_eq!(net.steps(leader, job), [1, 2, 3, 4, 5, 6]);
    }
}

#[test]
fn an_agent_whose_coordinator_dies_goes_on_at_another_one() {
    let mut net = Net::new(3);
    let (follower, node, session, job) = running(&mut net);
    net.say(session, events(job, 1, vec![step(1), step(2)]));
    net.run_until("the acknowledgement", |net| net.acknowledged(session) == 2);
    net.say(session, events(job, 3, vec![step(3)]));
    net.exchange();
    net.kill(follower);
    let other = net.follower();
    let session = net.welcome(other, node, vec![(job, 1)]);
    let known = net.acknowledged(session);
    assert!(known == 2 || known == 3, "{known}");
    net.say(session, events(job, 3, vec![step(3), step(4)]));
    net.run_until("the acknowledgement", |net| net.acknowledged(session) == 4);
    assert_eq!(net.steps(other, job), [1, 2, 3, 4]);
    assert!(net.started(session).is_empty(), "it has the gang already");
}

#[test]
fn a_gap_is_asked_for_once_and_filled() {
    let mut net = Net::new(3);
    let (follower, _, session, job) = running(&mut net);
    for first_seq in [3, 4, 5] {
        net.say(session, events(job, first_seq, vec![step(first_seq)]));
    }
    let resend = ToAgent::ResendEvents { job, generation: 1, next_seq: 1 };
    net.run_until("the question", |net| net.told[&session].contains(&resend));
    net.run(500);
    assert_eq!(net.told[&session].iter().filter(|told| **told == resend).count(), 1);
    assert_eq!(net.taken[&session], 3);
    net.say(session, events(job, 1, (1..=5).map(step).collect()));
    net.run_until("the acknowledgement", |net| net.acknowledged(session) == 5);
    assert_eq!(net.steps(follower, job), [1, 2, 3, 4, 5]);
}

#[test]
fn a_batch_too_large_for_the_log_is_recorded_in_parts() {
    let mut net = Net::new(3);
    let (follower, _, session, job) = running(&mut net);
    let line = |n: u64| fleet_common::events::EventBody::Log {
        rank: None,
        level: fleet_common::events::Level::Info,
        line: format!("{n}{}", "x".repeat(1 << 20)),
    };
    // Too large even to be passed on with an envelope.
    let all = events(job, 1, (1..=7).map(line).chain(std::iter::repeat_n(step(8), 4_000)).collect());
    net.say(session, all);
    net.run_until("the acknowledgement", |net| net.acknowledged(session) == 4_007);
    assert_eq!(net.taken[&session], 1);
    let history = net.controls[&follower].history();
    // The large ones are not read all at once.
    assert!((1..7).contains(&history.events(job, 1, 9_999).unwrap().len()));
    assert_eq!(history.events(job, 8, 9_999).unwrap().len(), 4_000);
}

#[test]
fn an_agent_that_sends_more_than_its_credit_is_sent_away() {
    let mut net = Net::new(3);
    let (follower, _, session, job) = running(&mut net);
    for seq in 1..=AGENT_BATCHES_MAX as u64 + 1 {
        net.handle(follower, Input::Agent { session, message: events(job, seq, vec![step(seq)]) });
    }
    net.settle();
    assert!(net.closed[&session].0.contains("batches"));
}

#[test]
fn a_node_is_lost_after_a_lease_of_silence_and_greets_again() {
    let mut net = Net::new(3);
    let (_, node, session, job) = running(&mut net);
    let (at, _) = net.hearts.remove(&session).unwrap();
    net.handle(at, Input::AgentLost { session });
    net.run(LEASE_MS - 1_000);
    assert!(!net.state(net.leading()).nodes()[&node].lost);
    net.run(2_000);
    assert!(net.state(net.leading()).nodes()[&node].lost);
    assert_eq!(net.state(net.leading()).jobs()[&job].state, JobState::Failed);
    assert!(net.decided.iter().any(|why| why.contains("was not heard")), "{:?}", net.decided);
    let session = net.welcome(net.follower(), node, vec![(job, 1)]);
    assert!(net.told[&session].contains(&ToAgent::StopGang { job, generation: 1, now: true }));
    assert!(!net.state(net.leading()).nodes()[&node].lost);
}

#[test]
fn a_coordinator_that_is_back_before_its_agents_have_noticed_costs_no_node() {
    let mut net = Net::new(3);
    let (follower, node, _, job) = running(&mut net);
    net.run(2 * LEASE_MS);
    for _ in 0..3 {
        net.kill(follower);
        net.run(500);
        net.restart(follower);
        net.run(1_500);
        assert!(!net.state(net.leading()).nodes()[&node].lost, "{:?}", net.decided);
        net.welcome(follower, node, vec![(job, 1)]);
        net.run(1_000);
    }
    net.kill(follower);
    net.restart(follower);
    net.run(LEASE_MS - 1_000);
    assert!(!net.state(net.leading()).nodes()[&node].lost, "its lease begins when it was heard last");
    net.run(2_000);
    assert!(net.state(net.leading()).nodes()[&node].lost);
}

#[test]
fn a_node_that_came_back_has_a_whole_lease_though_who_heard_it_is_gone() {
    let mut net = Net::new(3);
    let (follower, node, session, _) = running(&mut net);
    net.hearts.remove(&session);
    net.handle(follower, Input::AgentLost { session });
    net.run(2 * LEASE_MS + 1_000);
    assert!(net.state(net.leading()).nodes()[&node].lost);
    let (leader, now) = (net.leading(), net.now);
    net.connect(follower, node, vec![]);
    // The report of the greeting does not reach the leader, the greeting itself does.
    net.controls.get_mut(&leader).unwrap().observations.forget(now);
    net.run_until("its return", |net| !net.state(leader).nodes()[&node].lost);
    net.kill(follower);
    net.run(LEASE_MS - 2_000);
    assert!(!net.state(leader).nodes()[&node].lost, "{:?}", net.decided);
}

#[test]
fn a_leader_that_stood_still_holds_the_silence_against_nobody() {
    let mut net = Net::new(1);
    let node = net.admit_node();
    let session = net.welcome(1, node, vec![]);
    net.run(LEASE_MS);
    // A machine that was suspended: its agents' connections have ended meanwhile.
    net.now.mono_ms += 10 * LEASE_MS;
    net.hearts.remove(&session);
    net.handle(1, Input::AgentLost { session });
    net.settle();
    net.run(LEASE_MS - 1_000);
    assert!(!net.state(1).nodes()[&node].lost, "{:?}", net.decided);
    net.run(2_000);
    assert!(net.state(1).nodes()[&node].lost);
}

#[test]
fn a_leader_whose_disk_was_full_holds_the_silence_against_nobody() {
    let mut net = Net::new(1);
    let node = net.admit_node();
    let session = net.welcome(1, node, vec![]);
    net.run(LEASE_MS);
    net.disks[&1].set_full(true);
    net.send(1, frame(9, 1, program()));
    net.run_until("no room", |net| net.controls[&1].status().read_only.is_some());
    // The others report to no leader that cannot write, and its agents are elsewhere.
    net.hearts.remove(&session);
    net.handle(1, Input::AgentLost { session });
    net.run(LEASE_MS + 2_000);
    net.disks[&1].set_full(false);
    net.run(LEASE_MS - 1_000);
    assert!(!net.state(1).nodes()[&node].lost, "{:?}", net.decided);
    net.run(4_000);
    assert!(net.state(1).nodes()[&node].lost);
}

#[test]
fn a_worker_with_a_copied_certificate_is_refused_while_the_first_is_there_at_whichever_coordinator() {
    let mut net = Net::new(3);
    let (follower, node, session, job) = running(&mut net);
    net.run(500);
    let coordinators: Vec<u64> = net.controls.keys().copied().collect();
    for at in coordinators {
        let copy = net.connect_as(2, at, node, vec![]);
        net.run_until("a refusal", |net| net.closed.contains_key(&copy));
        let (why, fatal) = &net.closed[&copy];
        assert!(why.contains("another worker is connected as node-1") && !fatal, "{why}");
    }
    assert!(!net.closed.contains_key(&session), "the first one stays");
    assert_eq!(net.state(net.leading()).jobs()[&job].state, JobState::Starting);
    net.say(session, events(job, 1, vec![step(1)]));
    net.run_until("the acknowledgement", |net| net.acknowledged(session) == 1);
    // When it is gone, its place is free, and what ran there is over.
    net.hearts.remove(&session);
    net.handle(follower, Input::AgentLost { session });
    net.run(500);
    let second = net.connect_as(2, net.leading(), node, vec![]);
    net.run_until("a welcome", |net| net.told.contains_key(&second));
    assert_eq!(net.state(net.leading()).jobs()[&job].state, JobState::Failed);
    let back = net.connect_as(1, follower, node, vec![(job, 1)]);
    net.run_until("a refusal", |net| net.closed.contains_key(&back));
    // Also once the second one is away: it was followed, and its word comes too late.
    net.handle(net.leading(), Input::AgentLost { session: second });
    net.hearts.remove(&second);
    net.run(500);
    let back = net.connect_as(1, follower, node, vec![(job, 1)]);
    net.run_until("a refusal", |net| net.closed.contains_key(&back));
    assert!(net.closed[&back].0.contains("another worker speaks for node-1"), "{:?}", net.closed[&back]);
}

#[test]
fn a_worker_that_connects_anew_replaces_its_own_session_at_once() {
    let mut net = Net::new(3);
    let (follower, node, session, job) = running(&mut net);
    let again = net.welcome(follower, node, vec![(job, 1)]);
    assert!(net.closed[&session].0.contains("connected anew"));
    net.say(again, events(job, 1, vec![step(1)]));
    net.run_until("the acknowledgement", |net| net.acknowledged(again) == 1);
    assert_eq!(net.state(net.leading()).jobs()[&job].state, JobState::Starting);
}

#[test]
fn nobody_is_lost_by_leader_changes_however_many() {
    let mut net = Net::new(3);
    let (_, node, session, _) = running(&mut net);
    let other = net.admit_node();
    let leader = net.leading();
    net.welcome(leader, other, vec![]);
    for _ in 0..6 {
        net.run(3_000);
        let (held_at, _) = net.hearts[&session];
        let leader = net.leading();
        // The leader is out of reach for a while; the agents that it holds go elsewhere.
        net.cut.insert(leader);
        for (session, (_, node)) in net.hearts.clone().into_iter().filter(|(_, (at, _))| *at == leader) {
            net.handle(leader, Input::AgentLost { session });
            net.hearts.remove(&session);
            net.run(1_000);
            let session =
                net.connect(net.controls.keys().copied().find(|id| *id != leader).unwrap(), node, vec![]);
            net.run_until("a welcome", |net| net.told.contains_key(&session));
        }
        net.run(2_000);
        net.cut.clear();
        assert!(held_at == leader || net.hearts.contains_key(&session));
        if held_at == leader {
            break;
        }
    }
    net.run(LEASE_MS + 2_000);
    for node in [node, other] {
        assert!(!net.state(net.leading()).nodes()[&node].lost, "{:?}", net.decided);
    }
}

#[test]
fn a_new_leader_that_has_not_heard_an_agent_gives_it_a_whole_lease() {
    let mut net = Net::new(3);
    let (follower, node, session, _) = running(&mut net);
    // The agent's coordinator and the leader die: the last report was long ago for the third one.
    net.run(5_000);
    net.hearts.remove(&session);
    net.kill(net.leading());
    net.cut.insert(follower);
    net.run(LEASE_MS - 2_000);
    net.cut.clear();
    let dead = (1..=3).find(|id| !net.controls.contains_key(id)).unwrap();
    net.restart(dead);
    net.run_until("a leader", |net| net.leader().is_some());
    let led_since = net.now.mono_ms;
    net.handle(follower, Input::AgentLost { session });
    net.run_until("the node is lost", |net| {
        net.leader().is_some_and(|leader| net.state(leader).nodes()[&node].lost)
    });
    assert!(net.now.mono_ms - led_since >= LEASE_MS - 2 * TICK_MS, "{}", net.now.mono_ms - led_since);
}

#[test]
fn a_follower_that_is_cut_off_sends_its_agents_away_before_their_lease_ends() {
    let mut net = Net::new(3);
    let (follower, node, session, _) = running(&mut net);
    net.cut.insert(follower);
    net.run(5_000);
    let (why, fatal) = net.closed[&session].clone();
    assert!(why.contains("another one") && !fatal, "{why}");
    net.welcome(net.follower(), node, vec![(JobId(1), 1)]);
    net.run(LEASE_MS);
    assert!(!net.state(net.leading()).nodes()[&node].lost);
}

#[test]
fn the_newest_connection_of_a_node_speaks_for_it() {
    let mut net = Net::new(3);
    let (follower, node, session, job) = running(&mut net);
    let newer = net.welcome(follower, node, vec![(job, 1)]);
    assert!(net.closed.contains_key(&session));
    net.handle(follower, Input::AgentLost { session });
    net.run(LEASE_MS + 2_000);
    assert!(!net.state(follower).nodes()[&node].lost);
    net.say(newer, events(job, 1, vec![step(1)]));
    net.run_until("the acknowledgement", |net| net.acknowledged(newer) == 1);
}

#[test]
fn strangers_the_revoked_and_the_rude_are_sent_away_for_good() {
    let mut net = Net::new(3);
    let (follower, node, session, _) = running(&mut net);
    let stranger = net.connect(follower, NodeId(99), vec![]);
    net.run_until("the stranger's end", |net| net.closed.contains_key(&stranger));
    assert!(net.closed[&stranger].0.contains("not registered") && net.closed[&stranger].1);
    let rude = net.number();
    net.handle(follower, Input::AgentConnected { session: rude, node: NodeId(98) });
    net.handle(follower, Input::Agent { session: rude, message: events(JobId(1), 1, vec![step(1)]) });
    net.settle();
    assert!(net.closed[&rude].0.contains("greets first"));
    let silent = net.number();
    net.handle(follower, Input::AgentConnected { session: silent, node: NodeId(98) });
    let revoke = RevokeMember { member: Member::Worker(node) };
    net.propose(net.leading(), Change::RevokeMember(revoke)).unwrap();
    net.run(1_000);
    assert!(net.closed[&session].0.contains("revoked") && net.closed[&session].1);
    let again = net.connect(follower, node, vec![]);
    net.settle();
    assert!(net.closed[&again].1);
    net.run(6_000);
    assert!(net.closed[&silent].0.contains("no greeting in time"));
    assert_eq!(net.controls[&follower].status().agents, 0);
}

#[test]
fn a_coordinator_with_a_full_disk_sends_an_agent_on_at_once() {
    let mut net = Net::new(3);
    let (follower, node, _, _) = running(&mut net);
    net.disks[&follower].set_full(true);
    net.submit(net.leading());
    net.run_until("no room", |net| net.controls[&follower].status().read_only.is_some());
    let sent_on = net.connect(follower, node, vec![]);
    net.settle();
    let (message, fatal) = &net.closed[&sent_on];
    assert!(message.contains("cannot be written") && !fatal, "{message}");
}

#[test]
fn a_worker_that_was_restarted_fails_what_it_had_started_and_starts_what_it_had_not() {
    let mut net = Net::new(3);
    let (follower, node, session, silent) = running(&mut net);
    // Ordered, and nothing was heard of either: only the worker's records tell them apart.
    let unheard = net.submit(net.leading());
    net.run_until("the second start", |net| net.started(session) == [silent, unheard]);
    net.handle(follower, Input::AgentLost { session });
    net.hearts.remove(&session);
    net.run(1_000);
    let back = AgentHello { lost: vec![(silent, 1)], earlier: vec![1], ..hello(2, vec![]) };
    let session = net.welcome_as(net.leading(), node, back);
    let record = &net.state(net.leading()).jobs()[&silent];
    assert_eq!(record.state, JobState::Failed);
    let message = &record.error.as_ref().unwrap().message;
    assert!(message.contains("agent restarted") && message.contains("while it ran job-1"), "{message}");
    net.run_until("the order", |net| net.started(session) == [unheard]);
}

#[test]
fn a_worker_that_came_back_without_its_records_starts_nothing_again() {
    let mut net = Net::new(3);
    let (follower, node, session, job) = running(&mut net);
    net.handle(follower, Input::AgentLost { session });
    net.hearts.remove(&session);
    net.run(1_000);
    let session = net.welcome_as(follower, node, hello(2, vec![]));
    net.run(1_000);
    assert!(net.started(session).is_empty());
    let record = &net.state(follower).jobs()[&job];
    assert_eq!(record.state, JobState::Failed);
    assert!(record.error.as_ref().unwrap().message.contains("without its records"));
}

#[test]
fn a_gang_whose_events_cannot_be_recorded_is_over_when_its_worker_says_so() {
    let mut net = Net::new(3);
    let (follower, node, _, job) = running(&mut net);
    let same = AgentHello { lost: vec![(job, 1)], ..hello(1, vec![]) };
    let session = net.welcome_as(follower, node, same);
    net.run(1_000);
    assert!(net.started(session).is_empty());
    let message = &net.state(follower).jobs()[&job].error.as_ref().unwrap().message;
    assert!(message.contains("do not fit"), "{message}");
}

#[test]
fn the_leader_shows_agents_wherever_they_are_held() {
    let mut net = Net::new(3);
    let (follower, ..) = running(&mut net);
    net.run(1_000);
    for at in [follower, net.leading()] {
        let Reply::Nodes(nodes) = net.ask(at, frame(0, 0, Request::Nodes)) else { panic!("no nodes") };
        assert!(nodes[0].connected && nodes[0].heard_ms_ago.unwrap() < 1_500, "{nodes:?}");
    }
    assert!(!net.controls[&follower].state().nodes()[&NodeId(1)].lost);
    let _: Option<FromAgent> = None;
}

#[test]
fn agents_of_one_coordinator_are_bounded() {
    let mut net = Net::new(1);
    for n in 1..=AGENTS_MAX as u64 + 1 {
        net.handle(1, Input::AgentConnected { session: n, node: NodeId(n) });
    }
    net.settle();
    assert_eq!(net.closed.keys().copied().collect::<Vec<_>>(), [AGENTS_MAX as u64 + 1]);
    net.run(6_000);
    assert_eq!(net.controls[&1].status().agents, 0, "none has greeted in time");
}
