//! Training on preferences (DPO): which of two answers is the better one.

use super::Adapter;
use super::error::JobFileError;
use super::fields::Fields;
use serde::{Deserialize, Serialize};

/// Direct Preference Optimization, arXiv:2305.18290.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Dpo {
    /// How far the model may move from the reference.
    pub beta: f64,
    pub loss_type: PreferenceLoss,
    /// Share of the pairs whose labels are taken to be the wrong way round.
    pub label_smoothing: f64,
}

/// By TRL's names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PreferenceLoss {
    #[default]
    Sigmoid,
    /// arXiv:2309.06657.
    Hinge,
    /// With log-probabilities for each token, arXiv:2310.12036.
    Ipo,
    /// With an unbiased estimate under `label_smoothing`, arXiv:2403.00409.
    Robust,
}

/// Settings that make a job learn preferences.
const SETTINGS: [&str; 3] = ["dpo.beta", "dpo.loss_type", "dpo.label_smoothing"];

/// Whether the job learns preferences.
pub(super) fn is_wanted(f: &Fields) -> Result<bool, JobFileError> {
    let task = f.text("task_name", "a name")?.is_some_and(|name| name.to_lowercase() == "dpo");
    Ok(task || SETTINGS.into_iter().any(|name| f.is_given(name)))
}

pub(super) fn dpo(f: &Fields, adapter: Option<&Adapter>) -> Result<Option<Dpo>, JobFileError> {
    if !is_wanted(f)? {
        return Ok(None);
    }
    if adapter.is_none() {
        let message = "training on preferences compares the model with itself without its adapter, and this job has none; give it an `[adapter]`";
        return Err(f.refuse(&["task_name", "dpo.beta", "dpo.loss_type"], message.to_owned()));
    }
    let kinds = [
        ("sigmoid", PreferenceLoss::Sigmoid),
        ("hinge", PreferenceLoss::Hinge),
        ("ipo", PreferenceLoss::Ipo),
        ("robust", PreferenceLoss::Robust),
    ];
    let loss_type = f.word("dpo.loss_type", &kinds)?.unwrap_or_default();
    let share = "a number from 0 to below 0.5";
    let label_smoothing = f.float("dpo.label_smoothing", share, |x| (0.0..0.5).contains(&x))?.unwrap_or(0.0);
    if label_smoothing > 0.0 && !matches!(loss_type, PreferenceLoss::Sigmoid | PreferenceLoss::Robust) {
        let message =
            "`dpo.label_smoothing` is for `dpo.loss_type` = \"sigmoid\" and \"robust\"; leave it out";
        return Err(f.refuse(&["dpo.label_smoothing"], message.to_owned()));
    }
    let beta = f.float("dpo.beta", "a number above 0", |x| x > 0.0)?.unwrap_or(0.1);
    Ok(Some(Dpo { beta, loss_type, label_smoothing }))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // in a test an unwrap is an assertion
mod tests {
    use super::super::{Job, RowFormat, parse_toml};
    use super::*;

    fn of(text: &str) -> Result<Job, String> {
        let text = format!("data.path = \"x\"\nmodel.path = \"m\"\n{text}");
        parse_toml(&text, "/work/dir".as_ref()).map(|(job, _)| job).map_err(|e| e.to_string())
    }

    #[test]
    fn a_job_learns_preferences_by_its_task_or_its_settings() {
        let job = of("task_name = \"dpo\"\nlora_r = 1").unwrap();
        let dpo = Dpo { beta: 0.1, loss_type: PreferenceLoss::Sigmoid, label_smoothing: 0.0 };
        assert_eq!(job.dpo, Some(dpo));
        assert_eq!(job.data.rows.as_ref().unwrap().format, Some(RowFormat::Preference));
        assert_eq!(job.optimizer.learning_rate, 5e-7);
        assert_eq!(Job::from_json(&job.to_json()).unwrap(), job);
        assert_eq!(parse_toml(&job.to_toml(), "/work/dir".as_ref()).unwrap().0, job);
        let ipo = of("lora_r = 1\nbeta = 0.5\ndpo.loss_type = \"ipo\"").unwrap().dpo.unwrap();
        assert_eq!((ipo.beta, ipo.loss_type), (0.5, PreferenceLoss::Ipo));
        assert_eq!(of("lora_r = 1").unwrap().dpo, None);
    }

    #[test]
    fn what_cannot_be_is_refused() {
        for (text, wanted) in [
            ("task_name = \"dpo\"", "give it an `[adapter]`"),
            ("task_name = \"dpo\"\nlora_r = 1\ndpo.beta = 0", "`dpo.beta` is 0; a number above 0"),
            ("lora_r = 1\ndpo.loss_type = \"ipo\"\ndpo.label_smoothing = 0.1", "leave it out"),
            ("task_name = \"dpo\"\nlora_r = 1\ndata.packing = true", "`data.packing`"),
            ("task_name = \"dpo\"\nlora_r = 1\ndata.format = \"alpaca\"", "`data.format`"),
        ] {
            let error = of(text).unwrap_err();
            assert!(error.contains(wanted), "{text}: {error}");
        }
    }
}
