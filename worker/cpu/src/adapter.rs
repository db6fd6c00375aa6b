//! What an adapter adds to a product: `x a^T b^T`, and its gradients. Matrices of several modules that read the same `x` are one product: their
//! `a` lie one below the other, and their `b`, with all that they are multiplied with, stand on the diagonal of one matrix.

use crate::block::Pass;
use crate::dora::Magnitudes;
use crate::network::{grad, summed};
use crate::product::{Out, Products, Storage, grown};
use fleet_common::model::Linear;
use fleet_kernels as kernels;
use fleet_learn::units::{Added, AddedRows};
use fleet_learn::{Gradients, dropout};
use std::ops::Range;

/// What is used again from product to product; grows as it is needed.
#[derive(Default)]
pub(crate) struct LowRank<E> {
    /// By the number of a changed product.
    pub kept: Vec<Kept<E>>,
    /// `[outputs, rank]`: the gradient of `b`, or what the model's own matrix makes of `a`.
    pub db: Vec<f32>,
    /// `[rank, rank]`: products of the rows of `a`.
    pub among: Vec<f32>,
    /// `[t, inputs]`: what of `x` is not dropped.
    pub seen: Vec<E>,
    /// `[t, inputs]`: a gradient before what is dropped is taken out.
    rows: Vec<E>,
    /// `[t, outputs]`: what the model's own matrix gives.
    pub own: Vec<f32>,
    /// `[t, outputs]`: the gradient of that.
    pub scaled: Vec<E>,
    pub wide: Wide<E>,
}

/// A matrix of few bits, widened for products: the last one that was asked for.
#[derive(Default)]
pub(crate) struct Wide<E> {
    pub of: Range<usize>,
    /// `[outputs, inputs]`.
    pub numbers: Vec<E>,
}

/// What a pass keeps of a changed product from forward to backward.
#[derive(Default)]
pub(crate) struct Kept<E> {
    /// `[outputs, rank]`, on the diagonal.
    b: Vec<E>,
    /// `[t, rank]`: what the first matrices give.
    low: Vec<E>,
    /// `[t, rank]`: its gradient, where either way back has computed it.
    flow: Vec<E>,
    has_flow: bool,
    pub magnitudes: Magnitudes,
}

impl<E: Storage> Kept<E> {
    /// Of the product with this number.
    pub fn of(kept: &mut Vec<Kept<E>>, number: usize) -> &mut Kept<E> {
        if kept.len() <= number {
            kept.resize_with(number + 1, Kept::default);
        }
        &mut kept[number]
    }

    fn flow(&mut self, products: &mut Products, dy: &[E], (t, r, o): (usize, usize, usize)) -> &[E] {
        let flow = grown(&mut self.flow, t * r);
        if !std::mem::replace(&mut self.has_flow, true) {
            products.backward_input(dy, &self.b[..o * r], Out::Store(flow), (t, r, o));
        }
        flow
    }
}

impl<'a, E: Storage> Pass<'a, E> {
    /// Adds to `out_to` what an adapter adds to the product of `x_ti` with a weight.
    pub(crate) fn adapter_forward(&mut self, x: &[E], linear: &Linear, out: Out<E>) {
        let Some(added) = self.weights.added(&linear.weight) else { return };
        let (t, i, o, r) = (self.tokens(), linear.inputs, linear.outputs, added.product.rank);
        let mut room = std::mem::take(self.low);
        let LowRank { kept, seen, .. } = &mut room;
        let Kept { b, low, has_flow, magnitudes, .. } = Kept::of(kept, added.product.number);
        let (b, low) = (grown(b, o * r), grown(low, t * r));
        self.on_diagonal(&added, magnitudes, b);
        let x = self.seen(x, linear, seen);
        self.products.forward(x, added.a, Out::Store(low), (t, i, r));
        self.products.forward(low, b, out, (t, r, o));
        *has_flow = false;
        *self.low = room;
    }

    /// The gradients of what an adapter has beside a weight, for `x_ti` and the gradient `dy_to` of the product.
    pub(crate) fn adapter_weight_backward(
        &mut self,
        dy: &[E],
        x: &[E],
        linear: &Linear,
        sink: &mut dyn Gradients,
    ) {
        let Some(added) = self.weights.added(&linear.weight) else { return };
        let (t, i, o, r) = (self.tokens(), linear.inputs, linear.outputs, added.product.rank);
        let mut room = std::mem::take(self.low);
        let LowRank { kept, db, seen, own, wide, .. } = &mut room;
        let (kept, db) = (Kept::of(kept, added.product.number), grown(db, o * r));
        let x = self.seen(x, linear, seen);
        self.products.backward_weight(dy, &kept.low[..t * r], Out::Set(db), (t, r, o));
        for part in &added.product.parts {
            let fresh = sink.fresh();
            let rows = sink.range(part.b.clone()).chunks_exact_mut(part.ranks.len());
            for (output, row) in part.outputs.clone().zip(rows) {
                let factor = part.scale * kept.magnitudes.factor(output);
                let from = &db[output * r..][part.ranks.clone()];
                for (sum, from) in row.iter_mut().zip(from) {
                    *sum = if fresh { 0.0 } else { *sum } + factor * from;
                }
            }
        }
        if added.product.is_dora() {
            let weight = self.weight(&linear.weight, wide);
            let own = grown(own, t * o);
            self.products.forward(x, weight, Out::Set(own), (t, i, o));
            kept.magnitudes.backward(&added, (dy, own, db), self.products.workers(), sink);
        }
        let flow = kept.flow(self.products, dy, (t, r, o));
        self.products.backward_weight(flow, x, grad(sink, added.product.a.clone()), (t, i, r));
        *self.low = room;
    }

