//! Windows of tokens as a model takes them: inputs, and for each what it is to predict.

pub use fleet_kernels::IGNORED;

/// Token ids of `b` sequences, one behind the other, and for each the target. Each sequence begins at position 0 and sees itself alone.
#[derive(Clone, Copy, Debug, Default)]
pub struct Batch<'a> {
    /// `[t]`, of all sequences.
    pub ids: &'a [i64],
    /// `[t]`; `IGNORED` where there is none.
    pub targets: &'a [i64],
    /// `[t]`: what each target counts. `None`: one each.
    pub weights: Option<&'a [f32]>,
    /// Tokens of a sequence, of the longest one where `lengths` says those of each.
    pub seq: usize,
    /// `[b]`, where they differ. Their sum is `t`.
    pub lengths: Option<&'a [usize]>,
    /// What all targets count together, where that is another number than the sum of their weights.
    pub counts: Option<f64>,
    /// `[b]`: for each sequence a number that decides what of it is dropped. `None`: nothing is.
    pub noise: Option<&'a [u64]>,
    /// How far the embeddings of sequences with `noise` are moved; 0: not at all. See [`crate::neftune`].
    pub neftune: f32,
}

/// Sequences of different lengths are together a multiple of so many tokens.
const FILLED: usize = 64;

impl<'a> Batch<'a> {
    /// Tokens of each sequence.
    pub fn sequence_lengths(self) -> impl Iterator<Item = usize> + 'a {
        (0..self.sequences()).map(move |at| self.lengths.map_or(self.seq, |lengths| lengths[at]))
    }

    /// `[t]`: what each target counts where all of a sequence count alike, `counts` `[b]`.
    pub fn spread(self, counts: &[f64]) -> Vec<f32> {
        let of_sequences = self.sequence_lengths().zip(counts);
        of_sequences.flat_map(|(length, count)| std::iter::repeat_n(*count as f32, length)).collect()
    }

    pub fn sequences(&self) -> usize {
        self.lengths.map_or_else(|| self.ids.len() / self.seq, <[usize]>::len)
    }

    /// The same with sequences of one length, for who computes with rectangles: what is put behind a sequence predicts nothing and is seen by
    /// nothing of it.
    pub fn padded(&self) -> TokenBatch {
        let (mut padded, mut at) = (TokenBatch { seq: self.seq, ..TokenBatch::default() }, 0);
        for length in self.sequence_lengths() {
            let (range, end) = (at..at + length, padded.ids.len() + self.seq);
            padded.ids.extend(&self.ids[range.clone()]);
            padded.ids.resize(end, 0);
            padded.targets.extend(&self.targets[range.clone()]);
            padded.targets.resize(end, IGNORED);
            if let Some(weights) = self.weights {
                let all = padded.weights.get_or_insert_default();
                all.extend(&weights[range]);
                all.resize(end, 0.0);
            }
            at += length;
        }
        padded.counts = self.counts;
        padded.noise = self.noise.map(<[u64]>::to_vec);
        padded.neftune = self.neftune;
        padded
    }

    /// Targets that are not ignored.
    pub fn tokens(&self) -> u64 {
        self.targets.iter().filter(|target| **target != IGNORED).count() as u64
    }

    /// What all targets count together.
    pub fn weight(&self) -> f64 {
        if let Some(counts) = self.counts {
            return counts;
        }
        match self.weights {
            None => self.tokens() as f64,
            Some(weights) => {
                let counts = self.targets.iter().zip(weights).filter(|(target, _)| **target != IGNORED);
                counts.map(|(_, weight)| f64::from(*weight)).sum()
            }
        }
    }
}

/// The memory behind a `Batch`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TokenBatch {
    pub ids: Vec<i64>,
    pub targets: Vec<i64>,
    pub weights: Option<Vec<f32>>,
    pub seq: usize,
    /// `[b]`.
    pub lengths: Option<Vec<usize>>,
    pub counts: Option<f64>,
    /// `[b]`.
    pub noise: Option<Vec<u64>>,
    pub neftune: f32,
    /// The items of the data that it is made of, by their numbers.
    pub items: Vec<u64>,
}

