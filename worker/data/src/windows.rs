//! The packed tokens of one split, mapped from the cache and cut into windows.

use fleet_common::mapped::Mapped;

/// Bytes of one token id on disk, little-endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Width {
    /// Vocabularies of up to 65,536.
    Two,
    Four,
}

impl Width {
    pub(crate) fn of_vocabulary(size: u32) -> Width {
        if size <= 1 << 16 { Width::Two } else { Width::Four }
    }

    pub(crate) fn bytes(self) -> usize {
        match self {
            Width::Two => 2,
            Width::Four => 4,
        }
    }

    /// Appends ids, which fit by the choice of the width.
    pub(crate) fn encode(self, ids: &[u32], out: &mut Vec<u8>) {
        match self {
            Width::Two => ids.iter().for_each(|&id| out.extend((id as u16).to_le_bytes())),
            Width::Four => ids.iter().for_each(|&id| out.extend(id.to_le_bytes())),
        }
    }
}

/// Windows of `max_seq_len` tokens each, one after the other. What does not fill a window at the end is not shown.
#[derive(Debug)]
pub struct Windows {
    tokens: Mapped,
    width: Width,
    window: usize,
}

impl Windows {
    pub(crate) fn new(tokens: Mapped, width: Width, window: usize) -> Windows {
        Windows { tokens, width, window }
    }

    /// How many there are.
    pub fn len(&self) -> u64 {
        (self.tokens.len() / self.width.bytes() / self.window) as u64
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Tokens of one window.
    pub fn window_tokens(&self) -> usize {
        self.window
    }

    /// Token ids of window `index`, written to `out`, which has `window_tokens` elements.
    ///
    /// # Panics
    /// If `index` or the length of `out` is not as said.
    pub fn read(&self, index: u64, out: &mut [i64]) {
        assert!(index < self.len(), "window {index} of {}", self.len());
        assert_eq!(out.len(), self.window, "tokens of a window");
        let size = self.window * self.width.bytes();
        let first = index as usize * size;
        let bytes = &self.tokens[first..first + size];
        match self.width {
            Width::Two => {
                for (id, b) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                    *id = i64::from(u16::from_le_bytes(*b));
                }
            }
            Width::Four => {
                for (id, b) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
                    *id = i64::from(u32::from_le_bytes(*b));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_follow_each_other_and_the_rest_is_dropped() {
        let dir = tempfile::tempdir().unwrap();
        for (vocabulary, size) in [(4096, 2), (128_256, 4)] {
            let width = Width::of_vocabulary(vocabulary);
            let mut bytes = Vec::new();
            width.encode(&[1, 2, 3, 4, vocabulary - 1, 6, 7], &mut bytes);
            assert_eq!(bytes.len(), 7 * size);
            let path = dir.path().join(size.to_string());
            std::fs::write(&path, bytes).unwrap();
            let windows = Windows::new(Mapped::open(&path).unwrap(), width, 3);
            assert_eq!(windows.len(), 2);
            let mut out = [0; 3];
            windows.read(1, &mut out);
            assert_eq!(out, [4, i64::from(vocabulary) - 1, 6]);
        }
    }
}
