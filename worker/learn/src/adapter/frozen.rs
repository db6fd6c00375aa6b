//! A model that is not trained: its numbers once on each host, in memory that the host's ranks share, as products read them.

use super::packed::{FewBits, Packed};
use crate::engine::by_parameter;
use crate::error::{Error, Result};
use crate::shim::buffers::SharedSlice;
use crate::strategy::part_on_host;
use crate::units::{HostNumber, HostWeights, Pieces, Places};
use crate::zeros::{Part, zeros};
use fleet_checkpoint::{ModelDir, Reading};
use fleet_collectives::SharedHost;
use fleet_common::job::Precision;
use fleet_common::model::{Layout, Parameter, Role};
use fleet_kernels as kernels;
use half::bf16;
use std::marker::PhantomData;

/// Numbers that are read at a time where they are rounded afterwards.
const CHUNK: usize = 1 << 24;

/// How a frozen model's numbers are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kept {
    Fp32,
    /// What products read in bf16, the rest in fp32.
    Mixed,
    /// All but norms and biases in bf16.
    Bf16,
}

impl Kept {
    pub fn of(precision: Precision) -> Kept {
        match precision {
            Precision::Fp32 => Kept::Fp32,
            Precision::Bf16Mixed | Precision::Fp16Mixed => Kept::Mixed,
            Precision::Bf16True => Kept::Bf16,
        }
    }
}

pub struct Frozen<E> {
    kept: Kept,
    /// In fp32.
    exact: Places,
    exact_numbers: SharedSlice<f32>,
    /// In bf16.
    narrow: Places,
    narrow_numbers: SharedSlice<bf16>,
    /// In few bits.
    packed: Option<Packed>,
    kind: PhantomData<E>,
}

impl<E: HostNumber> Frozen<E> {
    /// The model in `dir`, read by all ranks of the host, with `few` of its matrices in few bits; also what of it is trained itself: that is compared
    /// with. A collective call.
    pub fn read(
        dir: &ModelDir,
        kept: Kept,
        few: &FewBits,
        gang: &mut dyn SharedHost,
        threads: usize,
    ) -> Result<Frozen<E>> {
        let [exact, narrow] = places(&dir.layout, kept, few);
        let exact_numbers = SharedSlice::new(gang.allocate_common(exact.end() * size_of::<f32>())?);
        let narrow_numbers = SharedSlice::new(gang.allocate_common(narrow.end() * size_of::<bf16>())?);
        let read = &mut |p: &Parameter, out: &mut [f32]| read_numbers(dir, p.range.start, out, threads);
        let packed = (!few.is_empty()).then(|| Packed::read(dir, few.clone(), gang, read));
        let packed = packed.transpose();
        let mut frozen =
            Frozen { kept, exact, exact_numbers, narrow, narrow_numbers, packed: None, kind: PhantomData };
        let read = frozen.fill(dir, &*gang, threads);
        gang.barrier()?;
        frozen.packed = packed?;
        read.map(|()| frozen)
    }

    /// This rank's part.
    fn fill(&mut self, dir: &ModelDir, gang: &dyn SharedHost, threads: usize) -> Result<()> {
        for (range, place) in self.exact.iter() {
            let part = part_on_host(range, gang);
            let start = place + part.start - range.start;
            let numbers = self.exact_numbers.part_mut(start..start + part.len());
            read_numbers(dir, part.start, numbers, threads)?;
        }
        let mut wide = Vec::new();
        for (range, place) in self.narrow.iter() {
            let part = part_on_host(range, gang);
            for first in part.clone().step_by(CHUNK) {
                let len = CHUNK.min(part.end - first);
                if wide.len() < len {
                    wide = zeros(len, Part::Weights)?;
                }
                read_numbers(dir, first, &mut wide[..len], threads)?;
                let start = place + first - range.start;
                kernels::convert(&wide[..len], self.narrow_numbers.part_mut(start..start + len));
            }
        }
        Ok(())
    }

    pub fn weights(&self) -> HostWeights<'_, E> {
        let exact = Pieces::Placed(&self.exact, &self.exact_numbers);
        let weights = HostWeights::new(exact, Pieces::Placed(&self.narrow, &self.narrow_numbers));
        let weights = weights.with_packed(self.packed.as_ref());
        if self.kept == Kept::Bf16 { weights.with_narrow_tables() } else { weights }
    }
}

/// Bytes of a frozen model, on each host.
pub fn bytes(layout: &Layout, kept: Kept, few: &FewBits) -> usize {
    let [exact, narrow] = places(layout, kept, few);
    exact.end() * size_of::<f32>() + narrow.end() * size_of::<bf16>() + few.bytes()
}

/// What is kept in fp32, and what in bf16.
fn places(layout: &Layout, kept: Kept, few: &FewBits) -> [Places; 2] {
    let of = |wanted: &dyn Fn(Role) -> bool| {
        let is = |p: &Parameter| wanted(p.role) && !few.has(p);
        Places::in_a_row(layout.ranges(is))
    };
    let is_read_by_products = |role| matches!(role, Role::Weight | Role::TiedTable);
    match kept {
        Kept::Fp32 => [of(&|_| true), Places::default()],
        Kept::Mixed => [of(&|role| role != Role::Weight), of(&is_read_by_products)],
        Kept::Bf16 => [of(&Role::is_vector), of(&|role: Role| !role.is_vector())],
    }
}

/// Numbers of the flat buffer of a model that is not trained from `first` on, read by so many threads. All have to be finite.
pub fn read_numbers(dir: &ModelDir, first: usize, out: &mut [f32], threads: usize) -> Result<()> {
    let range = first..first + out.len();
    let mut reading = Reading::default();
    for (p, first, numbers) in by_parameter(&dir.layout, &range, out) {
        dir.read_part(p, first, numbers, &mut reading);
    }
    reading.run(threads)?;
    match by_parameter(&dir.layout, &range, out).find(|(_, _, numbers)| !kernels::all_finite(numbers)) {
        None => Ok(()),
        Some((p, ..)) => Err(Error::Input(format!(
            "{}: {} holds values that are NaN or infinite; restore the weights, or use another model",
            dir.path().display(),
            p.name
        ))),
    }
}
