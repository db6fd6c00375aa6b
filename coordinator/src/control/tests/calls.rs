//! Clients: changes, queries and watches at any coordinator, over failures.

use super::net::*;
use crate::cluster::commands::{Change, RedeemToken, RevokeMember};
use crate::cluster::session::RequestId;
use crate::cluster::tests::{redeem, step, token};
use crate::control::*;
use fleet_common::ids::{JobId, NodeId};
use fleet_common::protocol::{
    CHANGES_IN_FLIGHT_MAX, ClientFrame, PROTOCOL_VERSION, RefusalKind, Reply, Request, Role,
};

fn kind(reply: &Reply) -> Option<RefusalKind> {
    match reply {
        Reply::Refused(refusal) => Some(refusal.kind),
        _ => None,
    }
}

#[test]
fn a_change_asked_of_two_coordinators_happens_once() {
    let mut net = Net::new(3);
    let (leader, follower) = (net.leading(), net.follower());
    let first = net.send(follower, frame(9, 1, program()));
    let second = net.send(leader, frame(9, 1, program()));
    net.run_until("both replies", |net| net.reply(first).is_some() && net.reply(second).is_some());
    assert_eq!(net.reply(first), Some(&Reply::Submitted { job: JobId(1) }));
    assert_eq!(net.reply(second), net.reply(first));
    assert_eq!(net.state(leader).jobs().len(), 1);
}

#[test]
fn a_change_passed_on_to_a_leader_that_dies_is_done_once_by_the_next_one() {
    for kill_after in 0..8 {
        let mut net = Net::new(3);
        let (leader, follower) = (net.leading(), net.follower());
        let call = net.send(follower, frame(9, 1, program()));
        // Some rounds of messages, so that the leader dies with the change at every stage.
        for _ in 0..kill_after {
            net.exchange();
        }
        net.kill(leader);
        net.run_until("a reply", |net| net.reply(call).is_some());
        assert_eq!(net.reply(call), Some(&Reply::Submitted { job: JobId(1) }), "after {kill_after}");
        net.run_until("a leader", |net| net.leader().is_some());
        let again = net.ask(net.leading(), frame(9, 1, program()));
        assert_eq!(again, Reply::Submitted { job: JobId(1) });
        assert_eq!(net.replies[&call].len(), 1);
        assert_eq!(net.state(net.leading()).jobs().len(), 1);
    }
}

#[test]
fn a_deposed_leader_answers_no_query_unless_old_news_will_do() {
    let mut net = Net::new(3);
    let old = net.leading();
    net.cut.insert(old);
    let read = net.send(old, frame(0, 0, Request::Job(JobId(1))));
    net.run_until("another leader", |net| net.leader().is_some_and(|leader| leader != old));
    let job = net.submit(net.leading());
    let read_later = net.send(old, frame(0, 0, Request::Job(job)));
    net.run(6_000);
    for call in [read, read_later] {
        assert_eq!(kind(net.reply(call).unwrap()), Some(RefusalKind::Unavailable));
    }
    let stale = ClientFrame { stale: true, ..frame(0, 0, Request::Job(job)) };
    assert_eq!(kind(&net.ask(old, stale.clone())), Some(RefusalKind::NotFound));
    net.cut.clear();
    net.run_until("a reply", |net| net.state(old).jobs().contains_key(&job));
    assert!(matches!(net.ask(old, stale), Reply::Job(_)));
    assert!(matches!(net.ask(old, frame(0, 0, Request::Job(job))), Reply::Job(_)));
}

#[test]
fn every_coordinator_reads_what_was_acknowledged_by_any() {
    let mut net = Net::new(3);
    for round in 0..9 {
        let job = net.submit(1 + round % 3);
        assert!(matches!(net.ask(1 + (round + 1) % 3, frame(0, 0, Request::Job(job))), Reply::Job(_)));
    }
}

#[test]
fn without_a_majority_a_change_is_unknown_and_said_to_be() {
    let mut net = Net::new(3);
    let leader = net.leading();
    net.cut.insert(leader);
    let call = net.send(leader, frame(9, 1, program()));
    net.run(6_000);
    assert_eq!(kind(net.reply(call).unwrap()), Some(RefusalKind::Undecided));
    net.cut.clear();
    net.run_until("one leader", |net| net.leader().is_some());
    let job = net.ask(net.follower(), frame(9, 1, program()));
    assert_eq!(job, Reply::Submitted { job: JobId(1) });
}

#[test]
fn what_was_handed_to_nobody_is_refused_for_certain() {
    let mut net = Net::new(3);
    let lonely = net.follower();
    net.cut.insert(lonely);
    net.run(3_000);
    assert_eq!(net.controls[&lonely].status().leader, None);
    let call = net.send(lonely, frame(9, 1, program()));
    net.run(6_000);
    assert_eq!(kind(net.reply(call).unwrap()), Some(RefusalKind::Unavailable));
    net.cut.clear();
    net.run(6_000);
    assert!(net.state(net.leading()).jobs().is_empty(), "it was said not to be done");
}

