//! Where the coordinators are: as the operator said, and as the cluster has said since, which is kept over restarts.

use anyhow::Context;
use fleet_common::files;
use fleet_common::net::NetError;
use fleet_common::protocol::CoordinatorAddress;
use rand::Rng;
use rand::seq::SliceRandom;
use std::path::{Path, PathBuf};

#[derive(Debug)]
pub struct Coordinators {
    path: PathBuf,
    /// `HOST:PORT` of any socket of some coordinators.
    given: Vec<String>,
    known: Vec<CoordinatorAddress>,
}

impl Coordinators {
    /// With what `DIR/coordinators.json` remembers.
    pub fn load(dir: &Path, given: Vec<String>) -> anyhow::Result<Coordinators> {
        let path = dir.join("coordinators.json");
        let known = match files::read_optional(&path)? {
            Some(text) => serde_json::from_str(&text)
                .with_context(|| format!("{} is damaged; remove it", path.display()))?,
            None => Vec::new(),
        };
        Ok(Coordinators { path, given, known })
    }

    /// Takes over what the cluster says, and keeps it if it is new.
    pub fn learn(&mut self, known: Vec<CoordinatorAddress>) {
        if known.is_empty() || known == self.known {
            return;
        }
        self.known = known;
        let text = serde_json::to_string_pretty(&self.known).unwrap_or_default() + "\n";
        if let Err(error) = files::write_atomic(&self.path, text.as_bytes()) {
            tracing::warn!(%error, "where the coordinators are was not kept");
        }
    }

    /// Where the cluster said that agents connect, mixed, so that they spread over the coordinators.
    pub fn known(&self, rng: &mut impl Rng) -> Vec<String> {
        let mut addresses: Vec<String> = self.known.iter().map(|address| address.member.clone()).collect();
        addresses.retain(|address| !address.is_empty());
        addresses.shuffle(rng);
        addresses
    }

    pub fn given(&self) -> &[String] {
        &self.given
    }
}

/// What to do where the cluster is another one than that of the node's directory.
pub fn with_the_way_out(error: NetError, identity_dir: &Path) -> NetError {
    let NetError::OtherCluster(what) = error else { return error };
    let dir = identity_dir.parent().unwrap_or(identity_dir).display();
    NetError::OtherCluster(format!(
        "{what}, with {dir}; to join that cluster, run `worker join` with a token from there and another --data-dir, or set this one aside (mv {dir} {dir}.old)"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use fleet_common::ids::ReplicaId;
    use rand::SeedableRng;

    #[test]
    fn what_the_cluster_said_is_kept_and_mixed() {
        let dir = tempfile::tempdir().unwrap();
        let address = |replica, member: &str| CoordinatorAddress {
            replica: ReplicaId(replica),
            client: "c:1".into(),
            member: member.into(),
        };
        let mut rng = rand::rngs::StdRng::seed_from_u64(1);
        let mut coordinators = Coordinators::load(dir.path(), vec!["given:1".into()]).unwrap();
        assert_eq!(coordinators.known(&mut rng), Vec::<String>::new());
        coordinators.learn(vec![address(1, "a:1"), address(2, "b:1"), address(3, "")]);
        coordinators.learn(Vec::new());
        let again = Coordinators::load(dir.path(), vec!["given:1".into()]).unwrap();
        assert_eq!(again.given(), ["given:1"]);
        let orders: std::collections::BTreeSet<Vec<String>> =
            (0..50).map(|_| again.known(&mut rng)).collect();
        let expected = [vec!["a:1".to_owned(), "b:1".to_owned()], vec!["b:1".to_owned(), "a:1".to_owned()]];
        assert_eq!(orders, expected.into(), "all agents would go to one");
    }
}
