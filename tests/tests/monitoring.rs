//! A real Prometheus, with the configuration and the rules that are shipped, beside three coordinators and a worker that trains.

#![allow(clippy::unwrap_used)] // in a test an unwrap is an assertion

use fleet_tests::shipped::{dashboards, items, metrics, read, rules, series_in};
use fleet_tests::{Coordinators, Running, TinyJob, World, eventually, http};
use serde_json::Value;
use std::collections::BTreeSet;
use std::net::TcpListener;
use std::process::Command;

/// What a machine without NVIDIA's driver does not have.
const OF_GPUS: [&str; 4] = [
    "fleet_rank_device_bytes",
    "fleet_gpu_memory_bytes",
    "fleet_gpu_memory_used_bytes",
    "fleet_gpu_utilization_ratio",
];

struct Prometheus {
    at: String,
    _process: Running,
}

impl Prometheus {
    /// Of these coordinators; it asks every second where it would ask every quarter of a minute. `None` where there is none on PATH.
    fn start(world: &World, coordinators: &[String]) -> Option<Prometheus> {
        if Command::new("prometheus").arg("--version").output().is_err() {
            eprintln!("skipped: `prometheus` is not on PATH; `deploy/setup.sh --tests` installs Debian's");
            return None;
        }
        std::fs::create_dir(world.path("rules")).unwrap();
        for file in ["recording", "alerts"] {
            let rules = read(&format!("deploy/prometheus/rules/{file}.yml"));
            let lines = rules.lines().map(|line| match line.trim_start().starts_with("for: ") {
                true => format!("{}for: 2s\n", &line[..line.len() - line.trim_start().len()]),
                false => format!("{line}\n"),
            });
            world.write(&format!("rules/{file}.yml"), lines.collect::<String>());
        }
        let shipped = read("deploy/prometheus/prometheus.yml");
        assert!(shipped.contains("interval: 15s") && shipped.contains("refresh_interval: 30s"));
        let mut config = shipped
            .replace("interval: 15s", "interval: 1s")
            .replace("refresh_interval: 30s", "refresh_interval: 1s");
        // Each source of targets once for each coordinator, as the comment there says.
        for kind in ["coordinators", "workers"] {
            let source = format!(
                "      - url: http://127.0.0.1:7080/api/v1/targets/{kind}\n        refresh_interval: 1s\n"
            );
            assert!(config.contains(&source), "{config}");
            let all: String = coordinators.iter().map(|at| source.replace("127.0.0.1:7080", at)).collect();
            config = config.replace(&source, &all);
        }
        let config = world.write("prometheus.yml", config);
        let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
        let mut command = world.enter(Command::new("prometheus"));
        command.arg(format!("--config.file={}", config.display()));
        command.arg(format!("--storage.tsdb.path={}", world.path("series").display()));
        command.arg(format!("--web.listen-address={free}"));
        let mut process = Running::start(command);
        eventually("Prometheus is ready", || {
            process.must_live();
            http::answer(&free, "/-/ready").is_ok_and(|answer| answer.status == 200)
        });
        Some(Prometheus { at: free, _process: process })
    }

    fn api(&self, path: &str) -> Value {
        let answer = http::answer(&self.at, path).unwrap();
        let json = answer.json();
        assert_eq!(json["status"], "success", "{path}: {json}");
        json["data"].clone()
    }

    /// The series that a query gives now.
    fn query(&self, query: &str) -> Vec<Value> {
        let escaped: String = query.bytes().map(|byte| format!("%{byte:02x}")).collect();
        items(&self.api(&format!("/api/v1/query?query={escaped}"))["result"]).cloned().collect()
    }

    /// Names of the alerts that fire.
    fn firing(&self) -> BTreeSet<String> {
        let alerts = self.query("ALERTS{alertstate=\"firing\"}");
        alerts.iter().map(|alert| alert["metric"]["alertname"].as_str().unwrap().to_owned()).collect()
    }

    /// Waits until each of these gives something; says which do not.
    fn all_give(&self, what: &str, queries: &BTreeSet<String>) {
        assert!(queries.len() > 5);
        let mut silent = queries.clone();
        let begun = std::time::Instant::now();
        while !silent.is_empty() {
            silent.retain(|query| self.query(query).is_empty());
            assert!(begun.elapsed() < fleet_tests::PATIENCE, "{what} that give nothing: {silent:#?}");
        }
    }
}

