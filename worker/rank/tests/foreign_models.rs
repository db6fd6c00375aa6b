//! Models of others against Hugging Face transformers, by the golden directories that tests/parity/foreign.py made: what is generated from them,
//! and what a run that starts from one writes.

#![allow(clippy::unwrap_used)] // a test may panic

mod gang;

use fleet_checkpoint::{ModelDir, Tensors};
use fleet_common::exit::Fault;
use fleet_common::job::{Job, Model, Rows, Tokenizer, parse_toml};
use fleet_rank::generate::{End, Generated, Sampling, Settings, TextModel};
use gang::{job, launch};
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};

const MODELS: [&str; 4] = ["metaspace", "legacy", "byte_level", "unigram"];

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/parity/golden/foreign").join(name)
}

fn read(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// Sets keys of a JSON file, or takes one out where the value is null.
fn change(path: &Path, values: Value) {
    let mut json = read(path);
    let object = json.as_object_mut().unwrap();
    for (key, value) in values.as_object().unwrap() {
        match value.is_null() {
            true => object.remove(key),
            false => object.insert(key.clone(), value.clone()),
        };
    }
    fs::write(path, json.to_string()).unwrap();
}

/// A copy that may be changed.
fn copy_of(name: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(golden(name)).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, dir.path().join(path.file_name().unwrap())).unwrap();
    }
    dir
}

/// The likeliest continuation, whose pieces are its text.
fn greedy(dir: &Path, prompt: &str) -> Result<Generated, fleet_learn::Error> {
    let sampling = Sampling { temperature: 0.0, top_k: 0, top_p: 1.0, seed: 0 };
    let settings = Settings { max_new_tokens: 24, sampling, stop: Vec::new() };
    let mut pieces = String::new();
    let mut emit = |piece: &str| {
        pieces.push_str(piece);
        true
    };
    let generated = TextModel::open(dir, &[], None, 1)?.answer(&prompt.into(), &settings, &mut emit)?;
    assert_eq!(generated.text, pieces);
    Ok(generated)
}

#[test]
fn text_and_its_end_are_hugging_faces() {
    let mut ended = 0;
    for name in MODELS {
        for case in read(&golden(name).join("expected.json"))["cases"].as_array().unwrap() {
            let got = greedy(&golden(name), case["prompt"].as_str().unwrap()).unwrap();
            let new = case["new_ids"].as_array().unwrap().len();
            // Where theirs ends within a character, ours ends before it; what of a run of bytes is whole is there.
            let text = case["text"].as_str().unwrap();
            let whole = text.trim_end_matches('\u{fffd}');
            let is_cut = whole.len() < text.len() && got.text.starts_with(whole);
            assert!(got.text == text || is_cut, "{name} {case}: {:?}", got.text);
            assert_eq!(got.prompt_tokens, case["prompt_ids"].as_array().unwrap().len(), "{name} {case}");
            // The token that ends a text is one of transformers' new ones and none of ours.
            match got.end {
                End::EndOfText => assert_eq!(got.new_tokens + 1, new, "{name} {case}"),
                _ => assert_eq!(got.new_tokens, 24, "{name} {case}"),
            }
            ended += u32::from(got.end == End::EndOfText);
        }
    }
    assert!(ended > 5, "{ended} texts ended by a token");
}

#[test]
fn the_tokenizers_own_end_ends_a_text_too() {
    let dir = copy_of("byte_level");
    let before = greedy(dir.path(), "The river").unwrap();
    let expected = read(&dir.path().join("expected.json"));
    let third = expected["cases"][0]["new_ids"][2].as_u64().unwrap();
    let tokenizer = tokenizers::Tokenizer::from_file(dir.path().join("tokenizer.json")).unwrap();
    let token = tokenizer.id_to_token(third as u32).unwrap();
    change(&dir.path().join("tokenizer_config.json"), json!({"eos_token": token}));
    let after = greedy(dir.path(), "The river").unwrap();
    assert_eq!((after.new_tokens, after.end), (2, End::EndOfText));
    assert!(before.new_tokens > 2);
}

