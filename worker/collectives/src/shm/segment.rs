//! The shared segment: what lies where, and the agent's side of it.
//!
//! `header | one slot per rank | staging, two halves per rank | arena`, in one memfd without a name, so nothing can be left behind. Ranks
//! extend the arena as they allocate. Everything but staging and arena is atomics; a slot is written only by its rank.

#![allow(unsafe_code)]

use super::trace::{History, RankReport};
use super::wait::Event;
use crate::abort::Abort;
use crate::error::{CollectiveError, Result};
use memmap2::{MmapOptions, MmapRaw};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed, Ordering::SeqCst};

/// Ranks on one host. More would make every rank read as many lines in every operation.
pub const RANKS_MAX: usize = 64;
/// Posted reductions in flight: more than a model has blocks between two `finish`; beyond it `post_reduce` waits.
pub(super) const POSTS_MAX: usize = 64;
/// Bytes of one half of a rank's staging area: two ranks' halves fit into a core's L2 cache.
pub(super) const HALF_BYTES: usize = 256 << 10;
pub(super) const PAGE: usize = 4096;
const MAGIC: u64 = u64::from_le_bytes(*b"fleetsh2");

#[repr(C, align(64))]
pub(super) struct Header {
    magic: AtomicU64,
    world_size: AtomicU64,
    generation: AtomicU64,
    /// 0, or the first `Abort` as a word.
    abort: AtomicU64,
    /// All ranks have posted something.
    pub posted: Event,
    /// All ranks have done their part of something posted.
    pub done: Event,
}

/// One rank's words.
#[repr(C, align(64))]
pub(super) struct Slot {
    /// Blocking phases, by the parity of their number: a rank is at most one phase ahead of its slowest peer.
    pub phases: [Mark; 2],
    /// Posted reductions, by number modulo their count.
    pub posts: [Mark; POSTS_MAX],
    /// Number of the last posted reduction of which this rank has done its part and compared the signatures.
    pub done: Line,
    pub history: History,
}

/// "I have come to number so and so, to do this." On a line of its own.
#[repr(C, align(64))]
pub(super) struct Mark {
    pub number: AtomicU64,
    pub sequence: AtomicU64,
    pub what: AtomicU64,
    pub bytes: AtomicU64,
    pub place: AtomicU64,
}

#[repr(C, align(64))]
pub(super) struct Line {
    pub value: AtomicU64,
}

/// A mapping of header, slots and staging.
pub(super) struct Control {
    map: MmapRaw,
    file: File,
    pub world_size: usize,
    pub generation: u64,
}

fn control_bytes(world_size: usize) -> usize {
    (size_of::<Header>() + world_size * size_of::<Slot>()).next_multiple_of(PAGE)
}

/// Where the arena starts.
fn arena_start(world_size: usize) -> usize {
    control_bytes(world_size) + world_size * 2 * HALF_BYTES
}

fn failed(what: &'static str) -> impl FnOnce(io::Error) -> CollectiveError {
    move |source| CollectiveError::Memory { what, source: Arc::new(source) }
}

