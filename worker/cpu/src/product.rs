//! Matrix products of the model: which library computes them, on how many threads.
//!
//! Weights and activations are stored as `E`: f32, or bf16 under `bf16-mixed`. Sums are kept in fp32. bf16 operands are multiplied by
//! bf16 instructions where the CPU has them, else widened first, which gives the same products. A single row, as when generating token by
//! token, always goes to our own kernel, which reads the weights once and in place; so do the rows of several texts, each as if it were alone.
//!
//! Legend: t rows (tokens), i inputs, o outputs; x_ti activations, w_oi weights, dy_to gradients of outputs.

use crate::shim::{Matrix, dnn_matmul, mkl_matmul};
use fleet_kernels::{self as kernels, Element, Scratch, Store};
use fleet_learn::adapter::PackedRows;
use fleet_learn::{HostNumber, Workers};
use half::bf16;
use std::ops::{Deref, DerefMut, Range};
use std::sync::Arc;

/// Rows of a product that one thread takes at least: below, the libraries lose more than threads win.
const GRANULE: usize = 16;

/// Fewest weights that are read for a single row on several threads: below, waking them takes longer.
const VECTOR_MIN: usize = 1 << 16;

/// Numbers per piece when a buffer is converted on several threads: whole cache lines of both types.
const CONVERT_GRANULE: usize = 4096;

/// How products are computed. A function of the CPU alone, so that a resumed run computes what the first one did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Library {
    Mkl,
    /// oneDNN for AVX-512.
    Dnn,
    /// `kernels::gemm`, for AVX2.
    Own,
}

/// Where a product goes.
#[derive(Debug)]
pub enum Out<'a, E> {
    Store(&'a mut [E]),
    /// Into fp32: weight gradients of a first micro-batch.
    Set(&'a mut [f32]),
    /// Added to fp32: the residual stream, further weight gradients.
    Add(&'a mut [f32]),
    /// Added to what is stored: what an adapter adds.
    More(&'a mut [E]),
}

impl<'a, E: Storage> Out<'a, E> {
    /// The same place, to go on with.
    pub fn again(&mut self) -> Out<'_, E> {
        match self {
            Out::Store(out) => Out::Store(out),
            Out::Set(out) => Out::Set(out),
            Out::Add(out) => Out::Add(out),
            Out::More(out) => Out::More(out),
        }
    }

    /// The same place, for what is added to what is there by now.
    pub fn and_more(&mut self) -> Out<'_, E> {
        match self {
            Out::Store(out) | Out::More(out) => Out::More(out),
            Out::Set(out) | Out::Add(out) => Out::Add(out),
        }
    }

    /// Writes rows that were computed elsewhere to columns from `first` on of rows that are `width` long.
    pub fn columns(self, from: &[f32], (first, columns, width): (usize, usize, usize)) {
        fn place<C: Element>(from: &[f32], out: &mut [C], columns: (usize, usize, usize), adds: bool) {
            let (first, columns, width) = columns;
            for (from, out) in from.chunks_exact(columns).zip(out.chunks_exact_mut(width)) {
                let out = &mut out[first..first + columns];
                if adds { kernels::add(out, from) } else { kernels::convert(from, out) }
            }
        }
        match self {
            Out::Store(out) => place(from, out, (first, columns, width), false),
            Out::Set(out) => place(from, out, (first, columns, width), false),
            Out::Add(out) => place(from, out, (first, columns, width), true),
            Out::More(out) => place(from, out, (first, columns, width), true),
        }
    }

    /// Adds numbers that were computed elsewhere.
    pub fn add(self, from: &[E], workers: &Workers) {
        match self {
            Out::Set(out) | Out::Add(out) => add(workers, from, out),
            Out::Store(out) | Out::More(out) => add(workers, from, out),
        }
    }
}

/// What products work on.
pub trait Storage: HostNumber {
    const NAME: &'static str;
    /// `x` as operand; `room` is as long as `x` where it is needed.
    fn narrow<'a>(x: &'a [f32], room: &'a mut [Self], workers: &Workers) -> &'a [Self];
    #[doc(hidden)]
    fn product(products: &mut Products, job: Job<Self>, out: Out<Self>);
}

/// One product, to be cut by rows of its output.
#[doc(hidden)]
#[derive(Clone, Copy)]
pub struct Job<'a, E> {
    m: usize,
    n: usize,
    k: usize,
    a: &'a [E],
    a_stride: usize,
    a_transposed: bool,
    b: &'a [E],
    b_stride: usize,
    b_transposed: bool,
}

