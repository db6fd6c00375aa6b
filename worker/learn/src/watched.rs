//! Units that somebody looks at while an executor goes through them.

use crate::error::Result;
use crate::units::{Memory, UnitWeights, Units};

/// Who looks.
pub(crate) trait Watch<M: Memory>: Send {
    /// The executor needs `unit` next.
    fn needed(&mut self, _unit: usize) {}
    /// The gradients of `unit` are complete, and are handed on or kept back.
    fn ready(&mut self, unit: usize, units: &mut dyn Units<M>) -> Result<()> {
        units.ready(unit)
    }
}

/// A strategy's units with one that looks at them.
pub(crate) struct Watched<'a, M: Memory, W> {
    pub units: &'a mut dyn Units<M>,
    pub by: W,
}

impl<M: Memory, W: Watch<M>> UnitWeights<M> for Watched<'_, M, W> {
    fn need(&mut self, unit: usize) -> Result<()> {
        self.by.needed(unit);
        self.units.need(unit)
    }
    fn release(&mut self, unit: usize) {
        self.units.release(unit);
    }
    fn weights(&self) -> M::Weights<'_> {
        self.units.weights()
    }
}

impl<M: Memory, W: Watch<M>> Units<M> for Watched<'_, M, W> {
    fn numbers(&mut self) -> (M::Weights<'_>, M::Gradients<'_>) {
        self.units.numbers()
    }
    fn ready(&mut self, unit: usize) -> Result<()> {
        self.by.ready(unit, self.units)
    }
}
