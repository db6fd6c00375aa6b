//! New models of every family, as a job describes them: how their weights are drawn, and that they train.

#![allow(clippy::unwrap_used)] // a test may panic

mod gang;

use fleet_checkpoint::ModelDir;
use fleet_common::events::Outcome;
use fleet_common::job::{Job, Model as Described, parse_toml};
use fleet_common::model::{Family, Object};
use fleet_learn::model::{Model, init};
use gang::launch;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;

/// tests/parity/init.py made it: for each family a configuration, and mean and deviation of every parameter that transformers draws for it.
fn golden() -> BTreeMap<String, Value> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/parity/golden/init.json");
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

#[test]
fn fresh_weights_are_drawn_as_transformers_draws_them() {
    let golden = golden();
    assert!(Family::all().all(|family| golden.contains_key(family.model_type)));
    for (model_type, case) in golden {
        let mut config: Object = case["config"].as_object().unwrap().clone();
        config.insert("model_type".into(), model_type.as_str().into());
        let model = Model::new(&config).unwrap();
        let layout = model.wiring().layout;
        let drawn = case["drawn"].as_object().unwrap();
        assert_eq!(layout.parameters.len(), drawn.len(), "{model_type}");
        for p in &layout.parameters {
            let mut weights = vec![f32::NAN; p.range.len()];
            init::fill(p, p.range.clone(), 9, &mut weights, p.range.start);
            let count = weights.len() as f64;
            let mean = weights.iter().map(|x| f64::from(*x)).sum::<f64>() / count;
            let std = (weights.iter().map(|x| (f64::from(*x) - mean).powi(2)).sum::<f64>() / count).sqrt();
            let want = &drawn[&p.name];
            let (want_mean, want_std) = (want[0].as_f64().unwrap(), want[1].as_f64().unwrap());
            // Both are drawn: a mean strays by std / sqrt(n), a deviation by std / sqrt(2n), each on both sides.
            let stray = 5.0 * want_std * (2.0 / count).sqrt();
            assert!((mean - want_mean).abs() <= stray, "{model_type} {}: mean {mean}, {want_mean}", p.name);
            assert!((std - want_std).abs() <= stray, "{model_type} {}: std {std}, {want_std}", p.name);
        }
    }
}

/// Small models of every family, with what is particular about each.
const MODELS: [&str; 9] = [
    "hidden_size = 32\nnum_attention_heads = 4\nnum_key_value_heads = 2\nmlp_bias = true\nrope_scaling = { rope_type = \"linear\", factor = 2 }",
    "model_type = \"mistral\"\nhidden_size = 32\nnum_attention_heads = 4\nsliding_window = 5",
    "model_type = \"qwen2\"\nhidden_size = 32\nnum_attention_heads = 4\nuse_sliding_window = true\nsliding_window = 5\nmax_window_layers = 1",
    "model_type = \"qwen3\"\nhidden_size = 32\nnum_attention_heads = 4\nhead_dim = 16\ntie_word_embeddings = true",
    "model_type = \"phi\"\nhidden_size = 32\nnum_attention_heads = 4\nintermediate_size = 64",
    "model_type = \"gpt2\"\nn_embd = 32\nn_head = 4\nn_layer = 2\nn_positions = 16",
    "model_type = \"opt\"\nhidden_size = 32\nnum_attention_heads = 4\nffn_dim = 64\nmax_position_embeddings = 16",
    "model_type = \"opt\"\nhidden_size = 32\nnum_attention_heads = 4\nffn_dim = 64\nword_embed_proj_dim = 16\ndo_layer_norm_before = false",
    "model_type = \"bloom\"\nhidden_size = 32\nn_head = 4\nn_layer = 2",
];

#[test]
fn a_job_of_every_family_trains_and_leaves_a_model_of_it() {
    let mut seen = Vec::new();
    for lines in MODELS {
        let layers = if lines.contains("n_layer") { "" } else { "num_hidden_layers = 2\n" };
        let text = format!("max_seq_len = 16\ndata.path = \"x\"\n[model]\nvocab_size = 270\n{layers}{lines}");
        let dir = tempfile::tempdir().unwrap();
        let model = parse_toml(&text, dir.path()).unwrap_or_else(|e| panic!("{lines}: {e}")).0.model;
        let Described::New(config) = &model else { panic!("{model:?}") };
        let (family, decoder) = Family::of_config(config).unwrap();
        seen.push(family.model_type);
        let job = Job { batch_size: 2, max_steps: Some(40), model, ..gang::job(dir.path()) };
        let ended = launch(&job, 2, None, None);
        for outcome in &ended.outcomes {
            assert!(matches!(outcome, Ok(Outcome::Succeeded { steps: 40, .. })), "{lines}: {outcome:?}");
        }
        let losses = ended.losses();
        assert!((losses[0] - 270f64.ln()).abs() < 0.3, "{lines}: a fresh model knows nothing: {}", losses[0]);
        assert!(losses[39] < 0.85 * losses[0], "{lines}: it does not learn: {losses:?}");
        let left = ModelDir::open(Path::new(&ended.checkpoints().pop().unwrap().path)).unwrap();
        assert_eq!((left.family.model_type, left.decoder), (family.model_type, decoder), "{lines}");
        assert_eq!(left.config["architectures"][0], family.architecture);
    }
    assert!(Family::all().all(|family| seen.contains(&family.model_type)), "{seen:?}");
}
