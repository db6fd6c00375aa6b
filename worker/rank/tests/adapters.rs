//! Adapters of PEFT: what a model computes with one, and what it is when both are made one (tests/parity/adapters.py made the files).

#![allow(clippy::unwrap_used)] // helpers of tests

use fleet_checkpoint::{ADAPTER_BASE_FILE, AdapterBase, ModelDir, Tensors};
use fleet_learn::adapter::{Adapter, Combination, combine};
use fleet_rank::host_model::{HostModel, read_weights};
use fleet_rank::merge::{merge, unmerge};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/parity/golden")
}

/// The base model of an adapter of the golden files.
fn base(adapter: &Path) -> PathBuf {
    let config: Value =
        serde_json::from_slice(&std::fs::read(adapter.join("adapter_config.json")).unwrap()).unwrap();
    golden().join("families").join(config["base_model_name_or_path"].as_str().unwrap())
}

fn numbers(expected: &Tensors, name: &str) -> Vec<f32> {
    let data = expected.get(name).unwrap().data().unwrap();
    data.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
}

fn ids(expected: &Tensors) -> Vec<i64> {
    let data = expected.get("ids").unwrap().data().unwrap();
    data.chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap())).collect()
}

/// The largest difference, as a share of the largest number.
fn difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    let largest = b.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
    a.iter().zip(b).fold(0.0f32, |most, (a, b)| most.max((a - b).abs())) / largest
}

#[test]
fn a_model_computes_with_an_adapter_as_peft_does_and_keeps_it_when_both_are_made_one() {
    let mut seen = 0;
    for entry in std::fs::read_dir(golden().join("adapters")).unwrap() {
        let adapter = entry.unwrap().path();
        let name = adapter.file_name().unwrap().to_string_lossy().into_owned();
        if name == "tied_embedding" {
            continue;
        }
        let base = base(&adapter);
        let expected = Tensors::open(&adapter.join("expected.safetensors")).unwrap();
        let (ids, wanted) = (ids(&expected), numbers(&expected, "logits"));
        let (model, flat) = read_weights(&base, std::slice::from_ref(&adapter)).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let made = dir.path().join("made");
        let merged = merge(&base, std::slice::from_ref(&adapter), &made).unwrap();
        assert!(merged.difference < 1e-6, "{name}: {merged:?}");
        let positions = model.decoder.max_positions;
        let mut with = HostModel::new(model, flat, 1, positions).unwrap();
        let off = difference(&with.logits(&ids, ids.len()).unwrap(), &wanted);
        assert!(off < 1e-5, "{name}: {off}");
        let mut one = HostModel::open(&made, 1).unwrap();
        let off = difference(&one.logits(&ids, ids.len()).unwrap(), &numbers(&expected, "merged"));
        assert!(off < 1e-5, "{name}, made one: {off}");
        let (was, is) = (Tensors::of_model(&base).unwrap(), Tensors::of_model(&made).unwrap());
        assert!(was.names().eq(is.names()), "{name}");
        for tensor in was.names().map(|name| (was.get(name).unwrap(), is.get(name).unwrap())) {
            assert_eq!((tensor.0.dtype, tensor.0.shape), (tensor.1.dtype, tensor.1.shape));
        }
        assert_eq!(
            std::fs::read(base.join("config.json")).unwrap(),
            std::fs::read(made.join("config.json")).unwrap()
        );
        seen += 1;
    }
    assert_eq!(seen, 10, "the golden files were not found");
}

/// As PEFT's `add_weighted_adapter`.
/// Transformers looks there for the end of what it writes.
#[test]
fn what_answers_end_with_that_an_adapter_learnt_by_its_template_is_an_end_of_the_merged_model() {
    let (dir, golden) = (tempfile::tempdir().unwrap(), golden());
    let (base, adapter) = (golden.join("foreign/byte_level"), dir.path().join("adapter"));
    std::fs::create_dir(&adapter).unwrap();
    for name in ["adapter_config.json", "adapter_model.safetensors"] {
        std::fs::copy(golden.join("trl/adapter").join(name), adapter.join(name)).unwrap();
    }
    let ends_of = |output: &str| {
        let output = dir.path().join(output);
        merge(&base, std::slice::from_ref(&adapter), &output).unwrap();
        let settings = std::fs::read(output.join("generation_config.json")).unwrap();
        serde_json::from_slice::<Value>(&settings).unwrap()["eos_token_id"].clone()
    };
    assert_eq!(ends_of("before"), json!([1, 2, 315]));
    // A special token that is no end yet.
    let template = "{% for m in messages %}{{ m['content'] }}<|begin_of_text|>{% endfor %}";
    std::fs::write(adapter.join("chat_template.jinja"), template).unwrap();
    assert_eq!(ends_of("after"), json!([1, 2, 315, 0]));
}

