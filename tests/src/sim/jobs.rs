//! Jobs of random shape.

use super::machine::Machine;
use super::random::Random;
use fleet_common::job::*;
use fleet_common::protocol::{Program, Request, SubmitJob, Wish, Work};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// A job that some machine or other can run. `name` is in no other job.
pub fn submit(name: &str, random: &mut Random, machines: &BTreeMap<u32, Machine>) -> Request {
    let largest = machines.values().map(|machine| machine.slots).max().unwrap_or(1);
    let world_size = 1 + random.around(2).min(u64::from(largest) - 1) as u32;
    let work = if random.chance(1, 5) {
        Work::Program(Program { argv: vec![name.to_owned()], working_dir: "/".into(), env: vec![] })
    } else {
        Work::Train { job_json: training(name, 3 + random.around(15), random.range(0..4) * 3).to_json() }
    };
    Request::Submit(SubmitJob {
        world_size,
        work,
        wish: Wish { nodes: Some(1), queue: true, ..Wish::default() },
    })
}

fn training(name: &str, steps: u64, save_steps: u64) -> Job {
    Job {
        task_name: "t".into(),
        run_name: name.to_owned(),
        output_dir: "/out".into(),
        working_dir: "/".into(),
        seed: 1,
        strategy: Strategy::Auto,
        devices: Devices::Auto,
        num_nodes: 1,
        device: Device::Auto,
        precision: Precision::Fp32,
        batch_size: 1,
        accumulate_grad_batches: 1,
        max_seq_len: 8,
        epochs: 1,
        max_steps: Some(steps),
        logging_steps: 1,
        log_to_db: false,
        max_time_s: None,
        threads_per_rank: None,
        model: Model::Pretrained("/model".into()),
        tokenizer: Tokenizer::Train { vocab_size: 300 },
        data: Data {
            paths: vec![PathBuf::from("/data")],
            include: vec![],
            exclude: vec![],
            text_field: "text".into(),
            validation_fraction: 0.1,
            clean: Clean::default(),
        },
        optimizer: Optimizer {
            learning_rate: 0.1,
            schedule: Schedule::Constant,
            warmup_steps: 0,
            min_lr_ratio: 0.0,
            weight_decay: 0.0,
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            max_grad_norm: 1.0,
        },
        checkpoint: Checkpoint { save_steps, save_total_limit: 2, resume: Resume::No },
        eval: Eval { eval_steps: 0, batch_size: 1, max_eval_examples: None },
    }
}
