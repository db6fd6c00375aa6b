//! The seam between computing and everything else. The unit (the embedding, a block, the head) is the grain: an executor asks for a unit's
//! weights, gives them back, and says when its gradients are ready. Where the numbers are in between, who reduces them and who updates
//! them is a strategy's business.

use crate::adapter::{AddedPart, AddedProduct, AddedTable, Packed, Trained};
use crate::error::Result;
use crate::shim::buffers::{Number, SharedSlice};
use fleet_checkpoint::Dtype;
use fleet_kernels::{self as kernels, Element};
use half::bf16;
use std::marker::PhantomData;
use std::ops::Range;

/// Where an executor has its numbers: in the memory of the host, in tensors of a device.
pub trait Memory: 'static {
    /// The weights of the units that were asked for.
    type Weights<'a>;
    /// Where gradients go.
    type Gradients<'a>;
    /// A number that was computed there, and may not have been waited for.
    type Number;

    /// Waits for it.
    fn value(number: Self::Number) -> Result<f64>;
    /// Whether those of a range within one unit are numbers.
    fn all_finite(gradients: Self::Gradients<'_>, range: &Range<usize>) -> Result<bool>;
    /// Whether any of them is not zero.
    fn any(gradients: Self::Gradients<'_>, range: &Range<usize>) -> Result<bool>;
}

/// Weights, unit by unit.
pub trait UnitWeights<M: Memory>: Send {
    /// Brings the weights of `unit` in, where they stay until `release`. What is there costs nothing.
    fn need(&mut self, unit: usize) -> Result<()>;
    /// They will not be looked at until they are needed again.
    fn release(&mut self, unit: usize);
    /// Of all units that are in.
    fn weights(&self) -> M::Weights<'_>;
}

/// Weights and gradients of one micro-batch.
pub trait Units<M: Memory>: UnitWeights<M> {
    /// The weights of all units that are in, and where gradients go.
    fn numbers(&mut self) -> (M::Weights<'_>, M::Gradients<'_>);
    /// The gradients of `unit` are complete for this micro-batch. Units come in turn from the head to the embedding.
    fn ready(&mut self, unit: usize) -> Result<()>;
}

/// The memory of the host, where products read `E`: fp32, or bf16 beside fp32 masters.
pub struct Host<E>(PhantomData<E>);

impl<E: HostNumber> Memory for Host<E> {
    type Weights<'a> = HostWeights<'a, E>;
    type Gradients<'a> = &'a mut dyn Gradients;
    type Number = f64;

    fn value(number: f64) -> Result<f64> {
        Ok(number)
    }
    fn all_finite(gradients: &mut dyn Gradients, range: &Range<usize>) -> Result<bool> {
        Ok(fleet_kernels::all_finite(gradients.range(range.clone())))
    }
    fn any(gradients: &mut dyn Gradients, range: &Range<usize>) -> Result<bool> {
        Ok(gradients.range(range.clone()).iter().any(|number| *number != 0.0))
    }
}

/// How a strategy keeps weights, sums of gradients, and moments.
pub trait Kept: Element + Number {
    /// As files have it.
    const DTYPE: Dtype;
}

impl Kept for f32 {
    const DTYPE: Dtype = Dtype::F32;
}

impl Kept for bf16 {
    const DTYPE: Dtype = Dtype::BF16;
}

/// What products read.
pub trait HostNumber: Element + Number {
    const IS_BF16: bool;
    /// Of the masters and, under bf16-mixed, their copy.
    fn products<'a>(master: Pieces<'a, f32>, copy: Pieces<'a, bf16>) -> Pieces<'a, Self>;
}

impl HostNumber for f32 {
    const IS_BF16: bool = false;
    fn products<'a>(master: Pieces<'a, f32>, _copy: Pieces<'a, bf16>) -> Pieces<'a, f32> {
        master
    }
}

impl HostNumber for bf16 {
    const IS_BF16: bool = true;
    fn products<'a>(_master: Pieces<'a, f32>, copy: Pieces<'a, bf16>) -> Pieces<'a, bf16> {
        copy
    }
}

/// Where ranges of the flat buffer are in a smaller one.
#[derive(Clone, Debug, Default)]
pub struct Places {
    /// In ascending order, with where each begins there.
    ranges: Vec<(Range<usize>, usize)>,
}

impl Places {
    /// `ranges` are in ascending order; those that hold nothing are left out.
    pub fn new(ranges: impl IntoIterator<Item = (Range<usize>, usize)>) -> Places {
        Places { ranges: ranges.into_iter().filter(|(range, _)| !range.is_empty()).collect() }
    }

    /// One behind the other, as many as there are.
    pub fn in_a_row(ranges: impl IntoIterator<Item = Range<usize>>) -> Places {
        let mut next = 0;
        Places::new(ranges.into_iter().map(|range| {
            next += range.len();
            (range.clone(), next - range.len())
        }))
    }

    /// Where `range` is, if one of the ranges holds all of it.
    pub fn find(&self, range: &Range<usize>) -> Option<Range<usize>> {
        let at = self.ranges.partition_point(|(one, _)| one.start <= range.start).checked_sub(1)?;
        let (one, place) = &self.ranges[at];
        let start = place + (range.start - one.start);
        (range.end <= one.end).then(|| start..start + range.len())
    }

    /// The same. Panics where nothing holds it: an executor's mistake.
    pub fn of(&self, range: &Range<usize>) -> Range<usize> {
        let found = if range.is_empty() { Some(0..0) } else { self.find(range) };
        found.expect("a range of what was asked for")
    }

    pub fn iter(&self) -> impl Iterator<Item = &(Range<usize>, usize)> {
        self.ranges.iter()
    }

    /// How long the other buffer is at least.
    pub fn end(&self) -> usize {
        self.ranges.iter().map(|(range, place)| place + range.len()).max().unwrap_or(0)
    }
}

/// Numbers of the flat buffer: all of them, or some.
#[derive(Debug)]
pub enum Pieces<'a, T> {
    Flat(&'a [T]),
    /// Elsewhere, in memory that the ranks of a host share.
    Placed(&'a Places, &'a SharedSlice<T>),
}

impl<T> Clone for Pieces<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Pieces<'_, T> {}

impl<'a, T: Number> Pieces<'a, T> {
    /// A range within one unit. Panics where that unit was not asked for: an executor's mistake.
    pub fn of(&self, range: &Range<usize>) -> &'a [T] {
        match self {
            Pieces::Flat(numbers) => &numbers[range.clone()],
            Pieces::Placed(places, numbers) => numbers.part(places.of(range)),
        }
    }
}

