//! Where each parameter lies in the flat buffer of all parameters.
//!
//! The buffer is cut into units, the grain of reduction and of the optimizer: the embedding, each decoder block, the head. Within a
//! block q, k and v lie side by side, gate and up too, so that each group is one product while the Hugging Face names stay views.

use fleet_common::job::LlamaConfig;
use std::ops::Range;

/// Units and parts begin at whole cache lines of every element type.
const ALIGN: usize = 64;

/// One parameter as Hugging Face names it: a view of the flat buffer.
#[derive(Clone, Debug, PartialEq)]
pub struct Parameter {
    pub name: String,
    /// Row-major; `[out, in]` for linear layers.
    pub shape: Vec<usize>,
    /// In elements.
    pub range: Range<usize>,
}

impl Parameter {
    /// Norm weights: kept in fp32 and started at 1.
    pub fn is_norm(&self) -> bool {
        self.shape.len() == 1
    }
}

/// Ranges of one decoder block, in elements of the flat buffer.
#[derive(Clone, Debug)]
pub struct BlockLayout {
    pub unit: Range<usize>,
    pub input_norm: Range<usize>,
    /// `[(heads + 2 kv_heads) * head_dim, hidden]`.
    pub qkv: Range<usize>,
    /// `[hidden, heads * head_dim]`.
    pub o: Range<usize>,
    pub post_norm: Range<usize>,
    /// `[2 * intermediate, hidden]`: gate, then up.
    pub gate_up: Range<usize>,
    /// `[hidden, intermediate]`.
    pub down: Range<usize>,
}

#[derive(Clone, Debug)]
pub struct Layout {
    pub parameters: Vec<Parameter>,
    /// `[vocab, hidden]`.
    pub embedding: Range<usize>,
    pub embedding_unit: Range<usize>,
    pub blocks: Vec<BlockLayout>,
    pub head_unit: Range<usize>,
    pub final_norm: Range<usize>,
    /// `[vocab, hidden]`; the embedding where they are tied.
    pub head: Range<usize>,
    /// Elements of the flat buffer, with padding.
    pub len: usize,
}

impl Layout {
    pub fn new(config: &LlamaConfig) -> Self {
        let c = config;
        let [hidden, inner, vocab] = [c.hidden_size, c.intermediate_size, c.vocab_size].map(|n| n as usize);
        let q = (c.num_attention_heads * c.head_dim) as usize;
        let kv = (c.num_key_value_heads * c.head_dim) as usize;
        let mut b = Builder::default();

        let embedding = b.add("model.embed_tokens.weight", &[vocab, hidden]);
        let embedding_unit = b.end_unit();
        let blocks = (0..c.num_hidden_layers)
            .map(|layer| {
                let name = |part: &str| format!("model.layers.{layer}.{part}.weight");
                let input_norm = b.add(&name("input_layernorm"), &[hidden]);
                b.align();
                let first = b.add(&name("self_attn.q_proj"), &[q, hidden]);
                b.add(&name("self_attn.k_proj"), &[kv, hidden]);
                let last = b.add(&name("self_attn.v_proj"), &[kv, hidden]);
                let o = b.add(&name("self_attn.o_proj"), &[hidden, q]);
                let post_norm = b.add(&name("post_attention_layernorm"), &[hidden]);
                b.align();
                let gate = b.add(&name("mlp.gate_proj"), &[inner, hidden]);
                let up = b.add(&name("mlp.up_proj"), &[inner, hidden]);
                let down = b.add(&name("mlp.down_proj"), &[hidden, inner]);
                BlockLayout {
                    unit: b.end_unit(),
                    input_norm,
                    qkv: first.start..last.end,
                    o,
                    post_norm,
                    gate_up: gate.start..up.end,
                    down,
                }
            })
            .collect();
        let final_norm = b.add("model.norm.weight", &[hidden]);
        b.align();
        let head = match c.tie_word_embeddings {
            true => embedding.clone(),
            false => b.add("lm_head.weight", &[vocab, hidden]),
        };
        let head_unit = b.end_unit();
        Self {
            parameters: b.parameters,
            embedding,
            embedding_unit,
            blocks,
            head_unit,
            final_norm,
            head,
            len: b.next,
        }
    }

    /// All units in the order of the forward pass.
    pub fn units(&self) -> impl Iterator<Item = &Range<usize>> {
        std::iter::once(&self.embedding_unit)
            .chain(self.blocks.iter().map(|block| &block.unit))
            .chain(std::iter::once(&self.head_unit))
    }

    /// Trainable numbers, without padding.
    pub fn count(&self) -> u64 {
        self.parameters.iter().map(|p| p.range.len() as u64).sum()
    }
}

#[derive(Default)]
struct Builder {
    parameters: Vec<Parameter>,
    unit_start: usize,
    next: usize,
}

impl Builder {
    fn add(&mut self, name: &str, shape: &[usize]) -> Range<usize> {
        let range = self.next..self.next + shape.iter().product::<usize>();
        self.next = range.end;
        self.parameters.push(Parameter {
            name: name.to_owned(),
            shape: shape.to_vec(),
            range: range.clone(),
        });
        range
    }

    fn align(&mut self) {
        self.next = self.next.next_multiple_of(ALIGN);
    }

    fn end_unit(&mut self) -> Range<usize> {
        self.align();
        std::mem::replace(&mut self.unit_start, self.next)..self.next
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::tiny_config;

    #[test]
    fn units_cover_the_buffer_and_groups_lie_side_by_side() {
        for tied in [false, true] {
            let config = LlamaConfig { tie_word_embeddings: tied, ..tiny_config() };
            let layout = Layout::new(&config);
            let mut next = 0;
            for unit in layout.units() {
                assert_eq!(unit.start, next);
                assert!(unit.end.is_multiple_of(ALIGN));
                next = unit.end;
            }
            assert_eq!(next, layout.len);
            let block = &layout.blocks[1];
            assert_eq!(block.qkv.len(), (4 + 2 * 2) * 8 * 32);
            assert_eq!(block.gate_up.len(), 2 * 48 * 32);
            assert_eq!(layout.head == layout.embedding, tied);
            let heads = if tied { 1 } else { 2 };
            let block_numbers = (4 + 2 * 2) * 8 * 32 + 32 * 32 + 3 * 48 * 32 + 2 * 32;
            assert_eq!(layout.count(), (heads * 97 * 32 + 2 * block_numbers + 32) as u64);
        }
    }
}
