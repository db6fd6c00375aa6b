//! Jobs of random shape.

use super::machine::Machine;
use super::random::Random;
use fleet_common::ids::JobId;
use fleet_common::job::{Job, parse_toml};
use fleet_common::protocol::{
    Feature, NewExport, NewProfile, Program, Request, RunKey, SubmitJob, Wish, Work,
};
use std::collections::BTreeMap;

/// What machines are labelled with: every other one has the better device.
pub fn labels(machine: u32) -> BTreeMap<String, String> {
    let better = machine.is_multiple_of(2).then(|| ("gpu".to_owned(), "h200".to_owned()));
    better.into_iter().collect()
}

/// An export of this checkpoint.
pub fn export(job: JobId, step: u64) -> NewExport {
    let path = format!("/out/{job}/step-{step}.gguf");
    NewExport { job, step, format: "gguf".into(), path, bytes: 1000, sha256: format!("{step:064x}") }
}

/// What the data of this run looks like.
pub fn profile(run: RunKey) -> NewProfile {
    let (edges, counts) = (vec![0.0, 1.0, 2.0], vec![3, 4]);
    let feature = Feature { name: "length".into(), samples: 7, mean: 1.0, std_dev: 0.5, edges, counts };
    NewProfile { run, name: "train".into(), features: vec![feature] }
}

/// A job that fits when all machines are there and free. `name` is in no other job.
pub fn submit(name: &str, random: &mut Random, machines: &BTreeMap<u32, Machine>) -> Request {
    let wants_better = machines.len() > 1 && random.chance(1, 6);
    let labels = if wants_better { labels(2) } else { BTreeMap::new() };
    let fits = |machine: &&Machine| labels.iter().all(|(key, value)| machine.labels.get(key) == Some(value));
    let mut slots: Vec<u32> = machines.values().filter(fits).map(|machine| machine.slots).collect();
    slots.sort_unstable_by(|a, b| b.cmp(a));
    let largest = slots.first().copied().unwrap_or(1);
    let slots_per_rank = if largest >= 4 && random.chance(1, 6) { 2 } else { 1 };
    let trains = random.chance(2, 3);
    // Training asks for several nodes or keeps to one; any other program may have ranks wherever there is room.
    let spread = if trains { 2 * random.range(0..2) } else { random.range(0..3) };
    let (nodes, world_size) = match spread {
        // As many on each of some machines.
        0 => {
            let nodes = 1 + random.index(slots.len().min(3));
            let each = (slots[nodes - 1] / slots_per_rank).max(1);
            (Some(nodes as u32), nodes as u32 * (1 + random.range(0..u64::from(each)) as u32))
        }
        // Wherever there is room.
        1 => {
            let all: u32 = slots.iter().map(|slots| slots / slots_per_rank).sum();
            (None, 1 + random.range(0..u64::from(all.max(1))) as u32)
        }
        _ => (None, 1 + random.around(1).min(u64::from(largest / slots_per_rank) - 1) as u32),
    };
    let each = nodes.map_or(0, |nodes| world_size / nodes);
    let slots_per_rank = if nodes.is_some_and(|nodes| each * slots_per_rank > slots[nodes as usize - 1]) {
        1
    } else {
        slots_per_rank
    };
    let work = if trains {
        Work::Train { job_json: training(name, 3 + random.around(15), random.range(0..4) * 3).to_json() }
    } else {
        Work::Program(Program { argv: vec![name.to_owned()], working_dir: "/".into(), env: vec![] })
    };
    let wish = Wish {
        priority: random.range(0..3) as i32 - 1,
        nodes,
        slots_per_rank,
        labels,
        max_time_s: random.chance(1, 3).then(|| random.range(20..600)),
        queue: true,
    };
    Request::Submit(SubmitJob { world_size, work, wish })
}

/// Of so many steps, with a checkpoint every few of them.
pub fn training(name: &str, steps: u64, save_steps: u64) -> Job {
    let text = format!(
        r#"
        run_name = "{name}"
        output_dir = "/out"
        max_steps = {steps}
        save_steps = {save_steps}
        model.path = "/model"
        data.path = "/data"
        "#
    );
    parse_toml(&text, "/".as_ref()).expect("made of names and numbers that fit").0
}
