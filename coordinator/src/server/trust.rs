//! What this coordinator shows and signs: its own certificate, and those of the members. All coordinators have the same CA.

use anyhow::{Context, Result};
use fleet_common::net::{self, ClusterCa, Identity, Socket};
use fleet_common::protocol::Member;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};
use tracing::{info, warn};

/// Between looks at what ends soon. A tenth of what is left when a certificate is renewed would do.
const LOOK_EVERY: Duration = Duration::from_secs(3600);

pub struct Trust {
    ca: ClusterCa,
    /// How long certificates hold.
    life: Duration,
    identity: Mutex<Arc<Identity>>,
    identity_dir: PathBuf,
    /// The credential of `fleet` on this machine.
    client_dir: PathBuf,
}

impl Trust {
    pub fn new(
        ca: ClusterCa,
        life: Duration,
        identity: Identity,
        identity_dir: PathBuf,
        client_dir: PathBuf,
    ) -> Trust {
        Trust { ca, life, identity: Mutex::new(Arc::new(identity)), identity_dir, client_dir }
    }

    pub fn ca(&self) -> &ClusterCa {
        &self.ca
    }

    pub fn identity(&self) -> Arc<Identity> {
        self.identity.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// A certificate for a member that was admitted.
    pub fn sign(&self, csr_der: &[u8], member: Member, name: &str) -> Result<Vec<u8>, String> {
        let signed = self.ca.sign(csr_der, member, name, SystemTime::now(), self.life);
        signed.map_err(|error| error.to_string())
    }

    /// A key and certificate for `fleet` on this machine.
    pub fn issue_local(&self, member: Member) -> Result<()> {
        let identity = self.ca.issue(member, "local", SystemTime::now(), self.life)?;
        Ok(identity.store(&self.client_dir)?)
    }

    /// Whether there is a credential for `fleet` on this machine.
    pub fn has_local(&self) -> Result<bool> {
        Ok(Identity::load(&self.client_dir)?.is_some())
    }

    /// Renews what this coordinator holds itself, whenever it is due, for as long as it runs.
    pub async fn keep_fresh(self: Arc<Self>, sockets: [(Socket, quinn::Endpoint); 2]) {
        loop {
            match self.renew(SystemTime::now()) {
                Ok(true) => {
                    let identity = self.identity();
                    for (socket, endpoint) in &sockets {
                        if let Err(error) = net::renew(endpoint, *socket, &identity) {
                            warn!("the new certificate cannot be used: {error}");
                        }
                    }
                    info!("renewed this coordinator's certificate");
                }
                Ok(false) => {}
                Err(error) => warn!("certificates were not renewed: {error:#}"),
            }
            tokio::time::sleep(LOOK_EVERY.min(self.life / 10)).await;
        }
    }

    /// Whether this coordinator has a new certificate.
    fn renew(&self, now: SystemTime) -> Result<bool> {
        if let Some(local) = Identity::load(&self.client_dir)?
            && local.remaining(now) < self.life / 3
        {
            self.ca.reissue(&local, now, self.life)?.store_certificate(&self.client_dir)?;
        }
        let old = self.identity();
        if old.remaining(now) >= self.life / 3 {
            return Ok(false);
        }
        let new = self.ca.reissue(&old, now, self.life)?;
        new.store_certificate(&self.identity_dir)
            .with_context(|| format!("cannot write to {}", self.identity_dir.display()))?;
        *self.identity.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(new);
        Ok(true)
    }
}
