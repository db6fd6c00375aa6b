//! A new join token. Only the hash of its secret comes here.

use crate::cluster::members::TokenRecord;
use crate::cluster::{Answer, Context, State};
use fleet_common::protocol::Role;
use serde::{Deserialize, Serialize};

/// Tokens that can be valid at once: a token per machine of a large cluster.
pub const TOKENS_MAX: usize = 10_000;
/// An expired token is kept for this long, since a proposer's clock may be hours ahead and what it takes for expired may be good.
/// Whether a token is good is decided when it is used.
const KEEP_EXPIRED_MS: u64 = 7 * 24 * 3600 * 1000;

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
        let long_ago = now.saturating_sub(KEEP_EXPIRED_MS);
        state.tokens.retain(|_, token| token.expires_unix_ms > long_ago && token.uses_left > 0);
        if self.uses == 0 || self.ttl_ms == 0 {
            return Answer::invalid("a token needs at least one use and a lifetime above zero");
        }
        if state.tokens.len() >= TOKENS_MAX {
            let oldest = state.tokens.iter().min_by_key(|(_, token)| token.expires_unix_ms);
            if let Some(id) =
                oldest.filter(|(_, token)| token.expires_unix_ms <= now).map(|(id, _)| id.clone())
            {
                state.tokens.remove(&id);
            }
        }
        if state.tokens.len() >= TOKENS_MAX {
            return Answer::later(format!("{TOKENS_MAX} tokens are valid already; let some expire first"));
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
    use super::*;
    use crate::cluster::commands::{Change, RedeemToken};
    use crate::cluster::tests::{Script, why};

    fn token(id: &str, ttl_ms: u64) -> Change {
        Change::CreateToken(CreateToken {
            id: id.into(),
            secret_sha256: [7; 32],
            role: Role::Worker,
            ttl_ms,
            uses: 1,
        })
    }

    const HOUR: u64 = 3600 * 1000;

    #[test]
    fn a_token_that_expired_long_ago_is_forgotten() {
        let mut script = Script::new();
        assert_eq!(script.at(1_000).run(token("a", 500)), Answer::TokenCreated { id: "a".into() });
        script.at(1_500 + KEEP_EXPIRED_MS - 1).run(token("b", 500));
        assert!(script.state.tokens().contains_key("a"));
        script.at(1_500 + KEEP_EXPIRED_MS).run(token("c", 500));
        assert!(!script.state.tokens().contains_key("a"));
    }

    #[test]
    fn a_proposer_whose_clock_is_hours_ahead_takes_no_good_token_away() {
        let mut script = Script::new();
        script.at(100 * HOUR).run(token("good", 2 * HOUR));
        script.at(106 * HOUR).run(token("hasty", HOUR));
        let redeem = |id: &str| {
            Change::RedeemToken(RedeemToken {
                id: id.into(),
                secret_sha256: [7; 32],
                name: "n".into(),
                key: [0; 32],
            })
        };
        assert!(why(script.run(redeem("good"))).contains("expired"), "by the time in the command");
        assert!(matches!(script.at(101 * HOUR).run(redeem("good")), Answer::Redeemed { .. }));
    }

    #[test]
    fn where_there_is_no_room_the_one_that_expired_first_makes_some() {
        let mut script = Script::new();
        for n in 0..TOKENS_MAX as u64 {
            script.at(1_000).run(token(&format!("t{n}"), 500 + n));
        }
        assert!(why(script.at(1_499).run(token("more", 500))).contains("tokens are valid already"));
        assert_eq!(script.at(1_501).run(token("more", 500)), Answer::TokenCreated { id: "more".into() });
        let tokens = script.state.tokens();
        assert!(!tokens.contains_key("t0") && tokens.contains_key("t1") && tokens.len() == TOKENS_MAX);
    }

    #[test]
    fn a_token_of_no_use_is_refused() {
        let mut script = Script::new();
        assert!(matches!(script.run(token("a", 0)), Answer::Rejected(_)));
        assert!(script.state.tokens().is_empty());
    }
}
