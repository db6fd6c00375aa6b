//! How many ranks a job starts with and on how many nodes, from the job's `devices` and `num_nodes` and from the command line.

use super::error::Warning;
use super::load::RANKS_MAX;
use super::{Devices, Job, Strategy};
use crate::capability::{Refusal, Wanted};

/// What the command line asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Asked {
    /// `-n`, of the whole job.
    pub ranks: Option<u32>,
    /// `--nodes`.
    pub nodes: Option<u32>,
}

/// What a job gets: as many ranks on each node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    pub ranks: u32,
    pub nodes: u32,
}

impl Shape {
    pub fn of_node(self) -> u32 {
        self.ranks / self.nodes
    }
}

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum RanksError {
    #[error("`devices` asks for {devices} ranks and -n for {requested}; leave one of them out")]
    Disagree { devices: u32, requested: u32 },
    #[error("`num_nodes` is {num_nodes} and --nodes {requested}; leave one of them out")]
    Nodes { num_nodes: u32, requested: u32 },
    #[error("{ranks} ranks cannot be divided evenly over {nodes} nodes; choose a number of ranks that can")]
    Uneven { ranks: u32, nodes: u32 },
    #[error("-n {0} is not a number of ranks from 1 to {RANKS_MAX}")]
    OutOfRange(u32),
    #[error("{0}")]
    Impossible(#[from] Refusal),
}

impl Job {
    /// Nodes: `--nodes`, else `num_nodes`, else one. Ranks: `-n`, else `devices` on each node, else one on each. Any strategy with one
    /// rank becomes `auto`, and that is said.
    pub fn settle_ranks(&mut self, asked: Asked) -> Result<(Shape, Option<Warning>), RanksError> {
        let nodes = match (asked.nodes, self.num_nodes) {
            (Some(requested), Some(num_nodes)) if requested != num_nodes => {
                return Err(RanksError::Nodes { num_nodes, requested });
            }
            (requested, num_nodes) => requested.or(num_nodes).unwrap_or(1).max(1),
        };
        let devices = match &self.devices {
            Devices::Auto => None,
            Devices::Count(n) => Some(n.saturating_mul(nodes)),
            Devices::Ids(ids) => Some((ids.len() as u32).saturating_mul(nodes)),
        };
        let ranks = match (asked.ranks, devices) {
            (Some(requested), Some(devices)) if requested != devices => {
                return Err(RanksError::Disagree { devices, requested });
            }
            (requested, devices) => requested.or(devices).unwrap_or(nodes),
        };
        if !(1..=RANKS_MAX).contains(&ranks) {
            return Err(RanksError::OutOfRange(ranks));
        }
        if !ranks.is_multiple_of(nodes) {
            return Err(RanksError::Uneven { ranks, nodes });
        }
        self.num_nodes = Some(nodes);
        let shape = Shape { ranks, nodes };
        // A device that is `auto` may be any.
        Wanted::of(self, self.device, ranks).executor()?;
        if ranks > 1 || self.strategy == Strategy::Auto {
            return Ok((shape, None));
        }
        let name = match self.strategy {
            Strategy::Auto => "auto",
            Strategy::Ddp => "ddp",
            Strategy::Fsdp => "fsdp",
            Strategy::Hsdp => "hsdp",
        };
        self.strategy = Strategy::Auto;
        let text = format!(
            "`strategy` = \"{name}\" with one rank: going on as \"auto\"; give -n or `devices` to train with more"
        );
        Ok((shape, Some(Warning(text))))
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::job;
    use super::*;

    fn settled(text: &str, ranks: Option<u32>, nodes: Option<u32>) -> Result<(u32, u32), RanksError> {
        job(text).settle_ranks(Asked { ranks, nodes }).map(|(shape, _)| (shape.ranks, shape.nodes))
    }

    #[test]
    fn the_command_line_and_devices_must_agree() {
        let table: [(&str, Option<u32>, Result<u32, RanksError>); 7] = [
            ("", None, Ok(1)),
            ("", Some(4), Ok(4)),
            ("devices = 2\n", None, Ok(2)),
            ("devices = 2\n", Some(2), Ok(2)),
            ("devices = [0, 3, 1]\n", None, Ok(3)),
            ("devices = 2\n", Some(4), Err(RanksError::Disagree { devices: 2, requested: 4 })),
            ("", Some(0), Err(RanksError::OutOfRange(0))),
        ];
        for (text, requested, wanted) in table {
            assert_eq!(settled(text, requested, None).map(|(n, _)| n), wanted, "{text} -n {requested:?}");
        }
    }

    #[test]
    fn nodes_have_as_many_ranks_each_and_devices_are_those_of_one() {
        assert_eq!(settled("", Some(8), Some(2)), Ok((8, 2)));
        assert_eq!(settled("num_nodes = 2\n", Some(8), None), Ok((8, 2)));
        assert_eq!(settled("num_nodes = 3\n", None, Some(3)), Ok((3, 3)));
        assert_eq!(settled("num_nodes = 2\ndevices = 4\n", None, None), Ok((8, 2)));
        assert_eq!(settled("devices = [0, 1]\n", Some(4), Some(2)), Ok((4, 2)));
        let uneven = settled("", Some(5), Some(2)).unwrap_err();
        assert_eq!(uneven, RanksError::Uneven { ranks: 5, nodes: 2 });
        let both = settled("num_nodes = 2\n", Some(6), Some(3)).unwrap_err().to_string();
        assert_eq!(both, "`num_nodes` is 2 and --nodes 3; leave one of them out");
        assert_eq!(settled("strategy = \"fsdp\"\n", Some(4), Some(2)), Ok((4, 2)));
        assert!(settled("num_nodes = 1000\ndevices = 1000\n", None, None).is_err());
        assert_eq!(settled("strategy = \"hsdp\"\nexecutor = \"torch\"\n", Some(4), Some(2)), Ok((4, 2)));
        let impossible = settled("device = \"mps\"\n", Some(2), Some(2)).unwrap_err();
        assert!(impossible.to_string().contains("use one node"), "{impossible}");
    }

    #[test]
    fn a_strategy_with_one_rank_goes_on_as_auto_with_a_warning() {
        for name in ["ddp", "fsdp", "hsdp"] {
            let mut one = job(&format!("strategy = \"{name}\"\n"));
            let (shape, warning) = one.settle_ranks(Asked::default()).unwrap();
            assert_eq!((shape.ranks, one.strategy), (1, Strategy::Auto));
            let warning = warning.unwrap().0;
            assert!(warning.contains("one rank") && warning.contains(name), "{warning}");
        }

        let mut four = job("strategy = \"ddp\"\n");
        let four_ranks = Asked { ranks: Some(4), nodes: None };
        assert_eq!(four.settle_ranks(four_ranks).unwrap(), (Shape { ranks: 4, nodes: 1 }, None));
        assert_eq!(four.strategy, Strategy::Ddp);
    }
}
