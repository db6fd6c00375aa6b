//! How local programs find a coordinator: a file in its data directory, written when it listens.

use crate::files;
use crate::ids::ReplicaId;
use crate::process;
use serde::{Deserialize, Serialize};
use std::io;
use std::path::Path;

/// `DIR/endpoint.json`. Holds no secret.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endpoint {
    pub pid: u32,
    /// When that process started, where the system says it: the number may be another's by now.
    #[serde(default)]
    pub pid_start: Option<u64>,
    pub replica: ReplicaId,
    /// `HOST:PORT` that clients connect to, and those who join.
    pub quic: String,
    /// `HOST:PORT` that agents and other coordinators connect to.
    pub member: String,
    /// `HOST:PORT` of the HTTP views.
    pub http: String,
    pub cluster_id: String,
    /// SHA-256 of the cluster CA's certificate, in hex.
    pub ca_fingerprint: String,
    /// `HOST:PORT` for clients of all coordinators of the cluster, this one included.
    pub coordinators: Vec<String>,
}

const FILE: &str = "endpoint.json";

impl Endpoint {
    /// Writes the file atomically into an existing directory.
    pub fn store(&self, dir: &Path) -> io::Result<()> {
        let text = serde_json::to_string_pretty(self).map_err(io::Error::other)? + "\n";
        files::write_atomic(&dir.join(FILE), text.as_bytes())
    }

    /// Its process, while it runs.
    pub fn running(&self) -> Option<u32> {
        process::is_running(self.pid, self.pid_start).then_some(self.pid)
    }

    /// `None` where no coordinator has listened yet.
    pub fn load(dir: &Path) -> io::Result<Option<Endpoint>> {
        let path = dir.join(FILE);
        let Some(text) = files::read_optional(&path)? else { return Ok(None) };
        serde_json::from_str(&text).map(Some).map_err(|error| {
            let what =
                format!("{} is damaged ({error}); remove it and restart the coordinator", path.display());
            io::Error::new(io::ErrorKind::InvalidData, what)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_shown_only_while_it_is_the_one_that_wrote_the_file() {
        let pid = std::process::id();
        let mine = Endpoint { pid, pid_start: process::started(pid), ..endpoint() };
        assert_eq!(mine.running(), Some(pid));
        assert_eq!(Endpoint { pid_start: Some(1), ..mine }.running(), None);
    }

    fn endpoint() -> Endpoint {
        Endpoint {
            pid: 7,
            pid_start: Some(70),
            replica: ReplicaId(1),
            quic: "127.0.0.1:7070".into(),
            member: "127.0.0.1:7071".into(),
            http: "127.0.0.1:7080".into(),
            cluster_id: "c1".into(),
            ca_fingerprint: "ab".into(),
            coordinators: vec!["127.0.0.1:7070".into()],
        }
    }

    #[test]
    fn an_endpoint_reads_back_and_a_damaged_one_is_named() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Endpoint::load(dir.path()).unwrap(), None);
        let endpoint = endpoint();
        endpoint.store(dir.path()).unwrap();
        assert_eq!(Endpoint::load(dir.path()).unwrap(), Some(endpoint));
        std::fs::write(dir.path().join(FILE), "{\"pid\":").unwrap();
        assert!(Endpoint::load(dir.path()).unwrap_err().to_string().contains("endpoint.json is damaged"));
    }
}
