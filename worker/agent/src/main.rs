//! `worker`: puts this machine into a cluster and supervises its ranks.

use anyhow::Context;
use clap::{Parser, Subcommand};
use fleet_agent::budget::Rates;
use fleet_agent::coordinators::{Coordinators, with_the_way_out};
use fleet_agent::doors::Ports;
use fleet_agent::exec_rank;
use fleet_agent::http;
use fleet_agent::join::{self, DeviceWish, Options};
use fleet_agent::program::Base;
use fleet_agent::relay::Streams;
use fleet_common::files::{self, Kind};
use fleet_common::net::{self, Identity, IdentityError, JoinToken, NetError, TokenError};
use fleet_common::protocol::Role;
use fleet_common::telemetry::{self, LogFormat};
use fleet_common::{arguments, exit, home, signals, terminal};
use std::fs::File;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::SystemTime;

#[derive(Parser)]
#[command(name = "worker", version, about = "The node agent of a fleet cluster")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Join a cluster with this machine and run its ranks until stopped.
    Join(Join),
}

#[derive(clap::Args)]
struct Join {
    /// Address of a coordinator for clients, HOST:PORT; several separated by commas.
    #[arg(value_delimiter = ',', required = true)]
    addr: Vec<String>,
    /// The join token; needed once. Also taken from FLEET_TOKEN.
    #[arg(long)]
    token: Option<String>,
    /// File that holds the join token.
    #[arg(long)]
    token_file: Option<PathBuf>,
    /// Keeps this node's identity, what it has started, and the log files of its ranks [default: ~/.local/share/fleet/worker].
    #[arg(long)]
    data_dir: Option<PathBuf>,
    /// Ranks that may run here at a time [default: one per accelerator, else 1].
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=64))]
    slots: Option<u32>,
    /// What ranks compute on.
    #[arg(long, value_enum, default_value = "auto")]
    device: DeviceWish,
    /// Name of this node in listings [default: the host name].
    #[arg(long)]
    name: Option<String>,
    /// What jobs may ask this node for, such as gpu=h200; several separated by commas.
    #[arg(long, value_delimiter = ',', value_name = "NAME=VALUE", value_parser = label)]
    labels: Vec<(String, String)>,
    /// Name or address under which other nodes reach this one [default: the address on the way to the coordinator].
    #[arg(long, value_name = "HOST")]
    host: Option<String>,
    /// Ports on which ranks of a training job on several nodes listen for each other, such as 29600-29699 [default: any that is free].
    #[arg(long, value_name = "A-B")]
    rank_ports: Option<Ports>,
    /// UDP port on which other nodes fetch checkpoints that lie here [default: one that is free, and the same one again].
    #[arg(long, value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..))]
    checkpoint_port: Option<u16>,
    /// Serve metrics for Prometheus and /healthz here: an address, or a port on loopback [default: nowhere].
    #[arg(long, value_name = "ADDR", value_parser = http::address)]
    http: Option<SocketAddr>,
    /// Bytes of one job's output each second that this node sends to the coordinators, which keep it; 0 for all. What is over it is in
    /// the ranks' files here, and shown by `fleet logs JOB --full`.
    #[arg(long, value_name = "BYTES", default_value_t = Rates::USUAL.per_s)]
    log_rate: u64,
    /// How log lines look: auto, human or json.
    #[arg(long, default_value = "auto")]
    log_format: LogFormat,
    /// Programs get the whole environment of this worker, as on the machine of a `fleet launch`.
    #[arg(long, hide = true)]
    inherit_env: bool,
    /// What programs print follows on stdout, rank 0 reads what this worker could read, and SIGINT, SIGHUP, SIGUSR1 and SIGUSR2 are passed
    /// on to them; SIGPIPE closes their stdout, SIGIO their stderr: for the `fleet launch` of one program.
    #[arg(long, hide = true, value_enum)]
    relay: Option<Streams>,
    /// End when this process, which started this one, ends.
    #[arg(long, value_name = "PID")]
    die_with_parent: Option<u32>,
}

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    if arguments.first().is_some_and(|first| first == exec_rank::MODE) {
        return ExitCode::from(exec_rank::run(&arguments[1..]));
    }
    signals::mind_no_file_limit();
    let Command::Join(join) = arguments::parse::<Cli>().command;
    let code = run(join).unwrap_or_else(|failure| {
        eprintln!("error: {}", terminal::plain(&format!("{:#}", failure.error)));
        failure.code
    });
    ExitCode::from(code)
}

/// An error and the exit code that belongs to it.
struct Failure {
    code: u8,
    error: anyhow::Error,
}

impl Failure {
    fn new(code: u8) -> impl FnOnce(anyhow::Error) -> Failure {
        move |error| Failure { code, error }
    }
}

fn run(join: Join) -> Result<u8, Failure> {
    telemetry::init(join.log_format, "info");
    bind_to_processes(join.die_with_parent).map_err(Failure::new(exit::ENVIRONMENT))?;
    let data_dir = match &join.data_dir {
        Some(dir) => dir.clone(),
        None => default_data_dir().map_err(Failure::new(exit::REFUSED_INPUT))?,
    };
    let _lock = lock(&data_dir)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.context("cannot start the runtime").map_err(Failure::new(exit::ENVIRONMENT))?;
    let code = runtime.block_on(async {
        let mut coordinators =
            Coordinators::load(&data_dir, join.addr.clone()).map_err(Failure::new(exit::ENVIRONMENT))?;
        let identity = identity(&join, &data_dir, &mut coordinators).await?;
        let options = Options {
            coordinators,
            data_dir,
            slots: join.slots,
            device: join.device,
            labels: join.labels.into_iter().collect(),
            host: join.host,
            rank_ports: join.rank_ports.unwrap_or_default(),
            checkpoint_port: join.checkpoint_port,
            http: join.http,
            programs: if join.inherit_env { Base::Worker } else { Base::Node },
            lines: Rates::of(join.log_rate),
            relay: join.relay,
        };
        join::run(options, identity).await.map_err(Failure::new(exit::ENVIRONMENT))
    });
    // A cache that is being built for a job that is over does not hold up the end.
    runtime.shutdown_background();
    code
}

