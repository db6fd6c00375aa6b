//! The pages of fleet on addresses that others reach: what they show to a browser, and who may look.
//!
//! A login is a client's own right, for a while, written down where a browser can keep it. It is in no record: a coordinator knows it by a
//! seal (HMAC-SHA256) under a key that follows from the CA's, which all coordinators have, and it counts as long as its client is one of the
//! cluster, with the key that it had.

use super::authorities::Authorities;
use super::ca::ClusterCa;
use super::peer::KeyHash;
use super::tls;
use crate::ids::UserId;
use anyhow::{Context, Result, bail};
use hmac::{Hmac, Mac};
use rustls::ServerConfig;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use sha2::Sha256;
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// Longest life of a login: three months.
pub const LOGIN_MAX: Duration = Duration::from_secs(90 * 24 * 3600);

/// What a browser may see or do, and for whom. As text: `fleet-web_user-5_1798761600_read_SEAL`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Login {
    pub user: UserId,
    /// Seconds since 1970.
    pub expires: u64,
    /// Cancel jobs, drain nodes; otherwise it may look.
    pub operates: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LoginError {
    #[error("this is no login for the page; `fleet web token` makes one")]
    NoLogin,
    #[error("this login has expired; make another one with `fleet web token`")]
    Expired,
    #[error(
        "this login does not count here: it is damaged, of another cluster, or its client was revoked; make another one with `fleet web token`"
    )]
    Unknown,
}

const SCHEME: &str = "fleet-web";

/// By what a coordinator knows logins. Follows from a CA's key.
pub struct Seal(Hmac<Sha256>);

impl Seal {
    pub(super) fn of(ca_key: &[u8]) -> Seal {
        // A key of any length is one for HMAC.
        let with = |key: &[u8]| Hmac::<Sha256>::new_from_slice(key).expect("HMAC takes keys of any length");
        let mut own = with(ca_key);
        own.update(b"fleet web login 1");
        Seal(with(&own.finalize().into_bytes()))
    }

    fn over(&self, login: &Login, key: &KeyHash) -> Hmac<Sha256> {
        let mut mac = self.0.clone();
        mac.update(login.body().as_bytes());
        mac.update(key);
        mac
    }
}

impl Login {
    fn body(&self) -> String {
        let right = if self.operates { "operate" } else { "read" };
        format!("{SCHEME}_{}_{}_{right}", self.user, self.expires)
    }

    /// For a client with this key.
    pub fn seal(&self, seal: &Seal, key: &KeyHash) -> String {
        format!("{}_{}", self.body(), hex::encode(seal.over(self, key).finalize().into_bytes()))
    }

    /// What such a text says, if it holds. `key_of` a client that is one of the cluster.
    pub fn open(
        text: &str,
        seals: &[Seal],
        now_unix_s: u64,
        key_of: impl Fn(UserId) -> Option<KeyHash>,
    ) -> Result<Login, LoginError> {
        let parts: Vec<&str> = text.trim().split('_').collect();
        let [SCHEME, user, expires, right @ ("read" | "operate"), mac] = parts[..] else {
            return Err(LoginError::NoLogin);
        };
        let (Ok(user), Ok(expires), Ok(mac)) = (UserId::from_str(user), expires.parse(), hex::decode(mac))
        else {
            return Err(LoginError::NoLogin);
        };
        let login = Login { user, expires, operates: right == "operate" };
        let key = key_of(user).ok_or(LoginError::Unknown)?;
        if !seals.iter().any(|seal| seal.over(&login, &key).verify_slice(&mac).is_ok()) {
            return Err(LoginError::Unknown);
        }
        if expires <= now_unix_s { Err(LoginError::Expired) } else { Ok(login) }
    }
}

/// A certificate for browsers, with those that lead to a CA, and its key.
pub struct Shown {
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
}

impl Shown {
    /// Made by the cluster's CA for these names and addresses.
    pub fn made(ca: &ClusterCa, hosts: &[String], now: SystemTime, life: Duration) -> Result<Shown> {
        let (der, key) = ca.for_hosts(hosts, now, life)?;
        let key = PrivatePkcs8KeyDer::from(key.secret_der().to_vec());
        Ok(Shown { chain: vec![der.into(), ca.der().to_vec().into()], key: key.into() })
    }

    /// From PEM files: the certificate first, then those that lead to its CA.
    pub fn read(certificate: &Path, key: &Path) -> Result<Shown> {
        let chain = CertificateDer::pem_file_iter(certificate)
            .and_then(Iterator::collect::<Result<Vec<_>, _>>)
            .with_context(|| format!("cannot read certificates from {}", certificate.display()))?;
        if chain.is_empty() {
            bail!("{} has no certificate in PEM", certificate.display());
        }
        let key = PrivateKeyDer::from_pem_file(key)
            .with_context(|| format!("cannot read a private key from {}", key.display()))?;
        Ok(Shown { chain, key })
    }

    /// For HTTP over TLS, where members of these CAs may show who they are, and others need not.
    pub fn server(self, members: &Authorities) -> Result<Arc<ServerConfig>> {
        Ok(Arc::new(tls::page(members, (self.chain, self.key))?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: KeyHash = [7; 32];

    fn open(text: &str, key: &[u8], now: u64) -> Result<Login, LoginError> {
        let seals = [Seal::of(b"another"), Seal::of(key)];
        Login::open(text, &seals, now, |user| (user == UserId(5)).then_some(KEY))
    }

    #[test]
    fn a_login_counts_as_it_was_made_and_in_no_other_way() {
        let login = Login { user: UserId(5), expires: 1_000, operates: false };
        let text = login.seal(&Seal::of(b"ca"), &KEY);
        assert!(text.starts_with("fleet-web_user-5_1000_read_"), "{text}");
        assert_eq!(open(&format!(" {text}\n"), b"ca", 999), Ok(login.clone()));
        assert_eq!(open(&text, b"ca", 1_000), Err(LoginError::Expired));
        assert_eq!(open(&text, b"of another cluster", 0), Err(LoginError::Unknown));
        for (old, new) in [("read", "operate"), ("_1000_", "_9000_"), ("user-5", "user-6")] {
            assert_eq!(open(&text.replacen(old, new, 1), b"ca", 0), Err(LoginError::Unknown), "{new}");
        }
        for damaged in ["", "fleet-web", &text[..text.len() - 1], "fleet_worker_1_2_3", &format!("{text}_x")]
        {
            assert_eq!(open(damaged, b"ca", 0), Err(LoginError::NoLogin), "{damaged:?}");
        }
        assert_eq!(open(&text[..text.len() - 2], b"ca", 0), Err(LoginError::Unknown));
        let of_another_key = login.seal(&Seal::of(b"ca"), &[8; 32]);
        assert_eq!(open(&of_another_key, b"ca", 0), Err(LoginError::Unknown), "its client joined anew");
    }

    #[test]
    fn a_certificate_is_made_for_names_and_addresses() {
        let ca = ClusterCa::create("c", SystemTime::now()).unwrap();
        let hosts = ["box.example".to_owned(), "10.0.0.1".to_owned(), "fd00::1".to_owned()];
        let shown = Shown::made(&ca, &hosts, SystemTime::now(), Duration::from_secs(60)).unwrap();
        let (_, certificate) = x509_parser::parse_x509_certificate(&shown.chain[0]).unwrap();
        let names = &certificate.subject_alternative_name().unwrap().unwrap().value.general_names;
        assert_eq!(names.len(), 3, "{names:?}");
        shown.server(&Authorities::one(ca.der().to_vec())).unwrap();
    }
}
