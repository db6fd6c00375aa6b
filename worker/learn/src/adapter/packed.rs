//! Matrices of a frozen model in few bits, once on each host: quantised as they are read, or as the model's files have them.

use super::form::{Form, Of, Parts, PartsMut};
use super::from_files;
use crate::error::Result;
use crate::shim::buffers::SharedSlice;
use crate::workers::Workers;
use crate::zeros::{Part, zeros};
use fleet_checkpoint::{ModelDir, stored};
use fleet_collectives::SharedHost;
use fleet_common::job::Quantization;
use fleet_common::model::{Layout, Parameter, Role, Stored};
use fleet_kernels::Element;
use fleet_kernels::quant::{Quantised, dequantise};
use std::ops::Range;

/// Which matrices of a frozen model are in few bits, and how. The default: none.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct FewBits {
    /// In the order of the model's flat buffer.
    matrices: Vec<Matrix>,
}

#[derive(Clone, Debug, PartialEq)]
struct Matrix {
    /// In the model's flat buffer.
    range: Range<usize>,
    shape: [usize; 2],
    form: Form,
    /// Of a matrix whose rows are ordered by head in files. They are kept so.
    heads: Option<usize>,
}

/// Which parameters are quantised where a job asks for it: the matrices of blocks.
fn is_of_block(p: &Parameter, layout: &Layout) -> bool {
    p.role == Role::Weight && p.unit > 0 && p.unit + 1 < layout.units.len()
}

impl FewBits {
    /// What the files of `dir` have in few bits, and the other matrices of blocks as `quantization` says.
    pub fn of(dir: &ModelDir, quantization: Option<Quantization>) -> Result<FewBits> {
        let mut matrices = Vec::new();
        for p in &dir.layout.parameters {
            let form = match (dir.quantised(p), quantization) {
                (Some(weight), _) => Form::of_dir(dir, weight)?,
                (None, Some(quantization)) if is_of_block(p, &dir.layout) => {
                    let form = Form::of(quantization, dir.dtype(p));
                    form.check(p)?;
                    form
                }
                _ => continue,
            };
            matrices.push(Matrix::of(p, form));
        }
        matrices.sort_by_key(|matrix| matrix.range.start);
        Ok(FewBits { matrices })
    }

    pub fn is_empty(&self) -> bool {
        self.matrices.is_empty()
    }

    pub fn has(&self, p: &Parameter) -> bool {
        self.matrices.binary_search_by_key(&p.range.start, |matrix| matrix.range.start).is_ok()
    }

    /// The forms that matrices have, for the log.
    pub fn names(&self) -> String {
        let mut names: Vec<String> = self.matrices.iter().map(|matrix| matrix.form.name()).collect();
        names.sort();
        names.dedup();
        names.join(", ")
    }

    /// Without the matrices for which not `is_wanted`, by their ranges of the flat buffer.
    pub fn only(&self, is_wanted: impl Fn(&Range<usize>) -> bool) -> FewBits {
        let matrices = self.matrices.iter().filter(|matrix| is_wanted(&matrix.range)).cloned().collect();
        FewBits { matrices }
    }

    /// On each host.
    pub fn bytes(&self) -> usize {
        let (_, all) = self.places();
        all.codes + all.signed + all.scales + size_of::<f32>() * all.floats
    }

    /// Where each matrix lies in the buffers, and how long these are.
    fn places(&self) -> (Vec<Of<Range<usize>>>, Of<usize>) {
        let mut end = Of::<usize>::default();
        let next = |end: &mut usize, count: usize| {
            *end += count;
            *end - count..*end
        };
        let mut place = |matrix: &Matrix| {
            let lengths = matrix.form.lengths(matrix.shape[0], matrix.shape[1]);
            Of {
                codes: next(&mut end.codes, lengths.codes),
                signed: next(&mut end.signed, lengths.signed),
                scales: next(&mut end.scales, lengths.scales),
                floats: next(&mut end.floats, lengths.floats),
            }
        };
        let places = self.matrices.iter().map(&mut place).collect();
        (places, end)
    }
}

impl Matrix {
    fn of(p: &Parameter, form: Form) -> Matrix {
        let heads = if let Stored::ByHead { heads } = p.stored { Some(heads) } else { None };
        Matrix { range: p.range.clone(), shape: [p.shape[0], p.shape[1]], form, heads }
    }

