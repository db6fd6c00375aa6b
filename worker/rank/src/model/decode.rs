//! One token at a time with a cache of keys and values: generation.

use super::block::norm;
use super::{Llama, Weights, Workspace};
use crate::product::{Out, Products, Storage};
use fleet_kernels as kernels;

/// Keys and values of the tokens so far, of every layer.
pub struct Cache<E> {
    /// `[len, kv_heads * head_dim]` each.
    layers: Vec<(Vec<E>, Vec<E>)>,
    len: usize,
}

impl<E: Storage> Cache<E> {
    pub fn new(model: &Llama) -> Self {
        Self { layers: model.layout.blocks.iter().map(|_| (Vec::new(), Vec::new())).collect(), len: 0 }
    }

    /// Tokens seen.
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

impl Llama {
    /// Fills an empty cache with a prompt; `[v]` logits of the token after it.
    pub fn prefill<E: Storage>(
        &self,
        w: Weights<E>,
        ids: &[i64],
        cache: &mut Cache<E>,
        products: &mut Products,
        work: &mut Workspace<E>,
    ) -> Vec<f32> {
        assert!(cache.is_empty() && !ids.is_empty(), "a prompt for an empty cache");
        let heads = self.heads(1, ids.len());
        let kv = heads.kv_heads * heads.head_dim;
        self.hidden_states(w, ids, ids.len(), products, work, &mut |layer, qkv| {
            let (keys, values) = &mut cache.layers[layer];
            for row in qkv.chunks_exact(heads.qkv_width()) {
                let row = &row[heads.out_width()..];
                keys.extend_from_slice(&row[..kv]);
                values.extend_from_slice(&row[kv..]);
            }
        });
        cache.len = ids.len();
        let h = self.hidden();
        let last = (ids.len() - 1) * h;
        self.head_logits(w, &work.saved[0].x[last..last + h], products, &mut work.scratch)
    }

    /// `[v]` logits of the token after `id`, which is added to the cache.
    pub fn decode<E: Storage>(
        &self,
        w: Weights<E>,
        id: i64,
        cache: &mut Cache<E>,
        products: &mut Products,
        work: &mut Workspace<E>,
    ) -> Vec<f32> {
        let heads = self.heads(1, 1);
        let (h, f) = (self.hidden(), self.config.intermediate_size as usize);
        let (q, qkv_width) = (heads.out_width(), heads.qkv_width());
        let kv = heads.kv_heads * heads.head_dim;
        work.resize(self, 1, 1);
        let position = cache.len;
        let Workspace { saved, scratch, .. } = work;
        let saved = &mut saved[0];
        let (normed, inner) = (&mut scratch.normed[..h], &mut scratch.inner[..f]);
        let (qkv, attention) = (&mut saved.qkv[..qkv_width], &mut saved.attention[..q]);
        let (x, gate_up) = (&mut saved.x[..h], &mut saved.gate_up[..2 * f]);
        let mut rstd = [0.0];
        scratch.kernels.resize_with(scratch.kernels.len().max(1), kernels::Scratch::new);

        kernels::embedding(&w.master[self.layout.embedding.clone()], h, &[id], x);
        for (block, (keys, values)) in self.layout.blocks.iter().zip(&mut cache.layers) {
            norm(products.workers(), x, &w.master[block.input_norm.clone()], self.eps(), normed, &mut rstd);
            products.forward(normed, w.of(&block.qkv), Out::Store(qkv), (1, h, qkv_width));
            kernels::rope(qkv, &heads, &self.rope, position);
            keys.extend_from_slice(&qkv[q..q + kv]);
            values.extend_from_slice(&qkv[q + kv..]);
            kernels::attention_decode(
                &qkv[..q],
                keys,
                values,
                position + 1,
                &heads,
                &kernels::Sight::ALL,
                attention,
                &mut scratch.kernels[0],
            );
            products.forward(attention, w.of(&block.o), Out::Add(x), (1, q, h));
            norm(products.workers(), x, &w.master[block.post_norm.clone()], self.eps(), normed, &mut rstd);
            products.forward(normed, w.of(&block.gate_up), Out::Store(gate_up), (1, h, 2 * f));
            kernels::gated(gate_up, f, kernels::Activation::Silu, inner);
            products.forward(inner, w.of(&block.down), Out::Add(x), (1, f, h));
        }
        cache.len += 1;
        self.head_logits(w, x, products, scratch)
    }
}
