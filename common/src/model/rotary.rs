//! Rotary embeddings (Su et al. 2021) and the ways to stretch them, as transformers 5 computes them (`modeling_rope_utils.py`).

use super::settings::Settings;
use serde_json::{Value, json};
use std::f64::consts::TAU;

#[derive(Clone, Debug, PartialEq)]
pub struct Rotary {
    /// Numbers of a head that are turned, the first ones; even.
    pub width: usize,
    pub theta: f64,
    pub scaling: Scaling,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Scaling {
    Default,
    Linear {
        factor: f64,
    },
    /// The base grows with sequences beyond `positions`.
    Dynamic {
        factor: f64,
        positions: f64,
    },
    Llama3 {
        factor: f64,
        low: f64,
        high: f64,
        positions: f64,
    },
    Yarn {
        factor: f64,
        attention: f64,
        fast: f64,
        slow: f64,
        truncate: bool,
        positions: f64,
    },
}

const KINDS: &str = "default, linear, dynamic, llama3, yarn";

impl Rotary {
    /// As a configuration says it: transformers 5 writes `rope_parameters`, older versions `rope_theta` beside `rope_scaling`, which is
    /// that object where it is given. `share` of a head of `head_dim` numbers is turned where the configuration does not say.
    pub fn read(s: &Settings, head_dim: usize, max_positions: usize, share: f64) -> Result<Rotary, String> {
        let none = super::Object::new();
        let rope = match s.object("rope_scaling")? {
            Some(rope) => rope,
            None => s.object("rope_parameters")?.unwrap_or(Settings::new(&none)),
        };
        let theta = match rope.real("rope_theta")? {
            Some(theta) => theta,
            None => s.real_or("rope_theta", 10_000.0)?,
        };
        if theta <= 1.0 {
            return Err(format!("rope_theta is {theta}; it has to be above 1"));
        }
        let share = match rope.real("partial_rotary_factor")? {
            Some(share) => share,
            None => s.real_or("partial_rotary_factor", share)?,
        };
        if share > 1.0 {
            return Err(format!(
                "partial_rotary_factor is {share}; a head has no more than all of its numbers"
            ));
        }
        let kind = match rope.text("rope_type")? {
            Some(kind) => kind,
            None => rope.text("type")?.unwrap_or("default"),
        };
        let factor = || rope.real("factor")?.ok_or(format!("rope_type `{kind}` lacks its factor"));
        let [above, within] = [s, &rope].map(|of| of.real("original_max_position_embeddings"));
        let original = match (above?, within?) {
            (Some(above), Some(within)) if above != within && ["llama3", "yarn"].contains(&kind) => {
                return Err(format!(
                    "original_max_position_embeddings is {above}, and {within} in rope_scaling: transformers 5 takes the one, transformers 4 \
                     the other; leave out the wrong one"
                ));
            }
            (above, within) => within.or(above),
        };
        let positions = original.unwrap_or(max_positions as f64);
        let unless_zero =
            |key: &str| Ok::<_, String>(Some(rope.from_zero_or(key, 0.0)?).filter(|given| *given != 0.0));
        let needed = |key: &str| rope.real(key)?.ok_or(format!("rope_type `{kind}` lacks {key}"));
        let scaling = match kind {
            "default" => Scaling::Default,
            "linear" => Scaling::Linear { factor: factor()? },
            "dynamic" => Scaling::Dynamic { factor: factor()?, positions: max_positions as f64 },
            "llama3" => Scaling::Llama3 {
                factor: factor()?,
                low: needed("low_freq_factor")?,
                high: needed("high_freq_factor")?,
                positions,
            },
            "yarn" => {
                let factor = rope.real("factor")?.unwrap_or(max_positions as f64 / positions);
                let attention = match (
                    rope.real("attention_factor")?,
                    unless_zero("mscale")?,
                    unless_zero("mscale_all_dim")?,
                ) {
                    (Some(given), _, _) => given,
                    (None, Some(one), Some(all)) => mscale(factor, one) / mscale(factor, all),
                    _ => mscale(factor, 1.0),
                };
                let fast = unless_zero("beta_fast")?.unwrap_or(32.0);
                let slow = unless_zero("beta_slow")?.unwrap_or(1.0);
                Scaling::Yarn {
                    factor,
                    attention,
                    fast,
                    slow,
                    truncate: rope.flag("truncate", true)?,
                    positions,
                }
            }
            other => return Err(format!("rope_type is `{other}`; fleet computes {KINDS}")),
        };
        Ok(Rotary { width: (head_dim as f64 * share) as usize, theta, scaling })
    }

