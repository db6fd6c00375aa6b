//! Training on preferences (DPO): which of two answers is the better one.

use super::error::JobFileError;
use super::fields::Fields;
use super::load::absolute;
use super::{Adapter, Model};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// Direct Preference Optimization, arXiv:2305.18290.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Dpo {
    /// How far the model may move from the reference.
    pub beta: f64,
    pub loss_type: PreferenceLoss,
    /// Share of the pairs whose labels are taken to be the wrong way round.
    pub label_smoothing: f64,
    /// A directory of a model of the same shape that is the reference. Without one it is the model as training begins.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ref_model: Option<PathBuf>,
    /// Whether the reference is asked once, before the first step, also where it is at hand in every step.
    pub precompute_ref_log_probs: bool,
}

/// What is taken where a job says nothing.
impl Default for Dpo {
    fn default() -> Dpo {
        Dpo {
            beta: 0.1,
            loss_type: PreferenceLoss::default(),
            label_smoothing: 0.0,
            ref_model: None,
            precompute_ref_log_probs: false,
        }
    }
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
    /// With log-probabilities for each token.
    SigmoidNorm,
    /// Without a reference: the loss of the chosen answer, and the odds of both, arXiv:2403.07691.
    Orpo,
}

const LOSSES: [(&str, PreferenceLoss); 6] = [
    ("sigmoid", PreferenceLoss::Sigmoid),
    ("hinge", PreferenceLoss::Hinge),
    ("ipo", PreferenceLoss::Ipo),
    ("robust", PreferenceLoss::Robust),
    ("sigmoid_norm", PreferenceLoss::SigmoidNorm),
    ("orpo", PreferenceLoss::Orpo),
];

impl PreferenceLoss {
    /// Whether it takes the mean over an answer's tokens, and not their sum.
    pub fn is_per_token(self) -> bool {
        matches!(self, PreferenceLoss::Ipo | PreferenceLoss::SigmoidNorm | PreferenceLoss::Orpo)
    }

    /// Whether it knows wrong labels.
    pub fn is_smoothed(self) -> bool {
        matches!(self, PreferenceLoss::Sigmoid | PreferenceLoss::SigmoidNorm | PreferenceLoss::Robust)
    }

    pub fn has_reference(self) -> bool {
        self != PreferenceLoss::Orpo
    }
}

/// Settings that make a job learn preferences.
const SETTINGS: [&str; 5] =
    ["dpo.beta", "dpo.loss_type", "dpo.label_smoothing", "dpo.ref_model", "dpo.precompute_ref_log_probs"];

/// The loss that a task's name asks for, where that is one of preferences.
fn of_task(f: &Fields) -> Result<Option<PreferenceLoss>, JobFileError> {
    let name = f.text("task_name", "a name")?.unwrap_or_default().to_lowercase();
    Ok(match name.as_str() {
        "dpo" => Some(PreferenceLoss::Sigmoid),
        "ipo" => Some(PreferenceLoss::Ipo),
        "orpo" => Some(PreferenceLoss::Orpo),
        _ => None,
    })
}

/// Whether the job's task is by its name one without preferences.
fn says_otherwise(f: &Fields) -> bool {
    let name = f.text("task_name", "a name").ok().flatten();
    name.is_some_and(|name| ["sft", "lm"].contains(&name.to_lowercase().as_str()))
}

/// Whether the job learns preferences.
pub(super) fn is_wanted(f: &Fields) -> Result<bool, JobFileError> {
    Ok(of_task(f)?.is_some() || SETTINGS.into_iter().any(|name| f.is_given(name)))
}

