//! What an adapter adds to a product, `x a^T b^T` times a scale, and to the embedding's rows. Matrices of several modules that read the same `x` are one product: their
//! `a` lie one below the other, and their `b` stand on the diagonal of one matrix.
//!
//! DoRA: each row of a changed matrix keeps the direction that `w + b a` gives it, and has a length of its own that is trained, its magnitude. So outputs
//! are multiplied with a factor, the magnitude over the length of the row, through which, as in PEFT, no gradient flows; what dropout leaves out is left
//! out of what the factor changes.

use crate::Result;
use crate::base::{Base, Matrix};
use crate::dropout::{Rows, seen};
use crate::memory::Weights;
use crate::neftune::Moving;
use crate::network::Leaves;
use fleet_common::model::Linear;
use fleet_learn::adapter::{AddedPart, AddedProduct};
use std::ops::Range;
use tch::{Kind, Tensor};

/// What a pass reads: what a strategy keeps, or a model that is not trained with what is trained beside it.
#[derive(Clone, Copy)]
pub struct View<'a> {
    pub weights: Weights<'a>,
    pub beside: Option<Beside<'a>>,
    /// Of a pass in which embeddings are.
    pub moving: Option<Moving<'a>>,
}

#[derive(Clone, Copy)]
pub struct Beside<'a> {
    pub base: &'a Base,
    /// Or all is as if there were no adapter.
    pub is_on: bool,
    /// Of a pass in which something is dropped.
    pub rows: Option<Rows<'a>>,
}

/// The numbers that an adapter adds to a product with, as leaves of a graph.
pub struct Added {
    weight: Range<usize>,
    /// `[rank, inputs]`.
    a: Tensor,
    /// `[outputs, rank]`, scaled.
    b: Tensor,
    /// `[outputs]`: factors of rows with magnitudes, less one.
    pub changes: Option<Tensor>,
}

impl<'a> View<'a> {
    /// Where the gradients of a range go, if it is trained.
    pub fn place(&self, range: &Range<usize>) -> Option<Range<usize>> {
        match &self.beside {
            None => Some(range.clone()),
            Some(beside) if beside.is_on => beside.base.trained.place(range),
            Some(_) => None,
        }
    }

    /// The weights that have a range, and where in them.
    pub fn find(&self, range: &Range<usize>) -> (Weights<'a>, Range<usize>) {
        match (self.place(range), &self.beside) {
            (None, Some(beside)) => (beside.base.view(), range.clone()),
            (place, _) => (self.weights, place.unwrap_or_else(|| range.clone())),
        }
    }

    /// What is added to the product with this weight, and beside what.
    fn added(&self, weight: &Range<usize>) -> Option<(&'a Base, &'a AddedProduct)> {
        let base = self.beside.filter(|beside| beside.is_on)?.base;
        Some((base, base.trained.added(weight)?))
    }

    /// Whether something is added to the product with this weight.
    pub fn changes(&self, weight: &Range<usize>) -> bool {
        self.added(weight).is_some()
    }

    /// The rows of which something is dropped, and the share.
    fn dropping(&self) -> Option<(Rows<'a>, f32)> {
        let beside = self.beside?;
        let share = beside.base.trained.dropout;
        beside.rows.filter(|_| share > 0.0).map(|rows| (rows, share))
    }

    /// The same for rows of a batch from `first` on.
    pub fn at_row(self, first: usize) -> View<'a> {
        let rows = |rows: Rows<'a>| Rows { first, ..rows };
        View { beside: self.beside.map(|beside| Beside { rows: beside.rows.map(rows), ..beside }), ..self }
    }
}