    /// Rows that lie side by side in the flat buffer and in files, each time with the first of both.
    fn runs(&self) -> impl Iterator<Item = (usize, usize, usize)> + use<> {
        let rows = self.shape[0];
        let (heads, run) = match self.heads {
            None => (1, rows),
            Some(heads) => (heads, rows / (3 * heads)),
        };
        (0..rows).step_by(run.max(1)).map(move |first| {
            let (part, head) = (first / (heads * run), first / run % heads);
            let in_file = if run == rows { first } else { (head * 3 + part) * run };
            (first, in_file, run)
        })
    }
}

pub struct Packed {
    few: FewBits,
    places: Vec<Of<Range<usize>>>,
    codes: SharedSlice<u8>,
    signed: SharedSlice<i8>,
    scales: SharedSlice<u8>,
    floats: SharedSlice<f32>,
}

/// A matrix in few bits, for who widens it elsewhere.
pub struct PackedMatrix<'a> {
    /// In the model's flat buffer.
    pub range: Range<usize>,
    pub rows: Quantised<'a>,
    /// Of each row of the flat buffer its number in `rows`, where that is another.
    pub order: Option<Vec<usize>>,
}

/// Rows of a product's weight in few bits.
pub struct PackedRows<'a> {
    /// The outputs that they make.
    pub outputs: Range<usize>,
    pub rows: Quantised<'a>,
}

/// Widens a matrix that files have in few bits, as the flat buffer has it.
pub(super) fn widen_matrix(p: &Parameter, form: Form, from: Parts, out: &mut [f32]) {
    let matrix = Matrix::of(p, form);
    let (quantised, columns) = (form.quantised(matrix.shape, from), matrix.shape[1]);
    for (first, in_file, run) in matrix.runs() {
        let to = &mut out[first * columns..(first + run) * columns];
        dequantise(quantised, in_file..in_file + run, to);
    }
}

/// Reads a parameter's numbers.
pub type ReadOne<'a> = dyn FnMut(&Parameter, &mut [f32]) -> Result<()> + 'a;

impl Packed {
    /// Matrices of the model in `dir`, each read by one rank of the host: as files have it, or quantised, for which `read` gives its numbers. They
    /// are there for all after the next barrier. A collective call.
    pub fn read(
        dir: &ModelDir,
        few: FewBits,
        gang: &mut dyn SharedHost,
        read: &mut ReadOne,
    ) -> Result<Packed> {
        let (places, all) = few.places();
        let mut packed = Packed {
            few,
            places,
            codes: SharedSlice::new(gang.allocate_common(all.codes)?),
            signed: SharedSlice::new(gang.allocate_common(all.signed)?),
            scales: SharedSlice::new(gang.allocate_common(all.scales)?),
            floats: SharedSlice::new(gang.allocate_common(all.floats * size_of::<f32>())?),
        };
        let (rank, ranks) = (gang.local_rank(), gang.local_size());
        let mut wide = Vec::new();
        for (matrix, at) in packed.few.matrices.iter().zip(&packed.places).skip(rank).step_by(ranks) {
            let p = dir.layout.parameters.iter().find(|p| p.range == matrix.range);
            let p = p.expect("it was made of these");
            let to = PartsMut {
                codes: packed.codes.part_mut(at.codes.clone()),
                signed: packed.signed.part_mut(at.signed.clone()),
                scales: packed.scales.part_mut(at.scales.clone()),
                floats: packed.floats.part_mut(at.floats.clone()),
            };
            if let Some(weight) = dir.quantised(p) {
                from_files::copy(dir, weight, to)?;
                continue;
            }
            if wide.len() < p.range.len() {
                wide = zeros(p.range.len(), Part::Weights)?;
            }
            let wide = &mut wide[..p.range.len()];
            read(p, wide)?;
            match matrix.heads {
                None => matrix.form.quantise(wide, matrix.shape[1], to),
                Some(_) => matrix.form.quantise(&mut stored(p, wide).into_owned(), matrix.shape[1], to),
            }
        }
        Ok(packed)
    }

