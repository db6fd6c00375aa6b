//! Starting ranks: `fleet-rank` processes with a socket and a shared segment, or a user's PROGRAM. Also the ranks that are started before
//! any job asks for them, so that libtorch is loaded while the cluster comes up, and the probe of the machine.

use crate::container::{Container, Containers, Remains};
use crate::doors::{Door, Ports};
use crate::gang::Blow;
use crate::program::{self, Base};
use crate::relay::Streams;
use crate::spawn::{Exited, Launch, Spawner, Started, Sweep};
use crate::verdict::Exit;
use anyhow::Context;
use fleet_collectives::Segment;
use fleet_common::events::Endpoint;
use fleet_common::job::Job;
use fleet_common::libtorch;
use fleet_common::net::PrivateKey;
use fleet_common::protocol::{Gang, Program, RANK_SOCKET_ENV, Work};
use serde::Deserialize;
use std::ffi::OsString;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::ChildStderr;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::net::UnixStream;

/// Ranks that wait for a first job longer than this are ended: an idle node should cost nothing.
pub const WARM_FOR: Duration = Duration::from_secs(60);
/// More ranks than this are not kept waiting: each holds some 100 MiB.
const WARM_MAX: u32 = 8;
/// A driver that hangs is asked no longer. Libraries of some GB may come from a slow disk.
const PROBE_MAX: Duration = Duration::from_secs(180);
/// The generation that a job starts with; ranks that wait are made for it.
const FIRST_GENERATION: u64 = 1;

/// A rank process that nobody attends to yet.
#[derive(Debug)]
pub struct NewRank {
    pub started: Started,
    pub socket: Option<UnixStream>,
    /// Number of the shared segment in the process.
    pub shm_fd: Option<i32>,
    /// Where those of other nodes call it.
    pub seat: Option<Seat>,
}

/// A rank's own end of the network: what only this node knows of it.
#[derive(Debug)]
pub struct Seat {
    /// Number of the listening socket in the process.
    pub listener_fd: i32,
    pub key: PrivateKey,
}

/// All ranks of a gang, each started or not, what holds them, and the memory that they share.
#[derive(Debug)]
pub struct NewGang {
    pub container: Container,
    pub ranks: Vec<Result<NewRank, String>>,
    pub segment: Option<Segment>,
    /// Of ranks that those of other nodes call.
    pub endpoints: Vec<Endpoint>,
}

impl NewGang {
    /// No rank could be started.
    pub fn failed(container: Container, ranks: u32, error: &str) -> NewGang {
        let ranks = (0..ranks).map(|_| Err(error.to_owned())).collect();
        NewGang { container, ranks, segment: None, endpoints: Vec::new() }
    }
}

/// Where programs are and how many threads a rank gets.
#[derive(Clone, Debug)]
pub struct Launcher {
    pub spawner: Spawner,
    pub containers: Arc<Containers>,
    pub fleet_rank: PathBuf,
    pub cores: u32,
    pub programs: Base,
    /// A `fleet launch` is on the other side of this agent's stdin and stdout.
    pub relay: Option<Streams>,
    /// Where ranks listen for those of other nodes, and under which address these call them.
    pub ports: Ports,
    pub host: String,
}

impl Launcher {
    /// Where this program finds `fleet-rank`: beside itself.
    pub fn fleet_rank_beside() -> anyhow::Result<PathBuf> {
        let own = std::env::current_exe().context("cannot find the own executable")?;
        Ok(own.with_file_name("fleet-rank"))
    }

    pub async fn gang(&self, gang: &Gang, container: Container) -> NewGang {
        match &gang.work {
            Work::Train { job_json } => {
                let doors = match gang.nodes {
                    0 | 1 => Ok(Vec::new()),
                    _ => Job::from_json(job_json)
                        .map_err(|error| error.to_string())
                        .and_then(|job| self.ports.open(job.transport, &self.host, gang.ranks)),
                };
                match doors {
                    Ok(doors) => self.training(gang.ranks, gang.generation, doors, container).await,
                    Err(error) => NewGang::failed(container, gang.ranks, &error),
                }
            }
            Work::Program(program) => self.program(gang, program, container).await,
        }
    }

