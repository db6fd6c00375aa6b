//! Numbers of tensors, read into their places by several threads: a piece at a time, which is held against its hash in the same pass, while what
//! was read is in the cache.

use crate::tensors::{Span, Tensor};
use crate::{CheckpointError, Dtype};
use half::{bf16, f16};
use sha2::{Digest, Sha256};
use std::ops::Range;
use std::sync::Mutex;
use zerocopy::IntoBytes;

/// Bytes that are read at a time, few enough for the cache of one core.
const CHUNK: usize = 128 << 10;

type Job<'a> = Box<dyn FnOnce() -> Result<(), CheckpointError> + Send + 'a>;

/// What is to be read, and where to.
#[derive(Default)]
pub struct Reading<'a> {
    jobs: Vec<Job<'a>>,
}

impl<'a> Reading<'a> {
    /// Numbers of a tensor of F32, BF16 or F16 from its number `first` on, in fp32.
    pub fn numbers(&mut self, tensor: Tensor<'a>, first: usize, out: &'a mut [f32]) {
        let size = size_of_one(tensor.dtype);
        let mut rest = out;
        for (span, within) in tensor.spans(size * first..size * (first + rest.len())) {
            let (now, later) = rest.split_at_mut(within.len() / size);
            rest = later;
            self.job(move || fill(&tensor, span, within, now));
        }
    }

    pub(crate) fn job(&mut self, job: impl FnOnce() -> Result<(), CheckpointError> + Send + 'a) {
        self.jobs.push(Box::new(job));
    }

    /// Reads all of it by so many threads, this one among them. Of several things that are wrong it tells the first.
    pub fn run(self, threads: usize) -> Result<(), CheckpointError> {
        let others = threads.min(self.jobs.len()).saturating_sub(1);
        let jobs = Mutex::new(self.jobs.into_iter().enumerate());
        let wrong: Mutex<Option<(usize, CheckpointError)>> = Mutex::new(None);
        let whole = "a thread that panics ends the reading";
        let work = || loop {
            let Some((number, job)) = jobs.lock().expect(whole).next() else { return };
            let Err(error) = job() else { continue };
            while jobs.lock().expect(whole).next().is_some() {}
            let mut wrong = wrong.lock().expect(whole);
            if wrong.as_ref().is_none_or(|(first, _)| number < *first) {
                *wrong = Some((number, error));
            }
        };
        std::thread::scope(|scope| {
            for _ in 0..others {
                scope.spawn(work);
            }
            work();
        });
        wrong.into_inner().expect(whole).map_or(Ok(()), |(_, error)| Err(error))
    }
}

/// Numbers of a tensor of F32, BF16 or F16 from its number `first` on, in fp32.
pub fn read_numbers(tensor: &Tensor, first: usize, out: &mut [f32]) -> Result<(), CheckpointError> {
    let mut reading = Reading::default();
    reading.numbers(*tensor, first, out);
    reading.run(1)
}

/// Reads what of `span` is `within` into `out`, and what else of it is under the same hash.
fn fill(tensor: &Tensor, span: &Span, within: Range<usize>, out: &mut [f32]) -> Result<(), CheckpointError> {
    let (file, size) = (tensor.file(span), size_of_one(tensor.dtype));
    let mut hasher = span.sha256.as_ref().map(|_| Sha256::new());
    let (mut scratch, mut rest) = (Vec::new(), out);
    let mut pass = |range: Range<usize>, is_wanted: bool| -> Result<(), CheckpointError> {
        for at in range.clone().step_by(CHUNK) {
            let len = CHUNK.min(range.end - at);
            let wanted = if is_wanted { len / size } else { 0 };
            let (now, later) = std::mem::take(&mut rest).split_at_mut(wanted);
            rest = later;
            if is_wanted && tensor.dtype == Dtype::F32 {
                let bytes = now.as_mut_bytes();
                file.read(span.begin + at as u64, bytes)?;
                hasher.iter_mut().for_each(|hasher| hasher.update(&*bytes));
                continue;
            }
            scratch.resize(len, 0);
            file.read(span.begin + at as u64, &mut scratch)?;
            hasher.iter_mut().for_each(|hasher| hasher.update(&scratch));
            widen(tensor.dtype, &scratch, now);
        }
        Ok(())
    };
    if span.sha256.is_none() {
        return pass(within, true);
    }
    pass(0..within.start, false)?;
    pass(within.clone(), true)?;
    pass(within.end..span.range.len(), false)?;
    let found = hasher.map(|hasher| hex::encode(hasher.finalize()));
    if found == span.sha256 { Ok(()) } else { Err(tensor.changed(span)) }
}