    /// In the order of the model's flat buffer.
    pub fn matrices(&self) -> impl Iterator<Item = PackedMatrix<'_>> {
        self.few.matrices.iter().zip(&self.places).map(|(matrix, at)| PackedMatrix {
            range: matrix.range.clone(),
            rows: self.quantised(matrix, at),
            order: matrix
                .heads
                .map(|_| matrix.runs().flat_map(|(_, in_file, run)| in_file..in_file + run).collect()),
        })
    }

    /// Whether any of a product's weight is here.
    pub fn has(&self, weight: &Range<usize>) -> bool {
        self.within(weight).next().is_some()
    }

    /// All outputs of a product with this weight.
    pub fn outputs(&self, weight: &Range<usize>) -> Range<usize> {
        let columns = self.within(weight).next().map_or(1, |(matrix, _)| matrix.shape[1]);
        0..weight.len() / columns
    }

    /// Some rows of a product's weight, `[outputs, inputs]`, which may be several matrices one below the other: pieces of at most so many rows, and
    /// rows that are not here.
    pub fn rows(
        &self,
        weight: &Range<usize>,
        outputs: &Range<usize>,
        most: usize,
    ) -> (Vec<PackedRows<'_>>, Vec<Range<usize>>) {
        let (mut pieces, mut others, mut next) = (Vec::new(), Vec::new(), outputs.start);
        for (matrix, at) in self.within(weight) {
            let before = (matrix.range.start - weight.start) / matrix.shape[1];
            let whole = before..before + matrix.shape[0];
            if whole.end <= outputs.start || whole.start >= outputs.end {
                continue;
            }
            if next < whole.start {
                others.push(next..whole.start);
            }
            next = whole.end;
            let quantised = self.quantised(matrix, at);
            for (first, in_file, run) in matrix.runs() {
                let wanted = outputs.start.max(before + first)..outputs.end.min(before + first + run);
                for from in wanted.clone().step_by(most.max(1)) {
                    let outputs = from..wanted.end.min(from + most);
                    let first = in_file + from - before - first;
                    let rows = quantised.slice(first..first + outputs.len());
                    pieces.push(PackedRows { outputs, rows });
                }
            }
        }
        if next < outputs.end {
            others.push(next..outputs.end);
        }
        (pieces, others)
    }

    /// Some rows of a product's weight widened; `plain` gives those that are not here, by their range of the model's flat buffer.
    pub fn widen<'p, E: Element>(
        &self,
        (weight, outputs): (&Range<usize>, &Range<usize>),
        plain: impl Fn(&Range<usize>) -> &'p [E],
        to: &mut [E],
        workers: &Workers,
    ) {
        let columns = to.len() / outputs.len().max(1);
        let (pieces, others) = self.rows(weight, outputs, workers.share(outputs.len(), 1));
        for rows in others {
            let range = weight.start + rows.start * columns..weight.start + rows.end * columns;
            let to = &mut to[(rows.start - outputs.start) * columns..(rows.end - outputs.start) * columns];
            to.copy_from_slice(plain(&range));
        }
        let (mut rest, mut at, mut work) = (to, outputs.start, Vec::new());
        for PackedRows { outputs, rows } in pieces {
            let (_, later) = rest.split_at_mut((outputs.start - at) * columns);
            let (now, later) = later.split_at_mut(outputs.len() * columns);
            (rest, at) = (later, outputs.end);
            work.push((rows, now));
        }
        workers.each(work.into_iter(), |(rows, to)| dequantise(rows, 0..rows.rows(), to));
    }

    fn within<'a>(
        &'a self,
        weight: &'a Range<usize>,
    ) -> impl Iterator<Item = (&'a Matrix, &'a Of<Range<usize>>)> {
        let first = self.few.matrices.partition_point(|matrix| matrix.range.start < weight.start);
        let from = self.few.matrices.iter().zip(&self.places).skip(first);
        from.take_while(|(matrix, _)| matrix.range.end <= weight.end)
    }

    fn quantised(&self, matrix: &Matrix, at: &Of<Range<usize>>) -> Quantised<'_> {
        let from = Parts {
            codes: self.codes.part(at.codes.clone()),
            signed: self.signed.part(at.signed.clone()),
            scales: self.scales.part(at.scales.clone()),
            floats: self.floats.part(at.floats.clone()),
        };
        matrix.form.quantised(matrix.shape, from)
    }
}

impl std::fmt::Debug for Packed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Packed").field("forms", &self.few.names()).finish()
    }
}
