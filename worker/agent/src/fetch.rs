//! Fetches the checkpoint that a gang goes on from, from the nodes that have it: file after file, each verified before it is written. What this
//! node has itself, because ranks of its own wrote it, is taken from its disk. Where a connection is cut it goes on at the byte at which it was; where a node has not got a file, or another one, the next one is asked.

use fleet_checkpoint::{
    Arrival, ArrivingFile, CheckpointError, MANIFEST_FILE, MANIFEST_MAX, Stock, Unfit, is_manifest,
};
use fleet_common::codec;
use fleet_common::ids::NodeId;
use fleet_common::net::{self, Identity};
use fleet_common::protocol::{FETCH_MAX, Fetch, Fetched, Holder, ResumePoint};
use quinn::Connection;
use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read};
use std::path::Path;
use std::time::{Duration, Instant};
use tokio::time::{sleep, timeout};

/// A node from which nothing has come for so long is given up, in a cluster.
pub const PATIENCE: Duration = Duration::from_secs(20);
/// For the next bytes on a connection that lives.
const READ_DEADLINE: Duration = Duration::from_secs(10);
/// Between attempts.
const PAUSE: Duration = Duration::from_millis(200);
/// Bytes taken from a stream at once.
const READ_MAX: usize = 1 << 20;

/// Why a checkpoint was not fetched.
#[derive(Debug)]
pub enum Unfetched {
    /// No node that answers has this piece of it: which, and who had it, in one line.
    Lost(String),
    /// This node cannot take it.
    Refused(CheckpointError),
}

/// Puts the checkpoint where it belongs on this node, which is `identity`'s. Blocks. A node from which nothing comes for `patience` is given
/// up. `told` hears what goes on.
pub fn fetch(
    point: &ResumePoint,
    identity: Identity,
    patience: Duration,
    told: &dyn Fn(String),
) -> Result<(), Unfetched> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|source| {
        Unfetched::Refused(CheckpointError::Copy { path: point.path.clone().into(), source })
    })?;
    let mut fetcher =
        Fetcher { point, me: identity.node(), identity, patience, connections: BTreeMap::new() };
    // `told` may block, which nothing may inside of a runtime.
    let done = runtime.block_on(fetcher.begin()).and_then(|arrival| {
        let names: BTreeSet<&str> = fetcher.others().map(|holder| holder.name.as_str()).collect();
        let (kib, from) =
            (arrival.bytes().div_ceil(1 << 10), names.into_iter().collect::<Vec<_>>().join(", "));
        told(format!("fetching the checkpoint of step {} ({kib} KiB) from {from}", point.step));
        let began = Instant::now();
        runtime.block_on(fetcher.files(&arrival))?;
        arrival.finish().map_err(Unfetched::Refused)?;
        told(format!("fetched it in {:.1} s", began.elapsed().as_secs_f64()));
        Ok(())
    });
    for connection in fetcher.connections.values() {
        connection.close(net::DONE, b"");
    }
    done
}

struct Fetcher<'a> {
    point: &'a ResumePoint,
    identity: Identity,
    me: Option<NodeId>,
    patience: Duration,
    connections: BTreeMap<NodeId, Connection>,
}

/// Where the bytes of a file go.
trait Sink {
    /// The first byte that is wanted.
    fn next(&self) -> u64;
    fn push(&mut self, bytes: &[u8]) -> Result<(), Unfit>;
}

impl Sink for ArrivingFile<'_> {
    fn next(&self) -> u64 {
        ArrivingFile::next(self)
    }

    fn push(&mut self, bytes: &[u8]) -> Result<(), Unfit> {
        ArrivingFile::push(self, bytes)
    }
}

/// A manifest: small, and looked at when all of it is there.
impl Sink for Vec<u8> {
    fn next(&self) -> u64 {
        self.len() as u64
    }

    fn push(&mut self, bytes: &[u8]) -> Result<(), Unfit> {
        if (self.len() + bytes.len()) as u64 > MANIFEST_MAX {
            return Err(Unfit::Changed(format!("{MANIFEST_FILE} is larger than any")));
        }
        self.extend_from_slice(bytes);
        Ok(())
    }
}

