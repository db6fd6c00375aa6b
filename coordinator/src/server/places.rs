//! Where a coordinator listens and under which addresses others find it: what it was told, kept in its data directory for the next
//! start, so that one without options listens where it listened before.

use anyhow::{Context, Result, bail};
use fleet_common::endpoint::Endpoint;
use fleet_common::files;
use fleet_common::http::host_of;
use serde::{Deserialize, Serialize};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

pub const DEFAULT_LISTEN: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 7070);
pub const DEFAULT_HTTP: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 7080);

const FILE: &str = "listen.json";

/// `DIR/listen.json`: the options of the last start that listened. `None` is what was never told.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Places {
    /// For clients and joiners. Port 0: the one of before, else a free one.
    pub listen: Option<SocketAddr>,
    /// For agents and coordinators; `None`: beside `listen`.
    pub member_listen: Option<SocketAddr>,
    /// For HTTP; port 0 likewise.
    pub http: Option<SocketAddr>,
    /// `HOST:PORT` under which others find these sockets, where that is not where they are bound.
    pub advertise: Option<String>,
    /// `None`: the host of `advertise`.
    pub member_advertise: Option<String>,
    /// PEM files of the user's own certificate and key for HTTP on other addresses than loopback; `None`: the cluster's CA makes them.
    pub http_cert: Option<PathBuf>,
    pub http_key: Option<PathBuf>,
}

impl Places {
    /// These, and what the last start was told where they say nothing.
    pub fn or_as_before(&self, dir: &Path) -> Result<Places> {
        let path = dir.join(FILE);
        let before: Places = match files::read_optional(&path)? {
            Some(text) => serde_json::from_str(&text)
                .with_context(|| format!("{} is damaged; remove it", path.display()))?,
            None => Places::default(),
        };
        let now = self.clone();
        Ok(Places {
            listen: now.listen.or(before.listen),
            member_listen: now.member_listen.or(before.member_listen),
            http: now.http.or(before.http),
            advertise: now.advertise.or(before.advertise),
            member_advertise: now.member_advertise.or(before.member_advertise),
            http_cert: now.http_cert.or(before.http_cert),
            http_key: now.http_key.or(before.http_key),
        })
    }

    /// Remembers them, when it listens there.
    pub fn store(&self, dir: &Path) -> Result<()> {
        let text = serde_json::to_string_pretty(self)? + "\n";
        Ok(files::write_atomic(&dir.join(FILE), text.as_bytes())?)
    }

    /// Refuses addresses that nobody could connect to. What is recorded of a coordinator is told to all others.
    pub fn check(&self) -> Result<()> {
        for (option, advertised) in
            [("--advertise", &self.advertise), ("--member-advertise", &self.member_advertise)]
        {
            if let Some(address) = advertised
                && host(address).is_none_or(|host| host.is_empty())
            {
                bail!("{option} {address} is no address; write it as HOST:PORT");
            }
        }
        if self.http_cert.is_some() != self.http_key.is_some() {
            bail!("--http-cert and --http-key belong together: give both");
        }
        let listen = self.listen.unwrap_or(DEFAULT_LISTEN);
        let member = self.member_listen.unwrap_or(listen);
        for (listen, recorded) in
            [(listen, self.client_address(listen)), (member, self.member_address(member))]
        {
            if host(&recorded)
                .and_then(|host| host.parse::<IpAddr>().ok())
                .is_some_and(|ip| ip.is_unspecified())
            {
                bail!(
                    "others cannot connect to {}, on which this coordinator is to listen; pass --advertise HOST:PORT with the name or address under which they find it",
                    listen.ip()
                );
            }
        }
        Ok(())
    }