/// As Grafana would ask, with all of each variable.
fn as_asked(query: &str) -> String {
    let mut words = query.split('$');
    let mut asked = words.next().unwrap_or_default().to_owned();
    for word in words {
        let end = word.find(|c: char| !(c.is_ascii_alphanumeric() || c == '_')).unwrap_or(word.len());
        asked += if &word[..end] == "__rate_interval" { "15s" } else { ".+" };
        asked += &word[end..];
    }
    asked
}

fn is_of_gpus(query: &str) -> bool {
    series_in(query).iter().any(|series| OF_GPUS.contains(series))
}

#[test]
fn prometheus_as_shipped_sees_all_that_there_is_and_tells_of_a_node_that_is_gone() {
    let world = World::new();
    let coordinators = Coordinators::start(&world, 3);
    let Some(prometheus) = Prometheus::start(&world, &coordinators.pages()) else { return };
    let worker = coordinators.worker_with(0, 3, &["--http", "127.0.0.1:0"]);
    let job = TinyJob { max_steps: 1_000_000, save_steps: 200, ..TinyJob::default() };
    let file = world.write("job.toml", job.toml().replace("eval_steps = 0", "eval_steps = 100"));
    coordinators.ask(&["submit", "-n", "2", file.to_str().unwrap()]);
    let cluster = coordinators.data_dir(0).display().to_string();
    world.run("fleet", &["submit", "--wait", "--cluster", &cluster, "-n", "1", "--", "true"]).expect(0);

    eventually("everything is found and scraped", || {
        let up = |job: &str| prometheus.query(&format!("up{{job=\"{job}\"}} == 1")).len();
        up("fleet-coordinators") == 3 && up("fleet-workers") == 1
    });
    let shown = metrics().into_iter().filter(|metric| !is_of_gpus(metric));
    let shown = shown.map(|metric| format!("{{__name__=~\"{metric}(_bucket)?\"}}")).collect();
    prometheus.all_give("metrics of docs/metrics.md", &shown);

    let (mut asked, mut exempt) = (BTreeSet::new(), 0);
    for board in dashboards() {
        for (title, query) in board.queries() {
            match is_of_gpus(query) {
                true => exempt += 1,
                false => drop(asked.insert(as_asked(query))),
            }
            assert!(!series_in(query).is_empty() || query.starts_with("count(ALERTS"), "{title}: {query}");
        }
        for (_, query) in board.variables().into_iter().filter(|(_, query)| !query.is_empty()) {
            let (metric, label) = query
                .strip_prefix("label_values(")
                .unwrap()
                .strip_suffix(')')
                .unwrap()
                .split_once(", ")
                .unwrap();
            asked.insert(format!("count by ({label}) ({metric}{{{label}!=\"\"}})"));
        }
    }
    assert!(exempt <= 3, "what is of GPUs is a small part");
    prometheus.all_give("queries of dashboards", &asked);

    let shipped = rules("recording").len() + rules("alerts").len();
    eventually("every rule is loaded and works", || {
        let groups = prometheus.api("/api/v1/rules");
        let loaded: Vec<Value> =
            items(&groups["groups"]).flat_map(|group| items(&group["rules"])).cloned().collect();
        let ill =
            loaded.iter().find(|rule| rule["lastError"].as_str().is_some_and(|error| !error.is_empty()));
        assert_eq!(ill, None);
        loaded.len() == shipped && loaded.iter().all(|rule| rule["health"] == "ok")
    });
    // What is recorded is of something.
    let recorded = rules("recording").into_iter().map(|rule| rule.name).collect();
    prometheus.all_give("recorded series", &recorded);

    // Not what depends on the machine that runs this: its disk, its memory, how it shares its cores.
    let firing = prometheus.firing();
    for quiet in [
        "FleetLeaderMissing",
        "FleetTwoLeaders",
        "FleetQuorumAtRisk",
        "FleetCoordinatorDown",
        "FleetNodeOutOfTouch",
        "FleetWorkerCutOff",
        "FleetJobLossNotANumber",
        "FleetVersionsDiffer",
        "FleetCheckpointsFail",
    ] {
        assert!(!firing.contains(quiet), "{quiet} fires on a cluster that works");
    }
    drop(worker);
    eventually("the alert for the killed node fires", || prometheus.firing().contains("FleetNodeOutOfTouch"));
    let alert = prometheus.query("ALERTS{alertname=\"FleetNodeOutOfTouch\",alertstate=\"firing\"}").remove(0);
    assert_eq!(alert["metric"]["node"], "node-1");
}
