//! A decoder's shape and tables. It owns no weights and makes no decisions about training; it computes on slices that it is given.

use crate::adapter::{LowRank, Wide};
use crate::block::{Noise, Pass};
use crate::product::{Out, Products, RowWeights, Storage, grown};
use crate::workspace::{Keep, Saved, Workspace};
use fleet_common::model::{Decoder, Linear, Positions, Wiring};
use fleet_kernels::{self as kernels, Heads, RopeTable, Sight};
use fleet_learn::{Batch, Gradients, Host, HostWeights, Result, Tally, UnitWeights, Units, Weigh};
use std::ops::Range;

/// Shape and tables of a model.
pub struct Network {
    pub decoder: Decoder,
    pub wiring: Wiring,
    rope: Option<RopeTable>,
    /// For each head, where positions are told by slopes.
    slopes: Vec<f32>,
}

/// How forward and backward are computed.
pub struct Way<'a, 'w> {
    /// Of the loss, for gradients.
    pub scale: f32,
    /// Of so many blocks the forward is computed a second time.
    pub again: usize,
    pub weigh: Option<&'a mut Weigh<'w>>,
}

/// How the tokens of a pass are cut into sequences.
#[derive(Clone, Copy)]
pub(crate) enum Texts<'a> {
    Equal {
        batch: usize,
        seq: usize,
    },
    /// Of these lengths.
    Of(&'a [usize]),
}

impl<'a> Texts<'a> {
    fn of(batch: &Batch<'a>) -> Texts<'a> {
        match batch.lengths {
            Some(lengths) => Texts::Of(lengths),
            None => Texts::Equal { batch: batch.sequences(), seq: batch.seq },
        }
    }
}

/// A stream, another one that takes its place, and what is kept of a block, where there is no backward.
pub(crate) fn two<'a, E>(
    stream: &'a mut [Vec<f32>],
    saved: &'a mut [Saved<E>],
) -> (&'a mut Vec<f32>, &'a mut Vec<f32>, &'a mut Saved<E>) {
    let (x, out) = stream.split_at_mut(1);
    (&mut x[0], &mut out[0], &mut saved[0])
}

/// The gradient of a weight as the target of a product.
pub(crate) fn grad<E>(sink: &mut dyn Gradients, range: Range<usize>) -> Out<'_, E> {
    match sink.fresh() {
        true => Out::Set(sink.range(range)),
        false => Out::Add(sink.range(range)),
    }
}

/// Gradients of what follows a first slice.
pub(crate) struct Further<'a>(pub &'a mut dyn Gradients);

impl Gradients for Further<'_> {
    fn range(&mut self, range: Range<usize>) -> &mut [f32] {
        self.0.range(range)
    }
    fn fresh(&self) -> bool {
        false
    }
}

/// The gradient of what is summed piece by piece: zeroed where it is the first.
pub(crate) fn summed(sink: &mut dyn Gradients, range: Range<usize>) -> &mut [f32] {
    let fresh = sink.fresh();
    let sums = sink.range(range);
    if fresh {
        sums.fill(0.0);
    }
    sums
}

impl Network {
    /// For sequences of at most `positions` tokens, and longer ones that go on from such a one token by token.
    pub fn new(decoder: Decoder, wiring: Wiring, positions: usize) -> Self {
        let slopes = match &decoder.positions {
            Positions::Alibi => decoder.attention.alibi_slopes(),
            Positions::Rotary(_) | Positions::Learned { .. } => Vec::new(),
        };
        let mut network = Self { decoder, wiring, rope: None, slopes };
        network.turn(positions);
        network
    }

    /// Makes it one for sequences of at most `positions` tokens.
    pub(crate) fn made_for(&mut self, positions: usize) {
        match &self.decoder.positions {
            Positions::Rotary(rotary) if rotary.is_turned_by_length() => self.turn(positions),
            _ => self.reach(positions),
        }
    }

    fn turn(&mut self, positions: usize) {
        if let Positions::Rotary(rotary) = &self.decoder.positions {
            let (frequencies, amplitude) = (rotary.frequencies(positions), rotary.amplitude());
            self.rope = Some(RopeTable::from_frequencies(positions, &frequencies, amplitude));
        }
    }