#[test]
fn a_change_handed_to_a_leader_that_falls_silent_is_not_said_to_be_undone() {
    let mut net = Net::new(3);
    let (leader, follower) = (net.leading(), net.follower());
    net.cut.insert(leader);
    let call = net.send(follower, frame(9, 1, program()));
    net.exchange();
    net.run_until("another leader", |net| net.leader().is_some_and(|other| other != leader));
    let full = Room::None("the disk has no room".to_owned());
    let others: Vec<u64> = net.controls.keys().copied().filter(|id| *id != leader).collect();
    others.iter().for_each(|id| net.handle(*id, Input::Room(full.clone())));
    net.run(6_000);
    match net.reply(call).unwrap() {
        Reply::Submitted { .. } => {}
        refused => assert_eq!(kind(refused), Some(RefusalKind::Undecided)),
    }
}

#[test]
fn many_changes_of_one_client_are_remembered_until_it_has_their_answers() {
    let mut net = Net::new(3);
    let many = CHANGES_IN_FLIGHT_MAX;
    let change =
        |seq| ClientFrame { answered_below: 1, ..frame(9, seq, Request::StartRun { name: "r".into() }) };
    let first: Vec<Reply> = (1..=many).map(|seq| net.ask(1 + seq % 3, change(seq))).collect();
    assert_eq!(kind(&net.ask(1, change(many + 1))), Some(RefusalKind::Unavailable), "one too many");
    let leader = net.leading();
    net.kill(leader);
    net.run_until("another leader", |net| net.leader().is_some_and(|other| other != leader));
    let at = net.leading();
    for (seq, answer) in (1..).zip(&first) {
        assert_eq!(net.ask(at, change(seq)), *answer, "change {seq}");
    }
    assert_eq!(net.state(at).runs().len(), first.len());
    let next = ClientFrame { answered_below: many + 1, ..change(many + 1) };
    assert!(matches!(net.ask(at, next), Reply::RunStarted(_)));
    assert_eq!(kind(&net.ask(at, change(1))), Some(RefusalKind::Forgotten), "it said that it has the answer");
}

#[test]
fn a_client_learns_where_the_log_is_from_who_knows() {
    let mut net = Net::new(3);
    net.submit(net.leading());
    let at = net.follower();
    let Reply::Position(position) = net.ask(at, frame(0, 0, Request::Position)) else { panic!() };
    assert_eq!(position, net.controls[&net.leading()].status().applied_index);
    net.cut.insert(at);
    let call = net.send(at, frame(0, 0, Request::Position));
    net.run(6_000);
    assert_eq!(kind(net.reply(call).unwrap()), Some(RefusalKind::Unavailable), "what it has may be old");
}

#[test]
fn a_watch_at_a_follower_sends_no_more_than_the_client_takes() {
    let mut net = Net::new(3);
    let (leader, follower) = (net.leading(), net.follower());
    let node = net.admit_node();
    let session = net.welcome(leader, node, vec![]);
    let job = net.submit(leader);
    net.run_until("the gang's start", |net| net.started(session) == [job]);
    let total = 3 * REPLIES_MAX as u64;
    net.say(session, events(job, 1, (1..=total).map(step).collect()));
    let watch = net.send(follower, frame(0, 0, Request::Watch { job, from: 1, follow: true }));
    net.run(2_000);
    assert_eq!(net.replies[&watch].len(), REPLIES_MAX);
    net.run(2_000);
    assert_eq!(net.replies[&watch].len(), REPLIES_MAX, "nothing was taken");
    net.handle(follower, Input::Taken { call: watch, replies: 10 });
    net.settle();
    assert_eq!(net.replies[&watch].len(), REPLIES_MAX + 10);
    for _ in 0..3 {
        net.handle(follower, Input::Taken { call: watch, replies: REPLIES_MAX });
        net.run(100);
    }
    net.say(session, events(job, total + 1, vec![crate::cluster::tests::finished()]));
    net.run_until("the end", |net| net.reply(watch) == Some(&Reply::EndOfEvents));
    let indices: Vec<u64> = net.replies[&watch]
        .iter()
        .filter_map(|reply| match reply {
            Reply::Event { index, .. } => Some(*index),
            _ => None,
        })
        .collect();
    assert_eq!(indices, (1..=total + 1).collect::<Vec<_>>());
    assert_eq!(net.controls[&follower].status().calls, 0);
}

