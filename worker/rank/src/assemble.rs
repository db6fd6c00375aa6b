//! The choices of a rank: what computes, and where the numbers lie.

use crate::choice::{self, Memory, Pool};
use crate::fits::{Need, Setting, Settled};
use crate::{fits, gang, machine};
use fleet_collectives::nccl::{Library, Loaded, NcclCollective};
use fleet_collectives::{Gang, SharedHost};
use fleet_common::capability::{Refusal, Wanted};
use fleet_common::job::{self, ActivationCheckpointing, Job, Precision, Shape, Strategy};
use fleet_common::protocol::RankStart;
use fleet_cpu::{CpuExecutor, Network, Storage, workers};
use fleet_learn::model::Model;
use fleet_learn::strategy::{Sharded, Shared, Solo};
use fleet_learn::trainer::Made;
use fleet_learn::{Engine, Error, Host, Result, Stopwatch, TimedGang, Workers};
use fleet_torch::{HostTransport, NcclTransport, Numbers, Rooms, TorchExecutor, Transport};
use half::bf16;
use std::sync::Arc;
use tch::Device;

/// What rank `start` trains for `job`, with weights that are still zero. A collective call.
pub fn learner(start: &RankStart, job: &Job, model: &Model) -> Result<Made> {
    match place(&start.device) {
        Ok(Place::Host) => on_host(start, job, model, None),
        Ok(Place::Device(kind, device)) => on_device(start, job, model, kind, device),
        Err(why) if job.device == job::Device::Auto && start.world_size == 1 => {
            on_host(start, job, model, Some(format!("{why}: training on the CPU")))
        }
        Err(why) => Err(Error::Environment(format!("{why}; set device = \"cpu\" to train without it"))),
    }
}

/// Where a rank computes.
enum Place {
    Host,
    Device(job::Device, Device),
}

fn place(name: &str) -> std::result::Result<Place, String> {
    let kind = match name {
        "cpu" => return Ok(Place::Host),
        "mps" => job::Device::Mps,
        _ => job::Device::Cuda,
    };
    Ok(Place::Device(kind, fleet_torch::device::open(name)?))
}

fn on_host(start: &RankStart, job: &Job, model: &Model, note: Option<String>) -> Result<Made> {
    let wanted = Wanted::of(job, job::Device::Cpu, start.world_size);
    let made = match (wanted.executor().map_err(refused)?, job.precision) {
        (job::Executor::Torch, _) => return on_device(start, job, model, job::Device::Cpu, Device::Cpu),
        (_, Precision::Bf16Mixed) => on_cpu::<bf16>(start, job, model)?,
        _ => on_cpu::<f32>(start, job, model)?,
    };
    Ok(Made { note, ..made })
}

fn on_device(start: &RankStart, job: &Job, model: &Model, kind: job::Device, device: Device) -> Result<Made> {
    Wanted::of(job, kind, start.world_size).executor().map_err(refused)?;
    if job.activation_checkpointing != ActivationCheckpointing::None {
        return Err(Error::Input(
            "`activation_checkpointing` is of the executor cpu alone in this version of fleet; take it out, or set device = \"cpu\" and leave `executor` out".into(),
        ));
    }
    let numbers = match job.precision {
        Precision::Bf16Mixed => Numbers::BF16_MIXED,
        _ => Numbers::FP32,
    };
    if device == Device::Cpu {
        tch::set_num_threads(start.threads as i32);
    }
    let layout = model.layout();
    let executor = TorchExecutor::new(model.decoder.clone(), layout.clone(), device, numbers)
        .for_texts(job.max_seq_len as usize);
    let Some(mut gang) = gang::join(start, job.transport_encryption)? else {
        let strategy = fleet_torch::Solo::new(layout, device, numbers.products, start.generation)?;
        return Ok(Made { learner: Box::new(Engine::new(executor, strategy)), strategy: None, note: None });
    };
    let settled = settle_on_device(start, job, model, (device, numbers), &mut *gang)?;
    let watch = Stopwatch::default();
    let transport = transport(Box::new(TimedGang::new(gang, watch.clone())), device)?;
    let rooms = rooms_of(settled.strategy);
    let strategy = fleet_torch::Sharded::new(layout, rooms, device, numbers.products, transport)?;
    let learner = Box::new(Engine::new(executor, strategy).watched(watch));
    Ok(Made { learner, strategy: settled.reason, note: None })
}

fn rooms_of(strategy: Strategy) -> Rooms {
    match strategy {
        Strategy::Fsdp | Strategy::Hsdp => Rooms::TwoBlocks,
        Strategy::Auto | Strategy::Ddp => Rooms::Everything,
    }
}

