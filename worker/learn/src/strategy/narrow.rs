//! Weights and moments in bf16, once on each host, in memory that its ranks share. Each rank updates its part of every unit among the ranks of
//! its host: each number is computed in fp32 and rounded once. Norms and biases, which are read in fp32, are there widened as well.

use super::state::{Base, State, Sums};
use super::{Read, Slot};
use crate::error::Result;
use crate::optimizer::{Numbers, Update};
use crate::shim::buffers::SharedSlice;
use crate::units::{HostWeights, Pieces, Places};
use crate::workers::Workers;
use crate::zeros::{Part, zeros};
use fleet_collectives::SharedHost;
use fleet_common::model::Layout;
use fleet_kernels as kernels;
use half::bf16;
use std::borrow::Cow;
use std::ops::Range;
use std::sync::Arc;

pub(super) struct NarrowState {
    base: Base,
    weights: SharedSlice<bf16>,
    moment1: SharedSlice<bf16>,
    moment2: SharedSlice<bf16>,
    /// Norms and biases in fp32.
    vectors: SharedSlice<f32>,
    places: Places,
}

impl NarrowState {
    /// All zeros. A collective call.
    pub fn new(layout: Layout, workers: Arc<Workers>, gang: &mut dyn SharedHost) -> Result<NarrowState> {
        let base = Base::of_host(layout, workers, gang);
        let places = Places::in_a_row(base.layout.ranges(|p| p.role.is_vector()));
        let mut common = || gang.allocate_common(base.layout.len * size_of::<bf16>());
        let [weights, moment1, moment2] = [common()?, common()?, common()?];
        let vectors = gang.allocate_common(places.end() * size_of::<f32>())?;
        Ok(NarrowState {
            base,
            weights: SharedSlice::new(weights),
            moment1: SharedSlice::new(moment1),
            moment2: SharedSlice::new(moment2),
            vectors: SharedSlice::new(vectors),
            places,
        })
    }

    fn of(&self, slot: Slot) -> &SharedSlice<bf16> {
        match slot {
            Slot::Weights => &self.weights,
            Slot::Moment1 => &self.moment1,
            Slot::Moment2 => &self.moment2,
        }
    }

    /// Widens the norms and biases of this rank's parts.
    fn refresh(&mut self) {
        for part in &self.base.parts {
            for (range, place) in self.places.iter() {
                let (start, end) = (range.start.max(part.start), range.end.min(part.end));
                if start < end {
                    let place = place + start - range.start;
                    let wide = self.vectors.part_mut(place..place + end - start);
                    kernels::convert(self.weights.part(start..end), wide);
                }
            }
        }
    }
}

impl State<bf16, bf16> for NarrowState {
    fn base(&self) -> &Base {
        &self.base
    }

    fn weights(&self) -> HostWeights<'_, bf16> {
        let vectors = Pieces::Placed(&self.places, &self.vectors);
        HostWeights::new(vectors, Pieces::Flat(self.weights.all())).with_narrow_tables()
    }

    fn update(
        &mut self,
        update: &Update,
        norm: f64,
        sums: &Sums<'_, bf16>,
        gang: &mut dyn SharedHost,
    ) -> Result<()> {
        for (step, range) in update.over(norm, &self.base.layout, &self.base.parts) {
            let numbers = Numbers {
                master: self.weights.part_mut(range.clone()),
                moment1: self.moment1.part_mut(range.clone()),
                moment2: self.moment2.part_mut(range.clone()),
                copy: None,
                grads: sums(range),
            };
            numbers.update(&step, &self.base.workers);
        }
        self.refresh();
        Ok(gang.barrier()?)
    }

    fn fill(&mut self, slot: Slot, read: &mut Read, gang: &mut dyn SharedHost) -> Result<()> {
        for part in self.base.parts.clone() {
            let mut wide = zeros::<f32>(part.len(), Part::Learner)?;
            read(part.clone(), &mut wide)?;
            let numbers = match slot {
                Slot::Weights => &mut self.weights,
                Slot::Moment1 => &mut self.moment1,
                Slot::Moment2 => &mut self.moment2,
            };
            kernels::convert(&wide, numbers.part_mut(part));
        }
        self.refresh();
        Ok(gang.barrier()?)
    }

    fn flat(&self, slot: Slot) -> Cow<'_, [f32]> {
        let mut wide = vec![0.0; self.base.layout.len];
        kernels::convert(self.of(slot).all(), &mut wide);
        Cow::Owned(wide)
    }

    fn copy_out(
        &mut self,
        slot: Slot,
        ranges: &[Range<usize>],
        out: &mut [f32],
        _gang: &mut dyn SharedHost,
    ) -> Result<()> {
        let mut rest = out;
        for range in ranges {
            let (now, later) = rest.split_at_mut(range.len());
            kernels::convert(self.of(slot).part(range.clone()), now);
            rest = later;
        }
        Ok(())
    }
}
