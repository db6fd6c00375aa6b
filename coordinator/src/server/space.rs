//! How much room the disk has, and whether it can be written at all. There are two steps before it is used up: in the reserve only what
//! ends something or makes room is written, so that there is a way out; and below it nothing, because RocksDB does not recover from a
//! full disk by itself.

use crate::control::Room;
use nix::sys::statvfs::FsFlags;
use std::path::Path;
use tracing::{info, warn};

/// Below this, nothing is written: what RocksDB may still need to move its buffers into sorted files.
const NOTHING_BYTES: u64 = 16 << 20;
/// The reserve ends where so much is free: it holds a hundred thousand cancellations, and what a compaction writes before it removes.
const RESERVE_BYTES: u64 = 256 << 20;
/// On a small disk it is a smaller one: this part of the whole, and so much at least.
const RESERVE_PART: u64 = 16;
const RESERVE_MIN_BYTES: u64 = 24 << 20;
/// So much more must be free before more is written again.
const MARGIN_BYTES: u64 = 4 << 20;

/// What the file system says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found {
    pub free_bytes: u64,
    pub total_bytes: u64,
    pub read_only: bool,
}

/// Looks at the file system that holds a directory; `None` when it does not say.
pub type Probe = Box<dyn Fn() -> Option<Found> + Send + Sync>;

pub fn probe(dir: &Path) -> Probe {
    let dir = dir.to_owned();
    Box::new(move || {
        let found = nix::sys::statvfs::statvfs(&dir).ok()?;
        #[allow(clippy::useless_conversion)] // u32 on macOS
        let bytes = |blocks| u64::from(blocks).saturating_mul(u64::from(found.fragment_size()));
        Some(Found {
            free_bytes: bytes(found.blocks_available()),
            total_bytes: bytes(found.blocks()),
            read_only: found.flags().contains(FsFlags::ST_RDONLY),
        })
    })
}

/// Notices when the disk cannot be written any more, or soon, and when it can be again.
pub struct Watermark {
    probe: Probe,
    state: State,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum State {
    Good,
    Reserve,
    Full,
    ReadOnly,
}

impl Watermark {
    pub fn new(probe: Probe) -> Watermark {
        Watermark { probe, state: State::Good }
    }

    /// Something when it has changed.
    pub fn look(&mut self) -> Option<Room> {
        let Found { free_bytes: free, total_bytes, read_only } = (self.probe)()?;
        let reserve = (total_bytes / RESERVE_PART).clamp(RESERVE_MIN_BYTES, RESERVE_BYTES);
        // What was refused is refused until there is a little more.
        let below = |limit: u64, state: State| {
            free < limit
                || (self.state >= state && self.state != State::ReadOnly && free < limit + MARGIN_BYTES)
        };
        let state = match () {
            () if read_only => State::ReadOnly,
            () if below(NOTHING_BYTES, State::Full) => State::Full,
            () if below(reserve, State::Reserve) => State::Reserve,
            () => State::Good,
        };
        if state == self.state {
            return None;
        }
        self.state = state;
        let (free, mib) = (free >> 20, |bytes: u64| (bytes + MARGIN_BYTES) >> 20);
        let room = match state {
            State::Good => {
                info!("the disk can be written again and has {free} MiB free");
                return Some(Room::Enough);
            }
            State::Reserve => Room::Little(format!(
                "the coordinator's disk has only {free} MiB free; until there are {} MiB it takes only what frees or ends something: cancel jobs, or keep less history with `fleet retention --size`",
                mib(reserve)
            )),
            State::Full => Room::None(format!(
                "the coordinator's disk has only {free} MiB free; nothing is recorded until there are {} MiB",
                mib(NOTHING_BYTES)
            )),
            State::ReadOnly => Room::None(
                "the coordinator's disk is mounted read-only; nothing is recorded until it can be written"
                    .into(),
            ),
        };
        warn!("{}", room.why().unwrap_or_default());
        Some(room)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    const TOTAL: u64 = 10 << 30;
    const GOOD: Found = Found { free_bytes: 1 << 40, total_bytes: TOTAL, read_only: false };

    /// What is said of a disk that has so much free, one after the other.
    fn said(total_bytes: u64, frees: &[u64]) -> Vec<Option<Room>> {
        let (mut watermark, found) = watermark();
        let look = |free_bytes: &u64| {
            *found.lock().unwrap() = Found { free_bytes: *free_bytes, total_bytes, read_only: false };
            watermark.look()
        };
        frees.iter().map(look).collect()
    }

    #[test]
    fn writing_stops_in_two_steps_and_starts_again_with_a_margin() {
        let frees = [
            RESERVE_BYTES,
            RESERVE_BYTES - 1,
            RESERVE_BYTES + MARGIN_BYTES - 1,
            NOTHING_BYTES,
            NOTHING_BYTES - 1,
            NOTHING_BYTES + MARGIN_BYTES - 1,
            NOTHING_BYTES + MARGIN_BYTES,
            RESERVE_BYTES + MARGIN_BYTES,
        ];
        let said = said(TOTAL, &frees);
        assert!(
            matches!(&said[1], Some(Room::Little(why)) if why.contains("255 MiB free") && why.contains("260 MiB"))
        );
        assert!(
            matches!(&said[4], Some(Room::None(why)) if why.contains("15 MiB free") && why.contains("20 MiB"))
        );
        assert!(matches!(said[6], Some(Room::Little(_))));
        assert_eq!(said[7], Some(Room::Enough));
        assert!([0, 2, 3, 5].iter().all(|at| said[*at].is_none()), "said once: {said:?}");
    }

    #[test]
    fn a_small_disk_has_a_small_reserve_and_a_jump_leaves_no_step_out() {
        assert_eq!(said(96 << 20, &[RESERVE_MIN_BYTES]), [None]);
        assert!(matches!(said(96 << 20, &[RESERVE_MIN_BYTES - 1])[0], Some(Room::Little(_))));
        let said = said(1 << 30, &[0, 1 << 30, 63 << 20]);
        assert!(matches!(said[..], [Some(Room::None(_)), Some(Room::Enough), Some(Room::Little(_))]));
    }

    #[test]
    fn writing_stops_while_the_disk_is_read_only() {
        let (mut watermark, found) = watermark();
        let mut at = |read_only: bool| {
            *found.lock().unwrap() = Found { read_only, ..GOOD };
            watermark.look()
        };
        assert!(matches!(at(true), Some(Room::None(why)) if why.contains("read-only")));
        assert_eq!(at(true), None, "said once");
        assert_eq!(at(false), Some(Room::Enough));
    }

    fn watermark() -> (Watermark, Arc<Mutex<Found>>) {
        let found = Arc::new(Mutex::new(GOOD));
        let probed = found.clone();
        (Watermark::new(Box::new(move || Some(*probed.lock().unwrap()))), found)
    }
}
