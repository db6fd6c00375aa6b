//! A new join token. Only the hash of its secret comes here.

use crate::cluster::members::TokenRecord;
use crate::cluster::{Answer, Context, State};
use fleet_common::protocol::Role;
use serde::{Deserialize, Serialize};

/// Tokens that can be valid at once: a token per machine of a large cluster.
pub const TOKENS_MAX: usize = 10_000;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CreateToken {
    pub id: String,
    pub secret_sha256: [u8; 32],
    pub role: Role,
    pub ttl_ms: u64,
    pub uses: u32,
}

impl CreateToken {
    pub(super) fn apply(self, state: &mut State, context: &mut Context) -> Answer {
        let now = context.unix_ms;
        state.tokens.retain(|_, token| token.expires_unix_ms > now && token.uses_left > 0);
        if self.uses == 0 || self.ttl_ms == 0 {
            return Answer::invalid("a token needs at least one use and a lifetime above zero");
        }
        if state.tokens.len() >= TOKENS_MAX {
            return Answer::invalid(format!("{TOKENS_MAX} tokens are valid already; let some expire first"));
        }
        if state.tokens.contains_key(&self.id) {
            return Answer::invalid(format!("a token {} exists already", self.id));
        }
        let token = TokenRecord {
            role: self.role,
            secret_sha256: self.secret_sha256,
            expires_unix_ms: now.saturating_add(self.ttl_ms),
            uses_left: self.uses,
        };
        state.tokens.insert(self.id.clone(), token);
        Answer::TokenCreated { id: self.id }
    }
}

#[cfg(test)]
mod tests {
    use crate::cluster::Answer;
    use crate::cluster::commands::{Change, CreateToken};
    use crate::cluster::tests::Script;
    use fleet_common::protocol::Role;

    fn token(id: &str, ttl_ms: u64) -> Change {
        Change::CreateToken(CreateToken {
            id: id.into(),
            secret_sha256: [7; 32],
            role: Role::Worker,
            ttl_ms,
            uses: 1,
        })
    }

    #[test]
    fn expired_tokens_make_room() {
        let mut script = Script::new();
        assert_eq!(script.at(1_000).run(token("a", 500)), Answer::TokenCreated { id: "a".into() });
        assert!(script.state.tokens().contains_key("a"));
        script.at(1_501).run(token("b", 500));
        assert!(!script.state.tokens().contains_key("a"));
    }

    #[test]
    fn a_token_of_no_use_is_refused() {
        let mut script = Script::new();
        assert!(matches!(script.run(token("a", 0)), Answer::Rejected(_)));
        assert!(script.state.tokens().is_empty());
    }
}
