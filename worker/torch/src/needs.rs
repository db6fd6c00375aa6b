//! What the torch executor and its strategies need in memory, before anything runs.

use crate::gathered::Gathered;
use crate::network::Numbers;
use crate::parts::{Held, Parts, Seat};
use fleet_common::model::{Activation, Decoder, Form, Layout, NormKind, Positions};
use fleet_learn::adapter::{AddedProduct, Trained};
use fleet_learn::strategy::Needs;
use tch::Kind;

/// Most numbers of logits that exist at once on the CPU.
pub(crate) const LOGITS_MAX: usize = 1 << 20;
/// Fewest tokens whose logits are computed at once.
pub(crate) const LOGIT_ROWS_MIN: usize = 64;

/// Bytes that each of `ranks` ranks, which keep a model together, keeps on its device; of one alone what is `held` does not matter.
pub fn needs(layout: &Layout, held: Held, numbers: Numbers, ranks: usize) -> Needs {
    let (kept, copied) = numbers.bytes();
    if ranks == 1 {
        let len = layout.len;
        return Needs { weights: (kept + copied) * len, gradients: kept * len, optimizer: 2 * kept * len };
    }
    let seat = Seat::flat(0, ranks);
    let Parts { shard, rooms, .. } = Parts::new(layout, held.gradients, &seat);
    Needs {
        weights: kept * shard + Gathered::bytes(layout, held.weights, numbers, &seat),
        gradients: kept * (shard + rooms),
        optimizer: 2 * kept * shard,
    }
}

/// What the first step adds to the program: pages of libtorch's libraries, and the buffers of their products.
pub const PROGRAM: usize = 72 << 20;

/// A step, by all that its memory hangs on.
#[derive(Clone, Copy)]
pub struct Pass<'a> {
    pub decoder: &'a Decoder,
    /// An adapter that is trained beside it.
    pub trained: Option<&'a Trained>,
    pub numbers: Numbers,
    pub tokens: usize,
    /// Blocks whose forward is computed a second time.
    pub again: usize,
}

/// Bytes that a step on the CPU takes: what autograd keeps, and what the widest operations take on the way.
pub fn activation_bytes(pass: Pass) -> usize {
    let Pass { decoder, trained, numbers, tokens, again } = pass;
    let step = Step::of(decoder, numbers);
    let step = match trained {
        Some(trained) => step.beside(trained, decoder.layers, numbers),
        None => step,
    };
    let inputs = again * tokens * step.stream;
    let block = tokens * step.block;
    // The block whose backward it is has its gradients beside what is kept of it; that of the head begins when all blocks are kept.
    let backward = block + step.block_gradients;
    let kept = (decoder.layers - again) * block + step.head(tokens).max(backward);
    let computed_again = if again > 0 { block + backward } else { 0 };
    (inputs + kept.max(computed_again)).max(step.table_gradients)
}

/// Bytes that the process holds for such a step: between tensors that come and go the C library's allocator leaves holes, the more the more
/// sizes there are. Measured with models of 64 to 768 numbers for each token (`tests/memory.rs`).
pub fn held_bytes(pass: Pass) -> usize {
    let percent = if is_turned(pass.decoder) && !is_copied(pass.decoder, pass.numbers) { 34 } else { 17 };
    activation_bytes(pass) / 100 * (100 + percent)
}

fn is_turned(decoder: &Decoder) -> bool {
    matches!(decoder.positions, Positions::Rotary(_))
}

/// Few heads of keys and values serve many by copies.
fn is_copied(decoder: &Decoder, numbers: Numbers) -> bool {
    decoder.attention.heads != decoder.attention.kv_heads && numbers.products == Kind::Float
}

/// Bytes of a decoder's parts: for each token, and of gradients as autograd gives them, before they are added up.
struct Step {
    /// A block's input.
    stream: usize,
    /// What is kept of a block.
    block: usize,
    block_gradients: usize,
    table_gradients: usize,
    /// What is kept of the final norm, and what flows back.
    last: usize,
    /// Of one row of logits, of which two forms are there at a time.
    logits: usize,
    vocab: usize,
    head_gradients: usize,
}

