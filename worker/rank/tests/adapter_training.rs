//! Adapters that are trained, beside PEFT (tests/parity/adapters.py made the files).

#![allow(clippy::unwrap_used)] // helpers of tests

#[path = "../../../tests/parity/cases.rs"]
mod cases;

use cases::{apart, hyper, largest, targets};
use fleet_checkpoint::{Dtype, ModelDir, Reading, Tensors, read_parameter, stored, stored_shape};
use fleet_collectives::Solo;
use fleet_common::job::{self, Job, Precision};
use fleet_common::model::{Layout, Parameter, Role};
use fleet_cpu::{CpuExecutor, Network, workers};
use fleet_kernels::quant::{
    Codes, Double, FourBit, FourBitMap, Hqq, HqqAxis, HqqBits, HqqGroups, Int8, Quantised, Rounds, Scales,
    dequantise, double_quantise, dynamic_map, quantise_four_bit, quantise_hqq, quantise_int8,
};
use fleet_learn::adapter::{AdapterFile, FewBits, Frozen, Kept};
use fleet_learn::model::Model;
use fleet_learn::strategy::{Micro, Slot, Strategy};
use fleet_learn::testing::Whole;
use fleet_learn::{AdamW, Executor, Learner, TokenBatch, Update, Votes, Which};
use fleet_rank::assemble::{Threads, alone, solo};
use fleet_torch::{Base, Numbers, TorchExecutor};
use safetensors::tensor::TensorView;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// Adapters whose training is in the golden files, each with its base.
fn trained() -> Vec<(PathBuf, PathBuf)> {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/parity/golden");
    let dirs = std::fs::read_dir(golden.join("adapters")).unwrap().map(|entry| entry.unwrap().path());
    let base = |dir: &Path| {
        let config: Value =
            serde_json::from_slice(&std::fs::read(dir.join("adapter_config.json")).unwrap()).unwrap();
        golden.join("families").join(config["base_model_name_or_path"].as_str().unwrap())
    };
    let all: Vec<_> =
        dirs.filter(|dir| dir.join("training.safetensors").exists()).map(|dir| (base(&dir), dir)).collect();
    assert_eq!(all.len(), 10, "the golden files were not found");
    all
}

/// The model of a job that trains an adapter beside `base`.
fn model(base: &Path, adapter: &Value) -> Result<Model, String> {
    model_of(&json!({"model": {"path": base}, "data": {"path": "x"}, "adapter": adapter}))
}

fn model_of(file: &Value) -> Result<Model, String> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("job.json");
    std::fs::write(&path, file.to_string()).unwrap();
    let (job, _) = job::load(&path, &[], Path::new("/")).map_err(|e| e.to_string())?;
    assert_eq!(Job::from_json(&job.to_json()).unwrap(), job);
    Model::of_job(&job).map_err(|e| e.to_string())
}

/// All that train adapters.
const EXECUTORS: [job::Executor; 2] = [job::Executor::Cpu, job::Executor::Torch];

fn learner(executor: job::Executor, model: &Model, precision: Precision) -> Box<dyn Learner> {
    // Of libtorch's threads several cost more than they do for models as small as these.
    let count = if executor == job::Executor::Torch { 1 } else { 2 };
    alone(executor, precision, model, Threads { count, again: 0 }, 64).unwrap()
}

/// The summed loss and the gradients of `scale` times it, for these flat weights of an adapter, of a batch that is taken so many times.
type Gradients<'a> = dyn FnMut(&[f32], &TokenBatch, f32, usize) -> (f64, Vec<f32>) + 'a;

