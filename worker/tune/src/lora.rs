//! What a new adapter is.

use fleet_common::job::Bias;
use fleet_learn::model::Model;
use fleet_learn::{Error, Result};
use serde_json::{Value, json};
use std::path::Path;

/// The adapter (LoRA) that a trainer begins; one that it goes on from is as it is. Its task is always the one of models of text, PEFT's
/// `CAUSAL_LM`. DoRA, rank patterns and the rest are settings of a job: `TrainingConfig::set("adapter.use_dora", true)`.
///
/// ```
/// use fleet_tune::LoraConfig;
///
/// let lora = LoraConfig::new(16, 32.0, 0.0)?;
/// assert_eq!(lora.target_modules, ["q_proj", "v_proj"]);
/// let error = LoraConfig::new(0, 16.0, 0.05).unwrap_err();
/// assert_eq!(error.to_string(), "r must be positive");
/// # Ok::<(), fleet_tune::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct LoraConfig {
    /// Rank of the matrices.
    pub r: u32,
    /// What they add is multiplied with `lora_alpha / r`.
    pub lora_alpha: f64,
    /// Share of the inputs that they do not see in a step.
    pub lora_dropout: f64,
    /// Names of the changed modules, or how they end; `["all-linear"]` for all of every block.
    pub target_modules: Vec<String>,
    /// Which biases are trained.
    pub bias: Bias,
}

impl Default for LoraConfig {
    fn default() -> LoraConfig {
        LoraConfig {
            r: 8,
            lora_alpha: 16.0,
            lora_dropout: 0.05,
            target_modules: ["q_proj", "v_proj"].map(str::to_owned).into(),
            bias: Bias::None,
        }
    }
}

impl LoraConfig {
    /// With the usual modules; refuses what no adapter can be.
    pub fn new(r: u32, lora_alpha: f64, lora_dropout: f64) -> Result<LoraConfig> {
        let config = LoraConfig { r, lora_alpha, lora_dropout, ..LoraConfig::default() };
        config.check().map(|()| config)
    }

    /// What suits the model in `dir`: modules and rank of its family.
    pub fn of_model(dir: &Path) -> Result<LoraConfig> {
        let (modules, r) = Model::read(dir)?.family.lora;
        let target_modules = modules.iter().map(|&module| module.to_owned()).collect();
        Ok(LoraConfig { r, lora_alpha: 2.0 * f64::from(r), target_modules, ..LoraConfig::default() })
    }

    /// Asked again before anything is trained.
    pub fn check(&self) -> Result<()> {
        let wrong = match self {
            LoraConfig { r: 0, .. } => "r must be positive",
            LoraConfig { lora_alpha, .. } if lora_alpha.is_nan() || *lora_alpha <= 0.0 => {
                "lora_alpha must be positive"
            }
            LoraConfig { lora_dropout, .. } if !(0.0..=1.0).contains(lora_dropout) => {
                "lora_dropout must be between 0 and 1"
            }
            _ => return Ok(()),
        };
        Err(Error::Input(wrong.into()))
    }

    /// As a job file has it.
    pub(crate) fn in_a_file(&self) -> Value {
        let targets = match &self.target_modules[..] {
            [all] if all == "all-linear" => json!(all),
            names => json!(names),
        };
        json!({
            "r": self.r,
            "alpha": self.lora_alpha,
            "dropout": self.lora_dropout,
            "target_modules": targets,
            "bias": self.bias,
        })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // in a test an unwrap is an assertion
mod tests {
    use super::*;

    #[test]
    fn what_no_adapter_can_be_is_refused_in_known_words() {
        let usual = LoraConfig::default();
        assert_eq!((usual.r, usual.lora_alpha, usual.lora_dropout), (8, 16.0, 0.05));
        assert_eq!(
            (&usual.target_modules[..], usual.bias),
            (&["q_proj".into(), "v_proj".into()][..], Bias::None)
        );
        let refused = |r, alpha, dropout| LoraConfig::new(r, alpha, dropout).unwrap_err().to_string();
        assert_eq!(refused(0, 16.0, 0.05), "r must be positive");
        for alpha in [0.0, -1.0, f64::NAN] {
            assert_eq!(refused(8, alpha, 0.05), "lora_alpha must be positive");
        }
        for dropout in [-0.1, 1.1, f64::NAN] {
            assert_eq!(refused(8, 16.0, dropout), "lora_dropout must be between 0 and 1");
        }
        for dropout in [0.0, 1.0] {
            LoraConfig::new(8, 16.0, dropout).unwrap();
        }
    }
}