impl<'a, E> Job<'a, E> {
    /// The operand of the output's rows from `row` on.
    fn a(&self, row: usize) -> Matrix<'a, E> {
        match self.a_transposed {
            true => Matrix::transposed(&self.a[row..], self.a_stride),
            false => Matrix::new(&self.a[row * self.a_stride..], self.a_stride),
        }
    }

    fn b(&self) -> Matrix<'a, E> {
        match self.b_transposed {
            true => Matrix::transposed(self.b, self.b_stride),
            false => Matrix::new(self.b, self.b_stride),
        }
    }

    /// Rows times the transpose of rows that lie in one piece.
    fn is_by_rows(&self) -> bool {
        !self.a_transposed && self.b_transposed
    }

    fn shape(&self) -> (usize, usize, usize) {
        (self.m, self.k, self.n)
    }
}

/// `rows x cols` numbers (after transposition) for our own kernel.
fn matrix<E: Element>(
    data: &[E],
    stride: usize,
    transposed: bool,
    (rows, cols): (usize, usize),
) -> kernels::Matrix<'_, E> {
    let (row_stride, col_stride) = if transposed { (1, stride) } else { (stride, 1) };
    kernels::Matrix { data, rows, cols, row_stride, col_stride }
}

pub struct Products {
    fp32: Library,
    /// bf16 products by oneDNN.
    bf16: bool,
    workers: Arc<Workers>,
    /// One for each thread.
    scratch: Vec<Scratch>,
    /// A sheet of B that they share.
    packed: Vec<f32>,
    narrow_out: Vec<bf16>,
    wide_a: Vec<f32>,
    wide_b: Vec<f32>,
    wide_out: Vec<f32>,
    /// So many numbers of a weight in few bits are widened at a time where that is left to choose.
    pub(crate) widened: usize,
    /// Rows are of texts of their own: each is computed as if it were alone.
    each_alone: bool,
}

/// Weights that are read for one row at a time, `[outputs, inputs]`.
pub enum RowWeights<'w> {
    Bf16(&'w [bf16]),
    /// For each piece the outputs that it makes.
    FewBits(Vec<PackedRows<'w>>),
}

/// Products whose rows are each computed as if they were alone, until this is dropped, in a panic too.
pub(crate) struct EachAlone<'a>(&'a mut Products);

impl Drop for EachAlone<'_> {
    fn drop(&mut self) {
        self.0.each_alone = false;
    }
}

impl Deref for EachAlone<'_> {
    type Target = Products;

    fn deref(&self) -> &Products {
        self.0
    }
}

impl DerefMut for EachAlone<'_> {
    fn deref_mut(&mut self) -> &mut Products {
        self.0
    }
}

impl Products {
    pub fn new(workers: Arc<Workers>) -> Self {
        Self {
            fp32: fp32_library(),
            bf16: cpu_has_bf16()
                && dnn_works::<bf16>(|shape, a, b, out| dnn_matmul(shape, a, b, 0.0, out, shape.1)),
            scratch: (0..workers.count()).map(|_| Scratch::new()).collect(),
            workers,
            packed: Vec::new(),
            narrow_out: Vec::new(),
            wide_a: Vec::new(),
            wide_b: Vec::new(),
            wide_out: Vec::new(),
            widened: usize::MAX,
            each_alone: false,
        }
    }

