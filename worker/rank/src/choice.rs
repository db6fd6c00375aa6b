//! What `strategy = "auto"` is: the strategy that moves the least between ranks, of those that fit.

use crate::fits::size;
use fleet_common::job::{Shape, Strategy};

/// Of memory so much is left for the system and for programs.
const SPARE: usize = 10;

/// What ranks take their memory from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pool {
    /// The ranks of a node together.
    Node,
    /// Each rank from a device of its own.
    Device,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// Of the smallest node or device that the job has.
    pub bytes: usize,
    pub from: Pool,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Choice {
    pub strategy: Strategy,
    /// One line, which begins with the strategy.
    pub reason: String,
}

/// For several ranks, of which each `needs` so many bytes under a strategy, of `ways`. Ranks that are told the same choose the same.
pub fn choose(shape: Shape, memory: Memory, ways: &[Strategy], needs: impl Fn(Strategy) -> usize) -> Choice {
    let together = match memory.from {
        Pool::Node => shape.of_node() as usize,
        Pool::Device => 1,
    };
    let need = |strategy: Strategy| needs(strategy).saturating_mul(together);
    let limit = memory.bytes - memory.bytes / SPARE;
    let fitting = ways.iter().position(|strategy| need(*strategy) <= limit);
    // What came before it would be too much.
    let tried = &ways[..fitting.unwrap_or(ways.len())];
    let too_much: Vec<String> = tried
        .iter()
        .map(|strategy| format!("{} would need {}", word(*strategy), size(need(*strategy))))
        .collect();
    let all = size(memory.bytes);
    let place = match (memory.from, shape.nodes) {
        (Pool::Device, _) => "a device",
        (Pool::Node, 1) => "this node",
        (Pool::Node, _) => "the smallest node",
    };
    match fitting {
        Some(0) => {
            let fits = format!("{}: the model fits ({} of {all})", word(ways[0]), size(need(ways[0])));
            Choice { strategy: ways[0], reason: fits }
        }
        Some(at) => {
            let chosen = ways[at];
            let (name, need) = (word(chosen), size(need(chosen)));
            let reason = format!("{name}: {}, {name} needs {need}; {place} has {all}", too_much.join(", "));
            Choice { strategy: chosen, reason }
        }
        None => {
            let least = ways.iter().copied().min_by_key(|strategy| need(*strategy)).unwrap_or(Strategy::Fsdp);
            let reason = format!(
                "{}: nothing else needs less ({}); {place} has {all}",
                word(least),
                too_much.join(", ")
            );
            Choice { strategy: least, reason }
        }
    }
}

/// What several ranks can train by, from what moves least to what needs least.
pub fn in_order(shape: Shape) -> &'static [Strategy] {
    match shape.nodes > 1 && shape.of_node() > 1 {
        true => &[Strategy::Ddp, Strategy::Hsdp, Strategy::Fsdp],
        false => &[Strategy::Ddp, Strategy::Fsdp],
    }
}

/// Ranks that keep a model together, each with memory of its own.
pub fn together(strategy: Strategy, shape: Shape) -> usize {
    match strategy {
        Strategy::Hsdp => shape.of_node() as usize,
        Strategy::Auto | Strategy::Ddp | Strategy::Fsdp => shape.ranks as usize,
    }
}

/// As a job file has it.
pub fn word(strategy: Strategy) -> &'static str {
    match strategy {
        Strategy::Auto => "auto",
        Strategy::Ddp => "ddp",
        Strategy::Fsdp => "fsdp",
        Strategy::Hsdp => "hsdp",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: usize = 1 << 30;

    /// Each rank needs so many GiB under ddp, hsdp and fsdp.
    fn chosen(ranks: u32, nodes: u32, memory: usize, needs: [usize; 3]) -> Choice {
        let memory = Memory { bytes: memory * GIB, from: Pool::Node };
        let need = |strategy| match strategy {
            Strategy::Auto | Strategy::Ddp => needs[0] * GIB,
            Strategy::Hsdp => needs[1] * GIB,
            Strategy::Fsdp => needs[2] * GIB,
        };
        let shape = Shape { ranks, nodes };
        choose(shape, memory, in_order(shape), need)
    }

    #[test]
    fn the_first_that_fits_is_taken_and_the_line_says_why() {
        let table = [
            (chosen(2, 1, 24, [1, 9, 9]), Strategy::Ddp, "ddp: the model fits (2.0 GiB of 24 GiB)"),
            (
                chosen(2, 1, 24, [15, 4, 4]),
                Strategy::Fsdp,
                "fsdp: ddp would need 30 GiB, fsdp needs 8.0 GiB; this node has 24 GiB",
            ),
            (
                chosen(4, 2, 24, [12, 11, 4]),
                Strategy::Fsdp,
                "fsdp: ddp would need 24 GiB, hsdp would need 22 GiB, fsdp needs 8.0 GiB; the smallest node has 24 GiB",
            ),
            (
                chosen(4, 2, 24, [12, 9, 4]),
                Strategy::Hsdp,
                "hsdp: ddp would need 24 GiB, hsdp needs 18 GiB; the smallest node has 24 GiB",
            ),
            (
                chosen(2, 1, 2, [15, 4, 4]),
                Strategy::Fsdp,
                "fsdp: nothing else needs less (ddp would need 30 GiB, fsdp would need 8.0 GiB); this node has 2.0 GiB",
            ),
        ];
        for (found, strategy, reason) in table {
            assert_eq!(found, Choice { strategy, reason: reason.to_owned() });
        }
    }

    #[test]
    fn a_tenth_is_left_and_one_rank_on_a_node_shares_with_nobody_there() {
        assert_eq!(chosen(1, 1, 10, [9, 9, 9]).strategy, Strategy::Ddp);
        assert_eq!(chosen(1, 1, 100, [91, 9, 9]).strategy, Strategy::Fsdp);
        // Within a node of one rank nothing is sharded.
        assert_eq!(chosen(2, 2, 24, [23, 20, 4]).strategy, Strategy::Fsdp);
    }

    #[test]
    fn devices_are_each_rank_s_own() {
        let (shape, ways) = (Shape { ranks: 4, nodes: 1 }, [Strategy::Ddp, Strategy::Fsdp]);
        let on = |from| choose(shape, Memory { bytes: 24 * GIB, from }, &ways, |_| 10 * GIB);
        assert_eq!(on(Pool::Device).reason, "ddp: the model fits (10 GiB of 24 GiB)");
        assert_eq!(on(Pool::Node).strategy, Strategy::Ddp, "nothing needs less");
        assert!(on(Pool::Node).reason.contains("40 GiB"));
    }
}
