//! A member's certificate and key, and their four files: `identity.json`, `cert.pem`, `ca.pem`, and `key.pem`, which only the owner reads.
//!
//! A renewal keeps the key, so that it replaces one file, which is atomic; where the CA is another one, two.

use super::authorities::Authorities;
use super::ca::{CLOCK_SKEW, certificate_pem};
use super::peer::{KeyHash, Peer, key_hash, role_name};
use super::secret::PrivateKey;
use super::tls;
use crate::files;
use crate::ids::NodeId;
use crate::protocol::{Member, Role};
use rcgen::{CertificateParams, KeyPair};
use rustls_pki_types::PrivatePkcs8KeyDer;
use serde_json::json;
use std::fs;
use std::io;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// What a process shows to others. The first three fields are what the certificate says.
#[derive(Clone, Debug)]
pub struct Identity {
    pub cluster_id: String,
    pub member: Member,
    pub name: String,
    pub certificate_der: Vec<u8>,
    pub key_pkcs8_der: PrivateKey,
    /// Whom it trusts; one of them signed the certificate.
    pub authorities: Authorities,
}

#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("the identity in {dir} is damaged: {what}; remove that directory and join again with a token")]
    Damaged { dir: String, what: String },
    /// Its own key and certificate may be whole; see `net::mend_authorities`.
    #[error(
        "{path}, by which this member knows its cluster, is damaged: {what}; copy the file of that name from `cluster/` of a coordinator over it, there is no need to join again"
    )]
    DamagedCa { path: String, what: String, fingerprint: Option<String> },
}

const CERTIFICATE: &str = "cert.pem";
const KEY: &str = "key.pem";
const CA: &str = "ca.pem";
/// For people and scripts, and written last: without it there is no identity.
const SUMMARY: &str = "identity.json";

impl Identity {
    /// An identity from a certificate, which says who it is, its key and its CA.
    pub(super) fn from_parts(
        certificate_der: Vec<u8>,
        key: PrivateKey,
        authorities: Authorities,
    ) -> Result<Identity, String> {
        let Peer { member, name, cluster_id } = Peer::from_certificate(&certificate_der)?;
        let identity =
            Identity { cluster_id, member, name, certificate_der, key_pkcs8_der: key, authorities };
        tls::check(&identity).map_err(|error| error.to_string())?;
        if identity.authorities.issuer_of(&identity.certificate_der).is_none() {
            return Err("cert.pem was not signed by a CA in ca.pem".into());
        }
        Ok(identity)
    }