pub(crate) fn size_of_one(dtype: Dtype) -> usize {
    if dtype == Dtype::F32 { 4 } else { 2 }
}

/// As many numbers as `out` has.
pub(crate) fn widen(dtype: Dtype, bytes: &[u8], out: &mut [f32]) {
    match dtype {
        Dtype::F32 => {
            let numbers = bytes.as_chunks::<4>().0;
            out.iter_mut().zip(numbers).for_each(|(x, b)| *x = f32::from_le_bytes(*b));
        }
        Dtype::BF16 => {
            let numbers = bytes.as_chunks::<2>().0;
            out.iter_mut().zip(numbers).for_each(|(x, b)| *x = bf16::from_le_bytes(*b).to_f32());
        }
        _ => {
            let numbers = bytes.as_chunks::<2>().0;
            out.iter_mut().zip(numbers).for_each(|(x, b)| *x = f16::from_le_bytes(*b).to_f32());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Claim, RunDir, TensorRef, Tensors, Writer, step_dir};

    /// Of three pieces.
    const LEN: usize = 5 << 20;

    /// A checkpoint of one tensor of that many numbers: `at % 251`.
    fn saved(dir: &std::path::Path, dtype: Dtype) -> std::path::PathBuf {
        let claim = Claim { dir, run: "r", resumed: None, overwrite: false, until: None, reads: &[] };
        let mut writer = Writer::begin(&RunDir::claim(&claim).unwrap(), 1).unwrap();
        let numbers = (0..LEN).map(|at| (at % 251) as f32);
        let data: Vec<u8> = match dtype {
            Dtype::F32 => numbers.flat_map(f32::to_le_bytes).collect(),
            _ => numbers.flat_map(|x| bf16::from_f32(x).to_le_bytes()).collect(),
        };
        let tensor = TensorRef { name: "w", dtype, shape: &[LEN], first: 0, data: &data };
        writer.write_safetensors("model.safetensors", &[tensor]).unwrap();
        writer.finish(1.0).unwrap();
        step_dir(dir, 1)
    }

    #[test]
    fn any_range_comes_from_pieces_that_are_checked_whole_by_any_number_of_threads() {
        for dtype in [Dtype::F32, Dtype::BF16] {
            let dir = tempfile::tempdir().unwrap();
            let path = saved(dir.path(), dtype);
            let tensors = Tensors::of_model(&path).unwrap();
            let read = |range: Range<usize>, threads| {
                let mut out = vec![-1.0; range.len()];
                let mut reading = Reading::default();
                reading.numbers(tensors.get("w").unwrap(), range.start, &mut out);
                reading.run(threads).map(|()| out)
            };
            let edge = (8 << 20) / (dtype.bitsize() / 8);
            let ranges = [0..LEN, 1..2, edge - 3..edge + 70_000, LEN - 5..LEN, 7..7];
            for (range, threads) in ranges.into_iter().flat_map(|range| [(range.clone(), 1), (range, 3)]) {
                let numbers = read(range.clone(), threads).unwrap();
                assert!(numbers.into_iter().eq(range.map(|at| (at % 251) as f32)), "{threads} threads");
            }
            // The last byte of the file: the first piece is as it was, and of the last one nothing is taken.
            let file = path.join("model.safetensors");
            let mut bytes = std::fs::read(&file).unwrap();
            *bytes.last_mut().unwrap() ^= 1;
            std::fs::write(&file, bytes).unwrap();
            let tensors = Tensors::of_model(&path).unwrap();
            let read = |first| read_numbers(&tensors.get("w").unwrap(), first, &mut [0.0; 3]);
            read(0).unwrap();
            let error = read(LEN - 9).unwrap_err().to_string();
            assert!(error.contains("tensor w in model.safetensors have changed"), "{error}");
        }
    }
}
