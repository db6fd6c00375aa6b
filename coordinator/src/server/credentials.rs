//! What `fleet` and `worker` on this machine find in the data directory: an admin's credential and tokens. Made as soon as there is a leader,
//! and again where they are of no use any more.

use super::Shared;
use super::tokens;
use crate::cluster::commands::RedeemToken;
use crate::cluster::session::RequestId;
use anyhow::{Context, Result, anyhow};
use fleet_common::files;
use fleet_common::ids::ClientId;
use fleet_common::net::{Applicant, JoinToken, KeyHash, requested_key};
use fleet_common::protocol::{Refusal, Role, UNLIMITED_USES};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tracing::{info, warn};

/// Life of the tokens in the data directory: ten years. Whoever can read them can read the CA's key beside them.
const TOKEN_TTL_S: u64 = 10 * 365 * 24 * 3600;
/// Of the token by which the local client becomes a member.
const ONCE_TTL_S: u64 = 600;
/// Between attempts while there is no leader.
const RETRY: Duration = Duration::from_millis(200);

/// `write`, as a task of its own.
pub async fn keep(dir: PathBuf, shared: Arc<Shared>) {
    if let Err(error) = write(&dir, &shared).await {
        warn!("no credentials for this machine: {error:#}");
    }
}

/// Writes what is not there yet or is of no use, however long it takes to find a leader.
pub async fn write(dir: &Path, shared: &Shared) -> Result<()> {
    files::create_dir(&dir.join("tokens"))?;
    for role in [Role::Worker, Role::Client] {
        let path = token_path(dir, role);
        let kept = files::read_optional(&path)?.and_then(|text| text.parse::<JoinToken>().ok());
        // One of before the CA was replaced names the old one.
        if kept.is_none_or(|kept| kept.ca_fingerprint != shared.trust.fingerprint()) {
            let token = token(shared, role, TOKEN_TTL_S, UNLIMITED_USES).await?;
            files::write_atomic(&path, format!("{token}\n").as_bytes())?;
        }
    }
    if !has_local(shared).await? {
        let token = token(shared, Role::Admin, ONCE_TTL_S, 1).await?;
        let applicant = Applicant::new()?;
        let key = requested_key(&applicant.csr_der)?;
        let id = request();
        let admitted = loop {
            match shared.calls.join(redeem(&token, key), id).await {
                Ok(admitted) => break admitted,
                Err(refusal) => wait(refusal).await?,
            }
        };
        let stored = shared.trust.store_local(applicant, admitted.member, key);
        stored.context("cannot make a credential for `fleet`")?;
        info!("`fleet` on this machine is {}, an admin", admitted.member);
    }
    Ok(())
}

/// Whether there is a credential that the cluster still knows. One that was revoked, or is of after the backup from which the cluster was
/// restored, is replaced: who may start a coordinator here has the CA's key.
async fn has_local(shared: &Shared) -> Result<bool> {
    let Some(local) = shared.trust.local()? else { return Ok(false) };
    let key = local.key_hash().map_err(anyhow::Error::msg)?;
    // What this coordinator has when it starts may be of before the credential was revoked, or made.
    up_to_date(shared).await?;
    Ok(shared.gate.known(local.member).is_some_and(|admitted| admitted.key == key))
}

/// Returns when this coordinator has all that was decided before, however long it takes to find a leader.
pub async fn up_to_date(shared: &Shared) -> Result<()> {
    while let Err(refusal) = shared.calls.look().await {
        wait(refusal).await?;
    }
    Ok(())
}

async fn token(shared: &Shared, role: Role, ttl_s: u64, uses: u32) -> Result<JoinToken> {
    loop {
        match tokens::create(shared, request().into(), None, tokens::Wish { role, ttl_s, uses }).await {
            Ok(token) => return Ok(token),
            Err(refusal) => wait(refusal).await?,
        }
    }
}

/// Before the next attempt, where there is any sense in one.
async fn wait(refusal: Refusal) -> Result<()> {
    if !refusal.kind.is_passing() {
        return Err(anyhow!(refusal.message));
    }
    tokio::time::sleep(RETRY).await;
    Ok(())
}

pub fn token_path(dir: &Path, role: Role) -> PathBuf {
    dir.join("tokens").join(if role == Role::Worker { "worker.token" } else { "client.token" })
}

fn redeem(token: &JoinToken, key: KeyHash) -> RedeemToken {
    let name = "local".to_owned();
    RedeemToken { id: token.id.clone(), secret_sha256: token.secret_hash(), name, key }
}

/// A request that nobody made before.
fn request() -> RequestId {
    RequestId { client: ClientId(rand::random()), seq: 1 }
}
