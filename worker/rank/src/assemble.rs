//! The choices of a rank: what computes, and where the numbers lie.

use crate::choice::{self, Pool};
use crate::fits::Settled;
use crate::place::Place;
use crate::{fits, gang, place};
use fleet_checkpoint::ModelDir;
use fleet_collectives::nccl::{Among, Library, Loaded, NcclCollective};
use fleet_collectives::{Gang, SharedHost};
use fleet_common::capability::{Refusal, Wanted};
use fleet_common::job::{self, Job, Precision, Shape, Strategy};
use fleet_common::protocol::RankStart;
use fleet_cpu::{CpuExecutor, Network, Storage, workers};
use fleet_learn::adapter::{Frozen, Kept};
use fleet_learn::machine;
use fleet_learn::model::Model;
use fleet_learn::strategy::{Resident, Sharded, Shared, Solo};
use fleet_learn::trainer::Made;
use fleet_learn::units::Memory;
use fleet_learn::{Engine, Error, Host, Learner, Result, Stopwatch, TimedGang, Workers};
use fleet_torch::{
    AloneTransport, Base, Held, HostTransport, Keeping, NcclTransport, Numbers, TorchExecutor, Transport,
};
use half::bf16;
use std::sync::Arc;
use tch::Device;

/// The ranks that train together, where there are several.
type Peers = Option<Box<dyn SharedHost>>;

/// What rank `start` trains for `job`, with weights that are still zero. A collective call.
pub fn learner(start: &RankStart, job: &Job, model: &Model) -> Result<Made> {
    let is_open = job.device == job::Device::Auto;
    let found = match place::find(&start.device) {
        Err(why) if !is_open => {
            return Err(Error::Environment(format!("{why}; set device = \"cpu\" to train without it")));
        }
        found => found,
    };
    let mut peers = gang::join(start, job.transport_encryption)?;
    let gang = peers.as_deref_mut().filter(|_| is_open).map(|gang| gang as &mut dyn Gang);
    let (place, note) = place::agree(found, gang)?;
    if let Place::Device(kind, device) = place {
        return on_device(start, job, model, peers, (kind, device));
    }
    let offload = (job.offload_optimizer && start.rank == 0).then(|| OFFLOAD_ON_HOST.to_owned());
    let notes: Vec<String> = note.into_iter().chain(offload).collect();
    let note = (!notes.is_empty()).then(|| notes.join("; "));
    Ok(Made { note, ..on_host(start, job, model, peers)? })
}

const OFFLOAD_ON_HOST: &str = "offload_optimizer changes nothing on the CPU: the optimizer's state is in the memory of the host already";

fn on_host(start: &RankStart, job: &Job, model: &Model, peers: Peers) -> Result<Made> {
    let wanted = Wanted::of(job, job::Device::Cpu, start.world_size);
    match (wanted.executor().map_err(refused)?, job.precision) {
        (job::Executor::Torch, _) => on_device(start, job, model, peers, (job::Device::Cpu, Device::Cpu)),
        (_, Precision::Bf16True) => in_bf16(start, job, model, peers),
        (_, Precision::Bf16Mixed) => on_cpu::<bf16>(start, job, model, peers),
        _ => on_cpu::<f32>(start, job, model, peers),
    }
}

fn on_device(
    start: &RankStart,
    job: &Job,
    model: &Model,
    mut gang: Peers,
    (kind, device): (job::Device, Device),
) -> Result<Made> {
    Wanted::of(job, kind, start.world_size).executor().map_err(refused)?;
    let numbers = Numbers::from(job.precision);
    if device == Device::Cpu {
        tch::set_num_threads(start.threads as i32);
    }
    let layout = model.trained_layout();
    let settled = match device {
        Device::Cpu => {
            fits::settle(job, model, shape_of(start), gang.as_deref_mut().map(|gang| gang as &mut dyn Gang))?
        }
        _ => settle_on_device(start, job, model, (device, numbers), gang.as_deref_mut())?,
    };
    let executor = torch(model, device, numbers, start.threads, gang.as_deref_mut())?
        .for_texts(job.max_seq_len as usize)
        .computing_again(job.activation_checkpointing.of(model.decoder.layers));
    let keeping = Keeping {
        held: Held::of(settled.strategy, job.reshard_after_forward),
        numbers,
        device,
        offload: job.offload_optimizer && device != Device::Cpu,
    };
    let engine = match gang {
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
            let gang = Box::new(TimedGang::new(gang, watch.clone()));
            let transport = transport(gang, device, settled.strategy == Strategy::Hsdp)?;
            let strategy = fleet_torch::Sharded::new(layout, keeping, transport)?;
            Engine::new(executor, strategy).watched(watch)
        }
    }
    .of(model)
    .read_by(start.threads);
    let learner: Box<dyn Learner> = match job.precision {
        Precision::Fp16Mixed => Box::new(engine.scaling_losses()),
        _ => Box::new(engine),
    };
    Ok(Made { learner, strategy: settled.reason, note: None })
}

