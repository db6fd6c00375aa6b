//! The choices of a rank: what computes, and where the numbers lie.

use crate::{fits, gang};
use fleet_collectives::SharedHost;
use fleet_collectives::nccl::{Library, Loaded, NcclCollective};
use fleet_common::capability::{Refusal, Wanted};
use fleet_common::job::{self, Job, Precision, Strategy};
use fleet_common::protocol::RankStart;
use fleet_cpu::{CpuExecutor, Network, Storage, workers};
use fleet_learn::model::Model;
use fleet_learn::strategy::{Sharded, Shared, Solo};
use fleet_learn::trainer::Made;
use fleet_learn::{Engine, Error, Host, Learner, Result, Stopwatch, TimedGang, Workers};
use fleet_torch::{
    AloneTransport, HostTransport, Keeping, NcclTransport, Numbers, Rooms, TorchExecutor, Transport,
};
use half::bf16;
use std::sync::Arc;
use tch::Device;

/// What rank `start` trains for `job`, with weights that are still zero. A collective call.
pub fn learner(start: &RankStart, job: &Job, model: &Model) -> Result<Made> {
    let note = match place(&start.device) {
        Ok(Place::Device(kind, device)) => return on_device(start, job, model, kind, device),
        Ok(Place::Host) => None,
        Err(why) if job.device == job::Device::Auto && start.world_size == 1 => {
            Some(format!("{why}: training on the CPU"))
        }
        Err(why) => {
            return Err(Error::Environment(format!("{why}; set device = \"cpu\" to train without it")));
        }
    };
    let offload = job.offload_optimizer.then(|| OFFLOAD_ON_HOST.to_owned());
    let notes: Vec<String> = note.into_iter().chain(offload).collect();
    let note = (!notes.is_empty()).then(|| notes.join("; "));
    Ok(Made { note, ..on_host(start, job, model)? })
}

const OFFLOAD_ON_HOST: &str = "offload_optimizer changes nothing on the CPU: the optimizer's state is in the memory of the host already";

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

fn on_host(start: &RankStart, job: &Job, model: &Model) -> Result<Made> {
    let wanted = Wanted::of(job, job::Device::Cpu, start.world_size);
    let learner = match (wanted.executor().map_err(refused)?, job.precision) {
        (job::Executor::Torch, _) => return on_device(start, job, model, job::Device::Cpu, Device::Cpu),
        (_, Precision::Bf16True) => in_bf16(start, job, model)?,
        (_, Precision::Bf16Mixed) => on_cpu::<bf16>(start, job, model)?,
        _ => on_cpu::<f32>(start, job, model)?,
    };
    Ok(Made { learner, note: None })
}

