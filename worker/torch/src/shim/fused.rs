//! The kernels of `fleet_kernels::cuda::FUSED` over libtorch's tensors, with their gradients where autograd is to see them.

#![allow(unsafe_code)]

use super::cuda::{Arg, Grid, Module};
use super::{ERROR_MAX, at_tensor, checked};
use crate::{Error, Result};
use std::ffi::{c_char, c_int, c_void};
use tch::{Kind, Tensor};

type Launch = unsafe extern "C" fn(
    fused: *const c_void,
    kernel: c_int,
    pointers: *const *mut c_void,
    pointer_count: c_int,
    numbers: *const i64,
    number_count: c_int,
) -> c_int;

unsafe extern "C" {
    fn fleet_torch_swiglu(
        x: *const at_tensor,
        launch: Launch,
        fused: *const c_void,
        out: *mut *mut at_tensor,
        error: *mut c_char,
        error_len: usize,
    ) -> c_int;
    fn fleet_torch_rotary(
        x: *const at_tensor,
        cosines: *const at_tensor,
        sines: *const at_tensor,
        launch: Launch,
        fused: *const c_void,
        out: *mut *mut at_tensor,
        error: *mut c_char,
        error_len: usize,
    ) -> c_int;
}

/// Compiled for one type of elements on one device.
pub struct Fused {
    module: Module,
    kind: Kind,
}

impl Fused {
    pub fn compile(kind: Kind, number: usize) -> Result<Fused, String> {
        let element = if kind == Kind::BFloat16 { "bf16" } else { "float" };
        Ok(Fused { module: Module::compile(fleet_kernels::cuda::FUSED, element, number)?, kind })
    }

    /// Losses of `[rows, vocab]` logits, each times its weight, `[rows]` in fp32. With `scale` the logits become their gradient times that.
    /// Targets are `[rows]` and lie within the vocabulary.
    pub fn cross_entropy(
        &self,
        logits: &Tensor,
        targets: &Tensor,
        weights: &Tensor,
        scale: Option<f64>,
    ) -> Result<Tensor> {
        let (rows, vocab) = logits.size2()?;
        let fits = logits.kind() == self.kind
            && targets.kind() == Kind::Int64
            && weights.kind() == Kind::Float
            && [targets, weights].iter().all(|tensor| tensor.size() == [rows] && tensor.is_contiguous());
        if !fits || !logits.is_contiguous() {
            return Err(Error::of("cross_entropy: other tensors than it takes"));
        }
        let losses = Tensor::f_empty([rows], (Kind::Float, logits.device()))?;
        let pointer = |tensor: &Tensor| Arg::Pointer(tensor.data_ptr() as u64);
        let args = [
            pointer(logits),
            pointer(targets),
            pointer(weights),
            pointer(&losses),
            Arg::Whole(vocab),
            Arg::Real(scale.unwrap_or(0.0) as f32),
            Arg::Whole(i64::from(scale.is_some())),
        ];
        // SAFETY: shapes and types were looked at above.
        unsafe { self.module.launch(c"cross_entropy", Grid::Each(rows as u64), &args) }
            .map_err(|e| Error::of(&e))?;
        Ok(losses)
    }

    /// `silu(x[.., :f]) * x[.., f:]`.
    pub fn swiglu(&'static self, x: &Tensor) -> Result<Tensor> {
        let mut out = std::ptr::null_mut();
        // SAFETY: `x` lives through the call, `self` as long as the process; the shim checks shapes.
        checked(|error| unsafe {
            fleet_torch_swiglu(x.as_ptr().cast(), launch, self.pointer(), &mut out, error, ERROR_MAX)
        })?;
        // SAFETY: made with `new` for the caller, and taken over once.
        Ok(unsafe { Tensor::from_ptr(out.cast()) })
    }

    /// `[b, s, n, d]` turned by its positions; `cosines` and `sines` are `[s, half]` in fp32.
    pub fn rotary(&'static self, x: &Tensor, (cosines, sines): &(Tensor, Tensor)) -> Result<Tensor> {
        let mut out = std::ptr::null_mut();
        // SAFETY: the tensors live through the call, `self` as long as the process; the shim checks shapes.
        checked(|error| unsafe {
            fleet_torch_rotary(
                x.as_ptr().cast(),
                cosines.as_ptr().cast(),
                sines.as_ptr().cast(),
                launch,
                self.pointer(),
                &mut out,
                error,
                ERROR_MAX,
            )
        })?;
        // SAFETY: made with `new` for the caller, and taken over once.
        Ok(unsafe { Tensor::from_ptr(out.cast()) })
    }

    fn pointer(&self) -> *const c_void {
        std::ptr::from_ref(self).cast()
    }
}

/// Called by the shim, on whatever thread autograd works.
///
/// # Safety
/// `fused` is a living `Fused`; the lists are as long as they say, and what the kernel takes.
unsafe extern "C" fn launch(
    fused: *const c_void,
    kernel: c_int,
    pointers: *const *mut c_void,
    pointer_count: c_int,
    numbers: *const i64,
    number_count: c_int,
) -> c_int {
    // SAFETY: the caller says so.
    let (fused, pointers, numbers) = unsafe {
        (
            &*fused.cast::<Fused>(),
            std::slice::from_raw_parts(pointers, pointer_count as usize),
            std::slice::from_raw_parts(numbers, number_count as usize),
        )
    };
    let mut args: Vec<Arg> = pointers.iter().map(|pointer| Arg::Pointer(*pointer as u64)).collect();
    let (name, grid) = match (kernel, numbers) {
        (0, [rows, _]) => (c"swiglu", Grid::InTurn(*rows as u64)),
        (1, [rows, _]) => (c"swiglu_backward", Grid::InTurn(*rows as u64)),
        (2, [tokens, ..]) => (c"rotary", Grid::InTurn(*tokens as u64)),
        _ => return 1,
    };
    match (kernel, numbers.split_last()) {
        (2, Some((sign, others))) => {
            args.extend(others.iter().map(|number| Arg::Whole(*number)));
            args.push(Arg::Real(*sign as f32));
        }
        _ => args.extend(numbers.iter().map(|number| Arg::Whole(*number))),
    }
    // SAFETY: as above.
    match unsafe { fused.module.launch(name, grid, &args) } {
        Ok(()) => 0,
        Err(_) => 1,
    }
}
