//! When a run ends before its last step because it gets no better.

use super::error::JobFileError;
use super::fields::Fields;
use super::load::SIZE_MAX;
use serde::{Deserialize, Serialize};

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EarlyStopping {
    /// After so many looks in a row without a better loss.
    pub patience: u32,
    /// A loss is better if it is lower than the best one by more than this.
    pub min_delta: f64,
    pub metric: Watched,
}

/// Which loss is looked at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Watched {
    /// Of every evaluation.
    #[default]
    EvalLoss,
    /// Of every step that is told.
    TrainLoss,
}

const SETTINGS: [&str; 3] = ["early_stopping.patience", "early_stopping.min_delta", "early_stopping.metric"];

/// `eval_steps`: how often the job evaluates; 0: never.
pub(super) fn early_stopping(f: &Fields, eval_steps: u64) -> Result<Option<EarlyStopping>, JobFileError> {
    let Some(first) = SETTINGS.into_iter().find(|name| f.is_given(name)) else { return Ok(None) };
    let words = [
        ("eval_loss", Watched::EvalLoss),
        ("val_loss", Watched::EvalLoss),
        ("validation_loss", Watched::EvalLoss),
        ("train_loss", Watched::TrainLoss),
        ("loss", Watched::TrainLoss),
    ];
    let metric = f.word("early_stopping.metric", &words)?.unwrap_or_default();
    if metric == Watched::EvalLoss && eval_steps == 0 {
        let message = format!(
            "`{}` looks at the loss of evaluations, and `eval_steps` = 0 makes none; raise it, or write `early_stopping.metric` = \"train_loss\"",
            f.spelling(first)
        );
        return Err(f.refuse(&[first], message));
    }
    if metric == Watched::TrainLoss && f.flag("checkpoint.keep_best")? == Some(true) {
        let message = "`keep_best` keeps the best by evaluations, and `early_stopping.metric` is the loss of training; write \"eval_loss\", or leave one of them out";
        return Err(f.refuse(&["early_stopping.metric", "checkpoint.keep_best"], message.to_owned()));
    }
    Ok(Some(EarlyStopping {
        patience: f.int32("early_stopping.patience", 1, SIZE_MAX)?.unwrap_or(5),
        min_delta: f
            .float("early_stopping.min_delta", "a number of at least 0", |x| x >= 0.0)?
            .unwrap_or(0.001),
        metric,
    }))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // in a test an unwrap is an assertion
mod tests {
    use super::super::{Job, parse_toml};
    use super::*;

    fn of(text: &str) -> Result<Job, String> {
        let text = format!("data.path = \"x\"\nmodel.hidden_size = 64\n{text}");
        parse_toml(&text, "/work/dir".as_ref()).map(|(job, _)| job).map_err(|e| e.to_string())
    }

    #[test]
    fn any_of_its_settings_asks_for_it() {
        assert_eq!(of("").unwrap().early_stopping, None);
        let job = of("early_stopping_patience = 3").unwrap();
        let wanted = EarlyStopping { patience: 3, min_delta: 0.001, metric: Watched::EvalLoss };
        assert_eq!(job.early_stopping, Some(wanted));
        assert_eq!(Job::from_json(&job.to_json()).unwrap(), job);
        assert_eq!(parse_toml(&job.to_toml(), "/work/dir".as_ref()).unwrap().0, job);
        let loss = of("eval_steps = 0\n[early_stopping]\nmetric = \"train_loss\"").unwrap();
        assert_eq!(
            loss.early_stopping.unwrap(),
            EarlyStopping { patience: 5, metric: Watched::TrainLoss, ..wanted }
        );
        for (text, wanted) in [
            ("early_stopping.patience = 0", "`early_stopping.patience` is 0"),
            ("early_stopping.min_delta = -1", "a number of at least 0"),
            ("eval_steps = 0\nearly_stopping.patience = 2", "raise it"),
            ("keep_best = true\nearly_stopping.metric = \"train_loss\"", "leave one of them out"),
            ("keep_best = true\neval_steps = 0", "raise it"),
            ("early_stopping.metric = \"bleu\"", "`early_stopping.metric`"),
        ] {
            let error = of(text).unwrap_err();
            assert!(error.contains(wanted), "{text}: {error}");
        }
    }
}
