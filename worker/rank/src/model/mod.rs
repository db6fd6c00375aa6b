//! The Llama decoder: an embedding, blocks and a head, each with an explicit backward. It owns no weights and makes no decisions about
//! training; it computes on slices that it is given.
//!
//! Legend: b sequences, s tokens of a sequence, t = b s tokens, h hidden, q = heads * head_dim, f intermediate, v vocabulary.

mod block;
pub mod config;
mod decode;
mod head;
pub mod init;
mod layout;
pub mod weights;
mod workspace;

pub use decode::Cache;
pub use head::Loss;
pub use layout::{BlockLayout, Layout, Parameter};
pub use workspace::Workspace;

use crate::product::{Products, Storage};
use fleet_common::job::LlamaConfig;
use fleet_kernels::{self as kernels, Heads, RopeTable};
use half::bf16;
use std::ops::Range;

/// Shape and tables of a model.
pub struct Llama {
    pub config: LlamaConfig,
    pub layout: Layout,
    rope: RopeTable,
}

/// The flat parameters, and what products read of them.
#[derive(Clone, Copy)]
pub struct Weights<'a, E> {
    master: &'a [f32],
    products: &'a [E],
}

impl<'a, E: Storage> Weights<'a, E> {
    /// `copy` is as long as `master` under bf16-mixed and not looked at in fp32.
    pub fn new(master: &'a [f32], copy: &'a [bf16]) -> Self {
        Self { master, products: E::weights(master, copy) }
    }
}

/// Token ids of `b` sequences of `s`, and for each the token that follows it.
#[derive(Clone, Copy, Debug)]
pub struct Batch<'a> {
    pub ids: &'a [i64],
    /// `fleet_kernels::IGNORED` where there is none.
    pub targets: &'a [i64],
    pub seq: usize,
}

impl Batch<'_> {
    fn sequences(&self) -> usize {
        self.ids.len() / self.seq
    }
}

/// Where gradients go: accumulated in fp32 at the ranges of the flat buffer.
pub trait Sink {
    /// A range of the gradients. Zero or what earlier micro-batches left, unless `fresh`.
    fn range(&mut self, range: Range<usize>) -> &mut [f32];
    /// Whether this is the first micro-batch of a step: what is there is overwritten.
    fn fresh(&self) -> bool;
    /// The gradients of this unit are complete for this micro-batch.
    fn unit_done(&mut self, unit: &Range<usize>) -> crate::error::Result<()>;
}

impl Llama {
    /// For sequences of at most `positions` tokens.
    pub fn new(config: LlamaConfig, positions: usize) -> Self {
        let layout = Layout::new(&config);
        let rope = RopeTable::new(positions, config.head_dim as usize, config.rope_theta);
        Self { config, layout, rope }
    }

    fn heads(&self, batch: usize, seq: usize) -> Heads {
        Heads {
            batch,
            seq,
            q_heads: self.config.num_attention_heads as usize,
            kv_heads: self.config.num_key_value_heads as usize,
            head_dim: self.config.head_dim as usize,
        }
    }

    fn hidden(&self) -> usize {
        self.config.hidden_size as usize
    }

    fn eps(&self) -> f32 {
        self.config.rms_norm_eps as f32
    }

    /// Loss and, added to `sink`, the gradients of `scale` x the summed loss. Units are done from the head to the embedding.
    pub fn forward_backward<E: Storage>(
        &self,
        weights: Weights<E>,
        batch: Batch,
        scale: f32,
        products: &mut Products,
        work: &mut Workspace<E>,
        sink: &mut impl Sink,
    ) -> crate::error::Result<Loss> {
        let heads = self.heads(batch.sequences(), batch.seq);
        let t = batch.ids.len();
        let h = self.hidden();
        work.resize(self, t, self.layout.blocks.len());
        let Workspace { saved, last, scratch } = work;

        kernels::embedding(
            &weights.master[self.layout.embedding.clone()],
            h,
            batch.ids,
            &mut saved[0].x[..t * h],
        );
        for (layer, block) in self.layout.blocks.iter().enumerate() {
            let (now, later) = saved[layer..].split_at_mut(1);
            let out = later.first_mut().map_or(&mut *last, |next| &mut next.x);
            self.block_forward(block, weights, &heads, products, &mut now[0], out, scratch);
        }
        let loss = self.head_forward_backward(weights, last, batch.targets, scale, products, scratch, sink);
        sink.unit_done(&self.layout.head_unit)?;
        for (layer, block) in self.layout.blocks.iter().enumerate().rev() {
            self.block_backward(block, weights, &heads, products, &mut saved[layer], scratch, sink);
            sink.unit_done(&block.unit)?;
        }
        let fresh = sink.fresh() && self.layout.head != self.layout.embedding;
        let table = sink.range(self.layout.embedding.clone());
        if fresh {
            table.fill(0.0);
        }
        kernels::embedding_backward(&scratch.g[..t * h], h, batch.ids, table);
        sink.unit_done(&self.layout.embedding_unit)?;
        Ok(loss)
    }

    /// The loss alone.
    pub fn loss<E: Storage>(
        &self,
        weights: Weights<E>,
        batch: Batch,
        products: &mut Products,
        work: &mut Workspace<E>,
    ) -> Loss {
        self.hidden_states(weights, batch.ids, batch.seq, products, work, &mut |_, _| {});
        self.head_loss(weights, &work.saved[0].x, batch.targets, products, &mut work.scratch)
    }

    /// `[t, v]` logits of whole sequences.
    pub fn logits<E: Storage>(
        &self,
        weights: Weights<E>,
        ids: &[i64],
        seq: usize,
        products: &mut Products,
        work: &mut Workspace<E>,
    ) -> Vec<f32> {
        self.hidden_states(weights, ids, seq, products, work, &mut |_, _| {});
        self.head_logits(weights, &work.saved[0].x[..ids.len() * self.hidden()], products, &mut work.scratch)
    }

    /// Runs the blocks without keeping anything for a backward; leaves the last hidden states in `work.saved[0].x`. `layer_done` sees
    /// each layer's rotated `[t, q + 2 kv]` buffer.
    fn hidden_states<E: Storage>(
        &self,
        weights: Weights<E>,
        ids: &[i64],
        seq: usize,
        products: &mut Products,
        work: &mut Workspace<E>,
        layer_done: &mut dyn FnMut(usize, &[E]),
    ) {
        let (t, h) = (ids.len(), self.hidden());
        let heads = self.heads(t / seq, seq);
        work.resize(self, t, 1);
        let Workspace { saved, last, scratch } = work;
        let saved = &mut saved[0];
        kernels::embedding(&weights.master[self.layout.embedding.clone()], h, ids, &mut saved.x[..t * h]);
        for (layer, block) in self.layout.blocks.iter().enumerate() {
            self.block_forward(block, weights, &heads, products, saved, last, scratch);
            layer_done(layer, &saved.qkv[..heads.qkv_len()]);
            std::mem::swap(&mut saved.x, last);
        }
    }
}