#[test]
fn a_begin_that_the_prompt_has_is_not_added_again() {
    let plain = greedy(&golden("metaspace"), "The river").unwrap();
    let twice = greedy(&golden("metaspace"), "<s>The river").unwrap();
    assert!(plain.notes.is_empty() && twice.notes.concat().contains("<s>"));
    let tokenizer = tokenizers::Tokenizer::from_file(golden("metaspace").join("tokenizer.json")).unwrap();
    let ids = tokenizer.encode("<s>The river", false).unwrap();
    assert_eq!((twice.prompt_tokens, ids.get_ids()[0]), (ids.len(), 1));
}

/// The texts are those of transformers 5.17, which turns each new token by the length that the text has then.
#[test]
fn a_model_whose_positions_are_stretched_goes_on_beyond_them() {
    for (name, text) in [
        ("unigram", "ne o:heean os stones.\nnes:bnterheso stones.\nnehe,;"),
        (
            "byte_level",
            "The\u{309}river_fal\u{1a}\u{fffd}'\u{c}z\u{1a}ardardardros\u{fffd}\u{fffd}ch\u{c}\u{fffd} the\u{c}",
        ),
    ] {
        let dir = copy_of(name);
        let of = |kind: &str, factor: Value| {
            let rope = json!({"rope_type": kind, "factor": factor, "rope_theta": 1e4});
            change(
                &dir.path().join("config.json"),
                json!({"rope_parameters": rope, "max_position_embeddings": 8}),
            );
            greedy(dir.path(), "The river").unwrap()
        };
        let stretched = of("dynamic", json!(4.0));
        assert_eq!((stretched.text.as_str(), stretched.new_tokens), (text, 24), "{name}");
        assert!(stretched.notes.concat().contains("beyond the 8 positions"), "{:?}", stretched.notes);
        let plain = of("default", Value::Null);
        assert_eq!(plain.end, End::Context, "{name}");
        assert!(plain.notes.is_empty());
    }
}

#[test]
fn what_the_tokenizer_cannot_write_of_a_prompt_is_told() {
    let dir = copy_of("unigram");
    let some = greedy(dir.path(), "The \u{65e5} river").unwrap();
    assert!(some.notes.concat().contains("of the prompt (such as `\u{65e5}`)"), "{:?}", some.notes);
    let none = greedy(dir.path(), "\u{65e5}\u{672c}").unwrap_err();
    assert_eq!(none.fault(), Fault::Input);
    assert!(none.to_string().contains("can write nothing of the prompt"), "{none}");
}

/// A decoder of the tokenizers library that panics where there is nothing to decode.
#[test]
fn a_decoder_that_panics_at_nothing_is_given_none() {
    let dir = copy_of("byte_level");
    let path = dir.path().join("tokenizer.json");
    change(&path, json!({"decoder": {"type": "BPEDecoder", "suffix": "</w>"}}));
    greedy(dir.path(), "").unwrap();
}

#[test]
fn a_directory_that_is_no_model_says_what_it_is() {
    for file in ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"] {
        let dir = copy_of("byte_level");
        let pointer = format!("version https://git-lfs.github.com/spec/v1\noid sha256:{:064}\nsize 9\n", 7);
        fs::write(dir.path().join(file), pointer).unwrap();
        let said = greedy(dir.path(), "a").unwrap_err().to_string();
        assert!(said.contains(file) && said.contains("`git lfs pull`"), "{file}: {said}");
    }
    for (has, cure) in [
        ("pytorch_model.bin", "safe_serialization=True"),
        ("adapter_model.safetensors", "fleet adapter merge"),
        ("model-q4.gguf", "llama.cpp"),
        ("step-00000030", "has checkpoints of a run, the newest in"),
    ] {
        let dir = copy_of("byte_level");
        fs::rename(dir.path().join("model.safetensors"), dir.path().join(has)).unwrap();
        let said = greedy(dir.path(), "a").unwrap_err().to_string();
        assert!(said.contains(has) && said.contains(cure), "{said}");
    }
    let said = greedy(Path::new("gpt2"), "a").unwrap_err().to_string();
    assert!(said.contains("hf download NAME --local-dir DIR"), "{said}");
}

/// With one more tensor in its weights.
fn copy_with(name: &str, tensor: &str) -> tempfile::TempDir {
    let dir = copy_of(name);
    let path = dir.path().join("model.safetensors");
    let bytes = fs::read(&path).unwrap();
    let mut all = safetensors::SafeTensors::deserialize(&bytes).unwrap().tensors();
    let two = [0; 8];
    all.push((
        tensor.to_owned(),
        safetensors::tensor::TensorView::new(safetensors::Dtype::F32, vec![2], &two).unwrap(),
    ));
    safetensors::serialize_to_file(all, None, &path).unwrap();
    dir
}

