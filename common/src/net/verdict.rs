//! Why a connection ended or was never made, in one line.

use super::NetError;
use quinn::{ConnectionError, VarInt};

/// Application close codes: done; refused, and coming back does not help; not now; cut off from the cluster for ever.
pub const DONE: VarInt = VarInt::from_u32(0);
pub const REFUSED: VarInt = VarInt::from_u32(1);
pub const BUSY: VarInt = VarInt::from_u32(2);
pub const REVOKED: VarInt = VarInt::from_u32(3);

pub(super) const NOT_OUR_COORDINATOR: &str =
    "what answers there is no coordinator of this cluster; check the address";

/// TLS alerts (RFC 8446, section 6) that appear as QUIC errors `0x100 + alert`.
mod alert {
    pub const BAD_CERTIFICATE: u8 = 42;
    pub const UNSUPPORTED_CERTIFICATE: u8 = 43;
    pub const CERTIFICATE_EXPIRED: u8 = 45;
    pub const UNKNOWN_CA: u8 = 48;
    pub const DECRYPT_ERROR: u8 = 51;
    pub const NO_APPLICATION_PROTOCOL: u8 = 120;
}

/// One line for a connection that ended: who closed it and why.
pub fn describe(error: &ConnectionError) -> String {
    match error {
        ConnectionError::TimedOut => "the other side stopped answering".into(),
        ConnectionError::LocallyClosed => "closed here".into(),
        ConnectionError::Reset => "the other side was restarted".into(),
        ConnectionError::ApplicationClosed(close) if close.reason.is_empty() => {
            "closed by the other side".into()
        }
        ConnectionError::ApplicationClosed(close) => String::from_utf8_lossy(&close.reason).into_owned(),
        ConnectionError::ConnectionClosed(close) => match alert_of(close.error_code) {
            Some(alert) => their_verdict(alert, &close.reason),
            None => format!("closed by the other side: {close}"),
        },
        ConnectionError::TransportError(error) => match alert_of(error.code) {
            Some(alert) => our_verdict(alert, &error.reason),
            None => error.to_string(),
        },
        other => other.to_string(),
    }
}

/// How one address failed.
pub(super) enum Failure {
    Silent(String),
    Refused(String),
    OtherCluster(String),
    Revoked(String),
}

impl Failure {
    pub(super) fn at(self, addr: &str) -> Failure {
        match self {
            Failure::Silent(why) => Failure::Silent(format!("{addr}: {why}")),
            Failure::Refused(why) => Failure::Refused(format!("{addr}: {why}")),
            Failure::OtherCluster(why) => Failure::OtherCluster(format!("{addr}: {why}")),
            Failure::Revoked(why) => Failure::Revoked(format!("{addr}: {why}")),
        }
    }
}

impl From<Failure> for NetError {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Silent(why) => NetError::Unreachable(why),
            Failure::Refused(why) => NetError::Refused(why),
            Failure::OtherCluster(why) => NetError::OtherCluster(why),
            Failure::Revoked(why) => NetError::Revoked(why),
        }
    }
}

impl From<ConnectionError> for Failure {
    fn from(error: ConnectionError) -> Self {
        let why = describe(&error);
        match error {
            ConnectionError::ApplicationClosed(close) if close.error_code == REVOKED => Failure::Revoked(why),
            // Any other code: it is stopping or has too much to do, which passes.
            ConnectionError::ApplicationClosed(close) if close.error_code == REFUSED => Failure::Refused(why),
            ConnectionError::ConnectionClosed(close) if alert_of(close.error_code).is_some() => {
                Failure::Refused(why)
            }
            ConnectionError::TransportError(error) if alert_of(error.code).is_some() => Failure::Refused(why),
            _ => Failure::Silent(why),
        }
    }
}

/// All addresses failed: one that answered and refused tells more than those that were silent.
pub(super) fn summarise(failures: Vec<Failure>) -> NetError {
    let (mut refused, mut other_cluster, mut revoked) = (false, false, false);
    let lines: Vec<String> = failures
        .into_iter()
        .map(|failure| {
            refused |= matches!(failure, Failure::Refused(_));
            other_cluster |= matches!(failure, Failure::OtherCluster(_));
            revoked |= matches!(failure, Failure::Revoked(_));
            match failure {
                Failure::Silent(why)
                | Failure::Refused(why)
                | Failure::OtherCluster(why)
                | Failure::Revoked(why) => why,
            }
        })
        .collect();
    let text = if lines.is_empty() { "no address was given".to_owned() } else { lines.join("; ") };
    match (revoked, refused, other_cluster) {
        (true, _, _) => NetError::Revoked(text),
        (_, true, _) => NetError::Refused(text),
        (_, _, true) => NetError::OtherCluster(text),
        _ => NetError::Unreachable(text),
    }
}

fn alert_of(code: quinn::TransportErrorCode) -> Option<u8> {
    u64::from(code).checked_sub(0x100).and_then(|alert| u8::try_from(alert).ok())
}

/// The other side did not like our certificate or protocol.
fn their_verdict(alert: u8, reason: &[u8]) -> String {
    match alert {
        alert::CERTIFICATE_EXPIRED => {
            "this side's certificate is expired or not valid yet; compare the clocks or join again".into()
        }
        alert::UNKNOWN_CA | alert::DECRYPT_ERROR => {
            "this side's certificate is of another cluster, or of a CA that was replaced; join this one with a token".into()
        }
        alert::BAD_CERTIFICATE | alert::UNSUPPORTED_CERTIFICATE => {
            "the other side does not accept this side's certificate; join again with a token".into()
        }
        alert::NO_APPLICATION_PROTOCOL => "the two sides have different versions of fleet".into(),
        alert => {
            format!("refused by the other side (TLS alert {alert}: {})", String::from_utf8_lossy(reason))
        }
    }
}

/// We did not like theirs.
fn our_verdict(alert: u8, reason: &str) -> String {
    match alert {
        alert::CERTIFICATE_EXPIRED => {
            "the other side's certificate is expired or not valid yet; compare the clocks".into()
        }
        alert::UNKNOWN_CA | alert::DECRYPT_ERROR => {
            "the other side belongs to another cluster, or its CA was replaced while this side was away: then join again with a token".into()
        }
        alert::BAD_CERTIFICATE | alert::UNSUPPORTED_CERTIFICATE => NOT_OUR_COORDINATOR.into(),
        alert::NO_APPLICATION_PROTOCOL => "the two sides have different versions of fleet".into(),
        alert => format!("the handshake failed (TLS alert {alert}: {reason})"),
    }
}