/// Beside the model in `base`. Of `again` blocks the forward is computed a second time.
fn gradients(executor: job::Executor, model: &Model, base: &Path, again: usize) -> Box<Gradients<'static>> {
    let (dir, trained) = (ModelDir::open(base).unwrap(), model.adapter.clone().unwrap().trained.clone());
    if executor == job::Executor::Torch {
        let (cpu, numbers) = (tch::Device::Cpu, Numbers::FP32);
        let adapter = model.adapter.as_ref().unwrap();
        let beside = Base::read(adapter, numbers, cpu, &mut Solo::new(0), 1).unwrap();
        let executor = TorchExecutor::new(model.decoder.clone(), model.wiring(), cpu, numbers);
        let mut executor = executor.beside(beside).computing_again(again);
        return Box::new(move |flat, batch, scale, times| {
            let mut solo = fleet_torch::Solo::new(trained.layout.clone(), cpu, numbers, 0).unwrap();
            let mut read = |range: std::ops::Range<usize>, out: &mut [f32]| {
                out.copy_from_slice(&flat[range]);
                Ok(())
            };
            solo.fill(Slot::Weights, &mut read).unwrap();
            for time in 0..times {
                let micro = Micro { first: time == 0, last: time + 1 == times };
                executor.forward_backward(solo.units(micro), &batch.view(), scale).unwrap();
            }
            let loss = f64::try_from(&executor.take_loss().unwrap()).unwrap();
            let (_, grads) = solo.units(Micro { first: true, last: true }).numbers();
            (loss, Vec::<f32>::try_from(grads.numbers.flat).unwrap())
        });
    }
    let frozen = Frozen::read(&dir, Kept::Fp32, &FewBits::default(), &mut Solo::new(0), 1).unwrap();
    let network = Network::new(model.decoder.clone(), model.wiring(), 64);
    let mut executor = CpuExecutor::<f32>::new(network, workers(1 + again as u32 % 3).unwrap())
        .computing_again(again)
        .beside(frozen, trained);
    Box::new(move |flat, batch, scale, times| {
        let mut whole = Whole::new(flat.to_vec());
        for _ in 0..times {
            executor.forward_backward(&mut whole, &batch.view(), scale).unwrap();
            whole.grads.fresh = false;
        }
        (executor.take_loss().unwrap(), whole.grads.numbers)
    })
}

/// The numbers of an adapter in a directory.
fn flat(adapter: &Path, layout: &Layout) -> Vec<f32> {
    let given = AdapterFile::open(adapter, layout).unwrap();
    let mut flat = vec![0.0; layout.len];
    for p in &layout.parameters {
        let mut reading = Reading::default();
        given.read_part(p, 0, &mut flat[p.range.clone()], &mut reading);
        reading.run(1).unwrap();
    }
    flat
}

fn adamw() -> AdamW {
    AdamW {
        beta1: hyper("beta1"),
        beta2: hyper("beta2"),
        eps: hyper("eps"),
        weight_decay: hyper("weight_decay"),
        max_grad_norm: hyper("max_grad_norm"),
    }
}

fn batches(expected: &Tensors) -> Vec<TokenBatch> {
    let tensor = expected.get("batches").unwrap();
    let data = tensor.data().unwrap();
    let ids: Vec<i64> = data.chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap())).collect();
    let (rows, seq) = (tensor.shape[1], tensor.shape[2]);
    let batch =
        |ids: &[i64]| TokenBatch { ids: ids.to_vec(), targets: targets(ids, seq), seq, ..Default::default() };
    ids.chunks(rows * seq).map(batch).collect()
}

fn doubles(expected: &Tensors, name: &str) -> Vec<f64> {
    let data = expected.get(name).unwrap().data().unwrap();
    data.chunks_exact(8).map(|b| f64::from_le_bytes(b.try_into().unwrap())).collect()
}

