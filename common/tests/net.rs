//! Who gets in, who does not, and what each is told: real endpoints on loopback.

#![allow(clippy::unwrap_used)] // in a test an unwrap is an assertion

use fleet_common::ids::{NodeId, ReplicaId, UserId};
use fleet_common::net::*;
use fleet_common::protocol::{
    Admission, CoordinatorAddress, JoinReply, JoinRequest, Member, PROTOCOL_VERSION, Refusal, RefusalKind,
    Role,
};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::sync::mpsc;

const DAY: Duration = Duration::from_secs(86_400);
const MARK: [u8; 32] = [6; 32];
const ANY: &str = "127.0.0.1:0";

fn ca(cluster: &str) -> ClusterCa {
    ClusterCa::create(cluster, SystemTime::now()).unwrap()
}

fn member(role: Role) -> Member {
    match role {
        Role::Coordinator => Member::Coordinator(ReplicaId(3)),
        Role::Worker => Member::Worker(NodeId(1)),
        Role::Client | Role::Admin => Member::Client(UserId(5)),
    }
}

fn issue(ca: &ClusterCa, role: Role) -> Identity {
    ca.issue(member(role), "somebody", SystemTime::now(), DAY).unwrap()
}

fn refused(kind: RefusalKind, message: &str) -> JoinReply {
    JoinReply::Refused(Refusal { kind, message: message.into() })
}

fn admission(ca: &ClusterCa, request: &JoinRequest, member: Member) -> Admission {
    let certificate = ca.sign(&request.csr_der, member, &request.name, SystemTime::now(), DAY);
    Admission {
        member,
        certificate_der: certificate.unwrap(),
        authorities: Authorities::one(ca.der().to_vec()),
        coordinators: Vec::new(),
        cas: Vec::new(),
    }
}

/// A coordinator that only decides who came. Verdicts arrive on the channel.
fn listen(identity: &Identity) -> (String, mpsc::UnboundedReceiver<Result<Accepted, String>>) {
    let endpoint = serve(ANY.parse().unwrap(), Socket::Clients, identity).unwrap();
    let addr = endpoint.local_addr().unwrap().to_string();
    let (verdicts, seen) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Some(incoming) = endpoint.accept().await {
            let verdicts = verdicts.clone();
            tokio::spawn(async move {
                match accept(incoming, Socket::Clients, MARK, async |_, _| Ok(())).await {
                    Ok((connection, accepted)) => {
                        let _ = verdicts.send(Ok(accepted));
                        connection.closed().await;
                    }
                    Err(error) => {
                        let _ = verdicts.send(Err(error.to_string()));
                    }
                }
            });
        }
    });
    (addr, seen)
}

async fn refusal(addr: &str, identity: &Identity) -> NetError {
    let refused = connect(&[addr.to_owned()], identity).await.map(|_| ());
    refused.expect_err("the connection must be refused")
}

#[tokio::test]
async fn a_member_is_welcome_as_what_its_certificate_says() {
    let ca = ca("c1");
    let (addr, mut seen) = listen(&issue(&ca, Role::Coordinator));
    for role in [Role::Worker, Role::Client, Role::Coordinator] {
        let member = issue(&ca, role);
        let connection = connect(std::slice::from_ref(&addr), &member).await.unwrap();
        assert_eq!(seen.recv().await.unwrap(), Ok(Accepted::Peer(member.peer())));
        drop(connection);
    }
}

