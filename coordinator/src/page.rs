//! The page for people: files in the binary, and what its overview of the cluster shows. Everything else it asks of the same HTTP.

use fleet_common::protocol::{ClusterView, CoordinatorView, JobView, NodeView};
use serde::Serialize;
use std::cmp::Reverse;

/// A file as it is served.
#[derive(Debug, PartialEq, Eq)]
pub struct File {
    pub path: &'static str,
    pub kind: &'static str,
    pub text: &'static str,
}

const HTML: &str = "text/html; charset=utf-8";
const CSS: &str = "text/css; charset=utf-8";
const SCRIPT: &str = "text/javascript; charset=utf-8";
const SVG: &str = "image/svg+xml";

const fn of(path: &'static str, kind: &'static str, text: &'static str) -> File {
    File { path, kind, text }
}

static FILES: [File; 15] = [
    of("/", HTML, include_str!("page/index.html")),
    of("/favicon.svg", SVG, include_str!("page/favicon.svg")),
    of("/page.css", CSS, include_str!("page/page.css")),
    of("/plot.css", CSS, fleet_plot::STYLE),
    of("/actions.js", SCRIPT, include_str!("page/actions.js")),
    of("/chart.js", SCRIPT, include_str!("page/chart.js")),
    of("/cluster.js", SCRIPT, include_str!("page/cluster.js")),
    of("/compare.js", SCRIPT, include_str!("page/compare.js")),
    of("/dom.js", SCRIPT, include_str!("page/dom.js")),
    of("/format.js", SCRIPT, include_str!("page/format.js")),
    of("/job.js", SCRIPT, include_str!("page/job.js")),
    of("/live.js", SCRIPT, include_str!("page/live.js")),
    of("/log.js", SCRIPT, include_str!("page/log.js")),
    of("/main.js", SCRIPT, include_str!("page/main.js")),
    of("/models.js", SCRIPT, include_str!("page/models.js")),
];

/// What browsers may do with any answer: run this coordinator's own scripts, ask this coordinator, and nothing else.
pub const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

pub fn file(path: &str) -> Option<&'static File> {
    FILES.iter().find(|file| file.path == path)
}

/// Jobs and nodes in an overview, at most.
const JOBS_MAX: usize = 200;
const NODES_MAX: usize = 200;
/// A node that was heard within this time is heard now.
const HEARD_MS: u64 = 3_000;

/// The cluster at one moment, in a bounded number of rows.
#[derive(Debug, Serialize)]
pub struct Overview {
    /// Nobody leads: this is what the coordinator that answers has.
    pub stale: bool,
    pub cluster: ClusterView,
    pub coordinators: Vec<CoordinatorView>,
    /// Those with whom something is wrong come first.
    pub nodes: Vec<NodeView>,
    /// Those that have not ended come first, then the newest.
    pub jobs: Vec<JobView>,
    pub totals: Totals,
}

/// Of all nodes and jobs, also those that have no row.
#[derive(Debug, Default, PartialEq, Eq, Serialize)]
pub struct Totals {
    pub nodes: usize,
    pub nodes_connected: usize,
    pub slots: u64,
    pub slots_used: u64,
    pub jobs: usize,
}

impl Overview {
    pub fn new(
        stale: bool,
        cluster: ClusterView,
        coordinators: Vec<CoordinatorView>,
        mut nodes: Vec<NodeView>,
        mut jobs: Vec<JobView>,
    ) -> Overview {
        let totals = Totals {
            nodes: nodes.len(),
            nodes_connected: nodes.iter().filter(|node| node.connected).count(),
            slots: nodes.iter().map(|node| u64::from(node.slots)).sum(),
            slots_used: nodes.iter().map(|node| u64::from(node.slots_used)).sum(),
            jobs: jobs.len(),
        };
        nodes.sort_by_key(|node| (node.connected && !node.lost && !node.drained, node.node));
        nodes.truncate(NODES_MAX);
        for node in &mut nodes {
            // What changes all the time would have to be sent all the time.
            node.heard_ms_ago =
                node.heard_ms_ago.map(|ago| if ago < HEARD_MS { 0 } else { ago / 1_000 * 1_000 });
        }
        jobs.sort_by_key(|job| (job.state.is_final(), Reverse(job.job)));
        jobs.truncate(JOBS_MAX);
        jobs.iter_mut().for_each(shorten);
        Overview { stale, cluster, coordinators, nodes, jobs, totals }
    }
}

/// Leaves out what a row does not show.
fn shorten(job: &mut JobView) {
    job.job_json.clear();
    if let Some(error) = &mut job.error {
        error.last_lines.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fleet_common::ids::NodeId;
    use std::collections::BTreeMap;

    fn cluster() -> ClusterView {
        ClusterView {
            cluster_id: "c".into(),
            leader: None,
            term: 1,
            commit_index: 2,
            applied_index: 2,
            nodes: 10_000,
            jobs_running: 0,
            jobs_queued: 0,
            read_only: None,
        }
    }

    fn node(number: u64) -> NodeView {
        NodeView {
            node: NodeId(number),
            name: format!("box-{number}"),
            connected: number != 9_999,
            slots: 8,
            slots_used: 1,
            lost: false,
            drained: false,
            labels: BTreeMap::new(),
            host: String::new(),
            device: "cpu".into(),
            version: "0.1.0".into(),
            heard_ms_ago: Some(1_234),
        }
    }

    #[test]
    fn a_large_cluster_has_a_small_overview_with_what_is_wrong() {
        let seen = Overview::new(false, cluster(), Vec::new(), (1..=10_000).map(node).collect(), Vec::new());
        assert_eq!((seen.totals.nodes, seen.totals.nodes_connected), (10_000, 9_999));
        assert_eq!((seen.totals.slots, seen.totals.slots_used), (80_000, 10_000));
        assert_eq!((seen.nodes.len(), seen.nodes[0].node), (NODES_MAX, NodeId(9_999)));
        assert_eq!(seen.nodes[1].heard_ms_ago, Some(0));
        assert!(serde_json::to_vec(&seen).unwrap().len() < 100_000);
    }

    #[test]
    fn every_file_that_the_page_names_is_there_and_none_names_another_place() {
        for file in &FILES {
            let names = file.text.split(['"', '\'']).filter_map(|word| word.strip_prefix("./"));
            for name in names {
                assert!(self::file(&format!("/{name}")).is_some(), "{} names {name}", file.path);
            }
            let elsewhere = file.text.replace("http://www.w3.org/", "");
            assert!(!elsewhere.contains("http://") && !elsewhere.contains("https://"), "{}", file.path);
            assert!(!file.text.contains("innerHTML") && !file.text.contains("eval("), "{}", file.path);
        }
        for named in FILES[0].text.split(['"']).filter(|word| word.starts_with('/')) {
            assert!(self::file(named).is_some(), "{named}");
        }
        assert!(!FILES[0].text.contains("<style") && !FILES[0].text.contains("onload"));
    }
}
