//! TLS settings of every connection: version 1.3 and ring, nothing resumed, nothing before the handshake, trust in one CA.

use super::authorities::Authorities;
use super::ca::fingerprint;
use super::identity::Identity;
use super::peer::{KeyHash, key_hash};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{Resumption, WebPkiServerVerifier};
use rustls::crypto::{CryptoProvider, ring, verify_tls13_signature};
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::version::TLS13;
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, ServerConfig, SignatureScheme};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, UnixTime};
use std::fmt;
use std::sync::{Arc, OnceLock};

/// Protocol (ALPN) of members.
pub(super) const FLEET: &[u8] = b"fleet/1";
/// Protocol (ALPN) between agents.
pub(super) const AGENTS: &[u8] = b"fleet-agent/1";
/// Protocol (ALPN) of pages.
const HTTP: &[u8] = b"http/1.1";
/// Protocol (ALPN) of those who want to become one.
pub(super) const JOIN: &[u8] = b"fleet-join/1";

/// Never the process default: another crate could install a second provider.
fn provider() -> Arc<CryptoProvider> {
    static PROVIDER: OnceLock<Arc<CryptoProvider>> = OnceLock::new();
    PROVIDER.get_or_init(|| Arc::new(ring::default_provider())).clone()
}

fn roots(authorities: &Authorities) -> Result<Arc<RootCertStore>, rustls::Error> {
    let mut roots = RootCertStore::empty();
    for der in authorities.iter() {
        roots.add(CertificateDer::from(der.to_vec()))?;
    }
    Ok(Arc::new(roots))
}

/// A coordinator's certificate with the CAs behind it, by whose fingerprint a joiner knows the cluster.
fn chain(identity: &Identity) -> Vec<CertificateDer<'static>> {
    let own = identity.certificate_der.clone();
    std::iter::once(own).chain(identity.authorities.iter().map(<[u8]>::to_vec)).map(Into::into).collect()
}

fn key(identity: &Identity) -> PrivateKeyDer<'static> {
    PrivatePkcs8KeyDer::from(identity.key_pkcs8_der.secret_der().to_vec()).into()
}

/// For a listener: offers both protocols. A certificate may be absent here; `classify` demands it for `fleet/1`.
pub(super) fn server(identity: &Identity) -> Result<ServerConfig, rustls::Error> {
    listening(optional(&identity.authorities)?, (chain(identity), key(identity)), &[FLEET, JOIN])
}

/// For an agent that others call. A certificate is demanded.
pub(super) fn agents_server(identity: &Identity) -> Result<ServerConfig, rustls::Error> {
    let own = vec![identity.certificate_der.clone().into()];
    listening(members(&identity.authorities)?, (own, key(identity)), &[AGENTS])
}

/// For pages: offers HTTP/1.1. Who has a member's certificate may show it.
pub(super) fn page(
    authorities: &Authorities,
    shown: (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>),
) -> Result<ServerConfig, rustls::Error> {
    listening(optional(authorities)?, shown, &[HTTP])
}

/// Trusts the certificates of members, and lets in who shows none.
fn optional(authorities: &Authorities) -> Result<Arc<dyn ClientCertVerifier>, rustls::Error> {
    WebPkiClientVerifier::builder_with_provider(roots(authorities)?, provider())
        .allow_unauthenticated()
        .build()
        .map_err(|error| rustls::Error::General(error.to_string()))
}

fn listening(
    members: Arc<dyn ClientCertVerifier>,
    (chain, key): (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>),
    protocols: &[&[u8]],
) -> Result<ServerConfig, rustls::Error> {
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])?
        .with_client_cert_verifier(members)
        .with_single_cert(chain, key)?;
    config.alpn_protocols = protocols.iter().map(|protocol| protocol.to_vec()).collect();
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.max_early_data_size = 0;
    Ok(config)
}

/// For a member that connects to a coordinator. `refused` gets the certificate that was shown and is not believed.
pub(super) fn client(
    identity: &Identity,
    refused: Arc<OnceLock<Vec<u8>>>,
) -> Result<ClientConfig, rustls::Error> {
    let judge = ByAuthorities { verifier: server_verifier(&identity.authorities)?, refused };
    calling(judge, Some(identity), FLEET)
}

/// For an agent that calls another one, which has this key.
pub(super) fn agents_client(identity: &Identity, peer: KeyHash) -> Result<ClientConfig, rustls::Error> {
    calling(ByKey { members: members(&identity.authorities)?, key: peer }, Some(identity), AGENTS)
}

/// Trusts the certificates of members.
fn members(authorities: &Authorities) -> Result<Arc<dyn ClientCertVerifier>, rustls::Error> {
    WebPkiClientVerifier::builder_with_provider(roots(authorities)?, provider())
        .build()
        .map_err(|error| rustls::Error::General(error.to_string()))
}

