//! How fast a run is.

use fleet_checkpoint::TrainerState;
use fleet_common::events::Step;
use std::time::Duration;

/// Counts tokens and the time of steps alone: evaluation and saving do not slow training down on paper.
#[derive(Default)]
pub(super) struct Meter {
    tokens: u64,
    time: Duration,
    all_tokens: u64,
    all_time: Duration,
    /// Of the last step, unless it was the first one, which carries the warming up of everything.
    pub last: Option<Duration>,
    lr: f64,
    pub grad_norm: f64,
}

impl Meter {
    pub fn add(&mut self, tokens: u64, time: Duration, lr: f64, grad_norm: f64) {
        self.last = (self.all_tokens > 0).then_some(time);
        self.tokens += tokens;
        self.time += time;
        self.all_tokens += tokens;
        self.all_time += time;
        (self.lr, self.grad_norm) = (lr, grad_norm);
    }

    pub fn event(&mut self, state: &TrainerState, epoch: f64) -> Step {
        let tokens_per_s = self.tokens as f64 / self.time.as_secs_f64().max(1e-9);
        (self.tokens, self.time) = (0, Duration::ZERO);
        Step {
            step: state.step,
            total_steps: state.total_steps,
            epoch,
            loss: state.loss,
            lr: self.lr,
            grad_norm: self.grad_norm,
            tokens_per_s,
        }
    }

    pub fn mean(&self) -> f64 {
        self.all_tokens as f64 / self.all_time.as_secs_f64().max(1e-9)
    }
}
