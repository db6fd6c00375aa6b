//! The matrices of a frozen model's blocks in four bits, once on each host: codes, and scales in eight bits, as bitsandbytes quantises them.

use crate::error::Result;
use crate::shim::buffers::SharedSlice;
use crate::workers::Workers;
use crate::zeros::{Part, zeros};
use fleet_collectives::SharedHost;
use fleet_common::job::Quantization;
use fleet_common::model::{Layout, Parameter, Role};
use fleet_kernels::Element;
use fleet_kernels::quant::{
    Codes, Double, FourBit, FourBitMap, NESTED_BLOCK, Quantised, Scales, dequantise, double_quantise,
    dynamic_map, quantise_four_bit,
};
use std::ops::Range;

/// Numbers that share a scale.
const BLOCK: usize = 64;

/// Which parameters are in four bits: the matrices of blocks.
pub fn is_packed(p: &Parameter, layout: &Layout) -> bool {
    p.role == Role::Weight && p.unit > 0 && p.unit + 1 < layout.units.len()
}

pub struct Packed {
    map: FourBitMap,
    /// In the order of the model's flat buffer.
    matrices: Vec<PackedMatrix>,
    codes: SharedSlice<u8>,
    scales: SharedSlice<u8>,
    largest: SharedSlice<f32>,
    /// Of each matrix.
    offsets: SharedSlice<f32>,
}

/// Where a matrix lies in each of these.
#[derive(Debug)]
struct PackedMatrix {
    /// In the model's flat buffer.
    range: Range<usize>,
    shape: [usize; 2],
    codes: Range<usize>,
    scales: Range<usize>,
    largest: Range<usize>,
}

/// Reads a parameter's numbers.
pub type ReadOne<'a> = dyn FnMut(&Parameter, &mut [f32]) -> Result<()> + 'a;

fn matrices<'a>(parameters: impl Iterator<Item = &'a Parameter>) -> Vec<PackedMatrix> {
    let mut parameters: Vec<&Parameter> = parameters.collect();
    parameters.sort_by_key(|p| p.range.start);
    let (mut codes, mut scales, mut largest) = (0, 0, 0);
    let next = |at: &mut usize, count: usize| {
        *at += count;
        *at - count..*at
    };
    let matrix = |p: &Parameter| {
        let blocks = p.range.len().div_ceil(BLOCK);
        PackedMatrix {
            range: p.range.clone(),
            shape: [p.shape[0], p.shape[1]],
            codes: next(&mut codes, p.range.len().div_ceil(2)),
            scales: next(&mut scales, blocks),
            largest: next(&mut largest, blocks.div_ceil(NESTED_BLOCK)),
        }
    };
    parameters.into_iter().map(matrix).collect()
}

/// Of all: codes, scales, scales of the scales.
fn lengths(matrices: &[PackedMatrix]) -> [usize; 3] {
    matrices.last().map_or([0; 3], |last| [last.codes.end, last.scales.end, last.largest.end])
}

/// Bytes of these parameters on each host.
pub fn packed_bytes<'a>(parameters: impl Iterator<Item = &'a Parameter>) -> usize {
    let matrices = matrices(parameters);
    let [codes, scales, largest] = lengths(&matrices);
    codes + scales + size_of::<f32>() * (largest + matrices.len())
}

impl Packed {
    /// Quantises `parameters`, each read by one rank of the host. They are there for all after the next barrier. A collective call.
    pub fn read(
        parameters: &[&Parameter],
        quantization: Quantization,
        gang: &mut dyn SharedHost,
        read: &mut ReadOne,
    ) -> Result<Packed> {
        let matrices = matrices(parameters.iter().copied());
        let [codes, scales, largest] = lengths(&matrices);
        let mut packed = Packed {
            map: match quantization {
                Quantization::Nf4 => FourBitMap::Nf4,
                Quantization::Fp4 => FourBitMap::Fp4,
            },
            codes: SharedSlice::new(gang.allocate_common(codes)?),
            scales: SharedSlice::new(gang.allocate_common(scales)?),
            largest: SharedSlice::new(gang.allocate_common(largest * size_of::<f32>())?),
            offsets: SharedSlice::new(gang.allocate_common(matrices.len() * size_of::<f32>())?),
            matrices,
        };
        let (rank, ranks) = (gang.local_rank(), gang.local_size());
        let mut wide = Vec::new();
        for (number, matrix) in
            packed.matrices.iter().enumerate().filter(|(number, _)| number % ranks == rank)
        {
            let p = parameters.iter().find(|p| p.range == matrix.range).expect("it was made of these");
            if wide.len() < p.range.len() {
                wide = zeros(p.range.len(), Part::Weights)?;
            }
            let wide = &mut wide[..p.range.len()];
            read(p, wide)?;
            let mut scales = vec![0.0; matrix.scales.len()];
            quantise_four_bit(
                wide,
                packed.map,
                BLOCK,
                packed.codes.part_mut(matrix.codes.clone()),
                &mut scales,
            );
            let largest = packed.largest.part_mut(matrix.largest.clone());
            let offset = double_quantise(&scales, packed.scales.part_mut(matrix.scales.clone()), largest);
            packed.offsets.part_mut(number..number + 1)[0] = offset;
        }
        Ok(packed)
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
        for (number, matrix) in self.within(weight) {
            let [rows, columns] = matrix.shape;
            let (now, later) = std::mem::take(&mut rest).split_at_mut(rows * columns);
            rest = later;
            let share = workers.share(rows, 1);
            let quantised = self.quantised(number, matrix);
            pieces.extend(now.chunks_mut(share * columns).enumerate().map(move |(piece, to)| {
                let first = piece * share;
                (quantised, first..first + to.len() / columns, to)
            }));
        }
        workers.each(pieces.into_iter(), |(quantised, rows, to)| dequantise(quantised, rows, to));
    }

    fn within<'a>(&'a self, weight: &'a Range<usize>) -> impl Iterator<Item = (usize, &'a PackedMatrix)> {
        let first = self.matrices.partition_point(|matrix| matrix.range.start < weight.start);
        let from = self.matrices.iter().enumerate().skip(first);
        from.take_while(|(_, matrix)| matrix.range.end <= weight.end)
    }

    fn quantised(&self, number: usize, matrix: &PackedMatrix) -> Quantised<'_> {
        let scales = Scales::Double(Double {
            codes: self.scales.part(matrix.scales.clone()),
            largest: self.largest.part(matrix.largest.clone()),
            map: dynamic_map(),
            offset: self.offsets.part(number..number + 1)[0],
        });
        let codes = self.codes.part(matrix.codes.clone());
        let codes = Codes::FourBit(FourBit { map: self.map, block: BLOCK, codes, scales });
        Quantised::new(codes, matrix.shape[0], matrix.shape[1])
    }
}

impl std::fmt::Debug for Packed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Packed").field("map", &self.map).field("matrices", &self.matrices.len()).finish()
    }
}
