//! Lends checkpoints of this node's disk to the agents of other nodes: those that the cluster says, to whom it says, and nothing else.
//!
//! A thread of its own serves them, so that gigabytes do not keep the agent from its ranks.

use crate::doors::listen_address;
use fleet_checkpoint::Stock;
use fleet_common::codec;
use fleet_common::net::{self, Identity, KeyHash};
use fleet_common::protocol::{FETCH_MAX, Fetch, Fetched, Loan};
use quinn::{Connection, Endpoint, Incoming, RecvStream, SendStream};
use std::io::Read;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::{Semaphore, watch};
use tokio::time::timeout;

/// Nodes that fetch at a time. More are told to come again.
const READERS_MAX: usize = 32;
/// For a request to come on a stream that was opened for it.
const REQUEST_DEADLINE: Duration = Duration::from_secs(5);
/// Bytes read from the disk at once.
const CHUNK: usize = 256 << 10;

/// Lends until it is dropped.
pub struct Lender {
    /// Of UDP.
    pub port: u16,
    loans: Arc<Loans>,
    _end: watch::Sender<()>,
}

/// What may be read, in place of what might before.
#[derive(Default)]
struct Loans(Mutex<Vec<Loan>>);

impl Lender {
    /// `host` is where other nodes reach this one; port 0 takes one that is free. `identity` is the newest one of this node.
    pub fn start(host: &str, port: u16, identity: watch::Receiver<Identity>) -> Result<Lender, String> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(|error| error.to_string())?;
        let address = SocketAddr::new(listen_address(host), port);
        let endpoint = {
            let _inside = runtime.enter();
            net::serve_agents(address, &identity.borrow()).map_err(|error| error.to_string())?
        };
        let port = endpoint.local_addr().map_err(|error| error.to_string())?.port();
        let loans = Arc::new(Loans::default());
        let (end, ended) = watch::channel(());
        let serving = serve(endpoint, identity, loans.clone(), ended);
        let thread = std::thread::Builder::new().name("lender".to_owned());
        thread.spawn(move || runtime.block_on(serving)).map_err(|error| error.to_string())?;
        Ok(Lender { port, loans, _end: end })
    }

    /// All that may be read from now on.
    pub fn lend(&self, loans: Vec<Loan>) {
        *self.loans.0.lock().unwrap_or_else(PoisonError::into_inner) = loans;
    }
}

impl Loans {
    fn any_for(&self, key: &KeyHash) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).iter().any(|loan| loan.key == *key)
    }

    /// Where the checkpoint lies that this node may read.
    fn path(&self, key: &KeyHash, manifest_sha256: &str) -> Option<String> {
        let loans = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let loan = loans.iter().find(|loan| loan.key == *key && loan.manifest_sha256 == manifest_sha256)?;
        Some(loan.path.clone())
    }
}

async fn serve(
    endpoint: Endpoint,
    mut identity: watch::Receiver<Identity>,
    loans: Arc<Loans>,
    mut ended: watch::Receiver<()>,
) {
    let room = Arc::new(Semaphore::new(READERS_MAX));
    loop {
        let incoming = tokio::select! {
            incoming = endpoint.accept() => incoming,
            changed = identity.changed() => {
                let renewed = net::renew_agents(&endpoint, &identity.borrow_and_update());
                if let Err(error) = renewed {
                    tracing::warn!(%error, "other nodes see an old certificate");
                }
                match changed {
                    Ok(()) => continue,
                    Err(_) => break,
                }
            }
            _ = ended.changed() => break,
        };
        let Some(incoming) = incoming else { break };
        match room.clone().try_acquire_owned() {
            Ok(permit) => {
                let loans = loans.clone();
                tokio::spawn(async move {
                    attend(incoming, &loans).await;
                    drop(permit);
                });
            }
            Err(_) => incoming.refuse(),
        }
    }
    endpoint.close(net::DONE, b"the agent ends");
}

/// One node, until it goes.
async fn attend(incoming: Incoming, loans: &Arc<Loans>) {
    let (connection, peer, key) = match net::accept_agent(incoming).await {
        Ok(accepted) => accepted,
        Err(error) => return tracing::debug!(%error, "no agent came"),
    };
    if !loans.any_for(&key) {
        return connection.close(net::BUSY, b"nothing is lent to this node");
    }
    tracing::info!(node = %peer.member, "reads a checkpoint");
    let mut readers = tokio::task::JoinSet::new();
    while let Ok((send, receive)) = connection.accept_bi().await {
        while readers.try_join_next().is_some() {}
        let (loans, connection) = (loans.clone(), connection.clone());
        readers.spawn(async move {
            if let Err(error) = answer(&connection, send, receive, &key, &loans).await {
                tracing::debug!(%error, "a file was not read to its end");
            }
        });
    }
}

async fn answer(
    connection: &Connection,
    mut send: SendStream,
    mut receive: RecvStream,
    key: &KeyHash,
    loans: &Loans,
) -> Result<(), codec::CodecError> {
    let asked = timeout(REQUEST_DEADLINE, codec::read_versioned(&mut receive, FETCH_MAX)).await;
    let fetch: Fetch = match asked {
        Ok(Ok(Some(fetch))) => fetch,
        Ok(Ok(None)) => return Ok(()),
        Ok(Err(error)) => {
            connection.close(net::REFUSED, error.to_string().as_bytes());
            return Err(error);
        }
        Err(_) => return Ok(()),
    };
    let Some(path) = loans.path(key, &fetch.manifest_sha256) else {
        let why = "the cluster has not said that this node may read it".to_owned();
        return codec::write_frame(&mut send, &Fetched::Later(why)).await;
    };
    let stock = Stock::open(Path::new(&path), &fetch.manifest_sha256).map_err(|error| error.to_string());
    let (mut file, bytes) = match stock.and_then(|stock| stock.read(&fetch.file, fetch.from)) {
        Ok(found) => found,
        Err(why) => {
            let why: String = why.chars().take(FETCH_MAX / 8).collect();
            return codec::write_frame(&mut send, &Fetched::Missing(why)).await;
        }
    };
    codec::write_frame(&mut send, &Fetched::Comes { bytes }).await?;
    let mut left = bytes;
    let mut chunk = vec![0; CHUNK];
    while left > 0 {
        let part = &mut chunk[..left.min(CHUNK as u64) as usize];
        file.read_exact(part)?;
        send.write_all(part).await.map_err(std::io::Error::from)?;
        left -= part.len() as u64;
    }
    let _ = send.finish(); // fails only on a connection that is gone
    Ok(())
}