/// With the model that stays as it is, where an adapter is trained. A collective call.
fn torch(
    model: &Model,
    device: Device,
    numbers: Numbers,
    threads: u32,
    gang: Option<&mut (dyn SharedHost + 'static)>,
) -> Result<TorchExecutor> {
    let executor = TorchExecutor::new(model.decoder.clone(), model.wiring(), device, numbers);
    let Some(adapter) = &model.adapter else { return Ok(executor) };
    let mut alone = fleet_collectives::Solo::new(0);
    let gang = gang.map_or(&mut alone as &mut dyn SharedHost, |gang| gang);
    Ok(executor.beside(Base::read(adapter, numbers, device, gang, threads as usize)?))
}

/// As `fits::settle` chooses, by the memory of the devices; refuses nothing. A collective call.
fn settle_on_device(
    start: &RankStart,
    job: &Job,
    model: &Model,
    (device, numbers): (Device, Numbers),
    gang: Option<&mut (dyn SharedHost + 'static)>,
) -> Result<Settled> {
    let Some(gang) = gang.filter(|_| job.strategy == Strategy::Auto) else {
        return Ok(Settled { strategy: job.strategy, reason: None });
    };
    let (layout, shape) = (model.trained_layout(), shape_of(start));
    let sharing = if device == Device::Cpu { shape.of_node() as usize } else { 1 };
    let beside = fits::beside_on_torch(model, numbers, sharing);
    let (bytes, from, program) = match fleet_torch::device::memory(device) {
        Some(bytes) => (bytes, Pool::Device, 0),
        None => {
            let program = machine::program_bytes(shape.of_node() as usize) + fleet_torch::PROGRAM;
            (machine::memory_bytes(), Pool::Node, program)
        }
    };
    let [bytes, _, program] = fits::worst([bytes; 2], program, Some(gang as &mut dyn Gang))?;
    let tokens = job.batch_size as usize * (job.max_seq_len as usize - 1);
    let again = job.activation_checkpointing.of(model.decoder.layers);
    let trained = model.adapter.as_ref().map(|adapter| &adapter.trained);
    let decoder = &model.decoder;
    let pass = fleet_torch::Pass { decoder, trained, numbers, tokens, again };
    let activations = fleet_torch::activation_bytes(pass);
    let needs = |strategy| {
        let held = Held::of(strategy, job.reshard_after_forward);
        let together = choice::together(strategy, shape);
        fleet_torch::needs(&layout, held, numbers, together).total() + beside + activations + program
    };
    let chosen = choice::choose(shape, choice::Memory { bytes, from }, choice::in_order(shape), needs);
    Ok(Settled { strategy: chosen.strategy, reason: Some(format!("strategy: {}", chosen.reason)) })
}

fn shape_of(start: &RankStart) -> Shape {
    Shape { ranks: start.world_size, nodes: start.hosts.max(1) }
}

/// Between CUDA devices over NCCL, else over the memory of the host; the ranks of each host keep a model together, or all of them. A collective
/// call.
fn transport(gang: Box<dyn SharedHost>, device: Device, within_hosts: bool) -> Result<Box<dyn Transport>> {
    let Device::Cuda(number) = device else {
        let transport = HostTransport::new(gang, device);
        return Ok(Box::new(if within_hosts { transport.within_hosts() } else { transport }));
    };
    let library = Loaded::open(number).map(|library| Box::new(library) as Box<dyn Library>);
    let among = if within_hosts { Among::Hosts } else { Among::All };
    let nccl = NcclCollective::join(library, gang, among, gang::DEADLINE)?;
    Ok(Box::new(NcclTransport::new(nccl, device)))
}

fn refused(refusal: Refusal) -> Error {
    Error::Input(refusal.to_string())
}

/// The peers, where there are any, and what the job runs as. A collective call.
fn settle_on_cpu(
    start: &RankStart,
    job: &Job,
    model: &Model,
    peers: Peers,
    watch: &Stopwatch,
) -> Result<(Peers, Settled)> {
    let mut gang = peers.map(|gang| Box::new(TimedGang::new(gang, watch.clone())));
    let peers = gang.as_deref_mut().map(|gang| gang as &mut dyn Gang);
    let settled = fits::settle(job, model, shape_of(start), peers)?;
    Ok((gang.map(|gang| gang as Box<dyn SharedHost>), settled))
}

fn on_cpu<E: Storage>(start: &RankStart, job: &Job, model: &Model, peers: Peers) -> Result<Made> {
    let watch = Stopwatch::default();
    let (gang, Settled { strategy, reason }) = settle_on_cpu(start, job, model, peers, &watch)?;
    let layout = model.trained_layout();
    let (executor, workers) = cpu::<E>(model, Threads::of(start, job, model), job.max_seq_len as usize)?;
    let mut gang = gang;
    let executor = beside(executor, model, Kept::of(job.precision), start.threads, gang.as_deref_mut())?;
    let engine = match (gang, strategy) {
        (None, _) => Engine::new(executor, Solo::<E>::new(layout, workers, start.generation)?),
        (Some(gang), Strategy::Fsdp) => {
            let resident = Resident::of(job.reshard_after_forward);
            Engine::new(executor, Sharded::<E>::fully(layout, workers, gang, resident)?)
        }
        (Some(gang), Strategy::Hsdp) => {
            Engine::new(executor, Sharded::<E>::within_hosts(layout, workers, gang)?)
        }
        (Some(gang), Strategy::Auto | Strategy::Ddp) => {
            Engine::new(executor, Shared::<E>::new(layout, workers, gang)?)
        }
    };
    Ok(Made { learner: learning(engine, model, watch, start), strategy: reason, note: None })
}

fn learning<M: Memory>(
    engine: Engine<M>,
    model: &Model,
    watch: Stopwatch,
    start: &RankStart,
) -> Box<dyn Learner> {
    Box::new(engine.of(model).watched(watch).read_by(start.threads))
}

/// With the model that stays as it is, where an adapter is trained. A collective call.
fn beside<E: Storage>(
    executor: CpuExecutor<E>,
    model: &Model,
    kept: Kept,
    threads: u32,
    gang: Option<&mut (dyn SharedHost + 'static)>,
) -> Result<CpuExecutor<E>> {
    let Some(adapter) = &model.adapter else { return Ok(executor) };
    let mut alone = fleet_collectives::Solo::new(0);
    let gang = match gang {
        Some(gang) => gang as &mut dyn SharedHost,
        None => &mut alone,
    };
    let base = ModelDir::open(&adapter.base)?;
    let frozen = Frozen::read(&base, kept, &adapter.few_bits, gang, threads as usize)?;
    Ok(executor.beside(frozen, adapter.trained.clone()))
}

fn in_bf16(start: &RankStart, job: &Job, model: &Model, peers: Peers) -> Result<Made> {
    let watch = Stopwatch::default();
    let (gang, Settled { strategy, reason }) = settle_on_cpu(start, job, model, peers, &watch)?;
    let (executor, workers) = cpu::<bf16>(model, Threads::of(start, job, model), job.max_seq_len as usize)?;
    let (mut gang, name) = match (gang, strategy) {
        (None, _) => {
            (Box::new(fleet_collectives::Solo::new(start.generation)) as Box<dyn SharedHost>, "solo")
        }
        (Some(gang), Strategy::Fsdp) => (gang, "fsdp"),
        (Some(gang), Strategy::Hsdp) => (gang, "hsdp"),
        (Some(gang), Strategy::Auto | Strategy::Ddp) => (gang, "ddp"),
    };
    let executor = beside(executor, model, Kept::Bf16, start.threads, Some(&mut *gang))?;
    let engine = Engine::new(executor, Sharded::in_bf16(model.trained_layout(), workers, gang, name)?);
    Ok(Made { learner: learning(engine, model, watch, start), strategy: reason, note: None })
}

/// How a pass computes.
#[derive(Clone, Copy)]
pub struct Threads {
    pub count: u32,
    /// So many blocks are computed a second time.
    pub again: usize,
}

impl Threads {
    fn of(start: &RankStart, job: &Job, model: &Model) -> Threads {
        Threads { count: start.threads, again: job.activation_checkpointing.of(model.decoder.layers) }
    }
}

fn cpu<E: Storage>(
    model: &Model,
    threads: Threads,
    positions: usize,
) -> Result<(CpuExecutor<E>, Arc<Workers>)> {
    let workers = workers(threads.count)?;
    let network = Network::new(model.decoder.clone(), model.wiring(), positions);
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
            let (numbers, layout) = (Numbers::from(precision), model.trained_layout());
            let executor =
                torch(model, Device::Cpu, numbers, threads.count, None)?.computing_again(threads.again);
            let strategy = fleet_torch::Solo::new(layout, Device::Cpu, numbers, 0)?;
            Box::new(Engine::new(executor, strategy).of(model).read_by(threads.count))
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
    let kept = if E::IS_BF16 { Kept::Mixed } else { Kept::Fp32 };
    let executor = beside(executor, model, kept, threads.count, None)?;
    let engine = Engine::new(executor, Solo::new(model.trained_layout(), workers, 0)?);
    Ok(engine.of(model).read_by(threads.count))
}

/// The same in bf16.
pub fn solo_in_bf16(model: &Model, threads: Threads, positions: usize) -> Result<Engine<Host<bf16>>> {
    let (executor, workers) = cpu::<bf16>(model, threads, positions)?;
    let executor = beside(executor, model, Kept::Bf16, threads.count, None)?;
    let gang = Box::new(fleet_collectives::Solo::new(0));
    let engine = Engine::new(executor, Sharded::in_bf16(model.trained_layout(), workers, gang, "solo")?);
    Ok(engine.of(model).read_by(threads.count))
}
