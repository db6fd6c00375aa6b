//! A client of the cluster as small as can be: it sends a request again, with the same number, until somebody answers.

use fleet_common::codec::{read_frame, write_frame};
use fleet_common::ids::ClientId;
use fleet_common::net::{self, Identity};
use fleet_common::protocol::{ClientFrame, CoordinatorView, Reply, Request};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio::runtime::Runtime;

/// For one attempt at one coordinator.
const ATTEMPT: Duration = Duration::from_secs(3);
const PAUSE: Duration = Duration::from_millis(20);

pub struct Client {
    identity_dir: PathBuf,
    addresses: Vec<String>,
    id: ClientId,
    seq: u64,
    pub patience: Duration,
    runtime: Runtime,
    connection: Option<quinn::Connection>,
}

impl Client {
    /// Another client than every other one of this process.
    pub fn new(identity_dir: &Path, addresses: Vec<String>) -> Client {
        static COUNT: AtomicU64 = AtomicU64::new(1);
        let id = u128::from(std::process::id()) << 64 | u128::from(COUNT.fetch_add(1, Ordering::Relaxed));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        Client {
            identity_dir: identity_dir.to_owned(),
            addresses,
            id: ClientId(id),
            seq: 0,
            patience: Duration::from_secs(20),
            runtime: runtime.expect("a runtime of one thread can be made"),
            connection: None,
        }
    }

    pub fn coordinators(&mut self) -> Result<Vec<CoordinatorView>, String> {
        match self.query(Request::Coordinators)? {
            Reply::Coordinators(views) => Ok(views),
            other => Err(format!("{other:?}")),
        }
    }

    pub fn query(&mut self, request: Request) -> Result<Reply, String> {
        self.exchange(&ClientFrame::query(request))
    }

    pub fn stale(&mut self, request: Request) -> Result<Reply, String> {
        self.exchange(&ClientFrame { stale: true, ..ClientFrame::query(request) })
    }

    /// `Ok` means that it was acknowledged; `Err` leaves open whether it happens.
    pub fn change(&mut self, request: Request) -> Result<Reply, String> {
        self.seq += 1;
        self.exchange(&ClientFrame::change(self.id, self.seq, request))
    }

    fn exchange(&mut self, frame: &ClientFrame) -> Result<Reply, String> {
        let begun = Instant::now();
        loop {
            let why = match self.attempt(frame) {
                Ok(Reply::Refused(refusal)) if refusal.kind.is_passing() => refusal.message,
                Ok(reply) => return Ok(reply),
                Err(why) => {
                    self.connection = None;
                    why
                }
            };
            if begun.elapsed() > self.patience {
                return Err(why);
            }
            std::thread::sleep(PAUSE);
        }
    }

    fn attempt(&mut self, frame: &ClientFrame) -> Result<Reply, String> {
        let identity = Identity::load(&self.identity_dir).map_err(|error| error.to_string())?;
        let identity = identity.ok_or("there is no client identity yet")?;
        let (addresses, known) = (self.addresses.clone(), self.connection.take());
        let exchange = async {
            let connection = match known.filter(|known| known.close_reason().is_none()) {
                Some(known) => known,
                None => net::connect(&addresses, &identity).await.map_err(|error| error.to_string())?,
            };
            let (mut send, mut receive) = connection.open_bi().await.map_err(|error| error.to_string())?;
            write_frame(&mut send, frame).await.map_err(|error| error.to_string())?;
            let reply = read_frame(&mut receive).await.map_err(|error| error.to_string())?;
            Ok::<_, String>((reply.ok_or("the stream ended")?, connection))
        };
        let timed = self.runtime.block_on(async { tokio::time::timeout(ATTEMPT, exchange).await });
        let (reply, connection) = timed.map_err(|_| "no answer in time".to_owned())??;
        self.connection = Some(connection);
        Ok(reply)
    }
}
