//! DoRA: each row of a changed matrix keeps the direction that `w + b a` gives it, and has a length of its own that is trained, its magnitude. So outputs
//! are multiplied with a factor, the magnitude over the length of the row. As in PEFT no gradient flows through that length, and what dropout leaves
//! out is left out of what the factor changes.

use crate::adapter::{Kept, LowRank};
use crate::block::Pass;
use crate::product::{Out, Products, Storage, grown};
use fleet_common::model::Linear;
use fleet_kernels as kernels;
use fleet_learn::units::Added;
use fleet_learn::{Gradients, Workers};

/// Of one product. Empty where an adapter has no magnitudes.
#[derive(Default)]
pub(crate) struct Magnitudes {
    /// Of each output the squared length of the model's own row, which stays.
    squares: Vec<f64>,
    /// Of each output the length of its row with what the adapter adds.
    lengths: Vec<f32>,
    /// What each output is multiplied with.
    factors: Vec<f32>,
    /// The same, less one.
    changes: Vec<f32>,
}

impl Magnitudes {
    pub fn factor(&self, output: usize) -> f32 {
        self.factors.get(output).copied().unwrap_or(1.0)
    }

    /// Finds lengths and factors of today's adapter, for the matrix `w_oi`: `|w + b a|^2 = |w|^2 + b (2 a w^T + a a^T b)`, so that the sum is never there.
    fn measure<E: Storage>(
        &mut self,
        added: &Added<E>,
        weight: &[E],
        (wa, aa): (&mut Vec<f32>, &mut Vec<f32>),
        (i, o): (usize, usize),
        products: &mut Products,
    ) {
        let r = added.product.rank;
        let (wa, aa) = (grown(wa, o * r), grown(aa, r * r));
        products.forward(weight, added.a, Out::Set(wa), (o, i, r));
        products.forward(added.a, added.a, Out::Set(aa), (r, i, r));
        let share = products.workers().share(o, 1);
        if self.squares.is_empty() {
            self.squares.resize(o, 0.0);
            products.workers().pieces(&mut self.squares, share, |piece, squares| {
                let rows = weight[piece * share * i..].chunks_exact(i);
                squares.iter_mut().zip(rows).for_each(|(square, row)| *square = kernels::sum_squares(row));
            });
        }
        self.lengths.resize(o, 0.0);
        self.factors.resize(o, 1.0);
        self.changes.resize(o, 0.0);
        let (squares, wa, aa) = (&self.squares, &*wa, &*aa);
        products.workers().pieces(&mut self.lengths, share, |piece, lengths| {
            let mut row = Vec::new();
            for (output, length) in (piece * share..).zip(lengths) {
                let mut square = squares[output];
                if let Some(at) = added.product.parts.iter().position(|part| part.outputs.contains(&output)) {
                    let (part, wa) =
                        (&added.product.parts[at], &wa[output * r..][added.product.parts[at].ranks.clone()]);
                    row.resize(part.ranks.len(), 0.0);
                    let first = (output - part.outputs.start) * row.len();
                    added.b[at].scaled(first, part.scale, &mut row);
                    for (number, (b, wa)) in row.iter().zip(wa).enumerate() {
                        let aa = &aa[(part.ranks.start + number) * r..][part.ranks.clone()];
                        let among: f64 = aa.iter().zip(&row).map(|(aa, b)| f64::from(aa * b)).sum();
                        square += f64::from(*b) * (2.0 * f64::from(*wa) + among);
                    }
                }
                *length = square.max(0.0).sqrt() as f32;
            }
        });
        for (part, magnitudes) in added.product.parts.iter().zip(&added.magnitudes) {
            for (output, magnitude) in part.outputs.clone().zip(magnitudes.iter()) {
                // A row of zeros stays one, whatever it is multiplied with.
                let length = self.lengths[output];
                let factor = if length > 0.0 { magnitude / length } else { 1.0 };
                (self.factors[output], self.changes[output]) = (factor, factor - 1.0);
            }
        }
    }