    pub fn workers(&self) -> &Workers {
        &self.workers
    }

    pub fn shared_workers(&self) -> Arc<Workers> {
        self.workers.clone()
    }

    /// In words, for the log.
    pub fn describe<E: Storage>(&self) -> &'static str {
        match (E::IS_BF16, self.bf16, self.fp32) {
            (true, true, _) => "bf16 products by oneDNN",
            (true, false, Library::Mkl) => "bf16 operands widened for fp32 products by MKL",
            (true, false, Library::Dnn) => "bf16 operands widened for fp32 products by oneDNN",
            (true, false, Library::Own) => "bf16 operands widened for fp32 products by fleet's kernels",
            (false, _, Library::Mkl) => "fp32 products by MKL",
            (false, _, Library::Dnn) => "fp32 products by oneDNN",
            (false, _, Library::Own) => "fp32 products by fleet's kernels",
        }
    }

    /// `out_to = x_ti w_oi^T`.
    pub fn forward<E: Storage>(&mut self, x: &[E], w: &[E], out: Out<E>, (t, i, o): (usize, usize, usize)) {
        let job = Job {
            m: t,
            n: o,
            k: i,
            a: x,
            a_stride: i,
            a_transposed: false,
            b: w,
            b_stride: i,
            b_transposed: true,
        };
        E::product(self, job, out);
    }

    pub(crate) fn each_alone(&mut self) -> EachAlone<'_> {
        self.each_alone = true;
        EachAlone(self)
    }

    /// Whether a product of so many rows goes to the kernel that reads weights once and in place.
    pub fn is_by_rows(&self, rows: usize) -> bool {
        rows == 1 || self.each_alone
    }

    /// `forward`, each row as if it were alone, by weights that need not be of its type.
    pub fn by_rows<E: Storage>(&self, x: &[E], w: RowWeights, out: Out<E>, shape: (usize, usize, usize)) {
        match out {
            Out::Store(out) => self.each_row(x, w, out, Store::Set, shape),
            Out::Set(out) => self.each_row(x, w, out, Store::Set, shape),
            Out::Add(out) => self.each_row(x, w, out, Store::Add, shape),
            Out::More(out) => self.each_row(x, w, out, Store::Add, shape),
        }
    }

    fn each_row<A: Element, C: Element>(
        &self,
        x: &[A],
        w: RowWeights,
        out: &mut [C],
        mode: Store,
        shape: (usize, usize, usize),
    ) {
        match w {
            RowWeights::Bf16(w) => self.rows(x, w, out, mode, shape),
            RowWeights::FewBits(packed) => self.few_bits(x, packed, out, mode, shape),
        }
    }

    fn few_bits<A: Element, C: Element>(
        &self,
        x: &[A],
        packed: Vec<PackedRows>,
        out: &mut [C],
        mode: Store,
        (t, i, o): (usize, usize, usize),
    ) {
        let pieces = columns(&mut out[..t * o], o, packed.iter().map(|piece| piece.outputs.clone()));
        self.workers.each(packed.into_iter().zip(pieces), |(piece, mut out)| {
            kernels::gemm_by_row(matrix(x, i, false, (t, i)), piece.rows.t(), mode, &mut out);
        });
    }

    /// `out_ti = dy_to w_oi`.
    pub fn backward_input<E: Storage>(
        &mut self,
        dy: &[E],
        w: &[E],
        out: Out<E>,
        (t, i, o): (usize, usize, usize),
    ) {
        let job = Job {
            m: t,
            n: i,
            k: o,
            a: dy,
            a_stride: o,
            a_transposed: false,
            b: w,
            b_stride: i,
            b_transposed: false,
        };
        E::product(self, job, out);
    }

    /// `out_oi = dy_to^T x_ti`.
    pub fn backward_weight<E: Storage>(
        &mut self,
        dy: &[E],
        x: &[E],
        out: Out<E>,
        (t, i, o): (usize, usize, usize),
    ) {
        let job = Job {
            m: o,
            n: i,
            k: t,
            a: dy,
            a_stride: o,
            a_transposed: true,
            b: x,
            b_stride: i,
            b_transposed: false,
        };
        E::product(self, job, out);
    }

    fn fp32(&mut self, job: Job<f32>, out: &mut [f32], mode: Store) {
        if job.is_by_rows() && self.is_by_rows(job.m) {
            return self.rows(job.a, job.b, out, mode, job.shape());
        }
        if self.fp32 == Library::Own {
            return self.own(job, out, mode);
        }
        let rows = self.workers.share(job.m, GRANULE);
        let beta = if mode == Store::Add { 1.0 } else { 0.0 };
        self.workers.pieces(&mut out[..job.m * job.n], rows * job.n, |piece, out| {
            let shape = (out.len() / job.n, job.n, job.k);
            let (a, b) = (job.a(piece * rows), job.b());
            match self.fp32 {
                Library::Dnn => dnn_matmul(shape, a, b, beta, out, job.n)
                    .expect("oneDNN computed such a product when it was tried at start"),
                _ => mkl_matmul(shape, a, b, beta, out, job.n),
            }
        });
    }

    /// By our own kernel. Several threads copy each sheet of B together, then each of them multiplies rows of A by it.
    fn own<E: Element, C: Element>(&mut self, job: Job<E>, out: &mut [C], mode: Store) {
        let out = &mut out[..job.m * job.n];
        let b = matrix(job.b, job.b_stride, job.b_transposed, (job.k, job.n));
        let share = self.workers.share(job.m, GRANULE);
        if share >= job.m {
            let a = matrix(job.a, job.a_stride, job.a_transposed, (job.m, job.k));
            return kernels::gemm(a, b, mode, out, &mut self.scratch[0]);
        }
        for sheet in kernels::sheets(job.k, job.n) {
            let packed = grown(&mut self.packed, sheet.packed_len());
            let part = sheet.share(self.workers.count());
            self.workers.pieces(packed, part, |piece, to| sheet.pack(b, piece * part, to));
            let packed = &*packed;
            let pieces = out.chunks_mut(share * job.n).zip(&mut self.scratch).enumerate();
            self.workers.each(pieces, |(number, (out, scratch))| {
                let first = number * share;
                let from = if job.a_transposed { first } else { first * job.a_stride };
                let shape = (out.len() / job.n, job.k);
                let a = matrix(&job.a[from..], job.a_stride, job.a_transposed, shape);
                sheet.multiply(a, packed, mode, out, scratch);
            });
        }
    }

    /// `out_to = x_ti w_oi^T` row by row, cut by its columns.
    fn rows<A: Element, B: Element, C: Element>(
        &self,
        x: &[A],
        w: &[B],
        out: &mut [C],
        mode: Store,
        (t, i, o): (usize, usize, usize),
    ) {
        let share = self.workers.share(o, if o * i < VECTOR_MIN { o } else { GRANULE });
        let shares = (0..o).step_by(share).map(|first| first..o.min(first + share));
        let pieces = shares.clone().zip(columns(&mut out[..t * o], o, shares));
        self.workers.each(pieces, |(share, mut out)| {
            let w = matrix(&w[share.start * i..], i, true, (i, share.len()));
            kernels::gemm_by_row(matrix(x, i, false, (t, i)), w, mode, &mut out);
        });
    }
}

