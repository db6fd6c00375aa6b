//! What this version can do, as one table. The job's parser asks it what is possible at all, the agent what is possible on its machine, the
//! rank what computes. Every family of models (`crate::model`) works in every row.

use crate::job::{Device, Executor, Job, Precision, RANKS_MAX, Strategy};
use Precision::{Bf16Mixed, Bf16True, Fp16Mixed, Fp32};

/// Where there is NVIDIA's driver, there is this file.
pub const CUDA_DRIVER: &str = "/dev/nvidiactl";

/// Something that is built and tested.
struct Row {
    executor: Executor,
    device: Device,
    precisions: &'static [Precision],
    strategies: &'static [Strategy],
    /// Of one job.
    ranks_max: u32,
    /// Whether it trains on several nodes.
    over_nodes: bool,
}

/// Of libtorch, where it is tested.
const PRECISIONS: &[Precision] = &[Fp32, Bf16Mixed, Fp16Mixed, Bf16True];

const ALL: &[Strategy] = &[Strategy::Auto, Strategy::Ddp, Strategy::Fsdp, Strategy::Hsdp];

/// In the order in which they are preferred.
const TABLE: [Row; 4] = [
    Row {
        executor: Executor::Cpu,
        device: Device::Cpu,
        precisions: &[Fp32, Bf16Mixed, Bf16True],
        strategies: ALL,
        ranks_max: RANKS_MAX,
        over_nodes: true,
    },
    Row {
        executor: Executor::Torch,
        device: Device::Cuda,
        precisions: PRECISIONS,
        strategies: ALL,
        ranks_max: RANKS_MAX,
        over_nodes: true,
    },
    Row {
        executor: Executor::Torch,
        device: Device::Mps,
        precisions: &[Fp32],
        strategies: &[Strategy::Auto],
        // A machine has one such device.
        ranks_max: 1,
        over_nodes: false,
    },
    Row {
        executor: Executor::Torch,
        device: Device::Cpu,
        precisions: PRECISIONS,
        strategies: ALL,
        ranks_max: RANKS_MAX,
        over_nodes: true,
    },
];

/// What a job asks of a machine.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Wanted {
    pub device: Device,
    pub executor: Executor,
    pub precision: Precision,
    pub strategy: Strategy,
    pub ranks: u32,
    pub nodes: u32,
}

/// What it cannot have, and what to write instead: the end of a line about `key`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{key}` = {value} {reason}")]
pub struct Refusal {
    /// Of the job.
    pub key: &'static str,
    pub value: String,
    pub reason: String,
}

impl Wanted {
    /// Whatever there is.
    pub const ANYTHING: Wanted = Wanted {
        device: Device::Auto,
        executor: Executor::Auto,
        precision: Fp32,
        strategy: Strategy::Auto,
        ranks: 1,
        nodes: 1,
    };

    /// Of a job with `ranks` ranks on `device`.
    pub fn of(job: &Job, device: Device, ranks: u32) -> Wanted {
        let strategy = if ranks == 1 { Strategy::Auto } else { job.strategy };
        let nodes = job.num_nodes.unwrap_or(1);
        Wanted { device, executor: job.executor, precision: job.precision, strategy, ranks, nodes }
    }

    /// What computes it, never `Executor::Auto`. A device that is `Auto` may be any.
    pub fn executor(&self) -> Result<Executor, Refusal> {
        TABLE
            .iter()
            .find(|row| self.mismatch(row).is_none())
            .map(|row| row.executor)
            .ok_or_else(|| self.refusal())
    }

    /// How many things of the row are others than what is wanted; the first of them.
    fn mismatch(&self, row: &Row) -> Option<(usize, Key)> {
        let misses = [
            (Key::Device, self.device != Device::Auto && self.device != row.device),
            (Key::Executor, self.executor != Executor::Auto && self.executor != row.executor),
            (Key::Strategy, !row.strategies.contains(&self.strategy)),
            (Key::Precision, !row.precisions.contains(&self.precision)),
            (Key::Nodes, self.nodes > 1 && !row.over_nodes),
            (Key::Ranks, self.ranks > row.ranks_max),
        ];
        let missed: Vec<Key> = misses.iter().filter(|(_, misses)| *misses).map(|(key, _)| *key).collect();
        missed.first().map(|first| (missed.len(), *first))
    }

