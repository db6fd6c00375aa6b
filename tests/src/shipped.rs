//! What `deploy/` ships for monitoring, as tests read it: dashboards, rules, and the metrics that docs/metrics.md names.

use crate::source::root;
use serde_json::Value;
use std::collections::BTreeSet;
use std::fs;

/// A dashboard of Grafana.
#[derive(Clone, Debug)]
pub struct Dashboard {
    /// Of its file, without the extension.
    pub name: String,
    pub json: Value,
}

/// An alert, or a series that is recorded.
#[derive(Clone, Debug)]
pub struct Rule {
    pub name: String,
    pub is_alert: bool,
    /// The whole entry.
    pub json: Value,
}

/// A file of the clone.
pub fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// What stands in a YAML file of the clone.
pub fn yaml(path: &str) -> Value {
    serde_saphyr::from_str(&read(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// The names in the first columns of the tables of docs/metrics.md.
pub fn metrics() -> BTreeSet<String> {
    let name = |line: &str| line.strip_prefix("| `")?.split(['`', '{']).next().map(str::to_owned);
    read("docs/metrics.md").lines().filter_map(name).filter(|name| name.starts_with("fleet_")).collect()
}

pub fn dashboards() -> Vec<Dashboard> {
    let mut all = Vec::new();
    for entry in fs::read_dir(root().join("deploy/grafana/dashboards")).expect("it is in the clone") {
        let path = entry.expect("it can be read").path();
        let text = fs::read_to_string(&path).expect("it is text");
        let json = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let name = path.file_stem().expect("a file has a name").to_string_lossy().into_owned();
        all.push(Dashboard { name, json });
    }
    all.sort_by(|one, other| one.name.cmp(&other.name));
    all
}

/// `recording` or `alerts`.
pub fn rules(file: &str) -> Vec<Rule> {
    let groups = yaml(&format!("deploy/prometheus/rules/{file}.yml"));
    let rules = items(&groups["groups"]).flat_map(|group| items(&group["rules"]));
    let rule = |json: &Value| {
        let name = json["alert"].as_str().or(json["record"].as_str()).expect("a rule has a name");
        Rule { name: name.to_owned(), is_alert: json["alert"].is_string(), json: json.clone() }
    };
    rules.map(rule).collect()
}

impl Dashboard {
    /// All but the rows.
    pub fn panels(&self) -> impl Iterator<Item = &Value> {
        items(&self.json["panels"]).filter(|panel| panel["type"] != "row")
    }

    /// Each query with the title of its panel.
    pub fn queries(&self) -> Vec<(&str, &str)> {
        self.panels()
            .flat_map(|panel| {
                let title = panel["title"].as_str().expect("a panel has a title");
                items(&panel["targets"])
                    .map(move |target| (title, target["expr"].as_str().expect("a target has a query")))
            })
            .collect()
    }

    /// The queries by which its variables get their values.
    pub fn variables(&self) -> Vec<(&str, &str)> {
        let variables = items(&self.json["templating"]["list"]);
        variables
            .map(|variable| {
                let name = variable["name"].as_str().expect("a variable has a name");
                (name, variable["query"]["query"].as_str().unwrap_or_default())
            })
            .collect()
    }
}

/// Of a list; none where there is no list.
pub fn items(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

/// The series of fleet that a query names, those of rules too.
pub fn series_in(query: &str) -> BTreeSet<&str> {
    let words = query.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_' || c == ':'));
    words.filter(|word| word.starts_with("fleet_") || word.contains(":fleet_")).collect()
}

/// The metric that a series is of: histograms have several.
pub fn metric_of(series: &str) -> &str {
    ["_bucket", "_sum", "_count"].iter().find_map(|end| series.strip_suffix(end)).unwrap_or(series)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn series_are_found_in_a_query_and_nothing_else() {
        let query = r#"max by (job) (fleet_job_loss{job="fleet-x"}) / on () job:fleet_job_step:leader > up"#;
        assert_eq!(
            series_in(query).into_iter().collect::<Vec<_>>(),
            ["fleet_job_loss", "job:fleet_job_step:leader"]
        );
        assert_eq!(metric_of("fleet_commit_seconds_bucket"), "fleet_commit_seconds");
    }
}
