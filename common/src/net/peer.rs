//! Who a certificate says its holder is.
//!
//! The common name is the display name; a URI says the rest: `fleet://CLUSTER/coordinator/replica-2`, `fleet://CLUSTER/worker/node-1`,
//! `fleet://CLUSTER/client/user-5`. Trust in what is read here comes from the CA's signature, which TLS has checked before.

use crate::protocol::{Member, Role};
use rcgen::{CertificateParams, DistinguishedName, DnType, SanType};
use sha2::{Digest, Sha256};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

/// The other end of a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    pub member: Member,
    pub name: String,
    pub cluster_id: String,
}

/// SHA-256 of a member's public key, by which the cluster knows it again: a renewed certificate has the same one, and nobody can have it
/// made for a key of his own, not even with the CA's.
pub type KeyHash = [u8; 32];

/// Of the key in a certificate, or why it cannot be read.
pub fn key_hash(certificate_der: &[u8]) -> Result<KeyHash, String> {
    let (_, certificate) = X509Certificate::from_der(certificate_der).map_err(|error| error.to_string())?;
    Ok(Sha256::digest(&certificate.public_key().subject_public_key.data).into())
}

/// Longest display name in bytes: the bound of a common name in X.509.
pub const NAME_MAX: usize = 64;

/// Longest cluster id in bytes.
const CLUSTER_ID_MAX: usize = 64;

/// The DNS name that every coordinator's certificate has, and no other: whoever connects asks for it.
pub(super) const COORDINATOR_DNS: &str = "coordinator.fleet";

const SCHEME: &str = "fleet://";

impl Peer {
    /// The subject and names of a certificate for this peer, or why there can be none.
    pub(super) fn certificate_params(&self) -> Result<CertificateParams, String> {
        if self.name.is_empty() || self.name.len() > NAME_MAX || self.name.chars().any(char::is_control) {
            return Err(format!("a name has 1 to {NAME_MAX} bytes and no control characters"));
        }
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '-';
        let id = &self.cluster_id;
        if id.is_empty() || id.len() > CLUSTER_ID_MAX || !id.chars().all(plain) {
            return Err(format!("a cluster id has 1 to {CLUSTER_ID_MAX} letters, digits and hyphens"));
        }
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, self.name.as_str());
        let uri = self.uri().try_into().map_err(|error| format!("{error}"))?;
        params.subject_alt_names.push(SanType::URI(uri));
        if self.member.role() == Role::Coordinator {
            let dns = COORDINATOR_DNS.try_into().map_err(|error| format!("{error}"))?;
            params.subject_alt_names.push(SanType::DnsName(dns));
        }
        Ok(params)
    }

    /// Reads what `certificate_params` wrote.
    pub fn from_certificate(der: &[u8]) -> Result<Peer, String> {
        let (_, certificate) = X509Certificate::from_der(der).map_err(|error| error.to_string())?;
        let name = certificate.subject().iter_common_name().next().and_then(|cn| cn.as_str().ok());
        let name = name.ok_or("the certificate has no name")?.to_owned();
        let san = certificate.subject_alternative_name().map_err(|error| error.to_string())?;
        let names = san.map(|san| san.value.general_names.as_slice()).unwrap_or_default();
        let uri = names.iter().find_map(|name| match name {
            GeneralName::URI(uri) => uri.strip_prefix(SCHEME),
            _ => None,
        });
        let uri = uri.ok_or("the certificate is not one of a fleet cluster")?;
        let parts: Vec<&str> = uri.split('/').collect();
        let [cluster_id, role, id] = parts[..] else {
            return Err("the certificate does not say who its holder is".into());
        };
        let member = id
            .parse()
            .ok()
            .filter(|member: &Member| role_name(member.role()) == role && member.to_string() == id);
        let member = member.ok_or("the certificate names no member")?;
        Ok(Peer { member, name, cluster_id: cluster_id.to_owned() })
    }

    fn uri(&self) -> String {
        format!("{SCHEME}{}/{}/{}", self.cluster_id, role_name(self.member.role()), self.member)
    }
}

/// The role as it stands in certificates and tokens. No certificate says `admin`.
pub(super) fn role_name(role: Role) -> &'static str {
    match role {
        Role::Coordinator => "coordinator",
        Role::Worker => "worker",
        Role::Client => "client",
        Role::Admin => "admin",
    }
}

pub(super) fn parse_role(text: &str) -> Option<Role> {
    [Role::Coordinator, Role::Worker, Role::Client, Role::Admin]
        .into_iter()
        .find(|role| role_name(*role) == text)
}