/// For a joiner, which has nothing but the fingerprint of the CA. `seen` gets the fingerprint that was shown instead.
pub(super) fn joiner(
    ca_fingerprint: &str,
    seen: Arc<OnceLock<String>>,
) -> Result<ClientConfig, rustls::Error> {
    calling(ByFingerprint { wanted: ca_fingerprint.to_owned(), seen }, None, JOIN)
}

/// Fails unless certificate, key and CA belong together. Says nothing about the time.
pub(super) fn check(identity: &Identity) -> Result<(), rustls::Error> {
    roots(&identity.authorities)?;
    let signer = provider().key_provider.load_private_key(key(identity))?;
    rustls::sign::CertifiedKey::new(chain(identity), signer).keys_match()
}

/// For who connects to a server that `judge` believes, and shows its own certificate where it has one.
fn calling(
    judge: impl Judge + 'static,
    identity: Option<&Identity>,
    protocol: &[u8],
) -> Result<ClientConfig, rustls::Error> {
    let config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Judged(judge)));
    let mut config = match identity {
        Some(own) => config.with_client_auth_cert(vec![own.certificate_der.clone().into()], key(own))?,
        None => config.with_no_client_auth(),
    };
    config.alpn_protocols = vec![protocol.to_vec()];
    config.resumption = Resumption::disabled();
    config.enable_early_data = false;
    Ok(config)
}

fn server_verifier(authorities: &Authorities) -> Result<Arc<WebPkiServerVerifier>, rustls::Error> {
    WebPkiServerVerifier::builder_with_provider(roots(authorities)?, provider())
        .build()
        .map_err(|error| rustls::Error::General(error.to_string()))
}

/// Whether a server is who it should be.
trait Judge: fmt::Debug + Send + Sync {
    fn judge(&self, shown: &Shown<'_>) -> Result<(), rustls::Error>;
}

/// What a server shows of itself, and who asks when.
struct Shown<'a> {
    certificate: &'a CertificateDer<'a>,
    intermediates: &'a [CertificateDer<'a>],
    name: &'a ServerName<'a>,
    now: UnixTime,
}

/// Trusts a coordinator's certificate as rustls does, and remembers one that it does not: who is that?
#[derive(Debug)]
struct ByAuthorities {
    verifier: Arc<WebPkiServerVerifier>,
    refused: Arc<OnceLock<Vec<u8>>>,
}

impl Judge for ByAuthorities {
    fn judge(&self, shown: &Shown<'_>) -> Result<(), rustls::Error> {
        shown.by(&self.verifier).inspect_err(|_| drop(self.refused.set(shown.certificate.to_vec())))
    }
}

/// Trusts one member, whose key the cluster has told: who has a member's certificate and another key is not meant. Agents have no
/// certificates of servers, so theirs are looked at as a coordinator does.
#[derive(Debug)]
struct ByKey {
    members: Arc<dyn ClientCertVerifier>,
    key: KeyHash,
}

impl Judge for ByKey {
    fn judge(&self, shown: &Shown<'_>) -> Result<(), rustls::Error> {
        self.members.verify_client_cert(shown.certificate, shown.intermediates, shown.now)?;
        match key_hash(shown.certificate) {
            Ok(key) if key == self.key => Ok(()),
            _ => Err(rustls::CertificateError::ApplicationVerificationFailure.into()),
        }
    }
}

/// Trusts a coordinator's certificate if the CA beside it has the wanted fingerprint and signed it.
#[derive(Debug)]
struct ByFingerprint {
    wanted: String,
    seen: Arc<OnceLock<String>>,
}

impl Judge for ByFingerprint {
    fn judge(&self, shown: &Shown<'_>) -> Result<(), rustls::Error> {
        let Some(ca) = shown.intermediates.iter().find(|der| fingerprint(der) == self.wanted) else {
            let last = shown.intermediates.last().map(|der| fingerprint(der)).unwrap_or_default();
            let _ = self.seen.set(last);
            return Err(rustls::CertificateError::UnknownIssuer.into());
        };
        let ca = server_verifier(&Authorities::one(ca.to_vec()))?;
        Shown { intermediates: &[], ..*shown }.by(&ca)
    }
}

impl Shown<'_> {
    fn by(&self, verifier: &WebPkiServerVerifier) -> Result<(), rustls::Error> {
        let Shown { certificate, intermediates, name, now } = *self;
        verifier.verify_server_cert(certificate, intermediates, name, &[], now).map(drop)
    }
}

/// Asks a judge about a server; its signatures are checked as TLS 1.3 has them.
#[derive(Debug)]
struct Judged<J>(J);

impl<J: Judge> ServerCertVerifier for Judged<J> {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.0
            .judge(&Shown { certificate, intermediates, name, now })
            .map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::PeerIncompatible::Tls13RequiredForQuic.into())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signature, &provider().signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider().signature_verification_algorithms.supported_schemes()
    }
}
