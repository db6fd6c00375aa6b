//! What `quantization_config` of a `config.json` says of how the weights are kept.

use super::{Object, Settings};
use std::fmt;

/// The key of a `config.json`.
pub const QUANTIZATION_CONFIG: &str = "quantization_config";

/// Who packed the weights. What each matrix is made of its tensors say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packer {
    /// With the bits of a code, where they are said.
    Bitsandbytes {
        bits: Option<u64>,
    },
    Hqq {
        bits: Option<u64>,
    },
}

impl Packer {
    /// `None` where a configuration is of weights that are not packed; an error where they are as fleet does not read them.
    pub fn of_config(config: &Object) -> Result<Option<Packer>, String> {
        let Some(said) = Settings::new(config).object(QUANTIZATION_CONFIG)? else { return Ok(None) };
        let is_set = |key| said.get(key).is_some_and(|value| value.as_bool() == Some(true));
        let loaded = match (is_set("load_in_4bit"), is_set("load_in_8bit")) {
            (true, true) => {
                return Err(format!(
                    "{QUANTIZATION_CONFIG} has load_in_4bit and load_in_8bit at once; keep the one that the weights are in"
                ));
            }
            (true, false) => Some(4),
            (false, true) => Some(8),
            (false, false) => None,
        };
        match said.text("quant_method")? {
            Some("bitsandbytes") => Ok(Some(Packer::Bitsandbytes { bits: loaded })),
            // As older versions of transformers wrote it.
            None if loaded.is_some() => Ok(Some(Packer::Bitsandbytes { bits: loaded })),
            Some("hqq") if loaded.is_some() => Err(format!(
                "{QUANTIZATION_CONFIG} has quant_method \"hqq\" and load_in_{}bit, which is of bitsandbytes; keep the one that the weights are of",
                loaded.unwrap_or_default()
            )),
            Some("hqq") => {
                let weights = said.get("quant_config").and_then(|said| said.get("weight_quant_params"));
                Ok(Some(Packer::Hqq { bits: weights.and_then(|said| said.get("nbits")?.as_u64()) }))
            }
            other => Err(format!(
                "{QUANTIZATION_CONFIG} has {}; fleet reads weights as bitsandbytes and hqq keep them: take the model as it was before it was quantised, and let fleet do that \
                 (quantization = \"nf4\", or fleet quantise)",
                other.map_or("no quant_method".to_owned(), |method| format!("quant_method {method:?}"))
            )),
        }
    }
}

impl Packer {
    /// Whether a weight may be one of which this was said.
    pub fn fits(self, weight: Packer) -> bool {
        match (self, weight) {
            (Packer::Bitsandbytes { bits: said }, Packer::Bitsandbytes { bits })
            | (Packer::Hqq { bits: said }, Packer::Hqq { bits }) => said.is_none() || said == bits,
            _ => false,
        }
    }
}

impl fmt::Display for Packer {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let (name, bits) = match self {
            Packer::Bitsandbytes { bits } => ("bitsandbytes", bits),
            Packer::Hqq { bits } => ("hqq", bits),
        };
        bits.map_or(Ok(()), |bits| write!(f, "{bits} bits of "))?;
        f.write_str(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_configuration_says_who_packed_the_weights() {
        let packer = |said: serde_json::Value| {
            Packer::of_config(json!({"quantization_config": said}).as_object().unwrap())
        };
        assert_eq!(packer(json!(null)), Ok(None));
        let bitsandbytes = |bits| Ok(Some(Packer::Bitsandbytes { bits }));
        assert_eq!(
            packer(json!({"quant_method": "bitsandbytes", "load_in_8bit": true})),
            bitsandbytes(Some(8))
        );
        assert_eq!(packer(json!({"load_in_4bit": true, "load_in_8bit": false})), bitsandbytes(Some(4)));
        assert_eq!(packer(json!({"quant_method": "bitsandbytes"})), bitsandbytes(None));
        assert_eq!(packer(json!({"quant_method": "hqq"})), Ok(Some(Packer::Hqq { bits: None })));
        let hqq = json!({"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 3}}});
        assert_eq!(packer(hqq), Ok(Some(Packer::Hqq { bits: Some(3) })));
        for (said, what) in [
            (json!({"quant_method": "gptq", "bits": 4}), "quant_method \"gptq\"; fleet reads"),
            (json!({"quant_method": "awq"}), "quant_method \"awq\""),
            (json!({"bits": 4}), "no quant_method"),
            (json!("nf4"), "not an object"),
            (json!({"load_in_4bit": true, "load_in_8bit": true}), "load_in_4bit and load_in_8bit at once"),
            (json!({"quant_method": "hqq", "load_in_4bit": true}), "keep the one that the weights are of"),
        ] {
            let error = packer(said.clone()).unwrap_err();
            assert!(error.contains(what), "{said}: {error}");
        }
    }
}
