//! A job that this process trains alone, without a cluster: what an agent does for a rank is done here, and the rank is a thread.

use crate::assemble;
use fleet_checkpoint::{Claim, RunDir, can_begin, continued};
use fleet_common::codec::{read_frame_blocking, write_frame_blocking};
use fleet_common::events::{EventBody, Level, Outcome};
use fleet_common::ids::JobId;
use fleet_common::job::{self, Devices, Job, Model};
use fleet_common::protocol::{FromRank, RankStart, ToRank};
use fleet_data::{DataFiles, TokenCache};
use fleet_learn::agent_link::AgentLink;
use fleet_learn::{Error, Result, trainer};
use fleet_torch::device;
use std::cell::RefCell;
use std::ops::ControlFlow;
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

/// Is told what happens, in its order, and may have the run stopped, which then ends with a checkpoint.
pub type Seen<'a> = &'a mut dyn FnMut(&EventBody) -> ControlFlow<()>;

/// Where this machine computes fastest, as a rank is told it: a CUDA device, else Metal, else the CPU.
pub fn best_device() -> String {
    match device::cuda_devices() {
        Ok(1..) => "cuda:0".into(),
        _ if tch::utils::has_mps() => "mps".into(),
        _ => "cpu".into(),
    }
}

/// The device that a job asks for, as a rank is told it. One that is asked for by its name has shown that it computes.
pub fn device_of(wanted: job::Device) -> Result<String> {
    let name = match wanted {
        job::Device::Auto => return Ok(best_device()),
        job::Device::Cpu => "cpu",
        job::Device::Cuda => "cuda:0",
        job::Device::Mps => "mps",
    };
    device::open(name)
        .map_err(|why| Error::Environment(format!("{why}; take the CPU to train without it")))?;
    Ok(name.into())
}

/// Trains `job` with one rank on `device` (`device_of`), to its end or until `seen` stops it. Checkpoints count as soon as they are written. What
/// cannot be trained is an error before anything is computed.
pub fn train(job: &Job, device: &str, seen: Seen) -> Result<Outcome> {
    let one = match &job.devices {
        Devices::Auto => 1,
        Devices::Count(count) => *count,
        Devices::Ids(ids) => ids.len() as u32,
    };
    if one > 1 || job.num_nodes.is_some_and(|nodes| nodes > 1) {
        let message = "the job asks for more than one rank, and within a process there is one; leave `devices` and `num_nodes` out, or give the job to `fleet launch`";
        return Err(Error::Input(message.into()));
    }
    let mut seen = Watched { seen, stop: false };
    let Ready { cache, resume, run } = prepare(job, &mut seen)?;
    let start = RankStart {
        job: JobId(0),
        generation: 1,
        rank: 0,
        world_size: 1,
        local_rank: 0,
        local_world_size: 1,
        host: 0,
        hosts: 1,
        job_json: job.to_json(),
        cache_dir: cache.to_string_lossy().into_owned(),
        resume: resume.map(|dir| dir.to_string_lossy().into_owned()),
        run,
        threads: job.threads_per_rank.unwrap_or_else(cores),
        device: device.to_owned(),
        shm_fd: None,
        network: None,
    };
    attend(start, &mut seen)
}

fn cores() -> u32 {
    std::thread::available_parallelism().map_or(1, |cores| cores.get() as u32)
}

struct Watched<'a> {
    seen: Seen<'a>,
    stop: bool,
}

impl Watched<'_> {
    fn tell(&mut self, event: &EventBody) {
        self.stop |= (self.seen)(event).is_break();
    }

    fn log(&mut self, level: Level, line: String) {
        self.tell(&EventBody::Log { rank: None, level, line });
    }
}

/// What must be there before a rank starts.
struct Ready {
    cache: PathBuf,
    resume: Option<PathBuf>,
    /// For `Claim`.
    run: String,
}

fn prepare(job: &Job, seen: &mut Watched) -> Result<Ready> {
    let seen = RefCell::new(seen);
    let log = |level: Level, line: String| seen.borrow_mut().log(level, line);
    let resume = continued(job, &log)?;
    let (mut job, reads) = (job.clone(), job.inputs());
    match (&resume, &job.model) {
        (Some(checkpoint), _) => {
            let notes = fleet_checkpoint::take_what_is_gone(&mut job, checkpoint);
            notes.into_iter().for_each(|note| log(Level::Warn, note));
        }
        (None, Model::Pretrained(dir)) => can_begin(dir, &job)?,
        (None, Model::New(_)) => {}
    }
    let run = name_of_run();
    let tell = |note: fleet_data::Note| log(note.level, note.line);
    let files = DataFiles::find(&job, &tell)?;
    let claim = Claim {
        dir: &job.checkpoint_dir(),
        run: &run,
        resumed: resume.as_deref(),
        overwrite: job.checkpoint.overwrite,
        until: job.max_steps,
        reads: &reads,
    };
    // Kept until the data are read, so that nobody else reads them for the same place in vain; then the rank takes it.
    let claimed = RunDir::claim(&claim)?;
    let (cache, stats) = TokenCache::build_or_open(&job, &files, &tell)?;
    drop(claimed);
    seen.borrow_mut().tell(&EventBody::DataReady(stats));
    Ok(Ready { cache: cache.dir().to_owned(), resume, run })
}

/// That no other run has.
fn name_of_run() -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos());
    format!("local/{}-{now:x}", std::process::id())
}

/// Runs the rank, and hears and answers it as an agent does.
fn attend(start: RankStart, seen: &mut Watched) -> Result<Outcome> {
    let failed = |e: &dyn std::fmt::Display| Error::Environment(format!("no socket to a rank: {e}"));
    std::thread::scope(|scope| {
        let (mut agent, socket) = UnixStream::pair().map_err(|e| failed(&e))?;
        write_frame_blocking(&mut agent, &ToRank::Start(Box::new(start))).map_err(|e| failed(&e))?;
        let rank = std::thread::Builder::new().name("rank".into());
        let rank = rank.spawn_scoped(scope, move || be_a_rank(socket)).map_err(|e| failed(&e))?;
        let mut stopped = false;
        // It ends by closing its socket; what it has to say of its end it returns.
        while let Ok(Some(message)) = read_frame_blocking::<_, FromRank>(&mut agent) {
            let FromRank::Event(event) = message else { continue };
            if let EventBody::Checkpoint(record) = &event.body {
                answer(&mut agent, &ToRank::CheckpointCommitted { step: record.step });
            }
            seen.tell(&event.body);
            if seen.stop && !stopped {
                answer(&mut agent, &ToRank::Stop);
                stopped = true;
            }
        }
        rank.join().unwrap_or_else(|_| Err(Error::Job("the rank ended without a word".into())))
    })
}

/// A rank that is gone hears nothing, and has said why.
fn answer(agent: &mut UnixStream, message: &ToRank) {
    drop(write_frame_blocking(agent, message));
}

fn be_a_rank(socket: UnixStream) -> Result<Outcome> {
    let opened = AgentLink::open(socket);
    let (mut link, start) = opened.map_err(|e| Error::Environment(format!("no socket to a rank: {e}")))?;
    let trained = || trainer::run(&start, &mut link, &assemble::learner);
    catch_unwind(AssertUnwindSafe(trained)).unwrap_or_else(|panic| {
        let said = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
        let said = said.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default();
        Err(Error::Job(format!("training failed, by a fault of fleet: {said}; please report it")))
    })
}
