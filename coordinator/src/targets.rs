//! What there is to be scraped, in the words of Prometheus' HTTP service discovery. Pure.
//!
//! A program that listens on loopback is found only from its own machine, so it is named only by a coordinator there, and only where that
//! one is asked on loopback itself: whoever asks is on that machine, too.

use fleet_common::http::{host_of, is_of_this_machine};
use fleet_common::ids::ReplicaId;
use fleet_common::metrics::target;
use fleet_common::protocol::{CoordinatorView, NodeView};
use serde::Serialize;
use std::collections::BTreeMap;

/// Labels that begin with `__meta_` are for relabelling; the others stay.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct Target {
    targets: [String; 1],
    labels: BTreeMap<&'static str, String>,
}

/// The coordinator that is asked.
#[derive(Clone, Debug)]
pub struct Asked {
    /// Name or address of its machine.
    pub host: String,
    /// Where it is asked.
    pub http: String,
}

impl Asked {
    /// Whether who asks here finds `at`, which a program on `host` listens on.
    fn finds(&self, at: &str, host: &str) -> bool {
        let same = self.host == host || (is_local(&self.host) && is_local(host));
        !is_local(at) || (same && is_of_this_machine(&self.http))
    }
}

/// As `is_of_this_machine`, of a host without a port.
fn is_local(host: &str) -> bool {
    is_of_this_machine(&target::join(host, 0))
}

const TLS: &str = "https://";

/// What a coordinator says of where it serves HTTP.
pub fn said(at: &str, over_tls: bool) -> String {
    if over_tls { format!("{TLS}{at}") } else { at.to_owned() }
}

/// `http` has what each coordinator said of itself.
pub fn coordinators(
    asked: &Asked,
    views: &[CoordinatorView],
    http: &BTreeMap<ReplicaId, String>,
) -> Vec<Target> {
    let of = |view: &CoordinatorView| {
        let said = http.get(&view.address.replica)?;
        let (at, over_tls) = said.strip_prefix(TLS).map_or((said.as_str(), false), |at| (at, true));
        let mut labels = BTreeMap::from([
            ("coordinator", view.address.replica.to_string()),
            ("__meta_fleet_name", view.name.clone()),
        ]);
        if over_tls {
            labels.insert("__scheme__", "https".to_owned());
        }
        // Who speaks TLS is reached from elsewhere, whatever its address looks like.
        let found = over_tls || asked.finds(host_of(at), host_of(&view.address.client));
        found.then(|| Target { targets: [at.to_owned()], labels })
    };
    views.iter().filter_map(of).collect()
}

pub fn workers(asked: &Asked, nodes: &[NodeView]) -> Vec<Target> {
    let of = |node: &NodeView| {
        let (host, port) = target::address_of(node.labels.get(target::LABEL)?, &node.host)?;
        let labels = BTreeMap::from([
            ("node", node.node.to_string()),
            ("__meta_fleet_name", node.name.clone()),
            ("__meta_fleet_device", node.device.clone()),
        ]);
        asked.finds(&host, &node.host).then(|| Target { targets: [target::join(&host, port)], labels })
    };
    nodes.iter().filter_map(of).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use fleet_common::ids::NodeId;
    use fleet_common::protocol::CoordinatorAddress;

    fn asked(host: &str, http: &str) -> Asked {
        Asked { host: host.into(), http: http.into() }
    }

    fn found(targets: Vec<Target>) -> Vec<String> {
        targets.into_iter().flat_map(|target| target.targets).collect()
    }

    fn node(number: u64, host: &str, label: Option<&str>) -> NodeView {
        NodeView {
            node: NodeId(number),
            name: format!("box-{number}"),
            connected: true,
            slots: 1,
            slots_used: 0,
            lost: false,
            drained: false,
            labels: label.map(|label| (target::LABEL.to_owned(), label.to_owned())).into_iter().collect(),
            host: host.into(),
            device: "cpu".into(),
            version: "1".into(),
            heard_ms_ago: None,
        }
    }

    #[test]
    fn a_worker_is_found_where_it_can_be_reached() {
        let nodes = [
            node(1, "10.0.0.1", Some("9100")),
            node(2, "10.0.0.2", Some("127.0.0.1/9100")),
            node(3, "10.0.0.3", Some("10.9.0.3/9100")),
            node(4, "10.0.0.4", None),
            node(5, "10.0.0.5", Some("nowhere")),
        ];
        let all = ["10.0.0.1:9100", "10.9.0.3:9100"];
        assert_eq!(found(workers(&asked("10.0.0.9", "127.0.0.1:7080"), &nodes)), all);
        assert_eq!(found(workers(&asked("10.0.0.2", "10.0.0.2:7080"), &nodes)), all, "asked from elsewhere");
        let here = found(workers(&asked("10.0.0.2", "127.0.0.1:7080"), &nodes));
        assert_eq!(here, ["10.0.0.1:9100", "127.0.0.1:9100", "10.9.0.3:9100"]);
        let local = [node(1, "127.0.0.1", Some("127.0.0.1/9100")), node(2, "localhost", Some("9100"))];
        let here = workers(&asked("127.0.0.1", "[::1]:7080"), &local);
        assert_eq!(
            serde_json::to_value(&here).unwrap()[0],
            serde_json::json!({
                "targets": ["127.0.0.1:9100"],
                "labels": {"node": "node-1", "__meta_fleet_name": "box-1", "__meta_fleet_device": "cpu"}
            })
        );
        assert_eq!(found(here), ["127.0.0.1:9100", "localhost:9100"]);
    }

    #[test]
    fn a_coordinator_is_found_when_it_has_said_where() {
        let view = |number: u64, host: &str| CoordinatorView {
            address: CoordinatorAddress {
                replica: ReplicaId(number),
                client: format!("{host}:7070"),
                member: format!("{host}:7071"),
            },
            name: format!("c{number}"),
            version: "1".into(),
            voter: true,
            leads: false,
            matched_index: None,
            alive: None,
            read_only: None,
            alarm: None,
        };
        let views = [view(1, "c1"), view(2, "c2"), view(3, "c3")];
        let http = [(1, "127.0.0.1:7080"), (2, "c2:7080")];
        let http = http.map(|(id, at)| (ReplicaId(id), at.to_owned())).into();
        assert_eq!(
            found(coordinators(&asked("c1", "127.0.0.1:7080"), &views, &http)),
            ["127.0.0.1:7080", "c2:7080"]
        );
        assert_eq!(found(coordinators(&asked("c2", "c2:7080"), &views, &http)), ["c2:7080"]);
        let http = [(ReplicaId(3), said("c3:7080", true))].into();
        let over_tls = coordinators(&asked("c2", "c2:7080"), &views, &http);
        assert_eq!(serde_json::to_value(&over_tls).unwrap()[0]["labels"]["__scheme__"], "https");
        assert_eq!(found(over_tls), ["c3:7080"]);
    }
}
