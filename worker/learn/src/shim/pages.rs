//! Pages of memory, taken before they are needed.

use super::buffers::Number;

/// Bytes that are taken in one call, so that whoever else in this process maps memory does not wait for long.
const AT_ONCE: usize = 16 << 20;

/// Has the system give all pages of `memory` now, and leaves what is in them. What it does not give now, it gives to the first who writes there.
/// Large pages are not asked for: where memory is full of cached files, making one takes as long as a thousand small ones.
#[cfg(target_os = "linux")]
pub fn take<T: Number>(memory: &mut [T]) {
    let (begin, whole) = whole_pages(memory);
    for from in (0..whole).step_by(AT_ONCE) {
        let (page, len) = (begin.wrapping_add(from).cast(), AT_ONCE.min(whole - from));
        // SAFETY: whole pages within `memory`, which is borrowed for this call; what is in them stays.
        if unsafe { libc::madvise(page, len, libc::MADV_POPULATE_WRITE) } != 0 {
            return;
        }
    }
}

#[cfg(not(target_os = "linux"))]
pub fn take<T: Number>(_memory: &mut [T]) {}

/// The pages that lie in `memory` from their first byte to their last: where they begin, and their bytes.
#[cfg(target_os = "linux")]
fn whole_pages<T: Number>(memory: &mut [T]) -> (*mut u8, usize) {
    // SAFETY: it reads a constant of the system.
    let page = usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).expect("every system has pages");
    let begin = memory.as_mut_ptr().cast::<u8>();
    let before = begin.align_offset(page);
    (begin.wrapping_add(before), size_of_val(memory).saturating_sub(before) / page * page)
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    /// Of the whole pages of `memory`, those that are there, and all.
    fn present(memory: &mut [f32]) -> (usize, usize) {
        let (begin, bytes) = whole_pages(memory);
        let mut pages = vec![0u8; bytes / 4096];
        // SAFETY: whole pages of `memory`, and a byte for each; nothing is written there but these bytes.
        assert_eq!(unsafe { libc::mincore(begin.cast(), bytes, pages.as_mut_ptr()) }, 0);
        (pages.iter().filter(|page| **page & 1 == 1).count(), pages.len())
    }

    #[test]
    fn pages_are_there_before_they_are_written_and_keep_what_they_have() {
        let mut memory = vec![0.0f32; 5 << 20];
        memory[4 << 20] = 7.0;
        let (before, all) = present(&mut memory);
        assert!(before < all / 2, "{before} of {all}");
        take(&mut memory);
        assert_eq!(present(&mut memory), (all, all));
        assert_eq!((memory[4 << 20], memory.iter().sum::<f32>()), (7.0, 7.0));
        take(&mut memory[..3]); // no whole page
    }
}