    /// `dy_to` times the factors less one.
    pub fn changes<'x, E: Storage>(&self, dy: &[E], to: &'x mut [E], workers: &Workers) -> &'x [E] {
        scale(workers, dy, &self.changes, to);
        to
    }

    /// The gradients of the magnitudes, for those of the outputs, what the model's own matrix gives, and `dy^T` times what the first matrices give.
    pub fn backward<E: Storage>(
        &self,
        added: &Added<E>,
        (dy, own, db): (&[E], &[f32], &[f32]),
        workers: &Workers,
        sink: &mut dyn Gradients,
    ) {
        let (o, r) = (self.lengths.len(), added.product.rank);
        let share = workers.share(own.len() / o, 1) * o;
        let mut sums = vec![0.0; own.len().div_ceil(share) * o];
        let pieces = dy[..own.len()].chunks(share).zip(own.chunks(share)).zip(sums.chunks_mut(o));
        workers.each(pieces, |((dy, own), sums)| kernels::sum_products(dy, own, sums));
        let (total, others) = sums.split_at_mut(o);
        others.chunks(o).for_each(|piece| kernels::add(total, piece));
        let fresh = sink.fresh();
        for (part, b) in added.product.parts.iter().zip(&added.b) {
            let Some(magnitude) = &part.magnitude else { continue };
            let mut row = vec![0.0f32; part.ranks.len()];
            for (at, (output, to)) in part.outputs.clone().zip(sink.range(magnitude.clone())).enumerate() {
                b.scaled(at * row.len(), part.scale, &mut row);
                let db = &db[output * r..][part.ranks.clone()];
                let sum = total[output] + row.iter().zip(db).map(|(b, db)| b * db).sum::<f32>();
                let length = self.lengths[output];
                let gradient = if length > 0.0 { sum / length } else { 0.0 };
                *to = if fresh { 0.0 } else { *to } + gradient;
            }
        }
    }
}

impl<E: Storage> Pass<'_, E> {
    /// `out_to = x_ti w^T`, or that added to it, as an adapter with magnitudes changes it; its own two matrices are left to `adapter_forward`.
    pub(crate) fn dora_forward(&mut self, x: &[E], linear: &Linear, mut out: Out<E>) {
        let added = self.weights.added(&linear.weight).expect("it was asked whether it has magnitudes");
        let (t, i, o) = (self.tokens(), linear.inputs, linear.outputs);
        let mut room = std::mem::take(self.low);
        let LowRank { kept, db, among, seen, own, wide, .. } = &mut room;
        let weight = self.weight(&linear.weight, wide);
        let magnitudes = &mut Kept::of(kept, added.product.number).magnitudes;
        magnitudes.measure(&added, weight, (db, among), (i, o), self.products);
        let own = grown(own, t * o);
        match self.dropping() {
            None => {
                self.products.forward(x, weight, Out::Set(own), (t, i, o));
                spread(self.workers(), own, &magnitudes.factors, out);
            }
            Some(_) => {
                self.products.forward(x, weight, out.again(), (t, i, o));
                let seen = self.seen(x, linear, seen);
                self.products.forward(seen, weight, Out::Set(own), (t, i, o));
                spread(self.workers(), own, &magnitudes.changes, out.and_more());
            }
        }
        *self.low = room;
    }

    /// The gradient of what the model's own matrix gives, where all of it is multiplied with factors: `dy_to` times these. Else `dy_to` as it is.
    pub(crate) fn of_own<'x>(
        &self,
        dy: &'x [E],
        linear: &Linear,
        kept: &[Kept<E>],
        room: &'x mut Vec<E>,
    ) -> &'x [E] {
        let dy = &dy[..self.tokens() * linear.outputs];
        let Some(added) = self.weights.added(&linear.weight) else { return dy };
        if !added.product.is_dora() || self.dropping().is_some() {
            return dy;
        }
        let scaled = grown(room, dy.len());
        scale(self.workers(), dy, &kept[added.product.number].magnitudes.factors, scaled);
        scaled
    }
}

/// `to_to = x_to factors_o`.
fn scale<X: kernels::Element, T: kernels::Element>(
    workers: &Workers,
    x: &[X],
    factors: &[f32],
    to: &mut [T],
) {
    let piece = workers.share(to.len() / factors.len(), 1) * factors.len();
    workers.pieces(to, piece, |number, to| {
        kernels::scale_columns(&x[number * piece..][..to.len()], factors, to);
    });
}

/// The same, to where it goes.
fn spread<E: Storage>(workers: &Workers, x: &[f32], factors: &[f32], out: Out<E>) {
    fn add<T: kernels::Element>(workers: &Workers, x: &[f32], factors: &[f32], to: &mut [T]) {
        let piece = workers.share(to.len() / factors.len(), 1) * factors.len();
        workers.pieces(to, piece, |number, to| {
            kernels::add_scaled_columns(&x[number * piece..][..to.len()], factors, to);
        });
    }
    match out {
        Out::Store(out) => scale(workers, x, factors, &mut out[..x.len()]),
        Out::Set(out) => scale(workers, x, factors, &mut out[..x.len()]),
        Out::Add(out) => add(workers, x, factors, &mut out[..x.len()]),
        Out::More(out) => add(workers, x, factors, &mut out[..x.len()]),
    }
}
