//! Blocks whose forward is computed a second time keep less between forward and backward.

#![allow(clippy::unwrap_used)] // a test may panic

use fleet_learn::model::Model;
use fleet_learn::strategy::{Micro, Strategy};
use fleet_learn::testing::{tiny_with, token_ids};
use fleet_learn::{Executor, TokenBatch};
use fleet_torch::{Numbers, Solo, TorchExecutor};
use serde_json::json;
use tch::Device;

const SEQ: usize = 256;
const BLOCKS: usize = 16;

/// Bytes that this process has had in memory at most.
fn peak() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<usize>().unwrap() << 10
}

/// By how much the peak grows with a pass over so many sequences.
fn pass(again: usize) -> usize {
    let config = tiny_with(json!({"num_hidden_layers": BLOCKS, "hidden_size": 64, "intermediate_size": 256}));
    let model = Model::new(&config).unwrap();
    let layout = model.layout();
    let executor = TorchExecutor::new(model.decoder, layout.clone(), Device::Cpu, Numbers::FP32);
    let mut executor = executor.computing_again(again);
    let mut solo = Solo::new(layout, Device::Cpu, Numbers::FP32, 1).unwrap();
    let ids = token_ids(16 * SEQ, 97, 1);
    let batch = TokenBatch { targets: ids.clone(), ids, weights: None, seq: SEQ };
    let before = peak();
    executor.forward_backward(solo.units(Micro { first: true, last: true }), &batch.view(), 1.0).unwrap();
    peak() - before
}

#[test]
#[cfg(target_os = "linux")]
fn blocks_that_are_computed_again_keep_less() {
    // The peak only grows: the smallest first.
    let all_again = pass(BLOCKS);
    let half_again = pass(BLOCKS / 2);
    let none_again = pass(0);
    assert!(
        half_again > all_again / 2 && none_again > all_again / 2,
        "{all_again}, {half_again}, {none_again}"
    );
}
