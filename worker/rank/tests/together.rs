//! Several texts generated at the same time: each is what it is alone, bit for bit, in every family, also beside packed weights and adapters.

#![allow(clippy::unwrap_used)] // helpers of tests

use fleet_common::job::Quantization;
use fleet_rank::generate::Sampling;
use fleet_rank::host_model::HostModel;
use std::fs;
use std::path::{Path, PathBuf};

const GREEDY: Sampling = Sampling { temperature: 0.0, top_k: 0, top_p: 1.0, seed: 0 };

/// Tokens that are generated.
const TOKENS: usize = 6;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/parity/golden").join(name)
}

/// Of prompts of several lengths the logits of each token, bit for bit.
fn logits(host: &mut HostModel, prompts: &[Vec<i64>]) -> Vec<Vec<u32>> {
    let mut caches: Vec<_> = prompts.iter().map(|_| host.cache()).collect();
    let mut last: Vec<Vec<f32>> = Vec::new();
    for (prompt, cache) in prompts.iter().zip(&mut caches) {
        last.push(host.prefill(prompt, cache).unwrap());
    }
    let mut all = vec![Vec::new(); prompts.len()];
    for _ in 0..TOKENS {
        let ids: Vec<i64> = last.iter().map(|logits| GREEDY.pick(logits, 0) as i64).collect();
        let together = host.decode(&ids, &mut caches.iter_mut().collect::<Vec<_>>()).unwrap();
        last = together.chunks_exact(last[0].len()).map(<[f32]>::to_vec).collect();
        all.iter_mut().zip(&last).for_each(|(all, logits)| all.extend(logits.iter().map(|x| x.to_bits())));
    }
    all
}

fn check(host: &mut HostModel, what: &str) {
    let prompts: Vec<Vec<i64>> = [3, 7, 1, 12, 5, 2, 9, 4, 6]
        .iter()
        .map(|len| (0..*len).map(|at| (at * len + 3) % 40).collect())
        .collect();
    let together = logits(host, &prompts);
    for (at, prompt) in prompts.iter().enumerate() {
        let alone = logits(host, std::slice::from_ref(prompt));
        assert!(alone[0] == together[at], "{what}: text {at}");
    }
    assert!(together[0] != together[1], "{what}: they are different texts");
}

#[test]
fn a_text_is_what_it_is_alone_in_every_family() {
    let dirs = fs::read_dir(golden("families")).unwrap().map(|entry| entry.unwrap().path());
    // There the angles of a text hang on its length, and texts are written one after the other.
    let dirs: Vec<PathBuf> = dirs.filter(|dir| dir.is_dir() && !dir.ends_with("llama_dynamic")).collect();
    assert!(dirs.len() > 10);
    for dir in dirs {
        for threads in [1, 3] {
            check(&mut HostModel::open(&dir, threads).unwrap(), &dir.display().to_string());
        }
    }
}

#[test]
fn a_text_is_what_it_is_alone_beside_packed_weights_and_an_adapter() {
    for (adapter, base) in
        [("lora", "llama"), ("transposed_dora", "gpt2"), ("embedding", "qwen2"), ("by_head_dora", "bloom")]
    {
        for kind in [Quantization::Nf4, Quantization::Int8] {
            let base = golden("families").join(base);
            let mut host = HostModel::packed(&base, Some(kind), 2, 1).unwrap();
            check(&mut host, &format!("{} in {kind:?}", base.display()));
            let [nothing, with] =
                [vec![], vec![golden("adapters").join(adapter)]].map(|dirs| host.adapters(&dirs).unwrap());
            host.change(&nothing, &with).unwrap();
            check(&mut host, &format!("{adapter} beside {kind:?}"));
        }
    }
}

/// Texts of models that were written in bf16 read their weights in bf16.
#[test]
fn a_text_is_what_it_is_alone_where_weights_are_read_in_half_the_bytes() {
    let base = golden("families").join("llama");
    let mut host = HostModel::open(&base, 2).unwrap();
    check(&mut host, "as they are");
    let (given, mut weights) = fleet_rank::host_model::read_weights(&base, &[]).unwrap();
    weights.iter_mut().for_each(|x| *x = half::bf16::from_f32(*x).to_f32());
    let positions = given.decoder.max_positions;
    check(&mut HostModel::new(given, weights, 2, positions).unwrap(), "in bf16");
}