impl Step {
    fn of(decoder: &Decoder, numbers: Numbers) -> Step {
        let size = Kind::elt_size_in_bytes;
        let (p, r) = (size(numbers.products), size(numbers.residual));
        let (a, h, f, v) = (&decoder.attention, decoder.hidden_size, decoder.mlp.size, decoder.vocab_size);
        let (q, kv) = (a.q_size(), a.kv_heads * a.head_dim);
        let is_parallel = decoder.form == Form::Parallel;
        // What a norm keeps beside its input: of RMS the quotient, and the input widened; in any case what products read.
        let widened = if numbers.residual == Kind::Float { 0 } else { 4 };
        let norm = h * if decoder.norm.kind == NormKind::Rms { widened + 4 + p } else { p };
        let norms = if is_parallel { norm } else { 2 * norm };
        let stream = if is_parallel { h * r } else { 2 * h * r };
        // Queries and keys, turned where they are, and values; where few heads of keys serve many, their copies in the place of values.
        let is_turned = is_turned(decoder);
        let turned = if is_turned { q + kv } else { 0 };
        let given = match (is_copied(decoder, numbers), is_turned) {
            (true, true) => 2 * q,
            (true, false) => q + 2 * kv + 2 * q,
            (false, _) => q + 2 * kv,
        };
        let attention = p * (given + turned + q);
        let mlp = p * match (decoder.mlp.gated, decoder.mlp.activation) {
            (true, _) => 4 * f,
            (false, Activation::Relu) => f,
            (false, _) => 2 * f,
        };
        let matrices = if decoder.mlp.gated { 3 } else { 2 };
        let e = decoder.embedding_size;
        Step {
            stream: h * r,
            block: norms + stream + attention + mlp,
            block_gradients: p * (h * (q + 2 * kv) + q * h + matrices * h * f),
            table_gradients: r * v * e,
            last: norm + 2 * h * r,
            logits: 8 * v,
            vocab: v,
            head_gradients: p * v * e,
        }
    }

    /// Where an adapter is trained: the model's own parameters have no gradients, but for those that are trained themselves, and changed products keep more.
    fn beside(mut self, trained: &Trained, layers: usize, numbers: Numbers) -> Step {
        let (p, is_dropping) = (Kind::elt_size_in_bytes(numbers.products), trained.dropout > 0.0);
        let of_product = |added: &AddedProduct| {
            let (inputs, outputs) = (added.a.len() / added.rank, added.parts.iter().map(|p| p.outputs.len()));
            // What is seen, and of which numbers it is; of DoRA what factors multiply.
            let seen = if is_dropping { inputs * (p + 1) } else { 0 };
            let multiplied = if added.is_dora() { p * outputs.sum::<usize>() } else { 0 };
            added.rank * p + seen + multiplied
        };
        self.block += trained.products().map(of_product).sum::<usize>().div_ceil(layers);
        let all = trained.layout.len * Kind::elt_size_in_bytes(numbers.residual);
        self.block_gradients = self.block_gradients.min(all);
        self.table_gradients = self.table_gradients.min(all);
        self.head_gradients = self.head_gradients.min(all);
        self
    }

    fn head(&self, tokens: usize) -> usize {
        let rows = (LOGITS_MAX / self.vocab).max(LOGIT_ROWS_MIN).min(tokens);
        tokens * self.last + rows * self.logits + self.head_gradients
    }
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
            assert!(fsdp.total() * 3 < ddp.total() * 2 && ddp.optimizer == fsdp.optimizer, "{numbers:?}");
        }
    }

    #[test]
    fn blocks_that_are_computed_again_keep_what_they_read() {
        let decoder = model().decoder;
        let of = |numbers, again| {
            activation_bytes(Pass { decoder: &decoder, trained: None, numbers, tokens: 1024, again })
        };
        assert!(of(Numbers::FP32, 20) * 4 < of(Numbers::FP32, 0));
        assert!(of(Numbers::FP32, 10) < of(Numbers::FP32, 0));
        assert!(of(Numbers::BF16_MIXED, 0) < of(Numbers::FP32, 0));
    }
}
