use super::*;
use crate::cluster::Answer;
use crate::cluster::commands::{CancelJob, DrainNode};
use crate::cluster::records::Stop;
use crate::cluster::tests::{Script, describe, job, program, redeem, token, training};
use fleet_common::events::{Culprit, EventBody, Stall};
use fleet_common::protocol::{Program, Role, Value, Variable, Wish, Work};
use proptest::prelude::*;

const UNIX_MS: u64 = 1_000;

fn all_connected(script: &Script) -> Observed {
    let seen = Seen { connected: true, heard_ms: 0 };
    let nodes = script.state.nodes().keys();
    Observed {
        nodes: nodes.clone().map(|id| (*id, seen)).collect(),
        counted_from_ms: nodes.map(|id| (*id, 0)).collect(),
        ..Observed::default()
    }
}

fn wish() -> Wish {
    Wish { queue: true, ..Wish::default() }
}

fn submit(script: &mut Script, ranks: u32, wish: Wish) -> JobId {
    script.submit_as(job(program(), ranks, wish))
}

/// With this much time, in seconds.
fn limited(max_time_s: u64) -> Wish {
    Wish { max_time_s: Some(max_time_s), ..wish() }
}

/// Plans and carries it out. What started, as job and parts.
fn settle(script: &mut Script, observed: &Observed) -> Vec<(u64, Vec<(u64, u32)>)> {
    let mut placed = Vec::new();
    let now = script.now;
    for (change, _) in plan(&script.state, observed, 0, now) {
        if let Change::AssignGang(assign) = &change {
            placed.push((assign.job.0, assign.parts.iter().map(|(node, ranks)| (node.0, *ranks)).collect()));
        }
        assert_eq!(script.run(change), Answer::Done);
    }
    assert_eq!(plan(&script.state, observed, 0, now), [], "a second look finds nothing to do");
    placed
}

fn told(script: &Script, job: JobId) -> String {
    explain(&script.state, &all_connected(script), script.now, job)
}

#[test]
fn jobs_go_to_the_tightest_node_that_fits() {
    let mut script = Script::with_nodes(&[8, 4, 2]);
    for ranks in [3, 2, 8] {
        script.submit(ranks);
    }
    let observed = all_connected(&script);
    assert_eq!(settle(&mut script, &observed), [(1, vec![(2, 3)]), (2, vec![(3, 2)]), (3, vec![(1, 8)])]);
}

#[test]
fn a_job_whose_secrets_are_not_kept_waits_and_delays_nobody() {
    let mut script = Script::with_nodes(&[4]);
    let env = vec![Variable { name: "KEY".into(), value: Value::Removed }];
    let work = Work::Program(Program { argv: vec!["true".into()], working_dir: "/".into(), env });
    let first = script.submit_as(job(work, 4, Wish { priority: 9, ..wish() }));
    let second = script.submit(4);
    let observed = all_connected(&script);
    assert_eq!(settle(&mut script, &observed), [(second.0, vec![(1, 4)])]);
    let why = told(&script, first);
    assert!(why.contains("waits for secrets that are not kept any more (KEY)"), "{why}");
}

#[test]
fn a_gang_that_no_node_holds_goes_to_few() {
    let mut script = Script::with_nodes(&[2, 4, 2]);
    script.submit(6);
    let observed = all_connected(&script);
    let decisions = plan(&script.state, &observed, 0, UNIX_MS);
    assert_eq!(
        decisions[0].1,
        "job-1 starts with 6 ranks on nodes n2 and n1: the tightest place with room for all of them"
    );
    assert_eq!(settle(&mut script, &observed), [(1, vec![(2, 4), (1, 2)])]);
}

#[test]
fn priority_comes_before_age() {
    let mut script = Script::with_nodes(&[4]);
    submit(&mut script, 4, wish());
    submit(&mut script, 4, Wish { priority: 1, ..wish() });
    let observed = all_connected(&script);
    assert_eq!(settle(&mut script, &observed), [(2, vec![(1, 4)])]);
    assert_eq!(told(&script, JobId(1)), "waits for free slots: it needs 4, and one node has 0 free");
    let third = submit(&mut script, 1, Wish { priority: -5, ..wish() });
    assert_eq!(told(&script, third), "waits for free slots: it needs 1, and one node has 0 free");
}

