//! What the server itself counts and times. What is known of the cluster comes from `Control::measure`, when it is asked for.

use super::gate::Gate;
use super::space::Probe;
use fleet_common::metrics::Page;
use fleet_common::metrics::coordinator::*;
use prometheus::{Histogram, IntCounterVec, IntGauge};
use std::time::Duration;

/// Why a connection was not let in.
#[derive(Clone, Copy, Debug)]
pub enum Refused {
    Busy,
    Handshake,
    Forbidden,
    Revoked,
    Later,
}

impl Refused {
    const ALL: [Refused; 5] =
        [Refused::Busy, Refused::Handshake, Refused::Forbidden, Refused::Revoked, Refused::Later];

    fn name(self) -> &'static str {
        match self {
            Refused::Busy => "busy",
            Refused::Handshake => "handshake",
            Refused::Forbidden => "refused",
            Refused::Revoked => "revoked",
            Refused::Later => "later",
        }
    }
}

pub struct Metrics {
    /// Of the disk's synced writes.
    fsync: Histogram,
    /// Of the turns of the raft thread.
    pub round: Histogram,
    commit: Histogram,
    requests: IntCounterVec,
    refused: IntCounterVec,
    http_requests: IntCounterVec,
    /// Open streams of events.
    pub streams: IntGauge,
    room: Probe,
}

impl Metrics {
    /// `fsync` is what the disk measures, `room` looks at its file system.
    pub fn new(fsync: Histogram, room: Probe) -> Metrics {
        let refused = QUIC_REFUSED.counters();
        for why in Refused::ALL {
            refused.with_label_values(&[why.name()]);
        }
        Metrics {
            fsync,
            round: RAFT_ROUND_SECONDS.histogram(),
            commit: COMMIT_SECONDS.histogram(),
            requests: REQUESTS.counters(),
            refused,
            http_requests: HTTP_REQUESTS.counters(),
            streams: HTTP_STREAMS.gauge(),
            room,
        }
    }

    /// A change was answered after this long.
    pub fn committed(&self, after: Duration) {
        self.commit.observe(after.as_secs_f64());
    }

    pub fn count(&self, request: &str, done: bool) {
        self.requests.with_label_values(&[request, if done { "done" } else { "refused" }]).inc();
    }

    pub fn refused(&self, why: Refused) {
        self.refused.with_label_values(&[why.name()]).inc();
    }

    /// An HTTP request to a path of this pattern was answered.
    pub fn served(&self, pattern: &str, status: u16) {
        self.http_requests.with_label_values(&[pattern, &status.to_string()]).inc();
    }

    /// Adds it all to what the cluster knows.
    pub fn add_to(&self, page: &mut Page, gate: &Gate) {
        page.put(&BUILD_INFO, &[env!("CARGO_PKG_VERSION")], 1.0);
        page.put_histogram(&RAFT_FSYNC_SECONDS, &self.fsync);
        page.put_histogram(&RAFT_ROUND_SECONDS, &self.round);
        page.put_histogram(&COMMIT_SECONDS, &self.commit);
        page.put_counters(&REQUESTS, &self.requests);
        page.put_counters(&QUIC_REFUSED, &self.refused);
        page.put_counters(&HTTP_REQUESTS, &self.http_requests);
        page.put(&HTTP_STREAMS, &[], self.streams.get() as f64);
        for (kind, connections) in gate.connections_by_kind() {
            page.put(&QUIC_CONNECTIONS, &[kind], connections as f64);
        }
        let found = (self.room)();
        page.put_some(&DISK_FREE_BYTES, &[], found.map(|found| found.free_bytes as f64));
        page.put_some(&DISK_SIZE_BYTES, &[], found.map(|found| found.total_bytes as f64));
    }
}
