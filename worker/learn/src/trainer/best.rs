//! The best loss of a run so far: whether it has got no better for long, and whose checkpoint stays.

use super::Trainer;
use super::saving::Lead;
use crate::agent_link::AgentLink;
use fleet_checkpoint::Best;
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

/// What a look at a loss has found.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Look {
    best: Best,
    is_better: bool,
    is_over: bool,
}

impl Trainer {
    /// Before the first step.
    pub(super) fn begin_to_judge(&mut self, link: &mut AgentLink) {
        self.spare_best();
        let (stopping, keeps) = (self.job.early_stopping, self.job.checkpoint.keep_best);
        let evaluates = keeps || stopping.is_some_and(|stopping| stopping.metric == Watched::EvalLoss);
        if self.rank == 0 && evaluates && self.cache.validation().is_empty() {
            let line = "there is nothing to evaluate, so that no step is found the best (keep_best, early_stopping): raise data.validation_fraction";
            link.log(Level::Warn, line.to_owned());
        }
    }

    fn spare_best(&mut self) {
        let best = self.state.best.filter(|_| self.job.checkpoint.keep_best);
        if let (Some(best), Some(Lead { dir, .. })) = (best, &mut self.saving.lead) {
            dir.spare(best.step);
        }
    }

    /// Looks at the loss that the job has chosen, where there is a new one. All ranks find the same.
    pub(super) fn judge(&mut self, evaluated: bool, is_due: bool, link: &mut AgentLink) -> Judged {
        let (stopping, keeps) = (self.job.early_stopping, self.job.checkpoint.keep_best);
        let watched = stopping.map_or(Watched::EvalLoss, |stopping| stopping.metric);
        let loss = match watched {
            Watched::EvalLoss => self.state.eval_loss.filter(|_| evaluated),
            Watched::TrainLoss => Some(self.state.loss).filter(|_| is_due),
        };
        let Some(loss) = loss.filter(|_| stopping.is_some() || keeps) else { return Judged::default() };
        let Look { best, is_better, is_over } =
            look(self.state.best, self.state.step, loss, stopping.as_ref());
        self.state.best = Some(best);
        if is_over && self.rank == 0 && self.state.step < self.total_steps {
            let line = format!(
                "the run ends at step {}: its loss was not better than {:.4}, that of step {}, {} times in a row (early_stopping.patience)",
                self.state.step, best.loss, best.step, best.looks_since
            );
            link.log(Level::Info, line);
        }
        self.spare_best();
        Judged { is_over, is_kept: keeps && is_better }
    }
}

/// `best` is what earlier looks have found. A loss that is no number is never better.
fn look(best: Option<Best>, step: u64, loss: f64, stopping: Option<&EarlyStopping>) -> Look {
    let least = stopping.map_or(0.0, |stopping| stopping.min_delta);
    let was = best.map(|best| best.loss).filter(|loss| loss.is_finite()).unwrap_or(f64::INFINITY);
    let is_better = loss < was - least;
    let best = match best {
        _ if is_better => Best { step, loss, looks_since: 0 },
        Some(best) => Best { looks_since: best.looks_since + 1, ..best },
        None => Best { step, loss: f64::NAN, looks_since: 1 },
    };
    let is_over = stopping.is_some_and(|stopping| best.looks_since >= stopping.patience);
    Look { best, is_better, is_over }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fleet_common::job::Watched;

    #[test]
    fn patience_ends_after_so_many_looks_in_a_row() {
        let stopping = EarlyStopping { patience: 2, min_delta: 0.1, metric: Watched::EvalLoss };
        let losses = [f64::NAN, 3.0, 2.95, 2.5, 2.45, f64::NAN];
        let mut best = None;
        let mut found = Vec::new();
        for (step, loss) in losses.into_iter().enumerate() {
            let look = look(best, step as u64, loss, Some(&stopping));
            best = Some(look.best);
            found.push((look.is_better, look.is_over));
        }
        let (better, over) = ((true, false), (false, true));
        assert_eq!(found, [(false, false), better, (false, false), better, (false, false), over]);
        assert_eq!(best, Some(Best { step: 3, loss: 2.5, looks_since: 2 }));
    }

    #[test]
    fn without_patience_a_run_is_never_over() {
        let first = look(None, 0, 1.0, None).best;
        let later = (0..100).fold(first, |best, step| look(Some(best), step, 1.0, None).best);
        assert!(!look(Some(later), 9, 1.0, None).is_over && look(Some(later), 9, 0.999, None).is_better);
    }
}