fn on_device(start: &RankStart, job: &Job, model: &Model, kind: job::Device, device: Device) -> Result<Made> {
    Wanted::of(job, kind, start.world_size).executor().map_err(refused)?;
    let numbers = Numbers::from(job.precision);
    if device == Device::Cpu {
        fits::check(start, job, model)?;
        tch::set_num_threads(start.threads as i32);
    }
    let layout = model.layout();
    let executor = TorchExecutor::new(model.decoder.clone(), layout.clone(), device, numbers)
        .for_texts(job.max_seq_len as usize)
        .computing_again(job.activation_checkpointing.of(layout.blocks.len()));
    let rooms = Rooms::of(job.strategy);
    let keeping = Keeping { rooms, numbers, device, offload: job.offload_optimizer && device != Device::Cpu };
    let engine = match gang::join(start, job.transport_encryption)? {
        None if keeping.offload => {
            let transport = AloneTransport::new(fleet_collectives::Solo::new(start.generation), device);
            Engine::new(executor, fleet_torch::Sharded::new(layout, keeping, Box::new(transport))?)
        }
        None => {
            let strategy = fleet_torch::Solo::new(layout, device, numbers, start.generation)?;
            Engine::new(executor, strategy)
        }
        Some(gang) => {
            let watch = Stopwatch::default();
            let transport = transport(Box::new(TimedGang::new(gang, watch.clone())), device)?;
            let strategy = fleet_torch::Sharded::new(layout, keeping, transport)?;
            Engine::new(executor, strategy).watched(watch)
        }
    };
    let learner: Box<dyn Learner> = match job.precision {
        Precision::Fp16Mixed => Box::new(engine.scaling_losses()),
        _ => Box::new(engine),
    };
    Ok(Made { learner, note: None })
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

fn on_cpu<E: Storage>(start: &RankStart, job: &Job, model: &Model) -> Result<Box<dyn Learner>> {
    fits::check(start, job, model)?;
    let layout = model.layout();
    let again = job.activation_checkpointing.of(layout.blocks.len());
    let threads = Threads { count: start.threads, again };
    let (executor, workers) = cpu::<E>(model, threads, job.max_seq_len as usize)?;
    let watch = Stopwatch::default();
    let Some(gang) = gang::join(start, job.transport_encryption)? else {
        let strategy = Solo::<E>::new(layout, workers, start.generation)?;
        return Ok(Box::new(Engine::new(executor, strategy).watched(watch)));
    };
    let gang = Box::new(TimedGang::new(gang, watch.clone()));
    Ok(Box::new(
        match job.strategy {
            Strategy::Fsdp => Engine::new(executor, Sharded::<E>::fully(layout, workers, gang)?),
            Strategy::Hsdp => Engine::new(executor, Sharded::<E>::within_hosts(layout, workers, gang)?),
            Strategy::Auto | Strategy::Ddp => Engine::new(executor, Shared::<E>::new(layout, workers, gang)?),
        }
        .watched(watch),
    ))
}

fn in_bf16(start: &RankStart, job: &Job, model: &Model) -> Result<Box<dyn Learner>> {
    fits::check(start, job, model)?;
    let layout = model.layout();
    let again = job.activation_checkpointing.of(layout.blocks.len());
    let threads = Threads { count: start.threads, again };
    let (executor, workers) = cpu::<bf16>(model, threads, job.max_seq_len as usize)?;
    let watch = Stopwatch::default();
    let (gang, name): (Box<dyn SharedHost>, _) = match gang::join(start, job.transport_encryption)? {
        None => (Box::new(fleet_collectives::Solo::new(start.generation)), "solo"),
        Some(gang) => {
            let name = match job.strategy {
                Strategy::Fsdp => "fsdp",
                Strategy::Hsdp => "hsdp",
                Strategy::Auto | Strategy::Ddp => "ddp",
            };
            (Box::new(TimedGang::new(gang, watch.clone())), name)
        }
    };
    let strategy = Sharded::in_bf16(layout, workers, gang, name)?;
    Ok(Box::new(Engine::new(executor, strategy).watched(watch)))
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

/// A model on this machine's CPU alone in any precision, for sequences of at most `positions` tokens.
pub fn alone(
    executor: job::Executor,
    precision: Precision,
    model: &Model,
    threads: Threads,
    positions: usize,
) -> Result<Box<dyn Learner>> {
    Ok(match (executor, precision) {
        (job::Executor::Torch, _) => {
            tch::set_num_threads(threads.count as i32);
            let (numbers, layout) = (Numbers::from(precision), model.layout());
            let executor = TorchExecutor::new(model.decoder.clone(), layout.clone(), Device::Cpu, numbers);
            let strategy = fleet_torch::Solo::new(layout, Device::Cpu, numbers, 0)?;
            Box::new(Engine::new(executor.computing_again(threads.again), strategy))
        }
        (_, Precision::Bf16True) => Box::new(solo_in_bf16(model, threads, positions)?),
        (_, Precision::Bf16Mixed) => Box::new(solo_with::<bf16>(model, threads, positions)?),
        _ => Box::new(solo_with::<f32>(model, threads, positions)?),
    })
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

/// The same in bf16.
pub fn solo_in_bf16(model: &Model, threads: Threads, positions: usize) -> Result<Engine<Host<bf16>>> {
    let (executor, workers) = cpu::<bf16>(model, threads, positions)?;
    let gang = Box::new(fleet_collectives::Solo::new(0));
    Ok(Engine::new(executor, Sharded::in_bf16(model.layout(), workers, gang, "solo")?))
}
