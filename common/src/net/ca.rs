//! The certificate authority of a cluster. It alone decides what a certificate says: of a signing request it takes the public key.

use super::authorities::Authorities;
use super::identity::{self, Identity};
use super::peer::{KeyHash, Peer};
use super::secret::{PrivateKey, wipe};
use super::web::Seal;
use crate::files;
use crate::protocol::{Member, Role};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PublicKeyData,
};
use rustls_pki_types::{CertificateDer, CertificateSigningRequestDer, PrivatePkcs8KeyDer};
use sha2::{Digest, Sha256};
use std::fmt;
use std::io;
use std::path::Path;
use std::time::{Duration, SystemTime};

/// The CA's certificate and its key (ECDSA P-256).
pub struct ClusterCa {
    cluster_id: String,
    der: CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
}

#[derive(Debug, thiserror::Error)]
pub enum CaError {
    #[error("the signing request cannot be used")]
    BadRequest(#[source] rcgen::Error),
    #[error("no certificate can be made for this name or cluster: {0}")]
    BadName(String),
    #[error("the certificate could not be made")]
    Signing(#[from] rcgen::Error),
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("this is not the CA of a cluster: {0}")]
    Foreign(String),
    #[error("the cluster's CA in {dir} is damaged: {what}; restore ca.pem and ca.key from a backup")]
    Damaged { dir: String, what: String },
}

const CERTIFICATE: &str = "ca.pem";
const KEY: &str = "ca.key";

/// A cluster outlives its machines.
const CA_VALIDITY: Duration = Duration::from_secs(30 * 365 * 24 * 3600);

/// How long a member's certificate holds, unless the coordinator was told otherwise. Renewed when a third is left.
pub const CERTIFICATE_LIFE: Duration = Duration::from_secs(30 * 24 * 3600);

/// Certificates hold from this long before they are made. As much as one has left when it is renewed: a clock may be wrong by ten days
/// in either direction, and locks nobody out.
pub(super) const CLOCK_SKEW: Duration = Duration::from_secs(10 * 24 * 3600);

const SUBJECT: &str = "fleet cluster ";

impl fmt::Debug for ClusterCa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ClusterCa({}, ..)", self.cluster_id)
    }
}

