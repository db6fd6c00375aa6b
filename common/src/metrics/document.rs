//! docs/metrics.md, which is made of the definitions.

use super::{At, Definition, Kind, coordinator, worker};
use std::fmt::Write as _;
use std::path::Path;

const RENEW: &str = "FLEET_RENEW_DOCS";

const HEAD: &str = "\
# Metrics

Coordinators show these at `/metrics` of their HTTP address (`--http`, by default `127.0.0.1:7080`), workers at that of `worker join --http`, which is off by default. Both write
OpenMetrics 1.0.0 or Prometheus' text format, as the reader asks.

A label is an id of the cluster (`job-7`, `node-3`, `replica-2`), a member's name or a fixed word. What a coordinator has *while it leads* is left out at the others, since
only the leader sees the nodes of all coordinators. The state is the same at every coordinator: ask one of them, or take `max by (...)`, and not the sum. Counters count since
their program's start.

This file is made of the definitions in `common/src/metrics`: `FLEET_RENEW_DOCS=1 cargo test -p fleet-common document` writes it anew.
";

fn document() -> String {
    let mut text = HEAD.to_owned();
    for (title, definitions) in [("Coordinators", coordinator::ALL), ("Workers", worker::ALL)] {
        let _ = write!(text, "\n## {title}\n\n| metric | type | labels | what it is |\n|---|---|---|---|\n");
        definitions.iter().for_each(|definition| row(&mut text, definition));
    }
    text
}

fn row(text: &mut String, definition: &Definition) {
    let Definition { name, labels, help, at, .. } = definition;
    let kind = match definition.kind {
        Kind::Gauge => "gauge",
        Kind::Counter => "counter",
        Kind::Histogram { .. } => "histogram",
    };
    let labels: Vec<String> = labels.iter().map(|label| format!("`{label}`")).collect();
    let leader = if *at == At::Leader { "; only while it leads" } else { "" };
    let _ = writeln!(text, "| `{name}` | {kind} | {} | {help}{leader} |", labels.join(", "));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_document_is_what_the_definitions_say() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/metrics.md");
        if std::env::var_os(RENEW).is_some() {
            std::fs::write(&path, document()).unwrap();
        }
        let known = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(known == document(), "docs/metrics.md is stale: run this test again with {RENEW}=1");
    }
}