impl Leaves<'_> {
    /// What an adapter adds to the product with `weight`, `[outputs, inputs]`, if it does.
    pub(crate) fn added(&mut self, linear: &Linear, weight: &Matrix) -> Result<Option<Added>> {
        let Some((base, product)) = self.view().added(&linear.weight) else { return Ok(None) };
        let [rank, inputs] = [product.rank, linear.inputs].map(|size| size as i64);
        let products = self.view().weights.products;
        let a = self.leaf(products.of(&product.a)?, &product.a, &[rank, inputs])?;
        let mut parts = Vec::new();
        for part in &product.parts {
            let shape = [part.outputs.len() as i64, part.ranks.len() as i64];
            let b = self.leaf(products.of(&part.b)?, &part.b, &shape)?.f_mul_scalar(f64::from(part.scale))?;
            let sides = [part.ranks.start, product.rank - part.ranks.end].map(|size| size as i64);
            parts.push(if sides == [0, 0] { b } else { b.f_constant_pad_nd(sides)? });
        }
        let b = one_below_the_other(&product.parts, &parts, linear.outputs)?;
        let mut changes = None;
        if product.is_dora() {
            let lengths = lengths(base.squares(product.number), &weight.widened()?, &a, &b)?;
            let mut factors = Vec::new();
            for part in &product.parts {
                let [start, len] = [part.outputs.start, part.outputs.len()].map(|size| size as i64);
                factors.push(match &part.magnitude {
                    Some(range) => {
                        let magnitude = self.leaf(self.view().weights.exact.of(range)?, range, &[len])?;
                        let length = lengths.f_narrow(0, start, len)?;
                        magnitude.f_to_kind(Kind::Float)?.f_div(&length)?.f_sub_scalar(1.0)?
                    }
                    None => Tensor::f_zeros([len], (Kind::Float, b.device()))?,
                });
            }
            let all = one_below_the_other(&product.parts, &factors, linear.outputs)?;
            changes = Some(all.f_to_kind(b.kind())?);
        }
        Ok(Some(Added { weight: linear.weight.clone(), a, b, changes }))
    }

    /// What `added` adds to the product of `x` with `weight`, which is `own` if it was computed already.
    pub(crate) fn addition(
        &self,
        added: &Added,
        x: &Tensor,
        weight: &Matrix,
        own: Option<&Tensor>,
    ) -> Result<Tensor> {
        let Added { weight: range, a, b, changes } = added;
        let dropping = self.view().dropping();
        let some = dropping.map(|(rows, share)| seen(x, rows, range.start, share)).transpose()?;
        let read = some.as_ref().unwrap_or(x);
        let low = read.f_linear::<&Tensor>(a, None)?.f_linear::<&Tensor>(b, None)?;
        let Some(changes) = changes else { return Ok(low) };
        let own = match own.filter(|_| some.is_none()) {
            Some(own) => own.shallow_clone(),
            None => weight.product(read, None)?,
        };
        Ok(own.f_add(&low)?.f_mul(changes)?.f_add(&low)?)
    }

    /// What an adapter adds to the embedding's rows of `ids`, if it does. Nothing is dropped there.
    pub(crate) fn added_rows(&mut self, ids: &Tensor) -> Result<Option<Tensor>> {
        let Some(beside) = self.view().beside.filter(|beside| beside.is_on) else { return Ok(None) };
        let Some(table) = beside.base.trained.embedding() else { return Ok(None) };
        let rank = table.rank as i64;
        let of = |range: &Range<usize>| range.len() as i64 / rank;
        let residual = self.network().residual_of(self.view().weights);
        let a = self.leaf(residual.of(&table.a)?, &table.a, &[of(&table.a), rank])?;
        let b = self.leaf(residual.of(&table.b)?, &table.b, &[of(&table.b), rank])?;
        let low = Tensor::f_embedding(&a, ids, -1, false, false)?.f_mul_scalar(f64::from(table.scale))?;
        Ok(Some(low.f_linear::<&Tensor>(&b, None)?))
    }
}

/// Parts of a product's outputs in their places, with zeros for outputs that are in none.
fn one_below_the_other(parts: &[AddedPart], numbers: &[Tensor], outputs: usize) -> Result<Tensor> {
    let (mut all, mut end) = (Vec::new(), 0);
    let zeros = |count: usize, like: &Tensor| -> Result<Tensor> {
        let mut shape = like.size();
        shape[0] = count as i64;
        Ok(Tensor::f_zeros(shape, (like.kind(), like.device()))?)
    };
    for (part, numbers) in parts.iter().zip(numbers) {
        if part.outputs.start > end {
            all.push(zeros(part.outputs.start - end, numbers)?);
        }
        all.push(numbers.shallow_clone());
        end = part.outputs.end;
    }
    if let Some(last) = numbers.last().filter(|_| end < outputs) {
        all.push(zeros(outputs - end, last)?);
    }
    match &all[..] {
        [one] => Ok(one.shallow_clone()),
        all => Ok(Tensor::f_cat(all, 0)?),
    }
}

/// The length of each row of `w + b a`: `|w + b a|^2 = |w|^2 + b (2 a w^T + a a^T b)`, so that the sum is never there. That of a row of zeros, which stays
/// one whatever it is multiplied with, is one.
fn lengths(squares: &Tensor, w: &Tensor, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let _guard = tch::no_grad_guard();
    let float = |x: Tensor| x.f_to_kind(Kind::Float);
    let at = a.f_transpose(0, 1)?;
    let (wa, aa, b) = (float(w.f_matmul(&at)?)?, float(a.f_matmul(&at)?)?, float(b.shallow_clone())?);
    let more = wa.f_mul_scalar(2.0)?.f_add(&b.f_matmul(&aa)?)?.f_mul(&b)?;
    let squares = squares.f_add(&more.f_sum_dim_intlist([1].as_slice(), false, Kind::Float)?)?;
    let lengths = squares.f_clamp_min(0.0)?.f_sqrt()?;
    Ok(lengths.f_masked_fill(&lengths.f_eq(0.0)?, 1.0)?)
}
