//! The CAs that a member trusts: one, and two while the cluster replaces its CA.

use super::ca::{certificate_pem, fingerprint};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::fmt::Write;

/// Certificates (DER) of CAs. The first one issues, or is the one that is trusted at all.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Authorities(Vec<Vec<u8>>);

/// What is said before the fingerprint of each certificate in a file.
const FINGERPRINT: &str = "sha256: ";

/// Why a file of CAs cannot be used.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Unreadable {
    pub why: String,
    /// What the file says of the CA that it should hold, as far as that can be read.
    pub fingerprint: Option<String>,
}

impl Authorities {
    /// `issuing` first; a certificate that comes twice is kept once.
    pub fn new(issuing: Vec<u8>, others: impl IntoIterator<Item = Vec<u8>>) -> Authorities {
        let mut all = vec![issuing];
        for other in others {
            if !all.contains(&other) {
                all.push(other);
            }
        }
        Authorities(all)
    }

    pub fn one(der: Vec<u8>) -> Authorities {
        Authorities(vec![der])
    }

    /// The certificate of the CA that issues; empty if there is none, which nobody can be verified by.
    pub fn issuing(&self) -> &[u8] {
        self.0.first().map_or(&[], Vec::as_slice)
    }

    pub fn iter(&self) -> impl Iterator<Item = &[u8]> {
        self.0.iter().map(Vec::as_slice)
    }

    /// Whether a CA with this fingerprint (`ClusterCa::fingerprint`) is one of them.
    pub fn contains(&self, wanted: &str) -> bool {
        self.iter().any(|der| fingerprint(der) == wanted)
    }

    /// The CA that signed a certificate; `None` where none of them did.
    pub fn issuer_of(&self, certificate_der: &[u8]) -> Option<&[u8]> {
        let (_, certificate) = x509_parser::parse_x509_certificate(certificate_der).ok()?;
        self.iter().find(|der| {
            let ca = x509_parser::parse_x509_certificate(der);
            ca.is_ok_and(|(_, ca)| certificate.verify_signature(Some(ca.public_key())).is_ok())
        })
    }

    /// Tells one list from another.
    pub fn mark(&self) -> [u8; 32] {
        self.iter().fold(Sha256::new(), |hash, der| hash.chain_update(Sha256::digest(der))).finalize().into()
    }

    /// A file of them, each behind its fingerprint, by which damage is noticed.
    pub(super) fn to_pem(&self) -> String {
        self.iter().fold(String::new(), |mut text, der| {
            let _ = write!(text, "{FINGERPRINT}{}\n{}", fingerprint(der), certificate_pem(der));
            text
        })
    }

    /// Reads what `to_pem` wrote, and files of certificates without fingerprints.
    pub(super) fn from_pem(text: &str) -> Result<Authorities, Unreadable> {
        let told: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix(FINGERPRINT)).collect();
        let unreadable = |why: String, at: usize| Unreadable {
            why,
            fingerprint: told.get(at).map(|told| (*told).to_owned()),
        };
        let read = pem::parse_many(text).map_err(|error| unreadable(error.to_string(), 0))?;
        let ders: Vec<Vec<u8>> = read.into_iter().map(pem::Pem::into_contents).collect();
        for (at, der) in ders.iter().enumerate() {
            if told.get(at).is_some_and(|told| *told != fingerprint(der)) {
                return Err(unreadable(
                    "a certificate in it does not have the fingerprint before it".into(),
                    at,
                ));
            }
            if let Err(error) = x509_parser::parse_x509_certificate(der) {
                return Err(unreadable(error.to_string(), at));
            }
        }
        if ders.is_empty() || ders.len() < told.len() {
            return Err(unreadable("a certificate is missing".into(), ders.len()));
        }
        Ok(Authorities(ders))
    }
}

#[cfg(test)]
mod tests {
    use super::super::ClusterCa;
    use super::*;
    use crate::ids::UserId;
    use crate::protocol::Member;
    use std::time::{Duration, SystemTime};

    fn ca() -> ClusterCa {
        ClusterCa::create("c1", SystemTime::now()).unwrap()
    }

    #[test]
    fn a_file_of_them_reads_back_and_any_damaged_byte_is_noticed() {
        let both = Authorities::new(ca().der().to_vec(), [ca().der().to_vec()]);
        let text = both.to_pem();
        assert_eq!(Authorities::from_pem(&text), Ok(both.clone()));
        assert!(both.contains(&fingerprint(both.issuing())));
        for at in 0..text.len() {
            let mut damaged = text.clone().into_bytes();
            // Stays text, so that nothing else finds it first.
            damaged[at] ^= 1;
            let Ok(damaged) = String::from_utf8(damaged) else { continue };
            match Authorities::from_pem(&damaged) {
                Err(_) => {}
                // Between the certificates, where nothing is said.
                Ok(read) => assert_eq!(read, both, "byte {at} of\n{damaged}"),
            }
        }
    }

    #[test]
    fn whoever_signed_a_certificate_is_found() {
        let (old, new) = (ca(), ca());
        let issue = |ca: &ClusterCa| {
            let user = Member::Client(UserId(1));
            ca.issue(user, "ann", SystemTime::now(), Duration::from_secs(60)).unwrap().certificate_der
        };
        let both = Authorities::new(new.der().to_vec(), [old.der().to_vec(), new.der().to_vec()]);
        assert_eq!(both.issuer_of(&issue(&old)), Some(old.der()));
        assert_eq!(both.issuer_of(&issue(&new)), Some(new.der()));
        assert_eq!(Authorities::one(new.der().to_vec()).issuer_of(&issue(&old)), None);
        assert_ne!(both.mark(), Authorities::one(new.der().to_vec()).mark());
    }
}
