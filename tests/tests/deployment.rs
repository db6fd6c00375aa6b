//! What `deploy/` ships, as far as it can be held to without the systems it is for: dashboards and rules name metrics that there are, every
//! alert has its section in the documents, and the entry of a container brings up a cluster. `deploy/check.sh` has the rest.

#![allow(clippy::unwrap_used)] // in a test an unwrap is an assertion

use fleet_tests::shipped::{dashboards, items, metric_of, metrics, read, rules, series_in, yaml};
use fleet_tests::source::root;
use fleet_tests::{Running, World, eventually, http, program};
use serde_json::Value;
use std::collections::BTreeSet;
use std::net::{TcpListener, UdpSocket};
use std::path::PathBuf;
use std::process::Command;

#[test]
fn dashboards_have_the_shape_that_grafana_loads() {
    let mut uids = BTreeSet::new();
    for board in dashboards() {
        let what = &board.name;
        let word =
            |key: &str| board.json[key].as_str().unwrap_or_else(|| panic!("{what} has no {key}")).to_owned();
        assert_eq!(word("uid"), format!("fleet-{what}"));
        assert!(uids.insert(word("uid")) && !word("title").is_empty() && !word("description").is_empty());
        assert!(board.json["schemaVersion"].as_u64() >= Some(36), "{what}");
        let variables: BTreeSet<&str> = board.variables().into_iter().map(|(name, _)| name).collect();
        assert!(variables.contains("datasource"), "{what} leaves the data source open");
        let mut ids = BTreeSet::new();
        let mut places = BTreeSet::new();
        for panel in items(&board.json["panels"]) {
            let title = panel["title"].as_str().unwrap();
            assert!(ids.insert(panel["id"].as_u64().unwrap()), "{what}: {title} has the id of another panel");
            let [x, y, w, h] = ["x", "y", "w", "h"].map(|side| panel["gridPos"][side].as_u64().unwrap());
            assert!(x + w <= 24 && w > 0 && h > 0, "{what}: {title} is outside");
            for at in (x..x + w).flat_map(|x| (y..y + h).map(move |y| (x, y))) {
                assert!(places.insert(at), "{what}: {title} lies over another panel");
            }
        }
        for panel in board.panels() {
            let title = panel["title"].as_str().unwrap();
            assert!(
                !panel["description"].as_str().unwrap_or_default().is_empty(),
                "{what}: {title} is not described"
            );
            assert!(panel["fieldConfig"]["defaults"]["unit"].is_string(), "{what}: {title} has no unit");
            let mut letters = BTreeSet::new();
            for target in items(&panel["targets"]) {
                assert!(letters.insert(target["refId"].as_str().unwrap()), "{what}: {title}");
                assert_eq!(target["datasource"]["uid"], "${datasource}", "{what}: {title}");
                let names = target["expr"].as_str().unwrap().split('$').skip(1);
                for name in
                    names.map(|rest| rest.split(|c: char| !(c.is_alphanumeric() || c == '_')).next().unwrap())
                {
                    assert!(
                        variables.contains(name) || name == "__rate_interval",
                        "{what}: {title}: ${name}"
                    );
                }
            }
            assert!(!letters.is_empty(), "{what}: {title} asks for nothing");
        }
    }
    assert_eq!(uids.len(), 5);
    // What is provisioned is what they take.
    let sources = yaml("deploy/grafana/provisioning/datasources/fleet.yml");
    assert_eq!(sources["datasources"][0]["type"], "prometheus");
}

#[test]
fn dashboards_and_rules_name_metrics_that_there_are() {
    let (metrics, recorded) = (metrics(), rules("recording"));
    let recorded: BTreeSet<&str> = recorded.iter().map(|rule| rule.name.as_str()).collect();
    let mut unknown = BTreeSet::new();
    let mut look = |wherever: &str, query: &str| {
        for series in series_in(query) {
            let known = match series.contains(':') {
                true => recorded.contains(series),
                false => metrics.contains(series) || metrics.contains(metric_of(series)),
            };
            if !known {
                unknown.insert(format!("{wherever}: {series}"));
            }
        }
    };
    for board in dashboards() {
        let asked = board.queries().into_iter().chain(board.variables());
        asked.for_each(|(title, query)| look(&format!("{}, {title}", board.name), query));
    }
    for rule in rules("recording").iter().chain(&rules("alerts")) {
        look(&rule.name, rule.json["expr"].as_str().unwrap());
    }
    assert!(unknown.is_empty(), "not in docs/metrics.md: {unknown:#?}");
}

#[test]
fn every_alert_says_what_it_means_and_what_to_do_and_is_tested() {
    let (alerts, document) = (rules("alerts"), read("docs/operating.md"));
    let tests = yaml("deploy/prometheus/rules/alerts_test.yml");
    let tests: Vec<&Value> =
        items(&tests["tests"]).flat_map(|test| items(&test["alert_rule_test"])).collect();
    assert!(alerts.len() > 20);
    for alert in alerts {
        let name = &alert.name;
        assert!(
            alert.is_alert
                && ["critical", "warning"].contains(&alert.json["labels"]["severity"].as_str().unwrap())
        );
        for note in ["summary", "description"] {
            assert!(alert.json["annotations"][note].is_string(), "{name} has no {note}");
        }
        let section = format!("docs/operating.md#{}", name.to_lowercase());
        assert_eq!(alert.json["annotations"]["runbook_url"], section.as_str());
        assert!(document.contains(&format!("\n### {name}\n")), "docs/operating.md has no section {name}");
        let of_it = || tests.iter().filter(|test| test["alertname"] == name.as_str());
        assert!(of_it().any(|test| items(&test["exp_alerts"]).next().is_some()), "no test sees {name} fire");
        assert!(
            of_it().any(|test| items(&test["exp_alerts"]).next().is_none()),
            "no test sees {name} stay silent"
        );
    }
}

