//! What this coordinator shows and signs: its own certificate, and those of the members. All coordinators have the same CAs.

use super::custody::Custody;
use crate::cluster::authorities::Cas;
use anyhow::{Context, Result, bail};
use fleet_common::net::{
    Applicant, Authorities, ClusterCa, Identity, IdentityError, KeyHash, Login, PrivateKey, Seal, Shown,
    requested_key, store_authorities,
};
use fleet_common::protocol::Member;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

pub struct Trust {
    /// How long certificates hold.
    life: Duration,
    identity_dir: PathBuf,
    /// The credential of `fleet` on this machine.
    client_dir: PathBuf,
    inner: Mutex<Inner>,
}

struct Inner {
    custody: Custody,
    /// What the cluster has decided, as far as is known here.
    cas: Cas,
    identity: Arc<Identity>,
}

/// What came of a look at what is held.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Refreshed {
    /// Another certificate of its own, or other CAs, are to be shown from now on.
    pub own: bool,
    /// The CA was replaced: what was signed by the one before is worth nothing.
    pub settled: bool,
    /// The credential of `fleet` on this machine has moved to the CA that issues.
    pub moved: Option<Member>,
}

impl Trust {
    pub fn new(custody: Custody, life: Duration, identity: Identity, data_dir: &Path) -> Trust {
        let identity = Arc::new(identity.trusting(custody.authorities()));
        let inner = Mutex::new(Inner { custody, cas: Cas::default(), identity });
        Trust { life, identity_dir: data_dir.join("identity"), client_dir: data_dir.join("client"), inner }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// SHA-256 of the present CA's certificate, which tokens carry.
    pub fn fingerprint(&self) -> String {
        self.lock().custody.present().fingerprint()
    }

    /// What this coordinator shows to those who connect.
    pub fn identity(&self) -> Arc<Identity> {
        self.lock().identity.clone()
    }

    /// What it shows when it connects to another coordinator. Which CAs that one accepts depends on how far it is: each attempt is made with
    /// another certificate. Likewise that one may show a certificate of the CA before, which is no proof by itself: see `is_accepted`.
    pub fn for_attempt(&self, attempt: u32) -> Result<Arc<Identity>, String> {
        let inner = self.lock();
        let others: Vec<&Arc<ClusterCa>> = inner.custody.next().collect();
        match (attempt as usize % (others.len() + 1)).checked_sub(1) {
            None => Ok(Arc::new(Identity::clone(&inner.identity).trusting(inner.accepted_of_peers()))),
            Some(other) => {
                let now = SystemTime::now();
                let issued = others[other].reissue(&inner.identity, now, self.life);
                let issued = issued.map_err(|error| error.to_string())?;
                Ok(Arc::new(issued.trusting(inner.accepted_of_peers())))
            }
        }
    }

    /// Whether a CA that counts made this certificate.
    pub fn is_accepted(&self, certificate_der: &[u8]) -> bool {
        self.lock().accepted().issuer_of(certificate_der).is_some()
    }

    /// What members are to trust.
    pub fn authorities(&self) -> Authorities {
        let inner = self.lock();
        inner.cas.trusted().unwrap_or_else(|| Authorities::one(inner.custody.present().der().to_vec()))
    }

    /// A certificate for a member that was admitted, and whom it is to trust. `key` is the one with which it was.
    pub fn sign(
        &self,
        csr_der: &[u8],
        member: Member,
        name: &str,
        key: KeyHash,
    ) -> Result<(Vec<u8>, Authorities), String> {
        if requested_key(csr_der).map_err(|error| error.to_string())? != key {
            return Err(
                "a certificate is renewed over the key that it has; join again for another one".into()
            );
        }
        let issuing = self.lock().issuing();
        let signed = issuing.sign(csr_der, member, name, SystemTime::now(), self.life);
        Ok((signed.map_err(|error| error.to_string())?, self.authorities()))
    }

    /// The CAs of a new coordinator, the present one first. Another one that was made here and never introduced is nobody else's.
    pub fn cas(&self) -> Vec<(Vec<u8>, PrivateKey)> {
        let inner = self.lock();
        let moving = inner.cas.next.as_ref().filter(|next| next.moving);
        let next = moving.and_then(|next| inner.custody.of(&next.der));
        let all = std::iter::once(inner.custody.present()).chain(next);
        all.map(|ca| (ca.der().to_vec(), ca.key())).collect()
    }

    /// By which logins of the page are known.
    pub fn seals(&self) -> Vec<Seal> {
        let inner = self.lock();
        let others = inner.custody.next().map(|ca| ca.seal());
        std::iter::once(inner.custody.present().seal()).chain(others).collect()
    }

    /// What a client may show a browser as a login.
    pub fn log_in(&self, login: &Login, key: &KeyHash) -> String {
        login.seal(&self.lock().issuing().seal(), key)
    }

    /// A certificate for browsers, and how long it is to be shown.
    pub fn show(&self, hosts: &[String]) -> Result<(Shown, Duration)> {
        let issuing = self.lock().issuing();
        Ok((Shown::made(&issuing, hosts, SystemTime::now(), self.life)?, self.life * 2 / 3))
    }

    /// The key of this CA, for another coordinator.
    pub fn key_of(&self, der: &[u8]) -> Option<PrivateKey> {
        self.lock().custody.of(der).map(|ca| ca.key())
    }

    /// Puts a CA that another coordinator sent on the disk.
    pub fn keep(&self, der: Vec<u8>, key: &PrivateKey) -> Result<()> {
        self.lock().custody.keep(ClusterCa::from_parts(der, key)?)
    }

    /// Makes a CA that may follow, and returns its certificate (DER). Its key is on the disk then.
    pub fn make_next(&self) -> Result<Vec<u8>> {
        let mut inner = self.lock();
        if inner.cas.next.as_ref().is_some_and(|next| next.moving) {
            bail!("the CA is being replaced already; end that first with `coordinator rotate-ca --finish`");
        }
        let ca = ClusterCa::create(inner.custody.present().cluster_id(), SystemTime::now())?;
        let der = ca.der().to_vec();
        // Those of earlier attempts, of which nothing came.
        let next = inner.cas.next.as_ref().map(|next| next.der.clone());
        inner.custody.forget(next.as_deref());
        inner.custody.keep(ca)?;
        Ok(der)
    }

    /// The CAs that are to follow and whose keys are here.
    pub fn held(&self) -> Vec<Vec<u8>> {
        self.lock().custody.next().map(|ca| ca.der().to_vec()).collect()
    }

    /// The number of the CA to which members move, if this certificate is of it.
    pub fn shows_next(&self, certificate_der: &[u8]) -> Option<u64> {
        let inner = self.lock();
        let next = inner.cas.next.as_ref().filter(|next| next.moving)?;
        let of_next = Authorities::one(next.der.clone()).issuer_of(certificate_der).is_some();
        of_next.then_some(inner.cas.number + 1)
    }

    /// A credential for `fleet` on this machine.
    pub fn store_local(&self, applicant: Applicant, member: Member, key: KeyHash) -> Result<()> {
        let signed = self.sign(&applicant.csr_der, member, "local", key);
        let (certificate_der, authorities) = signed.map_err(anyhow::Error::msg)?;
        Ok(applicant.certified(certificate_der, authorities)?.store(&self.client_dir)?)
    }

    /// The credential for `fleet` on this machine, if there is one.
    pub fn local(&self) -> Result<Option<Identity>> {
        load_mended(&self.client_dir, &self.authorities())
    }

    /// Follows what the cluster has decided, and renews what this coordinator holds itself where it is due.
    pub fn refresh(&self, cas: Cas, now: SystemTime) -> Result<Refreshed> {
        let mut inner = self.lock();
        let settled = !cas.der.is_empty() && inner.custody.settle(&cas.der)?;
        inner.cas = cas;
        let accepted = inner.accepted();
        let (old, present) = (inner.identity.clone(), inner.custody.present().clone());
        let is_present = Authorities::one(present.der().to_vec()).issuer_of(&old.certificate_der).is_some();
        let mut refreshed = Refreshed { settled, ..Refreshed::default() };
        if !is_present || old.remaining(now) < self.life / 3 || old.authorities != accepted {
            let new = match is_present && old.remaining(now) >= self.life / 3 {
                true => Identity::clone(&old),
                false => present.reissue(&old, now, self.life)?,
            };
            let new = new.trusting(accepted);
            new.store_renewed(&self.identity_dir, &old)
                .with_context(|| format!("cannot write to {}", self.identity_dir.display()))?;
            inner.identity = Arc::new(new);
            refreshed.own = true;
        }
        let issuing = inner.issuing();
        drop(inner);
        refreshed.moved = self.refresh_local(&issuing, now)?;
        Ok(refreshed)
    }

    fn refresh_local(&self, issuing: &ClusterCa, now: SystemTime) -> Result<Option<Member>> {
        let Some(old) = self.local()? else { return Ok(None) };
        let authorities = self.authorities();
        let of_issuing = Authorities::one(issuing.der().to_vec()).issuer_of(&old.certificate_der).is_some();
        if of_issuing && old.remaining(now) >= self.life / 3 && old.authorities == authorities {
            return Ok(None);
        }
        let new = issuing.reissue(&old, now, self.life)?.trusting(authorities);
        new.store_renewed(&self.client_dir, &old)?;
        Ok((!of_issuing).then_some(old.member))
    }

    /// How soon to look again at what ends soon: a tenth of what is left when a certificate is renewed would do.
    pub fn look_after(&self) -> Duration {
        const LOOK_EVERY: Duration = Duration::from_secs(3600);
        LOOK_EVERY.min(self.life / 10)
    }
}

impl Inner {
    fn issuing(&self) -> Arc<ClusterCa> {
        let next = self.cas.next.as_ref().filter(|next| next.moving);
        let next = next.and_then(|next| self.custody.of(&next.der));
        next.unwrap_or(self.custody.present()).clone()
    }

    /// Whose certificates coordinators may show that are known by their keys.
    fn accepted_of_peers(&self) -> Authorities {
        let accepted = self.accepted();
        let others = accepted.iter().map(<[u8]>::to_vec).chain(self.cas.previous.clone());
        Authorities::new(accepted.issuing().to_vec(), others.collect::<Vec<_>>())
    }

    /// Whose certificates count here.
    fn accepted(&self) -> Authorities {
        let held = self.custody.authorities();
        let known = self.cas.accepted();
        let others = known.iter().flat_map(|known| known.iter()).chain(held.iter()).map(<[u8]>::to_vec);
        Authorities::new(self.custody.present().der().to_vec(), others)
    }
}

/// An identity of a coordinator's own. It has the CAs, so a damaged copy of them is no loss.
pub fn load_mended(dir: &Path, authorities: &Authorities) -> Result<Option<Identity>> {
    match Identity::load(dir) {
        Err(IdentityError::DamagedCa { path, what, .. }) => {
            tracing::warn!("{path} is damaged ({what}) and is written anew");
            store_authorities(dir, authorities)?;
            Ok(Identity::load(dir)?)
        }
        loaded => Ok(loaded?),
    }
}
