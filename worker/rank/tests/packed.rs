//! Models whose weights transformers keeps in few bits (tests/parity/packed.py made them): taken as they are, code by code.

#![allow(clippy::unwrap_used)] // helpers of tests

#[path = "../../../tests/parity/cases.rs"]
mod cases;

use cases::{apart, hyper, targets};
use fleet_checkpoint::{ModelDir, Tensors};
use fleet_common::job::{self, Precision, Quantization};
use fleet_learn::model::Model;
use fleet_learn::{AdamW, TokenBatch, Update, Votes};
use fleet_rank::assemble::{Threads, alone};
use fleet_rank::host_model::HostModel;
use fleet_rank::merge::merge;
use fleet_rank::quantise::quantise;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// The directory, and by how much what transformers computes in 16 bits may differ from what is computed in fp32. bitsandbytes rounds what it
/// multiplies with INT8.
const CASES: [(&str, f32); 6] =
    [("nf4", 1e-2), ("fp4", 2e-3), ("int8", 2e-2), ("by_head", 1e-2), ("hqq4", 2e-2), ("hqq3", 2e-2)];

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/parity/golden/packed")
}

fn numbers(expected: &Tensors, name: &str) -> Vec<f32> {
    let data = expected.get(name).unwrap().data().unwrap();
    data.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
}

fn longs(expected: &Tensors, name: &str) -> Vec<i64> {
    let data = expected.get(name).unwrap().data().unwrap();
    data.chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap())).collect()
}

fn doubles(expected: &Tensors, name: &str) -> Vec<f64> {
    let data = expected.get(name).unwrap().data().unwrap();
    data.chunks_exact(8).map(|b| f64::from_le_bytes(b.try_into().unwrap())).collect()
}

/// The model of a job beside `base`, or why there is none.
fn model_of(base: &Path, more: Value) -> Result<Model, String> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("job.json");
    let mut file = json!({"model": {"path": base}, "data": {"path": "x"}});
    file.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    std::fs::write(&path, file.to_string()).unwrap();
    let (job, _) = job::load(&path, &[], Path::new("/")).map_err(|e| e.to_string())?;
    Model::of_job(&job).map_err(|e| e.to_string())
}

/// All logits of a text, read at once and token by token.
fn both_ways(host: &mut HostModel, ids: &[i64]) -> [Vec<f32>; 2] {
    let whole = host.logits(ids, ids.len()).unwrap();
    let mut cache = host.cache();
    let mut one_by_one = host.prefill(&ids[..5], &mut cache).unwrap();
    let vocab = one_by_one.len();
    let mut all = whole[..4 * vocab].to_vec();
    for id in &ids[5..] {
        all.append(&mut one_by_one);
        one_by_one = host.decode(&[*id], &mut [&mut cache]).unwrap();
    }
    all.append(&mut one_by_one);
    [whole, all]
}

#[test]
fn what_transformers_packed_computes_the_same() {
    for (name, tolerance) in CASES {
        let dir = golden().join(name);
        let expected = Tensors::open(&dir.join("expected.safetensors")).unwrap();
        let (ids, wanted, own) =
            (longs(&expected, "ids"), numbers(&expected, "logits"), numbers(&expected, "own"));
        let mut wide = HostModel::open(&dir, 1).unwrap();
        let off = apart(&wide.logits(&ids, ids.len()).unwrap(), &wanted, 0.0);
        assert!(off < 1e-5, "{name}: {off}");
        for threads in [1, 3] {
            let mut packed = HostModel::packed(&dir, None, threads, ids.len()).unwrap();
            for logits in both_ways(&mut packed, &ids) {
                let off = apart(&logits, &wanted, 0.0);
                assert!(off < 1e-5, "{name}: {off}");
                let off = apart(&logits, &own, 0.0);
                assert!(off < tolerance, "{name}, as transformers computes: {off}");
            }
        }
    }
}

#[test]
fn steps_of_qlora_are_those_of_peft_beside_the_same_file() {
    let base = golden().join("nf4");
    let adapter = base.join("adapter");
    let expected = Tensors::open(&adapter.join("training.safetensors")).unwrap();
    let batches = expected.get("batches").unwrap().shape.to_vec();
    let (ids, seq) = (longs(&expected, "batches"), batches[2]);
    let (losses, norms) = (doubles(&expected, "losses"), doubles(&expected, "grad_norms"));
    let model = model_of(&base, json!({"adapter": {"path": adapter}})).unwrap();
    assert!(model.adapter.as_ref().unwrap().describe(&model).contains("the matrices of blocks in NF4"));
    let threads = Threads { count: 2, again: 0 };
    let mut learner = alone(job::Executor::Cpu, Precision::Fp32, &model, threads, 64).unwrap();
    learner.load_weights(&adapter).unwrap();
    let adamw = AdamW {
        beta1: hyper("beta1"),
        beta2: hyper("beta2"),
        eps: hyper("eps"),
        weight_decay: hyper("weight_decay"),
        max_grad_norm: hyper("max_grad_norm"),
    };
    for (step, ids) in ids.chunks(batches[1] * seq).enumerate() {
        let batch = TokenBatch { ids: ids.to_vec(), targets: targets(ids, seq), seq, ..Default::default() };
        let update = Update { adamw, lr: hyper("learning_rate"), step: step as u64 + 1 };
        let report = learner.step(&[batch], &update, Votes::default()).unwrap();
        let off = |is: f64, was: f64| (is - was).abs() / was.abs().max(1.0);
        let (loss, norm) = (off(report.loss, losses[step]), off(report.grad_norm, norms[step]));
        assert!(loss < 1e-5 && norm < 1e-4, "step {step}: loss is {loss} off, norm {norm}: {report:?}");
    }
}

