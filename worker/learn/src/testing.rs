//! Small models and batches that the tests share.

use crate::error::Result;
use crate::units::{Gradients, Host, HostNumber, HostWeights, UnitWeights, Units};
use fleet_common::model::Object;
use half::bf16;
use serde_json::{Value, json};
use std::ops::Range;

/// Two blocks, grouped-query attention, odd vocabulary.
pub fn tiny_config() -> Object {
    tiny_with(Value::Null)
}

/// That with what `more` says.
pub fn tiny_with(more: Value) -> Object {
    let tiny = json!({
        "model_type": "llama", "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0, "tie_word_embeddings": false, "initializer_range": 0.1,
    });
    let entries = [tiny, more].into_iter().filter_map(|object| object.as_object().cloned());
    entries.flatten().collect()
}

/// Token ids that look random but are not.
pub fn token_ids(count: usize, vocab: usize, seed: u64) -> Vec<i64> {
    (0..count as u64)
        .map(|i| ((i + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15 ^ (seed << 7)) >> 33) as i64 % vocab as i64)
        .collect()
}

/// A model's flat weights and gradients, without a strategy around them.
pub struct Whole {
    pub master: Vec<f32>,
    pub copy: Vec<bf16>,
    pub grads: Sums,
    /// Units whose gradients were said to be ready, in their order.
    pub done: Vec<usize>,
}

pub struct Sums {
    pub numbers: Vec<f32>,
    pub fresh: bool,
}

impl Gradients for Sums {
    fn range(&mut self, range: Range<usize>) -> &mut [f32] {
        &mut self.numbers[range]
    }
    fn fresh(&self) -> bool {
        self.fresh
    }
}

impl Whole {
    /// Gradients are nonsense that the first micro-batch overwrites.
    pub fn new(master: Vec<f32>) -> Whole {
        let copy = master.iter().map(|x| bf16::from_f32(*x)).collect();
        let grads = Sums { numbers: vec![f32::NAN; master.len()], fresh: true };
        Whole { master, copy, grads, done: Vec::new() }
    }

    pub fn flat<E: HostNumber>(&self) -> HostWeights<'_, E> {
        HostWeights::flat(&self.master, &self.copy)
    }
}

impl<E: HostNumber> UnitWeights<Host<E>> for Whole {
    fn need(&mut self, _unit: usize) -> Result<()> {
        Ok(())
    }
    fn release(&mut self, _unit: usize) {}
    fn weights(&self) -> HostWeights<'_, E> {
        self.flat()
    }
}

impl<E: HostNumber> Units<Host<E>> for Whole {
    fn numbers(&mut self) -> (HostWeights<'_, E>, &mut dyn Gradients) {
        (HostWeights::flat(&self.master, &self.copy), &mut self.grads)
    }
    fn ready(&mut self, unit: usize) -> Result<()> {
        self.done.push(unit);
        Ok(())
    }
}
