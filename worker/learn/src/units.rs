//! The seam between computing and everything else. The unit (the embedding, a block, the head) is the grain: an executor asks for a unit's
//! weights, gives them back, and says when its gradients are ready. Where the numbers are in between, who reduces them and who updates
//! them is a strategy's business.

use crate::error::Result;
use fleet_kernels::Element;
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
}

/// What products read.
pub trait HostNumber: Element {
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

/// Numbers of the flat buffer: all of them, or those of some units.
#[derive(Clone, Copy, Debug)]
pub enum Pieces<'a, T> {
    Flat(&'a [T]),
    /// For each unit, where it begins in the flat buffer and what it holds, nothing where it is not in.
    Units(&'a [(usize, Vec<T>)]),
}

impl<'a, T> Pieces<'a, T> {
    /// A range within one unit. Panics where that unit was not asked for: an executor's mistake.
    pub fn of(&self, range: &Range<usize>) -> &'a [T] {
        match self {
            Pieces::Flat(numbers) => &numbers[range.clone()],
            Pieces::Units(units) => {
                let (start, numbers) = &units[units.partition_point(|(start, _)| *start <= range.start) - 1];
                &numbers[range.start - start..range.end - start]
            }
        }
    }
}

/// The weights that an executor reads on the host.
#[derive(Clone, Copy, Debug)]
pub struct HostWeights<'a, E> {
    master: Pieces<'a, f32>,
    products: Pieces<'a, E>,
    compact: Option<&'a [bf16]>,
}

impl<'a, E: HostNumber> HostWeights<'a, E> {
    /// `copy` is not looked at in fp32.
    pub fn new(master: Pieces<'a, f32>, copy: Pieces<'a, bf16>) -> Self {
        Self { master, products: E::products(master, copy), compact: None }
    }

    /// All units at once.
    pub fn flat(master: &'a [f32], copy: &'a [bf16]) -> Self {
        Self::new(Pieces::Flat(master), Pieces::Flat(copy))
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
        self.products.of(range)
    }

    /// In fp32: norms, biases, tables.
    pub fn exact(&self, range: &Range<usize>) -> &'a [f32] {
        self.master.of(range)
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
    fn a_range_is_found_in_its_unit() {
        let units = [(0, vec![0, 1, 2]), (3, vec![]), (3, vec![3, 4]), (5, vec![5])];
        let pieces = Pieces::Units(&units);
        assert_eq!(
            (pieces.of(&(1..3)), pieces.of(&(3..5)), pieces.of(&(5..6))),
            (&[1, 2][..], &[3, 4][..], &[5][..])
        );
        assert_eq!(Pieces::Flat(&[7, 8, 9]).of(&(1..2)), [8]);
    }
}