#[test]
fn twenty_steps_are_those_of_peft() {
    for (base, adapter) in trained() {
        let name = adapter.file_name().unwrap().to_string_lossy().into_owned();
        let expected = Tensors::open(&adapter.join("training.safetensors")).unwrap();
        let model = model(&base, &json!({"path": adapter})).unwrap();
        let (losses, norms) = (doubles(&expected, "losses"), doubles(&expected, "grad_norms"));
        let precisions = [(Precision::Fp32, 1e-4), (Precision::Bf16Mixed, 3e-2), (Precision::Bf16True, 5e-2)];
        let both = EXECUTORS.into_iter().flat_map(|executor| precisions.map(|how| (executor, how)));
        for (executor, (precision, tolerance)) in both {
            let name = format!("{name} by {executor:?}");
            let mut learner = learner(executor, &model, precision);
            learner.load_weights(&adapter).unwrap();
            for (step, batch) in batches(&expected).into_iter().enumerate() {
                let update = Update { adamw: adamw(), lr: hyper("learning_rate"), step: step as u64 + 1 };
                let report = learner.step(&[batch], &update, Votes::default()).unwrap();
                let off = |is: f64, was: f64| (is - was).abs() / was.abs().max(1.0);
                let (loss, norm) = (off(report.loss, losses[step]), off(report.grad_norm, norms[step]));
                assert!(
                    loss < tolerance,
                    "{name} {precision:?} step {step}: loss {} is {loss} off",
                    report.loss
                );
                assert!(
                    norm < 3.0 * tolerance,
                    "{name} {precision:?} step {step}: norm {} is {norm} off",
                    report.grad_norm
                );
            }
        }
    }
}

/// The gradients of the first step, and of a second micro-batch, with blocks kept or computed again.
#[test]
fn gradients_are_those_of_peft() {
    for (base, adapter) in trained() {
        let name = adapter.file_name().unwrap().to_string_lossy().into_owned();
        let expected = Tensors::open(&adapter.join("training.safetensors")).unwrap();
        let model = model(&base, &json!({"path": adapter})).unwrap();
        let layout = model.trained_layout();
        let flat = flat(&adapter, &layout);
        let batch = batches(&expected).remove(0);
        let scale = 1.0 / batch.view().weight() as f32;
        for (executor, again) in EXECUTORS.into_iter().flat_map(|executor| [(executor, 0), (executor, 2)]) {
            let mut gradients = gradients(executor, &model, &base, again);
            for times in [1, 2] {
                let (_, found) = gradients(&flat, &batch, scale, times);
                for p in &layout.parameters {
                    let tensor = expected.get(&format!("grad.{}", p.name)).unwrap();
                    let mut wanted = vec![0.0; p.range.len()];
                    read_parameter(p, &tensor, &mut wanted).unwrap();
                    assert!(largest(&wanted) > 0.0, "{name}: {}", p.name);
                    wanted.iter_mut().for_each(|x| *x *= times as f32);
                    let far = apart(&found[p.range.clone()], &wanted, 0.0);
                    assert!(far < 1e-4, "{name} by {executor:?}: the gradient of {} is {far} away", p.name);
                }
            }
        }
    }
}

