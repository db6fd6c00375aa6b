//! A scrape, small and large.

use super::net::*;
use crate::cluster::Command;
use crate::cluster::commands::{AssignGang, Change, RecordEvents};
use crate::cluster::members::ReplicaRecord;
use crate::cluster::members::Standing;
use crate::cluster::tests::{address, checkpoint, describe, job, redeem, step, token, training};
use crate::control::*;
use crate::raft::memory::MemoryDisk;
use fleet_common::events::{Event, EventBatch, EventBody, Times};
use fleet_common::metrics::Format;
use fleet_common::protocol::{Role, Wish};
use std::time::{Duration, Instant};

/// Nodes and unfinished jobs of a large cluster.
const NODES: u64 = 10_000;
const JOBS: u64 = 1_000;

fn value(text: &str, sample: &str) -> Option<f64> {
    let line = text.lines().find_map(|line| line.strip_prefix(sample)?.strip_prefix(' '));
    line.map(|value| value.parse().unwrap())
}

#[test]
fn only_who_leads_tells_what_only_it_sees_and_a_scrape_needs_no_leader() {
    let mut net = Net::new(3);
    let leader = net.leading();
    let node = net.admit_node();
    net.welcome(leader, node, vec![]);
    net.run(2_000);
    let scrape = |net: &Net, at: u64| net.controls[&at].measure(net.now).write(Format::Text);
    let of_nodes = format!("fleet_node_up{{node=\"{node}\",name=\"{}\"}}", net.state(leader).node_name(node));
    for at in 1..=3 {
        let text = scrape(&net, at);
        let only_leader = |sample: &str, wanted: f64| {
            assert_eq!(value(&text, sample), (at == leader).then_some(wanted), "{sample} at {at}: {text}");
        };
        only_leader("fleet_raft_members_reachable", 3.0);
        only_leader("fleet_nodes_connected", 1.0);
        only_leader("fleet_slots", 8.0);
        only_leader(&of_nodes, 1.0);
        assert_eq!(value(&text, "fleet_raft_is_leader"), Some(f64::from(at == leader)));
        assert_eq!(value(&text, "fleet_raft_members{role=\"voter\"}"), Some(3.0));
        assert_eq!(value(&text, "fleet_nodes"), Some(1.0));
        assert_eq!(net.controls[&at].status().http.len(), 3, "each knows where all are scraped");
    }
    let follower = (1..=3).find(|at| *at != leader).unwrap();
    for dead in (1..=3).filter(|at| *at != follower) {
        net.kill(dead);
    }
    net.run(5_000);
    let text = scrape(&net, follower);
    assert_eq!(value(&text, "fleet_raft_has_leader"), Some(0.0));
    assert_eq!(value(&text, "fleet_nodes"), Some(1.0));
}

#[test]
fn a_scrape_of_ten_thousand_nodes_and_a_thousand_jobs_is_quick_and_small() {
    let record = ReplicaRecord {
        address: address(1),
        name: "c1".into(),
        version: "0".into(),
        level: 1,
        joined_unix_ms: 0,
        standing: Standing::Voter,
    };
    let mut state = State::founded("test".into(), [(ReplicaId(1), record)].into());
    let mut log: Vec<Change> = vec![token("w", Role::Worker, u32::MAX)];
    for node in 1..=NODES {
        let name = format!("a-machine-with-a-name-as-they-are.rack-{node}.example");
        log.extend([redeem("w", &name), describe(NodeId(node), &name, 8, &[])]);
    }
    for number in 1..=JOBS {
        let (job_id, generation) = (JobId(number), 1);
        let times = Times { data_s: 0.012_345_678_9, forward_s: 0.123_456_789, ..Times::default() };
        let bodies = vec![step(1_234_567), EventBody::Times(times), checkpoint(1_234_567)];
        let events = bodies.into_iter().map(|body| Event { unix_ms: 5, body }).collect();
        let batch = EventBatch { job: job_id, generation, first_seq: 1, events };
        log.extend([
            job(training(), 8, Wish { queue: true, ..Wish::default() }),
            Change::AssignGang(AssignGang { job: job_id, generation, parts: vec![(NodeId(number), 8)] }),
            Change::RecordEvents(RecordEvents { node: NodeId(number), batch }),
        ]);
    }
    // Half before this replica began, half as it follows the log.
    let disk = std::sync::Arc::new(MemoryDisk::default());
    let later = log.split_off(2 * NODES as usize + 1);
    for (index, change) in log.into_iter().enumerate() {
        state.apply(index as u64 + 1, Command { unix_ms: 7, request: None, by: None, why: None, change });
    }
    let mut replica = Replica::create(disk.clone(), 1, &[1], state, 1).unwrap();
    replica.process(&mut |_| {}).unwrap();
    for change in later {
        let command = Command { unix_ms: 1_700_000_000_123, request: None, by: None, why: None, change };
        replica.propose(1, &command).unwrap();
        replica.process(&mut |_| {}).unwrap();
    }
    let now = Now { mono_ms: 1, unix_ms: 1_700_000_000_456 };
    let myself = Myself {
        address: address(1),
        name: "c1".into(),
        version: "0".into(),
        http: String::new(),
        seeds: Vec::new(),
    };
    let mut control = Control::new(replica, History::new(disk), myself, 1, now);
    for _ in 0..100 {
        control.handle(now, Input::Tick);
        control.process(now, &mut |_, _| {}).unwrap();
    }
    for format in [Format::Text, Format::OpenMetrics] {
        let took = |_| {
            let begun = Instant::now();
            let text = control.measure(now).write(format);
            (begun.elapsed(), text)
        };
        let (took, text) = (0..5).map(took).min_by_key(|(took, _)| *took).unwrap();
        println!("{format:?}: {} bytes in {took:?}", text.len());
        assert_eq!(text.lines().filter(|line| line.starts_with("fleet_node_up{")).count() as u64, NODES);
        for of_jobs in
            ["fleet_job_loss{", "fleet_job_learning_rate{", "fleet_job_last_checkpoint_timestamp_seconds{"]
        {
            assert_eq!(
                text.lines().filter(|line| line.starts_with(of_jobs)).count() as u64,
                JOBS,
                "{of_jobs}"
            );
        }
        assert!(text.len() < 5 << 20, "{} bytes", text.len());
        assert!(took < Duration::from_millis(200), "{took:?}");
    }
}
