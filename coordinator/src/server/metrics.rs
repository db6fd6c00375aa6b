//! Numbers for Prometheus. Gauges are set when they are asked for; only counts and times are kept.

use crate::control::Status;
use fleet_common::protocol::{ClusterView, NodeView};
use prometheus::{Encoder, Histogram, HistogramOpts, IntCounterVec, IntGauge, Opts, Registry, TextEncoder};
use std::time::Duration;

/// Of what only a leader sees: the agents of all coordinators. Elsewhere they are left out.
const OF_THE_LEADER: [&str; 2] = ["fleet_nodes_connected", "fleet_slots"];

pub struct Metrics {
    registry: Registry,
    commit_seconds: Histogram,
    requests: IntCounterVec,
    gauges: Gauges,
}

struct Gauges {
    term: IntGauge,
    commit_index: IntGauge,
    applied_index: IntGauge,
    is_leader: IntGauge,
    read_only: IntGauge,
    history_damaged: IntGauge,
    history_mended: IntGauge,
    contradictions: IntGauge,
    agents: IntGauge,
    nodes: IntGauge,
    nodes_connected: IntGauge,
    slots: IntGauge,
    slots_used: IntGauge,
    jobs_running: IntGauge,
    jobs_queued: IntGauge,
}

impl Metrics {
    pub fn new() -> prometheus::Result<Self> {
        let registry = Registry::new();
        let gauge = |name: &str, help: &str| {
            let gauge = IntGauge::new(name, help)?;
            registry.register(Box::new(gauge.clone()))?;
            prometheus::Result::Ok(gauge)
        };
        let gauges = Gauges {
            term: gauge("fleet_raft_term", "Term of the raft log")?,
            commit_index: gauge("fleet_raft_commit_index", "Last committed entry")?,
            applied_index: gauge("fleet_raft_applied_index", "Last applied entry")?,
            is_leader: gauge("fleet_raft_is_leader", "1 while this replica leads")?,
            read_only: gauge(
                "fleet_read_only",
                "1 while writes are refused: the disk is full, or cannot be written",
            )?,
            history_damaged: gauge(
                "fleet_history_damaged",
                "Tables of the history with rows that cannot be read here and are not mended yet",
            )?,
            history_mended: gauge(
                "fleet_history_mended_rows",
                "Rows that came from other coordinators since the start because they could not be read here",
            )?,
            contradictions: gauge(
                "fleet_raft_contradictions",
                "Messages of other coordinators since the start that contradict what was acknowledged: some disk was put back",
            )?,
            agents: gauge("fleet_agents", "Agents that this coordinator holds")?,
            nodes: gauge("fleet_nodes", "Registered nodes")?,
            nodes_connected: gauge(
                "fleet_nodes_connected",
                "Nodes that are connected; only where the leader is",
            )?,
            slots: gauge("fleet_slots", "Slots of the connected nodes; only where the leader is")?,
            slots_used: gauge("fleet_slots_used", "Slots that jobs hold")?,
            jobs_running: gauge("fleet_jobs_running", "Jobs that have a place")?,
            jobs_queued: gauge("fleet_jobs_queued", "Jobs that wait for a place")?,
        };
        let buckets = prometheus::exponential_buckets(0.0001, 2.0, 16)?;
        let opts = HistogramOpts::new("fleet_commit_seconds", "From a proposal to its durable answer")
            .buckets(buckets);
        let commit_seconds = Histogram::with_opts(opts)?;
        registry.register(Box::new(commit_seconds.clone()))?;
        let requests = IntCounterVec::new(
            Opts::new("fleet_requests_total", "Clients' requests"),
            &["request", "result"],
        )?;
        registry.register(Box::new(requests.clone()))?;
        Ok(Metrics { registry, commit_seconds, requests, gauges })
    }

    /// A change was answered after this long.
    pub fn committed(&self, after: Duration) {
        self.commit_seconds.observe(after.as_secs_f64());
    }

    pub fn count(&self, request: &str, done: bool) {
        self.requests.with_label_values(&[request, if done { "done" } else { "refused" }]).inc();
    }

    /// The text that Prometheus reads.
    pub fn render(
        &self,
        cluster: &ClusterView,
        status: &Status,
        nodes: &[NodeView],
    ) -> prometheus::Result<Vec<u8>> {
        let connected = || nodes.iter().filter(|node| node.connected);
        let gauges = &self.gauges;
        gauges.term.set(status.term as i64);
        gauges.commit_index.set(status.commit_index as i64);
        gauges.applied_index.set(status.applied_index as i64);
        gauges.is_leader.set(i64::from(status.leading_since_ms.is_some()));
        gauges.read_only.set(i64::from(status.read_only.is_some()));
        gauges.history_damaged.set(status.damaged_tables as i64);
        gauges.history_mended.set(status.rows_mended as i64);
        gauges.contradictions.set(status.contradictions as i64);
        gauges.agents.set(status.agents as i64);
        gauges.nodes.set(i64::from(cluster.nodes));
        gauges.nodes_connected.set(connected().count() as i64);
        gauges.slots.set(connected().map(|node| i64::from(node.slots)).sum());
        gauges.slots_used.set(nodes.iter().map(|node| i64::from(node.slots_used)).sum());
        gauges.jobs_running.set(i64::from(cluster.jobs_running));
        gauges.jobs_queued.set(i64::from(cluster.jobs_queued));
        let mut families = self.registry.gather();
        families
            .retain(|family| status.leading_since_ms.is_some() || !OF_THE_LEADER.contains(&family.name()));
        let mut text = Vec::new();
        TextEncoder::new().encode(&families, &mut text)?;
        Ok(text)
    }
}