    /// `doors`, if there are any, are as many as ranks.
    async fn training(&self, ranks: u32, generation: u64, doors: Vec<Door>, container: Container) -> NewGang {
        let segment = match ranks {
            1 => Ok(None),
            _ => Segment::create(ranks as usize, generation).map(Some).map_err(|error| error.to_string()),
        };
        let segment = match segment {
            Ok(segment) => segment,
            Err(error) => return NewGang::failed(container, ranks, &error),
        };
        let endpoints = doors.iter().map(|door| door.endpoint.clone()).collect();
        let mut doors = doors.into_iter();
        let mut started = Vec::new();
        for _ in 0..ranks {
            let rank = self.fleet_rank(segment.as_ref(), doors.next(), ranks, &container).await;
            started.push(rank.map_err(|error| format!("{error:#}")));
        }
        NewGang { container, ranks: started, segment, endpoints }
    }

    async fn fleet_rank(
        &self,
        segment: Option<&Segment>,
        door: Option<Door>,
        local_world_size: u32,
        container: &Container,
    ) -> anyhow::Result<NewRank> {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().context("no socket for it")?;
        ours.set_nonblocking(true)?;
        let mut inherit = vec![(Arc::new(OwnedFd::from(theirs)), Some(RANK_SOCKET_ENV))];
        if let Some(segment) = segment {
            inherit.push((Arc::new(segment.fd().try_clone_to_owned()?), None));
        }
        let key = door.map(|Door { socket, key, .. }| {
            inherit.push((Arc::new(socket), None));
            key
        });
        let env = match std::env::var_os("OMP_NUM_THREADS") {
            Some(_) => Vec::new(),
            None => {
                let threads = (self.cores / local_world_size).max(1);
                vec![("OMP_NUM_THREADS".into(), threads.to_string().into())]
            }
        };
        let argv = vec![self.fleet_rank.clone().into_os_string()];
        let container = container.clone();
        let launch = Launch { argv, env, inherit, container, ..Launch::default() };
        let started = self.spawner.spawn(launch).await?;
        let mut inherited = started.inherited.iter().skip(1).copied();
        let shm_fd = segment.and_then(|_| inherited.next());
        let seat = key.zip(inherited.next()).map(|(key, listener_fd)| Seat { listener_fd, key });
        Ok(NewRank { started, socket: Some(UnixStream::from_std(ours)?), shm_fd, seat })
    }

    async fn program(&self, gang: &Gang, program: &Program, container: Container) -> NewGang {
        let meeting = match &gang.meeting {
            Some(meeting) => Ok(meeting.clone()),
            None => program::local_meeting(),
        };
        let meeting = match meeting {
            Ok(meeting) => meeting,
            Err(error) => {
                let error = format!("no free port for its peers to meet at: {error}");
                return NewGang::failed(container, gang.ranks, &error);
            }
        };
        let mut ranks = Vec::new();
        for local_rank in 0..gang.ranks {
            let launch = Launch {
                argv: program.argv.iter().map(OsString::from).collect(),
                env: program::environment(
                    self.programs.variables(),
                    &program.env,
                    gang,
                    local_rank,
                    &meeting,
                ),
                clear_env: true,
                dir: PathBuf::from(&program.working_dir),
                container: container.clone(),
                one_pipe: self.relay == Some(Streams::Together),
                own_stdin: self.relay.is_some() && gang.first_rank + local_rank == 0,
                inherit: Vec::new(),
            };
            let started = self.spawner.spawn(launch).await;
            ranks.push(
                started
                    .map(|started| NewRank { started, socket: None, shm_fd: None, seat: None })
                    .map_err(|error| error.to_string()),
            );
        }
        NewGang { container, ranks, segment: None, endpoints: Vec::new() }
    }

