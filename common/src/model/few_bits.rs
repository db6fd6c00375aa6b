//! What `quantization_config` of a `config.json` says of how the weights are kept.

use super::{Object, Settings};

/// The key of a `config.json`.
pub const QUANTIZATION_CONFIG: &str = "quantization_config";

/// Who packed the weights. What each matrix is made of its tensors say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packer {
    Bitsandbytes,
    Hqq,
}

impl Packer {
    /// `None` where a configuration is of weights that are not packed; an error where they are as fleet does not read them.
    pub fn of_config(config: &Object) -> Result<Option<Packer>, String> {
        let Some(said) = Settings::new(config).object(QUANTIZATION_CONFIG)? else { return Ok(None) };
        let is_set = |key| said.get(key).is_some_and(|value| value.as_bool() == Some(true));
        let bits = is_set("load_in_4bit") || is_set("load_in_8bit");
        match said.text("quant_method")? {
            Some("bitsandbytes") => Ok(Some(Packer::Bitsandbytes)),
            // As older versions of transformers wrote it.
            None if bits => Ok(Some(Packer::Bitsandbytes)),
            Some("hqq") => Ok(Some(Packer::Hqq)),
            other => Err(format!(
                "{QUANTIZATION_CONFIG} has {}; fleet reads weights as bitsandbytes and hqq keep them: take the model as it was before it was quantised, and let fleet do that \
                 (quantization = \"nf4\", or fleet quantise)",
                other.map_or("no quant_method".to_owned(), |method| format!("quant_method {method:?}"))
            )),
        }
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
        let bitsandbytes = Ok(Some(Packer::Bitsandbytes));
        assert_eq!(packer(json!({"quant_method": "bitsandbytes", "load_in_8bit": true})), bitsandbytes);
        assert_eq!(packer(json!({"load_in_4bit": true})), bitsandbytes);
        assert_eq!(packer(json!({"quant_method": "hqq"})), Ok(Some(Packer::Hqq)));
        for (said, what) in [
            (json!({"quant_method": "gptq", "bits": 4}), "quant_method \"gptq\"; fleet reads"),
            (json!({"quant_method": "awq"}), "quant_method \"awq\""),
            (json!({"bits": 4}), "no quant_method"),
            (json!("nf4"), "not an object"),
        ] {
            let error = packer(said.clone()).unwrap_err();
            assert!(error.contains(what), "{said}: {error}");
        }
    }
}
