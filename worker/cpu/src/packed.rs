//! Products by weights in few bits that need not be widened whole: of a row for each text, whose time goes into reading them, and piece by piece,
//! where memory is to be spared.

use crate::block::Pass;
use crate::product::{Out, RowWeights, Storage, grown};
use fleet_learn::adapter::Packed;
use std::ops::Range;

/// Rows of a weight that a thread takes at least.
const GRANULE: usize = 16;

impl<E: Storage> Pass<'_, E> {
    /// `out_to = x_ti w^T`.
    pub(crate) fn packed_times(
        &mut self,
        packed: &Packed,
        x: &[E],
        w: &Range<usize>,
        out: Out<E>,
        shape: (usize, usize, usize),
    ) {
        match self.products.is_by_rows(shape.0) {
            true => self.by_rows(packed, x, w, out, shape),
            false => self.piecewise(packed, x, w, out, shape),
        }
    }

    fn by_rows(
        &mut self,
        packed: &Packed,
        x: &[E],
        w: &Range<usize>,
        mut out: Out<E>,
        (t, i, o): (usize, usize, usize),
    ) {
        let (rows, others) = packed.rows(w, &(0..o), self.workers().share(o, GRANULE));
        for outputs in others {
            let weight = self.weights.of(&(w.start + outputs.start * i..w.start + outputs.end * i));
            let made = grown(&mut self.low.own, t * outputs.len());
            self.products.forward(x, weight, Out::Set(made), (t, i, outputs.len()));
            out.again().columns(made, (outputs.start, outputs.len(), o));
        }
        self.products.by_rows(x, RowWeights::FewBits(rows), out, (t, i, o));
    }

    fn piecewise(
        &mut self,
        packed: &Packed,
        x: &[E],
        w: &Range<usize>,
        mut out: Out<E>,
        (t, i, o): (usize, usize, usize),
    ) {
        let most = (self.products.widened / i).max(GRANULE);
        let mut room = std::mem::take(self.low);
        // What is there is not the weight that it was.
        room.wide.of = 0..0;
        for first in (0..o).step_by(most) {
            let outputs = first..o.min(first + most);
            let weight = grown(&mut room.wide.numbers, outputs.len() * i);
            let plain = |range: &Range<usize>| self.weights.of(range);
            packed.widen((w, &outputs), plain, weight, self.workers());
            let made = grown(&mut room.own, t * outputs.len());
            self.products.forward(x, weight, Out::Set(made), (t, i, outputs.len()));
            out.again().columns(made, (first, outputs.len(), o));
        }
        *self.low = room;
    }
}