#[test]
fn tensors_that_would_change_what_the_model_computes_are_not_passed_over() {
    for tensor in [
        "model.layers.0.self_attn.q_norm.weight",
        "model.layers.1.post_feedforward_layernorm.weight",
        "model.layers.0.mlp.down_proj.weight_scale",
        "model.layers.0.self_attn.q_proj.lora_A.weight",
        "layers.0.mlp.router.weight",
        "lm_head.bias",
    ] {
        let dir = copy_with("byte_level", tensor);
        let said = ModelDir::open(dir.path()).unwrap_err().to_string();
        assert!(said.contains(tensor) && said.contains("describes a model without it"), "{said}");
    }
    for tensor in
        ["model.layers.0.self_attn.rotary_emb.inv_freq", "score.weight", "vision_tower.layers.0.weight"]
    {
        ModelDir::open(copy_with("byte_level", tensor).path()).unwrap();
    }
}

/// Writes `value` over the number at `index` of a f32 tensor, in whichever shard it is.
fn poison(dir: &Path, tensor: &str, index: usize, value: f32) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|e| e != "safetensors") {
            continue;
        }
        let mut bytes = fs::read(&path).unwrap();
        let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let info: Value = serde_json::from_slice(&bytes[8..header]).unwrap();
        if let Some(begin) = info[tensor]["data_offsets"][0].as_u64() {
            let at = header + begin as usize + 4 * index;
            bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
            fs::write(&path, bytes).unwrap();
            return;
        }
    }
    panic!("no {tensor}");
}

#[test]
fn weights_and_logits_that_are_no_numbers_are_refused_by_name() {
    for (value, tensor) in [
        (f32::NAN, "model.layers.1.mlp.up_proj.weight"),
        (f32::INFINITY, "lm_head.weight"),
        (f32::NEG_INFINITY, "model.norm.weight"),
    ] {
        let dir = copy_of("metaspace");
        poison(dir.path(), tensor, 3, value);
        let error = greedy(dir.path(), "The river").unwrap_err();
        assert_eq!(error.fault(), Fault::Input);
        assert!(error.to_string().contains(&format!("{tensor} holds values that are NaN")), "{error}");

        let data = tempfile::tempdir().unwrap();
        let ended = launch(&tuned(data.path(), dir.path()), 1, None, None);
        let error = ended.outcomes[0].as_ref().unwrap_err();
        assert!(error.fault() == Fault::Input && error.to_string().contains(tensor), "{error}");
    }
    let dir = copy_of("metaspace");
    poison(dir.path(), "model.norm.weight", 3, 3e38);
    poison(dir.path(), "lm_head.weight", 3, 3e38);
    let error = greedy(dir.path(), "The river").unwrap_err();
    assert_eq!(error.fault(), Fault::Input);
    assert!(error.to_string().contains("NaN or infinite logits"), "{error}");
}

/// A short run that starts from the model in `dir`.
fn tuned(data: &Path, dir: &Path) -> Job {
    let mut job = Job {
        model: Model::Pretrained(dir.to_owned()),
        tokenizer: Tokenizer::File(dir.join("tokenizer.json")),
        max_steps: Some(4),
        ..job(data)
    };
    (job.checkpoint.save_steps, job.optimizer.learning_rate) = (2, 1e-4);
    job
}

