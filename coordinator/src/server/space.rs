//! How much room the disk has, and whether it can be written at all. Writes stop before it is used up, because RocksDB does not recover
//! from a full disk by itself.

use nix::sys::statvfs::FsFlags;
use std::path::Path;
use tracing::{info, warn};

/// Below this, nothing new is written: what RocksDB may still need to move its buffers into sorted files.
const RESERVE_BYTES: u64 = 16 << 20;
/// Writing starts again above this.
const RESUME_BYTES: u64 = 20 << 20;

/// What the file system says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found {
    pub free_bytes: u64,
    pub read_only: bool,
}

/// Looks at the file system that holds a directory; `None` when it does not say.
pub type Probe = Box<dyn Fn() -> Option<Found> + Send>;

pub fn probe(dir: &Path) -> Probe {
    let dir = dir.to_owned();
    Box::new(move || {
        let found = nix::sys::statvfs::statvfs(&dir).ok()?;
        #[allow(clippy::useless_conversion)] // u32 on macOS
        let free_bytes = u64::from(found.blocks_available()).saturating_mul(u64::from(found.fragment_size()));
        Some(Found { free_bytes, read_only: found.flags().contains(FsFlags::ST_RDONLY) })
    })
}

/// Notices when the disk cannot be written any more, or soon, and when it can be again.
pub struct Watermark {
    probe: Probe,
    state: State,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Good,
    Low,
    ReadOnly,
}

impl Watermark {
    pub fn new(probe: Probe) -> Watermark {
        Watermark { probe, state: State::Good }
    }

    /// Something when it has changed: why nothing may be written, or that it may.
    pub fn look(&mut self) -> Option<Option<String>> {
        let Found { free_bytes: free, read_only } = (self.probe)()?;
        let state = match self.state {
            _ if read_only => State::ReadOnly,
            State::Low if free < RESUME_BYTES => State::Low,
            _ if free < RESERVE_BYTES => State::Low,
            _ => State::Good,
        };
        if state == self.state {
            return None;
        }
        self.state = state;
        let why = match state {
            State::Good => {
                info!("the disk can be written again and has {} MiB free", free >> 20);
                return Some(None);
            }
            State::Low => format!(
                "the coordinator's disk has only {} MiB free; nothing is recorded until there are {} MiB",
                free >> 20,
                RESUME_BYTES >> 20
            ),
            State::ReadOnly => {
                "the coordinator's disk is mounted read-only; nothing is recorded until it can be written"
                    .into()
            }
        };
        warn!("{why}");
        Some(Some(why))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    #[test]
    fn writing_stops_before_the_disk_is_full_and_starts_again_with_a_margin() {
        let (mut watermark, found) = watermark();
        let mut at = |free_bytes: u64| {
            *found.lock().unwrap() = Found { free_bytes, read_only: false };
            watermark.look()
        };
        assert_eq!(at(RESERVE_BYTES), None);
        assert!(at(RESERVE_BYTES - 1).unwrap().unwrap().contains("15 MiB"));
        assert_eq!(at(RESERVE_BYTES - 2), None, "said once");
        assert_eq!(at(RESUME_BYTES - 1), None);
        assert_eq!(at(RESUME_BYTES), Some(None));
    }

    #[test]
    fn writing_stops_while_the_disk_is_read_only() {
        let (mut watermark, found) = watermark();
        let mut at = |read_only: bool| {
            *found.lock().unwrap() = Found { free_bytes: 1 << 40, read_only };
            watermark.look()
        };
        assert!(at(true).unwrap().unwrap().contains("read-only"));
        assert_eq!(at(true), None, "said once");
        assert_eq!(at(false), Some(None));
    }

    fn watermark() -> (Watermark, Arc<Mutex<Found>>) {
        let found = Arc::new(Mutex::new(Found { free_bytes: 1 << 40, read_only: false }));
        let probed = found.clone();
        (Watermark::new(Box::new(move || Some(*probed.lock().unwrap()))), found)
    }
}
