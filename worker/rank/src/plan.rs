//! What a job will need on CPUs such as this machine's, for each strategy and precision, before it runs: memory by what is known of the model,
//! speed by steps of the same model with fewer blocks, with the executor that a job of that precision has here, and by a model of the
//! links between nodes.

mod between;
mod costs;
mod speeds;
mod timeline;

use crate::choice;
use crate::fits::{self, Need, Setting};
use between::Between;
pub use between::links;
pub use costs::Costs;
use fleet_collectives::cost::Links;
use fleet_common::job::{Executor, Job, Precision, Shape, Strategy};
use fleet_learn::Result;
use fleet_learn::machine::{self, available_bytes, memory_bytes, program_bytes};
use fleet_learn::model::Model;
use fleet_torch::Numbers;
use serde::Serialize;
use speeds::{Run, Speeds};
use std::fmt::Write;
use timeline::{Step, Unit};

const PRECISIONS: [Precision; 4] =
    [Precision::Fp32, Precision::Bf16Mixed, Precision::Fp16Mixed, Precision::Bf16True];

#[derive(Debug, Serialize)]
pub struct Plan {
    pub parameters: u64,
    pub ranks: u32,
    pub nodes: u32,
    pub threads_per_rank: u32,
    /// Of this machine now, for all ranks of a node together.
    pub available_mib: u64,
    /// What else the machine does while speeds are measured, where that is much.
    pub busy: Option<String>,
    /// What is taken to be between several nodes.
    pub link: Option<String>,
    /// What the job's `auto` is where all nodes are as this machine, and why.
    pub auto: Option<String>,
    pub choices: Vec<Choice>,
}

/// One way to run the job. Memory is in MiB for each rank; what the ranks share is divided by their number.
#[derive(Debug, Serialize)]
pub struct Choice {
    pub strategy: Strategy,
    pub precision: Precision,
    pub weights_mib: u64,
    pub gradients_mib: u64,
    pub optimizer_mib: u64,
    pub activations_mib: u64,
    /// The copy that a checkpoint is written from.
    pub saving_mib: u64,
    /// Of the program and its libraries.
    pub program_mib: u64,
    pub peak_mib: u64,
    pub fits: bool,
    /// Of all ranks; `None`: few CPUs multiply fp16, so that is measured for jobs alone that ask for it.
    pub tokens_per_s: Option<f64>,
    /// What the job asks for.
    pub is_job: bool,
}

/// How a job is to be laid out.
pub struct Wanted {
    pub shape: Shape,
    pub links: Links,
    /// Somebody said what the links are.
    pub told: bool,
}

impl Wanted {
    /// How gangs of this shape choose their algorithms.
    pub fn costs(&self) -> Costs {
        costs::costs(self.shape, &self.links, between::describe(&self.links, self.told))
    }
}

/// For nodes that are all as this machine.
pub fn plan(job: &Job, wanted: &Wanted) -> Result<Plan> {
    let model = Model::of_job(job)?;
    let shape = wanted.shape;
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get() as u32);
    let threads_per_rank = job.threads_per_rank.unwrap_or(cores / shape.of_node()).max(1);
    let run = Run { job, model, ranks: shape.of_node() as usize, threads: threads_per_rank };
    let crowded = threads_per_rank * shape.of_node() >= cores;
    let mut between = Between::new(shape, wanted.links, job.transport_encryption, crowded)?;
    let program = program_bytes(run.ranks);
    let available = available_bytes();
    let busy = machine::busy(cores);
    let setting = Setting::of(job, shape);
    let auto = (job.strategy == Strategy::Auto && shape.ranks > 1)
        .then(|| fits::choose(&run.model, job.max_seq_len, &setting, (memory_bytes(), program)));
    let chosen = auto.as_ref().map_or(job.strategy, |choice| choice.strategy);
    let mut choices = Vec::new();
    for precision in PRECISIONS {
        let of_job = Setting { precision, ..setting };
        // An executor that the job names may not compute it.
        let Ok(executor) = of_job.computed_by() else { continue };
        let ways = strategies(&of_job, chosen).into_iter().map(|strategy| {
            let setting = Setting { strategy, ..of_job };
            let mut need = Need::of(&run.model, job.max_seq_len, &setting);
            let saving = fits::saving(&run.model, &setting);
            let mut program = program;
            if executor == Executor::Torch {
                need.activations = run.held_bytes(&setting);
                program += fleet_torch::PROGRAM;
            }
            let peak = need.total() + saving + program;
            (setting, need, (saving, program), peak)
        });
        let ways: Vec<_> = ways.collect();
        let fits = |peak: usize| peak.saturating_mul(run.ranks) <= available;
        let is_measured = precision != Precision::Fp16Mixed || job.precision == precision;
        // A step that does not fit is not tried.
        let is_measured =
            is_measured && run.model.adapter.is_none() && ways.iter().any(|(.., peak)| fits(*peak));
        let speeds = is_measured.then(|| run.speeds(executor, precision)).transpose()?;
        for (setting, Need { kept: needs, activations }, (saving, program), peak) in ways {
            let strategy = setting.strategy;
            choices.push(Choice {
                strategy,
                precision,
                weights_mib: mib(needs.weights),
                gradients_mib: mib(needs.gradients),
                optimizer_mib: mib(needs.optimizer),
                activations_mib: mib(activations),
                saving_mib: mib(saving),
                program_mib: mib(program),
                peak_mib: mib(peak),
                fits: fits(peak),
                tokens_per_s: speeds.as_ref().map(|speeds| run.tokens_per_s(speeds, &setting, &mut between)),
                is_job: precision == job.precision && is_chosen(strategy, chosen, shape),
            });
        }
    }
    Ok(Plan {
        parameters: run.model.layout().count(),
        ranks: shape.ranks,
        nodes: shape.nodes,
        threads_per_rank,
        available_mib: mib(available),
        busy,
        link: (shape.nodes > 1).then(|| between::describe(&wanted.links, wanted.told)),
        auto: auto.map(|choice| choice.reason),
        choices,
    })
}