#[test]
fn adapters_are_combined_as_peft_combines_them() {
    let (first, combined) = (golden().join("adapters/lora"), golden().join("combined"));
    let weighted = [(first.clone(), 0.7), (combined.join("other"), 0.3)];
    let dir = tempfile::tempdir().unwrap();
    for (name, how) in [("cat", Combination::Cat), ("linear", Combination::Linear)] {
        let made = dir.path().join(name);
        let said = combine(&weighted, how, &made).unwrap();
        assert_eq!(said.difference.is_some(), how == Combination::Cat);
        let file = "adapter_model.safetensors";
        let open = |dir: &Path| Tensors::open(&dir.join(file)).unwrap();
        let (is, wanted) = (open(&made), open(&combined.join(name)));
        assert!(is.names().eq(wanted.names()));
        for tensor in wanted.names() {
            assert_eq!(is.get(tensor).unwrap().shape, wanted.get(tensor).unwrap().shape);
            let off = difference(&numbers(&is, tensor), &numbers(&wanted, tensor));
            assert!(off < 1e-6, "{name}: {tensor} is {off} off");
        }
        let config = |dir: &Path| -> Value {
            serde_json::from_slice(&std::fs::read(dir.join("adapter_config.json")).unwrap()).unwrap()
        };
        for key in ["r", "rank_pattern", "alpha_pattern", "use_rslora"] {
            assert_eq!(config(&made)[key], config(&combined.join(name))[key], "{name}: {key}");
        }
        assert_eq!(config(&made)["lora_alpha"], config(&made)["r"]);
    }
    // What one of them says of its model is said of both.
    let known = dir.path().join("known");
    std::fs::create_dir(&known).unwrap();
    for name in ["adapter_config.json", "adapter_model.safetensors"] {
        std::fs::copy(first.join(name), known.join(name)).unwrap();
    }
    let of_base = AdapterBase::of(&base(&first)).unwrap();
    std::fs::write(known.join(ADAPTER_BASE_FILE), of_base.to_bytes()).unwrap();
    for (number, parts) in [[&known, &first], [&first, &known]].into_iter().enumerate() {
        let made = dir.path().join(format!("known-{number}"));
        combine(&parts.map(|part| (part.clone(), 0.5)), Combination::Cat, &made).unwrap();
        assert_eq!(AdapterBase::read(&made), Some(of_base.clone()));
    }
    // With the weights of another sign nothing is left.
    let none = [(first.clone(), 1.0), (first.clone(), -1.0)];
    let taken = dir.path().join("none");
    combine(&none, Combination::Cat, &taken).unwrap();
    let base = base(&first);
    let flat = |adapters: &[PathBuf]| read_weights(&base, adapters).unwrap().1;
    assert!(difference(&flat(&[taken]), &flat(&[])) < 1e-6);

    let refused = |given: &[(PathBuf, f64)], how| {
        let output = dir.path().join("refused");
        let error = combine(given, how, &output).unwrap_err().to_string();
        assert!(!output.exists() && !error.contains('\n'), "{error}");
        error
    };
    let of = |name: &str| (golden().join("adapters").join(name), 1.0);
    for (given, how, wanted) in [
        ([of("dora"), of("dora")], Combination::Cat, "it has magnitudes"),
        ([of("saved_modules"), of("lora")], Combination::Cat, "takes the place of the model's own"),
        ([of("lora"), of("dora")], Combination::Linear, "it has magnitudes"),
    ] {
        let error = refused(&given, how);
        assert!(error.contains(wanted), "{error}");
    }
    assert!(refused(&none, Combination::Linear).contains("--type cat"));
    assert!(refused(&[of("lora"), of("some_layers")], Combination::Cat).contains("different models"));
    assert!(refused(&[of("lora"), (dir.path().join("cat"), 1.0)], Combination::Linear).contains("have 4, 8"));
    let over = combine(&weighted, Combination::Cat, &dir.path().join("cat")).unwrap_err().to_string();
    assert!(over.contains("exist"), "{over}");
}

