//! HTTP on an address that others reach: TLS, logins and members, and what each may see and change.

#![allow(clippy::unwrap_used)] // helpers of tests

mod common;

use common::*;
use fleet_common::ids::JobId;
use fleet_common::net::Identity;
use fleet_common::protocol::*;
use fleet_coordinator::server::{Coordinator, Options, Places};
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tempfile::tempdir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

const PATIENCE: Duration = Duration::from_secs(30);
const HOST: &str = "127.0.0.1";

/// Reached by others.
async fn open(dir: &Path) -> Coordinator {
    let options = Options::local(dir.to_owned());
    let places = Places { http: Some("0.0.0.0:0".parse().unwrap()), ..options.places };
    Coordinator::start(Options { places, ..Options::local(dir.to_owned()) }).await.unwrap()
}

struct Browser {
    port: u16,
    tls: Arc<ClientConfig>,
}

impl Browser {
    /// Trusts the cluster's CA; shows the certificate of `identity`, if one is given.
    fn new(dir: &Path, coordinator: &Coordinator, identity: Option<&Path>) -> Browser {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_file(dir.join("cluster/ca.pem")).unwrap()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config =
            ClientConfig::builder_with_provider(provider).with_protocol_versions(&[&rustls::version::TLS13]);
        let config = config.unwrap().with_root_certificates(roots);
        let tls = match identity {
            None => config.with_no_client_auth(),
            Some(dir) => {
                let chain = vec![CertificateDer::from_pem_file(dir.join("cert.pem")).unwrap()];
                let key = PrivateKeyDer::from_pem_file(dir.join("key.pem")).unwrap();
                config.with_client_auth_cert(chain, key).unwrap()
            }
        };
        let port = coordinator.endpoint().http.rsplit_once(':').unwrap().1.parse().unwrap();
        Browser { port, tls: Arc::new(tls) }
    }

    /// Status, head and body.
    async fn ask(&self, request: &str, headers: &[String], body: &str) -> (u16, String, String) {
        let asked = async {
            let stream = TcpStream::connect(("127.0.0.1", self.port)).await.unwrap();
            let name = ServerName::try_from(HOST).unwrap();
            let mut stream =
                tokio_rustls::TlsConnector::from(self.tls.clone()).connect(name, stream).await.unwrap();
            let mut text =
                format!("{request} HTTP/1.1\r\nHost: {HOST}:{}\r\nConnection: close\r\n", self.port);
            for header in headers {
                text += &format!("{header}\r\n");
            }
            text += &format!("Content-Length: {}\r\n\r\n{body}", body.len());
            stream.write_all(text.as_bytes()).await.unwrap();
            let mut answer = Vec::new();
            // A server may close without a last word of TLS.
            let _ = stream.read_to_end(&mut answer).await;
            String::from_utf8(answer).unwrap()
        };
        let answer = timeout(PATIENCE, asked).await.unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head[9..12].parse().unwrap(), head.to_lowercase(), body.to_owned())
    }

    async fn status(&self, request: &str, headers: &[String]) -> u16 {
        self.ask(request, headers, "").await.0
    }

    fn origin(&self) -> String {
        format!("Origin: https://{HOST}:{}", self.port)
    }
}

async fn login(client: &mut Client, operates: bool) -> String {
    match client.ask(Request::WebLogin { ttl_s: 3600, operates }).await {
        Reply::Token { text } => text,
        other => panic!("{other:?}"),
    }
}