/// Of rows that are `width` long, these columns, which rise: for each range all rows' part.
fn columns<C>(out: &mut [C], width: usize, ranges: impl Iterator<Item = Range<usize>>) -> Vec<Vec<&mut [C]>> {
    let mut rest: Vec<&mut [C]> = out.chunks_exact_mut(width).collect();
    let mut at = 0;
    let cut = ranges.map(|range| {
        let before = std::mem::replace(&mut at, range.end);
        let parts = rest.iter_mut().map(|row| {
            let (part, later) = std::mem::take(row)[range.start - before..].split_at_mut(range.len());
            *row = later;
            part
        });
        parts.collect()
    });
    cut.collect()
}

impl Storage for f32 {
    const NAME: &'static str = "32";

    fn narrow<'a>(x: &'a [f32], _room: &'a mut [f32], _workers: &Workers) -> &'a [f32] {
        x
    }

    fn product(products: &mut Products, job: Job<f32>, out: Out<f32>) {
        match out {
            Out::Store(out) | Out::Set(out) => products.fp32(job, out, Store::Set),
            Out::Add(out) | Out::More(out) => products.fp32(job, out, Store::Add),
        }
    }
}

impl Storage for bf16 {
    const NAME: &'static str = "bf16-mixed";

    fn narrow<'a>(x: &'a [f32], room: &'a mut [bf16], workers: &Workers) -> &'a [bf16] {
        convert(workers, x, room);
        room
    }

