//! The model of links by which gangs choose their algorithms, as a table: which one they take for what, and how long that takes.

use super::between::{COLLECTED, SCATTERED, SUMMED};
use fleet_collectives::Posted;
use fleet_collectives::algorithm::{Algorithm, Topology};
use fleet_collectives::cost::{Links, between_hosts, cheapest, chosen, predict};
use fleet_common::job::Shape;
use serde::Serialize;
use std::fmt::Write;

const SIZES: [usize; 6] = [4, 4 << 10, 64 << 10, 1 << 20, 16 << 20, 256 << 20];

#[derive(Debug, Serialize)]
pub struct Costs {
    pub ranks: u32,
    pub nodes: u32,
    pub between: String,
    pub rows: Vec<Row>,
}

#[derive(Debug, Serialize)]
pub struct Row {
    pub operation: &'static str,
    /// Between nodes, when the ranks of each have met in shared memory; else between all ranks, over connections alone.
    pub shared_memory: bool,
    pub bytes: usize,
    pub algorithm: String,
    pub microseconds: f64,
    /// What would be faster on these links, where something would.
    pub faster: Option<String>,
}

/// Of a gang of this shape.
pub fn costs(shape: Shape, links: &Links, between: String) -> Costs {
    let topology = Topology::even(shape.nodes as usize, shape.of_node() as usize);
    let mut rows = Vec::new();
    for (operation, exchange) in
        [("all_reduce", SUMMED), ("reduce_scatter", SCATTERED), ("all_gather", COLLECTED)]
    {
        for bytes in SIZES {
            if topology.hosts() > 1 {
                let crossing = between_hosts(exchange, bytes, &topology, links);
                rows.push(Row {
                    operation,
                    shared_memory: true,
                    bytes,
                    algorithm: crossing.algorithm.to_string(),
                    microseconds: crossing.time.as_secs_f64() * 1e6,
                    faster: None,
                });
            }
            rows.push(over_connections(operation, exchange, bytes, &topology, links));
        }
    }
    // What training does first.
    rows.sort_by_key(|row| !row.shared_memory);
    Costs { ranks: shape.ranks, nodes: shape.nodes, between, rows }
}

fn over_connections(
    operation: &'static str,
    exchange: Posted,
    bytes: usize,
    topology: &Topology,
    links: &Links,
) -> Row {
    let time = |algorithm: Algorithm| predict(exchange, bytes, algorithm, topology, links);
    let taken = chosen(exchange, bytes, topology);
    let best = cheapest(exchange, bytes, topology, links);
    Row {
        operation,
        shared_memory: false,
        bytes,
        algorithm: taken.to_string(),
        microseconds: time(taken).as_secs_f64() * 1e6,
        faster: (time(best) < time(taken)).then(|| best.to_string()),
    }
}

impl Costs {
    /// For people.
    pub fn table(&self) -> String {
        let mut text = format!(
            "By the model of links: {} ranks on {} nodes; {}\n",
            self.ranks, self.nodes, self.between
        );
        for (shared, title) in [
            (true, "Between nodes, when the ranks of each have met in shared memory: what training does"),
            (false, "Between all ranks, over connections alone"),
        ] {
            let mut rows = self.rows.iter().filter(|row| row.shared_memory == shared).peekable();
            if rows.peek().is_some() {
                let _ =
                    write!(text, "\n{title}\noperation           bytes  algorithm                     µs\n");
            }
            for row in rows {
                let faster =
                    row.faster.as_ref().map_or(String::new(), |name| format!("  {name} is faster here"));
                let _ = writeln!(
                    text,
                    "{:<15} {:>9}  {:<18} {:>13.1}{faster}",
                    row.operation, row.bytes, row.algorithm, row.microseconds
                );
            }
        }
        text.trim_end().to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_operation_and_size_has_its_algorithm_and_time() {
        let costs = costs(Shape { ranks: 4, nodes: 2 }, &Links::ASSUMED, "x".into());
        assert_eq!(costs.rows.len(), 2 * 3 * SIZES.len());
        assert!(costs.rows.iter().all(|row| row.microseconds > 0.0));
        let of = |shared| costs.rows.iter().filter(move |row| row.shared_memory == shared);
        let longest = |shared| of(shared).map(|row| row.microseconds).fold(0.0, f64::max);
        assert!(longest(true) < longest(false), "shared memory helps");
        // The links that are assumed are those by which is chosen, but for sizes in between.
        assert!(of(false).all(|row| row.faster.is_none()), "{:?}", costs.rows);
        assert!(costs.table().contains("all_gather      268435456  "), "{}", costs.table());
        let one = super::costs(Shape { ranks: 4, nodes: 1 }, &Links::ASSUMED, "x".into());
        assert!(one.rows.iter().all(|row| !row.shared_memory));
    }
}