/// As `fits::settle` chooses, and refuses nothing: what activations take is known by the CPU executor's alone. A collective call.
fn settle_on_device(
    start: &RankStart,
    job: &Job,
    model: &Model,
    (device, numbers): (Device, Numbers),
    gang: &mut dyn SharedHost,
) -> Result<Settled> {
    if job.strategy != Strategy::Auto {
        return Ok(Settled { strategy: job.strategy, reason: None });
    }
    let (bytes, from) = match fleet_torch::device::memory(device) {
        Some(bytes) => (bytes, Pool::Device),
        None => (machine::memory_bytes(), Pool::Node),
    };
    let [bytes, _] = fits::smallest([bytes; 2], Some(gang as &mut dyn Gang))?;
    let (layout, world) = (model.layout(), start.world_size as usize);
    let needs = |strategy| {
        let kept = fleet_torch::Sharded::needs(&layout, rooms_of(strategy), numbers.products, world);
        let setting = Setting { strategy, ..Setting::of(job, shape_of(start)) };
        kept.total() + Need::of(model, job.max_seq_len, &setting).activations
    };
    let chosen = choice::choose(shape_of(start), Memory { bytes, from }, needs);
    Ok(Settled { strategy: chosen.strategy, reason: Some(format!("strategy: {}", chosen.reason)) })
}

fn shape_of(start: &RankStart) -> Shape {
    Shape { ranks: start.world_size, nodes: start.hosts.max(1) }
}

/// Between CUDA devices over NCCL, else over the memory of the host. A collective call.
fn transport(gang: Box<dyn SharedHost>, device: Device) -> Result<Box<dyn Transport>> {
    let Device::Cuda(number) = device else { return Ok(Box::new(HostTransport::new(gang, device))) };
    let library = Loaded::open(number).map(|library| Box::new(library) as Box<dyn Library>);
    let nccl = NcclCollective::join(library, gang, gang::DEADLINE)?;
    Ok(Box::new(NcclTransport::new(nccl, device)))
}

fn refused(refusal: Refusal) -> Error {
    Error::Input(refusal.to_string())
}

fn on_cpu<E: Storage>(start: &RankStart, job: &Job, model: &Model) -> Result<Made> {
    let watch = Stopwatch::default();
    let gang = gang::join(start, job.transport_encryption)?;
    let mut gang = gang.map(|gang| Box::new(TimedGang::new(gang, watch.clone())));
    let Settled { strategy, reason } =
        fits::settle(job, model, shape_of(start), gang.as_deref_mut().map(|gang| gang as &mut dyn Gang))?;
    let layout = model.layout();
    let again = job.activation_checkpointing.of(layout.blocks.len());
    let threads = Threads { count: start.threads, again };
    let (executor, workers) = cpu::<E>(model, threads, job.max_seq_len as usize)?;
    let engine = match (gang, strategy) {
        (None, _) => Engine::new(executor, Solo::<E>::new(layout, workers, start.generation)?),
        (Some(gang), Strategy::Fsdp) => Engine::new(executor, Sharded::<E>::fully(layout, workers, gang)?),
        (Some(gang), Strategy::Hsdp) => {
            Engine::new(executor, Sharded::<E>::within_hosts(layout, workers, gang)?)
        }
        (Some(gang), Strategy::Auto | Strategy::Ddp) => {
            Engine::new(executor, Shared::<E>::new(layout, workers, gang)?)
        }
    };
    Ok(Made { learner: Box::new(engine.watched(watch)), strategy: reason, note: None })
}

/// How a pass computes.
#[derive(Clone, Copy)]
pub struct Threads {
    pub count: u32,
    /// So many blocks are computed a second time.
    pub again: usize,
}

fn cpu<E: Storage>(
    model: &Model,
    threads: Threads,
    positions: usize,
) -> Result<(CpuExecutor<E>, Arc<Workers>)> {
    let workers = workers(threads.count)?;
    let network = Network::new(model.decoder.clone(), model.layout(), positions);
    Ok((CpuExecutor::new(network, workers.clone()).computing_again(threads.again), workers))
}

/// A model on this machine's CPU alone, for sequences of at most `positions` tokens, with weights that are still zero.
pub fn solo<E: Storage>(model: &Model, threads: u32, positions: usize) -> Result<Engine<Host<E>>> {
    solo_with(model, Threads { count: threads, again: 0 }, positions)
}

/// As `solo`.
pub fn solo_with<E: Storage>(model: &Model, threads: Threads, positions: usize) -> Result<Engine<Host<E>>> {
    let (executor, workers) = cpu::<E>(model, threads, positions)?;
    Ok(Engine::new(executor, Solo::new(model.layout(), workers, 0)?))
}