/// Why an attempt came to nothing.
enum Failed {
    /// It may go better the next time.
    Cut(String),
    /// Not from this node.
    Missing(String),
    Refused(CheckpointError),
}

impl From<Unfit> for Failed {
    fn from(unfit: Unfit) -> Failed {
        match unfit {
            Unfit::Changed(what) => Failed::Missing(what),
            Unfit::Disk(error) => Failed::Refused(error),
        }
    }
}

impl Fetcher<'_> {
    async fn begin(&mut self) -> Result<Arrival, Unfetched> {
        let manifest = self.manifest().await?;
        Arrival::begin(Path::new(&self.point.path), &manifest).map_err(|error| match &error {
            // It may be had of an older one.
            CheckpointError::Copy { path, source } if source.kind() == io::ErrorKind::AlreadyExists => {
                let step = self.point.step;
                Unfetched::Lost(format!(
                    "the checkpoint of step {step} cannot come to {}: {source}",
                    path.display()
                ))
            }
            _ => Unfetched::Refused(error),
        })
    }

    async fn files(&mut self, arrival: &Arrival) -> Result<(), Unfetched> {
        for (name, _, writer) in arrival.files() {
            self.file(arrival, name, writer).await?;
        }
        Ok(())
    }

    /// The nodes that can have something which is not here.
    fn others(&self) -> impl Iterator<Item = &Holder> + use<'_> {
        let me = self.me;
        self.point.holders.iter().filter(move |holder| Some(holder.node) != me)
    }

    /// Reads a file of the checkpoint as it lies on this node; not, and why, where it does not or has changed.
    fn read_here(&self, file: &str, sink: &mut dyn Sink) -> Result<(), Failed> {
        let missing = |error: &dyn std::fmt::Display| Failed::Missing(error.to_string());
        let stock = Stock::open(Path::new(&self.point.path), &self.point.manifest_sha256);
        let (mut from, mut left) =
            stock.map_err(|error| missing(&error))?.read(file, 0).map_err(Failed::Missing)?;
        let mut chunk = vec![0; READ_MAX];
        while left > 0 {
            let part = &mut chunk[..left.min(READ_MAX as u64) as usize];
            from.read_exact(part).map_err(|error| missing(&error))?;
            sink.push(part)?;
            left -= part.len() as u64;
        }
        Ok(())
    }

    /// Whether something of the checkpoint lies on this node.
    fn is_here(&self) -> bool {
        Stock::open(Path::new(&self.point.path), &self.point.manifest_sha256).is_ok()
    }

    async fn manifest(&mut self) -> Result<Vec<u8>, Unfetched> {
        let mut whys = Vec::new();
        let mut own = Vec::new();
        if self.is_here() && self.read_here(MANIFEST_FILE, &mut own).is_ok() {
            return Ok(own);
        }
        for holder in self.others().cloned().collect::<Vec<_>>() {
            let mut bytes = Vec::new();
            match self.read(&holder, MANIFEST_FILE, &mut bytes).await {
                Ok(()) if is_manifest(&bytes, &self.point.manifest_sha256) => return Ok(bytes),
                Ok(()) => whys.push(of(&holder, "it has changed since it was written")),
                Err(Failed::Cut(why) | Failed::Missing(why)) => whys.push(of(&holder, &why)),
                Err(Failed::Refused(error)) => return Err(Unfetched::Refused(error)),
            }
        }
        Err(self.lost(MANIFEST_FILE, &whys))
    }

    async fn file(&mut self, arrival: &Arrival, name: &str, writer: u32) -> Result<(), Unfetched> {
        let mut whys = Vec::new();
        if self.is_here() {
            let mut file = arrival.file(name).map_err(Unfetched::Refused)?;
            let read = self.read_here(name, &mut file);
            match read.and_then(|()| file.finish().map_err(Failed::from)) {
                Ok(()) => return Ok(()),
                Err(Failed::Cut(why) | Failed::Missing(why)) => {
                    whys.push(format!("here on node {}: {why}", self.identity.name));
                }
                Err(Failed::Refused(error)) => return Err(Unfetched::Refused(error)),
            }
        }
        let holders: Vec<Holder> = self.others().filter(|holder| holder.files.has(writer)).cloned().collect();
        for holder in &holders {
            let mut file = arrival.file(name).map_err(Unfetched::Refused)?;
            let read = self.read(holder, name, &mut file).await;
            match read.and_then(|()| file.finish().map_err(Failed::from)) {
                Ok(()) => return Ok(()),
                Err(Failed::Cut(why) | Failed::Missing(why)) => whys.push(of(holder, &why)),
                Err(Failed::Refused(error)) => return Err(Unfetched::Refused(error)),
            }
        }
        Err(self.lost(name, &whys))
    }

    fn lost(&self, file: &str, whys: &[String]) -> Unfetched {
        let why = if whys.is_empty() { "no other node has it".to_owned() } else { whys.join("; ") };
        Unfetched::Lost(format!("{file} of the checkpoint of step {} cannot be had: {why}", self.point.step))
    }

    /// Reads a file of one node to its end, in as many attempts as it takes while some of it comes.
    async fn read(&mut self, holder: &Holder, file: &str, sink: &mut dyn Sink) -> Result<(), Failed> {
        let Some(address) = &holder.address else {
            return Err(Failed::Missing("it is out of touch".to_owned()));
        };
        let mut since = Instant::now();
        loop {
            let before = sink.next();
            match self.attempt(holder, address, file, sink).await {
                Err(Failed::Cut(why)) => {
                    self.connections.remove(&holder.node);
                    if sink.next() > before {
                        since = Instant::now();
                    }
                    if since.elapsed() > self.patience {
                        return Err(Failed::Cut(why));
                    }
                    sleep(PAUSE).await;
                }
                done => return done,
            }
        }
    }

    async fn attempt(
        &mut self,
        holder: &Holder,
        address: &str,
        file: &str,
        sink: &mut dyn Sink,
    ) -> Result<(), Failed> {
        let cut = |error: &dyn std::fmt::Display| Failed::Cut(error.to_string());
        let connection = match self.connections.get(&holder.node) {
            Some(connection) => connection.clone(),
            None => {
                let made = net::connect_agent(address, &self.identity, holder.key).await;
                let made = made.map_err(Failed::Cut)?;
                self.connections.insert(holder.node, made.clone());
                made
            }
        };
        // The connection's own reason says more than the stream's.
        let lost = |error: &dyn std::fmt::Display| match connection.close_reason() {
            Some(reason) => Failed::Cut(net::describe(&reason)),
            None => cut(error),
        };
        let (mut send, mut receive) = connection.open_bi().await.map_err(|error| lost(&error))?;
        let fetch = Fetch::new(&self.point.manifest_sha256, file, sink.next());
        let asked = timeout(READ_DEADLINE, async {
            codec::write_frame(&mut send, &fetch).await?;
            codec::read_frame_limited(&mut receive, FETCH_MAX).await
        });
        let mut left = match asked.await.map_err(|error| cut(&error))? {
            Ok(Some(Fetched::Comes { bytes })) => bytes,
            Ok(Some(Fetched::Later(why))) => return Err(Failed::Cut(why)),
            Ok(Some(Fetched::Missing(why))) => return Err(Failed::Missing(why)),
            Ok(None) => return Err(cut(&"it did not answer")),
            Err(error) => return Err(lost(&error)),
        };
        while left > 0 {
            let chunk = timeout(READ_DEADLINE, receive.read_chunk(READ_MAX, true)).await;
            let chunk = chunk.map_err(|_| cut(&"it stopped sending"))?.map_err(|error| lost(&error))?;
            let Some(chunk) = chunk else { return Err(cut(&"it stopped in the middle")) };
            left = left.saturating_sub(chunk.bytes.len() as u64);
            sink.push(&chunk.bytes)?;
        }
        Ok(())
    }
}

fn of(holder: &Holder, why: &str) -> String {
    format!("node {} had it: {why}", holder.name)
}