/// Relative paths are taken from `dir`.
pub(super) fn dpo(
    f: &Fields,
    dir: &Path,
    model: &Model,
    adapter: Option<&Adapter>,
) -> Result<Option<Dpo>, JobFileError> {
    if !is_wanted(f)? {
        return Ok(None);
    }
    if matches!(model, Model::New(_)) {
        let message = "preferences are learnt by a model that can speak already, and this job makes a new one; give a directory as `model.path`";
        return Err(f.refuse(&["task_name", "dpo.beta", "dpo.loss_type"], message.to_owned()));
    }
    if let Some(key) = SETTINGS.into_iter().find(|key| f.is_given(key)).filter(|_| says_otherwise(f)) {
        let message = format!(
            "`task_name` says that no preferences are learnt, and `{key}` is for those; leave it out, or write task_name = \"dpo\""
        );
        return Err(f.refuse(&[key], message));
    }
    let of_task = of_task(f)?.unwrap_or_default();
    let loss_type = f.word("dpo.loss_type", &LOSSES)?.unwrap_or(of_task);
    let share = "a number from 0 to below 0.5";
    let label_smoothing = f.float("dpo.label_smoothing", share, |x| (0.0..0.5).contains(&x))?.unwrap_or(0.0);
    if label_smoothing > 0.0 && !loss_type.is_smoothed() {
        let message = "`dpo.label_smoothing` is for `dpo.loss_type` = \"sigmoid\", \"sigmoid_norm\" and \"robust\"; leave it out";
        return Err(f.refuse(&["dpo.label_smoothing"], message.to_owned()));
    }
    let ref_model = f.text("dpo.ref_model", "the directory of a model")?;
    let ref_model = ref_model.map(|path| absolute(f, "dpo.ref_model", dir, &path)).transpose()?;
    let precompute = f.flag("dpo.precompute_ref_log_probs")?;
    let without = ["dpo.ref_model", "dpo.precompute_ref_log_probs"].into_iter().find(|key| f.is_given(key));
    if let Some(key) = without.filter(|_| !loss_type.has_reference()) {
        let message =
            format!("`{key}` is of losses that have a reference, and \"orpo\" has none; leave it out");
        return Err(f.refuse(&[key], message));
    }
    if ref_model.is_some() && adapter.is_some() {
        let message = "`dpo.ref_model` is for a whole model that is trained; an adapter has its reference in the model beside which it is trained; leave it out";
        return Err(f.refuse(&["dpo.ref_model"], message.to_owned()));
    }
    let usual = Dpo::default();
    let beta =
        f.float("dpo.beta", "a number above 0, at most 1000", |x| x > 0.0 && x <= 1e3)?.unwrap_or(usual.beta);
    let precompute_ref_log_probs = precompute.unwrap_or(usual.precompute_ref_log_probs);
    Ok(Some(Dpo { beta, loss_type, label_smoothing, ref_model, precompute_ref_log_probs }))
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
        assert_eq!(job.dpo, Some(Dpo::default()));
        assert_eq!(job.data.rows.as_ref().unwrap().format, Some(RowFormat::Preference));
        assert_eq!(job.optimizer.learning_rate, 1e-5);
        assert_eq!(of("task_name = \"dpo\"").unwrap().optimizer.learning_rate, 5e-7, "of a whole model");
        assert_eq!(of("lora_r = 1").unwrap().optimizer.learning_rate, 5e-4, "of texts");
        assert_eq!(job.adapter.as_ref().unwrap().dropout, Some(0.0));
        assert_eq!(Job::from_json(&job.to_json()).unwrap(), job);
        assert_eq!(parse_toml(&job.to_toml(), "/work/dir".as_ref()).unwrap().0, job);
        let ipo = of("lora_r = 1\nbeta = 0.5\ndpo.loss_type = \"ipo\"").unwrap().dpo.unwrap();
        assert_eq!((ipo.beta, ipo.loss_type), (0.5, PreferenceLoss::Ipo));
        assert_eq!(of("lora_r = 1").unwrap().dpo, None);
        assert!(of("task_name = \"dpo\"\ndata.loss_on = \"answers\"").is_ok(), "which is what it does");
    }

    #[test]
    fn what_cannot_be_is_refused() {
        for (text, wanted) in [
            ("dpo.ref_model = \"r\"\nlora_r = 1", "`dpo.ref_model` is for a whole model"),
            ("task_name = \"orpo\"\ndpo.ref_model = \"r\"", "\"orpo\" has none"),
            (
                "task_name = \"dpo\"\nlora_r = 1\ndpo.beta = 0",
                "`dpo.beta` is 0; a number above 0, at most 1000",
            ),
            ("lora_r = 1\ndpo.loss_type = \"ipo\"\ndpo.label_smoothing = 0.1", "leave it out"),
            (
                "task_name = \"sft\"\nlora_r = 1\nlabel_smoothing = 0.1",
                "`dpo.label_smoothing` is for those; leave it out",
            ),
            ("task_name = \"lm\"\nlora_r = 1\ndpo.beta = 0.1", "write task_name = \"dpo\""),
            ("task_name = \"dpo\"\nlora_r = 1\ndata.packing = true", "`data.packing`"),
            ("task_name = \"dpo\"\nlora_r = 1\ndata.format = \"alpaca\"", "`data.format`"),
            ("task_name = \"dpo\"\ndata.loss_on = \"all\"", "`data.loss_on` is for rows of one answer"),
            ("task_name = \"dpo\"\ntrain_on_inputs = true", "`train_on_inputs` is for rows of one answer"),
        ] {
            let error = of(text).unwrap_err();
            assert!(error.contains(wanted), "{text}: {error}");
        }
    }
}