    /// Writes the four files into `dir`, which is made where it is missing. While they are not all there, there is no identity: also not
    /// the one that was there before.
    pub fn store(&self, dir: &Path) -> io::Result<()> {
        files::create_dir(dir)?;
        match fs::remove_file(dir.join(SUMMARY)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let key = pem::encode(&pem::Pem::new("PRIVATE KEY", self.key_pkcs8_der.secret_der()));
        let summary = json!({
            "cluster_id": self.cluster_id,
            "role": role_name(self.role()),
            "member": self.member.to_string(),
            "name": self.name,
        });
        files::write_atomic(&dir.join(KEY), key.as_bytes())?;
        self.store_certificate(dir)?;
        store_authorities(dir, &self.authorities)?;
        files::write_atomic(&dir.join(SUMMARY), format!("{summary:#}\n").as_bytes())
    }

    /// Replaces `old` after a renewal. Wherever it is interrupted, certificate and CAs belong together.
    pub fn store_renewed(&self, dir: &Path, old: &Identity) -> io::Result<()> {
        if self.authorities == old.authorities {
            return self.store_certificate(dir);
        }
        let others = self.authorities.iter().chain(old.authorities.iter()).map(<[u8]>::to_vec);
        store_authorities(dir, &Authorities::new(self.authorities.issuing().to_vec(), others))?;
        self.store_certificate(dir)?;
        store_authorities(dir, &self.authorities)
    }

    fn store_certificate(&self, dir: &Path) -> io::Result<()> {
        let pem = certificate_pem(&self.certificate_der);
        files::write_atomic(&dir.join(CERTIFICATE), pem.as_bytes())
    }

    /// Reads what `store` wrote; `None` where there is no `identity.json`. Refuses files that do not belong together.
    pub fn load(dir: &Path) -> Result<Option<Identity>, IdentityError> {
        if files::read_optional(&dir.join(SUMMARY))?.is_none() {
            return Ok(None);
        }
        let damaged = |what: String| IdentityError::Damaged { dir: dir.display().to_string(), what };
        let der = |file: &str| {
            let text = read(&dir.join(file))?.ok_or_else(|| damaged(format!("{file} is missing")))?;
            let pem = pem::parse(text).map_err(|error| damaged(format!("{file}: {error}")))?;
            Ok::<_, IdentityError>(pem.into_contents())
        };
        let authorities = load_authorities(dir)?;
        let identity = Identity::from_parts(der(CERTIFICATE)?, PrivateKey::new(der(KEY)?), authorities);
        identity.map(Some).map_err(damaged)
    }

    /// Who this is, as others see it.
    pub fn peer(&self) -> Peer {
        let Identity { member, name, cluster_id, .. } = self.clone();
        Peer { member, name, cluster_id }
    }

    /// By which the cluster knows it.
    pub fn key_hash(&self) -> Result<KeyHash, String> {
        key_hash(&self.certificate_der)
    }

    /// This identity, with these CAs to be trusted.
    pub fn trusting(self, authorities: Authorities) -> Identity {
        Identity { authorities, ..self }
    }

    /// Whether its certificate is of the CA that issues.
    pub fn is_of_issuing_ca(&self) -> bool {
        self.authorities.issuer_of(&self.certificate_der) == Some(self.authorities.issuing())
    }

    /// Whether the same CA made both certificates.
    pub fn is_of_same_ca(&self, other: &Identity) -> bool {
        let issuer =
            |identity: &Identity| self.authorities.issuer_of(&identity.certificate_der).map(<[u8]>::to_vec);
        issuer(self) == issuer(other)
    }

    pub fn role(&self) -> Role {
        self.member.role()
    }

    /// Of a worker's identity.
    pub fn node(&self) -> Option<NodeId> {
        match self.member {
            Member::Worker(node) => Some(node),
            _ => None,
        }
    }

    /// How long the certificate still holds; zero when it does not any more.
    pub fn remaining(&self, now: SystemTime) -> Duration {
        validity(&self.certificate_der).1.duration_since(now).unwrap_or_default()
    }

    /// Whether a third of the certificate's life, or less, is left.
    pub fn is_due(&self, now: SystemTime) -> bool {
        let (from, to) = validity(&self.certificate_der);
        let life = to.duration_since(from + CLOCK_SKEW).unwrap_or_default();
        self.remaining(now) < life / 3
    }

    /// A request for a new certificate over the same key.
    pub fn signing_request(&self) -> Result<Vec<u8>, String> {
        let key = PrivatePkcs8KeyDer::from(self.key_pkcs8_der.secret_der());
        let key = KeyPair::try_from(&key).map_err(|error| error.to_string())?;
        let request =
            CertificateParams::default().serialize_request(&key).map_err(|error| error.to_string())?;
        Ok(request.der().to_vec())
    }

    /// This identity with what was given for its `signing_request`. Refuses a certificate that says something else, or that ends sooner
    /// although no other CA made it.
    pub fn renewed(&self, certificate_der: Vec<u8>, authorities: Authorities) -> Result<Identity, String> {
        let new = Identity::from_parts(certificate_der, self.key_pkcs8_der.clone(), authorities)?;
        if new.peer() != self.peer() {
            return Err(format!("the new certificate is for {}, not for {}", new.member, self.member));
        }
        let same_ca = self.authorities.issuer_of(&new.certificate_der)
            == self.authorities.issuer_of(&self.certificate_der);
        if same_ca && validity(&new.certificate_der).1 < validity(&self.certificate_der).1 {
            return Err("the new certificate ends before the one that is here; compare the clocks".into());
        }
        Ok(new)
    }
}

/// Replaces the CAs alone, where the file of them is damaged.
pub fn store_authorities(dir: &Path, authorities: &Authorities) -> io::Result<()> {
    files::write_atomic(&dir.join(CA), authorities.to_pem().as_bytes())
}

fn load_authorities(dir: &Path) -> Result<Authorities, IdentityError> {
    let path = dir.join(CA);
    let damaged = |what: String, fingerprint| {
        let path = path.display().to_string();
        IdentityError::DamagedCa { path, what, fingerprint }
    };
    let text = read(&path)?.ok_or_else(|| damaged("it is missing".into(), None))?;
    Authorities::from_pem(&text).map_err(|unreadable| damaged(unreadable.why, unreadable.fingerprint))
}

/// What is no text any more is damaged, and not what cannot be read.
fn read(path: &Path) -> io::Result<Option<String>> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(String::from_utf8_lossy(&bytes).into_owned())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(io::Error::new(error.kind(), format!("cannot read {}: {error}", path.display()))),
    }
}

/// From when to when a certificate holds. Nothing holds that cannot be read.
pub(super) fn validity(certificate_der: &[u8]) -> (SystemTime, SystemTime) {
    let time = |time: x509_parser::time::ASN1Time| {
        UNIX_EPOCH + Duration::from_secs(u64::try_from(time.timestamp()).unwrap_or_default())
    };
    match x509_parser::parse_x509_certificate(certificate_der) {
        Ok((_, certificate)) => {
            (time(certificate.validity().not_before), time(certificate.validity().not_after))
        }
        Err(_) => (UNIX_EPOCH, UNIX_EPOCH),
    }
}
