//! Join tokens. Their secrets are made here and kept nowhere: the state has only hashes.

use super::Shared;
use super::calls::unavailable;
use crate::cluster::Answer;
use crate::cluster::commands::{Change, CreateToken, RevokeToken};
use crate::cluster::session::{RequestId, Stamp};
use fleet_common::ids::{ClientId, UserId};
use fleet_common::net::JoinToken;
use fleet_common::protocol::{Refusal, RefusalKind, Role};

/// Longest life of a token: ten years.
const TTL_MAX_S: u64 = 10 * 365 * 24 * 3600;

/// What a token is to be.
pub struct Wish {
    pub role: Role,
    pub ttl_s: u64,
    pub uses: u32,
}

/// Makes a token whose secret is known only to the caller. `by`: the user who wants it, if it is not this coordinator itself.
pub async fn create(
    shared: &Shared,
    stamp: Stamp,
    by: Option<UserId>,
    wish: Wish,
) -> Result<JoinToken, Refusal> {
    let Wish { role, ttl_s, uses } = wish;
    if ttl_s == 0 || ttl_s > TTL_MAX_S || uses == 0 {
        return Err(invalid(format!("a token has at least one use and lives 1 to {TTL_MAX_S} seconds")));
    }
    let token = JoinToken::generate(role, shared.trust.fingerprint())
        .map_err(|error| unavailable(error.to_string()))?;
    let create = CreateToken {
        id: token.id.clone(),
        secret_sha256: token.secret_hash(),
        role,
        ttl_ms: ttl_s.saturating_mul(1000),
        uses,
    };
    match shared.calls.propose(stamp, by, Change::CreateToken(create)).await? {
        Answer::TokenCreated { id } if id == token.id => Ok(token),
        // The answer to an earlier try was lost, and its secret with it.
        Answer::TokenCreated { id: lost } => {
            let revoke = RequestId { client: ClientId(rand::random()), seq: 1 };
            let change = Change::RevokeToken(RevokeToken { id: lost.clone() });
            match shared.calls.propose(revoke.into(), None, change).await {
                // an earlier try of this may have revoked it
                Err(refusal) if refusal.kind != RefusalKind::NotFound => return Err(refusal),
                Ok(_) | Err(_) => {}
            }
            let message = format!(
                "an earlier try of this request made the token {lost}, whose secret is kept nowhere; it is revoked, ask for another with a new request"
            );
            Err(Refusal { kind: RefusalKind::Spent, message })
        }
        Answer::Rejected(refusal) => Err(refusal),
        other => Err(unavailable(format!("the cluster gave an answer that does not fit: {other:?}"))),
    }
}

fn invalid(message: String) -> Refusal {
    Refusal { kind: RefusalKind::Invalid, message }
}
