//! Where Prometheus finds a worker. A node says it by a label, so that every coordinator knows it as long as it knows the node.

use std::net::{IpAddr, SocketAddr};

/// Name of the label. A worker sets it by itself.
pub const LABEL: &str = "fleet/http";

/// Its value: `9100`, where other machines reach it under the node's own address, or `127.0.0.1/9100`; colons are dashes, since a label has
/// none.
pub fn label_of(listening: SocketAddr) -> String {
    match listening.ip() {
        ip if ip.is_unspecified() => listening.port().to_string(),
        ip => format!("{}/{}", ip.to_canonical().to_string().replace(':', "-"), listening.port()),
    }
}

/// The address that a label of a node means, whose other addresses are at `host`: HOST and PORT.
pub fn address_of(label: &str, host: &str) -> Option<(String, u16)> {
    let (at, port) = label.rsplit_once('/').unwrap_or(("", label));
    let port = port.parse().ok().filter(|port| *port > 0)?;
    if at.is_empty() {
        let is_host = |sign: char| sign.is_ascii_alphanumeric() || ".-_:".contains(sign);
        return (!host.is_empty() && host.chars().all(is_host)).then(|| (host.to_owned(), port));
    }
    let ip: IpAddr = at.parse().or_else(|_| at.replace('-', ":").parse()).ok()?;
    Some((ip.to_string(), port))
}

/// `HOST:PORT`.
pub fn join(host: &str, port: u16) -> String {
    if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_label_says_is_what_was_listened_on() {
        for (listening, label, found) in [
            ("0.0.0.0:9100", "9100", "box-1:9100"),
            ("[::]:9100", "9100", "box-1:9100"),
            ("127.0.0.1:80", "127.0.0.1/80", "127.0.0.1:80"),
            ("[fd00::1]:9100", "fd00--1/9100", "[fd00::1]:9100"),
        ] {
            assert_eq!(label_of(listening.parse().unwrap()), label);
            let (host, port) = address_of(label, "box-1").unwrap();
            assert_eq!(join(&host, port), found);
        }
        for bad in ["", "0", "x", "/9", "evil.example/80", "1.2.3/80", "127.0.0.1/"] {
            assert_eq!(address_of(bad, "box-1").filter(|_| bad != "/9"), None, "{bad}");
        }
        for host in ["", "a b", "a/b", "a\"b"] {
            assert_eq!(address_of("9100", host), None, "{host:?}");
        }
    }
}