/// As PEFT computes it: beside the packed weights, and in none of them.
#[test]
fn an_adapter_computes_beside_packed_weights_and_becomes_part_of_wide_ones() {
    let base = golden().join("nf4");
    let adapter = base.join("adapter");
    let expected = Tensors::open(&adapter.join("training.safetensors")).unwrap();
    let (ids, wanted) = (longs(&expected, "ids"), numbers(&expected, "logits"));
    let mut host = HostModel::packed(&base, None, 2, ids.len()).unwrap();
    let without = host.logits(&ids, ids.len()).unwrap();
    let [nothing, with] = [vec![], vec![adapter.clone()]].map(|dirs| host.adapters(&dirs).unwrap());
    host.change(&nothing, &with).unwrap();
    for logits in both_ways(&mut host, &ids) {
        let off = apart(&logits, &wanted, 0.0);
        assert!(off < 1e-5, "{off}");
    }
    host.change(&with, &nothing).unwrap();
    assert_eq!(host.logits(&ids, ids.len()).unwrap(), without);
    let refused = host.adapters(&[adapter.clone(), adapter.clone()]).err().unwrap().to_string();
    assert!(refused.contains("fleet adapter combine"), "{refused}");
    let dora = tempfile::tempdir().unwrap();
    let mut config: Value =
        serde_json::from_slice(&std::fs::read(adapter.join("adapter_config.json")).unwrap()).unwrap();
    config["use_dora"] = true.into();
    std::fs::write(dora.path().join("adapter_config.json"), config.to_string()).unwrap();
    let refused = host.adapters(&[adapter.clone(), dora.path().into()]).err().unwrap().to_string();
    assert!(refused.contains("(DoRA)") && refused.contains("fleet adapter merge"), "{refused}");

    let dir = tempfile::tempdir().unwrap();
    let made = dir.path().join("made");
    let merged = merge(&base, &[adapter], &made).unwrap();
    let opened = ModelDir::open(&made).unwrap();
    assert!(!opened.is_quantised() && !opened.config.contains_key("quantization_config"), "{merged:?}");
    let off = apart(&HostModel::open(&made, 1).unwrap().logits(&ids, ids.len()).unwrap(), &wanted, 0.0);
    assert!(off < 1e-2, "{off}");
}

#[test]
fn what_packed_weights_do_not_allow_is_refused() {
    let base = golden().join("nf4");
    for (more, what) in [
        (json!({}), "its weights are quantised, and training them needs more bits"),
        (json!({"adapter": {"r": 2}, "quantization": "nf4"}), "leave `quantization` out"),
    ] {
        let error = model_of(&base, more).unwrap_err();
        assert!(error.contains(what), "{error}");
    }
    let model = model_of(
        &base,
        json!({"adapter": {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["o_proj"]}}),
    )
    .unwrap();
    let tied = golden().join("../tied");
    let error = model_of(&tied, json!({"adapter": {"target_modules": ["q_proj", "lm_head"]}})).unwrap_err();
    assert!(error.contains("names lm_head, which is the embedding and the head at once"), "{error}");
    let threads = Threads { count: 1, again: 0 };
    let error = alone(job::Executor::Cpu, Precision::Fp32, &model, threads, 64).err().unwrap().to_string();
    assert!(error.contains("o_proj.weight is quantised, and cannot be trained itself"), "{error}");
    let error = HostModel::packed(&base, Some(Quantization::Int8), 1, 8).err().unwrap().to_string();
    assert!(error.contains("leave --quantization out"), "{error}");
}

/// Numbers of the directory with another `config.json`, or another `model.safetensors`.
fn opened_with(name: &str, config: Option<&dyn Fn(&mut Value)>, cut: usize) -> String {
    let (from, dir) = (golden().join(name), tempfile::tempdir().unwrap());
    let mut json: Value = serde_json::from_slice(&std::fs::read(from.join("config.json")).unwrap()).unwrap();
    if let Some(change) = config {
        change(&mut json);
    }
    std::fs::write(dir.path().join("config.json"), json.to_string()).unwrap();
    let bytes = std::fs::read(from.join("model.safetensors")).unwrap();
    std::fs::write(dir.path().join("model.safetensors"), &bytes[..bytes.len() - cut]).unwrap();
    ModelDir::open(dir.path()).unwrap_err().to_string()
}