    /// By the row that comes nearest: on the device, which is what a machine has, and with the executor, where that computes there.
    fn refusal(&self) -> Refusal {
        let on_device = TABLE.iter().filter(|row| self.device == Device::Auto || self.device == row.device);
        let by_executor = |row: &&Row| self.executor == row.executor;
        let rows: Vec<&Row> = match on_device.clone().any(|row| by_executor(&row)) {
            true => on_device.filter(by_executor).collect(),
            false => on_device.collect(),
        };
        // Of two that come as near the one that computes in this precision.
        let distance = |row: &&Row| self.mismatch(row).map(|(count, key)| (count, key == Key::Precision));
        let nearest = rows.into_iter().min_by_key(distance);
        let Some((row, (_, key))) = nearest.and_then(|row| Some((row, self.mismatch(row)?))) else {
            return Refusal {
                key: "device",
                value: quoted(&self.device),
                reason: "is not in this version of fleet".into(),
            };
        };
        let device = name(&row.device);
        let (key, value, reason) = match key {
            Key::Device => ("device", quoted(&self.device), "is not in this version of fleet".to_owned()),
            Key::Executor => (
                "executor",
                quoted(&self.executor),
                format!(
                    "does not compute on the device {device}; leave it out, or write {}",
                    quoted(&row.executor)
                ),
            ),
            Key::Strategy => (
                "strategy",
                quoted(&self.strategy),
                format!(
                    "is not in this version of fleet with {} on the device {device}; use \"auto\"",
                    name(&row.executor)
                ),
            ),
            Key::Precision => {
                let known: Vec<String> = row.precisions.iter().map(quoted).collect();
                let known = known.join(" or ");
                let mut others = TABLE.iter().filter(|other| other.device == row.device);
                let reason = match others.any(|other| other.precisions.contains(&self.precision)) {
                    true => format!(
                        "is not computed by the executor {}; leave `executor` out, or write {known}",
                        name(&row.executor)
                    ),
                    false => {
                        format!("is not in this version of fleet; on the device {device} write {known}")
                    }
                };
                ("precision", quoted(&self.precision), reason)
            }
            Key::Nodes => (
                "num_nodes",
                self.nodes.to_string(),
                format!(
                    "is more than the one node that {} trains on with the device {device} in this version of fleet; use one node, or device = \"cpu\" without `executor`",
                    name(&row.executor)
                ),
            ),
            Key::Ranks => (
                "devices",
                self.ranks.to_string(),
                format!(
                    "is more than the one rank that this version of fleet trains with on the device {device}; use one rank, or device = \"cpu\""
                ),
            ),
        };
        Refusal { key, value, reason }
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Key {
    Device,
    Executor,
    Strategy,
    Precision,
    Nodes,
    Ranks,
}

/// As a job file has it.
fn name(value: &impl serde::Serialize) -> String {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::String(name)) => name,
        other => unreachable!("{other:?}: these are words"),
    }
}

fn quoted(value: &impl serde::Serialize) -> String {
    format!("\"{}\"", name(value))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ANY: Wanted = Wanted::ANYTHING;

    #[test]
    fn each_device_has_what_computes_it() {
        for (device, executor) in
            [(Device::Cpu, Executor::Cpu), (Device::Cuda, Executor::Torch), (Device::Mps, Executor::Torch)]
        {
            assert_eq!(Wanted { device, ..ANY }.executor(), Ok(executor));
        }
        assert_eq!(
            Wanted { device: Device::Cpu, executor: Executor::Torch, ..ANY }.executor(),
            Ok(Executor::Torch)
        );
        let ddp =
            Wanted { device: Device::Cpu, strategy: Strategy::Ddp, ranks: 4, precision: Bf16Mixed, ..ANY };
        assert_eq!(ddp.executor(), Ok(Executor::Cpu));
        assert_eq!(Wanted { nodes: 2, ..ddp }.executor(), Ok(Executor::Cpu));
        for (device, precision, executor) in [
            (Device::Cpu, Bf16True, Executor::Cpu),
            (Device::Cuda, Bf16True, Executor::Torch),
            (Device::Cpu, Fp16Mixed, Executor::Torch),
            (Device::Cuda, Fp16Mixed, Executor::Torch),
        ] {
            assert_eq!(Wanted { device, precision, ..ANY }.executor(), Ok(executor));
        }
        let over_nodes = Wanted { device: Device::Cpu, precision: Fp16Mixed, ranks: 2, nodes: 2, ..ANY };
        assert_eq!(over_nodes.executor(), Ok(Executor::Torch));
        for device in [Device::Cpu, Device::Cuda] {
            for strategy in [Strategy::Ddp, Strategy::Fsdp, Strategy::Hsdp] {
                let several = Wanted { device, executor: Executor::Torch, strategy, ranks: 4, ..ANY };
                assert_eq!(several.executor(), Ok(Executor::Torch));
                assert_eq!(Wanted { nodes: 2, ..several }.executor(), Ok(Executor::Torch));
            }
        }
    }

    #[test]
    fn a_refusal_names_the_key_that_is_at_fault_and_what_to_write() {
        let table = [
            (Wanted { strategy: Strategy::Fsdp, device: Device::Mps, ..ANY }, "strategy", "\"auto\""),
            (
                Wanted { precision: Fp16Mixed, executor: Executor::Cpu, ..ANY },
                "precision",
                "leave `executor` out",
            ),
            (Wanted { precision: Bf16True, device: Device::Mps, ..ANY }, "precision", "mps"),
            (Wanted { precision: Bf16Mixed, device: Device::Mps, ..ANY }, "precision", "\"32\""),
            (Wanted { device: Device::Mps, ranks: 2, ..ANY }, "devices", "mps"),
            (Wanted { device: Device::Mps, nodes: 2, ..ANY }, "num_nodes", "one node"),
            (Wanted { device: Device::Cuda, executor: Executor::Cpu, ..ANY }, "executor", "\"torch\""),
        ];
        for (wanted, key, word) in table {
            let refusal = wanted.executor().unwrap_err();
            assert_eq!(refusal.key, key, "{wanted:?}: {refusal}");
            assert!(refusal.to_string().contains(word), "{refusal}");
        }
    }
}
