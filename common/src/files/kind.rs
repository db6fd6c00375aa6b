//! What a directory of fleet's is kept for, seen by what lies in it.

use serde_json::Value;
use std::fmt;
use std::fs;
use std::path::Path;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Also of a `fleet launch`, whose first coordinator has it.
    Coordinator,
    Worker,
    /// Checkpoints, or a directory of runs.
    Runs,
}

impl Kind {
    /// `None` for a directory that is empty, absent, or not fleet's. Writes nothing.
    pub fn of(dir: &Path) -> Option<Kind> {
        let has = |names: &[&str]| names.iter().any(|name| fs::symlink_metadata(dir.join(name)).is_ok());
        // First what only a coordinator has: of an earlier version a worker may have left its own there.
        if has(&["cluster", "raft", "raft.mark", "joining.json", "founding.json", "restoring.json"]) {
            return Some(Kind::Coordinator);
        }
        match role(dir).as_deref() {
            Some("coordinator") => return Some(Kind::Coordinator),
            Some("worker") => return Some(Kind::Worker),
            _ => {}
        }
        if has(&["process.json", "gangs"]) {
            return Some(Kind::Worker);
        }
        let is_step = |name: &str| name.strip_prefix("step-").is_some_and(|step| step.parse::<u64>().is_ok());
        let mut entries = fs::read_dir(dir).into_iter().flatten().flatten();
        let holds_steps = entries.any(|entry| entry.file_name().to_str().is_some_and(is_step));
        (holds_steps || has(&["checkpoints", "trainer_state.json"])).then_some(Kind::Runs)
    }

    /// All that may be in a directory that is kept for it.
    pub(super) fn contents(self) -> &'static [&'static str] {
        match self {
            Kind::Coordinator => &[
                "lock",
                "cluster",
                "raft",
                "raft.mark",
                "restoring",
                "restoring.json",
                "identity",
                "joining.json",
                "founding.json",
                "coordinators.json",
                "client",
                "tokens",
                "endpoint.json",
                "listen.json",
                "coordinator.log",
                "coordinator-2.log",
                "coordinator-3.log",
                "coordinator-4.log",
                "coordinator-5.log",
                "worker.log",
            ],
            Kind::Worker => {
                &["lock", "identity", "coordinators.json", "process.json", "gangs", "checkpoint-port"]
            }
            Kind::Runs => &[],
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Kind::Coordinator => "the data directory of a coordinator",
            Kind::Worker => "the data directory of a worker",
            Kind::Runs => "a directory of checkpoints",
        })
    }
}

/// Whose identity is kept there.
fn role(dir: &Path) -> Option<String> {
    let text = fs::read_to_string(dir.join("identity/identity.json")).ok()?;
    let summary: Value = serde_json::from_str(&text).ok()?;
    summary["role"].as_str().map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_is_known_by_what_only_it_has() {
        let made = |paths: &[&str]| {
            let dir = tempfile::tempdir().unwrap();
            for path in paths {
                let (path, role) = path.split_once('=').unwrap_or((path, ""));
                let path = dir.path().join(path);
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(path, format!("{{\"role\":\"{role}\"}}")).unwrap();
            }
            Kind::of(dir.path())
        };
        assert_eq!(made(&[]), None);
        assert_eq!(made(&["lock", "src/main.rs"]), None);
        assert_eq!(made(&["identity/identity.json=client"]), None);
        assert_eq!(made(&["lock", "identity/identity.json=worker"]), Some(Kind::Worker));
        assert_eq!(made(&["lock", "identity/identity.json=coordinator"]), Some(Kind::Coordinator));
        assert_eq!(made(&["process.json"]), Some(Kind::Worker));
        assert_eq!(made(&["raft/CURRENT", "process.json"]), Some(Kind::Coordinator));
        assert_eq!(made(&["founding.json"]), Some(Kind::Coordinator));
        assert_eq!(made(&["step-00000010/manifest.json"]), Some(Kind::Runs));
        assert_eq!(made(&["checkpoints/a/b"]), Some(Kind::Runs));
        assert_eq!(made(&["step-by-step.md"]), None);
        assert_eq!(Kind::of(Path::new("/nowhere")), None);
    }
}
