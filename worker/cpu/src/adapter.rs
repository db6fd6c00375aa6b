//! What an adapter adds to a product: `x a^T b^T`, and its gradients. Matrices of several modules that read the same `x` are one product: their
//! `a` lie one below the other, and their `b`, with the scales in them, stand on the diagonal of one matrix.

use crate::block::Pass;
use crate::network::grad;
use crate::product::{Out, Storage, grown};
use fleet_common::model::Linear;
use fleet_learn::units::Added;
use fleet_learn::{Gradients, dropout};

/// What is used again from product to product; grows as it is needed.
#[derive(Default)]
pub(crate) struct LowRank<E> {
    /// `[t, rank]`: what the first matrices give.
    low: Vec<E>,
    /// `[t, rank]`: its gradient.
    flow: Vec<E>,
    /// `[outputs, rank]`.
    b: Vec<E>,
    /// Its gradient.
    db: Vec<f32>,
    /// `[t, inputs]`: what of `x` is not dropped.
    seen: Vec<E>,
    /// `[t, inputs]`: a gradient before what is dropped is taken out.
    rows: Vec<E>,
    /// `[outputs, inputs]`: a matrix of few bits, widened for a product.
    pub wide: Vec<E>,
}

impl<E: Storage> Pass<'_, E> {
    /// Adds to `out_to` what an adapter adds to the product of `x_ti` with a weight.
    pub(crate) fn adapter_forward(&mut self, x: &[E], linear: &Linear, out: Out<E>) {
        let Some(added) = self.weights.added(&linear.weight) else { return };
        let (t, i, o, r) = (self.tokens(), linear.inputs, linear.outputs, added.product.rank);
        let mut room = std::mem::take(self.low);
        let LowRank { low, b, seen, .. } = &mut room;
        let (low, b) = (grown(low, t * r), on_diagonal(&added, o, grown(b, o * r)));
        let x = self.seen(x, linear, seen);
        self.products.forward(x, added.a, Out::Store(low), (t, i, r));
        self.products.forward(low, b, out, (t, r, o));
        *self.low = room;
    }

    /// The gradients of both matrices, for `x_ti` and the gradient `dy_to` of the product.
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
        let LowRank { low, flow, b, db, seen, .. } = &mut room;
        let (low, flow) = (grown(low, t * r), grown(flow, t * r));
        let (b, db) = (on_diagonal(&added, o, grown(b, o * r)), grown(db, o * r));
        let x = self.seen(x, linear, seen);
        self.products.forward(x, added.a, Out::Store(low), (t, i, r));
        self.products.backward_weight(dy, low, Out::Set(db), (t, r, o));
        for part in &added.product.parts {
            let fresh = sink.fresh();
            let own = part.ranks.len();
            let rows = part.outputs.clone().zip(sink.range(part.b.clone()).chunks_exact_mut(own));
            for (row, sums) in rows {
                let from = &db[row * r..][part.ranks.clone()];
                for (sum, from) in sums.iter_mut().zip(from) {
                    *sum = if fresh { 0.0 } else { *sum } + part.scale * from;
                }
            }
        }
        self.products.backward_input(dy, b, Out::Store(flow), (t, r, o));
        self.products.backward_weight(flow, x, grad(sink, added.product.a.clone()), (t, i, r));
        *self.low = room;
    }

    /// Adds to `out_ti` what flows back through the adapter, for the gradient `dy_to` of the product.
    pub(crate) fn adapter_input_backward(&mut self, dy: &[E], linear: &Linear, out: Out<E>) {
        let Some(added) = self.weights.added(&linear.weight) else { return };
        let (t, i, o, r) = (self.tokens(), linear.inputs, linear.outputs, added.product.rank);
        let mut room = std::mem::take(self.low);
        let LowRank { flow, b, rows, .. } = &mut room;
        let (flow, b) = (grown(flow, t * r), on_diagonal(&added, o, grown(b, o * r)));
        self.products.backward_input(dy, b, Out::Store(flow), (t, r, o));
        match self.weights.dropout().zip(self.noise) {
            None => self.products.backward_input(flow, added.a, out, (t, i, r)),
            Some((share, noise)) => {
                let rows = grown(rows, t * i);
                self.products.backward_input(flow, added.a, Out::Store(rows), (t, i, r));
                self.drop(linear, share, noise, rows);
                out.add(rows, self.workers());
            }
        }
        *self.low = room;
    }

    /// What the first matrix sees of `x_ti`.
    fn seen<'x>(&self, x: &'x [E], linear: &Linear, room: &'x mut Vec<E>) -> &'x [E] {
        let x = &x[..self.tokens() * linear.inputs];
        let Some((share, noise)) = self.weights.dropout().zip(self.noise) else { return x };
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
                let (sequence, position) = self.place(piece * pieces + at);
                let seed = dropout::of_row(noise[sequence], linear.weight.start, position);
                dropout::apply(seed, share, row);
            }
        });
    }
}

/// `[outputs, rank]` of all parts, with zeros where a part's outputs do not hang on another one's ranks.
fn on_diagonal<'a, E: Storage>(added: &Added<E>, outputs: usize, to: &'a mut [E]) -> &'a [E] {
    let r = added.product.rank;
    debug_assert_eq!(to.len(), outputs * r);
    to.fill(E::from_f32(0.0));
    for (part, b) in added.product.parts.iter().zip(&added.b) {
        let (start, own, first) = (part.ranks.start, part.ranks.len(), part.outputs.start);
        b.each(|at, x| to[(first + at / own) * r + start + at % own] = E::from_f32(part.scale * x));
    }
    to
}
