//! The only unsafe code of this package: matrix products of MKL and oneDNN, both inside libtorch_cpu.so, behind checked slices.
//!
//! Matrices are row-major. `stride` is the distance between rows in elements. The libraries may take memory of their own; no pointer is kept.

#![allow(unsafe_code)]

use fleet_learn::HostNumber;
use std::ffi::{CStr, c_char, c_int, c_void};

#[link(name = "fleet_shim", kind = "static")]
unsafe extern "C" {
    fn fleet_dnn_matmul(
        bf16: c_int,
        m: i64,
        n: i64,
        k: i64,
        a: *const c_void,
        a_row: i64,
        a_col: i64,
        b: *const c_void,
        b_row: i64,
        b_col: i64,
        out: *mut c_void,
        out_row: i64,
        beta: f32,
        error: *mut c_char,
        error_len: usize,
    ) -> c_int;
    fn fleet_set_threads(threads: c_int);
    fn fleet_libtorch_loaded() -> u64;
    fn fleet_libtorch_compiled() -> u64;
}

#[link(name = "torch_cpu", kind = "dylib")]
unsafe extern "C" {
    /// MKL's Fortran interface: column-major.
    fn sgemm_(
        trans_a: *const c_char,
        trans_b: *const c_char,
        m: *const c_int,
        n: *const c_int,
        k: *const c_int,
        alpha: *const f32,
        a: *const f32,
        lda: *const c_int,
        b: *const f32,
        ldb: *const c_int,
        beta: *const f32,
        c: *mut f32,
        ldc: *const c_int,
    );
}

/// A row-major matrix within a slice, read as it is or transposed.
#[derive(Clone, Copy)]
pub struct Matrix<'a, T> {
    data: &'a [T],
    stride: usize,
    transposed: bool,
}

impl<'a, T> Matrix<'a, T> {
    pub fn new(data: &'a [T], stride: usize) -> Self {
        Self { data, stride, transposed: false }
    }

    /// The transpose of the matrix that lies in `data`.
    pub fn transposed(data: &'a [T], stride: usize) -> Self {
        Self { data, stride, transposed: true }
    }

    /// Panics unless a `rows x cols` matrix (after transposition) lies within the slice.
    fn check(&self, rows: usize, cols: usize) {
        let (stored_rows, stored_cols) = if self.transposed { (cols, rows) } else { (rows, cols) };
        check(self.data.len(), self.stride, stored_rows, stored_cols);
    }

    fn steps(&self) -> (i64, i64) {
        if self.transposed { (1, self.stride as i64) } else { (self.stride as i64, 1) }
    }
}

fn check(len: usize, stride: usize, rows: usize, cols: usize) {
    assert!(rows > 0 && cols > 0 && stride >= cols, "matrix of {rows} x {cols} with stride {stride}");
    assert!((rows - 1) * stride + cols <= len, "{rows} x {cols}, stride {stride}, in a slice of {len}");
    assert!(rows.max(stride) <= i32::MAX as usize, "matrix too large for BLAS");
}

/// `out[m,n] = a[m,k] b[k,n] + beta out` in fp32 by MKL.
pub fn mkl_matmul(
    (m, n, k): (usize, usize, usize),
    a: Matrix<f32>,
    b: Matrix<f32>,
    beta: f32,
    out: &mut [f32],
    out_stride: usize,
) {
    a.check(m, k);
    b.check(k, n);
    check(out.len(), out_stride, m, n);
    let letter = |transposed: bool| if transposed { c"T" } else { c"N" };
    let (m, n, k) = (m as c_int, n as c_int, k as c_int);
    let (a_stride, b_stride, out_stride) = (a.stride as c_int, b.stride as c_int, out_stride as c_int);
    // A row-major product is the column-major product of the transposes: out^T = b^T a^T.
    // SAFETY: the checks above prove that every element BLAS reads or writes lies in its slice; `out` is borrowed mutably, so it
    // overlaps neither input; the scalars outlive the call.
    unsafe {
        sgemm_(
            letter(b.transposed).as_ptr(),
            letter(a.transposed).as_ptr(),
            &n,
            &m,
            &k,
            &1.0,
            b.data.as_ptr(),
            &b_stride,
            a.data.as_ptr(),
            &a_stride,
            &beta,
            out.as_mut_ptr(),
            &out_stride,
        );
    }
}

/// `out[m,n] = a[m,k] b[k,n] + beta out` by oneDNN. `Err` is libtorch's own line, for instance that the CPU lacks the instructions.
pub fn dnn_matmul<T: HostNumber>(
    (m, n, k): (usize, usize, usize),
    a: Matrix<T>,
    b: Matrix<T>,
    beta: f32,
    out: &mut [T],
    out_stride: usize,
) -> Result<(), String> {
    a.check(m, k);
    b.check(k, n);
    check(out.len(), out_stride, m, n);
    let mut error = [0 as c_char; ERROR_MAX];
    let ((a_row, a_col), (b_row, b_col)) = (a.steps(), b.steps());
    // SAFETY: as in `mkl_matmul`; `T` is f32 or bf16 as the first argument says; `error` is as long as told.
    let failed = unsafe {
        fleet_dnn_matmul(
            T::IS_BF16 as c_int,
            m as i64,
            n as i64,
            k as i64,
            a.data.as_ptr().cast(),
            a_row,
            a_col,
            b.data.as_ptr().cast(),
            b_row,
            b_col,
            out.as_mut_ptr().cast(),
            out_stride as i64,
            beta,
            error.as_mut_ptr(),
            error.len(),
        )
    };
    outcome(failed, &error)
}

/// Bytes for an error text of libtorch: its first line, without the stack that follows.
const ERROR_MAX: usize = 512;

fn outcome(failed: c_int, error: &[c_char; ERROR_MAX]) -> Result<(), String> {
    if failed == 0 {
        return Ok(());
    }
    // SAFETY: the shim ends what it writes with a zero.
    let text = unsafe { CStr::from_ptr(error.as_ptr()) }.to_string_lossy();
    Err(text.split("\nException raised from").next().unwrap_or_default().to_owned())
}

/// How many threads a product called from this thread uses.
pub fn set_threads(threads: u32) {
    // SAFETY: takes a number by value and throws nothing.
    unsafe { fleet_set_threads(threads as c_int) }
}

/// The libtorch that this program was built for.
pub fn libtorch_version() -> String {
    // SAFETY: returns a number.
    version(unsafe { fleet_libtorch_compiled() })
}

/// The libtorch that was loaded, where it is another one than this program was built for: nothing may be asked of it then.
pub fn other_libtorch() -> Option<String> {
    // SAFETY: both return a number, and the first one asks a function without arguments, where there is such a one.
    let (loaded, compiled) = unsafe { (fleet_libtorch_loaded(), fleet_libtorch_compiled()) };
    match loaded {
        0 => Some("older than 2.9".to_owned()),
        _ => (loaded != compiled).then(|| version(loaded)),
    }
}

/// One byte each for major, minor and patch, from the highest on.
fn version(number: u64) -> String {
    let [major, minor, patch, ..] = number.to_be_bytes();
    format!("{major}.{minor}.{patch}")
}
