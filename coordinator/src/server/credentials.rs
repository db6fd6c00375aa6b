//! What `fleet` and `worker` on this machine find in the data directory: a client's identity and tokens. Made as soon as there is a leader.

use super::Shared;
use super::tokens;
use crate::cluster::commands::RedeemToken;
use crate::cluster::session::RequestId;
use anyhow::{Context, Result, anyhow};
use fleet_common::files;
use fleet_common::ids::ClientId;
use fleet_common::net::JoinToken;
use fleet_common::protocol::{Refusal, Role, UNLIMITED_USES};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Life of the tokens in the data directory: ten years. Whoever can read them can read the CA's key beside them.
const TOKEN_TTL_S: u64 = 10 * 365 * 24 * 3600;
/// Of the token by which the local client becomes a member.
const ONCE_TTL_S: u64 = 600;
/// Between attempts while there is no leader.
const RETRY: Duration = Duration::from_millis(200);

/// Writes what is not there yet, however long it takes to find a leader.
pub async fn write(dir: &Path, shared: &Shared) -> Result<()> {
    files::create_dir(&dir.join("tokens"))?;
    for role in [Role::Worker, Role::Client] {
        let path = token_path(dir, role);
        if files::read_optional(&path)?.is_none() {
            let token = token(shared, role, TOKEN_TTL_S, UNLIMITED_USES).await?;
            files::write_atomic(&path, format!("{token}\n").as_bytes())?;
        }
    }
    if !shared.trust.has_local()? {
        let (token, id) = (token(shared, Role::Client, ONCE_TTL_S, 1).await?, request());
        let admitted = loop {
            match shared.calls.join(redeem(&token), id).await {
                Ok(admitted) => break admitted,
                Err(refusal) => wait(refusal).await?,
            }
        };
        shared.trust.issue_local(admitted.member).context("cannot make a credential for `fleet`")?;
    }
    Ok(())
}

async fn token(shared: &Shared, role: Role, ttl_s: u64, uses: u32) -> Result<JoinToken> {
    loop {
        match tokens::create(shared, request().into(), role, ttl_s, uses).await {
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

fn redeem(token: &JoinToken) -> RedeemToken {
    RedeemToken { id: token.id.clone(), secret_sha256: token.secret_hash(), name: "local".to_owned() }
}

/// A request that nobody made before.
fn request() -> RequestId {
    RequestId { client: ClientId(rand::random()), seq: 1 }
}
