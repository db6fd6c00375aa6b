//! Follows the cluster's CAs: what is shown and issued changes with them, members are told, and who has not moved when the old one ends is
//! sent away. `cluster/authorities.rs` has the steps.

use super::{Shared, credentials};
use crate::cluster::authorities::Cas;
use crate::cluster::commands::{Change, ShowCa};
use crate::cluster::session::RequestId;
use fleet_common::ids::ClientId;
use fleet_common::net::{self, Socket};
use fleet_common::protocol::Member;
use quinn::Connection;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::sync::watch;
use tracing::{info, warn};

/// Between attempts to record that a member has moved.
const RETRY: Duration = Duration::from_secs(1);
/// Then its next connection tells.
const ATTEMPTS: usize = 30;

/// Keeps what this coordinator shows up to date, for as long as it runs: with the cluster's CAs, and before its certificates end.
pub async fn follow(
    shared: Arc<Shared>,
    mut cas: watch::Receiver<Cas>,
    sockets: [(Socket, quinn::Endpoint); 2],
    data_dir: PathBuf,
) {
    loop {
        let known = cas.borrow_and_update().clone();
        match shared.trust.refresh(known.clone(), SystemTime::now()) {
            Ok(refreshed) => {
                if refreshed.own {
                    let identity = shared.trust.identity();
                    for (socket, endpoint) in &sockets {
                        if let Err(error) = net::renew(endpoint, *socket, &identity) {
                            warn!("the new certificate cannot be used: {error}");
                        }
                    }
                    info!("this coordinator shows a new certificate, or trusts other CAs");
                }
                if let Some(member) = refreshed.moved
                    && let Some(ca) = known.next.as_ref().map(|_| known.number + 1)
                {
                    tokio::spawn(record(shared.clone(), member, ca, None));
                }
                if refreshed.settled {
                    send_strangers_away(&shared);
                    tokio::spawn(credentials::keep(data_dir.clone(), shared.clone()));
                }
            }
            Err(error) => {
                // What this coordinator has when it starts may be of before the CA was replaced.
                tokio::select! {
                    biased;
                    changed = cas.changed() => match changed {
                        Ok(()) => continue,
                        Err(_) => return,
                    },
                    looked = credentials::up_to_date(&shared) => {
                        if looked.is_ok() && cas.has_changed().unwrap_or(false) {
                            continue;
                        }
                    }
                }
                warn!("what this coordinator shows was not renewed: {error:#}");
            }
        }
        tokio::select! {
            changed = cas.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(shared.trust.look_after()) => {}
        }
    }
}

/// Closes the connections of workers and clients whose certificates are of a CA that does not count any more: who has moved comes back at
/// once. Coordinators move by themselves and stay in touch; all were held against their keys.
fn send_strangers_away(shared: &Shared) {
    let accepted = shared.trust.identity().authorities.clone();
    for connection in shared.gate.connections() {
        let certificate = net::remote_certificate(&connection);
        if !certificate.is_ok_and(|certificate| accepted.issuer_of(&certificate).is_some()) {
            connection.close(
                net::BUSY,
                b"the cluster's CA was replaced; connect with a certificate of the new one",
            );
        }
    }
}

/// Who connects with a certificate of the next CA has moved to it.
pub fn note(shared: &Arc<Shared>, member: Member, connection: &Connection) {
    let Ok(certificate) = net::remote_certificate(connection) else { return };
    let Some(ca) = shared.trust.shows_next(&certificate) else { return };
    let news = shared.gate.known(member).is_some_and(|admitted| admitted.ca < ca);
    if news && !matches!(member, Member::Coordinator(_)) {
        tokio::spawn(record(shared.clone(), member, ca, Some(connection.clone())));
    }
}

/// Until it is recorded, or its connection ends: the next one tells it again.
async fn record(shared: Arc<Shared>, member: Member, ca: u64, connection: Option<Connection>) {
    let request = RequestId { client: ClientId(rand::random()), seq: 1 };
    for _ in 0..ATTEMPTS {
        let change = Change::ShowCa(ShowCa { member, ca });
        if shared.calls.propose(request.into(), None, change).await.is_ok() {
            return;
        }
        tokio::time::sleep(RETRY).await;
        if connection.as_ref().is_some_and(|connection| connection.close_reason().is_some()) {
            return;
        }
    }
}