/// With what a job leaves out, for every family.
#[test]
fn a_new_adapter_changes_nothing_until_it_is_trained() {
    let golden = cases::golden();
    for name in ["llama", "qwen2", "qwen3", "mistral", "phi", "gpt2", "bloom", "opt", "opt_last"] {
        let base = golden.join(name);
        let case = cases::cases().into_iter().find(|case| case.name == name).unwrap();
        let (ids, shape) = case.ids("batches");
        let ids = &ids[..shape[1] * shape[2]];
        let batch = TokenBatch {
            ids: ids.to_vec(),
            targets: targets(ids, shape[2]),
            seq: shape[2],
            ..Default::default()
        };
        let mut plain = solo::<f32>(&Model::read(&base).unwrap(), 1, 64).unwrap();
        plain.load_weights(&base).unwrap();
        let of_base = plain.evaluate(std::slice::from_ref(&batch)).unwrap().mean();
        // Also where modules and biases of the model are trained themselves.
        let last = |name: &str| name.rsplit('.').next().unwrap().to_owned();
        let read = Model::read(&base).unwrap();
        let names = &read.family.names;
        let saved = json!({"bias": "all", "target_modules": [last(names.out)], "modules_to_save": [last(names.down), last(names.final_norm)]});
        if name != "opt_last" && last(names.out) != last(names.down) {
            let model = self::model(&base, &saved).unwrap();
            for executor in EXECUTORS {
                let mut learner = self::learner(executor, &model, Precision::Fp32);
                learner.fresh_weights(7).unwrap();
                let with = learner.evaluate(std::slice::from_ref(&batch)).unwrap().mean();
                assert!((with - of_base).abs() < 1e-6, "{name} by {executor:?}: {with} {of_base}");
                // Nor is the model another one when they have changed.
                let update = Update { adamw: adamw(), lr: 1e-2, step: 1 };
                learner.step(std::slice::from_ref(&batch), &update, Votes::default()).unwrap();
                let mut mean = |which| {
                    let losses = learner.losses(std::slice::from_ref(&batch), which).unwrap();
                    losses[0].iter().sum::<f64>() / batch.view().weight()
                };
                let (base, trained) = (mean(Which::Base), mean(Which::Trained));
                assert!((base - of_base).abs() < 1e-6, "{name} by {executor:?}: {base} {of_base}");
                assert!(trained < of_base - 1e-3, "{name} by {executor:?}: {trained} {of_base}");
            }
        }
        let mut adapters = vec![
            json!({"type": "lora", "dropout": 0.5}),
            json!({"type": "dora", "dropout": 0.5}),
            // A rank above every width.
            json!({"use_dora": true, "dropout": 0, "r": 200, "alpha": 20, "target_modules": "all-linear"}),
        ];
        if !read.decoder.tied {
            adapters.push(json!({"target_modules": [names.embedding, names.head, last(names.out)]}));
            adapters.push(json!({"target_modules": [names.head], "use_dora": true}));
        }
        for adapter in adapters {
            let name = format!("{name} {adapter}");
            let model = self::model(&base, &adapter).unwrap();
            let curves = EXECUTORS.map(|executor| {
                let mut learner = self::learner(executor, &model, Precision::Fp32);
                learner.fresh_weights(7).unwrap();
                let before = learner.evaluate(std::slice::from_ref(&batch)).unwrap().mean();
                assert!((before - of_base).abs() < 1e-6, "{name} by {executor:?}: {before} {of_base}");
                let update = |step| Update { adamw: adamw(), lr: 1e-2, step };
                let mut losses = Vec::new();
                for step in 1..=20 {
                    let batch = TokenBatch {
                        noise: Some((0..shape[1] as u64).map(|row| step << 8 | row).collect()),
                        ..batch.clone()
                    };
                    losses.push(learner.step(&[batch], &update(step), Votes::default()).unwrap().loss);
                    assert_eq!(learner.without_gradient(), None, "{name}");
                }
                let after = learner.evaluate(std::slice::from_ref(&batch)).unwrap().mean();
                assert!(after < before - 0.1, "{name} by {executor:?}: {before} {after}");
                losses
            });
            // Later AdamW has made more of what was rounded otherwise.
            for (step, (cpu, torch)) in curves[0].iter().zip(&curves[1]).enumerate().take(4) {
                assert!((cpu - torch).abs() < 1e-5 * cpu, "{name}, step {step}: {cpu} {torch}");
            }
        }
    }
}

/// With losses and gradients that hang on all of an adapter's numbers.
#[test]
fn executors_drop_the_same() {
    for (base, adapter) in trained() {
        let name = adapter.file_name().unwrap().to_string_lossy().into_owned();
        let expected = Tensors::open(&adapter.join("training.safetensors")).unwrap();
        let model = model(&base, &json!({"path": adapter, "dropout": 0.3})).unwrap();
        let layout = model.trained_layout();
        let flat = flat(&adapter, &layout);
        let batch = batches(&expected).remove(0);
        let (scale, noise) = (1.0 / batch.view().weight() as f32, Some((0..16).collect()));
        let dropping = TokenBatch { noise, ..batch.clone() };
        let [(cpu, of_cpu), (torch, of_torch)] =
            EXECUTORS.map(|executor| gradients(executor, &model, &base, 0)(&flat, &dropping, scale, 1));
        assert!((cpu - torch).abs() < 1e-5 * cpu, "{name}: {cpu} {torch}");
        let whole = gradients(job::Executor::Torch, &model, &base, 0)(&flat, &batch, scale, 1).0;
        let is_of_embedding = model.adapter.as_ref().unwrap().trained.products().next().is_none();
        assert!(is_of_embedding || (whole - torch).abs() > 1e-4, "{name}: {whole} {torch}");
        for p in &layout.parameters {
            let far = apart(&of_torch[p.range.clone()], &of_cpu[p.range.clone()], 1e-6);
            assert!(far < 1e-4, "{name}: the gradients of {} are {far} apart", p.name);
        }
    }
}

