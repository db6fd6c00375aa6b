//! What a visitor with the right to may change over HTTP, as the user that he is.

use super::Shared;
use crate::cluster::session::RequestId;
use crate::requests;
use fleet_common::ids::{ClientId, UserId};
use fleet_common::protocol::{Refusal, Request};
use tracing::info;

/// Carries out one change. A second press of a button is another one; all that is offered may be repeated.
pub async fn carry_out(shared: &Shared, user: UserId, request: Request) -> Result<(), Refusal> {
    let name = requests::name(&request);
    info!("{user} asks over HTTP: {request:?}");
    let id = RequestId { client: ClientId(rand::random()), seq: 1 };
    let answer = shared.calls.propose(id.into(), Some(user), requests::change(request)?).await;
    let reply = answer.and_then(requests::reply);
    shared.metrics.count(name, reply.is_ok());
    reply.map(drop)
}