/// Makes the file at least `end` bytes long, with memory behind every page, so that a full machine is an error here and not a
/// SIGBUS later. Never shrinks; every rank may call it for the same range.
fn reserve(file: &File, start: usize, end: usize) -> io::Result<()> {
    let offset = |bytes: usize| libc::off_t::try_from(bytes).map_err(io::Error::other);
    let (start, length) = (offset(start)?, offset(end - start)?);
    if length == 0 {
        return Ok(());
    }
    loop {
        // SAFETY: a plain system call on a descriptor that we own.
        if unsafe { libc::fallocate(file.as_raw_fd(), 0, start, length) } == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

impl Control {
    fn map(file: File, world_size: usize, generation: u64) -> Result<Control> {
        let map = MmapOptions::new()
            .len(arena_start(world_size))
            .map_raw(&file)
            .map_err(failed("cannot map it"))?;
        Ok(Control { map, file, world_size, generation })
    }

    pub fn header(&self) -> &Header {
        // SAFETY: the mapping is page-aligned and long enough; the type is all atomics, valid for any bits.
        unsafe { &*self.map.as_ptr().cast::<Header>() }
    }

    pub fn slot(&self, rank: usize) -> &Slot {
        assert!(rank < self.world_size, "no such rank");
        // SAFETY: as for the header; `rank` is inside, and both sizes are multiples of the alignment.
        unsafe { &*self.map.as_ptr().add(size_of::<Header>() + rank * size_of::<Slot>()).cast::<Slot>() }
    }

    /// `HALF_BYTES` of staging.
    pub fn half(&self, rank: usize, half: usize) -> *mut u8 {
        assert!(rank < self.world_size && half < 2, "no such staging area");
        self.map.as_mut_ptr().wrapping_add(control_bytes(self.world_size) + (2 * rank + half) * HALF_BYTES)
    }

    pub fn arena_start(&self) -> usize {
        arena_start(self.world_size)
    }

    /// Maps `bytes` of the file from `offset`, a page's start, reserving them first.
    pub fn arena(&self, offset: usize, bytes: usize) -> Result<MmapRaw> {
        reserve(&self.file, offset, offset + bytes).map_err(failed("cannot reserve memory for a buffer"))?;
        MmapOptions::new()
            .offset(offset as u64)
            .len(bytes.max(1))
            .map_raw(&self.file)
            .map_err(failed("cannot map a buffer"))
    }

    /// The first reason stays.
    pub fn abort(&self, abort: Abort) {
        let header = self.header();
        let _ = header.abort.compare_exchange(0, abort.word(), SeqCst, SeqCst);
        header.posted.wake();
        header.done.wake();
    }

    pub fn is_aborted(&self) -> bool {
        self.header().abort.load(SeqCst) != 0
    }

    pub fn aborted(&self) -> Option<Abort> {
        match self.header().abort.load(SeqCst) {
            0 => None,
            word => Some(Abort::of(word)),
        }
    }

    /// A rank's side: maps the segment behind an inherited descriptor after a look at what it is.
    pub fn attach(fd: i32, rank: usize, world_size: usize, generation: u64) -> Result<Control> {
        let refused = |message: String| CollectiveError::Refused { operation: "attach", message };
        if world_size == 0 || world_size > RANKS_MAX || rank >= world_size {
            return Err(refused(format!("rank {rank} of {world_size}; at most {RANKS_MAX} ranks on a host")));
        }
        // SAFETY: a plain system call; it makes a descriptor of our own, or fails where `fd` is none.
        let own = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 0) };
        if own < 0 {
            return Err(failed("no segment was inherited")(io::Error::last_os_error()));
        }
        // SAFETY: just made, owned by nobody else.
        let file = File::from(unsafe { OwnedFd::from_raw_fd(own) });
        let length = file.metadata().map_err(failed("cannot look at it"))?.len();
        if length < arena_start(world_size) as u64 {
            return Err(refused(format!("descriptor {fd} is no segment for {world_size} ranks")));
        }
        let control = Control::map(file, world_size, generation)?;
        let header = control.header();
        if header.magic.load(Relaxed) != MAGIC || header.world_size.load(Relaxed) != world_size as u64 {
            return Err(refused(format!("descriptor {fd} is no segment for {world_size} ranks")));
        }
        let segment = header.generation.load(Relaxed);
        if segment != generation {
            return Err(CollectiveError::Generation { segment, rank: generation });
        }
        Ok(control)
    }
}

/// The agent's side of a gang's shared memory. The memory lives as long as the segment or a rank that attached to it.
#[derive(Clone)]
pub struct Segment {
    control: Arc<Control>,
}

impl std::fmt::Debug for Segment {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Segment of {} ranks, generation {}", self.control.world_size, self.control.generation)
    }
}

impl Segment {
    /// Makes a segment for one generation of a gang. Takes half a MiB per rank; ranks add what they allocate.
    pub fn create(world_size: usize, generation: u64) -> Result<Segment> {
        if world_size == 0 || world_size > RANKS_MAX {
            let message = format!("{world_size} ranks; 1 to {RANKS_MAX} can share memory");
            return Err(CollectiveError::Refused { operation: "create", message });
        }
        // SAFETY: a plain system call with a constant name; the result is checked.
        let fd = unsafe { libc::memfd_create(c"fleet-gang".as_ptr(), libc::MFD_CLOEXEC) };
        if fd < 0 {
            return Err(failed("cannot make a memfd")(io::Error::last_os_error()));
        }
        // SAFETY: just made, owned by nobody else.
        let file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
        reserve(&file, 0, arena_start(world_size)).map_err(failed("cannot reserve it"))?;
        let control = Control::map(file, world_size, generation)?;
        let header = control.header();
        header.world_size.store(world_size as u64, Relaxed);
        header.generation.store(generation, Relaxed);
        header.magic.store(MAGIC, SeqCst);
        Ok(Segment { control: Arc::new(control) })
    }

    /// A descriptor that children spawned while it lives inherit; drop it after the spawn. Its number is what `ShmCollective::attach`
    /// takes in the child.
    pub fn inheritable(&self) -> Result<OwnedFd> {
        // SAFETY: a plain system call on a descriptor that we own; the result is checked.
        let fd = unsafe { libc::fcntl(self.control.file.as_raw_fd(), libc::F_DUPFD, 3) };
        if fd < 0 {
            return Err(failed("cannot duplicate its descriptor")(io::Error::last_os_error()));
        }
        // SAFETY: just made, owned by nobody else.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }

    /// The close-on-exec descriptor itself, for those who pass descriptors to a child by another way.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.control.file.as_fd()
    }

    /// Makes every collective of the gang fail, also those that wait now. The first reason stays.
    pub fn abort(&self, abort: Abort) {
        self.control.abort(abort);
    }

    /// Who is where, in rank order.
    pub fn report(&self) -> Vec<RankReport> {
        (0..self.control.world_size).map(|rank| self.control.slot(rank).history.report(rank)).collect()
    }
}
