//! Who gets in, who does not, and what each is told: real endpoints on loopback.

#![allow(clippy::unwrap_used)] // in a test an unwrap is an assertion

use fleet_common::ids::NodeId;
use fleet_common::net::*;
use fleet_common::protocol::{JoinReply, JoinRequest, Role};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::sync::mpsc;

const DAY: Duration = Duration::from_secs(86_400);
const ANY: &str = "127.0.0.1:0";

fn ca(cluster: &str) -> ClusterCa {
    ClusterCa::create(cluster, SystemTime::now()).unwrap()
}

fn issue(ca: &ClusterCa, role: Role) -> Identity {
    let node = (role == Role::Worker).then_some(NodeId(1));
    ca.issue(ca.cluster_id(), "somebody", role, node, SystemTime::now(), DAY).unwrap()
}

/// A coordinator that only decides who came. Verdicts arrive on the channel.
fn listen(identity: &Identity) -> (String, mpsc::UnboundedReceiver<Result<Accepted, String>>) {
    let endpoint = serve(ANY.parse().unwrap(), identity).unwrap();
    let addr = endpoint.local_addr().unwrap().to_string();
    let (verdicts, seen) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Some(incoming) = endpoint.accept().await {
            let verdicts = verdicts.clone();
            tokio::spawn(async move {
                match accept(incoming).await {
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
    let expired = |role| ca.issue("c1", "old", role, None, past, DAY).unwrap();
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
    forged.ca_der = ours.der().to_vec();
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
        let error = join(&addr, &token, "me").await.unwrap_err().to_string();
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
    let first = serve(ANY.parse().unwrap(), &identity).unwrap();
    let addr = first.local_addr().unwrap();
    let error = serve(addr, &identity).map(|_| ()).unwrap_err();
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
    let endpoint = serve(ANY.parse().unwrap(), identity).unwrap();
    let addr = endpoint.local_addr().unwrap().to_string();
    let decide = Arc::new(decide);
    tokio::spawn(async move {
        while let Some(incoming) = endpoint.accept().await {
            let decide = decide.clone();
            tokio::spawn(async move {
                let Ok((connection, Accepted::Join)) = accept(incoming).await else { return };
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
        let (now, node) = (SystemTime::now(), Some(NodeId(4)));
        let name = format!("{}-2", request.name);
        let certificate = signer.sign(&request.csr_der, "c1", &name, Role::Worker, node, now - DAY, 2 * DAY);
        JoinReply::Accepted {
            cluster_id: "c1".into(),
            role: Role::Worker,
            node,
            certificate_der: certificate.unwrap(),
            ca_der: signer.der().to_vec(),
        }
    });
    let identity = join(&addr, &token, "gpu").await.unwrap();
    let expected =
        Peer { role: Role::Worker, node: Some(NodeId(4)), name: "gpu-2".into(), cluster_id: "c1".into() };
    assert_eq!(identity.peer(), expected);
    let (addr, mut seen) = listen(&coordinator);
    let _connection = connect(&[addr], &identity).await.unwrap();
    assert_eq!(seen.recv().await.unwrap(), Ok(Accepted::Peer(expected)));
}

#[tokio::test]
async fn a_token_that_is_refused_says_why_in_one_line() {
    let ca = ca("c1");
    let token = JoinToken::generate(Role::Worker, ca.fingerprint()).unwrap();
    for reason in ["the token is unknown", "the token expired", "the token was used as often as it may be"] {
        let addr = joinable(&issue(&ca, Role::Coordinator), |_| JoinReply::Refused(reason.into()));
        let error = join(&addr, &token, "me").await.unwrap_err();
        assert_eq!(error.to_string(), format!("{addr}: {reason}"));
        assert_eq!(error.exit_code(), 2);
    }
}

#[tokio::test]
async fn a_token_of_another_cluster_is_not_shown_to_this_one() {
    let ca1 = ca("c1");
    let addr = joinable(&issue(&ca1, Role::Coordinator), |_| panic!("the secret was sent"));
    let token = JoinToken::generate(Role::Worker, ca("c2").fingerprint()).unwrap();
    let error = join(&addr, &token, "me").await.unwrap_err().to_string();
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
    impostor.ca_der = ours.der().to_vec();
    let addr = joinable(&impostor, |_| panic!("the secret was sent"));
    let token = JoinToken::generate(Role::Worker, ours.fingerprint()).unwrap();
    let error = join(&addr, &token, "me").await.unwrap_err();
    assert!(matches!(error, NetError::Refused(_)), "{error}");
}

/// A coordinator of `ca` that accepts every client with the certificate that `certificate` makes of its request.
fn accepting(
    ca: &ClusterCa,
    certificate: impl Fn(&JoinRequest) -> Vec<u8> + Send + Sync + 'static,
) -> String {
    let ca_der = ca.der().to_vec();
    joinable(&issue(ca, Role::Coordinator), move |request| JoinReply::Accepted {
        cluster_id: "c1".into(),
        role: Role::Client,
        node: None,
        certificate_der: certificate(request),
        ca_der: ca_der.clone(),
    })
}

#[tokio::test]
async fn a_coordinator_cannot_give_a_joiner_another_role_or_key() {
    let ca = Arc::new(ca("c1"));
    let token = JoinToken::generate(Role::Client, ca.fingerprint()).unwrap();
    let signer = ca.clone();
    let addr = accepting(&ca, move |request| {
        signer
            .sign(&request.csr_der, "c1", "me", Role::Worker, None, SystemTime::now() - DAY, 2 * DAY)
            .unwrap()
    });
    let error = join(&addr, &token, "me").await.unwrap_err().to_string();
    assert!(error.contains("another role"), "{error}");
    let foreign = issue(&ca, Role::Client).certificate_der;
    let addr = accepting(&ca, move |_| foreign.clone());
    assert!(matches!(join(&addr, &token, "me").await, Err(NetError::Tls(_))));
}

#[tokio::test]
async fn a_joiner_that_says_nothing_is_dropped_with_the_reason() {
    let ca = ca("c1");
    let endpoint = serve(ANY.parse().unwrap(), &issue(&ca, Role::Coordinator)).unwrap();
    let addr = endpoint.local_addr().unwrap();
    let server = tokio::spawn(async move {
        let (connection, accepted) = accept(endpoint.accept().await.unwrap()).await.unwrap();
        assert_eq!(accepted, Accepted::Join);
        receive_join(&connection).await.map(|_| ()).unwrap_err().to_string()
    });
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
    let connection = client.connect_with(config, addr, "coordinator.fleet").unwrap().await.unwrap();
    let told = describe(&connection.closed().await);
    assert_eq!(told, "no request to join came in time");
    assert_eq!(server.await.unwrap(), format!("the connection failed: {told}"));
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
    let now = SystemTime::now();
    assert!(matches!(
        ca.sign(b"not a request", "c1", "me", Role::Worker, None, now, DAY),
        Err(CaError::BadRequest(_))
    ));
    for name in ["", "two\nlines", &"x".repeat(NAME_MAX + 1)] {
        assert!(matches!(ca.issue("c1", name, Role::Worker, None, now, DAY), Err(CaError::BadName(_))));
    }
    assert!(matches!(
        ca.issue("c1/coordinator", "me", Role::Worker, None, now, DAY),
        Err(CaError::BadName(_))
    ));
}
