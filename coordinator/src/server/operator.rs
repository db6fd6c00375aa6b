//! `coordinator rotate-ca`: an operator's wish, told to the coordinator that runs on this data directory, with the admin's credential there.

use anyhow::{Context, Result, bail};
use fleet_common::codec::{read_frame, write_frame};
use fleet_common::endpoint::Endpoint;
use fleet_common::exit;
use fleet_common::ids::ClientId;
use fleet_common::net::{self, Identity};
use fleet_common::protocol::{AuthorityView, ClientFrame, Refusal, RefusalKind, Reply, Request};
use std::cell::Cell;
use std::fmt::Display;
use std::path::Path;
use std::time::{Duration, Instant};
use tokio::time::{sleep, timeout};

/// For all coordinators to get the new CA's key, and to follow its end.
const PATIENCE: Duration = Duration::from_secs(15);
const PAUSE: Duration = Duration::from_millis(100);
/// For one answer.
const ANSWER: Duration = Duration::from_secs(6);
/// Members that are named.
const NAMED_MAX: usize = 5;

#[derive(Clone, Copy, Debug)]
pub enum Step {
    /// Make a new CA and see the coordinators take it over.
    Begin,
    Status,
    /// End the old one.
    Finish {
        force: bool,
    },
}

/// The cluster says no.
#[derive(Debug, thiserror::Error)]
#[error("{}", .0.message)]
pub struct Refused(Refusal);

impl Refused {
    pub fn exit_code(&self) -> u8 {
        match self.0.kind {
            RefusalKind::Unavailable => exit::UNREACHABLE,
            _ => exit::REFUSED_INPUT,
        }
    }
}

/// The change was sent, and no answer came.
#[derive(Debug, thiserror::Error)]
#[error(
    "the CA may or may not have been changed; look with `coordinator rotate-ca --status`, and run it again where it was not ({0:#})"
)]
pub struct Undecided(anyhow::Error);

/// Carries out a step of the CA's replacement; says in a line how it stands then.
pub async fn rotate_ca(data_dir: &Path, step: Step) -> Result<String> {
    let operator = Operator::at(data_dir)?;
    let request = match step {
        Step::Status => return Ok(standing(&operator.authority().await?)),
        Step::Begin => Request::RotateCa,
        Step::Finish { force } => Request::FinishCa { force },
    };
    operator.change(request).await?;
    let begun = Instant::now();
    loop {
        let view = operator.authority().await?;
        let waits = view.next.as_ref().is_some_and(|next| !next.moving);
        if !waits || begun.elapsed() > PATIENCE {
            return Ok(standing(&view));
        }
        sleep(PAUSE).await;
    }
}

fn standing(view: &AuthorityView) -> String {
    let short = |fingerprint: &str| fingerprint.get(..12).unwrap_or_default().to_owned();
    let ca = short(&view.ca_sha256);
    let Some(next) = &view.next else {
        return format!("the cluster's CA is {ca}; no other one is to replace it");
    };
    let new = short(&next.ca_sha256);
    if !next.moving {
        return format!(
            "the CA {new} is to replace {ca} and waits for {}, which {} not its key yet; bring it back, or take it out with `fleet coordinators remove`; should nobody have the key any more, run `coordinator rotate-ca` again",
            list(&next.without_key),
            if next.without_key.len() == 1 { "has" } else { "have" },
        );
    }
    let rest = match next.not_moved {
        0 => "all workers and clients have moved; end trust in the old one with `coordinator rotate-ca --finish`".to_owned(),
        count => format!(
            "{count} of the workers and clients have not moved yet: {}; workers do by themselves, clients at their next command; then `coordinator rotate-ca --finish`",
            list(&next.first_not_moved)
        ),
    };
    format!("the CA {new} replaces {ca}, both are trusted; {rest}")
}

fn list(names: &[impl Display]) -> String {
    let mut named: Vec<String> = names.iter().take(NAMED_MAX).map(ToString::to_string).collect();
    if names.len() > NAMED_MAX {
        named.push("...".into());
    }
    named.join(", ")
}

/// A client of the coordinator on this machine.
struct Operator {
    address: String,
    identity: Identity,
    /// A request was sent, and nothing is known of what came of it.
    in_doubt: Cell<bool>,
}

impl Operator {
    fn at(data_dir: &Path) -> Result<Operator> {
        let endpoint = Endpoint::load(data_dir)?.filter(|endpoint| endpoint.running().is_some());
        let endpoint = endpoint.with_context(|| {
            format!(
                "no coordinator runs on {}; start it, or give the --data-dir of one that runs",
                data_dir.display()
            )
        })?;
        let identity = Identity::load(&data_dir.join("client"))?.with_context(|| {
            format!("{} has no credential yet; wait until its coordinator has a leader", data_dir.display())
        })?;
        Ok(Operator { address: endpoint.quic, identity, in_doubt: Cell::new(false) })
    }

    /// The same request, until it is known what came of it.
    async fn change(&self, request: Request) -> Result<()> {
        let since = match self.ask(&ClientFrame::query(Request::Position)).await? {
            Reply::Position(since) => since,
            other => bail!("the coordinator gave an answer that does not fit: {other:?}"),
        };
        self.in_doubt.set(false);
        let frame = ClientFrame { since, ..ClientFrame::change(ClientId(rand::random()), 1, request) };
        match self.ask(&frame).await {
            Ok(Reply::Done) => Ok(()),
            Ok(other) => bail!("the coordinator gave an answer that does not fit: {other:?}"),
            Err(error) if self.in_doubt.get() => Err(Undecided(error).into()),
            Err(error) => Err(error),
        }
    }

    async fn authority(&self) -> Result<AuthorityView> {
        match self.ask(&ClientFrame::query(Request::Authority)).await? {
            Reply::Authority(view) => Ok(*view),
            other => bail!("the coordinator gave an answer that does not fit: {other:?}"),
        }
    }

    async fn ask(&self, frame: &ClientFrame) -> Result<Reply> {
        let begun = Instant::now();
        loop {
            let failed = match timeout(ANSWER, self.once(frame)).await {
                Ok(Ok(Reply::Refused(refusal))) if refusal.kind != RefusalKind::Unavailable => {
                    self.in_doubt.set(refusal.kind == RefusalKind::Undecided);
                    return Err(Refused(refusal).into());
                }
                Ok(Ok(Reply::Refused(refusal))) => Refused(refusal).into(),
                Ok(Ok(reply)) => return Ok(reply),
                Ok(Err(error)) => error,
                Err(_) => anyhow::anyhow!("the coordinator at {} does not answer", self.address),
            };
            if begun.elapsed() > PATIENCE {
                return Err(failed);
            }
            sleep(PAUSE).await;
        }
    }

    async fn once(&self, frame: &ClientFrame) -> Result<Reply> {
        let connection = net::connect(std::slice::from_ref(&self.address), &self.identity).await?;
        let (mut send, mut receive) = connection.open_bi().await?;
        self.in_doubt.set(true);
        write_frame(&mut send, frame).await?;
        send.finish()?;
        let reply = read_frame(&mut receive).await?.context("the coordinator closed the stream")?;
        connection.close(net::DONE, b"");
        Ok(reply)
    }
}
