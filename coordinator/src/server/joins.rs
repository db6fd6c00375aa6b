//! Joining: a token and a signing request against a certificate. The only thing open without one.

use super::Shared;
use crate::cluster::Answer;
use crate::cluster::commands::{Change, RedeemToken};
use crate::cluster::session::RequestId;
use fleet_common::ids::{ClientId, NodeId};
use fleet_common::net;
use fleet_common::protocol::{JoinReply, JoinRequest, Member, Role};
use sha2::{Digest, Sha256};
use std::time::{Duration, SystemTime};
use tracing::{debug, info};

/// How long a member's certificate holds.
pub const CERTIFICATE_VALIDITY: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
/// Certificates hold from this long before, for joiners whose clock is behind.
const CLOCK_SKEW: Duration = Duration::from_secs(3600);

pub async fn serve(shared: &Shared, connection: &quinn::Connection) {
    let from = connection.remote_address();
    let Ok(_permit) = shared.joins.try_acquire() else {
        return connection.close(1u32.into(), b"too many are joining at once; try again");
    };
    let exchange = match net::receive_join(connection).await {
        Ok(exchange) => exchange,
        Err(error) => return debug!("{from} wanted to join: {error}"),
    };
    let reply = match admit(shared, &exchange.request).await {
        Ok(reply) => reply,
        Err(why) => {
            info!("{from} was not let in: {why}");
            JoinReply::Refused(why)
        }
    };
    if let Err(error) = exchange.answer(&reply).await {
        debug!("{from} did not take its answer: {error}");
    }
}

async fn admit(shared: &Shared, request: &JoinRequest) -> Result<JoinReply, String> {
    let redeem = RedeemToken {
        id: request.token_id.clone(),
        secret_sha256: Sha256::digest(request.token_secret.as_bytes()).into(),
        name: request.name.clone(),
    };
    // Guesses are turned away here, so that they do not fill the log.
    let (id, secret) = (redeem.id.clone(), redeem.secret_sha256);
    let known = shared
        .handle
        .read(move |state| state.tokens().get(&id).is_some_and(|token| token.secret_sha256 == secret));
    if !known.await.map_err(|refusal| refusal.message)? {
        return Err("this token is not known here; use one that this cluster issued".into());
    }
    // The same request sent twice is one use of the token.
    let hash = Sha256::digest(&request.csr_der);
    let mut client = [0; 16];
    client.copy_from_slice(&hash[..16]);
    let id = RequestId { client: ClientId(u128::from_be_bytes(client)), seq: 1 };
    let answer = shared
        .handle
        .propose(Some(id), Change::RedeemToken(redeem))
        .await
        .map_err(|refusal| refusal.message)?;
    let member = match answer {
        Answer::Redeemed { member } => member,
        Answer::Rejected(refusal) => return Err(refusal.message),
        other => return Err(format!("the cluster gave an answer that does not fit: {other:?}")),
    };
    let (role, node) = match member {
        Member::Worker(node) => (Role::Worker, Some(node)),
        other => (other.role(), None),
    };
    let name = match node {
        Some(node) => {
            shared.handle.read(move |state| state.node_name(node)).await.map_err(|refusal| refusal.message)?
        }
        None => client_name(&request.name),
    };
    let ca = &shared.ca;
    let not_before = SystemTime::now() - CLOCK_SKEW;
    let certificate_der = ca
        .sign(&request.csr_der, ca.cluster_id(), &name, role, node, not_before, CERTIFICATE_VALIDITY)
        .map_err(|error| error.to_string())?;
    info!("{name} joined as {}", described(role, node));
    Ok(JoinReply::Accepted {
        cluster_id: ca.cluster_id().to_owned(),
        role,
        node,
        certificate_der,
        ca_der: ca.der().to_vec(),
    })
}

fn client_name(wish: &str) -> String {
    let name: String =
        wish.chars().filter(|c| c.is_ascii_alphanumeric() || "._-@".contains(*c)).take(63).collect();
    if name.is_empty() { "client".to_owned() } else { name }
}

fn described(role: Role, node: Option<NodeId>) -> String {
    match (role, node) {
        (_, Some(node)) => format!("worker {node}"),
        (Role::Client, None) => "client".to_owned(),
        (role, None) => format!("{role:?}").to_lowercase(),
    }
}
