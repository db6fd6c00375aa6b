//! `fleet-rank plan` says what a job needs, without running it.

#![allow(clippy::unwrap_used)] // helpers of tests

use fleet_common::job::parse_toml;
use serde_json::Value;
use std::path::Path;
use std::process::Command;

fn plan(settings: &str, ranks: u32) -> Value {
    plan_over(settings, ranks, &[])
}

fn plan_over(settings: &str, ranks: u32, more: &[&str]) -> Value {
    let model = "[model]\nmodel_type = \"llama\"\nvocab_size = 512\nhidden_size = 64\nintermediate_size = 128\nnum_hidden_layers = 12\nnum_attention_heads = 4\nmax_position_embeddings = 64\n";
    let job = format!(
        "batch_size = 32\nmax_seq_len = 64\nthreads_per_rank = 1\n{settings}\n[data]\npath = \"x.txt\"\n{model}"
    );
    let (job, _) = parse_toml(&job, Path::new("/tmp")).unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_fleet-rank"))
        .args(["plan", "--json", "--job", &job.to_json(), "--ranks", &ranks.to_string()])
        .args(more)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn of<'a>(plan: &'a Value, strategy: &str, precision: &str) -> &'a Value {
    let choices = plan["choices"].as_array().unwrap();
    choices.iter().find(|c| c["strategy"] == strategy && c["precision"] == precision).unwrap()
}

#[test]
fn every_choice_is_told_and_one_is_the_jobs() {
    let plan = plan("strategy = \"fsdp\"\nprecision = \"bf16-mixed\"", 4);
    let choices = plan["choices"].as_array().unwrap();
    assert_eq!(choices.len(), 8, "four precisions, two strategies");
    let chosen: Vec<&Value> = choices.iter().filter(|choice| choice["is_job"] == true).collect();
    assert_eq!(chosen, [of(&plan, "fsdp", "bf16-mixed")]);
    let is_measured = |c: &Value| c["tokens_per_s"].as_f64().is_some_and(|speed| speed > 0.0);
    assert!(choices.iter().all(|c| is_measured(c) != (c["precision"] == "16-mixed") && c["fits"] == true));
    let peak = |strategy| of(&plan, strategy, "32")["peak_mib"].as_u64().unwrap();
    assert!(peak("fsdp") <= peak("ddp"), "{plan}");
}

#[test]
fn blocks_that_are_computed_again_keep_less() {
    let kept = |settings| plan(settings, 1)["choices"][0]["activations_mib"].as_u64().unwrap();
    let (all, again) = (kept(""), kept("activation_checkpointing = \"blocks\""));
    assert!(again * 2 < all, "{again} of {all} MiB");
}

#[test]
fn over_nodes_shards_are_those_of_all_ranks_and_a_slow_link_costs() {
    let plan = |link: &str| plan_over("", 4, &["--nodes", "2", "--link", link, "--latency", "50us"]);
    let (fast, slow) = (plan("10Gbit"), plan("1Mbit"));
    assert_eq!(fast["link"], "between nodes 10 Gbit/s and 50µs");
    assert!(fast["auto"].as_str().unwrap().starts_with("ddp: the model fits ("), "{fast}");
    let of_fp32 = fast["choices"].as_array().unwrap().iter().filter(|choice| choice["precision"] == "32");
    let strategies: Vec<&str> = of_fp32.map(|choice| choice["strategy"].as_str().unwrap()).collect();
    assert_eq!(strategies, ["ddp", "hsdp", "fsdp"]);
    assert_eq!(of(&fast, "ddp", "32")["is_job"], true);
    for strategy in ["ddp", "hsdp", "fsdp"] {
        let speed = |plan| of(plan, strategy, "32")["tokens_per_s"].as_f64().unwrap();
        assert!(speed(&slow) * 10.0 < speed(&fast), "{strategy}: {slow} {fast}");
        // No step is faster than the link: each host sends at least half of all gradients.
        let least = f64::from(500_000u32) * 4.0 * 8.0 / 2.0 / 1e6;
        assert!(speed(&slow) < 4.0 * 32.0 * 64.0 / least, "{strategy}: {slow}");
    }
    let optimizer = |strategy| of(&fast, strategy, "32")["optimizer_mib"].as_u64().unwrap();
    assert!(optimizer("fsdp") < optimizer("hsdp"), "{fast}");
}

#[test]
fn the_model_of_costs_is_told_without_a_step() {
    let costs = plan_over("", 8, &["--nodes", "2", "--costs"]);
    let rows = costs["rows"].as_array().unwrap();
    assert!(rows.iter().any(|row| row["operation"] == "all_gather" && row["shared_memory"] == true));
    assert!(rows.iter().all(|row| row["microseconds"].as_f64().unwrap() > 0.0));
}

#[test]
fn a_model_in_bf16_takes_half_of_what_one_in_fp32_does() {
    let plan = plan("", 1);
    let of = |precision: &str, part: &str| of(&plan, "auto", precision)[part].as_u64().unwrap();
    for part in ["weights_mib", "gradients_mib", "optimizer_mib", "saving_mib"] {
        let (whole, half) = (of("32", part), of("bf16-true", part));
        assert!(half <= whole.div_ceil(2) && half > 0, "{part}: {half} of {whole}");
    }
    assert_eq!(of("16-mixed", "weights_mib"), of("bf16-mixed", "weights_mib"));
}