/// The weights that an executor reads on the host.
#[derive(Clone, Copy, Debug)]
pub struct HostWeights<'a, E> {
    master: Pieces<'a, f32>,
    products: Pieces<'a, E>,
    /// Tables are where products read them.
    narrow_tables: bool,
    compact: Option<&'a [bf16]>,
    adapter: Option<OfAdapter<'a, E>>,
    packed: Option<&'a Packed>,
}

/// What is trained beside a base: its own numbers.
#[derive(Clone, Copy, Debug)]
struct OfAdapter<'a, E> {
    trained: &'a Trained,
    master: Pieces<'a, f32>,
    products: Pieces<'a, E>,
    narrow_tables: bool,
}

/// What an adapter adds to a product.
pub struct Added<'a, E> {
    pub product: &'a AddedProduct,
    /// `[rank, inputs]`.
    pub a: &'a [E],
    /// Of each part `[outputs, rank]`.
    pub b: Vec<Table<'a, E>>,
    /// Of each part `[outputs]`, or nothing.
    pub magnitudes: Vec<&'a [f32]>,
}

/// What an adapter adds to the embedding.
pub struct AddedRows<'a, E> {
    pub table: &'a AddedTable,
    /// `[vocabulary, rank]`.
    pub a: Table<'a, E>,
    /// `[width, rank]`.
    pub b: &'a [E],
}