/// No gradient flows through the lengths of rows, so that losses follow the magnitudes alone: of the first block, through what dropout leaves out above it.
#[test]
fn magnitudes_have_the_gradients_that_losses_show_with_dropout() {
    let adapters = cases::golden().join("../adapters");
    for (name, family, end) in [("dora", "mistral", "q_proj"), ("transposed_dora", "gpt2", "c_attn")] {
        let (adapter, base) = (adapters.join(name), cases::golden().join(family));
        let expected = Tensors::open(&adapter.join("training.safetensors")).unwrap();
        let model = model(&base, &json!({"path": adapter, "dropout": 0.3})).unwrap();
        let layout = model.trained_layout();
        let flat = flat(&adapter, &layout);
        let batch = batches(&expected).remove(0);
        let batch = TokenBatch { noise: Some((0..16).collect()), ..batch };
        for executor in EXECUTORS {
            let mut of = gradients(executor, &model, &base, 0);
            let (_, gradients) = of(&flat, &batch, 1.0, 1);
            let is_first = |p: &&Parameter| p.role == Role::Magnitude && p.name.contains(end);
            let p = layout.parameters.iter().find(is_first).unwrap();
            let mut largest: Vec<usize> = p.range.clone().collect();
            largest.sort_by(|a, b| gradients[*b].abs().total_cmp(&gradients[*a].abs()));
            for number in &largest[..4] {
                let mut moved = |by: f32| {
                    let mut flat = flat.clone();
                    flat[*number] += by;
                    of(&flat, &batch, 1.0, 1).0
                };
                let step = 0.05 * flat[*number];
                let slope = (moved(step) - moved(-step)) / f64::from(2.0 * step);
                let off = (slope - f64::from(gradients[*number])).abs();
                assert!(
                    off < 1e-2 * slope.abs() + 1e-3,
                    "{name} by {executor:?}: {slope} {}",
                    gradients[*number]
                );
            }
        }
    }
}