#[test]
fn a_tuned_model_keeps_what_it_came_with_and_so_does_a_run_that_is_continued() {
    let (data, dir) = (tempfile::tempdir().unwrap(), copy_of("byte_level"));
    fs::write(dir.path().join("tokenizer.model"), [0, 255, 1]).unwrap();
    change(&dir.path().join("config.json"), json!({"my_key": {"kept": true}, "pad_token_id": 2}));
    change(&dir.path().join("generation_config.json"), json!({"eos_token_id": [1, 7], "temperature": 0.5}));
    let job = tuned(data.path(), dir.path());
    let [half, full] = <[_; 2]>::try_from(launch(&job, 1, None, None).checkpoints()).unwrap();
    let (half, full) = (PathBuf::from(&half.path), PathBuf::from(&full.path));
    fleet_checkpoint::verify(&full).unwrap();
    for name in ["tokenizer.json", "tokenizer.model", "chat_template.jinja"] {
        assert_eq!(fs::read(full.join(name)).unwrap(), fs::read(dir.path().join(name)).unwrap(), "{name}");
    }
    assert_eq!(read(&full.join("tokenizer_config.json")), read(&dir.path().join("tokenizer_config.json")));
    // The tokenizer's own end, 2, is what documents end with.
    assert_eq!(read(&full.join("generation_config.json"))["eos_token_id"], json!([1, 7, 2]));
    assert_eq!(read(&full.join("generation_config.json"))["temperature"], 0.5);
    let config = read(&full.join("config.json"));
    for (key, value) in [
        ("eos_token_id", json!([1, 2])),
        ("bos_token_id", json!(0)),
        ("my_key", json!({"kept": true})),
        ("dtype", json!("float32")),
        ("rope_theta", json!(5e5)),
        ("max_position_embeddings", json!(96)),
        ("architectures", json!(["LlamaForCausalLM"])),
    ] {
        assert_eq!(config[key], value, "{key}");
    }
    assert!(greedy(&full, "The river").is_ok());

    // The source has lost all but what a run needs of it.
    let kept = half.with_file_name("kept");
    fs::rename(&half, &kept).unwrap();
    for name in ["tokenizer.model", "chat_template.jinja", "generation_config.json"] {
        fs::remove_file(dir.path().join(name)).unwrap();
    }
    let again = launch(&job, 1, kept.to_str(), None).checkpoints().pop().unwrap();
    let again = PathBuf::from(&again.path);
    assert_eq!(again, full);
    for name in ["tokenizer.model", "chat_template.jinja", "generation_config.json", "config.json"] {
        assert_eq!(fs::read(again.join(name)).unwrap(), fs::read(kept.join(name)).unwrap(), "{name}");
    }
}

/// An answer ends with what the model's own template writes behind it, which transformers has to know to end there.
#[test]
fn a_model_that_learnt_answers_ends_where_its_template_does() {
    for is_rows in [true, false] {
        let (data, dir) = (tempfile::tempdir().unwrap(), copy_of("byte_level"));
        let template = "{% for m in messages %}{{ m['content'] }}<|begin_of_text|>{% endfor %}";
        fs::write(dir.path().join("chat_template.jinja"), template).unwrap();
        change(&dir.path().join("generation_config.json"), json!({"eos_token_id": [2]}));
        let mut job = tuned(data.path(), dir.path());
        if is_rows {
            let talk = |at: usize| json!({"messages": [{"role": "user", "content": format!("river {at}")}, {"role": "assistant", "content": "runs"}]});
            let path = data.path().join("rows.jsonl");
            fs::write(&path, (0..16).map(|at| format!("{}\n", talk(at))).collect::<String>()).unwrap();
            job.data.paths = vec![path];
            job.data.rows = Some(Rows::default());
        }
        let ends = if is_rows { json!([2, 0]) } else { json!(2) };
        let last = PathBuf::from(&launch(&job, 1, None, None).checkpoints().pop().unwrap().path);
        assert_eq!(read(&last.join("generation_config.json"))["eos_token_id"], ends, "rows: {is_rows}");
    }
}

