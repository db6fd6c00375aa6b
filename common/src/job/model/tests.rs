//! New models as `[model]` describes them: what is given back, and what is refused with its line.

use crate::job::formats::Format;
use crate::job::tests::{error, job, parse};
use crate::job::{Job, Model, Tokenizer};

/// The configuration of the new model that the lines of `[model]` describe.
fn described(lines: &str) -> crate::model::Object {
    match job(&format!("[model]\n{lines}")).model {
        Model::New(config) => config,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_model_of_any_family_can_be_described_and_is_given_back() {
    use crate::model::{Decoder, Family, Positions};
    type Holds = fn(&Decoder) -> bool;
    let cases: &[(&str, Holds)] = &[
        ("", |d| (d.hidden_size, d.attention.head_dim, d.max_positions) == (256, 64, 256)),
        ("model_type = \"llama\"\nattention_bias = true\nmlp_bias = true", |d| {
            d.attention.out_bias && d.mlp.bias
        }),
        (
            "rope_parameters = { rope_type = \"linear\", factor = 2 }",
            |d| matches!(&d.positions, Positions::Rotary(r) if format!("{:?}", r.scaling) == "Linear { factor: 2.0 }"),
        ),
        (
            "rope_scaling = { type = \"llama3\", factor = 8, low_freq_factor = 1, high_freq_factor = 4, original_max_position_embeddings = 64 }",
            |d| matches!(&d.positions, Positions::Rotary(r) if format!("{:?}", r.scaling).contains("positions: 64.0")),
        ),
        (
            "rope_parameters = { rope_type = \"yarn\", factor = 4, rope_theta = 5e5 }",
            |d| matches!(&d.positions, Positions::Rotary(r) if r.theta == 5e5),
        ),
        (
            "rope_theta = 5e5\nhidden_act = \"gelu\"\nrope_parameters = { rope_type = \"dynamic\", factor = 4 }",
            |d| matches!(&d.positions, Positions::Rotary(r) if r.theta == 5e5),
        ),
        ("model_type = \"mistral\"", |d| d.attention.windows == [Some(4096); 4]),
        ("model_type = \"mistral\"\nsliding_window = 7\nnum_hidden_layers = 1", |d| {
            d.attention.windows == [Some(7)]
        }),
        ("model_type = \"mistral\"\nsliding_window = \"none\"", |d| d.attention.windows == [None; 4]),
        (
            "model_type = \"qwen2\"\nuse_sliding_window = true\nsliding_window = 9\nmax_window_layers = 3",
            |d| d.attention.qkv_bias && d.attention.windows == [None, None, None, Some(9)],
        ),
        (
            "model_type = \"qwen2\"\nnum_hidden_layers = 1\nuse_sliding_window = true\nlayer_types = [\"sliding_attention\"]",
            |d| d.attention.windows == [Some(4096)],
        ),
        ("model_type = \"qwen3\"\nhead_dim = 128", |d| d.attention.qk_norm && d.attention.head_dim == 128),
        (
            "model_type = \"phi\"\nhidden_size = 64\nnum_attention_heads = 2\npartial_rotary_factor = 0.25",
            |d| d.layers == 24 && matches!(&d.positions, Positions::Rotary(r) if r.width == 8),
        ),
        ("model_type = \"gpt2\"", |d| {
            (d.hidden_size, d.layers, d.max_positions, d.tied) == (768, 12, 1024, true)
        }),
        ("model_type = \"gpt2\"\nn_embd = 64\nn_head = 2\nn_layer = 1\ntie_word_embeddings = false", |d| {
            d.mlp.size == 256 && !d.tied && d.init.scale_residual
        }),
        (
            "model_type = \"opt\"\nword_embed_proj_dim = 32\ndo_layer_norm_before = false\ninit_std = 0.1",
            |d| d.embedding_size == 32 && d.init.std == 0.1 && !d.final_norm,
        ),
        ("model_type = \"bloom\"\nhidden_size = 48\nn_head = 6\nseq_length = 300", |d| {
            d.max_positions == 300
        }),
        (
            "model_type = \"gpt2\"\nresid_pdrop = 0.0\nbos_token_id = 1\neos_token_id = 2\narchitectures = [\"GPT2LMHeadModel\"]",
            |_| true,
        ),
    ];
    let mut seen = Vec::new();
    for (lines, holds) in cases {
        let config = described(lines);
        let (family, decoder) = Family::of_config(&config).unwrap();
        assert!(holds(&decoder), "{lines}: {decoder:?}");
        seen.push(family.model_type);
        let mut whole = job("");
        whole.tokenizer = Tokenizer::Train { vocab_size: 2048 };
        whole.model = Model::New(config);
        let toml = whole.to_toml();
        assert_eq!(
            parse(Format::Toml, &toml, &[]).unwrap_or_else(|e| panic!("{e}\n{toml}")).0,
            whole,
            "{toml}"
        );
        let json = serde_json::to_string(&whole.to_file()).unwrap();
        assert_eq!(parse(Format::Json, &json, &[]).unwrap().0, whole, "{json}");
        assert_eq!(Job::from_json(&whole.to_json()).unwrap(), whole);
    }
    assert!(Family::all().all(|family| seen.contains(&family.model_type)), "{seen:?}");
    let window = parse(
        Format::Json,
        r#"{"model": {"model_type": "mistral", "sliding_window": null}, "data": {"path": "x"}}"#,
        &[],
    );
    assert!(
        matches!(window.unwrap().0.model, Model::New(c) if c["sliding_window"].is_null()),
        "as config.json says it"
    );
    let sets = [
        "data.path=x",
        "model.model_type=gpt2",
        "model.n_embd=64",
        "model.n_head=2",
        "model.activation_function=relu",
    ];
    let (set, _) = parse(Format::Toml, "", &sets).unwrap();
    assert!(matches!(set.model, Model::New(c) if c["n_embd"] == 64 && c["activation_function"] == "relu"));
}

#[test]
fn a_job_without_a_model_type_is_the_llama_that_it_always_was() {
    let config = described(
        "vocab_size = 300\nhidden_size = 128\nnum_hidden_layers = 2\nrope_theta = 5e5\ntie_word_embeddings = true",
    );
    let was = serde_json::json!({
        "model_type": "llama", "vocab_size": 300, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 256, "rms_norm_eps": 1e-6,
        "rope_theta": 5e5, "tie_word_embeddings": true, "initializer_range": 0.02,
    });
    let of = |config: &crate::model::Object| crate::model::Family::of_config(config).unwrap().1;
    assert_eq!(of(&config), of(was.as_object().unwrap()));
}

#[test]
fn a_model_that_its_family_cannot_be_is_refused_with_its_line() {
    let cannot = "the model that `[model]` describes cannot be";
    for (lines, wanted) in [
        ("model_type = \"gemma\"", "job:2: `model.model_type` is the text \"gemma\"; one of llama, mistral, ".into()),
        ("model_type = 5", "job:2: `model.model_type` is 5; one of llama, ".into()),
        (
            "model_type = \"gpt2\"\nhidden_size = 64",
            "job:3: `model.hidden_size` is a key of llama, mistral, qwen2, qwen3, phi, opt, bloom, and the model is of `model.model_type` = \
             \"gpt2\", which has vocab_size, n_embd, ".into(),
        ),
        ("n_embd = 64", "job:2: `model.n_embd` is a key of gpt2, and the model is of `model.model_type` = \"llama\", which has ".into()),
        ("model_type = \"gpt2\"\nrope_theta = 1e4", "job:3: `model.rope_theta` is a key of llama, ".into()),
        (
            "model_type = \"opt\"\nrope_scaling = { factor = 2 }",
            "job:3: `model.rope_scaling.factor` is a key of llama, ".into(),
        ),
        ("partial_rotary_factor = 0.5", "job:2: `model.partial_rotary_factor` is a key of phi, ".into()),
        ("sliding_window = 7", "job:2: `model.sliding_window` is a key of mistral, qwen2, qwen3, and ".into()),
        ("model_type = \"gpt2\"\nn_emb = 64", "job:3: unknown key `model.n_emb`; did you mean `model.n_embd`?".into()),
        ("model_type = \"bloom\"\nn_heads = 4", "job:3: unknown key `model.n_heads`; did you mean `model.n_head`?".into()),
        ("n_layers = 2", "job:2: `model.n_layers` is a key of other tools: write `model.num_hidden_layers`".into()),
        ("model_type = \"gpt2\"\nn_layers = 2", "job:3: unknown key `model.n_layers`; did you mean `model.n_layer`?".into()),
        ("model_type = \"gpt2\"\nn_embd = 100", format!("job:3: {cannot}: n_embd (100) is not a multiple of n_head (12); set n_embd to 96 or 108")),
        ("model_type = \"mistral\"\nsliding_window = 0", format!("job:3: {cannot}: sliding_window is 0, not a positive whole number")),
        (
            "model_type = \"qwen2\"\nuse_sliding_window = true\nlayer_types = [\"full_attention\"]",
            format!("job:4: {cannot}: layer_types has 1 entries, and the model 4 layers"),
        ),
        (
            "hidden_size = 128\n[model.rope_scaling]\nrope_type = \"longrope\"",
            format!("job:4: {cannot}: rope_type is `longrope`; fleet computes default, linear"),
        ),
        ("rope_parameters = { rope_type = \"linear\" }", format!("job:2: {cannot}: rope_type `linear` lacks its factor")),
        ("rope_parameters = { fator = 2 }", "job:2: unknown key `model.rope_parameters.fator`; did you mean `model.rope_parameters.factor`?".into()),
        ("rope_parameters = 2", "job:2: `model.rope_parameters` is 2; a table such as { rope_type = \"linear\", factor = 2 } is wanted".into()),
        (
            "rope_theta = 1e4\nrope_parameters = { rope_theta = 2e4 }",
            "job:3: `model.rope_parameters.rope_theta` is 20000.0, but `model.rope_theta` (job:2), another name of it, is 10000.0; keep one".into(),
        ),
        ("rope_theta = nan", format!("job:2: {cannot}: rope_theta is \"NaN\", not a positive number")),
        ("rope_theta = 1", format!("job:2: {cannot}: rope_theta is 1; it has to be above 1")),
        ("model_type = \"gpt2\"\nn_positions = 64", "job:3: `model.n_positions` (64) is smaller than `max_seq_len` (256): raise it or".into()),
        ("resid_pdrop = 0.1", "job:2: `model.resid_pdrop` is 0.1; 0, for nothing is dropped in training, is wanted".into()),
        ("model_type = \"gpt2\"\narchitectures = [\"LlamaForCausalLM\"]", "job:3: `model.architectures` is a list of 1; [\"GPT2LMHeadModel\"] is wanted".into()),
        ("num_hidden_layers = 1000000", format!("job:2: {cannot}: num_hidden_layers is 1000000; fleet takes at most 4096")),
        ("hidden_size = -1", format!("job:2: {cannot}: hidden_size is -1, not a positive whole number")),
        ("path = \"m\"\nrms_norm_eps = 1e-5", "job:3: `model.rms_norm_eps` and `model.path` do not go together".into()),
        (
            "path = \"m\"\nn_embd = 5\nn_head = 2",
            "job:3: `model.n_embd`, `model.n_head` and `model.path` do not go together: the shape comes from /work/dir/m/config.json; take them, or `model.path`, out".into(),
        ),
        ("path = \"m\"\nn_embd = 5", "job:3: `model.n_embd` and `model.path` do not go together".into()),
        ("path = \"m\"\nmodel_type = \"gpt2\"", "job:3: `model.model_type` and `model.path` do not go together".into()),
    ] {
        let wanted: String = wanted;
        let said = error(&format!("[model]\n{lines}"));
        assert!(said.starts_with(&wanted), "{lines}: {said}");
        assert!(!said.contains('\n'), "{said}");
    }
}
