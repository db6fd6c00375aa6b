//! The choices of a rank: what computes, where the numbers lie, how the ranks reach each other.

use fleet_collectives::{Collective, ShmCollective};
use fleet_common::job::{Job, Precision, Strategy};
use fleet_common::protocol::RankStart;
use fleet_cpu::{CpuExecutor, Network, Storage, workers};
use fleet_learn::model::Model;
use fleet_learn::strategy::{Shared, Solo};
use fleet_learn::{Engine, Error, Host, Learner, Result, Workers};
use half::bf16;
use std::sync::Arc;
use std::time::Duration;

/// Longest wait for a peer: the others wait while rank 0 writes a checkpoint. A dead peer ends the gang at once by other means.
const DEADLINE: Duration = Duration::from_secs(900);

/// What rank `start` trains for `job`, with weights that are still zero. A collective call.
pub fn learner(start: &RankStart, job: &Job, model: &Model) -> Result<Box<dyn Learner>> {
    if start.device != "cpu" {
        return Err(Error::Environment(format!(
            "this fleet-rank trains on the CPU, not on {}; set device = \"cpu\"",
            start.device
        )));
    }
    if job.strategy == Strategy::Fsdp {
        return Err(Error::Input("strategy \"fsdp\" is not available yet; use \"ddp\"".into()));
    }
    match job.precision {
        Precision::Fp32 => on_cpu::<f32>(start, job, model),
        Precision::Bf16Mixed => on_cpu::<bf16>(start, job, model),
        Precision::Fp16Mixed | Precision::Bf16True => Err(Error::Input(
            "this precision is not available on the CPU; use \"32\" or \"bf16-mixed\"".into(),
        )),
    }
}

fn on_cpu<E: Storage>(start: &RankStart, job: &Job, model: &Model) -> Result<Box<dyn Learner>> {
    let (executor, workers) = cpu::<E>(model, start.threads, job.max_seq_len as usize)?;
    let layout = model.layout();
    Ok(match gang(start)? {
        None => Box::new(Engine::new(executor, Solo::<E>::new(layout, workers, start.generation))),
        Some(gang) => Box::new(Engine::new(executor, Shared::<E>::new(layout, workers, gang)?)),
    })
}

fn cpu<E: Storage>(model: &Model, threads: u32, positions: usize) -> Result<(CpuExecutor<E>, Arc<Workers>)> {
    let workers = workers(threads)?;
    let network = Network::new(model.decoder.clone(), model.layout(), positions);
    Ok((CpuExecutor::new(network, workers.clone()), workers))
}

/// A model on this machine's CPU alone, for sequences of at most `positions` tokens, with weights that are still zero.
pub fn solo<E: Storage>(model: &Model, threads: u32, positions: usize) -> Result<Engine<Host<E>>> {
    let (executor, workers) = cpu::<E>(model, threads, positions)?;
    Ok(Engine::new(executor, Solo::new(model.layout(), workers, 0)))
}

/// The peers, where there are any.
fn gang(start: &RankStart) -> Result<Option<Box<dyn Collective>>> {
    let (rank, world) = (start.rank as usize, start.world_size as usize);
    match (world, start.shm_fd) {
        (1, _) => Ok(None),
        (_, Some(fd)) => {
            let mut gang = ShmCollective::attach(fd, rank, world, start.generation)?;
            gang.set_deadline(DEADLINE);
            Ok(Some(Box::new(gang)))
        }
        (_, None) => {
            Err(Error::Environment("the agent gave no shared segment to a gang of several ranks".into()))
        }
    }
}