#[test]
fn a_watch_of_what_is_there_ends_and_one_of_nothing_is_refused() {
    let mut net = Net::new(1);
    let job = net.submit(1);
    let watch = |job, follow| frame(0, 0, Request::Watch { job, from: 1, follow });
    assert_eq!(net.ask(1, watch(job, false)), Reply::EndOfEvents);
    assert_eq!(kind(&net.ask(1, watch(JobId(9), true))), Some(RefusalKind::NotFound));
    let lost = net.send(1, watch(job, true));
    net.settle();
    net.handle(1, Input::CallLost(lost));
    assert_eq!(net.controls[&1].status().calls, 0);
}

#[test]
fn a_token_is_guessed_in_vain_and_redeemed_twice_by_the_same_joiner_once() {
    let mut net = Net::new(3);
    let (leader, follower) = (net.leading(), net.follower());
    net.propose(follower, token("t", Role::Worker, 1)).unwrap();
    let Change::RedeemToken(right) = redeem("t", "box") else { unreachable!() };
    let before = net.state(leader).nodes().len();
    let commit = net.controls[&leader].status().commit_index;
    net.redeem(follower, 500, RedeemToken { secret_sha256: [9; 32], ..right.clone() });
    net.run_until("a refusal", |net| net.joined.contains_key(&500));
    assert_eq!(net.joined[&500].as_ref().unwrap_err().kind, RefusalKind::Forbidden);
    assert_eq!(net.controls[&leader].status().commit_index, commit, "a guess is not in the log");
    for (at, call) in [(follower, 501), (leader, 502)] {
        let request = RequestId { client: fleet_common::ids::ClientId(77), seq: 1 };
        net.handle(at, Input::Join { call, redeem: right.clone(), request });
        net.run_until("an admission", |net| net.joined.contains_key(&call));
        let admission = net.joined[&call].as_ref().unwrap();
        assert_eq!(*admission, Admission { member: Member::Worker(NodeId(1)), name: "box".into() });
    }
    assert_eq!(net.state(leader).nodes().len(), before + 1);
}

#[test]
fn a_request_to_join_that_is_sent_again_gives_nothing_to_who_was_cut_off_since() {
    for role in [Role::Worker, Role::Client, Role::Admin, Role::Coordinator] {
        let mut net = Net::new(1);
        // Used up, and not forgotten: the same request would be answered as before.
        net.propose(1, token("t", role, 1)).unwrap();
        let Change::RedeemToken(redeem) = redeem("t", "eve") else { unreachable!() };
        let request = RequestId { client: fleet_common::ids::ClientId(77), seq: 1 };
        let join = |net: &mut Net, call| {
            net.handle(1, Input::Join { call, redeem: redeem.clone(), request });
            net.run_until("an answer", |net| net.joined.contains_key(&call));
            net.joined[&call].clone()
        };
        let member = join(&mut net, 501).unwrap().member;
        assert_eq!(join(&mut net, 502).unwrap().member, member);
        net.propose(1, Change::RevokeMember(RevokeMember { member })).unwrap();
        let refusal = join(&mut net, 503).unwrap_err();
        assert!(refusal.message.contains(&format!("{member} was cut off")), "{}", refusal.message);
    }
}

#[test]
fn who_is_no_client_or_was_revoked_is_refused() {
    let mut net = Net::new(1);
    let user = net.admit(1, Role::Client);
    let newer = ClientFrame { version: PROTOCOL_VERSION + 1, ..frame(0, 0, Request::Nodes) };
    assert_eq!(kind(&net.ask(1, newer)), Some(RefusalKind::Invalid));
    let ask = |net: &mut Net, caller| {
        let call = net.number();
        net.handle(1, Input::Client { call, caller, frame: frame(0, 0, Request::Nodes) });
        net.run_until("a reply", |net| net.reply(call).is_some());
        net.reply(call).unwrap().clone()
    };
    assert!(matches!(ask(&mut net, user), Reply::Nodes(_)));
    for caller in [Member::Worker(NodeId(1)), Member::Coordinator(ReplicaId(1))] {
        assert_eq!(kind(&ask(&mut net, caller)), Some(RefusalKind::Forbidden));
    }
    let revoke = crate::cluster::commands::RevokeMember { member: user };
    net.propose(1, Change::RevokeMember(revoke)).unwrap();
    assert_eq!(kind(&ask(&mut net, user)), Some(RefusalKind::Forbidden));
}

