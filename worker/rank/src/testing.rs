//! Small models and batches that the tests share.

use crate::error::{Error, Result};
use fleet_common::model::Object;
use fleet_cpu::Sink;
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

/// Gradients in a plain vector.
pub struct VecSink {
    pub grads: Vec<f32>,
    pub fresh: bool,
    pub done: Vec<Range<usize>>,
}

impl Sink for VecSink {
    type Error = Error;

    fn range(&mut self, range: Range<usize>) -> &mut [f32] {
        &mut self.grads[range]
    }
    fn fresh(&self) -> bool {
        self.fresh
    }
    fn unit_done(&mut self, unit: &Range<usize>) -> Result<()> {
        self.done.push(unit.clone());
        Ok(())
    }
}
