//! How much room the disk has. Writes stop before it is used up, because RocksDB does not recover from a full disk by itself.

use std::path::Path;

/// Below this, nothing new is written: what RocksDB may still need to move its buffers into sorted files.
pub const RESERVE_BYTES: u64 = 16 << 20;
/// Writing starts again above this.
pub const RESUME_BYTES: u64 = 20 << 20;

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