    /// Makes it good for `positions` tokens. Those that were there before stay turned as they are.
    pub(crate) fn reach(&mut self, positions: usize) {
        if let (Positions::Rotary(rotary), Some(table)) = (&self.decoder.positions, &mut self.rope) {
            for len in table.positions() + 1..=positions {
                table.push(&rotary.frequencies(len), rotary.amplitude());
            }
        }
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

    pub(crate) fn pass<'a, E: Storage>(
        &'a self,
        weights: HostWeights<'a, E>,
        texts: Texts<'a>,
        products: &'a mut Products,
        low: &'a mut LowRank<E>,
    ) -> Pass<'a, E> {
        let (heads, lengths) = match texts {
            Texts::Equal { batch, seq } => (self.heads(batch, seq), None),
            Texts::Of(lengths) => (self.heads(1, lengths.iter().sum()), Some(lengths)),
        };
        Pass {
            network: self,
            weights,
            heads,
            lengths,
            slice: None,
            before: &[],
            noise: Noise::default(),
            products,
            low,
        }
    }

    /// The same in training, where some of what is read is changed at random.
    fn training_pass<'a, E: Storage>(
        &'a self,
        weights: HostWeights<'a, E>,
        texts: Texts<'a>,
        products: &'a mut Products,
        low: &'a mut LowRank<E>,
        noise: Noise<'a>,
    ) -> Pass<'a, E> {
        Pass { noise, ..self.pass(weights, texts, products, low) }
    }

    /// The units whose weights the head reads: its own, and that of the embedding where it is tied.
    fn head_units(&self) -> impl Iterator<Item = usize> {
        let tied = self.wiring.head.weight == self.wiring.embedding;
        tied.then_some(0).into_iter().chain([self.wiring.blocks.len() + 1])
    }

    /// The summed loss; the gradients of `scale` times it go to the units, from the head to the embedding. Of the first `again` blocks nothing
    /// is kept but their inputs: they are computed a second time on the way back. `weigh` is asked between the two.
    pub fn forward_backward<E: Storage>(
        &self,
        units: &mut dyn Units<Host<E>>,
        batch: &Batch,
        Way { scale, again, weigh }: Way,
        products: &mut Products,
        work: &mut Workspace<E>,
    ) -> Result<f64> {
        let (texts, noise) = (Texts::of(batch), Noise::of(batch));
        let blocks = self.wiring.blocks.len();
        let again = again.min(blocks);
        let kept = |number: usize| if again == 0 { number } else { (number + 1).saturating_sub(again) };
        work.resize(&self.decoder, Keep::for_backward(batch.ids.len(), blocks, again))?;
        let Workspace { stream, saved, embedded, scratch, low } = work;

        units.need(0)?;
        self.training_pass(units.weights(), texts, products, low, noise).embed(
            batch.ids,
            &mut stream[0],
            embedded,
            scratch,
        );
        units.release(0);
        for number in 0..blocks {
            let (x, out) = stream[number..].split_at_mut(1);
            let saved = &mut saved[kept(number)];
            units.need(number + 1)?;
            let mut pass = self.training_pass(units.weights(), texts, products, low, noise);
            pass.block_forward(number, &x[0], saved, Some(&mut out[0]), scratch, None);
            units.release(number + 1);
        }

        self.head_units().try_for_each(|unit| units.need(unit))?;
        let (mut batch, counts) = (
            *batch,
            weigh.map(|weigh| {
                let mut pass = self.training_pass(units.weights(), texts, products, low, noise);
                batch.spread(&weigh(&pass.head_losses(&stream[blocks], batch, scratch)))
            }),
        );
        batch.weights = counts.as_deref().or(batch.weights);
        let (weights, sink) = units.numbers();
        let loss = self.training_pass(weights, texts, products, low, noise).head_forward_backward(
            &stream[blocks],
            &batch,
            scale,
            scratch,
            sink,
        );
        self.head_units().for_each(|unit| units.release(unit));
        units.ready(blocks + 1)?;
        let lowest = units.weights().lowest();
        for number in (0..blocks).rev() {
            if number + 1 < lowest {
                units.ready(number + 1)?;
                continue;
            }
            units.need(number + 1)?;
            let (weights, sink) = units.numbers();
            let (mut pass, saved) =
                (self.training_pass(weights, texts, products, low, noise), &mut saved[kept(number)]);
            if number < again {
                pass.block_forward(number, &stream[number], saved, None, scratch, None);
            }
            pass.block_backward(number, &stream[number], saved, scratch, sink);
            units.release(number + 1);
            units.ready(number + 1)?;
        }
        if lowest == 0 {
            units.need(0)?;
            let (weights, sink) = units.numbers();
            let mut pass = self.training_pass(weights, texts, products, low, noise);
            pass.embed_backward(batch.ids, embedded, scratch, sink);
            units.release(0);
        }
        units.ready(0)?;
        Ok(loss)
    }

    /// The loss alone.
    pub fn loss<E: Storage>(
        &self,
        units: &mut dyn UnitWeights<Host<E>>,
        batch: &Batch,
        products: &mut Products,
        work: &mut Workspace<E>,
    ) -> Result<Tally> {
        self.hidden_states(units, batch.ids, Texts::of(batch), products, work, &mut |_, _| {})?;
        self.head_units().try_for_each(|unit| units.need(unit))?;
        let mut pass = self.pass(units.weights(), Texts::of(batch), products, &mut work.low);
        let (loss, hits) = pass.head_loss(&work.stream[0], batch, &mut work.scratch);
        self.head_units().for_each(|unit| units.release(unit));
        Ok(Tally { loss, weight: batch.weight(), tokens: batch.tokens(), hits })
    }

    /// Of each sequence the summed loss of its targets, with what training changes at random where the batch has noise.
    pub fn losses<E: Storage>(
        &self,
        units: &mut dyn UnitWeights<Host<E>>,
        batch: &Batch,
        products: &mut Products,
        work: &mut Workspace<E>,
    ) -> Result<Vec<f64>> {
        let (texts, noise) = (Texts::of(batch), Noise::of(batch));
        self.hidden_states_with(units, (batch.ids, noise), texts, products, work, &mut |_, _| {})?;
        self.head_units().try_for_each(|unit| units.need(unit))?;
        let mut pass = self.training_pass(units.weights(), texts, products, &mut work.low, noise);
        let losses = pass.head_losses(&work.stream[0], batch, &mut work.scratch);
        self.head_units().for_each(|unit| units.release(unit));
        Ok(losses)
    }

    /// Runs the blocks without keeping anything for a backward; leaves the last hidden states in `work.stream[0]`. `layer_done` sees
    /// each layer's rotated `[t, q + 2 kv]` buffer.
    pub(crate) fn hidden_states<E: Storage>(
        &self,
        units: &mut dyn UnitWeights<Host<E>>,
        ids: &[i64],
        texts: Texts,
        products: &mut Products,
        work: &mut Workspace<E>,
        layer_done: &mut dyn FnMut(usize, &[E]),
    ) -> Result<()> {
        self.hidden_states_with(units, (ids, Noise::default()), texts, products, work, layer_done)
    }

    fn hidden_states_with<E: Storage>(
        &self,
        units: &mut dyn UnitWeights<Host<E>>,
        (ids, noise): (&[i64], Noise),
        texts: Texts,
        products: &mut Products,
        work: &mut Workspace<E>,
        layer_done: &mut dyn FnMut(usize, &[E]),
    ) -> Result<()> {
        work.resize(&self.decoder, Keep::for_forward(ids.len()))?;
        let Workspace { stream, saved, embedded, scratch, low } = work;
        let (x, out, saved) = two(stream, saved);
        units.need(0)?;
        self.training_pass(units.weights(), texts, products, low, noise).embed(ids, x, embedded, scratch);
        units.release(0);
        for number in 0..self.wiring.blocks.len() {
            units.need(number + 1)?;
            let mut pass = self.training_pass(units.weights(), texts, products, low, noise);
            pass.block_forward(number, x, saved, Some(out), scratch, None);
            units.release(number + 1);
            layer_done(number, &saved.qkv[..self.heads(1, ids.len()).qkv_len()]);
            std::mem::swap(x, out);
        }
        Ok(())
    }
}