/// Transformers 5 takes its own class for this family, which adds tokens for what has no role: the model has no rows for them.
#[test]
fn roles_that_a_class_of_transformers_would_add_tokens_for_are_named() {
    let (data, dir) = (tempfile::tempdir().unwrap(), copy_of("byte_level"));
    fs::write(dir.path().join("tokenizer_config.json"), r#"{"eos_token": "<|eot_id|>"}"#).unwrap();
    fs::write(dir.path().join("special_tokens_map.json"), "{}").unwrap();
    for (family, named) in [("qwen2", json!("<|eot_id|>")), ("llama", json!(null))] {
        let path = dir.path().display();
        let text = format!(
            "max_seq_len = 16\ndata.path = \"x\"\ntokenizer.path = \"{path}\"\n[model]\nmodel_type = \"{family}\"\nhidden_size = 32\nnum_attention_heads = 4\nnum_hidden_layers = 1"
        );
        let (described, _) = parse_toml(&text, dir.path()).unwrap();
        let checkpoints = tempfile::tempdir().unwrap();
        let job = Job {
            model: described.model,
            output_dir: checkpoints.path().to_owned(),
            max_seq_len: 16,
            ..tuned(data.path(), dir.path())
        };
        let last = launch(&job, 1, None, None).checkpoints().pop().unwrap();
        let settings = read(&Path::new(&last.path).join("tokenizer_config.json"));
        assert_eq!((&settings["pad_token"], &settings["unk_token"]), (&named, &named), "{family}");
    }
}

/// As transformers 4.57 and 5.17 write them, and as both read them from the settings.
#[test]
fn further_chat_templates_come_along() {
    let (data, dir) = (tempfile::tempdir().unwrap(), copy_of("byte_level"));
    let templates = dir.path().join("additional_chat_templates");
    fs::create_dir(&templates).unwrap();
    fs::write(templates.join("tool_use.jinja"), "{{ tools }}").unwrap();
    fs::write(templates.join("rag.jinja"), "é").unwrap();
    fs::write(dir.path().join("chat_template.jinja"), "usual").unwrap();
    let job = tuned(data.path(), dir.path());
    let all = json!([{"name": "default", "template": "usual"}, {"name": "rag", "template": "é"}, {"name": "tool_use", "template": "{{ tools }}"}]);
    let [half, full] = <[_; 2]>::try_from(launch(&job, 1, None, None).checkpoints()).unwrap();
    assert_eq!(read(&Path::new(&full.path).join("tokenizer_config.json"))["chat_template"], all);
    assert!(!Path::new(&full.path).join("chat_template.jinja").exists());
    fs::remove_dir_all(templates).unwrap();
    fs::remove_file(dir.path().join("chat_template.jinja")).unwrap();
    let again = launch(&job, 1, Some(&half.path), None).checkpoints().pop().unwrap();
    assert_eq!(read(&Path::new(&again.path).join("tokenizer_config.json"))["chat_template"], all);
}

#[test]
fn a_begin_stands_before_every_document_of_a_model_that_wants_one() {
    let (data, dir) = (tempfile::tempdir().unwrap(), copy_of("metaspace"));
    let job = tuned(data.path(), dir.path());
    let files = fleet_data::DataFiles::find(&job, &|_| {}).unwrap();
    let (cache, _) = fleet_data::TokenCache::build_or_open(&job, &files, &|_| {}).unwrap();
    assert_eq!(cache.meta().eos_id, 2, "the tokenizer's, not the first that config.json names");
    let tokens: Vec<i64> = (0..cache.train().len())
        .flat_map(|at| {
            let mut window = vec![0; 16];
            cache.train().read(at, &mut window);
            window
        })
        .collect();
    let ends = tokens.windows(2).filter(|pair| pair[0] == 2);
    assert!(ends.clone().count() > 3 && ends.clone().all(|pair| pair[1] == 1), "{tokens:?}");
    assert_eq!(tokens[0], 1);
}

#[test]
fn a_new_model_has_what_transformers_needs_to_take_its_tokenizer_as_it_is() {
    let data = tempfile::tempdir().unwrap();
    let checkpoint = launch(&job(data.path()), 1, None, None).checkpoints().pop().unwrap();
    let path = PathBuf::from(&checkpoint.path);
    let tokenizer = read(&path.join("tokenizer_config.json"));
    assert_eq!(
        tokenizer,
        json!({"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "clean_up_tokenization_spaces": false,
            "model_max_length": 16, "tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": ["input_ids", "attention_mask"]})
    );
    let generation = read(&path.join("generation_config.json"));
    assert_eq!(generation, json!({"bos_token_id": 0, "eos_token_id": 0}));
    let config = read(&path.join("config.json"));
    assert_eq!((&config["bos_token_id"], &config["eos_token_id"]), (&json!(0), &json!(0)));
}

#[test]
fn a_head_that_differs_from_the_embedding_it_should_be_tied_to_stays_a_head() {
    let untied = greedy(&golden("metaspace"), "The river").unwrap();
    let dir = copy_of("metaspace");
    change(&dir.path().join("config.json"), json!({"tie_word_embeddings": true}));
    assert_eq!(greedy(dir.path(), "The river").unwrap().text, untied.text);
    assert!(Tensors::open(dir.path()).unwrap().get("lm_head.weight").is_some());

    let dir = copy_of("legacy");
    change(&dir.path().join("config.json"), json!({"tie_word_embeddings": null}));
    let error = greedy(dir.path(), "The river").unwrap_err().to_string();
    assert!(error.contains("lack lm_head.weight"), "{error}");
}
