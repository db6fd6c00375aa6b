//! How many ranks a job starts with, from the job's `devices` and the `-n` of the command line.

use super::error::Warning;
use super::load::RANKS_MAX;
use super::{Devices, Job, Strategy};

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum RanksError {
    #[error("`devices` asks for {devices} ranks and -n for {requested}; leave one of them out")]
    Disagree { devices: u32, requested: u32 },
    #[error("-n {0} is not a number of ranks from 1 to {RANKS_MAX}")]
    OutOfRange(u32),
}

impl Job {
    /// The number of ranks: `requested` (`-n`), else `devices`, else one. Any strategy with one rank becomes `auto`, and that is said.
    pub fn settle_ranks(&mut self, requested: Option<u32>) -> Result<(u32, Option<Warning>), RanksError> {
        let devices = match &self.devices {
            Devices::Auto => None,
            Devices::Count(n) => Some(*n),
            Devices::Ids(ids) => Some(ids.len() as u32),
        };
        let ranks = match (requested, devices) {
            (Some(requested), Some(devices)) if requested != devices => {
                return Err(RanksError::Disagree { devices, requested });
            }
            (requested, devices) => requested.or(devices).unwrap_or(1),
        };
        if !(1..=RANKS_MAX).contains(&ranks) {
            return Err(RanksError::OutOfRange(ranks));
        }
        if ranks > 1 || self.strategy == Strategy::Auto {
            return Ok((ranks, None));
        }
        let name = match std::mem::replace(&mut self.strategy, Strategy::Auto) {
            Strategy::Fsdp => "fsdp",
            Strategy::Hsdp => "hsdp",
            Strategy::Ddp | Strategy::Auto => "ddp",
        };
        let text = format!(
            "`strategy` = \"{name}\" with one rank: going on as \"auto\"; give -n or `devices` to train with more"
        );
        Ok((ranks, Some(Warning(text))))
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::job;
    use super::*;

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
            assert_eq!(job(text).settle_ranks(requested).map(|(n, _)| n), wanted, "{text} -n {requested:?}");
        }
    }

    #[test]
    fn a_strategy_with_one_rank_goes_on_as_auto_with_a_warning() {
        for name in ["ddp", "fsdp", "hsdp"] {
            let mut one = job(&format!("strategy = \"{name}\"\n"));
            let (ranks, warning) = one.settle_ranks(None).unwrap();
            assert_eq!((ranks, one.strategy), (1, Strategy::Auto));
            let warning = warning.unwrap().0;
            assert!(warning.contains("one rank") && warning.contains(name), "{warning}");
        }

        let mut four = job("strategy = \"ddp\"\n");
        assert_eq!(four.settle_ranks(Some(4)).unwrap(), (4, None));
        assert_eq!(four.strategy, Strategy::Ddp);
    }
}