#[test]
fn damaged_and_foreign_directories_say_what_is_wrong() {
    let cut = opened_with("nf4", None, 10);
    assert!(
        cut.contains("model.safetensors") && cut.contains("was not copied or fetched to its end"),
        "{cut}"
    );
    let gptq =
        opened_with("nf4", Some(&|json| json["quantization_config"]["quant_method"] = "gptq".into()), 0);
    assert!(gptq.contains("config.json: quantization_config has quant_method \"gptq\""), "{gptq}");
    for (name, change, what) in [
        ("nf4", json!({"load_in_8bit": true}), "load_in_4bit and load_in_8bit at once"),
        ("nf4", json!({"load_in_8bit": true, "load_in_4bit": false}), "says 8 bits of bitsandbytes, and"),
        (
            "int8",
            json!({"load_in_8bit": false, "load_in_4bit": true}),
            "is in 8 bits of bitsandbytes; put back",
        ),
        ("hqq4", json!({"quant_method": "bitsandbytes"}), "says bitsandbytes, and"),
        ("hqq3", json!({"quant_config": {"weight_quant_params": {"nbits": 4}}}), "says 4 bits of hqq, and"),
    ] {
        let change = |json: &mut Value| {
            let said = json["quantization_config"].as_object_mut().unwrap();
            said.extend(change.as_object().unwrap().clone());
        };
        let error = opened_with(name, Some(&change), 0);
        assert!(error.contains("config.json") && error.contains(what), "{name}: {error}");
    }
    let none = opened_with("nf4", Some(&|json| json["quantization_config"] = Value::Null), 0);
    assert!(none.contains("absmax is in the weights") && none.contains("put it back"), "{none}");
    let wide = opened_with("nf4", Some(&|json| json["intermediate_size"] = 48.into()), 0);
    assert!(wide.contains("gate_proj.weight stands for [56, 64], config.json asks for [48, 64]"), "{wide}");
}

#[test]
fn scales_below_zero_are_refused() {
    let (from, dir) = (golden().join("int8"), tempfile::tempdir().unwrap());
    std::fs::copy(from.join("config.json"), dir.path().join("config.json")).unwrap();
    let mut bytes = std::fs::read(from.join("model.safetensors")).unwrap();
    let start = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..start]).unwrap();
    let (_, scales) = header.as_object().unwrap().iter().find(|(name, _)| name.ends_with("SCB")).unwrap();
    let first = start + scales["data_offsets"][0].as_u64().unwrap() as usize;
    bytes[first..first + 4].copy_from_slice(&(-1.0f32).to_le_bytes());
    std::fs::write(dir.path().join("model.safetensors"), bytes).unwrap();
    for host in [HostModel::open(dir.path(), 1), HostModel::packed(dir.path(), None, 1, 8)] {
        let error = host.err().unwrap().to_string();
        assert!(error.contains("SCB holds scales below 0") && error.contains("fleet quantise"), "{error}");
    }
}

/// Quantised while it is read, a model is what it would be from files.
#[test]
fn a_plain_model_is_packed_as_it_is_read() {
    let base = golden().join("../families/mistral");
    let ids: Vec<i64> = (0..16).map(|i| i * 7 % 64).collect();
    let plain = HostModel::open(&base, 1).unwrap().logits(&ids, 16).unwrap();
    for kind in [Quantization::Int8, Quantization::Nf4, Quantization::Fp4] {
        let mut host = HostModel::packed(&base, Some(kind), 2, 16).unwrap();
        let [whole, steps] = both_ways(&mut host, &ids);
        assert!(apart(&whole, &steps, 0.0) < 1e-5, "{kind:?}");
        let off = apart(&whole, &plain, 0.0);
        assert!(off > 1e-4 && off < 0.5, "{kind:?}: {off}");
    }
}

/// What fleet writes is what bitsandbytes and transformers wrote of the same weights: the golden directories, made of the plain models that their codes
/// come from.
#[test]
fn a_model_is_quantised_to_files_that_compute_what_is_quantised_as_it_is_read() {
    for (family, kind) in [
        ("llama", Quantization::Nf4),
        ("bloom", Quantization::Fp4),
        ("gpt2", Quantization::Int8),
        ("opt_last", Quantization::Nf4),
        ("qwen2", Quantization::Hqq8),
    ] {
        let (base, dir) = (golden().join("../families").join(family), tempfile::tempdir().unwrap());
        let made = dir.path().join("made");
        let written = quantise(&base, kind, &made).unwrap();
        let opened = ModelDir::open(&made).unwrap();
        let packed = opened.layout.parameters.iter().filter(|p| opened.quantised(p).is_some()).count();
        assert_eq!((packed, opened.config.contains_key("quantization_config")), (written.matrices, true));
        let ids: Vec<i64> = (0..12).map(|i| i * 11 % 64).collect();
        let logits = |dir: &Path, kind| {
            HostModel::packed(dir, kind, 1, ids.len()).unwrap().logits(&ids, ids.len()).unwrap()
        };
        assert_eq!(logits(&made, None), logits(&base, Some(kind)), "{family} {kind:?}");
        let again = quantise(&made, kind, &dir.path().join("again")).unwrap_err().to_string();
        assert!(again.contains("quantised already"), "{again}");
    }
}
