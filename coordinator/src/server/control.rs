//! Asks the planner again and again, and proposes what it decides.

use super::Shared;
use crate::cluster::Answer;
use crate::planner;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::time::timeout;
use tracing::{debug, info};

/// At the latest; wake-ups come sooner. Leases run out without one.
const PLAN_EVERY: Duration = Duration::from_millis(250);

pub async fn run(shared: Arc<Shared>) {
    loop {
        // Either way it is time to look.
        let _ = timeout(PLAN_EVERY, shared.roster.plan.notified()).await;
        let status = shared.handle.status();
        if status.leading_since.is_none() || status.read_only.is_some() {
            continue;
        }
        let observed = shared.roster.observed(status.leading_since);
        let now_ms = shared.roster.now_ms();
        let unix = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let unix_ms = unix.as_millis() as u64;
        let planned = shared.handle.read(move |state| planner::plan(state, &observed, now_ms, unix_ms)).await;
        for (change, why) in planned.unwrap_or_default() {
            let name = change.name();
            match shared.handle.propose(None, change).await {
                Ok(Answer::Rejected(refusal)) => debug!("{name} came to nothing: {}", refusal.message),
                Ok(_) => info!("{why}"),
                Err(refusal) => debug!("{name} was not recorded: {}", refusal.message),
            }
        }
    }
}
