//! A decoder's shape and tables. It owns no weights and makes no decisions about training; it computes on slices that it is given.

use crate::block::Pass;
use crate::head::{Loss, Score};
use crate::product::{Out, Products, Storage};
use crate::workspace::Workspace;
use fleet_common::model::{Decoder, Layout, Linear, Positions};
use fleet_kernels::{self as kernels, Heads, RopeTable, Sight};
use half::bf16;
use std::ops::Range;

/// Shape and tables of a model.
pub struct Network {
    pub decoder: Decoder,
    pub layout: Layout,
    rope: Option<RopeTable>,
    /// For each head, where positions are told by slopes.
    slopes: Vec<f32>,
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

    /// As products read it.
    pub(crate) fn of(&self, range: &Range<usize>) -> &'a [E] {
        &self.products[range.clone()]
    }

    /// In fp32: norms, biases, tables.
    pub(crate) fn exact(&self, range: &Range<usize>) -> &'a [f32] {
        &self.master[range.clone()]
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
    type Error;
    /// A range of the gradients. Zero or what earlier micro-batches left, unless `fresh`.
    fn range(&mut self, range: Range<usize>) -> &mut [f32];
    /// Whether this is the first micro-batch of a step: what is there is overwritten.
    fn fresh(&self) -> bool;
    /// The gradients of this unit are complete for this micro-batch.
    fn unit_done(&mut self, unit: &Range<usize>) -> Result<(), Self::Error>;
}

/// The gradient of a weight as the target of a product.
pub(crate) fn grad<'a, E>(sink: &'a mut impl Sink, range: &Range<usize>) -> Out<'a, E> {
    match sink.fresh() {
        true => Out::Set(sink.range(range.clone())),
        false => Out::Add(sink.range(range.clone())),
    }
}

/// The gradient of what is summed piece by piece: zeroed where it is the first.
pub(crate) fn summed<'a>(sink: &'a mut impl Sink, range: &Range<usize>) -> &'a mut [f32] {
    let fresh = sink.fresh();
    let sums = sink.range(range.clone());
    if fresh {
        sums.fill(0.0);
    }
    sums
}

impl Network {
    /// For sequences of at most `positions` tokens.
    pub fn new(decoder: Decoder, layout: Layout, positions: usize) -> Self {
        let (rope, slopes) = match &decoder.positions {
            Positions::Rotary(rotary) => {
                let frequencies = rotary.frequencies(positions);
                (Some(RopeTable::from_frequencies(positions, &frequencies, rotary.amplitude())), Vec::new())
            }
            Positions::Alibi => (None, decoder.attention.alibi_slopes()),
            Positions::Learned { .. } => (None, Vec::new()),
        };
        Self { decoder, layout, rope, slopes }
    }

    pub(crate) fn heads(&self, batch: usize, seq: usize) -> Heads {
        let a = &self.decoder.attention;
        Heads { batch, seq, q_heads: a.heads, kv_heads: a.kv_heads, head_dim: a.head_dim }
    }

    pub(crate) fn hidden(&self) -> usize {
        self.decoder.hidden_size
    }

    pub(crate) fn eps(&self) -> f32 {
        self.decoder.norm.eps as f32
    }

    pub(crate) fn rope(&self) -> Option<&RopeTable> {
        self.rope.as_ref()
    }

