//! Numbers for changes: with the client's id they make a change happen once, however often it is sent.
//!
//! Kept beside the client's identity. A change is written down as pending before it is sent and taken out when its answer is there; the same
//! change asked for again by a later process, soon after, gets the same number, so that a lost answer does not become a second job.

use crate::failure::Failure;
use crate::places;
use fleet_common::ids::ClientId;
use fleet_common::{files, process};
use nix::fcntl::{Flock, FlockArg};
use rand::TryRngCore;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::fs::File;
use std::path::{Path, PathBuf};

/// How long an unanswered change is remembered. Later, the same command means a new change.
const PENDING_MAX_MS: u64 = 10 * 60 * 1000;
/// Unanswered changes that are remembered; the coordinator keeps 32 answers per client.
const PENDING_MAX: usize = 16;

#[derive(Serialize, Deserialize)]
struct Book {
    /// 32 hex digits.
    client: String,
    next: u64,
    pending: Vec<Pending>,
}

#[derive(Serialize, Deserialize)]
struct Pending {
    seq: u64,
    /// SHA-256 of the request.
    request: String,
    unix_ms: u64,
    /// Who waits for the answer. While it lives, the same request from another process is another request.
    pid: u32,
    pid_start: Option<u64>,
}

/// One numbered change. Call `answered` when its answer is there.
#[derive(Debug)]
pub struct Change {
    pub client: ClientId,
    pub seq: u64,
    dir: PathBuf,
}

/// Numbers the change whose encoded request is `request`. `dir` holds the client's identity.
pub fn number(dir: &Path, request: &[u8]) -> Result<Change, Failure> {
    let request = hex::encode(Sha256::digest(request));
    with_book(dir, |book| {
        let now = places::unix_ms();
        book.pending.retain(|p| now.saturating_sub(p.unix_ms) < PENDING_MAX_MS);
        let orphan = book
            .pending
            .iter_mut()
            .find(|p| p.request == request && !process::is_running(p.pid, p.pid_start));
        let (pid, pid_start) = (std::process::id(), process::started(std::process::id()));
        let seq = match orphan {
            Some(orphan) => {
                (orphan.pid, orphan.pid_start, orphan.unix_ms) = (pid, pid_start, now);
                orphan.seq
            }
            None => {
                let seq = book.next;
                book.next += 1;
                book.pending.push(Pending { seq, request, unix_ms: now, pid, pid_start });
                let excess = book.pending.len().saturating_sub(PENDING_MAX);
                book.pending.drain(..excess);
                seq
            }
        };
        let client = u128::from_str_radix(&book.client, 16).map_err(|_| damaged(dir))?;
        Ok(Change { client: ClientId(client), seq, dir: dir.to_owned() })
    })
}

impl Change {
    /// The answer is there: the same request is a new change from now on.
    pub fn answered(self) -> Result<(), Failure> {
        with_book(&self.dir, |book| {
            book.pending.retain(|p| p.seq != self.seq);
            Ok(())
        })
    }
}

fn with_book<T>(dir: &Path, work: impl FnOnce(&mut Book) -> Result<T, Failure>) -> Result<T, Failure> {
    let path = dir.join("requests.json");
    let _lock = lock(&dir.join("requests.lock"))?;
    let mut book = match files::read_optional(&path).map_err(|e| Failure::io("read", &path, &e))? {
        Some(text) => serde_json::from_str(&text).map_err(|_| damaged(dir))?,
        None => {
            let mut id = [0; 16];
            rand::rngs::OsRng.try_fill_bytes(&mut id).map_err(|e| {
                Failure::environment(format!("the operating system gave no random bytes: {e}"))
            })?;
            Book { client: hex::encode(id), next: 1, pending: Vec::new() }
        }
    };
    let done = work(&mut book)?;
    let text = serde_json::to_string(&book).map_err(|e| Failure::environment(e.to_string()))?;
    files::write_atomic(&path, text.as_bytes()).map_err(|e| Failure::io("write", &path, &e))?;
    Ok(done)
}

fn damaged(dir: &Path) -> Failure {
    Failure::environment(format!("{} is damaged; remove it", dir.join("requests.json").display()))
}

fn lock(path: &Path) -> Result<Flock<File>, Failure> {
    let open = files::private().create(true).write(true).truncate(false).open(path);
    let file = open.map_err(|e| Failure::io("open", path, &e))?;
    Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, e)| Failure::io("lock", path, &e.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_rise_and_an_answered_request_asked_again_is_new() {
        let dir = tempfile::tempdir().unwrap();
        let first = number(dir.path(), b"a").unwrap();
        let second = number(dir.path(), b"b").unwrap();
        assert_eq!((first.client, first.seq, second.seq), (second.client, 1, 2));
        first.answered().unwrap();
        assert_eq!(number(dir.path(), b"a").unwrap().seq, 3);
    }

    #[test]
    fn a_request_whose_process_died_keeps_its_number_and_one_under_way_does_not_share_it() {
        let dir = tempfile::tempdir().unwrap();
        let mine = number(dir.path(), b"a").unwrap();
        assert_ne!(number(dir.path(), b"a").unwrap().seq, mine.seq);
        with_book(dir.path(), |book| {
            book.pending.retain(|p| p.seq == mine.seq);
            book.pending[0].pid_start = Some(1);
            Ok(())
        })
        .unwrap();
        assert_eq!(number(dir.path(), b"a").unwrap().seq, mine.seq);
        assert_ne!(number(dir.path(), b"b").unwrap().seq, mine.seq);
    }
}