#[test]
fn a_waiting_job_is_not_overtaken_and_every_wait_has_a_reason() {
    let mut script = Script::with_nodes(&[4]);
    let one_node = |priority| Wish { nodes: Some(1), priority, ..wish() };
    let jobs: Vec<JobId> = [3, 2, 1].map(|ranks| submit(&mut script, ranks, one_node(0))).into();
    let observed = all_connected(&script);
    assert_eq!(settle(&mut script, &observed), [(1, vec![(1, 3)])]);
    assert_eq!(told(&script, jobs[1]), "waits for free slots: it needs 2 on one node, and n1 has 1 free");
    assert_eq!(told(&script, jobs[2]), "waits behind job-2, which was submitted earlier");
    let hasty = submit(&mut script, 1, one_node(-1));
    assert_eq!(told(&script, hasty), "waits behind job-2, which has a higher priority");
}

#[test]
fn a_job_goes_ahead_only_if_it_is_over_before_the_first_in_line_can_start() {
    let mut script = Script::with_nodes(&[4]);
    submit(&mut script, 3, limited(1_000));
    let observed = all_connected(&script);
    settle(&mut script, &observed);
    let first = submit(&mut script, 4, wish());
    let long = submit(&mut script, 1, limited(1_001));
    let endless = submit(&mut script, 1, wish());
    assert_eq!(settle(&mut script, &observed), []);
    assert_eq!(
        told(&script, first),
        "waits for free slots: it needs 4, and one node has 1 free; starts within 18 min"
    );
    for behind in [long, endless] {
        assert!(told(&script, behind).starts_with("waits behind job-2, which was submitted earlier"));
    }
    // Nothing proves when those could start, so nobody goes ahead of them either.
    submit(&mut script, 1, limited(1_000));
    assert_eq!(settle(&mut script, &observed), []);
    for job in [long, endless] {
        script.run(Change::CancelJob(CancelJob { job, stop: Stop::Now }));
    }
    let decisions = plan(&script.state, &observed, 0, script.now);
    assert!(decisions[0].1.ends_with("it goes ahead of job-2, which it cannot delay"), "{decisions:?}");
    assert_eq!(settle(&mut script, &observed), [(5, vec![(1, 1)])]);
}

#[test]
fn what_runs_without_a_limit_or_over_it_proves_nothing() {
    for running in [wish(), limited(10)] {
        let mut script = Script::with_nodes(&[4]);
        submit(&mut script, 3, running);
        let observed = all_connected(&script);
        settle(&mut script, &observed);
        script.now += 10_000 + OVERRUN_MS;
        submit(&mut script, 4, wish());
        submit(&mut script, 1, limited(1));
        assert_eq!(settle(&mut script, &observed), []);
    }
}

#[test]
fn slots_that_the_first_in_line_cannot_use_are_free_for_others() {
    let mut script = Script::with_nodes(&[4, 2]);
    script.run(describe(NodeId(1), "gpu", 4, &[("gpu", "h200")]));
    let observed = all_connected(&script);
    let labels: std::collections::BTreeMap<_, _> = [("gpu".to_owned(), "h200".to_owned())].into();
    submit(&mut script, 3, Wish { labels: labels.clone(), ..wish() });
    settle(&mut script, &observed);
    let second = submit(&mut script, 3, Wish { labels, ..wish() });
    submit(&mut script, 2, wish());
    submit(&mut script, 1, wish());
    assert_eq!(settle(&mut script, &observed), [(3, vec![(2, 2)])]);
    assert!(told(&script, second).contains("it needs 3 with gpu=h200, and one node has 1 free"));
}

#[test]
fn a_job_too_large_for_all_nodes_blocks_nobody() {
    let mut script = Script::with_nodes(&[2, 2]);
    let large = script.submit(16);
    script.submit(2);
    let observed = all_connected(&script);
    assert_eq!(settle(&mut script, &observed), [(2, vec![(1, 2)])]);
    assert_eq!(
        told(&script, large),
        "waits for more nodes to join: it needs 16, and 2 nodes together have 4"
    );
}

#[test]
fn a_node_out_of_touch_gets_no_work() {
    let mut script = Script::with_nodes(&[4]);
    let job = script.submit(1);
    let observed = Observed::default();
    assert!(plan(&script.state, &observed, LEASE_MS - 1, UNIX_MS).is_empty());
    assert!(explain(&script.state, &observed, UNIX_MS, job).contains("none that takes work is connected"));
}

