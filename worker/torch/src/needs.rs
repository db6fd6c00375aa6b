//! What the torch executor and its strategies need in memory, before anything runs.

use crate::network::Numbers;
use crate::parts::{Held, Parts};
use fleet_common::model::{Decoder, Form, Layout, NormKind};
use fleet_learn::strategy::Needs;
use tch::Kind;

/// Most numbers of logits that exist at once on the CPU.
pub(crate) const LOGITS_MAX: usize = 1 << 20;
/// Fewest tokens whose logits are computed at once.
pub(crate) const LOGIT_ROWS_MIN: usize = 64;

/// Bytes that each of `ranks` ranks keeps on its device; of one alone what is `held` does not matter.
pub fn needs(layout: &Layout, held: Held, numbers: Numbers, ranks: usize) -> Needs {
    let (kept, copied) = numbers.bytes();
    if ranks == 1 {
        let len = layout.len;
        return Needs { weights: (kept + copied) * len, gradients: kept * len, optimizer: 2 * kept * len };
    }
    let [weights, gradients] =
        [held.weights, held.gradients].map(|rooms| Parts::new(layout, rooms, 0, ranks));
    let shard = weights.shard;
    Needs {
        weights: kept * shard + (kept + copied) * weights.rooms,
        gradients: kept * (shard + gradients.rooms),
        optimizer: 2 * kept * shard,
    }
}

/// Bytes that autograd keeps of `tokens` tokens in a step on the CPU, of which the forward of `again` blocks is computed a second time, and what
/// the widest operations take on the way.
pub fn activation_bytes(decoder: &Decoder, numbers: Numbers, tokens: usize, again: usize) -> usize {
    let size = Kind::elt_size_in_bytes;
    let (p, r) = (size(numbers.products), size(numbers.residual));
    let (a, h, f, v) = (&decoder.attention, decoder.hidden_size, decoder.mlp.size, decoder.vocab_size);
    let (q, kv) = (a.q_size(), a.kv_heads * a.head_dim);
    // What a norm keeps beside its input: of RMS the quotient, and in any case what products read.
    let norm = if decoder.norm.kind == NormKind::Rms { h * (4 + p) } else { h * p };
    let norms = if decoder.form == Form::Parallel { norm } else { 2 * norm };
    let stream = if decoder.form == Form::Parallel { h * r } else { 2 * h * r };
    // Queries and keys before and after they are turned, values, and, where few heads of keys serve many, their copies.
    let copies = if a.heads != a.kv_heads && numbers.products == Kind::Float { 2 * q } else { 0 };
    let attention = p * ((q + 2 * kv) + (q + kv) + copies + q);
    let mlp = p * if decoder.mlp.gated { 4 * f } else { 2 * f };
    let block = tokens * (norms + stream + attention + mlp);
    let blocks = decoder.layers;
    let kept = (blocks - again) * block + again * tokens * h * r;
    let rows = (LOGITS_MAX / v).max(LOGIT_ROWS_MIN).min(tokens);
    // Logits, their logarithms, and what flows back; backward, at the head, begins when all blocks are kept.
    let head = tokens * (norm + 2 * h * r) + rows * v * (2 * p + 8);
    // The block whose backward it is has its gradients beside what is kept of it.
    kept + head.max(block)
}

#[cfg(test)]
mod tests {
    use super::*;
    use fleet_learn::model::Model;
    use fleet_learn::testing::tiny_with;
    use serde_json::json;

    fn model() -> Model {
        Model::new(&tiny_with(json!({"num_hidden_layers": 20, "vocab_size": 512}))).unwrap()
    }

    #[test]
    fn bytes_of_a_parameter_are_those_of_its_precision() {
        let layout = model().layout();
        let of = |numbers, held, ranks| needs(&layout, held, numbers, ranks);
        for (numbers, bytes) in [
            (Numbers::FP32, 16),
            (Numbers::BF16_MIXED, 18),
            (Numbers::FP16_MIXED, 18),
            (Numbers::BF16_TRUE, 8),
        ] {
            assert_eq!(of(numbers, Held::DDP, 1).total(), bytes * layout.len, "{numbers:?}");
            let [ddp, fsdp] = [Held::DDP, Held::FSDP].map(|held| of(numbers, held, 4));
            assert!(fsdp.total() * 2 < ddp.total() && ddp.optimizer == fsdp.optimizer, "{numbers:?}");
        }
    }

    #[test]
    fn blocks_that_are_computed_again_keep_what_they_read() {
        let decoder = model().decoder;
        let of = |numbers, again| activation_bytes(&decoder, numbers, 1024, again);
        assert!(of(Numbers::FP32, 20) * 4 < of(Numbers::FP32, 0));
        assert!(of(Numbers::FP32, 10) < of(Numbers::FP32, 0));
        assert!(of(Numbers::BF16_TRUE, 0) < of(Numbers::BF16_MIXED, 0));
    }
}