/// In the words of a job, as PEFT has them in its file.
#[test]
fn ranks_and_scales_of_some_modules_are_others() {
    let base = cases::golden().join("llama");
    let patterns = json!({"r": 4, "alpha": 8, "target_modules": "all-linear", "exclude_modules": r".*\.1\.mlp\..*",
        "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 2, "q_proj|k_proj": 3}, "alpha_pattern": {"k_proj": 1.5}});
    let model = model(&base, &patterns).unwrap();
    let adapter = model.adapter.unwrap();
    let rank = |module: &str| {
        let mut parameters = adapter.trained.layout.parameters.iter();
        parameters.find(|p| p.name.ends_with(&format!("{module}.lora_A.weight"))).map(|p| p.shape[0])
    };
    assert_eq!((rank("1.self_attn.q_proj"), rank("0.self_attn.q_proj")), (Some(2), Some(3)));
    assert_eq!((rank("0.self_attn.k_proj"), rank("0.self_attn.v_proj")), (Some(3), Some(4)));
    assert_eq!((rank("0.mlp.up_proj"), rank("1.mlp.up_proj")), (Some(4), None));
    let scale = |module: &str| adapter.config.scale(&format!("model.layers.0.self_attn.{module}"));
    assert_eq!((scale("k_proj"), scale("v_proj")), (0.5, 2.0));
    for key in ["rank_pattern", "alpha_pattern", "exclude_modules"] {
        assert_eq!(adapter.config.json[key], patterns[key]);
    }
}

#[test]
fn what_an_adapter_cannot_be_is_refused() {
    let golden = cases::golden();
    let refused = |family: &str, adapter: Value| model(&golden.join(family), &adapter).unwrap_err();
    for (family, adapter, wanted) in [
        (
            "llama",
            json!({"target_modules": ["q_porj"]}),
            "no module of the model that can be so is called so; did you mean q_proj?",
        ),
        (
            "llama",
            json!({"target_modules": "x.*y"}),
            "no module of the model is called so, or all are excluded; it has down_proj, embed_tokens, gate_proj",
        ),
        ("llama", json!({"target_modules": "(q"}), "no regular expression"),
        ("llama", json!({"layers_to_transform": [2]}), "names block 2, and the model has 2"),
        (
            "llama",
            json!({"modules_to_save": ["q_proj"], "target_modules": ["o_proj"]}),
            "train both, or neither",
        ),
        (
            "llama",
            json!({"modules_to_save": ["o_proj"], "target_modules": ["o_proj"]}),
            "take it out of one of them",
        ),
        ("mistral", json!({"modules_to_save": ["lm_head"]}), "untie them first"),
        ("llama", json!({"path": golden.join("../adapters/dora")}), "adapter of another model"),
        ("mistral", json!({"target_modules": ["embed_tokens"]}), "untie them first"),
        ("qwen2", json!({"target_modules": ["embed_tokens"], "use_dora": true}), "DoRA is for linear layers"),
        (
            "llama",
            json!({"exclude_modules": "(q"}),
            "exclude_modules is \"(q\", which is no regular expression",
        ),
        ("llama", json!({"exclude_modules": ".*"}), "or all are excluded"),
        (
            "llama",
            json!({"target_modules": ["q_proj"], "rank_pattern": {"v_proj": 2}}),
            "rank_pattern has \"v_proj\", and none of the changed modules is called so; they are q_proj",
        ),
    ] {
        let error = refused(family, adapter.clone());
        assert!(error.contains(wanted), "{adapter}: {error}");
        assert!(!error.contains('\n'), "{error}");
    }
}

/// Puts in the place of a matrix what its codes stand for.
fn stand_for(word: &str, numbers: &mut [f32], [rows, cols]: [usize; 2]) {
    let blocks = numbers.len().div_ceil(64);
    let (mut scales, mut zeros) = (vec![0.0; blocks], vec![0.0; blocks]);
    let (mut of_scales, mut largest) = (vec![0; blocks], vec![0.0; blocks.div_ceil(256)]);
    let (mut codes, mut signed) = (Vec::new(), vec![0; numbers.len()]);
    let codes = match word {
        "int8" => {
            scales.resize(rows, 0.0);
            Rounds::F16.all(numbers);
            quantise_int8(numbers, cols, &mut signed, &mut scales);
            Codes::Int8(Int8 { codes: &signed, scales: &scales })
        }
        "nf4" | "fp4" => {
            let map = if word == "nf4" { FourBitMap::Nf4 } else { FourBitMap::Fp4 };
            codes.resize(numbers.len().div_ceil(2), 0);
            quantise_four_bit(numbers, map, 64, &mut codes, &mut scales);
            let offset = double_quantise(&scales, &mut of_scales, &mut largest);
            let double = Double { codes: &of_scales, largest: &largest, map: dynamic_map(), offset };
            Codes::FourBit(FourBit { map, block: 64, codes: &codes, scales: Scales::Double(double) })
        }
        hqq => {
            let bits = HqqBits::of(hqq[3..].parse().unwrap()).unwrap();
            let groups = HqqGroups { bits, axis: HqqAxis::One, size: 64 };
            codes.resize(groups.bytes(numbers.len()), 0);
            quantise_hqq(numbers, groups, &mut codes, &mut scales, &mut zeros);
            Codes::Hqq(Hqq { groups, codes: &codes, scales: &scales, zeros: &zeros })
        }
    };
    let mut wide = vec![0.0; numbers.len()];
    dequantise(Quantised::new(codes, rows, cols), 0..rows, &mut wide);
    numbers.copy_from_slice(&wide);
}

/// Beside a model whose matrices are in few bits, and beside one that has what these stand for.
#[test]
fn a_quantised_base_is_the_model_that_its_codes_stand_for() {
    let golden = cases::golden();
    for (name, word, kind) in [
        ("llama", "nf4", "lora"),
        ("qwen2", "fp4", "lora"),
        ("gpt2", "nf4", "lora"),
        ("llama", "nf4", "dora"),
        ("gpt2", "fp4", "dora"),
        ("gpt2", "int8", "lora"),
        ("qwen2", "hqq8", "lora"),
        ("llama", "hqq4", "lora"),
        ("llama", "hqq3", "dora"),
        ("gpt2", "hqq2", "lora"),
        ("gpt2", "hqq1", "lora"),
    ] {
        let base = golden.join(name);
        let dir = ModelDir::open(&base).unwrap();
        let mut flat = vec![0.0; dir.layout.len];
        dir.read(&mut flat).unwrap();
        let blocks = 1..dir.layout.units.len() - 1;
        for p in dir.layout.parameters.iter().filter(|p| p.role == Role::Weight && blocks.contains(&p.unit)) {
            stand_for(word, &mut flat[p.range.clone()], [p.shape[0], p.shape[1]]);
        }
        let made = tempfile::tempdir().unwrap();
        std::fs::copy(base.join("config.json"), made.path().join("config.json")).unwrap();
        let tensors: Vec<(String, Vec<usize>, Vec<u8>)> = dir
            .layout
            .parameters
            .iter()
            .map(|p| {
                let numbers = stored(p, &flat[p.range.clone()]);
                (p.name.clone(), stored_shape(p), numbers.iter().flat_map(|x| x.to_le_bytes()).collect())
            })
            .collect();
        let views: Vec<_> = tensors
            .iter()
            .map(|(name, shape, data)| (name, TensorView::new(Dtype::F32, shape.clone(), data).unwrap()))
            .collect();
        safetensors::serialize_to_file(views, None, &made.path().join("model.safetensors")).unwrap();

        let adapter = json!({"type": kind, "r": 4, "dropout": 0.0, "target_modules": "all-linear"});
        let with = |base: &Path, quantization: &str| {
            model_of(&json!({"model": {"path": base}, "data": {"path": "x"}, "adapter": adapter, "quantization": quantization})).unwrap()
        };
        let case = cases::cases().into_iter().find(|case| case.name == name).unwrap();
        let (ids, shape) = case.ids("batches");
        let ids = &ids[..shape[1] * shape[2]];
        let batch = TokenBatch {
            ids: ids.to_vec(),
            targets: targets(ids, shape[2]),
            seq: shape[2],
            ..Default::default()
        };
        let losses = |executor, model: Model| {
            let mut learner = learner(executor, &model, Precision::Fp32);
            learner.fresh_weights(7).unwrap();
            let update = |step| Update { adamw: adamw(), lr: 1e-2, step };
            let step =
                |step| learner.step(std::slice::from_ref(&batch), &update(step), Votes::default()).unwrap();
            (1..=8).map(step).map(|report| (report.loss, report.grad_norm)).collect::<Vec<_>>()
        };
        let wanted = losses(job::Executor::Cpu, with(made.path(), "none"));
        assert!(wanted[7].0 < wanted[0].0 - 0.05, "{name}: {wanted:?}");
        for executor in EXECUTORS {
            for (is, wanted) in losses(executor, with(&base, word)).iter().zip(&wanted) {
                assert!(
                    (is.0 - wanted.0).abs() < 1e-5 && (is.1 - wanted.1).abs() < 1e-4,
                    "{name} in {word} by {executor:?}: {is:?} {wanted:?}"
                );
            }
        }
    }
}
