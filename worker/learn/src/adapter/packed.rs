//! The matrices of a frozen model's blocks in few bits, once on each host.

use super::form::{Form, Of, Parts, PartsMut};
use crate::error::Result;
use crate::shim::buffers::SharedSlice;
use crate::workers::Workers;
use crate::zeros::{Part, zeros};
use fleet_collectives::SharedHost;
use fleet_common::job::Quantization;
use fleet_common::model::{Layout, Parameter, Role};
use fleet_kernels::Element;
use fleet_kernels::quant::{Codes, Quantised, dequantise};
use std::ops::Range;

/// Which parameters are in few bits: the matrices of blocks.
pub fn is_packed(p: &Parameter, layout: &Layout) -> bool {
    p.role == Role::Weight && p.unit > 0 && p.unit + 1 < layout.units.len()
}

pub struct Packed {
    form: Form,
    /// In the order of the model's flat buffer.
    matrices: Vec<PackedMatrix>,
    codes: SharedSlice<u8>,
    signed: SharedSlice<i8>,
    scales: SharedSlice<u8>,
    floats: SharedSlice<f32>,
}

/// Where a matrix lies.
#[derive(Debug)]
struct PackedMatrix {
    /// In the model's flat buffer.
    range: Range<usize>,
    shape: [usize; 2],
    /// In each of the buffers.
    at: Of<Range<usize>>,
}

/// Reads a parameter's numbers.
pub type ReadOne<'a> = dyn FnMut(&Parameter, &mut [f32]) -> Result<()> + 'a;

/// And what all take together.
fn matrices<'a>(
    form: Form,
    parameters: impl Iterator<Item = &'a Parameter>,
) -> (Vec<PackedMatrix>, Of<usize>) {
    let mut parameters: Vec<&Parameter> = parameters.collect();
    parameters.sort_by_key(|p| p.range.start);
    let mut end = Of::<usize>::default();
    let next = |end: &mut usize, count: usize| {
        *end += count;
        *end - count..*end
    };
    let mut matrix = |p: &Parameter| {
        let shape = [p.shape[0], p.shape[1]];
        let lengths = form.lengths(shape[0], shape[1]);
        let at = Of {
            codes: next(&mut end.codes, lengths.codes),
            signed: next(&mut end.signed, lengths.signed),
            scales: next(&mut end.scales, lengths.scales),
            floats: next(&mut end.floats, lengths.floats),
        };
        PackedMatrix { range: p.range.clone(), shape, at }
    };
    let matrices = parameters.into_iter().map(&mut matrix).collect();
    (matrices, end)
}

/// Bytes of these parameters on each host.
pub fn packed_bytes<'a>(
    quantization: Quantization,
    parameters: impl Iterator<Item = &'a Parameter>,
) -> usize {
    let (_, all) = matrices(Form::of(quantization), parameters);
    all.codes + all.signed + all.scales + size_of::<f32>() * all.floats
}

impl Packed {
    /// Quantises `parameters`, each read by one rank of the host. They are there for all after the next barrier. A collective call.
    pub fn read(
        parameters: &[&Parameter],
        quantization: Quantization,
        gang: &mut dyn SharedHost,
        read: &mut ReadOne,
    ) -> Result<Packed> {
        let form = Form::of(quantization);
        parameters.iter().try_for_each(|p| form.check(p))?;
        let (matrices, all) = matrices(form, parameters.iter().copied());
        let mut packed = Packed {
            form,
            matrices,
            codes: SharedSlice::new(gang.allocate_common(all.codes)?),
            signed: SharedSlice::new(gang.allocate_common(all.signed)?),
            scales: SharedSlice::new(gang.allocate_common(all.scales)?),
            floats: SharedSlice::new(gang.allocate_common(all.floats * size_of::<f32>())?),
        };
        let (rank, ranks) = (gang.local_rank(), gang.local_size());
        let mut wide = Vec::new();
        for matrix in packed.matrices.iter().skip(rank).step_by(ranks) {
            let p = parameters.iter().find(|p| p.range == matrix.range).expect("it was made of these");
            if wide.len() < p.range.len() {
                wide = zeros(p.range.len(), Part::Weights)?;
            }
            let wide = &mut wide[..p.range.len()];
            read(p, wide)?;
            let to = PartsMut {
                codes: packed.codes.part_mut(matrix.at.codes.clone()),
                signed: packed.signed.part_mut(matrix.at.signed.clone()),
                scales: packed.scales.part_mut(matrix.at.scales.clone()),
                floats: packed.floats.part_mut(matrix.at.floats.clone()),
            };
            form.quantise(wide, matrix.shape[1], to);
        }
        Ok(packed)
    }

    /// All matrices: where each is in the model's flat buffer, its rows and columns, and what it is kept as.
    pub fn matrices(&self) -> impl Iterator<Item = (&Range<usize>, [usize; 2], Codes<'_>)> {
        self.matrices.iter().map(|matrix| (&matrix.range, matrix.shape, self.quantised(matrix).codes()))
    }

    /// Whether a product's weight is here.
    pub fn has(&self, weight: &Range<usize>) -> bool {
        self.within(weight).next().is_some()
    }

    /// A product's weight widened, `[outputs, inputs]`, which may be several matrices one below the other.
    pub fn widen<E: Element>(&self, weight: &Range<usize>, to: &mut [E], workers: &Workers) {
        assert_eq!(to.len(), weight.len(), "a product's weight");
        let mut rest = to;
        let mut pieces = Vec::new();
        for matrix in self.within(weight) {
            let [rows, columns] = matrix.shape;
            let (now, later) = std::mem::take(&mut rest).split_at_mut(rows * columns);
            rest = later;
            let share = workers.share(rows, 1);
            let quantised = self.quantised(matrix);
            pieces.extend(now.chunks_mut(share * columns).enumerate().map(move |(piece, to)| {
                let first = piece * share;
                (quantised, first..first + to.len() / columns, to)
            }));
        }
        workers.each(pieces.into_iter(), |(quantised, rows, to)| dequantise(quantised, rows, to));
    }

    fn within<'a>(&'a self, weight: &'a Range<usize>) -> impl Iterator<Item = &'a PackedMatrix> {
        let first = self.matrices.partition_point(|matrix| matrix.range.start < weight.start);
        let from = self.matrices.iter().skip(first);
        from.take_while(|matrix| matrix.range.end <= weight.end)
    }

    fn quantised(&self, matrix: &PackedMatrix) -> Quantised<'_> {
        let from = Parts {
            codes: self.codes.part(matrix.at.codes.clone()),
            signed: self.signed.part(matrix.at.signed.clone()),
            scales: self.scales.part(matrix.at.scales.clone()),
            floats: self.floats.part(matrix.at.floats.clone()),
        };
        self.form.quantised(matrix.shape, from)
    }
}

impl std::fmt::Debug for Packed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Packed").field("form", &self.form).field("matrices", &self.matrices.len()).finish()
    }
}