    fn product(products: &mut Products, job: Job<bf16>, out: Out<bf16>) {
        let own = products.fp32 == Library::Own && !products.bf16;
        match (job.is_by_rows() && products.is_by_rows(job.m), products.bf16) {
            (true, _) => products.by_rows(job.a, RowWeights::Bf16(job.b), out, job.shape()),
            (false, true) => native(products, job, out),
            (false, false) if own => match out {
                Out::Store(out) if !kernels::Sheet::sums_in_c(job.k) => products.own(job, out, Store::Set),
                Out::Store(out) => {
                    let mut wide = std::mem::take(&mut products.wide_out);
                    let len = job.m * job.n;
                    products.own(job, grown(&mut wide, len), Store::Set);
                    convert(&products.workers, &wide[..len], &mut out[..len]);
                    products.wide_out = wide;
                }
                Out::Set(out) => products.own(job, out, Store::Set),
                Out::Add(out) => products.own(job, out, Store::Add),
                Out::More(out) => {
                    let mut wide = std::mem::take(&mut products.wide_out);
                    let len = job.m * job.n;
                    products.own(job, grown(&mut wide, len), Store::Set);
                    add(&products.workers, &wide[..len], &mut out[..len]);
                    products.wide_out = wide;
                }
            },
            (false, false) => widened(products, job, out),
        }
    }
}

fn native(products: &mut Products, job: Job<bf16>, out: Out<bf16>) {
    let Products { workers, narrow_out, .. } = products;
    let rows = workers.share(job.m, GRANULE);
    let multiply = |out: &mut [bf16]| {
        workers.pieces(out, rows * job.n, |piece, out| {
            dnn_matmul((out.len() / job.n, job.n, job.k), job.a(piece * rows), job.b(), 0.0, out, job.n)
                .expect("oneDNN computed such a product when it was tried at start");
        });
    };
    let len = job.m * job.n;
    // oneDNN writes bf16 only: what goes into fp32 takes a detour.
    match out {
        Out::Store(out) => multiply(&mut out[..len]),
        Out::Set(out) => {
            multiply(grown(narrow_out, len));
            convert(workers, &narrow_out[..len], &mut out[..len]);
        }
        Out::Add(out) => {
            multiply(grown(narrow_out, len));
            add(workers, &narrow_out[..len], &mut out[..len]);
        }
        Out::More(out) => {
            multiply(grown(narrow_out, len));
            add(workers, &narrow_out[..len], &mut out[..len]);
        }
    }
}

