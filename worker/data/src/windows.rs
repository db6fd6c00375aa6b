//! The items of one part of the data, mapped from the cache: windows of text, examples, or packs of examples.

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

    /// Appends the ids in `bytes`.
    fn decode(self, bytes: &[u8], out: &mut Vec<i64>) {
        match self {
            Width::Two => {
                out.extend(bytes.as_chunks::<2>().0.iter().map(|b| i64::from(u16::from_le_bytes(*b))))
            }
            Width::Four => {
                out.extend(bytes.as_chunks::<4>().0.iter().map(|b| i64::from(u32::from_le_bytes(*b))))
            }
        }
    }
}

/// Sequences that are learnt together, one after the other; none of them sees the others.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Item {
    /// Tokens of each sequence.
    pub lengths: Vec<usize>,
    /// Of all sequences.
    pub ids: Vec<i64>,
    /// For each id, whether it is to be predicted. The first of a sequence never can be, whatever stands here.
    pub learnt: Vec<bool>,
}

/// Items by their number. Of plain text an item is a window of `max_seq_len` tokens, one after the other, all of them learnt; what does not
/// fill a window at the end is not shown. Of rows it is an example; with packing several whole ones of at most `max_seq_len` tokens together;
/// of preferences two sequences, the chosen and the rejected answer behind the same prompt.
#[derive(Debug)]
pub struct Windows {
    tokens: Mapped,
    width: Width,
    window: usize,
    rows: Option<RowIndex>,
}

/// Where the sequences of rows stand, and which of their tokens are learnt.
#[derive(Debug)]
pub(crate) struct RowIndex {
    pub index: Mapped,
    /// A bit for each token.
    pub loss: Mapped,
    pub items: u64,
}

impl RowIndex {
    fn number(&self, at: u64) -> u64 {
        let at = at as usize * 8;
        u64::from_le_bytes(self.index[at..at + 8].try_into().expect("eight bytes"))
    }

    /// First token and length of each sequence of an item.
    fn sequences(&self, item: u64) -> impl Iterator<Item = (usize, usize)> {
        let behind = self.items + 1;
        let numbers = self.number(item)..self.number(item + 1);
        numbers.map(move |n| (self.number(behind + 2 * n) as usize, self.number(behind + 2 * n + 1) as usize))
    }

    fn is_learnt(&self, token: usize) -> bool {
        self.loss[token / 8] >> (token % 8) & 1 == 1
    }

    /// Whether the files are as long as they say of each other.
    pub fn is_whole(&self, tokens: u64) -> bool {
        let fits = |numbers: u64| self.index.len() as u64 == numbers.saturating_mul(8);
        let head = self.items.saturating_add(1);
        self.index.len() as u64 >= head.saturating_mul(8)
            && fits(head.saturating_add(self.number(self.items).saturating_mul(2)))
            && self.loss.len() as u64 == tokens.div_ceil(8)
    }
}

impl Windows {
    pub(crate) fn new(tokens: Mapped, width: Width, window: usize) -> Windows {
        Windows { tokens, width, window, rows: None }
    }

    /// Of rows whose sequences have at most `most` tokens.
    pub(crate) fn of_rows(tokens: Mapped, width: Width, most: usize, rows: RowIndex) -> Windows {
        Windows { tokens, width, window: most, rows: Some(rows) }
    }

    /// How many items there are.
    pub fn len(&self) -> u64 {
        match &self.rows {
            None => (self.tokens.len() / self.width.bytes() / self.window) as u64,
            Some(rows) => rows.items,
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Tokens of one window; of rows the most that a sequence may have, and a pack together.
    pub fn window_tokens(&self) -> usize {
        self.window
    }

    /// Tokens of item `index`, of all its sequences.
    ///
    /// # Panics
    /// If `index` is not below `len`.
    pub fn tokens(&self, index: u64) -> u64 {
        match &self.rows {
            None => self.window as u64,
            Some(_) => self.lengths(index).iter().sum::<usize>() as u64,
        }
    }

    /// Tokens of each sequence of item `index`.
    ///
    /// # Panics
    /// If `index` is not below `len`.
    pub fn lengths(&self, index: u64) -> Vec<usize> {
        self.check(index);
        match &self.rows {
            None => vec![self.window],
            Some(rows) => rows.sequences(index).map(|(_, len)| len).collect(),
        }
    }

    /// Appends item `index`, so that several become one batch.
    ///
    /// # Panics
    /// If `index` is not below `len`.
    pub fn append(&self, index: u64, out: &mut Item) {
        self.check(index);
        match &self.rows {
            None => {
                self.ids(index as usize * self.window, self.window, out);
                out.learnt.resize(out.ids.len(), true);
            }
            Some(rows) => rows.sequences(index).for_each(|(first, len)| {
                self.ids(first, len, out);
                out.learnt.extend((first..first + len).map(|token| rows.is_learnt(token)));
            }),
        }
    }

    fn check(&self, index: u64) {
        assert!(index < self.len(), "item {index} of {}", self.len());
    }

    fn ids(&self, first: usize, len: usize, out: &mut Item) {
        let size = self.width.bytes();
        self.width.decode(&self.tokens[first * size..(first + len) * size], &mut out.ids);
        out.lengths.push(len);
    }

    /// Token ids of window `index`, written to `out`, which has `window_tokens` elements.
    ///
    /// # Panics
    /// If `index` or the length of `out` is not as said, or these are rows, which are no windows.
    pub fn read(&self, index: u64, out: &mut [i64]) {
        assert!(self.rows.is_none(), "rows are read as items");
        let mut item = Item::default();
        self.append(index, &mut item);
        out.copy_from_slice(&item.ids);
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
            let mut batch = Item::default();
            windows.append(1, &mut batch);
            windows.append(0, &mut batch);
            assert_eq!(batch.lengths, [3, 3]);
            assert_eq!(batch.ids, [4, i64::from(vocabulary) - 1, 6, 1, 2, 3]);
            assert_eq!(batch.learnt, [true; 6]);
        }
    }
}