/// A table of which rows are looked up.
#[derive(Clone, Copy, Debug)]
pub enum Table<'a, E> {
    Exact(&'a [f32]),
    Narrow(&'a [E]),
}

impl<E: HostNumber> Table<'_, E> {
    /// `factor` times the numbers from `first` on.
    pub fn scaled<O: Element>(&self, first: usize, factor: f32, out: &mut [O]) {
        fn scaled<T: Element, O: Element>(from: &[T], factor: f32, out: &mut [O]) {
            from.iter().zip(out).for_each(|(x, out)| *out = O::from_f32(factor * x.to_f32()));
        }
        match self {
            Table::Exact(table) => scaled(&table[first..], factor, out),
            Table::Narrow(table) => scaled(&table[first..], factor, out),
        }
    }

    /// The rows of `ids`, each `width` long.
    pub fn rows(&self, width: usize, ids: &[i64], out: &mut [f32]) {
        match self {
            Table::Exact(table) => kernels::embedding(table, width, ids, out),
            Table::Narrow(table) => kernels::embedding(table, width, ids, out),
        }
    }

    /// Adds a row, which is as long as `to`.
    pub fn add_row(&self, row: usize, to: &mut [f32]) {
        let range = row * to.len()..(row + 1) * to.len();
        match self {
            Table::Exact(table) => kernels::add(to, &table[range]),
            Table::Narrow(table) => kernels::add(to, &table[range]),
        }
    }
}

impl<'a, E: HostNumber> HostWeights<'a, E> {
    /// `copy` is not looked at in fp32.
    pub fn new(master: Pieces<'a, f32>, copy: Pieces<'a, bf16>) -> Self {
        let products = E::products(master, copy);
        Self { master, products, narrow_tables: false, compact: None, adapter: None, packed: None }
    }

    /// All units at once.
    pub fn flat(master: &'a [f32], copy: &'a [bf16]) -> Self {
        Self::new(Pieces::Flat(master), Pieces::Flat(copy))
    }

    /// Tables are where products read them.
    pub fn with_narrow_tables(self) -> Self {
        Self { narrow_tables: true, ..self }
    }

    /// Some of the matrices are in few bits.
    pub fn with_packed(self, packed: Option<&'a Packed>) -> Self {
        Self { packed, ..self }
    }

