//! Windows of tokens as the model takes them: inputs, and for each the token that follows.

use fleet_cpu::Batch;
use fleet_data::Windows;

/// The windows of one micro-batch. A window of `max_seq_len` tokens gives one prediction less.
pub struct TokenBatch {
    ids: Vec<i64>,
    targets: Vec<i64>,
    seq: usize,
}

impl TokenBatch {
    pub fn read(windows: &Windows, indices: impl Iterator<Item = u64>) -> Self {
        let mut window = vec![0; windows.window_tokens()];
        let mut batch = Self { ids: Vec::new(), targets: Vec::new(), seq: window.len() - 1 };
        for index in indices {
            windows.read(index, &mut window);
            batch.push(&window);
        }
        batch
    }

    /// From windows of `window` tokens that follow each other.
    pub fn from_tokens(tokens: &[i64], window: usize) -> Self {
        let mut batch = Self { ids: Vec::new(), targets: Vec::new(), seq: window - 1 };
        tokens.chunks_exact(window).for_each(|window| batch.push(window));
        batch
    }

    fn push(&mut self, window: &[i64]) {
        self.ids.extend(&window[..window.len() - 1]);
        self.targets.extend(&window[1..]);
    }

    pub fn view(&self) -> Batch<'_> {
        Batch { ids: &self.ids, targets: &self.targets, seq: self.seq }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_shifted_within_each_window() {
        let batch = TokenBatch::from_tokens(&[1, 2, 3, 4, 5, 6], 3);
        let view = batch.view();
        assert_eq!((view.ids, view.targets, view.seq), (&[1, 2, 4, 5][..], &[2, 3, 5, 6][..], 2));
    }
}