/// Those that differ, with the one that the job has.
fn strategies(setting: &Setting, chosen: Strategy) -> Vec<Strategy> {
    let shape = setting.shape;
    if shape.ranks == 1 {
        return vec![Strategy::Auto];
    }
    let mut all = choice::in_order(shape).to_vec();
    if !all.iter().any(|strategy| is_chosen(*strategy, chosen, shape)) {
        all.push(chosen);
    }
    all
}

/// Whether a job with `wanted` runs as `strategy`.
fn is_chosen(strategy: Strategy, wanted: Strategy, shape: Shape) -> bool {
    match wanted {
        _ if shape.ranks == 1 => true,
        Strategy::Hsdp if shape.nodes == 1 => strategy == Strategy::Fsdp,
        wanted => strategy == wanted,
    }
}

impl Run<'_> {
    /// Of the torch executor's activations.
    fn held_bytes(&self, setting: &Setting) -> usize {
        let decoder = &self.model.decoder;
        let tokens = self.job.batch_size as usize * (self.job.max_seq_len as usize - 1);
        let again = setting.activation_checkpointing.of(decoder.layers);
        let trained = self.model.adapter.as_ref().map(|adapter| &adapter.trained);
        let numbers = Numbers::from(setting.precision);
        fleet_torch::held_bytes(fleet_torch::Pass { decoder, trained, numbers, tokens, again })
    }

    fn tokens_per_s(&self, speeds: &Speeds, setting: &Setting, between: &mut Between) -> f64 {
        let layout = self.model.layout();
        let shape = setting.shape;
        let micro = f64::from(self.job.accumulate_grad_batches);
        let numbers = layout.len as f64;
        let keeping = setting.keeping();
        let in_rooms = matches!(setting.strategy, Strategy::Fsdp | Strategy::Hsdp);
        let within = match setting.strategy {
            _ if shape.ranks == 1 => 0.0,
            _ if in_rooms => micro,
            _ => 1.0,
        };
        // What a rank updates.
        let updaters = if keeping.is_sharded_over_hosts() { shape.ranks } else { shape.of_node() };
        let mut end = numbers * (speeds.update / f64::from(updaters) + within * speeds.add);
        end += between.of_small_calls();
        let summed = if keeping.is_sharded_over_hosts() { between::SCATTERED } else { between::SUMMED };
        let collects = keeping.collects(&layout);
        let last = layout.units.len() - 1;
        let mut units = Vec::new();
        for (number, range) in layout.units.iter().enumerate() {
            let computed = match number {
                0 => Unit::default(),
                number if number == last => Unit { backward: speeds.edges, ..Unit::default() },
                _ => Unit { forward: speeds.forward, backward: speeds.backward, ..Unit::default() },
            };
            // Most blocks are collected for the forward and again for the backward, unless they stay.
            let once = number == 0 || number == last || !setting.reshard_after_forward;
            let times = if once { 1.0 } else { 2.0 * micro };
            let (unit, stolen) = between.add(computed, (summed, 4 * range.len()), collects[number], times);
            units.push(unit);
            end += stolen;
        }
        let micro_batches = self.job.accumulate_grad_batches;
        let step = Step { units, micro_batches, in_rooms, end }.seconds();
        let tokens = f64::from(shape.ranks) * micro * f64::from(self.job.batch_size);
        tokens * f64::from(self.job.max_seq_len) / step
    }
}

impl Plan {
    /// For people.
    pub fn table(&self) -> String {
        let on = if self.nodes > 1 { format!(" on {} nodes", self.nodes) } else { String::new() };
        let mut text = format!(
            "On the CPU of this machine: {:.1} M parameters; {} ranks{on} with {} threads each; {} MiB available here\n",
            self.parameters as f64 / 1e6,
            self.ranks,
            self.threads_per_rank,
            self.available_mib
        );
        if let Some(link) = &self.link {
            let _ = writeln!(text, "{link}");
        }
        if let Some(busy) = &self.busy {
            let _ = writeln!(text, "{busy}");
        }
        text.push('\n');
        text += "MiB per rank           weights  gradients  optimizer  activations  saving  program     peak  fits  tokens/s\n";
        for choice in &self.choices {
            let name = format!("{} {}", word(&choice.strategy), word(&choice.precision));
            let fits = if choice.fits { "yes" } else { "no" };
            let speed = choice.tokens_per_s.map_or_else(|| "-".to_owned(), |speed| format!("{speed:.0}"));
            let mark = if choice.is_job { "  <- the job" } else { "" };
            let _ = writeln!(
                text,
                "{name:<22} {:>7}  {:>9}  {:>9}  {:>11}  {:>6}  {:>7}  {:>7}  {fits:>4}  {speed:>8}{mark}",
                choice.weights_mib,
                choice.gradients_mib,
                choice.optimizer_mib,
                choice.activations_mib,
                choice.saving_mib,
                choice.program_mib,
                choice.peak_mib
            );
        }
        if let Some(reason) = &self.auto {
            let _ = write!(text, "\nstrategy = \"auto\" is {reason}");
        }
        text.trim_end().to_owned()
    }
}

/// As a job file has it.
fn word(value: &impl Serialize) -> String {
    serde_json::to_value(value).ok().and_then(|v| v.as_str().map(str::to_owned)).unwrap_or_default()
}

fn mib(bytes: usize) -> u64 {
    (bytes as u64).div_ceil(1 << 20)
}