#[tokio::test]
async fn the_first_coordinator_that_answers_is_taken_and_the_others_do_not_delay_it() {
    let ca = ca("c1");
    let (addr, _seen) = listen(&issue(&ca, Role::Coordinator));
    // A bound socket that nobody reads: the packets vanish.
    let silent = std::net::UdpSocket::bind(ANY).unwrap();
    let silent = silent.local_addr().unwrap().to_string();
    let begun = std::time::Instant::now();
    connect(&[silent, "no.such.host.invalid:1".into(), addr], &issue(&ca, Role::Client)).await.unwrap();
    assert!(begun.elapsed() < Duration::from_millis(900), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn silence_is_unreachable_within_its_deadline_and_names_every_address() {
    let client = issue(&ca("c1"), Role::Client);
    let silent = std::net::UdpSocket::bind(ANY).unwrap();
    let silent = silent.local_addr().unwrap().to_string();
    let error = connect(&[silent.clone(), "no port".into()], &client).await.map(|_| ()).unwrap_err();
    assert!(matches!(error, NetError::Unreachable(_)));
    assert_eq!(error.exit_code(), 3);
    let text = error.to_string();
    assert!(text.contains(&format!("{silent}: no answer within 1 s; no port: not an address")), "{text}");
    let none = connect(&[], &client).await.map(|_| ()).unwrap_err().to_string();
    assert!(none.contains("no address was given"), "{none}");
}

#[tokio::test]
async fn an_expired_certificate_is_refused_on_both_sides_with_the_reason() {
    let ca = ca("c1");
    let past = SystemTime::now() - 10 * DAY;
    let expired = |role| ca.issue(member(role), "old", past, DAY).unwrap();
    let (addr, mut seen) = listen(&issue(&ca, Role::Coordinator));
    let error = refusal(&addr, &expired(Role::Client)).await;
    assert!(error.to_string().contains("this side's certificate is expired"), "{error}");
    assert_eq!(error.exit_code(), 2);
    assert!(seen.recv().await.unwrap().is_err());
    let (addr, _seen) = listen(&expired(Role::Coordinator));
    let error = refusal(&addr, &issue(&ca, Role::Client)).await.to_string();
    assert!(error.contains("the other side's certificate is expired"), "{error}");
}

#[tokio::test]
async fn members_of_another_cluster_are_refused_on_both_sides() {
    let (ours, theirs) = (ca("c1"), ca("c2"));
    let (addr, mut seen) = listen(&issue(&ours, Role::Coordinator));
    let error = refusal(&addr, &issue(&theirs, Role::Client)).await.to_string();
    assert!(error.contains("belongs to another cluster"), "{error}");
    assert!(seen.recv().await.unwrap().is_err());
    // One that knows our CA and cluster, but was certified by another.
    let mut forged = issue(&ca("c1"), Role::Client);
    forged.authorities = Authorities::one(ours.der().to_vec());
    let error = refusal(&addr, &forged).await.to_string();
    assert!(error.contains("this side's certificate is of another cluster"), "{error}");
    assert!(seen.recv().await.unwrap().is_err());
}

#[tokio::test]
async fn a_worker_or_client_cannot_pose_as_a_coordinator() {
    let ca = ca("c1");
    for role in [Role::Worker, Role::Client] {
        let (addr, _seen) = listen(&issue(&ca, role));
        let error = refusal(&addr, &issue(&ca, Role::Worker)).await.to_string();
        assert!(error.contains("what answers there is no coordinator of this cluster"), "{error}");
        let token = JoinToken::generate(Role::Worker, ca.fingerprint()).unwrap();
        let error = join(std::slice::from_ref(&addr), &token, "me").await.unwrap_err().to_string();
        assert!(error.contains("what answers there is no coordinator"), "{error}");
    }
}

#[tokio::test]
async fn without_a_certificate_only_joining_is_open() {
    let ca = ca("c1");
    let (addr, mut seen) = listen(&issue(&ca, Role::Coordinator));
    let mut roots = rustls::RootCertStore::empty();
    roots.add(ca.der().to_vec().into()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut tls = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    tls.alpn_protocols = vec![b"fleet/1".to_vec()];
    let connect_with = async |tls: rustls::ClientConfig| {
        let crypto = quinn::crypto::rustls::QuicClientConfig::try_from(tls).unwrap();
        let endpoint = quinn::Endpoint::client(ANY.parse().unwrap()).unwrap();
        let config = quinn::ClientConfig::new(Arc::new(crypto));
        endpoint.connect_with(config, addr.parse().unwrap(), "coordinator.fleet").unwrap().await
    };
    let connection = connect_with(tls.clone()).await.unwrap();
    let told = describe(&connection.closed().await);
    assert!(told.contains("a certificate of this cluster is needed; join it with a token"), "{told}");
    assert_eq!(seen.recv().await.unwrap(), Err(told));
    tls.alpn_protocols = vec![b"fleet/99".to_vec()];
    let told = describe(&connect_with(tls).await.map(|_| ()).unwrap_err());
    assert!(told.contains("different versions of fleet"), "{told}");
}

#[tokio::test]
async fn a_port_in_use_is_named() {
    let identity = issue(&ca("c1"), Role::Coordinator);
    let first = serve(ANY.parse().unwrap(), Socket::Clients, &identity).unwrap();
    let addr = first.local_addr().unwrap();
    let error = serve(addr, Socket::Members, &identity).map(|_| ()).unwrap_err();
    assert!(
        error.to_string().starts_with(&format!("cannot listen on {addr}: Address already in use")),
        "{error}"
    );
    assert_eq!(error.exit_code(), 4);
}

// ---- joining ----------------------------------------------------------------------------------------------------------

/// A coordinator that answers every joiner by `decide`.
fn joinable(
    identity: &Identity,
    decide: impl Fn(&JoinRequest) -> JoinReply + Send + Sync + 'static,
) -> String {
    let endpoint = serve(ANY.parse().unwrap(), Socket::Clients, identity).unwrap();
    let addr = endpoint.local_addr().unwrap().to_string();
    let decide = Arc::new(decide);
    tokio::spawn(async move {
        while let Some(incoming) = endpoint.accept().await {
            let decide = decide.clone();
            tokio::spawn(async move {
                let Ok((connection, Accepted::Join)) =
                    accept(incoming, Socket::Clients, MARK, async |_, _| Ok(())).await
                else {
                    return;
                };
                let Ok(exchange) = receive_join(&connection).await else { return };
                let reply = decide(&exchange.request);
                let _ = exchange.answer(&reply).await;
            });
        }
    });
    addr
}

#[tokio::test]
async fn a_joiner_becomes_what_the_ca_decides_and_can_connect() {
    let ca = Arc::new(ca("c1"));
    let coordinator = issue(&ca, Role::Coordinator);
    let token = JoinToken::generate(Role::Worker, ca.fingerprint()).unwrap();
    let (kept, signer) = (token.secret_hash(), ca.clone());
    let addr = joinable(&coordinator, move |request| {
        assert!(secret_matches(&kept, &request.token_secret));
        JoinReply::Accepted(Box::new(admission(&signer, request, Member::Worker(NodeId(4)))))
    });
    let joined = join(&[addr], &token, "gpu").await.unwrap();
    let expected = Peer { member: Member::Worker(NodeId(4)), name: "gpu".into(), cluster_id: "c1".into() };
    assert_eq!(joined.identity.peer(), expected);
    assert!(joined.cas.is_empty());
    let identity = joined.identity;
    let (addr, mut seen) = listen(&coordinator);
    let _connection = connect(&[addr], &identity).await.unwrap();
    assert_eq!(seen.recv().await.unwrap(), Ok(Accepted::Peer(expected)));
}

#[tokio::test]
async fn a_token_that_is_refused_says_why_in_one_line() {
    let ca = ca("c1");
    let token = JoinToken::generate(Role::Worker, ca.fingerprint()).unwrap();
    for reason in ["the token is unknown", "the token expired", "the token was used as often as it may be"] {
        let addr = joinable(&issue(&ca, Role::Coordinator), |_| refused(RefusalKind::Invalid, reason));
        let error = join(std::slice::from_ref(&addr), &token, "me").await.unwrap_err();
        assert_eq!(error.to_string(), format!("{addr}: {reason}"));
        assert_eq!(error.exit_code(), 2);
    }
}

#[tokio::test]
async fn a_token_of_another_cluster_is_not_shown_to_this_one() {
    let ca1 = ca("c1");
    let addr = joinable(&issue(&ca1, Role::Coordinator), |_| panic!("the secret was sent"));
    let token = JoinToken::generate(Role::Worker, ca("c2").fingerprint()).unwrap();
    let error = join(std::slice::from_ref(&addr), &token, "me").await.unwrap_err().to_string();
    assert!(error.contains("the token is of another cluster"), "{error}");
    assert!(
        error.contains(&token.ca_fingerprint[..12]) && error.contains(&ca1.fingerprint()[..12]),
        "{error}"
    );
}

#[tokio::test]
async fn a_coordinator_that_shows_our_ca_but_was_not_certified_by_it_is_refused() {
    let ours = ca("c1");
    let mut impostor = issue(&ca("c1"), Role::Coordinator);
    impostor.authorities = Authorities::one(ours.der().to_vec());
    let addr = joinable(&impostor, |_| panic!("the secret was sent"));
    let token = JoinToken::generate(Role::Worker, ours.fingerprint()).unwrap();
    let error = join(std::slice::from_ref(&addr), &token, "me").await.unwrap_err();
    assert!(matches!(error, NetError::Refused(_)), "{error}");
}

#[tokio::test]
async fn a_coordinator_cannot_give_a_joiner_another_role_or_key() {
    let ca = Arc::new(ca("c1"));
    let token = JoinToken::generate(Role::Client, ca.fingerprint()).unwrap();
    let signer = ca.clone();
    let addr = joinable(&issue(&ca, Role::Coordinator), move |request| {
        JoinReply::Accepted(Box::new(admission(&signer, request, member(Role::Worker))))
    });
    let error = join(&[addr], &token, "me").await.unwrap_err().to_string();
    assert!(error.contains("another role"), "{error}");
    let (signer, foreign) = (ca.clone(), issue(&ca, Role::Client).certificate_der);
    let addr = joinable(&issue(&ca, Role::Coordinator), move |request| {
        let admission = admission(&signer, request, member(Role::Client));
        JoinReply::Accepted(Box::new(Admission { certificate_der: foreign.clone(), ..admission }))
    });
    assert!(matches!(join(&[addr], &token, "me").await, Err(NetError::Tls(_))));
}

#[tokio::test]
async fn a_new_coordinator_gets_the_key_of_the_ca_and_only_that_one() {
    let ca = Arc::new(ca("c1"));
    let token = JoinToken::generate(Role::Coordinator, ca.fingerprint()).unwrap();
    let address = CoordinatorAddress { replica: ReplicaId(1), client: "a:1".into(), member: "a:2".into() };
    let der = ca.der().to_vec();
    let keys = [vec![(der.clone(), ca.key())], vec![(der, self::ca("c1").key())], Vec::new()];
    let mut results = Vec::new();
    for cas in keys {
        let (signer, address) = (ca.clone(), address.clone());
        let addr = joinable(&issue(&ca, Role::Coordinator), move |request| {
            let admission = admission(&signer, request, member(Role::Coordinator));
            let (cas, coordinators) = (cas.clone(), vec![address.clone()]);
            let admission = Admission { cas, coordinators, ..admission };
            assert!(!format!("{admission:?}").contains(&format!("{:?}", signer.key().secret_der())));
            JoinReply::Accepted(Box::new(admission))
        });
        results.push(join(&[addr], &token, "c").await);
    }
    let joined = results.remove(0).unwrap();
    assert_eq!(joined.coordinators, [address]);
    assert_eq!(joined.cas[0].fingerprint(), ca.fingerprint());
    for (error, named) in results.into_iter().zip(["is not the key", "did not send the CA's key"]) {
        let error = error.unwrap_err().to_string();
        assert!(error.contains(named), "{error}");
    }
}

#[tokio::test]
async fn a_cluster_that_cannot_admit_now_is_asked_again_with_the_same_request() {
    let ca = Arc::new(ca("c1"));
    let token = JoinToken::generate(Role::Client, ca.fingerprint()).unwrap();
    let (signer, requests) = (ca.clone(), Arc::new(std::sync::Mutex::new(Vec::new())));
    let seen = requests.clone();
    let addr = joinable(&issue(&ca, Role::Coordinator), move |request| {
        let mut seen = seen.lock().unwrap();
        seen.push(request.clone());
        match seen.len() {
            1 => refused(RefusalKind::Unavailable, "no leader"),
            _ => JoinReply::Accepted(Box::new(admission(&signer, request, member(Role::Client)))),
        }
    });
    let silent = std::net::UdpSocket::bind(ANY).unwrap();
    let silent = silent.local_addr().unwrap().to_string();
    join(&[silent, addr], &token, "me").await.unwrap();
    let requests = requests.lock().unwrap();
    assert!(requests.len() == 2 && requests[0] == requests[1], "one use of the token");
}

#[tokio::test]
async fn the_members_socket_lets_nobody_join_and_says_what_it_is() {
    let ca = ca("c1");
    let endpoint = serve(ANY.parse().unwrap(), Socket::Members, &issue(&ca, Role::Coordinator)).unwrap();
    let addr = endpoint.local_addr().unwrap().to_string();
    tokio::spawn(async move {
        while let Some(incoming) = endpoint.accept().await {
            tokio::spawn(async move {
                let only_workers = async |peer: Peer, _| match peer.member {
                    Member::Worker(_) => Ok(()),
                    Member::Client(_) => Err(Turned::Later("full".into())),
                    Member::Coordinator(_) => Err(Turned::Forever("removed".into())),
                };
                if let Ok((connection, _)) = accept(incoming, Socket::Members, MARK, only_workers).await {
                    connection.closed().await;
                }
            });
        }
    });
    let reached = reach(std::slice::from_ref(&addr), &issue(&ca, Role::Worker)).await.unwrap();
    assert_eq!((reached.socket, reached.mark), (Socket::Members, MARK));
    let error =
        connect(std::slice::from_ref(&addr), &issue(&ca, Role::Client)).await.map(|_| ()).unwrap_err();
    assert!(
        matches!(&error, NetError::Unreachable(why) if why.contains("full")),
        "a refusal that passes: {error}"
    );
    let removed = connect(std::slice::from_ref(&addr), &issue(&ca, Role::Coordinator)).await;
    assert!(matches!(removed, Err(NetError::Revoked(why)) if why.contains("removed")));
    let token = JoinToken::generate(Role::Client, ca.fingerprint()).unwrap();
    let error = join(&[addr], &token, "me").await.unwrap_err().to_string();
    assert!(error.contains("join at the one for clients"), "{error}");
}

/// A coordinator with a runtime of its own, so that it can vanish as a process does that is killed.
fn listen_apart(
    addr: std::net::SocketAddr,
    identity: &Identity,
) -> (tokio::runtime::Runtime, std::net::SocketAddr) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let entered = runtime.enter();
    let endpoint = serve(addr, Socket::Members, identity).unwrap();
    let addr = endpoint.local_addr().unwrap();
    runtime.spawn(async move {
        while let Some(incoming) = endpoint.accept().await {
            tokio::spawn(async move {
                if let Ok((connection, _)) =
                    accept(incoming, Socket::Members, MARK, async |_, _| Ok(())).await
                {
                    connection.closed().await;
                }
            });
        }
    });
    drop(entered);
    (runtime, addr)
}

#[test]
fn a_coordinator_that_was_restarted_ends_the_connections_of_its_former_life_at_once() {
    let ca = ca("c1");
    let identity = issue(&ca, Role::Coordinator);
    let (first, addr) = listen_apart(ANY.parse().unwrap(), &identity);
    let client = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let connection = client.block_on(connect(&[addr.to_string()], &issue(&ca, Role::Worker))).unwrap();
    // Stopped, it takes nothing from its peers' point of view: their packets wait in the socket, which goes with it.
    first.shutdown_background();
    while std::net::UdpSocket::bind(addr).is_err() {
        std::thread::yield_now();
    }
    let (second, _) = listen_apart(addr, &identity);
    let told = client.block_on(async {
        let (mut send, _receive) = connection.open_bi().await.unwrap();
        send.write_all(&[0; 100]).await.unwrap();
        describe(&connection.closed().await)
    });
    assert_eq!(told, "the other side was restarted");
    second.shutdown_background();
}

/// A joiner that says what it likes.
async fn raw_joiner(ca: &ClusterCa, addr: std::net::SocketAddr) -> quinn::Connection {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(ca.der().to_vec().into()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut tls = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    tls.alpn_protocols = vec![b"fleet-join/1".to_vec()];
    let crypto = quinn::crypto::rustls::QuicClientConfig::try_from(tls).unwrap();
    let client = quinn::Endpoint::client(ANY.parse().unwrap()).unwrap();
    let mut config = quinn::ClientConfig::new(Arc::new(crypto));
    let mut transport = quinn::TransportConfig::default();
    transport.keep_alive_interval(Some(Duration::from_millis(200)));
    config.transport_config(Arc::new(transport));
    client.connect_with(config, addr, "coordinator.fleet").unwrap().await.unwrap()
}

#[tokio::test]
async fn a_joiner_that_says_nothing_is_dropped_with_the_reason() {
    let ca = ca("c1");
    let endpoint = serve(ANY.parse().unwrap(), Socket::Clients, &issue(&ca, Role::Coordinator)).unwrap();
    let addr = endpoint.local_addr().unwrap();
    let server = tokio::spawn(async move {
        let incoming = endpoint.accept().await.unwrap();
        let (connection, accepted) =
            accept(incoming, Socket::Clients, MARK, async |_, _| Ok(())).await.unwrap();
        assert_eq!(accepted, Accepted::Join);
        receive_join(&connection).await.map(|_| ()).unwrap_err().to_string()
    });
    let connection = raw_joiner(&ca, addr).await;
    let told = describe(&connection.closed().await);
    assert_eq!(told, "no request to join came in time");
    assert_eq!(server.await.unwrap(), format!("the connection failed: {told}"));
}

#[tokio::test]
async fn a_joiner_of_another_version_is_told_both() {
    let ca = ca("c1");
    let endpoint = serve(ANY.parse().unwrap(), Socket::Clients, &issue(&ca, Role::Coordinator)).unwrap();
    let addr = endpoint.local_addr().unwrap();
    let server = tokio::spawn(async move {
        let incoming = endpoint.accept().await.unwrap();
        let (connection, _) = accept(incoming, Socket::Clients, MARK, async |_, _| Ok(())).await.unwrap();
        receive_join(&connection).await.map(|_| ()).unwrap_err().to_string()
    });
    let connection = raw_joiner(&ca, addr).await;
    let (mut send, mut receive) = connection.open_bi().await.unwrap();
    // Another version, and then what no request has.
    let other = PROTOCOL_VERSION as u8 + 1;
    send.write_all(&[4, 0, 0, 0, other, 0xFF, 0xFF, 0xFF]).await.unwrap();
    let reply = fleet_common::codec::read_frame(&mut receive).await.unwrap();
    let Some(JoinReply::Refused(refusal)) = reply else { panic!() };
    let both = format!("version {PROTOCOL_VERSION} of the protocol, the other side {other}");
    assert!(refusal.message.contains(&both), "{}", refusal.message);
    connection.close(DONE, b"");
    assert_eq!(server.await.unwrap(), refusal.message);
}

// ---- files ------------------------------------------------------------------------------------------------------------

#[test]
fn an_identity_reads_back_and_its_key_is_private() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("identity");
    assert!(Identity::load(&path).unwrap().is_none());
    let identity = issue(&ca("c1"), Role::Worker);
    identity.store(&path).unwrap();
    let read = Identity::load(&path).unwrap().unwrap();
    assert_eq!(read.peer(), identity.peer());
    assert_eq!(read.certificate_der, identity.certificate_der);
    assert_eq!(read.key_pkcs8_der.secret_der(), identity.key_pkcs8_der.secret_der());
    assert_eq!(fs::metadata(path.join("key.pem")).unwrap().permissions().mode() & 0o777, 0o600);
    assert!(fs::read_to_string(path.join("identity.json")).unwrap().contains("\"node-1\""));
    assert!(!format!("{identity:?}").contains(&format!("{:?}", identity.key_pkcs8_der.secret_der())));
}

#[test]
fn identity_files_that_do_not_belong_together_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let ca = ca("c1");
    let (one, two) = (dir.path().join("one"), dir.path().join("two"));
    issue(&ca, Role::Worker).store(&one).unwrap();
    issue(&ca, Role::Worker).store(&two).unwrap();
    fs::copy(two.join("key.pem"), one.join("key.pem")).unwrap();
    let error = Identity::load(&one).unwrap_err().to_string();
    assert!(error.contains("one is damaged") && error.contains("join again with a token"), "{error}");
    fs::remove_file(two.join("cert.pem")).unwrap();
    let error = Identity::load(&two).unwrap_err().to_string();
    assert!(error.contains("cert.pem is missing"), "{error}");
}

#[tokio::test]
async fn a_ca_reads_back_with_its_private_key_and_goes_on_signing() {
    let dir = tempfile::tempdir().unwrap();
    assert!(ClusterCa::load(dir.path()).unwrap().is_none());
    let made = ca("c-1");
    made.store(dir.path()).unwrap();
    assert_eq!(fs::metadata(dir.path().join("ca.key")).unwrap().permissions().mode() & 0o777, 0o600);
    let read = ClusterCa::load(dir.path()).unwrap().unwrap();
    assert_eq!((read.fingerprint(), read.cluster_id()), (made.fingerprint(), "c-1"));
    let (addr, _seen) = listen(&issue(&made, Role::Coordinator));
    connect(&[addr], &issue(&read, Role::Client)).await.unwrap();
    fs::remove_file(dir.path().join("ca.key")).unwrap();
    assert!(ClusterCa::load(dir.path()).map(|_| ()).unwrap_err().to_string().contains("ca.key is missing"));
}

#[test]
fn the_ca_refuses_damaged_requests_and_names_that_would_lie() {
    let ca = ca("c1");
    let (now, worker) = (SystemTime::now(), member(Role::Worker));
    assert!(matches!(ca.sign(b"not a request", worker, "me", now, DAY), Err(CaError::BadRequest(_))));
    for name in ["", "two\nlines", &"x".repeat(NAME_MAX + 1)] {
        assert!(matches!(ca.issue(worker, name, now, DAY), Err(CaError::BadName(_))));
    }
    let lying = ClusterCa::create("c1/coordinator", now).unwrap();
    assert!(matches!(lying.issue(worker, "me", now, DAY), Err(CaError::BadName(_))));
}

#[test]
fn a_certificate_is_renewed_over_the_same_key_and_never_for_somebody_else() {
    let (ca, now, dir) = (ca("c1"), SystemTime::now(), tempfile::tempdir().unwrap());
    let old = ca.issue(member(Role::Worker), "box", now, 30 * DAY).unwrap();
    old.store(dir.path()).unwrap();
    assert!(!old.is_due(now + 19 * DAY) && old.is_due(now + 21 * DAY));
    assert_eq!(old.remaining(now + 40 * DAY), Duration::ZERO);
    let later = now + 21 * DAY;
    let csr = old.signing_request().unwrap();
    let trusted = || Authorities::one(ca.der().to_vec());
    let signed = ca.sign(&csr, old.member, "box", later, 30 * DAY).unwrap();
    let new = old.renewed(signed, trusted()).unwrap();
    assert_eq!(new.key_hash(), old.key_hash());
    assert_eq!(requested_key(&csr).unwrap(), old.key_hash().unwrap());
    assert!(!new.is_due(later));
    new.store_renewed(dir.path(), &old).unwrap();
    assert_eq!(Identity::load(dir.path()).unwrap().unwrap().certificate_der, new.certificate_der);
    let other = ca.sign(&csr, member(Role::Client), "box", later, 30 * DAY).unwrap();
    assert!(old.renewed(other, trusted()).unwrap_err().contains("is for user-5, not for node-1"));
    let shorter = ca.sign(&csr, old.member, "box", now, DAY).unwrap();
    assert!(old.renewed(shorter, trusted()).unwrap_err().contains("compare the clocks"));
    let foreign = self::ca("c1").issue(old.member, "box", later, 30 * DAY).unwrap();
    assert!(old.renewed(foreign.certificate_der, trusted()).is_err(), "another key");
}

#[tokio::test]
async fn a_coordinators_clock_that_jumps_ahead_locks_nobody_out() {
    let ca = ca("c1");
    let now = SystemTime::now();
    let old = ca.issue(member(Role::Coordinator), "c", now, 30 * DAY).unwrap();
    // A month later by its own clock, today by everybody else's.
    let new = ca.reissue(&old, now + 40 * DAY, 30 * DAY).unwrap();
    let (addr, _seen) = listen(&new);
    connect(&[addr], &issue(&ca, Role::Client)).await.unwrap();
}