#[test]
fn a_job_that_no_node_can_take_is_told_which_ones_could_and_what_to_do() {
    let mut script = Script::with_nodes(&[4, 4]);
    let job = script.submit(1);
    let none = "waits for a node: none that takes work is connected";
    script.run(Change::DrainNode(DrainNode { node: NodeId(1), now: false }));
    script.run(Change::DrainNode(DrainNode { node: NodeId(2), now: false }));
    assert_eq!(
        told(&script, job),
        format!("{none}; nodes n1 and n2 are drained (`fleet undrain` takes them back)")
    );
    script.lose_node();
    assert_eq!(
        told(&script, job),
        format!(
            "{none}; node n2 is drained (`fleet undrain` takes it back); node n1 is lost (see that its worker runs)"
        )
    );
    let away = explain(&Script::with_nodes(&[4]).state, &Observed::default(), 0, job);
    assert_eq!(away, "", "not a job of that cluster");
    let mut script = Script::new();
    let job = script.submit(1);
    assert_eq!(told(&script, job), format!("{none}; start one with `worker join`"));
}

#[test]
fn a_rank_of_several_slots_needs_them_on_one_node_and_the_reason_counts_so() {
    let mut script = Script::with_nodes(&[3, 3]);
    let wish = || Wish { slots_per_rank: 2, ..wish() };
    let job = submit(&mut script, 3, wish());
    assert_eq!(
        told(&script, job),
        "waits for more nodes to join: it needs 3 places of 2 slots each, and 2 nodes together have 2"
    );
    let one = submit(&mut script, 2, Wish { nodes: Some(1), ..wish() });
    assert!(told(&script, one).ends_with("it needs 2 places of 2 slots each on one node, and n2 has 1"));
}

#[test]
fn a_clock_that_jumps_by_hours_loses_nobody_and_starts_nothing_early() {
    let mut script = Script::with_nodes(&[4]);
    script.now = 100 * 3_600_000;
    let running = submit(&mut script, 3, limited(3_600));
    let observed = all_connected(&script);
    settle(&mut script, &observed);
    let first = submit(&mut script, 4, wish());
    submit(&mut script, 1, limited(7_200));
    let hours_off = [script.now - 6 * 3_600_000, script.now + 6 * 3_600_000];
    for unix_ms in hours_off {
        assert_eq!(plan(&script.state, &observed, 0, unix_ms), [], "nobody goes ahead of {first}");
    }
    assert_eq!(script.state.jobs()[&running].placement.as_ref().map(|at| at.generation), Some(1));
}

#[test]
fn a_drained_node_gets_no_work_and_a_job_on_it_says_so() {
    let mut script = Script::with_nodes(&[4, 1]);
    let running = script.submit(3);
    let observed = all_connected(&script);
    settle(&mut script, &observed);
    script.run(Change::DrainNode(DrainNode { node: NodeId(1), now: true }));
    assert!(told(&script, running).starts_with("goes back to the queue, since a node is drained"));
    let job = submit(&mut script, 2, wish());
    assert_eq!(settle(&mut script, &observed), []);
    assert!(
        told(&script, job)
            .ends_with("it needs 2, and one node has 1; node n1 is drained (`fleet undrain` takes it back)"),
        "{}",
        told(&script, job)
    );
}

#[test]
fn silence_counts_from_when_a_node_was_heard_or_could_have_been() {
    let script = Script::with_nodes(&[4]);
    let mut observed = Observed::default();
    let lost = |observed: &Observed, now| {
        let decisions = plan(&script.state, observed, now, UNIX_MS);
        matches!(&decisions[..], [(Change::MarkNodeLost(_), _)])
    };
    assert!(!lost(&observed, 1_000_000), "nobody counts on it");
    observed.counted_from_ms.insert(NodeId(1), 5_000);
    assert!(!lost(&observed, 5_000 + LEASE_MS - 1));
    assert!(lost(&observed, 5_000 + LEASE_MS));
    observed.nodes.insert(NodeId(1), Seen { connected: false, heard_ms: 4_000 });
    assert!(!lost(&observed, 5_000 + LEASE_MS - 1), "heard before it counted");
    observed.nodes.insert(NodeId(1), Seen { connected: false, heard_ms: 9_000 });
    assert!(!lost(&observed, 9_000 + LEASE_MS - 1));
    assert!(lost(&observed, 9_000 + LEASE_MS));
}

// ---- properties -------------------------------------------------------------------------------------------------------

#[derive(Clone, Debug)]
struct Scene {
    nodes: Vec<(u32, bool, u8)>,
    /// Submitted and placed, some of them ended, before the queue comes.
    running: Vec<(u32, Wish)>,
    ended: Vec<prop::sample::Index>,
    queue: Vec<(u32, Wish)>,
    later_ms: u64,
}

fn any_wish() -> impl Strategy<Value = Wish> {
    (-1..2i32, prop::option::of(1..3u32), 1..3u32, prop::bool::weighted(0.3), prop::option::of(1..400u64))
        .prop_map(|(priority, nodes, slots_per_rank, labelled, max_time_s)| {
            let labels = labelled.then(|| ("gpu".to_owned(), "h200".to_owned())).into_iter().collect();
            Wish { priority, nodes, slots_per_rank, labels, max_time_s, queue: true }
        })
}