#[test]
fn open_requests_are_bounded_for_one_client_for_one_certificate_and_for_all() {
    let mut net = Net::new(3);
    let leader = net.leading();
    net.cut.insert(leader);
    let refused = |net: &mut Net, client, caller| {
        let call = net.number();
        net.handle(leader, Input::Client { call, caller, frame: frame(client, call, program()) });
        net.settle();
        net.reply(call).is_some()
    };
    for n in 0..CHANGES_IN_FLIGHT_MAX {
        assert!(!refused(&mut net, 1, USER), "{n}");
    }
    assert!(refused(&mut net, 1, USER), "a client's change beyond those");
    for n in CHANGES_IN_FLIGHT_MAX.into()..CALLS_MAX as u128 / 4 {
        assert!(!refused(&mut net, n + 100, USER), "{n}");
    }
    assert!(refused(&mut net, 9_999_999, USER), "too many of one certificate");
    let other = Member::Client(fleet_common::ids::UserId(2));
    assert!(!refused(&mut net, 10_000_000, other));
    net.run(6_000);
    assert_eq!(net.controls[&leader].status().calls, 0, "all were answered");
}

#[test]
fn a_full_disk_of_the_only_voter_stops_changes_and_not_queries() {
    let mut net = Net::new(1);
    let job = net.submit(1);
    net.disks[&1].set_full(true);
    let change = net.send(1, frame(9, 1, program()));
    net.run(1_000);
    assert_eq!(kind(net.reply(change).unwrap()), Some(RefusalKind::Undecided));
    assert!(matches!(net.ask(1, frame(0, 0, Request::Job(job))), Reply::Job(_)));
    assert!(net.controls[&1].status().read_only.is_some());
    net.disks[&1].set_full(false);
    net.run(1_000);
    assert_eq!(net.controls[&1].status().read_only, None);
    assert_eq!(net.ask(1, frame(9, 1, program())), Reply::Submitted { job: JobId(2) });
}

#[test]
fn a_leader_without_room_hands_over_and_the_cluster_goes_on() {
    let mut net = Net::new(3);
    let old = net.leading();
    net.run(1_000);
    net.handle(old, Input::Room(Room::None("the disk has no room".into())));
    net.run_until("another leader", |net| net.leader().is_some_and(|leader| leader != old));
    assert_eq!(net.submit(old), JobId(1), "passed on to who has room");
}

#[test]
fn a_leader_whose_disk_is_full_is_replaced_and_sends_its_clients_away() {
    let mut net = Net::new(3);
    let old = net.leading();
    net.disks[&old].set_full(true);
    let stuck = net.send(old, frame(9, 1, program()));
    net.run_until("another leader", |net| {
        net.controls.iter().any(|(id, control)| *id != old && control.status().leading_since_ms.is_some())
    });
    assert_eq!(kind(net.reply(stuck).unwrap()), Some(RefusalKind::Undecided));
    assert_eq!(kind(&net.ask(old, frame(0, 0, Request::Nodes))), Some(RefusalKind::Unavailable));
    net.disks[&old].set_full(false);
    net.run(3_000);
    let job = net.ask(net.leading(), frame(9, 1, program()));
    assert_eq!(job, Reply::Submitted { job: JobId(1) });
    net.run_until("the old leader follows", |net| net.state(old).jobs().len() == 1);
}

#[test]
fn a_coordinator_that_cannot_write_says_so_to_stale_queries_and_to_the_leader() {
    let mut net = Net::new(3);
    let (leader, stuck) = (net.leading(), net.follower());
    net.disks[&stuck].set_full(true);
    net.submit(leader);
    net.run_until("no room", |net| net.controls[&stuck].status().read_only.is_some());
    let stale = |request| ClientFrame { stale: true, ..frame(0, 0, request) };
    let Reply::Cluster(view) = net.ask(stuck, stale(Request::ClusterStatus)) else { panic!() };
    assert!(view.read_only.unwrap().contains("cannot be written"));
    assert!(matches!(net.ask(stuck, stale(Request::Nodes)), Reply::Nodes(_)));
    assert_eq!(kind(&net.ask(stuck, frame(0, 0, Request::Nodes))), Some(RefusalKind::Unavailable));
    let read_only = |net: &mut Net| {
        let Reply::Coordinators(views) = net.ask(leader, frame(0, 0, Request::Coordinators)) else {
            panic!()
        };
        views
            .iter()
            .filter(|view| view.read_only == Some(true))
            .map(|view| view.address.replica.0)
            .collect::<Vec<u64>>()
    };
    net.run(1_000);
    assert_eq!(read_only(&mut net), Vec::from([stuck]));
    net.disks[&stuck].set_full(false);
    net.run(3_000);
    assert_eq!(read_only(&mut net), Vec::<u64>::new());
}

#[test]
fn a_joiner_is_answered_even_where_nobody_leads() {
    let mut net = Net::new(3);
    let leader = net.leading();
    net.cut.insert(leader);
    net.run(3_000);
    let Change::RedeemToken(redeem) = redeem("t", "box") else { unreachable!() };
    net.redeem(leader, 500, redeem);
    net.run(12_000);
    assert_eq!(net.joined[&500].as_ref().unwrap_err().kind, RefusalKind::Unavailable);
    assert_eq!(net.controls[&leader].status().calls, 0);
}