/// Three coordinators that `deploy/container/entrypoint.sh` starts, as a StatefulSet would: all at once, each with the same words but its own
/// name, and a token that comes later.
struct Set {
    world: World,
    clients: Vec<String>,
    http: Vec<String>,
}

impl Set {
    fn new() -> Set {
        let (mut udp, mut tcp) = (Vec::new(), Vec::new());
        for _ in 0..3 {
            udp.push(UdpSocket::bind("127.0.0.1:0").unwrap());
            tcp.push(TcpListener::bind("127.0.0.1:0").unwrap());
        }
        let clients = udp.iter().map(|socket| socket.local_addr().unwrap().to_string()).collect();
        let http = tcp.iter().map(|socket| socket.local_addr().unwrap().to_string()).collect();
        let world = World::new();
        std::fs::create_dir(world.path("secret")).unwrap();
        Set { world, clients, http }
    }

    fn dir(&self, n: usize) -> PathBuf {
        self.world.path(&format!("volume-{n}/data"))
    }

    fn entry(&self, n: usize, words: &[&str]) -> Command {
        let mut command = self.world.enter(Command::new(root().join("deploy/container/entrypoint.sh")));
        let programs = program("coordinator");
        let path = format!("{}:{}", programs.parent().unwrap().display(), std::env::var("PATH").unwrap());
        std::fs::create_dir_all(self.dir(n).parent().unwrap()).unwrap();
        command.args(words).env("PATH", path).env("FLEET_DATA_DIR", self.dir(n));
        command.env("FLEET_NAME", format!("pod-{n}")).env("FLEET_FOUNDER", "pod-0");
        command.env("FLEET_PEERS", self.clients.join(",")).env("FLEET_PEERS_HTTP", self.http[1..].join(","));
        command.env("FLEET_LISTEN", &self.clients[n]).env("FLEET_MEMBER_LISTEN", "127.0.0.1:0");
        command.env("FLEET_HTTP", &self.http[n]).env("FLEET_TOKEN_FILE", self.world.path("secret/token"));
        command
    }

    fn start(&self, n: usize) -> Running {
        Running::start(self.entry(n, &["coordinator"]))
    }

    fn is_healthy(&self, n: usize) -> bool {
        Running::start(self.entry(n, &["health"])).finish().code() == 0
    }

    fn token(&self, asked: usize, uses: &str) {
        let cluster = format!("{}/", self.dir(asked).display());
        let args = ["--cluster", &cluster, "token", "create", "--role", "coordinator", "--uses", uses];
        let token = self.world.run("fleet", &args).expect(0).stdout.concat();
        self.world.write("secret/new", token);
        std::fs::rename(self.world.path("secret/new"), self.world.path("secret/token")).unwrap();
    }

    fn coordinators(&self, asked: usize) -> Vec<Value> {
        let cluster = format!("{}/", self.dir(asked).display());
        let done = self.world.run("fleet", &["--cluster", &cluster, "coordinators", "ls", "--json"]);
        serde_json::from_str(&done.stdout.concat()).unwrap_or_default()
    }

    fn voters(&self, asked: usize) -> usize {
        self.coordinators(asked).iter().filter(|view| view["voter"] == true).count()
    }
}

#[test]
fn a_set_of_containers_founds_joins_restarts_and_never_founds_twice() {
    let set = Set::new();
    let mut pods: Vec<Option<Running>> = (0..3).map(|n| Some(set.start(n))).collect();
    eventually("the first one founds", || set.is_healthy(0));
    pods[2].as_ref().unwrap().until_it_says("waiting for a token");
    assert!(!set.is_healthy(1), "it has nothing to serve");
    set.token(0, "2");
    eventually("three vote", || set.voters(0) == 3);
    eventually("all are healthy", || (0..3).all(|n| set.is_healthy(n)));

    // All at once, as after a power cut; nobody is ready before a majority is there.
    pods.iter_mut().for_each(|pod| *pod = None);
    pods = (0..3).map(|n| Some(set.start(n))).collect();
    eventually("all are healthy again", || (0..3).all(|n| set.is_healthy(n)));
    assert_eq!(set.voters(1), 3);

    // The founder's volume is lost. The token is used up, so it is not let in, and it makes no cluster of its own.
    pods[0] = None;
    std::fs::rename(set.dir(0), set.world.path("lost")).unwrap();
    set.start(0).finish().expect(2).says("token");
    // Nor without a token, while others answer.
    std::fs::remove_file(set.world.path("secret/token")).unwrap();
    let lone = set.start(0);
    lone.until_it_says("so there is a cluster already");
    lone.until_it_says("waiting for a token");
    let gone = set.coordinators(1).into_iter().find(|view| view["name"] == "pod-0").unwrap();
    let gone = gone["replica"].as_str().unwrap().to_owned();
    let cluster = format!("{}/", set.dir(1).display());
    set.world.run("fleet", &["--cluster", &cluster, "coordinators", "remove", &gone]).expect(0);
    set.token(1, "1");
    eventually("the new one votes", || set.voters(1) == 3 && set.is_healthy(0));
    assert!(http::get(&set.http[0], "/healthz").unwrap().ends_with("ok\n"));
}