#[test]
fn an_adapter_is_taken_out_again_and_what_is_lost_is_said() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["lora", "transposed", "by_head", "embedding"] {
        let adapter = golden().join("adapters").join(name);
        let (base, made, back) =
            (base(&adapter), dir.path().join(format!("{name}-1")), dir.path().join(name));
        merge(&base, std::slice::from_ref(&adapter), &made).unwrap();
        let unmerged = unmerge(&made, std::slice::from_ref(&adapter), &back).unwrap();
        assert!(unmerged.difference < 1e-5, "{name}: {unmerged:?}");
        let flat = |dir: &Path| read_weights(dir, &[]).unwrap().1;
        let off = difference(&flat(&back), &flat(&base));
        assert!(off < 1e-6, "{name}: {off}");
    }
    for (name, wanted) in
        [("dora", "magnitudes (DoRA)"), ("saved_modules", "taken the place of the model's own")]
    {
        let adapter = golden().join("adapters").join(name);
        let error = unmerge(&base(&adapter), &[adapter], &dir.path().join("lost")).unwrap_err().to_string();
        assert!(error.contains(wanted) && error.contains("take the base model"), "{error}");
    }
}

/// A copy of an adapter of the golden files, changed.
fn changed(name: &str, change: impl FnOnce(&Path)) -> String {
    let (from, dir) = (golden().join("adapters").join(name), tempfile::tempdir().unwrap());
    for file in ["adapter_config.json", "adapter_model.safetensors"] {
        std::fs::copy(from.join(file), dir.path().join(file)).unwrap();
    }
    change(dir.path());
    let model = ModelDir::open(&base(&from)).unwrap();
    let error = Adapter::open(dir.path(), &model).unwrap_err().to_string();
    assert!(!error.contains('\n'), "{error}");
    error
}

fn set(dir: &Path, key: &str, value: Value) {
    let path = dir.join("adapter_config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    config[key] = value;
    std::fs::write(path, config.to_string()).unwrap();
}

#[test]
fn an_adapter_that_does_not_fit_is_refused_by_what_does_not() {
    let of = |name: &str, model: &str| {
        let model = ModelDir::open(&golden().join("families").join(model)).unwrap();
        Adapter::open(&golden().join("adapters").join(name), &model).unwrap_err().to_string()
    };
    let other = of("lora", "gpt2");
    assert!(other.contains("the model has no place for") && other.contains("q_proj.lora_A"), "{other}");
    let wide = of("lora", "mistral");
    assert!(wide.contains("is [") && wide.contains("asks for [") && wide.contains("another model"), "{wide}");
    let tied = of("tied_embedding", "opt");
    assert!(tied.contains("tie_word_embeddings") && tied.contains("untie"), "{tied}");
    type Change = Box<dyn Fn(&Path)>;
    let cases: [(&str, Change); 6] = [
        ("r = 5", Box::new(|dir| set(dir, "r", 5.into()))),
        ("peft_type is \"VERA\"", Box::new(|dir| set(dir, "peft_type", "VERA".into()))),
        ("lora_magnitude_vector", Box::new(|dir| set(dir, "use_dora", true.into()))),
        (
            "there is no such file",
            Box::new(|dir| std::fs::remove_file(dir.join("adapter_config.json")).unwrap()),
        ),
        (
            "safe_serialization",
            Box::new(|dir| {
                std::fs::rename(dir.join("adapter_model.safetensors"), dir.join("adapter_model.bin")).unwrap()
            }),
        ),
        (
            "not a usable safetensors",
            Box::new(|dir| std::fs::write(dir.join("adapter_model.safetensors"), "{}").unwrap()),
        ),
    ];
    for (wanted, change) in cases {
        let error = changed("lora", change);
        assert!(
            error.contains(wanted)
                || wanted == "r = 5" && error.contains("[4, 32]") && error.contains("[5, 32]"),
            "{error}"
        );
    }
}