fn any_scene() -> impl Strategy<Value = Scene> {
    let job = || (1..7u32, any_wish());
    (
        prop::collection::vec((1..7u32, any::<bool>(), 0..10u8), 1..6),
        prop::collection::vec(job(), 0..8),
        prop::collection::vec(any::<prop::sample::Index>(), 0..3),
        prop::collection::vec(job(), 0..8),
        0..300_000u64,
    )
        .prop_map(|(nodes, running, ended, queue, later_ms)| Scene {
            nodes,
            running,
            ended,
            queue,
            later_ms,
        })
}

/// One node in ten is drained, one out of touch.
fn set(scene: &Scene) -> (Script, Observed) {
    let mut script = Script::new();
    script.run(token("w", Role::Worker, 99));
    let mut observed = Observed::default();
    for (at, (slots, labelled, luck)) in scene.nodes.iter().enumerate() {
        let node = NodeId(at as u64 + 1);
        script.run(redeem("w", ""));
        script.run(describe(node, "n", *slots, if *labelled { &[("gpu", "h200")] } else { &[] }));
        if *luck == 0 {
            script.run(Change::DrainNode(DrainNode { node, now: false }));
        }
        observed.nodes.insert(node, Seen { connected: *luck != 1, heard_ms: 0 });
    }
    let submit = |script: &mut Script, jobs: &[(u32, Wish)]| {
        for (ranks, wish) in jobs {
            let even = wish.nodes.is_none_or(|nodes| ranks.is_multiple_of(nodes));
            let wish = if even { wish.clone() } else { Wish { nodes: None, ..wish.clone() } };
            script.submit_as(job(program(), *ranks, wish));
        }
    };
    submit(&mut script, &scene.running);
    settle(&mut script, &observed);
    for index in &scene.ended {
        if !scene.running.is_empty() {
            let job = JobId(index.index(scene.running.len()) as u64 + 1);
            let parts = script.state.jobs()[&job].placement.clone().map(|at| at.parts).unwrap_or_default();
            script.run(Change::CancelJob(CancelJob { job, stop: Stop::Now }));
            for part in parts {
                script.tell(job, part.node.0, part.next_seq, vec![crate::cluster::tests::stopped(0)]);
            }
        }
    }
    script.now += scene.later_ms;
    submit(&mut script, &scene.queue);
    (script, observed)
}

fn start_of(outlook: &Outlook, job: JobId) -> Option<u64> {
    match outlook.placing(job)? {
        Placing::On { .. } => Some(0),
        Placing::Full { start_ms } | Placing::Behind { start_ms, .. } => *start_ms,
        Placing::Incomplete | Placing::NoNode | Placing::TooLarge => None,
    }
}

fn waits_for_room(outlook: &Outlook, job: JobId) -> bool {
    matches!(outlook.placing(job), Some(Placing::Full { .. } | Placing::Behind { .. }))
}