    /// Names and addresses of this machine under which its page is asked for.
    pub fn hosts(&self, endpoint: &Endpoint) -> Vec<String> {
        let told = [&endpoint.quic, &endpoint.http].map(|address| host_of(address).to_owned());
        let name =
            nix::sys::utsname::uname().ok().and_then(|uname| Some(uname.nodename().to_str()?.to_owned()));
        let mut hosts: Vec<String> = told.into_iter().chain(name).collect();
        hosts.retain(|host| !host.is_empty() && !host.parse::<IpAddr>().is_ok_and(|ip| ip.is_unspecified()));
        hosts.sort();
        hosts.dedup();
        hosts
    }

    /// Files of a certificate and key for HTTP.
    pub fn certificate(&self) -> Option<(PathBuf, PathBuf)> {
        self.http_cert.clone().zip(self.http_key.clone())
    }

    /// As clients find it.
    pub fn client_address(&self, bound: SocketAddr) -> String {
        self.advertise.clone().unwrap_or_else(|| bound.to_string())
    }

    /// As agents and coordinators find it.
    pub fn member_address(&self, bound: SocketAddr) -> String {
        match (&self.member_advertise, &self.advertise) {
            (Some(told), _) => told.clone(),
            (None, Some(clients)) => {
                let host = clients.rsplit_once(':').map_or(clients.as_str(), |(host, _)| host);
                format!("{host}:{}", bound.port())
            }
            (None, None) => bound.to_string(),
        }
    }
}

/// Of `HOST:PORT`, without the brackets of an IPv6 address.
fn host(address: &str) -> Option<&str> {
    let (host, port) = address.rsplit_once(':')?;
    port.parse::<u16>().ok()?;
    Some(host.trim_start_matches('[').trim_end_matches(']'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(address: &str) -> SocketAddr {
        address.parse().unwrap()
    }

    fn everywhere(advertise: &str) -> Places {
        Places {
            listen: Some(at("0.0.0.0:7070")),
            advertise: Some(advertise.to_owned()),
            ..Places::default()
        }
    }

    #[test]
    fn members_find_it_at_the_advertised_host() {
        let bound = at("0.0.0.0:7071");
        assert_eq!(everywhere("head:7070").member_address(bound), "head:7071");
        assert_eq!(everywhere("[fd00::1]:7070").member_address(bound), "[fd00::1]:7071");
        let told = Places { member_advertise: Some("relay:9".into()), ..everywhere("head:7070") };
        assert_eq!(told.member_address(bound), "relay:9");
        assert_eq!(Places::default().member_address(at("127.0.0.1:7071")), "127.0.0.1:7071");
    }

    #[test]
    fn an_address_that_nobody_could_use_is_refused() {
        everywhere("head:7070").check().unwrap();
        Places::default().check().unwrap();
        let told = |places: Places| places.check().unwrap_err().to_string();
        for listen in ["0.0.0.0:7070", "[::]:7070"] {
            let places = Places { listen: Some(at(listen)), ..Places::default() };
            assert!(told(places).contains("pass --advertise HOST:PORT"), "{listen}");
        }
        let members = Places { member_listen: Some(at("[::]:7071")), ..Places::default() };
        assert!(told(members).contains("pass --advertise"));
        assert!(told(everywhere("0.0.0.0:7070")).contains("pass --advertise"));
        assert!(told(everywhere("head")).contains("HOST:PORT"));
        assert!(told(everywhere(":7070")).contains("HOST:PORT"));
    }

    #[test]
    fn what_was_told_once_is_remembered_and_what_is_told_now_wins() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Places::default().or_as_before(dir.path()).unwrap(), Places::default());
        everywhere("head:7070").store(dir.path()).unwrap();
        assert_eq!(Places::default().or_as_before(dir.path()).unwrap(), everywhere("head:7070"));
        let now = Places { listen: Some(at("10.0.0.1:8000")), ..Places::default() };
        let both = now.or_as_before(dir.path()).unwrap();
        assert_eq!(both, Places { listen: now.listen, ..everywhere("head:7070") });
        std::fs::write(dir.path().join(FILE), "{").unwrap();
        let error = now.or_as_before(dir.path()).unwrap_err().to_string();
        assert!(error.contains("listen.json is damaged"), "{error}");
    }
}