impl<'a, E: Storage> Pass<'a, E> {
    /// `out_to = x_ti w^T`. For a row of each text the time goes into reading `w`: where there is that in half the bytes, it is taken.
    pub(crate) fn times(&mut self, x: &[E], w: &Range<usize>, out: Out<E>, (t, i, o): (usize, usize, usize)) {
        let by_rows = self.products.is_by_rows(t);
        if let Some(compact) = self.weights.compact(w).filter(|_| by_rows) {
            return self.products.by_rows(x, RowWeights::Bf16(compact), out, (t, i, o));
        }
        if let Some(packed) = self.weights.packed(w).filter(|_| by_rows || w.len() > self.products.widened) {
            return self.packed_times(packed, x, w, out, (t, i, o));
        }
        let mut wide = std::mem::take(&mut self.low.wide);
        let weight = self.weight(w, &mut wide);
        self.products.forward(x, weight, out, (t, i, o));
        self.low.wide = wide;
    }

    /// A product's weight, widened into `wide` where it has few bits and is not there already.
    pub(crate) fn weight<'w>(&self, weight: &Range<usize>, wide: &'w mut Wide<E>) -> &'w [E]
    where
        'a: 'w,
    {
        let Some(packed) = self.weights.packed(weight) else { return self.weights.of(weight) };
        if wide.of != *weight {
            let plain = |range: &Range<usize>| self.weights.of(range);
            let outputs = packed.outputs(weight);
            let to = grown(&mut wide.numbers, weight.len());
            packed.widen((weight, &outputs), plain, to, self.workers());
            wide.of = weight.clone();
        }
        &wide.numbers[..weight.len()]
    }

    /// `times` for a matrix that an adapter may have changed, without what its two matrices add.
    fn own_times(&mut self, x: &[E], linear: &Linear, out: Out<E>) {
        match self.weights.has_magnitudes(&linear.weight) {
            true => self.dora_forward(x, linear, out),
            false => {
                self.times(x, &linear.weight, out, (self.tokens(), linear.inputs, linear.outputs));
            }
        }
    }

    /// `out_to = x_ti w^T + bias`.
    pub(crate) fn linear(&mut self, x: &[E], linear: &Linear, out: &mut [E]) {
        let t = self.tokens();
        let out = &mut out[..t * linear.outputs];
        self.own_times(x, linear, Out::Store(out));
        self.add_bias(linear, out);
        self.adapter_forward(x, linear, Out::More(out));
    }

    /// `out_to += x_ti w^T + bias`, in fp32.
    pub(crate) fn linear_add(&mut self, x: &[E], linear: &Linear, out: &mut [f32]) {
        let t = self.tokens();
        let out = &mut out[..t * linear.outputs];
        self.add_bias(linear, out);
        self.own_times(x, linear, Out::Add(out));
        self.adapter_forward(x, linear, Out::Add(out));
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
        sink: &mut dyn Gradients,
    ) {
        let t = self.tokens();
        self.bias_backward(dy, linear, sums, sink);
        if let Some(range) = self.weights.trained(&linear.weight) {
            let target = grad(sink, range);
            self.products.backward_weight(dy, x, target, (t, linear.inputs, linear.outputs));
        }
        self.adapter_weight_backward(dy, x, linear, sink);
    }

    /// The gradient of a bias alone: the sum over rows, by pieces and then in their order.
    pub(crate) fn bias_backward<T: kernels::Element>(
        &self,
        dy: &[T],
        linear: &Linear,
        sums: &mut Vec<f32>,
        sink: &mut dyn Gradients,
    ) {
        let Some(bias) = linear.bias.as_ref().and_then(|bias| self.weights.trained(bias)) else { return };
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
    pub(crate) fn linear_input_backward(&mut self, dy: &[E], linear: &Linear, mut out: Out<E>) {
        let shape = (self.tokens(), linear.inputs, linear.outputs);
        let mut room = std::mem::take(self.low);
        let weight = self.weight(&linear.weight, &mut room.wide);
        let of_own = self.of_own(dy, linear, &room.kept, &mut room.scaled);
        self.products.backward_input(of_own, weight, out.again(), shape);
        *self.low = room;
        self.adapter_input_backward(dy, linear, out.and_more());
    }
}