impl ClusterCa {
    /// A new CA for a new cluster. The key is random.
    pub fn create(cluster_id: &str, now: SystemTime) -> Result<ClusterCa, CaError> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, format!("{SUBJECT}{cluster_id}"));
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        (params.not_before, params.not_after) = ((now - CLOCK_SKEW).into(), (now + CA_VALIDITY).into());
        let der = params.self_signed(&key)?.der().clone();
        Ok(ClusterCa { cluster_id: cluster_id.to_owned(), der, issuer: Issuer::new(params, key) })
    }

    /// Reads `DIR/ca.pem` and `DIR/ca.key`; `None` where there is no `ca.pem`.
    pub fn load(dir: &Path) -> Result<Option<ClusterCa>, CaError> {
        let damaged = |what: String| CaError::Damaged { dir: dir.display().to_string(), what };
        let Some(certificate) = files::read_optional(&dir.join(CERTIFICATE))? else { return Ok(None) };
        let key = files::read_optional(&dir.join(KEY))?.ok_or_else(|| damaged("ca.key is missing".into()))?;
        let key = KeyPair::from_pem(&key).map_err(|error| damaged(format!("ca.key: {error}")))?;
        let der = pem::parse(certificate).map_err(|error| damaged(format!("ca.pem: {error}")))?;
        ClusterCa::of(CertificateDer::from(der.into_contents()), key).map(Some).map_err(damaged)
    }

    /// The CA that another coordinator sent. Refuses a key that is not the certificate's.
    pub fn from_parts(der: Vec<u8>, key: &PrivateKey) -> Result<ClusterCa, CaError> {
        let key = KeyPair::try_from(&PrivatePkcs8KeyDer::from(key.secret_der()))?;
        ClusterCa::of(der.into(), key).map_err(CaError::Foreign)
    }

    fn of(der: CertificateDer<'static>, key: KeyPair) -> Result<ClusterCa, String> {
        let cluster_id = match subject(&der) {
            Ok((name, public)) if public == key.der_bytes() => name.strip_prefix(SUBJECT).map(str::to_owned),
            Ok(_) => return Err("ca.key is not the key of ca.pem".into()),
            Err(what) => return Err(format!("ca.pem: {what}")),
        };
        let cluster_id = cluster_id.ok_or("ca.pem is not a fleet cluster's")?;
        let issuer = Issuer::from_ca_cert_der(&der, key).map_err(|error| format!("ca.pem: {error}"))?;
        Ok(ClusterCa { cluster_id, der, issuer })
    }

    /// Whether `DIR/ca.key` is the key of this CA.
    pub fn has_key_in(&self, dir: &Path) -> bool {
        let key = files::read_optional(&dir.join(KEY)).ok().flatten();
        let key = key.and_then(|key| KeyPair::from_pem(&key).ok());
        key.is_some_and(|key| key.der_bytes() == self.issuer.key().der_bytes())
    }

    /// Writes both files, the key first and private, so that a certificate is never without its key.
    pub fn store(&self, dir: &Path) -> io::Result<()> {
        files::create_dir(dir)?;
        let mut key = self.issuer.key().serialize_pem().into_bytes();
        let written = files::write_atomic(&dir.join(KEY), &key);
        wipe(&mut key);
        written?;
        files::write_atomic(&dir.join(CERTIFICATE), certificate_pem(&self.der).as_bytes())
    }

    /// Another copy of it in memory.
    pub fn again(&self) -> Result<ClusterCa, CaError> {
        ClusterCa::from_parts(self.der.to_vec(), &self.key())
    }

    /// The CA's key, for a new coordinator. Goes into no log.
    pub fn key(&self) -> PrivateKey {
        PrivateKey::new(self.issuer.key().serialize_der())
    }

    pub fn cluster_id(&self) -> &str {
        &self.cluster_id
    }

    /// The CA's certificate.
    pub fn der(&self) -> &[u8] {
        &self.der
    }

    /// SHA-256 of the CA's certificate, in hex: what tokens carry.
    pub fn fingerprint(&self) -> String {
        fingerprint(&self.der)
    }

    /// Signs a request that was made elsewhere. Only its public key counts, and that the requester has the private one.
    pub fn sign(
        &self,
        csr_der: &[u8],
        member: Member,
        name: &str,
        now: SystemTime,
        life: Duration,
    ) -> Result<Vec<u8>, CaError> {
        let request = CertificateSigningRequestDer::from(csr_der);
        let request = CertificateSigningRequestParams::from_der(&request).map_err(CaError::BadRequest)?;
        self.certify(&request.public_key, &self.peer(member, name), now - CLOCK_SKEW, now + life)
    }

    /// Makes a key and its certificate.
    pub fn issue(
        &self,
        member: Member,
        name: &str,
        now: SystemTime,
        life: Duration,
    ) -> Result<Identity, CaError> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let peer = self.peer(member, name);
        let certificate_der = self.certify(&key, &peer, now - CLOCK_SKEW, now + life)?;
        Ok(Identity {
            cluster_id: peer.cluster_id,
            member,
            name: peer.name,
            certificate_der,
            key_pkcs8_der: PrivateKey::new(key.serialize_der()),
            authorities: Authorities::one(self.der.to_vec()),
        })
    }

    /// A new certificate for an identity that this process holds. It begins when the old one did: should this machine's clock have jumped
    /// ahead, others still see a certificate that holds.
    pub fn reissue(&self, old: &Identity, now: SystemTime, life: Duration) -> Result<Identity, CaError> {
        let key = KeyPair::try_from(&PrivatePkcs8KeyDer::from(old.key_pkcs8_der.secret_der()))?;
        let from = identity::validity(&old.certificate_der).0.min(now - CLOCK_SKEW);
        let certificate_der = self.certify(&key, &self.peer(old.member, &old.name), from, now + life)?;
        let authorities = Authorities::new(self.der.to_vec(), old.authorities.iter().map(<[u8]>::to_vec));
        Ok(Identity { certificate_der, authorities, ..old.clone() })
    }

    /// A certificate for browsers, of a server with these names and addresses, and its key.
    pub(super) fn for_hosts(
        &self,
        hosts: &[String],
        now: SystemTime,
        life: Duration,
    ) -> Result<(Vec<u8>, PrivateKey), CaError> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let mut params = CertificateParams::new(hosts)?;
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, "fleet");
        (params.not_before, params.not_after) = ((now - CLOCK_SKEW).into(), (now + life).into());
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.use_authority_key_identifier_extension = true;
        let der = params.signed_by(&key, &self.issuer)?.der().to_vec();
        Ok((der, PrivateKey::new(key.serialize_der())))
    }

    /// By which logins are known.
    pub fn seal(&self) -> Seal {
        Seal::of(&self.issuer.key().serialize_der())
    }

    fn peer(&self, member: Member, name: &str) -> Peer {
        Peer { member, name: name.to_owned(), cluster_id: self.cluster_id.clone() }
    }

    fn certify(
        &self,
        key: &impl PublicKeyData,
        peer: &Peer,
        from: SystemTime,
        to: SystemTime,
    ) -> Result<Vec<u8>, CaError> {
        let mut params = peer.certificate_params().map_err(CaError::BadName)?;
        (params.not_before, params.not_after) = (from.into(), to.into());
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = match peer.member.role() {
            Role::Coordinator => {
                vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth]
            }
            Role::Worker | Role::Client | Role::Admin => vec![ExtendedKeyUsagePurpose::ClientAuth],
        };
        params.use_authority_key_identifier_extension = true;
        Ok(params.signed_by(key, &self.issuer)?.der().to_vec())
    }
}

/// Of the key for which a certificate is asked for. The request is signed with it.
pub fn requested_key(csr_der: &[u8]) -> Result<KeyHash, CaError> {
    let request = CertificateSigningRequestDer::from(csr_der);
    let request = CertificateSigningRequestParams::from_der(&request).map_err(CaError::BadRequest)?;
    Ok(Sha256::digest(request.public_key.der_bytes()).into())
}

/// SHA-256 of a certificate in hex.
pub fn fingerprint(der: &[u8]) -> String {
    hex::encode(Sha256::digest(der))
}

pub(super) fn certificate_pem(der: &[u8]) -> String {
    pem::encode(&pem::Pem::new("CERTIFICATE", der))
}

/// Common name and public key of a certificate.
fn subject(der: &[u8]) -> Result<(String, Vec<u8>), String> {
    let (_, certificate) = x509_parser::parse_x509_certificate(der).map_err(|error| error.to_string())?;
    let name = certificate.subject().iter_common_name().next().and_then(|cn| cn.as_str().ok());
    let key = certificate.public_key().subject_public_key.data.to_vec();
    Ok((name.unwrap_or_default().to_owned(), key))
}
