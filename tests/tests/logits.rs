//! `fleet logits`: models of every family as transformers computes them, from the command line, and what is wrong with some.

#![allow(clippy::unwrap_used)] // in a test an unwrap is an assertion

use fleet_tests::World;
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};

/// As tests/parity/families.py made it.
fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("parity/golden/families").join(name)
}

/// Name, shape and numbers of the tensors in a safetensors file, as far as they are f32 or i64.
fn tensor(path: &Path, name: &str) -> (Vec<u64>, Vec<u8>) {
    let bytes = fs::read(path).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let json: Value = serde_json::from_slice(&bytes[8..8 + header]).unwrap();
    let of =
        |value: &Value| value.as_array().unwrap().iter().map(|n| n.as_u64().unwrap()).collect::<Vec<_>>();
    let range = of(&json[name]["data_offsets"]);
    let data = bytes[8 + header + range[0] as usize..8 + header + range[1] as usize].to_vec();
    (of(&json[name]["shape"]), data)
}

fn f32s(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
}

/// A world with a copy of a golden model, and its ids as JSON.
fn world(name: &str) -> World {
    let world = World::new();
    fs::create_dir(world.path("model")).unwrap();
    for file in ["config.json", "model.safetensors"] {
        fs::copy(golden(name).join(file), world.path("model").join(file)).unwrap();
    }
    let (shape, ids) = tensor(&golden(name).join("expected.safetensors"), "ids");
    let ids: Vec<i64> = ids.chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap())).collect();
    let lists: Vec<&[i64]> = ids.chunks(shape[1] as usize).collect();
    world.write("ids.json", json!(lists).to_string());
    world
}

fn logits(world: &World, more: &[&str]) -> fleet_tests::Finished {
    let args = ["logits", "--model", "model", "--ids", "ids.json", "--out", "out.safetensors"];
    world.run("fleet", &[&args, more].concat())
}

#[test]
fn logits_are_those_of_transformers() {
    for name in ["gpt2", "bloom", "qwen3"] {
        let world = world(name);
        logits(&world, &["--device", "cpu"]).expect(0);
        let (shape, want) = tensor(&golden(name).join("expected.safetensors"), "logits");
        let (got_shape, got) = tensor(&world.path("out.safetensors"), "logits");
        assert_eq!(got_shape, shape);
        let far = f32s(&got).iter().zip(f32s(&want)).fold(0f32, |most, (a, b)| most.max((a - b).abs()));
        assert!(far < 1e-4, "{name}: {far}");
    }
}

#[test]
fn what_is_wrong_with_a_model_or_with_ids_is_named() {
    let world = world("gpt2");
    let config: Value = serde_json::from_slice(&fs::read(world.path("model/config.json")).unwrap()).unwrap();
    let with = |key: &str, value: Value| {
        let mut config = config.clone();
        config[key] = value;
        world.write("model/config.json", config.to_string());
        logits(&world, &[]).expect(2).stderr
    };
    let said = with("model_type", json!("gemma"));
    assert!(
        said.contains("`gemma`; fleet runs llama, mistral, qwen2, qwen3, phi, gpt2, opt, bloom"),
        "{said}"
    );
    let said = with("n_embd", json!(36));
    assert!(
        said.contains("transformer.wte.weight is [64, 32], config.json asks for [64, 36]")
            && said.contains("more"),
        "{said}"
    );
    let said = with("n_layer", json!(1));
    assert!(
        said.contains(
            "transformer.h.1.attn.c_attn.bias is in the weights, and config.json describes a model without it"
        ),
        "{said}"
    );
    let said = with("n_layer", json!(1_000_000_000));
    assert!(said.contains("n_layer is 1000000000; fleet takes at most 4096"), "{said}");
    let said = with("n_inner", json!(1 << 29));
    assert!(said.contains("c_fc.weight is"), "{said}");
    let said = with("activation_function", json!(5));
    assert!(said.contains("activation_function is 5, not a text"), "{said}");
    let said = with("n_layer", json!(3));
    assert!(
        said.contains("the weights lack transformer.h.2.ln_1.weight, transformer.h.2.ln_1.bias, "),
        "{said}"
    );
    let said = with("n_head", json!(5));
    assert!(said.contains("n_embd (32) is not a multiple of n_head (5)"), "{said}");
    let said = with("layer_norm_epsilon", json!("small"));
    assert!(said.contains("layer_norm_epsilon is \"small\""), "{said}");
    let said = with("activation_function", json!("mish"));
    assert!(said.contains("activation_function is `mish`"), "{said}");
    world.write("model/config.json", config.to_string());

    for (ids, why) in [
        ("[1, 64]", "token 64 is beyond the model's vocabulary of 64"),
        ("[[1, 2], [3]]", "sequence 2 has 1 tokens and the first 2"),
        ("[]", "has no token"),
        ("{\"a\": 1}", "is no list of token ids"),
    ] {
        world.write("ids.json", ids);
        let said = logits(&world, &[]).expect(2).stderr;
        assert!(said.contains(why), "{ids}: {said}");
    }
    world.write("ids.json", json!(vec![1; 65]).to_string());
    let said = logits(&world, &[]).expect(2).stderr;
    assert!(said.contains("a sequence of 65 tokens, and the model has positions for 64"), "{said}");

    world.write("ids.json", "[1]");
    let weights = fs::read(world.path("model/model.safetensors")).unwrap();
    let mut bad = weights.clone();
    let end = bad.len();
    bad[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
    world.write("model/model.safetensors", bad);
    let said = logits(&world, &[]).expect(2).stderr;
    assert!(said.contains("holds values that are NaN or infinite"), "{said}");
    fs::remove_file(world.path("model/model.safetensors")).unwrap();
    nix::unistd::mkfifo(&world.path("model/model.safetensors"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    let said = logits(&world, &[]).expect(2).stderr;
    assert!(said.contains("it is no file"), "{said}");
    fs::remove_file(world.path("model/model.safetensors")).unwrap();
    world.write("model/model.safetensors", &weights[..weights.len() / 2]);
    let said = logits(&world, &[]).expect(2).stderr;
    assert!(said.contains("model.safetensors"), "{said}");
    assert!(!world.path("out.safetensors").exists());
}
