//! A join token: what a machine or a person needs once to become a member of a cluster.
//!
//! It carries the CA's fingerprint, so that a joiner knows whom it talks to before it shows the secret. The coordinator keeps only a hash.

use super::peer::{parse_role, role_name};
use crate::exit;
use crate::protocol::Role;
use rand::TryRngCore;
use rand::rngs::OsRng;
use sha2::{Digest, Sha256};
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// Written `fleet_ROLE_ID_SECRET_FINGERPRINT`, all hexadecimal. `Display` shows the secret, `Debug` does not.
#[derive(Clone, PartialEq, Eq)]
pub struct JoinToken {
    /// 16 hexadecimal digits; may be shown.
    pub id: String,
    /// 64 hexadecimal digits.
    pub secret: String,
    pub role: Role,
    /// SHA-256 of the cluster CA's certificate, 64 hexadecimal digits.
    pub ca_fingerprint: String,
}

/// Environment variable that holds a token.
pub const TOKEN_ENV: &str = "FLEET_TOKEN";

const ID_BYTES: usize = 8;
const SECRET_BYTES: usize = 32;
const FINGERPRINT_BYTES: usize = 32;

#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    #[error("the token in {place} is damaged: {what}; copy it whole, it begins with `fleet_`")]
    Damaged { place: String, what: &'static str },
    #[error("cannot read the token file {path}: {reason}", path = .path.display())]
    File { path: PathBuf, reason: std::io::Error },
    #[error("give the token once, by --token-file or by --token")]
    Twice,
    #[error(
        "a token for a {role} is needed: give --token-file, --token or FLEET_TOKEN; `fleet token create --role {role}` makes one",
        role = role_name(*.0)
    )]
    Missing(Role),
    #[error("this token is not for a {role}; make one with `fleet token create --role {role}`", role = role_name(*.0))]
    OtherRole(Role),
    #[error("the operating system gave no random bytes: {0}")]
    NoRandomness(String),
}

impl TokenError {
    pub fn exit_code(&self) -> u8 {
        match self {
            TokenError::NoRandomness(_) => exit::ENVIRONMENT,
            _ => exit::REFUSED_INPUT,
        }
    }
}

impl JoinToken {
    /// A new token with a secret of 256 bits from the operating system.
    pub fn generate(role: Role, ca_fingerprint: String) -> Result<JoinToken, TokenError> {
        let mut bytes = [0; ID_BYTES + SECRET_BYTES];
        OsRng.try_fill_bytes(&mut bytes).map_err(|error| TokenError::NoRandomness(error.to_string()))?;
        let (id, secret) = bytes.split_at(ID_BYTES);
        Ok(JoinToken { id: hex::encode(id), secret: hex::encode(secret), role, ca_fingerprint })
    }

    /// What the coordinator keeps of the secret.
    pub fn secret_hash(&self) -> [u8; 32] {
        hash(&self.secret)
    }

    /// A given token, which must be for `role`. An admin's is a client's too.
    pub fn expect(given: Option<JoinToken>, role: Role) -> Result<JoinToken, TokenError> {
        let token = given.ok_or(TokenError::Missing(role))?;
        if token.role.in_certificate() != role {
            return Err(TokenError::OtherRole(role));
        }
        Ok(token)
    }

    /// The token from `--token-file`, else from `--token`, else from the value of `FLEET_TOKEN`; `None` where none was given.
    pub fn from_sources(
        file: Option<&Path>,
        env: Option<&str>,
        flag: Option<&str>,
    ) -> Result<Option<JoinToken>, TokenError> {
        match (file, flag, env) {
            (Some(_), Some(_), _) => Err(TokenError::Twice),
            (Some(path), None, _) => {
                let text = std::fs::read_to_string(path)
                    .map_err(|reason| TokenError::File { path: path.to_owned(), reason })?;
                parse(&text, || path.display().to_string()).map(Some)
            }
            (None, Some(text), _) => parse(text, || "--token".to_owned()).map(Some),
            (None, None, Some(text)) if !text.is_empty() => parse(text, || TOKEN_ENV.to_owned()).map(Some),
            (None, None, _) => Ok(None),
        }
    }
}

/// Whether a presented secret is the one of which `kept` is the hash. Takes the same time wherever they differ.
pub fn secret_matches(kept: &[u8; 32], presented: &str) -> bool {
    let difference = kept.iter().zip(hash(presented)).fold(0, |all, (a, b)| all | (a ^ b));
    std::hint::black_box(difference) == 0
}

