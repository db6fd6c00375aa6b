//! The best loss of a run so far: whether it has got no better for long, and whose checkpoint stays.

use super::Trainer;
use super::saving::Lead;
use crate::agent_link::AgentLink;
use fleet_checkpoint::{Best, Patience};
use fleet_common::events::Level;
use fleet_common::job::{EarlyStopping, Watched};

/// What becomes of a run, by its losses.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Judged {
    /// It has got no better for as long as the job is patient.
    pub is_over: bool,
    /// It is the best so far, and its checkpoint stays.
    pub is_kept: bool,
}

impl Trainer {
    /// Before the first step: whether the run was over already.
    pub(super) fn begin_to_judge(&mut self, link: &mut AgentLink) -> bool {
        let (stopping, keeps) = (self.job.early_stopping, self.job.checkpoint.keep_best);
        let evaluates = keeps || stopping.is_some_and(|stopping| stopping.metric == Watched::EvalLoss);
        if self.rank == 0 && evaluates && self.cache.validation().is_empty() {
            let line = "there is nothing to evaluate, so that no step is found the best (keep_best, early_stopping): raise data.validation_fraction";
            link.log(Level::Warn, line.to_owned());
        }
        let is_over = stopping
            .zip(self.state.patience)
            .is_some_and(|(stopping, patience)| patience.looks_since >= stopping.patience);
        if is_over && self.rank == 0 {
            let line = format!(
                "the run was ended at step {} by early_stopping: nothing is left to do; raise early_stopping.patience to train on",
                self.state.step
            );
            link.log(Level::Warn, line);
        }
        is_over
    }

    /// From here on the best checkpoint stays, as soon as it is there: until then the one before it does.
    pub(super) fn spare_best(&mut self) {
        let best = self.state.best.filter(|_| self.job.checkpoint.keep_best);
        if let (Some(best), Some(Lead { dir, .. })) = (best, &mut self.saving.lead) {
            dir.spare(best.step);
        }
    }

    /// Looks at new losses. All ranks find the same.
    pub(super) fn judge(&mut self, evaluated: bool, is_due: bool, link: &mut AgentLink) -> Judged {
        let step = self.state.step;
        let eval_loss = self.state.eval_loss.filter(|_| evaluated);
        let mut judged = Judged::default();
        if let Some(loss) = eval_loss.filter(|_| self.job.checkpoint.keep_best)
            && is_better(self.state.best, loss, 0.0)
        {
            self.state.best = Some(Best { step, loss });
            judged.is_kept = true;
        }
        let Some(stopping) = self.job.early_stopping else { return judged };
        let loss = match stopping.metric {
            Watched::EvalLoss => eval_loss,
            Watched::TrainLoss => Some(self.state.loss).filter(|_| is_due),
        };
        let Some(loss) = loss else { return judged };
        let patience = look(self.state.patience, Best { step, loss }, &stopping);
        self.state.patience = Some(patience);
        judged.is_over = patience.looks_since >= stopping.patience;
        if judged.is_over && self.rank == 0 && step < self.total_steps {
            let Patience { best, looks_since } = patience;
            let line = format!(
                "the run ends at step {step}: its loss was not better than {:.4}, that of step {}, by more than {}, {looks_since} times in a row (early_stopping.patience)",
                best.loss, best.step, stopping.min_delta
            );
            link.log(Level::Info, line);
        }
        judged
    }
}

/// A loss that is no number is never better.
fn is_better(than: Option<Best>, loss: f64, least: f64) -> bool {
    let was = than.map(|best| best.loss).filter(|loss| loss.is_finite()).unwrap_or(f64::INFINITY);
    loss < was - least
}

/// `was` is what earlier looks have found.
fn look(was: Option<Patience>, now: Best, stopping: &EarlyStopping) -> Patience {
    match was {
        _ if is_better(was.map(|was| was.best), now.loss, stopping.min_delta) => {
            Patience { best: now, looks_since: 0 }
        }
        Some(was) => Patience { looks_since: was.looks_since + 1, ..was },
        None => Patience { best: now, looks_since: 1 },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patience_ends_after_so_many_looks_in_a_row() {
        let stopping = EarlyStopping { patience: 2, min_delta: 0.1, metric: Watched::EvalLoss };
        let losses = [f64::NAN, 3.0, 2.95, 2.5, 2.45, f64::NAN];
        let mut patience = None;
        let mut found = Vec::new();
        for (step, loss) in losses.into_iter().enumerate() {
            let now = look(patience, Best { step: step as u64, loss }, &stopping);
            patience = Some(now);
            found.push(now.looks_since);
        }
        assert_eq!(found, [1, 0, 1, 0, 1, 2]);
        assert_eq!(patience.map(|patience| patience.best), Some(Best { step: 3, loss: 2.5 }));
    }

    #[test]
    fn a_loss_that_is_no_number_is_never_the_best() {
        let of = |loss| Some(Best { step: 1, loss });
        assert!(
            is_better(None, 1.0, 0.0) && is_better(of(f64::NAN), 1.0, 0.0) && is_better(of(1.0), 0.999, 0.0)
        );
        assert!(
            !is_better(of(1.0), 1.0, 0.0)
                && !is_better(of(1.0), f64::NAN, 0.0)
                && !is_better(None, f64::NAN, 0.0)
        );
    }
}
