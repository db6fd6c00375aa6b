//! How much room the disk has. Writes stop before it is used up, because RocksDB does not recover from a full disk by itself.

use std::path::Path;
use tracing::{info, warn};

/// Below this, nothing new is written: what RocksDB may still need to move its buffers into sorted files.
const RESERVE_BYTES: u64 = 16 << 20;
/// Writing starts again above this.
const RESUME_BYTES: u64 = 20 << 20;

/// Tells the free bytes of the file system that holds a directory; `None` when it does not say.
pub type Probe = Box<dyn Fn() -> Option<u64> + Send>;

pub fn probe(dir: &Path) -> Probe {
    let dir = dir.to_owned();
    Box::new(move || {
        let found = nix::sys::statvfs::statvfs(&dir).ok()?;
        #[allow(clippy::useless_conversion)] // u32 on macOS
        Some(u64::from(found.blocks_available()).saturating_mul(u64::from(found.fragment_size())))
    })
}

/// Notices when the room becomes little and when there is enough again.
pub struct Watermark {
    probe: Probe,
    low: bool,
}

impl Watermark {
    pub fn new(probe: Probe) -> Watermark {
        Watermark { probe, low: false }
    }

    /// Something when it has changed: why nothing may be written, or that it may.
    pub fn look(&mut self) -> Option<Option<String>> {
        let free = (self.probe)()?;
        let low = free < if self.low { RESUME_BYTES } else { RESERVE_BYTES };
        if low == self.low {
            return None;
        }
        self.low = low;
        if !low {
            info!("the disk has room again: {} MiB", free >> 20);
            return Some(None);
        }
        let why = format!(
            "the coordinator's disk has only {} MiB free; nothing is recorded until there are {} MiB",
            free >> 20,
            RESUME_BYTES >> 20
        );
        warn!("{why}");
        Some(Some(why))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    #[test]
    fn writing_stops_before_the_disk_is_full_and_starts_again_with_a_margin() {
        let free = Arc::new(AtomicU64::new(1 << 40));
        let probed = free.clone();
        let mut watermark = Watermark::new(Box::new(move || Some(probed.load(Ordering::SeqCst))));
        let mut at = |bytes: u64| {
            free.store(bytes, Ordering::SeqCst);
            watermark.look()
        };
        assert_eq!(at(RESERVE_BYTES), None);
        assert!(at(RESERVE_BYTES - 1).unwrap().unwrap().contains("15 MiB"));
        assert_eq!(at(RESERVE_BYTES - 2), None, "said once");
        assert_eq!(at(RESUME_BYTES - 1), None);
        assert_eq!(at(RESUME_BYTES), Some(None));
    }
}