fn hash(secret: &str) -> [u8; 32] {
    Sha256::digest(secret.as_bytes()).into()
}

fn parse(text: &str, place: impl Fn() -> String) -> Result<JoinToken, TokenError> {
    parse_parts(text.trim()).map_err(|what| TokenError::Damaged { place: place(), what })
}

fn parse_parts(text: &str) -> Result<JoinToken, &'static str> {
    let parts: Vec<&str> = text.split('_').collect();
    let ["fleet", role, id, secret, fingerprint] = parts[..] else {
        return Err("it does not have the form fleet_ROLE_ID_SECRET_FINGERPRINT");
    };
    let role = parse_role(role).ok_or("its role is none of coordinator, worker, client, admin")?;
    let digits = |text: &str, bytes: usize| {
        text.len() == 2 * bytes && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
    };
    if !digits(id, ID_BYTES) || !digits(secret, SECRET_BYTES) || !digits(fingerprint, FINGERPRINT_BYTES) {
        return Err("characters are missing or wrong");
    }
    Ok(JoinToken { id: id.into(), secret: secret.into(), role, ca_fingerprint: fingerprint.into() })
}

impl FromStr for JoinToken {
    type Err = TokenError;

    fn from_str(text: &str) -> Result<Self, TokenError> {
        parse(text, || "this text".to_owned())
    }
}

impl fmt::Display for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "fleet_{}_{}_{}_{}", role_name(self.role), self.id, self.secret, self.ca_fingerprint)
    }
}

impl fmt::Debug for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "JoinToken({}, {})", role_name(self.role), self.id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token() -> JoinToken {
        JoinToken::generate(Role::Worker, "ab".repeat(32)).unwrap()
    }

    #[test]
    fn a_token_reads_back_and_two_are_never_the_same() {
        let token = token();
        assert_eq!(token.to_string().parse::<JoinToken>().unwrap(), token);
        assert_ne!(token.secret, super::tests::token().secret);
        assert!(token.to_string().starts_with("fleet_worker_"));
        assert!(!format!("{token:?}").contains(&token.secret));
    }

    #[test]
    fn only_the_secret_itself_matches_its_hash() {
        let token = token();
        assert!(secret_matches(&token.secret_hash(), &token.secret));
        assert!(!secret_matches(&token.secret_hash(), &token.secret[1..]));
        assert!(!secret_matches(&token.secret_hash(), ""));
    }

    #[test]
    fn a_damaged_token_says_where_it_came_from_and_never_what_it_was() {
        let text = token().to_string();
        let error =
            JoinToken::from_sources(None, Some(&text[..text.len() - 3]), None).unwrap_err().to_string();
        assert!(error.contains("FLEET_TOKEN is damaged: characters are missing"), "{error}");
        assert!(!error.contains(&text[20..60]));
        assert!("hello".parse::<JoinToken>().is_err());
        assert!(text.replace("worker", "root").parse::<JoinToken>().is_err());
        assert!(text.to_uppercase().parse::<JoinToken>().is_err());
    }

    #[test]
    fn a_token_of_another_role_or_none_is_refused_input() {
        let refused = |given, role| {
            let error = JoinToken::expect(given, role).unwrap_err();
            assert_eq!(error.exit_code(), exit::REFUSED_INPUT);
            error.to_string()
        };
        assert!(refused(Some(token()), Role::Coordinator).contains("not for a coordinator"));
        assert!(refused(Some(token()), Role::Client).contains("`fleet token create --role client`"));
        assert!(refused(None, Role::Worker).contains("a token for a worker is needed"));
        let admin = JoinToken::generate(Role::Admin, "ab".repeat(32)).unwrap();
        assert_eq!(JoinToken::expect(Some(admin.clone()), Role::Client).unwrap(), admin);
    }

    #[test]
    fn the_file_wins_over_the_environment_and_two_flags_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let (path, token) = (dir.path().join("token"), token());
        std::fs::write(&path, format!("{token}\n")).unwrap();
        let other = super::tests::token().to_string();
        let read = JoinToken::from_sources(Some(&path), Some(&other), None).unwrap();
        assert_eq!(read, Some(token));
        assert!(matches!(JoinToken::from_sources(Some(&path), None, Some(&other)), Err(TokenError::Twice)));
        assert_eq!(JoinToken::from_sources(None, Some(""), None).unwrap(), None);
        let error = JoinToken::from_sources(Some(&dir.path().join("none")), None, None).unwrap_err();
        assert!(error.to_string().contains("none"), "{error}");
    }
}
