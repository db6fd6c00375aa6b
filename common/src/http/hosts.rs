//! Who is meant by the Host of an HTTP request. A web page that a browser on this machine shows can reach loopback by a name of its own (DNS
//! rebinding), but not say another name than that.

use std::net::IpAddr;

/// `HOST` of `HOST` or `HOST:PORT`, where an IPv6 address stands in brackets.
pub fn host_of(address: &str) -> &str {
    match address.strip_prefix('[') {
        Some(rest) => rest.split_once(']').map_or(rest, |(host, _)| host),
        None => address.rsplit_once(':').map_or(address, |(host, _)| host),
    }
}

/// Whether a Host header names this machine's loopback.
pub fn is_of_this_machine(header: &str) -> bool {
    let host = host_of(header);
    host.eq_ignore_ascii_case("localhost") || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_is_told_from_names_that_look_like_it() {
        for good in ["localhost", "LOCALHOST:80", "127.0.0.1:7080", "127.1.2.3", "[::1]:7080", "[::1]"] {
            assert!(is_of_this_machine(good), "{good}");
        }
        for bad in ["", "evil.example", "127.0.0.1.evil.example:80", "localhost.evil", "10.0.0.1", "[::2]:80"]
        {
            assert!(!is_of_this_machine(bad), "{bad}");
        }
    }
}
