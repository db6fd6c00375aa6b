//! A member's certificate and key, and their four files: `identity.json`, `cert.pem`, `ca.pem`, and `key.pem`, which only the owner reads.

use super::ca::certificate_pem;
use super::peer::{Peer, role_name};
use super::tls;
use crate::files;
use crate::ids::NodeId;
use crate::protocol::Role;
use serde_json::json;
use std::fmt;
use std::io;
use std::path::Path;

/// What a process shows to others. The first four fields are what the certificate says.
#[derive(Clone, Debug)]
pub struct Identity {
    pub cluster_id: String,
    pub role: Role,
    /// Set for workers.
    pub node: Option<NodeId>,
    pub name: String,
    pub certificate_der: Vec<u8>,
    pub key_pkcs8_der: PrivateKey,
    pub ca_der: Vec<u8>,
}

/// A private key, PKCS#8 in DER. Not shown by `Debug`, wiped when dropped.
#[derive(Clone)]
pub struct PrivateKey(Vec<u8>);

impl PrivateKey {
    pub fn new(pkcs8_der: Vec<u8>) -> PrivateKey {
        PrivateKey(pkcs8_der)
    }

    pub fn secret_der(&self) -> &[u8] {
        &self.0
    }
}

impl Drop for PrivateKey {
    fn drop(&mut self) {
        self.0.fill(0);
        std::hint::black_box(&self.0);
    }
}

impl fmt::Debug for PrivateKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PrivateKey(..)")
    }
}

#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("the identity in {dir} is damaged: {what}; remove that directory and join again with a token")]
    Damaged { dir: String, what: String },
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
        ca_der: Vec<u8>,
    ) -> Result<Identity, String> {
        let Peer { role, node, name, cluster_id } = Peer::from_certificate(&certificate_der)?;
        let identity = Identity { cluster_id, role, node, name, certificate_der, key_pkcs8_der: key, ca_der };
        tls::check(&identity).map_err(|error| error.to_string())?;
        Ok(identity)
    }

    /// Writes the four files into `dir`, which is made where it is missing.
    pub fn store(&self, dir: &Path) -> io::Result<()> {
        files::create_dir(dir)?;
        let key = pem::encode(&pem::Pem::new("PRIVATE KEY", self.key_pkcs8_der.secret_der()));
        let summary = json!({
            "cluster_id": self.cluster_id,
            "role": role_name(self.role),
            "node": self.node.map(|node| node.to_string()),
            "name": self.name,
        });
        files::write_atomic(&dir.join(KEY), key.as_bytes(), files::SECRET)?;
        files::write_atomic(
            &dir.join(CERTIFICATE),
            certificate_pem(&self.certificate_der).as_bytes(),
            files::PUBLIC,
        )?;
        files::write_atomic(&dir.join(CA), certificate_pem(&self.ca_der).as_bytes(), files::PUBLIC)?;
        files::write_atomic(&dir.join(SUMMARY), format!("{summary:#}\n").as_bytes(), files::PUBLIC)
    }

    /// Reads what `store` wrote; `None` where there is no `identity.json`. Refuses files that do not belong together.
    pub fn load(dir: &Path) -> Result<Option<Identity>, IdentityError> {
        if files::read_optional(&dir.join(SUMMARY))?.is_none() {
            return Ok(None);
        }
        let damaged = |what: String| IdentityError::Damaged { dir: dir.display().to_string(), what };
        let der = |file: &str| {
            let text = files::read_optional(&dir.join(file))?;
            let text = text.ok_or_else(|| damaged(format!("{file} is missing")))?;
            let pem = pem::parse(text).map_err(|error| damaged(format!("{file}: {error}")))?;
            Ok::<_, IdentityError>(pem.into_contents())
        };
        let identity = Identity::from_parts(der(CERTIFICATE)?, PrivateKey::new(der(KEY)?), der(CA)?);
        identity.map(Some).map_err(damaged)
    }

    /// Who this is, as others see it.
    pub fn peer(&self) -> Peer {
        let Identity { role, node, name, cluster_id, .. } = self.clone();
        Peer { role, node, name, cluster_id }
    }
}
