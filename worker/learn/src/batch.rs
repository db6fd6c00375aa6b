//! Windows of tokens as a model takes them: inputs, and for each what it is to predict.

pub use fleet_kernels::IGNORED;

/// Token ids of `b` sequences of `seq`, and for each the target.
#[derive(Clone, Copy, Debug, Default)]
pub struct Batch<'a> {
    /// `[b * seq]`.
    pub ids: &'a [i64],
    /// `[b * seq]`; `IGNORED` where there is none.
    pub targets: &'a [i64],
    /// `[b * seq]`: what each target counts. `None`: one each.
    pub weights: Option<&'a [f32]>,
    pub seq: usize,
    /// `[b]`: for each sequence a number that decides what of it is dropped. `None`: nothing is.
    pub noise: Option<&'a [u64]>,
}

impl Batch<'_> {
    pub fn sequences(&self) -> usize {
        self.ids.len() / self.seq
    }

    /// Targets that are not ignored.
    pub fn tokens(&self) -> u64 {
        self.targets.iter().filter(|target| **target != IGNORED).count() as u64
    }

    /// What all targets count together.
    pub fn weight(&self) -> f64 {
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
    pub noise: Option<Vec<u64>>,
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
            noise: self.noise.as_deref(),
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
}