    /// What block `number` sees.
    pub(crate) fn sight(&self, number: usize) -> Sight<'_> {
        Sight { window: self.decoder.attention.windows[number], slopes: &self.slopes }
    }

    fn pass<'a, E: Storage>(
        &'a self,
        weights: Weights<'a, E>,
        batch: usize,
        seq: usize,
        products: &'a mut Products,
    ) -> Pass<'a, E> {
        Pass { network: self, weights, heads: self.heads(batch, seq), position: 0, products }
    }

    /// Loss and, added to `sink`, the gradients of `scale` x the summed loss. Units are done from the head to the embedding.
    pub fn forward_backward<E: Storage, S: Sink>(
        &self,
        weights: Weights<E>,
        batch: Batch,
        scale: f32,
        products: &mut Products,
        work: &mut Workspace<E>,
        sink: &mut S,
    ) -> Result<Loss, S::Error> {
        let mut pass = self.pass(weights, batch.sequences(), batch.seq, products);
        let units = &self.layout.units;
        let blocks = self.layout.blocks.len();
        work.resize(self, batch.ids.len(), blocks);
        let Workspace { saved, last, embedded, scratch } = work;

        pass.embed(batch.ids, &mut saved[0].x, embedded, scratch);
        for number in 0..blocks {
            let (now, later) = saved[number..].split_at_mut(1);
            let out = later.first_mut().map_or(&mut *last, |next| &mut next.x);
            pass.block_forward(number, &mut now[0], out, scratch, None);
        }
        let loss = pass.head_forward_backward(last, batch.targets, scale, scratch, sink);
        sink.unit_done(&units[blocks + 1])?;
        for number in (0..blocks).rev() {
            pass.block_backward(number, &mut saved[number], scratch, sink);
            sink.unit_done(&units[number + 1])?;
        }
        pass.embed_backward(batch.ids, embedded, scratch, sink);
        sink.unit_done(&units[0])?;
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
        self.forward(weights, batch, false, products, work).loss
    }

    /// The loss, and how many targets are the likeliest token.
    pub fn score<E: Storage>(
        &self,
        weights: Weights<E>,
        batch: Batch,
        products: &mut Products,
        work: &mut Workspace<E>,
    ) -> Score {
        self.forward(weights, batch, true, products, work)
    }

    fn forward<E: Storage>(
        &self,
        weights: Weights<E>,
        batch: Batch,
        wants_hits: bool,
        products: &mut Products,
        work: &mut Workspace<E>,
    ) -> Score {
        self.hidden_states(weights, batch.ids, batch.seq, products, work, &mut |_, _| {});
        let mut pass = self.pass(weights, batch.sequences(), batch.seq, products);
        pass.head_score(&work.saved[0].x, batch.targets, wants_hits, &mut work.scratch)
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
        let mut pass = self.pass(weights, ids.len() / seq, seq, products);
        pass.head_logits(&work.saved[0].x[..ids.len() * self.hidden()], &mut work.scratch)
    }

    /// Runs the blocks without keeping anything for a backward; leaves the last hidden states in `work.saved[0].x`. `layer_done` sees
    /// each layer's rotated `[t, q + 2 kv]` buffer.
    pub(crate) fn hidden_states<E: Storage>(
        &self,
        weights: Weights<E>,
        ids: &[i64],
        seq: usize,
        products: &mut Products,
        work: &mut Workspace<E>,
        layer_done: &mut dyn FnMut(usize, &[E]),
    ) {
        let mut pass = self.pass(weights, ids.len() / seq, seq, products);
        work.resize(self, ids.len(), 1);
        let Workspace { saved, last, embedded, scratch } = work;
        let saved = &mut saved[0];
        pass.embed(ids, &mut saved.x, embedded, scratch);
        for number in 0..self.layout.blocks.len() {
            pass.block_forward(number, saved, last, scratch, None);
            layer_done(number, &saved.qkv[..pass.heads.qkv_len()]);
            std::mem::swap(&mut saved.x, last);
        }
    }

    /// One token after `position` others.
    pub(crate) fn one_token<'a, E: Storage>(
        &'a self,
        weights: Weights<'a, E>,
        position: usize,
        products: &'a mut Products,
    ) -> Pass<'a, E> {
        Pass { network: self, weights, heads: self.heads(1, 1), position, products }
    }
}

impl<E: Storage> Pass<'_, E> {
    /// `out_to = x_ti w^T + bias`.
    pub(crate) fn linear(&mut self, x: &[E], linear: &Linear, out: &mut [E]) {
        let t = self.tokens();
        let out = &mut out[..t * linear.outputs];
        let weight = self.weights.of(&linear.weight);
        self.products.forward(x, weight, Out::Store(out), (t, linear.inputs, linear.outputs));
        self.add_bias(linear, out);
    }

    /// `out_to += x_ti w^T + bias`, in fp32.
    pub(crate) fn linear_add(&mut self, x: &[E], linear: &Linear, out: &mut [f32]) {
        let t = self.tokens();
        let out = &mut out[..t * linear.outputs];
        self.add_bias(linear, out);
        let weight = self.weights.of(&linear.weight);
        self.products.forward(x, weight, Out::Add(out), (t, linear.inputs, linear.outputs));
    }

    fn add_bias<T: kernels::Element>(&self, linear: &Linear, out: &mut [T]) {
        if let Some(bias) = &linear.bias {
            let bias = self.weights.exact(bias);
            let rows = self.workers().share(out.len() / bias.len(), 1);
            self.workers().pieces(out, rows * bias.len(), |_, out| kernels::add_rows(out, bias));
        }
    }

    /// The gradients of a matrix and its bias for what it read and what flows back.
    pub(crate) fn linear_weight_backward(
        &mut self,
        dy: &[E],
        x: &[E],
        linear: &Linear,
        sums: &mut Vec<f32>,
        sink: &mut impl Sink,
    ) {
        let t = self.tokens();
        self.bias_backward(dy, linear, sums, sink);
        let target = grad(sink, &linear.weight);
        self.products.backward_weight(dy, x, target, (t, linear.inputs, linear.outputs));
    }

    /// The gradient of a bias alone: the sum over rows, by pieces and then in their order.
    pub(crate) fn bias_backward<T: kernels::Element>(
        &self,
        dy: &[T],
        linear: &Linear,
        sums: &mut Vec<f32>,
        sink: &mut impl Sink,
    ) {
        let Some(bias) = &linear.bias else { return };
        let (t, width) = (self.tokens(), linear.outputs);
        let share = self.workers().share(t, 1);
        sums.clear();
        sums.resize(t.div_ceil(share) * width, 0.0);
        let pieces = dy[..t * width].chunks(share * width).zip(sums.chunks_mut(width));
        self.workers().each(pieces, |(dy, sums)| kernels::sum_rows(dy, sums));
        let total = summed(sink, bias);
        sums.chunks(width).for_each(|piece| kernels::add(total, piece));
    }

    /// `out_ti = dy_to w`.
    pub(crate) fn linear_input_backward(&mut self, dy: &[E], linear: &Linear, out: Out<E>) {
        let weight = self.weights.of(&linear.weight);
        let t = self.tokens();
        self.products.backward_input(dy, weight, out, (t, linear.inputs, linear.outputs));
    }
}
