//! Who may look over HTTP, and who may change something.
//!
//! On loopback whoever is on this machine may look, and nobody changes anything. On other addresses there is TLS, and a visitor shows a
//! member's certificate, as Prometheus can, or a login of `fleet web token`: a browser as a cookie, a program as a bearer.

use super::gate::Gate;
use super::trust::Trust;
use anyhow::Result;
use fleet_common::http::{Caller, HeaderMap, Tls, TlsConfig, header};
use fleet_common::ids::UserId;
use fleet_common::net::{Login, LoginError, Peer, Shown, key_hash};
use fleet_common::protocol::Member;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tracing::warn;

/// `__Host-`: the browser sends it to this server alone, and over TLS alone.
const COOKIE: &str = "__Host-fleet";

pub enum Door {
    Loopback,
    Guarded(Arc<Guarded>),
}

pub struct Guarded {
    trust: Arc<Trust>,
    gate: Arc<Gate>,
    /// Names and addresses of this coordinator.
    hosts: Vec<String>,
    /// Certificate and key of the user's own, instead of those that the cluster's CA makes.
    files: Option<(PathBuf, PathBuf)>,
    present: Mutex<Option<Present>>,
}

/// What is shown now.
struct Present {
    config: Arc<TlsConfig>,
    source: Source,
    until: SystemTime,
}

/// From what it was made; another one is made when this changes.
#[derive(PartialEq)]
struct Source {
    authorities: [u8; 32],
    changed: Option<[SystemTime; 2]>,
}

/// Who looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Visitor {
    pub user: Option<UserId>,
    /// May change something, as this user.
    pub operates: bool,
}

impl Visitor {
    /// What the page offers: words of `/api/v1/stream`.
    pub fn may(self) -> &'static [&'static str] {
        if self.operates { &["cancel", "drain", "undrain"] } else { &[] }
    }
}

impl Door {
    /// A certificate and key of the user's own that cannot be used are told at once.
    pub fn guarded(
        trust: Arc<Trust>,
        gate: Arc<Gate>,
        hosts: Vec<String>,
        files: Option<(PathBuf, PathBuf)>,
    ) -> Result<Door> {
        let guarded = Guarded { trust, gate, hosts, files, present: Mutex::default() };
        guarded.present()?;
        Ok(Door::Guarded(Arc::new(guarded)))
    }

    pub fn tls(&self) -> Option<Tls> {
        match self {
            Door::Loopback => None,
            Door::Guarded(guarded) => {
                let guarded = guarded.clone();
                Some(Arc::new(move || guarded.config()))
            }
        }
    }

    /// Who asks, or why that is not known.
    pub fn visitor(&self, headers: &HeaderMap, caller: Option<&Caller>) -> Result<Visitor, LoginError> {
        match self {
            Door::Loopback => Ok(Visitor { user: None, operates: false }),
            Door::Guarded(guarded) => guarded.visitor(headers, caller),
        }
    }

    /// The cookie that keeps this login in a browser.
    pub fn cookie(&self, text: &str) -> Result<String, LoginError> {
        let Door::Guarded(guarded) = self else { return Err(LoginError::NoLogin) };
        let login = guarded.login(text)?;
        let left = login.expires.saturating_sub(unix_s());
        Ok(format!("{COOKIE}={}; Path=/; Secure; HttpOnly; SameSite=Strict; Max-Age={left}", text.trim()))
    }

    /// The cookie that ends a login in a browser.
    pub fn no_cookie() -> String {
        format!("{COOKIE}=; Path=/; Secure; HttpOnly; SameSite=Strict; Max-Age=0")
    }
}

impl Guarded {
    fn visitor(&self, headers: &HeaderMap, caller: Option<&Caller>) -> Result<Visitor, LoginError> {
        if let Some(der) = caller.and_then(|caller| caller.certificate_der.as_deref())
            && let Some(member) = self.member(der)
        {
            let user = if let Member::Client(user) = member { Some(user) } else { None };
            return Ok(Visitor { user, operates: false });
        }
        let login = self.login(shown(headers).ok_or(LoginError::NoLogin)?)?;
        Ok(Visitor { user: Some(login.user), operates: login.operates })
    }

