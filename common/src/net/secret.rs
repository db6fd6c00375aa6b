//! A private key in memory: never shown, wiped when it is dropped.

use serde::{Deserialize, Serialize};
use std::fmt;

/// PKCS#8 in DER. It can be sent (a new coordinator gets the CA's key) but not shown.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
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
        wipe(&mut self.0);
    }
}

impl fmt::Debug for PrivateKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PrivateKey(..)")
    }
}

/// Overwrites what held a secret.
pub(crate) fn wipe(bytes: &mut [u8]) {
    bytes.fill(0);
    std::hint::black_box(bytes);
}
