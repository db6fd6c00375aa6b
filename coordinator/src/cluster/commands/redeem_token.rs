//! A token is used to join. For a worker this registers its node and decides its id.

use crate::cluster::records::NodeRecord;
use crate::cluster::{Answer, Context, State};
use fleet_common::ids::NodeId;
use fleet_common::protocol::Role;
use serde::{Deserialize, Serialize};

/// Nodes that a cluster can know.
pub const NODES_MAX: usize = 20_000;
/// Characters of a node's name.
pub const NAME_MAX: usize = 63;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RedeemToken {
    pub id: String,
    pub secret_sha256: [u8; 32],
    /// The joiner's wish.
    pub name: String,
}

impl RedeemToken {
    pub(super) fn apply(self, state: &mut State, context: &mut Context) -> Answer {
        let token = match state.tokens.get_mut(&self.id) {
            Some(token) if token.secret_sha256 == self.secret_sha256 => token,
            _ => return Answer::forbidden("this token is not known here; use one that this cluster issued"),
        };
        if token.expires_unix_ms <= context.unix_ms {
            return Answer::forbidden("this token has expired; create a new one");
        }
        if token.uses_left == 0 {
            return Answer::forbidden("this token has been used up; create a new one");
        }
        let role = token.role;
        if role == Role::Worker && state.nodes.len() >= NODES_MAX {
            return Answer::invalid(format!("the cluster has {NODES_MAX} nodes, which is its limit"));
        }
        token.uses_left -= 1;
        if role != Role::Worker {
            return Answer::Redeemed { role, node: None };
        }
        state.last_node += 1;
        let node = NodeId(state.last_node);
        let record = NodeRecord {
            name: node_name(&self.name, node),
            slots: 0,
            device: String::new(),
            version: String::new(),
            lost: false,
            joined_unix_ms: context.unix_ms,
        };
        state.nodes.insert(node, record);
        Answer::Redeemed { role, node: Some(node) }
    }
}

/// The joiner's wish with only letters, digits, `.`, `_` and `-`, or the id where nothing is left.
pub fn node_name(wish: &str, node: NodeId) -> String {
    let name: String =
        wish.chars().filter(|c| c.is_ascii_alphanumeric() || "._-".contains(*c)).take(NAME_MAX).collect();
    if name.is_empty() { node.to_string() } else { name }
}

#[cfg(test)]
mod tests {
    use super::node_name;
    use crate::cluster::Answer;
    use crate::cluster::commands::{Change, CreateToken, RedeemToken};
    use crate::cluster::tests::{Script, why};
    use fleet_common::ids::NodeId;
    use fleet_common::protocol::Role;

    fn redeem(id: &str, secret: u8) -> Change {
        Change::RedeemToken(RedeemToken {
            id: id.into(),
            secret_sha256: [secret; 32],
            name: "gpu box".into(),
        })
    }

    fn with_token(uses: u32) -> Script {
        let mut script = Script::new();
        script.run(Change::CreateToken(CreateToken {
            id: "t".into(),
            secret_sha256: [7; 32],
            role: Role::Worker,
            ttl_ms: 1_000,
            uses,
        }));
        script
    }

    #[test]
    fn each_use_registers_a_node_until_none_is_left() {
        let mut script = with_token(2);
        assert_eq!(
            script.run(redeem("t", 7)),
            Answer::Redeemed { role: Role::Worker, node: Some(NodeId(1)) }
        );
        assert_eq!(
            script.run(redeem("t", 7)),
            Answer::Redeemed { role: Role::Worker, node: Some(NodeId(2)) }
        );
        assert!(why(script.run(redeem("t", 7))).contains("used up"));
        assert_eq!(script.state.nodes()[&NodeId(1)].name, "gpubox");
    }

    #[test]
    fn a_wrong_secret_looks_like_an_unknown_token() {
        let mut script = with_token(1);
        assert_eq!(why(script.run(redeem("t", 8))), why(script.run(redeem("other", 7))));
        assert_eq!(script.state.tokens()["t"].uses_left, 1);
    }

    #[test]
    fn an_expired_token_is_refused() {
        let mut script = with_token(1);
        script.now += 1_000;
        assert!(why(script.run(redeem("t", 7))).contains("expired"));
    }

    #[test]
    fn a_name_never_breaks_a_line_or_a_path() {
        assert_eq!(node_name("a/../b\n", NodeId(3)), "a..b");
        assert_eq!(node_name("///", NodeId(3)), "node-3");
        assert_eq!(node_name(&"x".repeat(500), NodeId(3)).len(), super::NAME_MAX);
    }
}