    /// One who is let in at the other sockets as well.
    fn member(&self, certificate_der: &[u8]) -> Option<Member> {
        let peer = Peer::from_certificate(certificate_der).ok()?;
        let key = key_hash(certificate_der).ok()?;
        let known = self.gate.known(peer.member)?.key == key && self.trust.is_accepted(certificate_der);
        known.then_some(peer.member)
    }

    fn login(&self, text: &str) -> Result<Login, LoginError> {
        let key_of = |user| self.gate.known(Member::Client(user)).map(|admitted| admitted.key);
        Login::open(text, &self.trust.seals(), unix_s(), key_of)
    }

    /// For a handshake, which gets what was shown last where nothing newer can be had.
    fn config(&self) -> Arc<TlsConfig> {
        self.present().unwrap_or_else(|error| {
            warn!("the page goes on with the certificate that it had: {error:#}");
            let present = self.present.lock().unwrap_or_else(PoisonError::into_inner);
            present.as_ref().map(|present| present.config.clone()).expect("there is one since the start")
        })
    }

    fn present(&self) -> Result<Arc<TlsConfig>> {
        let members = self.trust.authorities();
        let changed = match &self.files {
            Some((certificate, key)) => Some([changed(certificate)?, changed(key)?]),
            None => None,
        };
        let source = Source { authorities: members.mark(), changed };
        let now = SystemTime::now();
        let mut present = self.present.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(present) = present.as_ref().filter(|is| is.source == source && is.until > now) {
            return Ok(present.config.clone());
        }
        let (shown, life) = match &self.files {
            Some((certificate, key)) => (Shown::read(certificate, key)?, FILES_LOOK),
            None => {
                let here = ["localhost", "127.0.0.1", "::1"].map(str::to_owned);
                self.trust.show(&[&here[..], &self.hosts].concat())?
            }
        };
        let config = shown.server(&members)?;
        *present = Some(Present { config: config.clone(), source, until: now + life });
        Ok(config)
    }
}

/// Files that are what they were are read again after this long.
const FILES_LOOK: Duration = Duration::from_secs(3600);

fn changed(path: &PathBuf) -> Result<SystemTime> {
    let changed = std::fs::metadata(path).and_then(|file| file.modified());
    changed.map_err(|error| anyhow::anyhow!("cannot read {}: {error}", path.display()))
}

/// What a browser's cookies or a program's authorization say.
fn shown(headers: &HeaderMap) -> Option<&str> {
    let authorization = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    if let Some((scheme, login)) = authorization.and_then(|value| value.split_once(' '))
        && scheme.eq_ignore_ascii_case("bearer")
    {
        return Some(login.trim());
    }
    let cookies = headers.get_all(header::COOKIE).iter().filter_map(|value| value.to_str().ok());
    cookies
        .flat_map(|line| line.split(';'))
        .filter_map(|cookie| cookie.trim().split_once('='))
        .find_map(|(name, value)| (name == COOKIE).then_some(value))
}

fn unix_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_login_is_shown_by_a_cookie_or_as_a_bearer() {
        let of = |name: header::HeaderName, value: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(name, value.parse().unwrap());
            shown(&headers).map(str::to_owned)
        };
        assert_eq!(of(header::COOKIE, "a=b; __Host-fleet=x_y; c=d").as_deref(), Some("x_y"));
        assert_eq!(of(header::COOKIE, "fleet=x_y"), None);
        assert_eq!(of(header::AUTHORIZATION, "bearer x_y").as_deref(), Some("x_y"));
        assert_eq!(of(header::AUTHORIZATION, "Basic x_y"), None);
    }
}
