//! `config.json` of a model as fleet writes its weights.

use super::Model;
use fleet_checkpoint::Dtype;
use fleet_common::model::{Family, Object};
use fleet_data::model_dir::token_ids;
use serde_json::{Value, json};

const EOS: &str = "eos_token_id";

impl Model {
    /// As `config_json_of`, of weights in fp32.
    pub fn config_json(&self) -> Object {
        self.config_json_of(Dtype::F32)
    }

    /// What the model came with stays where it says the same: what fleet does not know of it, and its other end tokens.
    pub fn config_json_of(&self, weights: Dtype) -> Object {
        let mut json = self.before.clone();
        self.family.resolve(&mut json);
        let says_the_same = Family::of_config(&json).is_ok_and(|(_, decoder)| decoder == self.decoder);
        for (key, value) in self.described() {
            // Older versions of transformers look for some in other places than newer ones.
            if !(says_the_same && json.get(&key).is_some_and(|value| !value.is_null())) {
                json.insert(key, value);
            }
        }
        if let Some(scaling) =
            scaling_of_rope(&json).filter(|_| json.get("rope_scaling").is_none_or(Value::is_null))
        {
            json.insert("rope_scaling".into(), scaling.into());
        }
        json.entry("architectures").or_insert_with(|| json!([self.family.architecture]));
        // Old and new name of the same; every version of transformers reads the old one.
        for key in ["dtype", "torch_dtype"] {
            if key == "torch_dtype" || json.contains_key(key) {
                let name = if weights == Dtype::BF16 { "bfloat16" } else { "float32" };
                json.insert(key.into(), name.into());
            }
        }
        if self.before.is_empty() {
            json.insert("bos_token_id".into(), json!(self.bos_token_id));
        }
        json.insert(EOS.into(), with_ends(&self.before, &[self.eos_token_id]));
        json
    }
}

/// What transformers 5 has in `rope_parameters` and 4 looks for in `rope_scaling`, where anything is scaled. What stands beside it in 4 is left out.
fn scaling_of_rope(config: &Object) -> Option<Object> {
    let mut rope = config.get("rope_parameters")?.as_object()?.clone();
    rope.retain(|key, _| !["rope_theta", "partial_rotary_factor"].contains(&key.as_str()));
    rope.get("rope_type").filter(|kind| *kind != "default").is_some().then_some(rope)
}

/// The ends of a text that `before` names, and `ends`, as `config.json` and `generation_config.json` have them.
fn with_ends(before: &Object, ends: &[Option<u32>]) -> Value {
    let mut all = token_ids(before, EOS);
    for end in ends.iter().flatten() {
        all.extend((!all.contains(end)).then_some(*end));
    }
    match all.as_slice() {
        [] => Value::Null,
        [end] => json!(end),
        ends => json!(ends),
    }
}

/// Settings of texts (`generation_config.json`) in which `ends` end one, too: behind the ends that they name themselves, or else those of the model's
/// `config`.
pub fn ending_with(mut generation: Object, config: &Object, ends: &[Option<u32>]) -> Object {
    let known = if token_ids(&generation, EOS).is_empty() { config } else { &generation };
    let all = with_ends(known, ends);
    generation.insert(EOS.into(), all);
    generation
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::tiny_with;

    fn of_dir(config: Value) -> Model {
        let before = config.as_object().unwrap().clone();
        let (family, decoder) = Family::of_config(&before).unwrap();
        Model { family, decoder, before, bos_token_id: Some(1), eos_token_id: Some(5), adapter: None }
    }

    #[test]
    fn what_is_written_says_each_size_once() {
        let sizes = json!({"model_type": "gpt2", "vocab_size": 8, "n_embd": 24, "n_layer": 2, "n_head": 4, "num_attention_heads": 6});
        let model = of_dir(sizes);
        let written = model.config_json();
        assert_eq!((&written["n_head"], written.get("num_attention_heads")), (&json!(6), None));
        assert_eq!(Family::of_config(&written).unwrap().1, model.decoder);
    }

    #[test]
    fn a_new_model_reads_back_as_it_was_written() {
        let model = Model::new(&tiny_with(json!({"initializer_range": 0.0, "eos_token_id": 3}))).unwrap();
        let json = model.config_json();
        assert_eq!(Family::of_config(&json).unwrap().1, model.decoder);
        assert_eq!((&json["architectures"], &json[EOS]), (&json!(["LlamaForCausalLM"]), &json!(3)));
        assert_eq!((&json["torch_dtype"], &json["bos_token_id"]), (&json!("float32"), &Value::Null));
    }

    /// Transformers 4.57 takes a model without `rope_scaling` for one that is not scaled, and says nothing; 5.17 reads both.
    #[test]
    fn scaled_positions_are_told_to_both_versions_of_transformers() {
        for rope in [
            json!({"rope_type": "linear", "factor": 2.0}),
            json!({"rope_type": "yarn", "factor": 4.0, "rope_theta": 5e5}),
        ] {
            let model = of_dir(
                json!({"model_type": "llama", "vocab_size": 8, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1, "rope_parameters": rope}),
            );
            let json = model.config_json();
            assert_eq!(
                (&json["rope_scaling"]["rope_type"], &json["rope_scaling"]["factor"]),
                (&rope["rope_type"], &rope["factor"])
            );
            assert_eq!(json["rope_scaling"].get("rope_theta"), None);
            assert_eq!(Family::of_config(&json).unwrap().1, model.decoder);
        }
        let plain = Model::new(&tiny_with(json!({}))).unwrap();
        assert_eq!(plain.config_json().get("rope_scaling"), None);
    }

    #[test]
    fn what_a_model_came_with_stays_where_it_says_the_same() {
        let came = json!({
            "model_type": "gpt2", "n_embd": 16, "n_head": 2, "n_layer": 1, "vocab_size": 40, "my_key": [1],
            "dtype": "bfloat16", "eos_token_id": [4, 5],
        });
        let mut want = came.clone();
        (want["dtype"], want["torch_dtype"]) = (json!("float32"), json!("float32"));
        let model = of_dir(came);
        let json = model.config_json();
        for (key, value) in want.as_object().unwrap() {
            assert_eq!(&json[key], value, "{key}");
        }
        assert_eq!(json["n_positions"], 1024, "what was to be understood is said");

        let mut untied = model;
        untied.decoder.tied = false;
        let json = untied.config_json();
        assert_eq!((&json["tie_word_embeddings"], &json["my_key"]), (&json!(false), &json!([1])));
        assert_eq!(Family::of_config(&json).unwrap().1, untied.decoder);
    }
}