impl TokenBatch {
    /// From windows of `window` tokens that follow each other: each token predicts the next one, so a window gives one prediction less.
    pub fn of_windows(tokens: &[i64], window: usize) -> TokenBatch {
        let mut batch = TokenBatch { seq: window - 1, ..TokenBatch::default() };
        tokens.chunks_exact(window).for_each(|window| {
            batch.ids.extend(&window[..window.len() - 1]);
            batch.targets.extend(&window[1..]);
        });
        batch
    }

    /// From sequences of any lengths, each of its ids and targets. There is at least one, and none is empty.
    pub fn of_sequences<'a>(sequences: impl IntoIterator<Item = (&'a [i64], &'a [i64])>) -> TokenBatch {
        let (mut batch, mut lengths) = (TokenBatch::default(), Vec::new());
        for (ids, targets) in sequences {
            batch.ids.extend(ids);
            batch.targets.extend(targets);
            batch.seq = batch.seq.max(ids.len());
            lengths.push(ids.len());
        }
        TokenBatch { lengths: Some(lengths), ..batch }
    }

    /// With sequences behind the others that predict nothing and are no longer than these, so that the number of all tokens is a round one: libraries
    /// make code for every shape that they meet, and keep it. Sequences of one length stay as they are.
    pub fn filled(mut self) -> TokenBatch {
        let Some(lengths) = &mut self.lengths else { return self };
        let mut more = self.ids.len().next_multiple_of(FILLED) - self.ids.len();
        let all = self.ids.len() + more;
        while more > 0 {
            let length = more.min(self.seq);
            lengths.push(length);
            self.noise.iter_mut().for_each(|noise| noise.push(0));
            more -= length;
        }
        self.ids.resize(all, 0);
        self.targets.resize(all, IGNORED);
        self.weights.iter_mut().for_each(|weights| weights.resize(all, 0.0));
        self
    }

    /// A token without a target: a pass over it counts nothing.
    pub fn nothing() -> TokenBatch {
        TokenBatch { ids: vec![0], targets: vec![IGNORED], seq: 1, ..Default::default() }
    }

    pub fn view(&self) -> Batch<'_> {
        Batch {
            ids: &self.ids,
            targets: &self.targets,
            weights: self.weights.as_deref(),
            seq: self.seq,
            lengths: self.lengths.as_deref(),
            counts: self.counts,
            noise: self.noise.as_deref(),
            neftune: self.neftune,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_shifted_within_each_window() {
        let batch = TokenBatch::of_windows(&[1, 2, 3, 4, 5, 6], 3);
        let view = batch.view();
        assert_eq!((view.ids, view.targets, view.seq), (&[1, 2, 4, 5][..], &[2, 3, 5, 6][..], 2));
        assert_eq!((view.sequences(), view.tokens(), view.weight()), (2, 4, 4.0));
    }

    #[test]
    fn what_is_ignored_counts_nothing_whatever_it_weighs() {
        let batch = Batch {
            ids: &[1, 2, 3],
            targets: &[2, IGNORED, 4],
            weights: Some(&[0.5, 7.0, 2.0]),
            seq: 3,
            ..Default::default()
        };
        assert_eq!((batch.tokens(), batch.weight()), (2, 2.5));
    }

    #[test]
    fn sequences_of_any_length_become_a_rectangle() {
        let mut ragged =
            TokenBatch::of_sequences([(&[1, 2, 3][..], &[2, 3, IGNORED][..]), (&[4][..], &[5][..])]);
        ragged.weights = Some(vec![1.0, 2.0, 3.0, 4.0]);
        let (view, padded) = (ragged.view(), ragged.view().padded());
        assert_eq!((view.sequences(), view.seq, view.weight()), (2, 3, 7.0));
        assert_eq!(padded.ids, [1, 2, 3, 4, 0, 0]);
        assert_eq!(padded.targets, [2, 3, IGNORED, 5, IGNORED, IGNORED]);
        assert_eq!((padded.view().sequences(), padded.view().weight()), (2, 7.0));
        let filled = ragged.filled();
        assert_eq!((filled.view().sequences(), filled.ids.len(), filled.view().weight()), (22, 64, 7.0));
        assert_eq!((filled.lengths.clone().unwrap()[..3].to_vec(), filled.seq), (vec![3, 1, 3], 3));
        assert_eq!(filled.clone().filled(), filled);
    }
}
