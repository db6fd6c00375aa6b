//! Where ranks can be called by those of other nodes: a listening socket and a key for each, made before anybody is told of them.

use fleet_collectives::net::Key;
use fleet_common::events::Endpoint;
use fleet_common::job::Transport;
use fleet_common::net::PrivateKey;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpListener, UdpSocket};
use std::ops::RangeInclusive;
use std::os::fd::OwnedFd;
use std::str::FromStr;

/// Which ports ranks may listen on; `None`: any that is free.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ports(Option<RangeInclusive<u16>>);

/// For one rank.
#[derive(Debug)]
pub struct Door {
    pub socket: OwnedFd,
    pub key: PrivateKey,
    /// What the others are told of it.
    pub endpoint: Endpoint,
}

impl FromStr for Ports {
    type Err = String;

    /// `29600-29699`.
    fn from_str(text: &str) -> Result<Ports, String> {
        let wrong = || format!("`{text}` is no range of ports; write it like 29600-29699");
        let (first, last) = text.split_once('-').ok_or_else(wrong)?;
        let port = |text: &str| text.parse::<u16>().ok().filter(|port| *port > 0);
        match (port(first), port(last)) {
            (Some(first), Some(last)) if first <= last => Ok(Ports(Some(first..=last))),
            _ => Err(wrong()),
        }
    }
}

impl Ports {
    /// So many doors for ranks that are connected by `transport`. `host` is where other nodes reach this one: where that is an address of this machine, they are open there alone.
    pub fn open(&self, transport: Transport, host: &str, count: u32) -> Result<Vec<Door>, String> {
        let failed = |error: String| format!("no place where ranks of other nodes could call it: {error}");
        let address = listen_address(host);
        let mut ports = self.0.clone();
        let mut doors = Vec::new();
        for _ in 0..count {
            let (socket, port) = match &mut ports {
                None => bind(transport, address, 0).map_err(|error| failed(error.to_string()))?,
                Some(ports) => bind_in(transport, address, ports).map_err(failed)?,
            };
            let key = Key::generate().map_err(|error| failed(error.to_string()))?;
            let endpoint = Endpoint { port, key: key.public().0.clone() };
            doors.push(Door { socket, key: PrivateKey::new(key.secret_der().to_vec()), endpoint });
        }
        Ok(doors)
    }
}

/// The socket and its port.
fn bind(transport: Transport, address: IpAddr, port: u16) -> io::Result<(OwnedFd, u16)> {
    match transport {
        Transport::Tcp => TcpListener::bind((address, port))
            .and_then(|socket| socket.local_addr().map(|address| (socket.into(), address.port()))),
        Transport::Quic => UdpSocket::bind((address, port))
            .and_then(|socket| socket.local_addr().map(|address| (socket.into(), address.port()))),
    }
}

/// Where to listen for other nodes, which reach this one at `host`: there alone if that is an address of this machine, else everywhere.
pub fn listen_address(host: &str) -> IpAddr {
    let own = host.parse::<IpAddr>().ok().filter(|own| TcpListener::bind((*own, 0)).is_ok());
    own.unwrap_or_else(|| match TcpListener::bind((Ipv6Addr::UNSPECIFIED, 0)) {
        Ok(_) => IpAddr::from(Ipv6Addr::UNSPECIFIED),
        Err(_) => IpAddr::from(Ipv4Addr::UNSPECIFIED),
    })
}

/// On the first port of these that is free, which are then fewer.
fn bind_in(
    transport: Transport,
    address: IpAddr,
    ports: &mut RangeInclusive<u16>,
) -> Result<(OwnedFd, u16), String> {
    let (first, last) = (*ports.start(), *ports.end());
    for port in ports.by_ref() {
        match bind(transport, address, port) {
            Ok(bound) => return Ok(bound),
            Err(error) if error.kind() == ErrorKind::AddrInUse => {}
            Err(error) => return Err(named(port, &error)),
        }
    }
    Err(format!("the ports {first}-{last} are all taken; give `worker join --rank-ports` a wider range"))
}

fn named(port: u16, error: &io::Error) -> String {
    format!("port {port}: {error}")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // in a test an unwrap is an assertion
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn every_rank_has_a_port_and_a_key_of_its_own_and_can_be_called_at_once() {
        let doors = Ports::default().open(Transport::Tcp, "127.0.0.1", 3).unwrap();
        let ports: BTreeSet<u16> = doors.iter().map(|door| door.endpoint.port).collect();
        let keys: BTreeSet<&[u8]> = doors.iter().map(|door| &door.endpoint.key[..]).collect();
        assert_eq!((ports.len(), keys.len()), (3, 3));
        for door in &doors {
            assert!(door.endpoint.is_sound());
            std::net::TcpStream::connect(("127.0.0.1", door.endpoint.port)).unwrap();
            let again = Key::from_pkcs8(door.key.secret_der().to_vec()).unwrap();
            assert_eq!(again.public().0, door.endpoint.key);
        }
    }

    #[test]
    fn a_door_for_quic_takes_datagrams() {
        let door = Ports::default().open(Transport::Quic, "127.0.0.1", 1).unwrap().remove(0);
        let port = door.endpoint.port;
        UdpSocket::bind("127.0.0.1:0").unwrap().send_to(b"hello", ("127.0.0.1", port)).unwrap();
        let mut heard = [0; 8];
        assert_eq!(UdpSocket::from(door.socket).recv(&mut heard).unwrap(), 5);
    }

    #[test]
    fn a_name_or_an_address_of_somebody_else_opens_everywhere() {
        for host in ["some-name", "192.0.2.1"] {
            let doors = Ports::default().open(Transport::Tcp, host, 1).unwrap();
            std::net::TcpStream::connect(("127.0.0.1", doors[0].endpoint.port)).unwrap();
        }
    }

    #[test]
    fn a_range_is_kept_to_and_one_that_is_too_small_says_so() {
        // Of two neighbours that were free a moment ago one is taken.
        let (held, next) = loop {
            let held = TcpListener::bind("127.0.0.1:0").unwrap();
            let port = held.local_addr().unwrap().port();
            if port < u16::MAX && TcpListener::bind(("127.0.0.1", port + 1)).is_ok() {
                break (held, port + 1);
            }
        };
        let port = held.local_addr().unwrap().port();
        let range: Ports = format!("{port}-{next}").parse().unwrap();
        match range.open(Transport::Tcp, "127.0.0.1", 1) {
            Ok(doors) => assert_eq!(doors[0].endpoint.port, next),
            Err(why) => assert!(why.contains("all taken"), "{why}"), // another test was faster
        }
        let why = range.open(Transport::Tcp, "127.0.0.1", 2).unwrap_err();
        assert!(
            why.contains(&format!("{port}-{next}")) || why.contains(&format!("-{next} are all taken")),
            "{why}"
        );
        for text in ["", "5", "9-3", "0-4", "a-b", "1-70000"] {
            assert!(text.parse::<Ports>().is_err(), "{text}");
        }
    }
}