fn widened(products: &mut Products, job: Job<bf16>, out: Out<bf16>) {
    let [mut wide_a, mut wide_b, mut wide_out] =
        [&mut products.wide_a, &mut products.wide_b, &mut products.wide_out].map(std::mem::take);
    convert(&products.workers, job.a, grown(&mut wide_a, job.a.len()));
    convert(&products.workers, job.b, grown(&mut wide_b, job.b.len()));
    let wide = Job {
        a: &wide_a[..job.a.len()],
        b: &wide_b[..job.b.len()],
        m: job.m,
        n: job.n,
        k: job.k,
        a_stride: job.a_stride,
        a_transposed: job.a_transposed,
        b_stride: job.b_stride,
        b_transposed: job.b_transposed,
    };
    let len = job.m * job.n;
    match out {
        Out::Store(out) => {
            products.fp32(wide, grown(&mut wide_out, len), Store::Set);
            convert(&products.workers, &wide_out[..len], &mut out[..len]);
        }
        Out::Set(out) => products.fp32(wide, out, Store::Set),
        Out::Add(out) => products.fp32(wide, out, Store::Add),
        Out::More(out) => {
            products.fp32(wide, grown(&mut wide_out, len), Store::Set);
            add(&products.workers, &wide_out[..len], &mut out[..len]);
        }
    }
    (products.wide_a, products.wide_b, products.wide_out) = (wide_a, wide_b, wide_out);
}

/// The first `len` numbers of a buffer that only grows.
pub(crate) fn grown<T: Copy + Default>(buffer: &mut Vec<T>, len: usize) -> &mut [T] {
    if buffer.len() < len {
        *buffer = vec![T::default(); len];
    }
    &mut buffer[..len]
}

fn convert<I: kernels::Element, O: kernels::Element>(workers: &Workers, x: &[I], out: &mut [O]) {
    let piece = workers.share(x.len(), CONVERT_GRANULE);
    workers.pieces(&mut out[..x.len()], piece, |i, out| kernels::convert(&x[i * piece..][..out.len()], out));
}

fn add<I: kernels::Element, O: kernels::Element>(workers: &Workers, x: &[I], out: &mut [O]) {
    let piece = workers.share(x.len(), CONVERT_GRANULE);
    workers.pieces(&mut out[..x.len()], piece, |i, out| kernels::add(out, &x[i * piece..][..out.len()]));
}

/// MKL does not use AVX-512 on AMD CPUs (measured there: MKL 115, oneDNN 250 GFLOP/s per core). On Intel's it does, and adds to what is there,
/// where oneDNN takes memory for the product and adds it afterwards: a step is 1.03 to 1.27 times as fast (Sapphire Rapids). With AVX2 our own kernel is even over
/// the shapes of a step (Zen 3, GFLOP/s per core: 79 to 91), where MKL falls to 58 on wide outputs and long strides.
#[cfg(target_arch = "x86_64")]
fn fp32_library() -> Library {
    match kernels::Level::best() {
        kernels::Level::Plain => Library::Mkl,
        kernels::Level::Avx2 => Library::Own,
        // AVX-512 and better.
        _ if is_intel() => Library::Mkl,
        _ if dnn_works::<f32>(|shape, a, b, out| dnn_matmul(shape, a, b, 0.0, out, shape.1)) => Library::Dnn,
        _ => Library::Own,
    }
}
#[cfg(not(target_arch = "x86_64"))]
fn fp32_library() -> Library {
    Library::Mkl
}

#[cfg(target_arch = "x86_64")]
fn is_intel() -> bool {
    let vendor = std::arch::x86_64::__cpuid(0);
    [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes).concat() == *b"GenuineIntel"
}

/// Whether the CPU multiplies bf16 faster than fp32.
#[cfg(target_arch = "x86_64")]
pub fn cpu_has_bf16() -> bool {
    std::arch::is_x86_feature_detected!("avx512bf16")
}
#[cfg(not(target_arch = "x86_64"))]
pub fn cpu_has_bf16() -> bool {
    false
}