/// The kept identity, or a new one for the token.
async fn identity(
    join: &Join,
    data_dir: &Path,
    coordinators: &mut Coordinators,
) -> Result<Identity, Failure> {
    let dir = data_dir.join("identity");
    let kept = kept(&dir, &join.addr).await;
    let kept = kept.context("cannot use the kept identity").map_err(Failure::new(exit::ENVIRONMENT))?;
    let token = || {
        let env = std::env::var("FLEET_TOKEN").ok();
        let token =
            JoinToken::from_sources(join.token_file.as_deref(), env.as_deref(), join.token.as_deref());
        token.map_err(bad_token)
    };
    let token = match kept {
        Some(identity) if !identity.remaining(SystemTime::now()).is_zero() => match token()? {
            // Where the CA was replaced meanwhile, the kept one is of no use.
            Some(token) if !identity.authorities.contains(&token.ca_fingerprint) => {
                same_cluster(&join.addr, &identity, &dir).await?;
                tracing::warn!("the token is of another CA than {}; joining as a new node", identity.member);
                Some(token)
            }
            _ => return Ok(identity),
        },
        // By this machine's clock. Without a token the coordinator has the last word.
        Some(identity) => match token()? {
            None => return Ok(identity),
            token => {
                same_cluster(&join.addr, &identity, &dir).await?;
                tracing::warn!("the certificate of {} has ended; joining as a new node", identity.member);
                token
            }
        },
        None => token()?,
    };
    let token = JoinToken::expect(token, Role::Worker).map_err(bad_token)?;
    let name = join.name.clone().unwrap_or_else(host_name);
    let joined = net::join(&join.addr, &token, &name).await;
    let joined = joined.map_err(|error| Failure { code: error.exit_code(), error: error.into() })?;
    let stored =
        joined.identity.store(&dir).with_context(|| format!("cannot keep the identity in {}", dir.display()));
    stored.map_err(Failure::new(exit::ENVIRONMENT))?;
    if joined.identity.name != name {
        tracing::warn!(
            "this node is listed as {}: `{name}` reads as an id, or has signs that no name may have",
            joined.identity.name
        );
    }
    coordinators.learn(joined.coordinators);
    Ok(joined.identity)
}

fn bad_token(error: TokenError) -> Failure {
    Failure { code: error.exit_code(), error: error.into() }
}

/// Refuses to become a node of another cluster where this one's records are. Whether it is another one only its coordinators can say.
async fn same_cluster(addrs: &[String], kept: &Identity, dir: &Path) -> Result<(), Failure> {
    match net::connect(addrs, kept).await {
        Err(error @ NetError::OtherCluster(_)) => {
            let error = with_the_way_out(error, dir);
            Err(Failure { code: error.exit_code(), error: error.into() })
        }
        _ => Ok(()),
    }
}

/// What was kept, with a damaged file of CAs mended where a coordinator shows what it should be.
async fn kept(dir: &Path, addrs: &[String]) -> Result<Option<Identity>, IdentityError> {
    match Identity::load(dir) {
        Err(error @ IdentityError::DamagedCa { .. }) => {
            let IdentityError::DamagedCa { fingerprint: Some(fingerprint), .. } = &error else {
                return Err(error);
            };
            if net::mend_authorities(addrs, fingerprint, dir).await.is_err() {
                return Err(error);
            }
            tracing::warn!("{error}; it was mended");
            Identity::load(dir)
        }
        loaded => loaded,
    }
}

/// Ties this process to the one that started it, if asked to, and what its ranks leave behind to this process.
fn bind_to_processes(parent: Option<u32>) -> anyhow::Result<()> {
    if let Some(parent) = parent {
        fleet_common::parent::die_with(parent)?;
    }
    #[cfg(target_os = "linux")]
    nix::sys::prctl::set_child_subreaper(true).context("cannot adopt what ranks leave behind")?;
    Ok(())
}

/// One agent per directory: two would share an identity.
fn lock(data_dir: &Path) -> Result<File, Failure> {
    let lock = || {
        if let Some(was_open) = files::claim(data_dir, Kind::Worker)? {
            tracing::warn!("{was_open}");
        }
        files::lock(data_dir)
    };
    lock().map_err(|error: io::Error| {
        let named_wrongly = error.kind() == io::ErrorKind::InvalidInput;
        let code = if named_wrongly { exit::REFUSED_INPUT } else { exit::ENVIRONMENT };
        Failure { code, error: error.into() }
    })
}

fn label(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() && !value.is_empty() => {
            Ok((name.to_owned(), value.to_owned()))
        }
        _ => Err(format!("`{text}` is not a label; write it like gpu=h200")),
    }
}

fn default_data_dir() -> anyhow::Result<PathBuf> {
    Ok(home::data().context("without --data-dir")?.join("fleet/worker"))
}

fn host_name() -> String {
    let name = nix::sys::utsname::uname().ok().and_then(|uname| uname.nodename().to_str().map(str::to_owned));
    name.filter(|name| !name.is_empty()).unwrap_or_else(|| "worker".to_owned())
}