fn bearer(login: &str) -> String {
    format!("Authorization: Bearer {login}")
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_login_there_is_a_form_and_nothing_else() {
    let dir = tempdir().unwrap();
    let coordinator = open(dir.path()).await;
    let browser = Browser::new(dir.path(), &coordinator, None);
    assert_eq!(browser.status("GET /healthz", &[]).await, 200);
    for path in ["/", "/metrics", "/api/v1/jobs", "/api/v1/cluster", "/nothing"] {
        let (status, head, body) = browser.ask(&format!("GET {path}"), &[], "").await;
        assert!(status == 401 && head.contains("www-authenticate: bearer"), "{path}: {head}");
        assert!(body.contains("fleet web token"), "{body}");
    }
    let (status, head, _) = browser.ask("GET /", &["Accept: text/html,*/*".into()], "").await;
    assert!(status == 303 && head.contains("location: /login"), "{head}");
    let (status, head, body) = browser.ask("GET /login", &[], "").await;
    assert!(status == 200 && head.contains("form-action 'self'") && body.contains("<form"), "{head}");
    assert_eq!(browser.status("POST /api/v1/jobs/1/cancel", &[]).await, 401);
    let (status, _, body) =
        browser.ask("POST /login", &[browser.origin()], "login=fleet-web_user-1_9999999999_operate_00").await;
    assert!(status == 401 && body.contains("does not count here"), "{body}");

    let mut plain = TcpStream::connect(("127.0.0.1", browser.port)).await.unwrap();
    plain.write_all(format!("GET /healthz HTTP/1.1\r\nHost: {HOST}\r\n\r\n").as_bytes()).await.unwrap();
    let mut heard = Vec::new();
    let _ = timeout(PATIENCE, plain.read_to_end(&mut heard)).await.expect("it is cut off");
    assert!(!heard.starts_with(b"HTTP"), "no word without TLS");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_login_lets_look_and_one_to_operate_changes_something() {
    let dir = tempdir().unwrap();
    let coordinator = open(dir.path()).await;
    let browser = Browser::new(dir.path(), &coordinator, None);
    let mut client = Client::local(dir.path(), &coordinator).await;
    let job = client.submit(1).await;
    let (reads, operates) = (login(&mut client, false).await, login(&mut client, true).await);

    let form = format!("login=+{reads}+");
    let (status, head, _) = browser.ask("POST /login", &[browser.origin()], &form).await;
    assert!(status == 303 && head.contains("location: /\r\n"), "{head}");
    let cookie = head.lines().find_map(|line| line.strip_prefix("set-cookie: ")).unwrap();
    for word in ["__host-fleet=", "path=/", "secure", "httponly", "samesite=strict", "max-age="] {
        assert!(cookie.contains(word), "{cookie}");
    }
    // The head is in small letters here, as a login is.
    let cookie = cookie.split(';').next().unwrap().replace("__host-fleet", "Cookie: a=b; __Host-fleet");
    let (status, _, body) = browser.ask("GET /api/v1/jobs", std::slice::from_ref(&cookie), "").await;
    assert!(status == 200 && body.contains(&format!("\"job\":{}", job.0)), "{body}");
    assert_eq!(browser.status("GET /metrics", &[bearer(&reads)]).await, 200);

    let cancel = |job: JobId| format!("POST /api/v1/jobs/{job}/cancel");
    let (status, _, body) = browser.ask(&cancel(job), &[cookie, browser.origin()], "").await;
    assert!(status == 403 && body.contains("--operate"), "{body}");
    let evil = "Origin: https://evil.example".to_owned();
    let forged = [bearer(&operates), evil.clone()];
    assert_eq!(browser.status(&cancel(job), &forged).await, 403);
    assert_eq!(browser.ask("POST /login", &[evil], &form).await.0, 403);
    assert_ne!(client.job(job).await.state, JobState::Cancelled);
    assert_eq!(browser.status(&cancel(JobId(99)), &[bearer(&operates)]).await, 404);
    assert_eq!(browser.status(&cancel(job), &[bearer(&operates), browser.origin()]).await, 200);
    assert_eq!(client.job(job).await.state, JobState::Cancelled);
    assert_eq!(browser.status("DELETE /api/v1/jobs", &[bearer(&operates)]).await, 405);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_looks_with_its_certificate_and_one_that_was_revoked_does_not() {
    let dir = tempdir().unwrap();
    let coordinator = open(dir.path()).await;
    let local = dir.path().join("client");
    let member = Browser::new(dir.path(), &coordinator, Some(&local));
    assert_eq!(member.status("GET /metrics", &[]).await, 200);
    assert_eq!(member.status("POST /api/v1/jobs/1/cancel", &[]).await, 403);
    let mut client = Client::local(dir.path(), &coordinator).await;
    let text = login(&mut client, true).await;
    let Member::Client(user) = Identity::load(&local).unwrap().unwrap().member else { panic!() };
    let nobody = Browser::new(dir.path(), &coordinator, None);
    assert_eq!(nobody.status("GET /metrics", &[bearer(&text)]).await, 200);
    // Its own connection is cut off by this, so there may be no answer.
    tokio::spawn(async move { client.ask(Request::Revoke(Member::Client(user))).await });
    let gone = async {
        while nobody.status("GET /metrics", &[bearer(&text)]).await != 401 {
            tokio::task::yield_now().await;
        }
    };
    timeout(PATIENCE, gone).await.expect("the login ends with its client");
    assert_eq!(member.status("GET /metrics", &[]).await, 401);
}
