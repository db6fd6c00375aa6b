//! How a run went.

use fleet_common::events::{EventBody, Outcome};
use fleet_common::exit::Fault;
use fleet_learn::{Error, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

/// What a trainer gives back once steps have been made. A run that could not begin is an error.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrainingResult {
    /// It came to its end, or was ended by its listener.
    pub success: bool,
    /// Of the last step, in nats for each token that is learnt; of preferences, the loss of a pair.
    pub final_loss: f64,
    pub training_time_seconds: f64,
    /// Sequences that the steps took, each as often as it was taken: rows, packs of rows, or windows of text.
    pub samples_trained: u64,
    /// The newest checkpoint, which is an adapter as PEFT has it. `None`: the run ended before its first.
    pub adapter_path: Option<PathBuf>,
    /// Why it failed, in one line.
    pub error_message: Option<String>,
    /// What is at fault then: the job that ran, what it was given, or the machine.
    #[serde(default)]
    pub error_fault: Option<Fault>,
    /// Of the last step: `train_loss`, `learning_rate`, `grad_norm`, `epoch`, `steps`, `tokens_per_s`, and of preferences what TRL calls
    /// `rewards/accuracies` and so on; of the last evaluation the same with `eval_` before it, and of the one before the first step
    /// `initial_eval_loss`.
    pub metrics: BTreeMap<String, f64>,
}

/// What the events of a run have told so far.
#[derive(Debug, Default)]
pub(crate) struct Told {
    /// Steps of the run that it goes on from.
    before: u64,
    steps: u64,
    loss: f64,
    adapter: Option<PathBuf>,
    metrics: BTreeMap<String, f64>,
}

impl Told {
    /// Of a run that goes on after so many steps.
    pub fn after(before: u64) -> Told {
        Told { before, ..Told::default() }
    }

    pub fn take(&mut self, event: &EventBody) {
        let metrics = &mut self.metrics;
        let mut put = |name: &str, value: f64| {
            metrics.insert(name.to_owned(), value);
        };
        match event {
            EventBody::Step(step) => {
                (self.steps, self.loss) = (step.step, step.loss);
                put("train_loss", step.loss);
                put("learning_rate", step.lr);
                put("grad_norm", step.grad_norm);
                put("epoch", step.epoch);
                put("steps", step.step as f64);
                put("tokens_per_s", step.tokens_per_s);
            }
            EventBody::Eval(evaluation) => {
                if evaluation.step == 0 {
                    put("initial_eval_loss", evaluation.loss);
                }
                put("eval_loss", evaluation.loss);
                put("eval_bits_per_byte", evaluation.bits_per_byte);
            }
            EventBody::Metrics(told) => told.values.iter().for_each(|(name, value)| put(name, *value)),
            EventBody::Checkpoint(saved) => self.adapter = Some(PathBuf::from(&saved.path)),
            _ => {}
        }
    }

    /// With `batch` sequences in each step.
    pub fn result(self, outcome: Result<Outcome>, took: Duration, batch: u64) -> Result<TrainingResult> {
        let (steps, error) = match outcome {
            Ok(Outcome::Succeeded { steps, .. } | Outcome::Stopped { steps }) => (steps, None),
            Ok(Outcome::Failed(error)) => (self.steps, Some(of_fault(error.fault, error.message))),
            Err(error) => (self.steps, Some(error)),
        };
        match error {
            Some(error) if steps <= self.before => Err(error),
            error => Ok(TrainingResult {
                success: error.is_none(),
                final_loss: self.loss,
                training_time_seconds: took.as_secs_f64(),
                samples_trained: steps.saturating_sub(self.before) * batch,
                adapter_path: self.adapter,
                error_fault: error.as_ref().map(Error::fault),
                error_message: error.map(|error| error.to_string()),
                metrics: self.metrics,
            }),
        }
    }
}

/// The error that says this, by what is at fault.
pub(crate) fn of_fault(fault: Fault, message: String) -> Error {
    match fault {
        Fault::Job => Error::Job(message),
        Fault::Input => Error::Input(message),
        Fault::Environment => Error::Environment(message),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // in a test an unwrap is an assertion
mod tests {
    use super::*;
    use fleet_common::events::{Evaluation, FailureKind, JobError, Metrics, Step};

    fn told() -> Told {
        let mut told = Told::default();
        let eval = |step, loss| EventBody::Eval(Evaluation { step, loss, bits_per_byte: 1.0, tokens: 10 });
        let step = |step, loss| {
            EventBody::Step(Step {
                step,
                total_steps: 4,
                epoch: 0.5,
                loss,
                lr: 1e-3,
                grad_norm: 2.0,
                tokens_per_s: 9.0,
            })
        };
        let values = vec![("rewards/accuracies".to_owned(), 0.75)];
        let metrics = EventBody::Metrics(Metrics { step: 4, values });
        for event in [eval(0, 3.0), step(1, 2.5), step(4, 1.5), metrics, eval(4, 2.0)] {
            told.take(&event);
        }
        told
    }

    #[test]
    fn a_result_has_what_the_run_told() {
        let done = Outcome::Succeeded { steps: 4, final_loss: Some(1.5), tokens_per_s: 9.0 };
        let result = told().result(Ok(done), Duration::from_millis(1500), 8).unwrap();
        assert!(result.success && result.error_message.is_none());
        assert_eq!((result.final_loss, result.training_time_seconds, result.samples_trained), (1.5, 1.5, 32));
        let metric = |name: &str| result.metrics[name];
        assert_eq!([metric("initial_eval_loss"), metric("eval_loss"), metric("train_loss")], [3.0, 2.0, 1.5]);
        assert_eq!((metric("rewards/accuracies"), metric("steps")), (0.75, 4.0));
        let text = serde_json::to_string(&result).unwrap();
        assert_eq!(serde_json::from_str::<TrainingResult>(&text).unwrap(), result);
    }

    #[test]
    fn a_run_that_fails_after_steps_is_a_result_and_one_before_is_an_error() {
        let why = || Err(Error::Job("the loss is NaN at step 5".into()));
        let result = told().result(why(), Duration::ZERO, 8).unwrap();
        assert_eq!((result.success, result.samples_trained), (false, 32));
        assert_eq!(result.error_message.as_deref(), Some("the loss is NaN at step 5"));
        assert_eq!(result.error_fault, Some(Fault::Job));
        assert!(Told::default().result(why(), Duration::ZERO, 8).is_err());
    }

    #[test]
    fn a_failure_keeps_what_is_at_fault_and_steps_before_count_for_nothing() {
        let failed = |fault| {
            let message = "the disk is full".to_owned();
            Ok(Outcome::Failed(JobError {
                kind: FailureKind::Rank,
                fault,
                rank: None,
                node: None,
                signal: None,
                exit_code: None,
                message,
                last_lines: Vec::new(),
            }))
        };
        let error = Told::default().result(failed(Fault::Environment), Duration::ZERO, 8).unwrap_err();
        assert!(matches!(error, Error::Environment(_)), "{error:?}");
        let result = told().result(failed(Fault::Input), Duration::ZERO, 8).unwrap();
        assert_eq!(result.error_fault, Some(Fault::Input));
        let resumed = Told { before: 3, ..told() };
        let done = Outcome::Succeeded { steps: 4, final_loss: Some(1.5), tokens_per_s: 9.0 };
        assert_eq!(resumed.result(Ok(done), Duration::ZERO, 8).unwrap().samples_trained, 8);
        assert!(Told { before: 4, ..told() }.result(failed(Fault::Job), Duration::ZERO, 8).is_err());
    }
}
