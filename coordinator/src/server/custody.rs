//! The CAs whose keys are on this coordinator's disk: the present one in `cluster/`, and one that is to follow, with its certificate's
//! SHA-256 in its name, in `cluster/next-.../`. Wherever this is interrupted, the next start finds either the one or the other.

use anyhow::{Context, Result, bail};
use fleet_common::net::{Authorities, CaError, ClusterCa};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tracing::{info, warn};

const NEXT: &str = "next-";
/// Digits of the fingerprint in the name.
const DIGITS: usize = 16;

pub struct Custody {
    dir: PathBuf,
    present: Arc<ClusterCa>,
    next: Vec<Arc<ClusterCa>>,
}

impl Custody {
    /// What is in this directory; `None` where there is no CA.
    pub fn load(dir: &Path) -> Result<Option<Custody>> {
        let next = candidates(dir);
        let present = match ClusterCa::load(dir) {
            Ok(Some(present)) => present,
            Ok(None) => return Ok(None),
            Err(error @ CaError::Damaged { .. }) => {
                // The key of the new one is written before its certificate.
                let Some(interrupted) = next.iter().find(|ca| ca.has_key_in(dir)) else {
                    return Err(error.into());
                };
                interrupted.store(dir)?;
                ClusterCa::load(dir)?.context("it was just written")?
            }
            Err(error) => return Err(error.into()),
        };
        Ok(Some(Custody { dir: dir.to_owned(), present: Arc::new(present), next }))
    }

    /// Begins with these: the present one, which is written last, and others.
    pub fn begin(dir: &Path, present: ClusterCa, others: Vec<ClusterCa>) -> Result<Custody> {
        let mut custody = Custody { dir: dir.to_owned(), present: Arc::new(present), next: Vec::new() };
        for other in others {
            custody.keep(other)?;
        }
        custody.present.store(dir)?;
        Ok(custody)
    }

    pub fn present(&self) -> &Arc<ClusterCa> {
        &self.present
    }

    /// The CA with this certificate, if its key is here.
    pub fn of(&self, der: &[u8]) -> Option<&Arc<ClusterCa>> {
        std::iter::once(&self.present).chain(&self.next).find(|ca| ca.der() == der)
    }

    pub fn next(&self) -> impl Iterator<Item = &Arc<ClusterCa>> {
        self.next.iter()
    }

    /// All of them; the present one issues, as far as is known here.
    pub fn authorities(&self) -> Authorities {
        Authorities::new(self.present.der().to_vec(), self.next.iter().map(|ca| ca.der().to_vec()))
    }

    /// Puts a CA on the disk that is to follow.
    pub fn keep(&mut self, ca: ClusterCa) -> Result<()> {
        if ca.cluster_id() != self.present.cluster_id() {
            bail!("this is the CA of cluster {}", ca.cluster_id());
        }
        if self.of(ca.der()).is_none() {
            ca.store(&self.place(&ca))?;
            self.next.push(Arc::new(ca));
        }
        Ok(())
    }

    /// The one with this certificate is the present one from now on; all others are removed. Whether that is new.
    pub fn settle(&mut self, der: &[u8]) -> Result<bool> {
        if self.present.der() == der {
            return Ok(false);
        }
        let ca = self.of(der).context(
            "this coordinator does not have the key of the cluster's CA; take it out and join it anew",
        )?;
        let ca = ca.clone();
        ca.store(&self.dir)?;
        info!("the CA {} has replaced the one before", ca.fingerprint());
        self.present = ca;
        self.forget(None);
        Ok(true)
    }

    /// Removes all that are to follow but the one with this certificate.
    pub fn forget(&mut self, but: Option<&[u8]>) {
        let (keep, gone) = std::mem::take(&mut self.next).into_iter().partition(|ca| Some(ca.der()) == but);
        self.next = keep;
        let gone: Vec<Arc<ClusterCa>> = gone;
        for ca in gone {
            let place = self.place(&ca);
            if let Err(error) = fs::remove_dir_all(&place) {
                warn!(
                    "cannot remove {}, which holds a CA's key that is not needed any more: {error}",
                    place.display()
                );
            }
        }
    }

    fn place(&self, ca: &ClusterCa) -> PathBuf {
        let fingerprint = ca.fingerprint();
        self.dir.join(format!("{NEXT}{}", fingerprint.get(..DIGITS).unwrap_or_default()))
    }
}

/// Those that are whole; another coordinator has what is not.
fn candidates(dir: &Path) -> Vec<Arc<ClusterCa>> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let places = entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(NEXT));
    let mut found = Vec::new();
    for place in places.map(|entry| entry.path()) {
        match ClusterCa::load(&place) {
            Ok(Some(ca)) => found.push(Arc::new(ca)),
            Ok(None) => {}
            Err(error) => warn!("{} is left aside: {error}", place.display()),
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::SystemTime;

    fn ca() -> ClusterCa {
        ClusterCa::create("c1", SystemTime::now()).unwrap()
    }

    #[test]
    fn wherever_a_replacement_is_interrupted_the_directory_opens() {
        let dir = tempfile::tempdir().unwrap();
        let cluster = dir.path().join("cluster");
        let mut custody = Custody::begin(&cluster, ca(), Vec::new()).unwrap();
        let (old, new) = (custody.present().der().to_vec(), ca());
        let der = new.der().to_vec();
        // The certificate of a candidate comes last: without it there is none.
        let half = cluster.join("next-0123456789abcdef");
        ca().store(&half).unwrap();
        fs::remove_file(half.join("ca.pem")).unwrap();
        custody.keep(new).unwrap();
        let mut custody = Custody::load(&cluster).unwrap().unwrap();
        assert_eq!(custody.present().der(), old);
        assert!(custody.of(&der).is_some() && custody.next().count() == 1);

        // Its key has taken the old one's place, and its certificate has not.
        let place = fs::read_dir(&cluster).unwrap().flatten().map(|entry| entry.path());
        let place = place.filter(|place| *place != half).find(|place| place.is_dir()).unwrap();
        fs::copy(place.join("ca.key"), cluster.join("ca.key")).unwrap();
        let interrupted = Custody::load(&cluster).unwrap().unwrap();
        assert_eq!(interrupted.present().der(), der);

        assert!(custody.settle(&der).unwrap() && !custody.settle(&der).unwrap());
        assert!(custody.of(&old).is_none() && !place.exists());
        assert_eq!(Custody::load(&cluster).unwrap().unwrap().present().der(), der);
        assert!(custody.settle(&old).unwrap_err().to_string().contains("take it out"));
    }
}