    /// A product's weight, where it is in few bits and has to be widened.
    pub fn packed(&self, weight: &Range<usize>) -> Option<&'a Packed> {
        self.packed.filter(|packed| packed.has(weight) && self.of_adapter(weight).is_none())
    }

    /// These are of an adapter, which is trained beside a `base`: what is asked for is the base's, whatever of it is trained.
    pub fn beside(self, base: HostWeights<'a, E>, trained: &'a Trained) -> Self {
        let Self { master, products, narrow_tables, .. } = self;
        Self { adapter: Some(OfAdapter { trained, master, products, narrow_tables }), ..base }
    }

    /// What an adapter adds to the product with this weight.
    pub fn added(&self, weight: &Range<usize>) -> Option<Added<'a, E>> {
        let OfAdapter { trained, master, products, narrow_tables } = self.adapter?;
        let product = trained.added(weight)?;
        let b = |part: &AddedPart| match narrow_tables {
            true => Table::Narrow(products.of(&part.b)),
            false => Table::Exact(master.of(&part.b)),
        };
        let magnitude = |part: &AddedPart| part.magnitude.as_ref().map_or(&[][..], |range| master.of(range));
        Some(Added {
            a: products.of(&product.a),
            b: product.parts.iter().map(b).collect(),
            magnitudes: product.parts.iter().map(magnitude).collect(),
            product,
        })
    }

    /// What an adapter adds to the embedding's rows.
    pub fn added_rows(&self) -> Option<AddedRows<'a, E>> {
        let OfAdapter { trained, master, products, narrow_tables } = self.adapter?;
        let table = trained.embedding()?;
        let a = match narrow_tables {
            true => Table::Narrow(products.of(&table.a)),
            false => Table::Exact(master.of(&table.a)),
        };
        Some(AddedRows { a, b: products.of(&table.b), table })
    }

    /// Whether an adapter gives magnitudes to rows of this weight.
    pub fn has_magnitudes(&self, weight: &Range<usize>) -> bool {
        let added = self.adapter.and_then(|adapter| adapter.trained.added(weight));
        added.is_some_and(AddedProduct::is_dora)
    }

    /// Where the gradients of this range go, if it is trained.
    pub fn trained(&self, range: &Range<usize>) -> Option<Range<usize>> {
        match self.adapter {
            None => Some(range.clone()),
            Some(adapter) => adapter.trained.place(range),
        }
    }

    /// The share of what it reads that an adapter does not see in a training step, if any.
    pub fn dropout(&self) -> Option<f32> {
        self.adapter.map(|adapter| adapter.trained.dropout).filter(|share| *share > 0.0)
    }

    /// The first unit of which anything is trained.
    pub fn lowest(&self) -> usize {
        self.adapter.map_or(0, |adapter| adapter.trained.lowest())
    }

    /// The same range of the adapter, where it is trained there.
    fn of_adapter(&self, range: &Range<usize>) -> Option<(OfAdapter<'a, E>, Range<usize>)> {
        let adapter = self.adapter?;
        Some((adapter, adapter.trained.place(range)?))
    }

    /// `compact` are the same numbers of all units in bf16, which has to hold each of them exactly.
    pub fn with_compact(self, compact: Option<&'a [bf16]>) -> Self {
        Self { compact, ..self }
    }

    /// The same as `exact` in half the bytes, where there is that.
    pub fn compact(&self, range: &Range<usize>) -> Option<&'a [bf16]> {
        self.compact.map(|all| &all[range.clone()])
    }

    /// As products read it.
    pub fn of(&self, range: &Range<usize>) -> &'a [E] {
        match self.of_adapter(range) {
            Some((adapter, place)) => adapter.products.of(&place),
            None => self.products.of(range),
        }
    }

    /// Embeddings, and tables of positions.
    pub fn table(&self, range: &Range<usize>) -> Table<'a, E> {
        let adapter = self.of_adapter(range).map(|(adapter, _)| adapter.narrow_tables);
        match adapter.unwrap_or(self.narrow_tables) {
            true => Table::Narrow(self.of(range)),
            false => Table::Exact(self.exact(range)),
        }
    }

    /// In fp32: norms and biases.
    pub fn exact(&self, range: &Range<usize>) -> &'a [f32] {
        match self.of_adapter(range) {
            Some((adapter, place)) => adapter.master.of(&place),
            None => self.master.of(range),
        }
    }
}

/// A model that is only read.
impl<E: HostNumber> UnitWeights<Host<E>> for HostWeights<'_, E> {
    fn need(&mut self, _unit: usize) -> Result<()> {
        Ok(())
    }
    fn release(&mut self, _unit: usize) {}
    fn weights(&self) -> HostWeights<'_, E> {
        *self
    }
}

/// Where gradients go on the host: summed in fp32 over micro-batches, at the ranges of the flat buffer.
pub trait Gradients {
    /// A range within one unit: what earlier micro-batches left, or anything where this is the first.
    fn range(&mut self, range: Range<usize>) -> &mut [f32];
    /// Whether this is the first micro-batch of a step: what is there is to be overwritten.
    fn fresh(&self) -> bool;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_found_in_the_one_that_holds_it() {
        let places = Places::new([(0..3, 10), (3..3, 20), (3..5, 0), (8..9, 2)]);
        assert_eq!((places.of(&(1..3)), places.of(&(3..5)), places.of(&(8..9))), (11..13, 0..2, 2..3));
        assert_eq!((places.find(&(2..4)), places.find(&(6..7)), places.find(&(8..10))), (None, None, None));
        assert_eq!((places.of(&(7..7)), places.end()), (0..0, 13));
        assert_eq!(Places::in_a_row([4..6, 9..9, 9..12]).of(&(10..12)), 3..5);
        assert_eq!(Pieces::Flat(&[7.0, 8.0, 9.0]).of(&(1..2)), [8.0]);
    }
}