    /// Adds to `out_ti` what flows back through the adapter, for the gradient `dy_to` of the product.
    pub(crate) fn adapter_input_backward(&mut self, dy: &[E], linear: &Linear, out: Out<E>) {
        let Some(added) = self.weights.added(&linear.weight) else { return };
        let (t, i, o, r) = (self.tokens(), linear.inputs, linear.outputs, added.product.rank);
        let mut room = std::mem::take(self.low);
        let LowRank { kept, rows, scaled, wide, .. } = &mut room;
        let kept = Kept::of(kept, added.product.number);
        match self.dropping() {
            None => {
                let flow = kept.flow(self.products, dy, (t, r, o));
                self.products.backward_input(flow, added.a, out, (t, i, r));
            }
            Some((share, noise)) => {
                let rows = grown(rows, t * i);
                let mut through = Out::Store(&mut *rows);
                if added.product.is_dora() {
                    let scaled = kept.magnitudes.changes(dy, grown(scaled, t * o), self.products.workers());
                    let weight = self.weight(&linear.weight, wide);
                    self.products.backward_input(scaled, weight, through.again(), (t, i, o));
                    through = Out::More(&mut *rows);
                }
                let flow = kept.flow(self.products, dy, (t, r, o));
                self.products.backward_input(flow, added.a, through, (t, i, r));
                self.drop(linear, share, noise, rows);
                out.add(rows, self.workers());
            }
        }
        *self.low = room;
    }

    /// The share that is dropped, and what decides of what, where something is.
    pub(crate) fn dropping(&self) -> Option<(f32, &'a [u64])> {
        self.weights.dropout().zip(self.noise.sequences)
    }

    /// Adds to `out`, the embedding's rows of `ids`, what an adapter adds to them. Nothing is dropped there.
    pub(crate) fn adapter_rows(&mut self, ids: &[i64], out: &mut [f32]) {
        let Some(added) = self.weights.added_rows() else { return };
        let (t, r) = (ids.len(), added.table.rank);
        let mut room = std::mem::take(self.low);
        let low = rows_of(&added, ids, &mut room.db, &mut room.seen);
        let width = out.len() / t;
        self.products.forward(low, added.b, Out::Add(out), (t, r, width));
        *self.low = room;
    }

    /// The gradients of both matrices beside the embedding, for `dy`, those of its rows of `ids`.
    pub(crate) fn adapter_rows_backward(&mut self, ids: &[i64], dy: &[E], sink: &mut dyn Gradients) {
        let Some(added) = self.weights.added_rows() else { return };
        let (t, r, width) = (ids.len(), added.table.rank, dy.len() / ids.len());
        let mut room = std::mem::take(self.low);
        let LowRank { db, seen, own, .. } = &mut room;
        let low = rows_of(&added, ids, db, seen);
        self.products.backward_weight(dy, low, grad(sink, added.table.b.clone()), (t, r, width));
        let flow = grown(own, t * r);
        self.products.backward_input(dy, added.b, Out::Set(flow), (t, r, width));
        flow.iter_mut().for_each(|x| *x *= added.table.scale);
        kernels::embedding_backward(flow, r, ids, summed(sink, added.table.a.clone()));
        *self.low = room;
    }

    /// What of `x_ti` an adapter sees.
    pub(crate) fn seen<'x>(&self, x: &'x [E], linear: &Linear, room: &'x mut Vec<E>) -> &'x [E] {
        let x = &x[..self.tokens() * linear.inputs];
        let Some((share, noise)) = self.dropping() else { return x };
        let seen = grown(room, x.len());
        seen.copy_from_slice(x);
        self.drop(linear, share, noise, seen);
        seen
    }

    /// Makes a share of the numbers of `rows_ti` zero and the others larger by as much, alike in forward and backward.
    fn drop(&self, linear: &Linear, share: f32, noise: &[u64], rows: &mut [E]) {
        let i = linear.inputs;
        let pieces = self.workers().share(self.tokens(), 1);
        self.workers().pieces(rows, pieces * i, |piece, rows| {
            for (at, row) in rows.chunks_exact_mut(i).enumerate() {
                let (sequence, position) = self.place(self.first() + piece * pieces + at);
                let seed = dropout::of_row(noise[sequence], linear.weight.start, position);
                dropout::apply(seed, share, row);
            }
        });
    }

    /// `[outputs, rank]` of all parts, with zeros where a part's outputs do not hang on another one's ranks.
    fn on_diagonal(&self, added: &Added<E>, magnitudes: &Magnitudes, to: &mut [E]) {
        let r = added.product.rank;
        let share = self.workers().share(to.len() / r, 1);
        self.workers().pieces(to, share * r, |piece, rows| {
            rows.fill(E::from_f32(0.0));
            for (at, row) in rows.chunks_exact_mut(r).enumerate() {
                let output = piece * share + at;
                let mut parts = added.product.parts.iter().zip(&added.b);
                if let Some((part, b)) = parts.find(|(part, _)| part.outputs.contains(&output)) {
                    let factor = part.scale * magnitudes.factor(output);
                    let first = (output - part.outputs.start) * part.ranks.len();
                    b.scaled(first, factor, &mut row[part.ranks.clone()]);
                }
            }
        });
    }
}

/// `[t, rank]`: the rows of `ids` of the first matrix, scaled.
fn rows_of<'a, E: Storage>(
    added: &AddedRows<E>,
    ids: &[i64],
    wide: &mut Vec<f32>,
    rows: &'a mut Vec<E>,
) -> &'a [E] {
    let len = ids.len() * added.table.rank;
    let (wide, rows) = (grown(wide, len), grown(rows, len));
    added.a.rows(added.table.rank, ids, wide);
    rows.iter_mut().zip(wide).for_each(|(row, x)| *row = E::from_f32(added.table.scale * *x));
    rows
}
