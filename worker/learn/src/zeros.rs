//! Large buffers in this machine's memory: zeros, or one line about what did not fit.

use crate::error::{Error, Result};

/// What memory is taken for: the error says it, and what helps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Weights, gradients and the optimizer's state.
    Learner,
    /// Weights that are only read.
    Weights,
    /// A copy of weights and optimizer state, for a checkpoint.
    Snapshot,
    /// What a forward and backward pass keeps.
    Activations,
    Logits,
    /// Keys and values of a text.
    Cache,
}

impl Part {
    fn name_and_cure(self) -> (&'static str, &'static str) {
        match self {
            Part::Learner => {
                ("weights, gradients and optimizer state", "train a smaller model, or on a machine with more")
            }
            Part::Weights => ("the weights", "use a smaller model, or a machine with more"),
            Part::Snapshot => (
                "the copy of weights and optimizer state that a checkpoint is written from",
                "lower batch_size (and raise accumulate_grad_batches) or max_seq_len, train a smaller model, or on a machine with more",
            ),
            Part::Activations => (
                "the activations of a pass",
                "lower batch_size (and raise accumulate_grad_batches in a job) or max_seq_len",
            ),
            Part::Logits => ("the logits", "give fewer tokens at once"),
            Part::Cache => ("keys and values of the text", "shorten the prompt, or ask for fewer tokens"),
        }
    }

    pub fn short(self, bytes: usize) -> Error {
        let (name, cure) = self.name_and_cure();
        Error::Environment(format!(
            "not enough memory for {name} ({} MiB more): {cure}",
            bytes.div_ceil(1 << 20)
        ))
    }
}

/// `len` zeros. What is not touched costs nothing, as with `vec!`, which ends the process where there is too little memory: it is asked for
/// what is known to be there.
pub fn zeros<T: Copy + Default>(len: usize, part: Part) -> Result<Vec<T>> {
    reserve(&mut Vec::<T>::new(), len, part)?;
    Ok(vec![T::default(); len])
}

/// Room for `more` elements.
pub fn reserve<T>(buffer: &mut Vec<T>, more: usize, part: Part) -> Result<()> {
    let short = |_| part.short(more.saturating_mul(size_of::<T>()));
    buffer.try_reserve(more).map_err(short)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_fit_is_one_line_with_the_part_and_what_helps() {
        assert_eq!(zeros::<f32>(3, Part::Logits).unwrap(), [0.0; 3]);
        for len in [usize::MAX, 1 << 58] {
            let error = zeros::<f32>(len, Part::Activations).unwrap_err().to_string();
            assert!(
                error.contains("activations") && error.contains("MiB") && error.contains("batch_size"),
                "{error}"
            );
        }
    }
}