proptest! {
    #[test]
    fn a_plan_is_deterministic_can_be_carried_out_and_leaves_nothing_to_do(scene in any_scene()) {
        let (mut script, observed) = set(&scene);
        let once = plan(&script.state, &observed, 0, script.now);
        prop_assert_eq!(&once, &plan(&script.state, &observed, 0, script.now));
        for (_, parts) in settle(&mut script, &observed) {
            for (node, _) in parts {
                let node = NodeId(node);
                prop_assert!(observed.connected(node) && !script.state.nodes()[&node].drained);
            }
        }
        for (node, used) in script.state.slots_in_use() {
            prop_assert!(used <= script.state.nodes()[&node].slots, "slots of {} are promised twice", node);
        }
    }

    #[test]
    fn going_ahead_never_delays_the_first_in_line(scene in any_scene()) {
        let (mut script, observed) = set(&scene);
        // The first in line as it would wait if nobody else were there.
        let before = script.state.clone();
        let queue: Vec<JobId> = before.queued_jobs().iter().map(|(id, _)| *id).collect();
        settle(&mut script, &observed);
        let after = Outlook::new(&script.state, &observed, script.now);
        let Some(at) = queue.iter().position(|job| waits_for_room(&after, *job)) else { return Ok(()) };
        // Without those behind it, and with those before it placed as they were.
        let mut alone = Script { state: before, ..Script::new() };
        alone.now = script.now;
        for job in &queue[at + 1..] {
            alone.run(Change::CancelJob(CancelJob { job: *job, stop: Stop::Now }));
        }
        for job in &queue[..at] {
            if let Some(placed) = &script.state.jobs()[job].placement {
                let parts: Vec<_> = placed.parts.iter().map(|part| (part.node.0, part.ranks)).collect();
                alone.place(*job, &parts);
            }
        }
        let first = queue[at];
        let undisturbed = start_of(&Outlook::new(&alone.state, &observed, alone.now), first);
        let disturbed = start_of(&after, first);
        match (undisturbed, disturbed) {
            (Some(undisturbed), Some(disturbed)) => prop_assert!(disturbed <= undisturbed, "{} > {}", disturbed, undisturbed),
            (Some(undisturbed), None) => prop_assert!(false, "its start at {} is not proven any more", undisturbed),
            // Nothing proved its start: nobody may have taken what it could use.
            (None, _) => {
                let wish = &script.state.jobs()[&first].wish;
                for job in &queue[at + 1..] {
                    let parts = script.state.jobs()[job].placement.iter().flat_map(|placed| &placed.parts);
                    for part in parts {
                        let node = &script.state.nodes()[&part.node];
                        let each = wish.nodes.map_or(1, |nodes| script.state.jobs()[&first].world_size / nodes);
                        prop_assert!(!node.suits(wish) || node.slots < each * wish.slots_per_rank, "{} took its slots", job);
                    }
                }
            }
        }
    }

    #[test]
    fn every_wait_is_explained(scene in any_scene()) {
        let (mut script, observed) = set(&scene);
        settle(&mut script, &observed);
        let outlook = Outlook::new(&script.state, &observed, script.now);
        for (id, _) in script.state.queued_jobs() {
            let sentence = outlook.explain(&script.state, &observed, id);
            prop_assert!(sentence.starts_with("waits "), "{}: {}", id, sentence);
        }
    }
}

#[test]
fn a_part_that_has_not_reported_is_given_up_when_its_time_is_over_and_only_once() {
    let mut script = Script::with_nodes(&[1, 1]);
    let nodes = Wish { nodes: Some(2), ..Wish::default() };
    let gang = script.submit_as(job(training(), 2, nodes));
    script.place(gang, &[(1, 1), (2, 1)]);
    let mut observed = all_connected(&script);
    let silent: Vec<_> = script.state.unreported().collect();
    observed.unreported_ms =
        silent.into_iter().filter(|(_, node)| *node == NodeId(2)).map(|part| (part, 5)).collect();
    assert!(plan(&script.state, &observed, 4 + REPORT_MS, UNIX_MS).is_empty());
    let late = plan(&script.state, &observed, 5 + REPORT_MS, UNIX_MS);
    assert!(matches!(&late[..], [(Change::BreakOff(off), _)] if off.node == NodeId(2)), "{late:?}");
    late.into_iter().for_each(|(change, why)| drop(script.decide(&why, change)));
    assert!(plan(&script.state, &observed, 5 + REPORT_MS, UNIX_MS).is_empty());
    let told = explain(&script.state, &observed, UNIX_MS, gang);
    assert!(told.contains("n2 has not said within 60 s"), "{told}");
}

#[test]
fn a_gang_that_shall_stop_and_stands_still_has_ten_seconds() {
    let mut script = Script::with_nodes(&[2]);
    let gang = script.submit_as(job(training(), 2, Wish::default()));
    script.place(gang, &[(1, 2)]);
    let what = "rank 1 has not come".to_owned();
    let stall = Stall { since_unix_ms: 1, what, culprit: Culprit::Stopped };
    let started = EventBody::Started { step: 0, parameters: 1, device: "cpu".into() };
    script.tell(gang, 1, 1, vec![started, EventBody::Stall(Some(stall))]);
    assert_eq!(script.state.stuck_stops().count(), 0, "nobody has asked it to stop");
    script.run(Change::CancelJob(CancelJob { job: gang, stop: Stop::AfterCheckpoint }));
    let mut observed = all_connected(&script);
    observed.stuck_ms = script.state.stuck_stops().map(|gang| (gang, 5)).collect();
    assert!(plan(&script.state, &observed, 4 + STUCK_MS, UNIX_MS).is_empty());
    let forced = plan(&script.state, &observed, 5 + STUCK_MS, UNIX_MS);
    assert!(matches!(&forced[..], [(Change::ForceStop(force), _)] if force.job == gang), "{forced:?}");
    forced.into_iter().for_each(|(change, why)| drop(script.decide(&why, change)));
    assert!(plan(&script.state, &observed, 5 + STUCK_MS, UNIX_MS).is_empty());
    let told = explain(&script.state, &observed, UNIX_MS, gang);
    assert!(told.contains("it is ended without a checkpoint"), "{told}");
}