    /// Runs `fleet-rank --probe`. `exited` waits for the process that is named to it.
    pub async fn probe<F: Future<Output = Option<Exited>>>(
        &self,
        exited: impl FnOnce(u32) -> F,
    ) -> Result<Probe, String> {
        let argv = vec![self.fleet_rank.clone().into_os_string(), "--probe".into()];
        let container = self.containers.create().map_err(|error| error.to_string())?;
        let remains = Remains::from(&container);
        let started = self
            .spawner
            .spawn(Launch { argv, container, ..Launch::default() })
            .await
            .map_err(|error| error.to_string())?;
        let exit = tokio::time::timeout(PROBE_MAX, exited(started.pid)).await;
        if exit.is_err() {
            self.spawner.strike(started.pid, Blow::Kill);
        }
        let _ = self.spawner.sweep(Sweep { remains, adopted: false }).await; // its group goes
        let Ok(exit) = exit else {
            let seconds = PROBE_MAX.as_secs();
            return Err(format!(
                "libtorch has not said within {seconds} s which devices there are; look whether `nvidia-smi` answers, or give --device cpu"
            ));
        };
        let output = read_all(started.stdout);
        if exit.map(|exited| exited.exit) != Some(Exit::Code(0)) {
            return Err(self.unfit(started.stderr));
        }
        let line = output.lines().next().unwrap_or_default();
        serde_json::from_str(line).map_err(|error| {
            format!("fleet-rank --probe said `{line}`: {error}; install one version of fleet")
        })
    }

    /// Why no rank can run, from what one said that ended at once.
    pub fn unfit(&self, stderr: Option<ChildStderr>) -> String {
        let stderr = stderr.map(read_all).unwrap_or_default();
        let line = stderr
            .lines()
            .rev()
            .find(|line| !line.trim().is_empty())
            .unwrap_or("fleet-rank ended without a word");
        let line = line.trim().trim_start_matches("error: ");
        format!("ranks cannot run on this node: {line}; {}", libtorch::cure(&self.fleet_rank))
    }

    /// Starts a full set of ranks before any job asks for them.
    pub async fn warm(&self, slots: u32) -> Option<Warm> {
        if slots > WARM_MAX {
            return None;
        }
        let container = self.containers.create().ok()?;
        let gang = self.training(slots, FIRST_GENERATION, Vec::new(), container).await;
        let warm = Warm { gang, until: Instant::now() + WARM_FOR };
        if warm.gang.ranks.iter().all(Result::is_ok) {
            return Some(warm);
        }
        warm.end(&self.spawner);
        None
    }
}

/// What the machine can do, as `fleet-rank --probe` prints it.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Probe {
    pub libtorch: String,
    pub cuda_devices: u32,
    /// Why there is none.
    pub no_cuda: Option<String>,
    pub mps: bool,
}

/// Ranks that wait for a job.
#[derive(Debug)]
pub struct Warm {
    gang: NewGang,
    pub until: Instant,
}

impl Warm {
    pub fn fits(&self, gang: &Gang) -> bool {
        let same = gang.ranks as usize == self.gang.ranks.len() && gang.generation == FIRST_GENERATION;
        // Nobody could call them: they listen nowhere.
        let alone = gang.nodes <= 1;
        same && alone && matches!(gang.work, Work::Train { .. })
    }

    pub fn container(&self) -> &Container {
        &self.gang.container
    }

    pub fn take(self) -> NewGang {
        self.gang
    }

    pub fn end(self, spawner: &Spawner) {
        self.gang.ranks.into_iter().flatten().for_each(|rank| spawner.strike(rank.started.pid, Blow::Kill));
        // Nobody waits for that.
        drop(spawner.sweep(Sweep { remains: Remains::from(&self.gang.container), adopted: false }));
    }

    /// One of them is gone before its first job. Says why no rank can run here, if that is the reason.
    pub fn died(self, exited: Exited, launcher: &Launcher) -> Option<String> {
        let mut reason = None;
        let remains = Remains::from(&self.gang.container);
        for rank in self.gang.ranks.into_iter().flatten() {
            if rank.started.pid != exited.pid {
                launcher.spawner.strike(rank.started.pid, Blow::Kill);
            } else if let Exit::Code(4 | 126 | 127) = exited.exit {
                reason = Some(launcher.unfit(rank.started.stderr));
            }
        }
        drop(launcher.spawner.sweep(Sweep { remains, adopted: false }));
        reason
    }

    pub fn contains(&self, pid: u32) -> bool {
        self.gang.ranks.iter().flatten().any(|rank| rank.started.pid == pid)
    }
}

/// The output of a process that is gone, with its whole group: nobody else holds the pipe.
fn read_all(pipe: impl Read) -> String {
    let mut bytes = Vec::new();
    let _ = pipe.take(64 << 10).read_to_end(&mut bytes); // what could be read is what there is to show
    String::from_utf8_lossy(&bytes).into_owned()
}