    /// As transformers 5 writes it, for a head of `head_dim` numbers.
    pub fn write(&self, head_dim: usize) -> Value {
        let mut json = match &self.scaling {
            Scaling::Default => json!({"rope_type": "default"}),
            Scaling::Linear { factor } => json!({"rope_type": "linear", "factor": factor}),
            Scaling::Dynamic { factor, .. } => json!({"rope_type": "dynamic", "factor": factor}),
            Scaling::Llama3 { factor, low, high, positions } => json!({
                "rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
                "original_max_position_embeddings": *positions as u64,
            }),
            Scaling::Yarn { factor, attention, fast, slow, truncate, positions } => json!({
                "rope_type": "yarn", "factor": factor, "attention_factor": attention, "beta_fast": fast, "beta_slow": slow,
                "truncate": truncate, "original_max_position_embeddings": *positions as u64,
            }),
        };
        json["rope_theta"] = self.theta.into();
        if self.width != head_dim {
            json["partial_rotary_factor"] = self.share(head_dim).into();
        }
        json
    }

    /// Of a head of `head_dim` numbers, what is turned: rounded down it gives `width` again.
    pub fn share(&self, head_dim: usize) -> f64 {
        let share = self.width as f64 / head_dim as f64;
        if ((head_dim as f64 * share) as usize) < self.width { share.next_up() } else { share }
    }

    /// Whether the angles hang on how long a sequence is.
    pub fn is_turned_by_length(&self) -> bool {
        matches!(self.scaling, Scaling::Dynamic { .. })
    }

    /// Angle per position of each pair, `[width / 2]`, in sequences of `len` tokens.
    pub fn frequencies(&self, len: usize) -> Vec<f64> {
        let dim = self.width as f64;
        let plain = |theta: f64| -> Vec<f64> {
            // The exponent is rounded to fp32, where transformers rounds it.
            let exponent = |pair: usize| f64::from(2.0 * pair as f32 / self.width as f32);
            (0..self.width / 2).map(|pair| 1.0 / theta.powf(exponent(pair))).collect()
        };
        let base = plain(self.theta);
        match self.scaling {
            Scaling::Default => base,
            Scaling::Linear { factor } => base.iter().map(|f| f / factor).collect(),
            Scaling::Dynamic { factor, positions } => {
                let stretch = factor * (len as f64).max(positions) / positions - (factor - 1.0);
                plain(self.theta * stretch.powf(dim / (dim - 2.0)))
            }
            Scaling::Llama3 { factor, low, high, positions } => base
                .iter()
                .map(|f| {
                    // In this order, which also says what is done where `low` is above `high`.
                    match TAU / f {
                        wave if wave > positions / low => f / factor,
                        wave if wave < positions / high => *f,
                        wave => {
                            let smooth = (positions / wave - low) / (high - low);
                            (1.0 - smooth) * f / factor + smooth * f
                        }
                    }
                })
                .collect(),
            Scaling::Yarn { factor, fast, slow, truncate, positions, .. } => {
                let at = |turns: f64| dim * (positions / (turns * TAU)).ln() / (2.0 * self.theta.ln());
                let (low, high) = (at(fast), at(slow));
                let (low, high) = if truncate { (low.floor(), high.ceil()) } else { (low, high) };
                let (low, high) = (low.max(0.0), high.min(dim - 1.0));
                let high = if low == high { high + 0.001 } else { high };
                let blend = |(pair, f): (usize, &f64)| {
                    let keep = 1.0 - ((pair as f64 - low) / (high - low)).clamp(0.0, 1.0);
                    f / factor * (1.0 - keep) + f * keep
                };
                base.iter().enumerate().map(blend).collect()
            }
        }
    }

    /// What sines and cosines are multiplied by.
    pub fn amplitude(&self) -> f64 {
        match self.scaling {
            Scaling::Yarn { attention, .. } => attention,
            _ => 1.0,
        }
    }
}

fn mscale(factor: f64, weight: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * weight * factor.ln() + 1.0 }
}
