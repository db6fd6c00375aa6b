//! What a run is trained for: which tokens of its windows are to be predicted, and how much each of them counts. The loss of a step is the
//! weighted sum over all ranks and micro-batches, divided by what all targets of the step count together.

use crate::batch::TokenBatch;
use fleet_data::Windows;

pub trait Objective {
    /// The windows with these numbers, as the model takes them.
    fn batch(&self, windows: &Windows, indices: &mut dyn Iterator<Item = u64>) -> TokenBatch;
}

/// Every token predicts the one that follows, and all count the same: training from scratch.
pub struct NextToken;

impl Objective for NextToken {
    fn batch(&self, windows: &Windows, indices: &mut dyn Iterator<Item = u64>) -> TokenBatch {
        let size = windows.window_tokens();
        let mut tokens = Vec::new();
        for index in indices {
            let start = tokens.len();
            tokens.resize(start + size, 0);
            windows.read(index, &mut tokens[start..]);
        }
        TokenBatch::of_windows(&tokens, size)
    }
}
