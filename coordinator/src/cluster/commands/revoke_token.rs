//! A join token is of no use any more.

use crate::cluster::members::clip;
use crate::cluster::{Answer, Context, State};
use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RevokeToken {
    pub id: String,
}

impl RevokeToken {
    pub(super) fn apply(self, state: &mut State, _context: &mut Context) -> Answer {
        match state.tokens.remove(&self.id) {
            Some(_) => Answer::Done,
            None => Answer::not_found(format!(
                "there is no token {}; `fleet token ls` lists those that are valid",
                clip(&self.id)
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::commands::Change;
    use crate::cluster::tests::{Script, redeem, token, why};
    use fleet_common::protocol::Role;

    #[test]
    fn nobody_joins_with_it_afterwards() {
        let mut script = Script::new();
        script.run(token("t", Role::Worker, 9));
        let revoke = || Change::RevokeToken(RevokeToken { id: "t".into() });
        assert_eq!(script.run(revoke()), Answer::Done);
        assert!(why(script.run(redeem("t", "n"))).contains("not known"));
        assert!(why(script.run(revoke())).contains("no token t"));
    }
}
