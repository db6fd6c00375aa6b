//! Joining: a token and a signing request against a certificate. The only thing open without one.

use super::Shared;
use super::gate::Pass;
use crate::cluster::commands::RedeemToken;
use crate::cluster::session::RequestId;
use fleet_common::ids::ClientId;
use fleet_common::net;
use fleet_common::protocol::{Admission, JoinReply, JoinRequest, Refusal, RefusalKind, Role};
use sha2::{Digest, Sha256};
use tracing::{debug, info};

/// `_pass` is the joiner's place at the gate, until it is answered.
pub async fn serve(shared: &Shared, connection: &quinn::Connection, _pass: Pass) {
    let from = connection.remote_address();
    let exchange = match net::receive_join(connection).await {
        Ok(exchange) => exchange,
        Err(error) => return debug!("{from} wanted to join: {error}"),
    };
    let reply = match admit(shared, &exchange.request).await {
        Ok(admission) => {
            info!("{from} joined as {}", admission.member);
            JoinReply::Accepted(Box::new(admission))
        }
        Err(refusal) => {
            info!("{from} was not let in: {}", refusal.message);
            JoinReply::Refused(refusal)
        }
    };
    if let Err(error) = exchange.answer(&reply).await {
        debug!("{from} did not take its answer: {error}");
    }
}

async fn admit(shared: &Shared, request: &JoinRequest) -> Result<Admission, Refusal> {
    let key = net::requested_key(&request.csr_der)
        .map_err(|error| Refusal { kind: RefusalKind::Invalid, message: error.to_string() })?;
    let redeem = RedeemToken {
        id: request.token_id.clone(),
        secret_sha256: Sha256::digest(request.token_secret.as_bytes()).into(),
        name: request.name.clone(),
        key,
    };
    // The same request sent twice is one use of the token.
    let hash = Sha256::digest(&request.csr_der);
    let mut client = [0; 16];
    client.copy_from_slice(&hash[..16]);
    let id = RequestId { client: ClientId(u128::from_be_bytes(client)), seq: 1 };
    let admitted = shared.calls.join(redeem, id).await?;
    let (certificate_der, authorities) = shared
        .trust
        .sign(&request.csr_der, admitted.member, &admitted.name, key)
        .map_err(|message| Refusal { kind: RefusalKind::Invalid, message })?;
    let is_coordinator = admitted.member.role() == Role::Coordinator;
    Ok(Admission {
        member: admitted.member,
        certificate_der,
        authorities,
        coordinators: shared.addresses.borrow().clone(),
        cas: if is_coordinator { shared.trust.cas() } else { Vec::new() },
    })
}
