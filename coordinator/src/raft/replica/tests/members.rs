//! Replicas that join and leave, and leadership that moves.

use super::*;

/// Proposes a change of members with a command that leaves a trace, and lets it happen.
fn change_members(cluster: &mut Cluster, ticket: Ticket, change: Membership) -> Result<(), Declined> {
    let leader = cluster.leader().unwrap();
    let command =
        Command { unix_ms: 1, request: None, by: None, why: None, change: token(&ticket.to_string()) };
    cluster.at(leader).propose_membership(ticket, change, &command)?;
    cluster.run_until(|cluster| cluster.answers.contains_key(&ticket));
    Ok(())
}

#[test]
fn a_replica_joins_votes_and_is_taken_out_and_the_command_travels_with_the_change() {
    let (mut cluster, leader) = Cluster::led();
    cluster.propose(leader, 1);
    cluster.replicas.insert(4, joining(4));
    for _ in 0..50 {
        cluster.at(4).tick();
        cluster.settle();
    }
    assert!(!cluster.at(4).was_removed() && cluster.at(4).leader().is_none());
    change_members(&mut cluster, 100, Membership::AddLearner(4)).unwrap();
    cluster.run_until(|cluster| cluster.agree(leader, 4));
    assert!(!cluster.at(4).is_voter() && cluster.at(4).state().tokens().contains_key("100"));
    assert!(matches!(change_members(&mut cluster, 101, Membership::AddLearner(4)), Err(Declined::Misfit(_))));
    change_members(&mut cluster, 102, Membership::Promote(4)).unwrap();
    cluster.run_until(|cluster| cluster.replicas[&4].is_voter());
    let own = change_members(&mut cluster, 103, Membership::Remove(leader));
    assert!(matches!(own, Err(Declined::Misfit(_))));
    let out = leader % 3 + 1;
    change_members(&mut cluster, 104, Membership::Remove(out)).unwrap();
    cluster.run_until(|cluster| cluster.replicas[&leader].conf().voters.len() == 3);
    assert!(!cluster.at(leader).conf().voters.contains(&out));
    let restarted = restart(cluster.at(leader), 9);
    assert_eq!(restarted.conf(), cluster.at(leader).conf());
    assert_eq!(restarted.state(), cluster.at(leader).state());
}

#[test]
fn a_leader_whose_removal_its_predecessor_proposed_steps_down() {
    let (mut cluster, first) = Cluster::led();
    let (out, stays) = (first % 3 + 1, (first + 1) % 3 + 1);
    let command_with_it = Command { unix_ms: 1, request: None, by: None, why: None, change: token("x") };
    cluster.at(first).propose_membership(1, Membership::Remove(out), &command_with_it).unwrap();
    // Only the one that is to leave gets it before the leader is cut off: it alone can lead now, and writes all the time.
    let mut sent = Vec::new();
    cluster.at(first).process(&mut |message| sent.push(message)).unwrap();
    for message in sent.into_iter().filter(|message| message.to == out) {
        cluster.at(out).step(message).unwrap();
    }
    for seq in 2..2_000 {
        if cluster.at(out).was_removed() {
            break;
        }
        let _ = cluster.at(out).propose(seq, &command(seq));
        let mut sent = Vec::new();
        for id in [out, stays] {
            cluster.at(id).tick();
            cluster.at(id).process(&mut |message| sent.push(message)).unwrap();
        }
        for message in sent.into_iter().filter(|message| message.to != first) {
            cluster.at(message.to).step(message).unwrap();
        }
    }
    assert!(cluster.at(out).was_removed() && cluster.at(out).leader().is_none());
    cluster.replicas.remove(&out);
    cluster.run_until(|cluster| cluster.replicas.values().all(|replica| replica.conf().voters.len() == 2));
    cluster.run_until(|cluster| cluster.agree(first, stays));
}

#[test]
fn one_change_of_members_at_a_time() {
    let (mut cluster, leader) = Cluster::led();
    let command = Command { unix_ms: 1, request: None, by: None, why: None, change: token("x") };
    cluster.at(leader).propose_membership(1, Membership::AddLearner(4), &command).unwrap();
    let second = cluster.at(leader).propose_membership(2, Membership::AddLearner(5), &command);
    assert_eq!(second, Err(Declined::Pending));
}

#[test]
fn members_do_not_change_when_the_command_is_rejected() {
    let (mut cluster, leader) = Cluster::led();
    let change = submit(0);
    let command = Command { unix_ms: 1, request: None, by: None, why: None, change };
    cluster.at(leader).propose_membership(1, Membership::AddLearner(4), &command).unwrap();
    cluster.settle();
    assert!(matches!(cluster.answers[&1], Answer::Rejected(_)));
    assert!(cluster.replicas.values().all(|replica| replica.conf().learners.is_empty()));
    change_members(&mut cluster, 2, Membership::AddLearner(4)).unwrap();
}

#[test]
fn leadership_moves_on_request() {
    let (mut cluster, leader) = Cluster::led();
    let to = leader % 3 + 1;
    cluster.at(leader).transfer_leadership(to);
    assert_eq!(cluster.at(leader).propose(1, &command(1)), Err(Declined::NotLeader));
    cluster.settle();
    cluster.run_until(|cluster| cluster.leader() == Some(to));
}

#[test]
fn a_newcomer_survives_messages_that_only_make_sense_to_others() {
    for message in [
        append(5, 0, &[]),
        append(5, 0, &[6]),
        append(u64::MAX, 5, &[0]),
        append(0, 0, &[1, 2]),
        Message { entries: vec![Entry { index: 1, ..Entry::default() }], commit: 1, ..append(0, 0, &[]) },
        Message { priority: -1, ..message(MessageType::MsgRequestPreVote) },
        message(MessageType::MsgTimeoutNow),
        message(MessageType::MsgRequestVote),
    ] {
        let mut new = joining(1);
        let _ = new.step(message);
        new.process(&mut |_| {}).unwrap();
    }
}