/// Tries a small product with a transposed operand against a plain loop.
fn dnn_works<T: HostNumber>(
    multiply: impl Fn((usize, usize, usize), Matrix<T>, Matrix<T>, &mut [T]) -> Result<(), String>,
) -> bool {
    let (m, n, k) = (16, 24, 32);
    let number = |i: usize, modulus: usize| (i % modulus) as f32 / 8.0 - 0.5;
    let a: Vec<T> = (0..m * k).map(|i| T::from_f32(number(i, 9))).collect();
    let b: Vec<T> = (0..n * k).map(|i| T::from_f32(number(i, 7))).collect();
    let mut out = vec![T::from_f32(1.0); m * n];
    if multiply((m, n, k), Matrix::new(&a, k), Matrix::transposed(&b, k), &mut out).is_err() {
        return false;
    }
    (0..m * n).all(|at| {
        let (row, col) = (at / n, at % n);
        let sum: f32 = (0..k).map(|j| a[row * k + j].to_f32() * b[col * k + j].to_f32()).sum();
        (sum - out[at].to_f32()).abs() < 0.05
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workers;

    fn numbers(len: usize, seed: usize) -> Vec<f32> {
        (0..len).map(|i| ((i * 7919 + seed * 104_729) % 1000) as f32 / 500.0 - 1.0).collect()
    }

    fn check<E: Storage>(mut products: Products, tolerance: f32) {
        let (t, i, o) = (37, 48, 33);
        let [x, w, dy] = [(t * i, 1), (o * i, 2), (t * o, 3)]
            .map(|(len, seed)| numbers(len, seed).into_iter().map(E::from_f32).collect::<Vec<E>>());
        let dot = |n: usize, f: &dyn Fn(usize) -> (E, E)| -> f32 {
            (0..n).map(f).map(|(a, b)| a.to_f32() * b.to_f32()).sum()
        };
        let close = |got: &[f32], want: &dyn Fn(usize) -> f32| {
            for (at, got) in got.iter().enumerate() {
                assert!((got - want(at)).abs() < tolerance, "{at}: {got} {}", want(at));
            }
        };
        let forward = |at: usize| dot(i, &|j| (x[at / o * i + j], w[at % o * i + j]));
        let mut out = vec![E::default(); t * o];
        products.forward(&x, &w, Out::Store(&mut out), (t, i, o));
        close(&out.iter().map(|v| v.to_f32()).collect::<Vec<_>>(), &forward);
        let mut sum = vec![2.0; t * o];
        products.forward(&x, &w, Out::Add(&mut sum), (t, i, o));
        close(&sum, &|at| forward(at) + 2.0);

        let mut dx = vec![0.0; t * i];
        products.backward_input(&dy, &w, Out::Set(&mut dx), (t, i, o));
        close(&dx, &|at| dot(o, &|j| (dy[at / i * o + j], w[j * i + at % i])));
        let mut dw = vec![1.0; o * i];
        products.backward_weight(&dy, &x, Out::Add(&mut dw), (t, i, o));
        close(&dw, &|at| dot(t, &|j| (dy[j * o + at / i], x[j * i + at % i])) + 1.0);
    }

    #[test]
    fn products_equal_plain_loops_in_both_precisions_and_on_any_number_of_threads() {
        for threads in [1, 3] {
            let products = || Products::new(workers(threads).unwrap());
            check::<f32>(products(), 1e-4);
            check::<bf16>(products(), 0.15);
        }
    }

    /// What is chosen where the CPU or the libtorch lacks what others have.
    #[test]
    fn every_library_gives_the_same_products() {
        let has_dnn = dnn_works::<f32>(|shape, a, b, out| dnn_matmul(shape, a, b, 0.0, out, shape.1));
        for fp32 in [Library::Own, Library::Mkl, Library::Dnn] {
            if fp32 == Library::Dnn && !has_dnn {
                eprintln!("SKIPPED: oneDNN does not compute here");
                continue;
            }
            for bf16_products in [false, cpu_has_bf16() && has_dnn] {
                let products =
                    || Products { fp32, bf16: bf16_products, ..Products::new(workers(1).unwrap()) };
                check::<f32>(products(), 1e-4);
                check::<bf16>(products(), 0.15);
            }
        }
    }
}
