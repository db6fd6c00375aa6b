//! The only unsafe code of this package: calls that tch does not have, over its tensors.

#![allow(unsafe_code)]

pub mod cuda;
#[cfg(test)]
mod emulated;
pub mod fused;
pub mod nccl;
pub mod widened;

use crate::{Error, Result, first_line};
use fleet_collectives::PerRank;
use half::bf16;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::sync::Arc;
use tch::{Kind, Tensor};

/// tch does not name the type that its pointers point to.
#[allow(non_camel_case_types)]
type at_tensor = std::ffi::c_void;

#[link(name = "fleet_torch_shim", kind = "static")]
unsafe extern "C" {
    fn fleet_torch_grad(
        output: *const at_tensor,
        seed: *const at_tensor,
        inputs: *const *const at_tensor,
        count: c_int,
        grads: *mut *mut at_tensor,
        error: *mut c_char,
        error_len: usize,
    ) -> c_int;
    fn fleet_torch_memory_in_use(
        device: c_int,
        bytes: *mut u64,
        error: *mut c_char,
        error_len: usize,
    ) -> c_int;
    fn fleet_torch_empty_cache(is_cuda: c_int, error: *mut c_char, error_len: usize) -> c_int;
    fn fleet_torch_pinned(
        x: *const at_tensor,
        out: *mut *mut at_tensor,
        error: *mut c_char,
        error_len: usize,
    ) -> c_int;
    fn fleet_torch_over(
        data: *mut c_void,
        len: i64,
        number: c_int,
        give_back: unsafe extern "C" fn(owner: *mut c_void),
        owner: *mut c_void,
        out: *mut *mut at_tensor,
        error: *mut c_char,
        error_len: usize,
    ) -> c_int;
    fn fleet_torch_adamw(
        params: *const *const at_tensor,
        grads: *const *const at_tensor,
        moments1: *const *const at_tensor,
        moments2: *const *const at_tensor,
        steps: *const *const at_tensor,
        count: c_int,
        lr: f64,
        beta1: f64,
        beta2: f64,
        decay: f64,
        eps: f64,
        divisor: *const at_tensor,
        skip: *const at_tensor,
        error: *mut c_char,
        error_len: usize,
    ) -> c_int;
}

/// Bytes for an error text.
const ERROR_MAX: usize = 1024;

fn checked(call: impl FnOnce(*mut c_char) -> c_int) -> Result<()> {
    let mut error = [0 as c_char; ERROR_MAX];
    if call(error.as_mut_ptr()) == 0 {
        return Ok(());
    }
    // SAFETY: the shim ends what it writes with a zero.
    let text = unsafe { CStr::from_ptr(error.as_ptr()) }.to_string_lossy();
    Err(Error(first_line(&text)))
}

fn pointers<'a>(tensors: impl IntoIterator<Item = &'a Tensor>) -> Vec<*const at_tensor> {
    tensors.into_iter().map(|tensor| tensor.as_ptr().cast()).collect()
}

/// Bytes of a CUDA device that tensors have, that libtorch keeps, and the most that tensors had.
pub fn memory_in_use(device: usize) -> Result<[u64; 3]> {
    let mut bytes = [0; 3];
    // SAFETY: the shim writes three numbers.
    checked(|error| unsafe {
        fleet_torch_memory_in_use(device as c_int, bytes.as_mut_ptr(), error, ERROR_MAX)
    })?;
    Ok(bytes)
}

/// Gives back what libtorch keeps of CUDA's devices, or of Metal's, and no tensor has.
pub fn empty_cache(is_cuda: bool) -> Result<()> {
    // SAFETY: plain numbers.
    checked(|error| unsafe { fleet_torch_empty_cache(c_int::from(is_cuda), error, ERROR_MAX) })
}

/// Gradients of `sum(output * seed)` for each of `inputs`; `None` for one that has no part in it. The graph is gone afterwards.
pub fn grad(output: &Tensor, seed: &Tensor, inputs: &[&Tensor]) -> Result<Vec<Option<Tensor>>> {
    let given = pointers(inputs.iter().copied());
    let mut grads = vec![std::ptr::null_mut(); inputs.len()];
    // SAFETY: all pointers are tensors that live through the call; `grads` is as long as `inputs`.
    checked(|error| unsafe {
        fleet_torch_grad(
            output.as_ptr().cast(),
            seed.as_ptr().cast(),
            given.as_ptr(),
            given.len() as c_int,
            grads.as_mut_ptr(),
            error,
            ERROR_MAX,
        )
    })?;
    // SAFETY: what is not null was made with `new` for the caller, and is taken over once.
    let taken = |grad: *mut at_tensor| (!grad.is_null()).then(|| unsafe { Tensor::from_ptr(grad.cast()) });
    Ok(grads.into_iter().map(taken).collect())
}

/// A copy in memory of the host that a device reads by itself. tch's own names a device, which libtorch warns of each time.
pub fn pinned(tensor: &Tensor) -> Result<Tensor> {
    let mut out = std::ptr::null_mut();
    // SAFETY: `tensor` lives through the call.
    checked(|error| unsafe { fleet_torch_pinned(tensor.as_ptr().cast(), &mut out, error, ERROR_MAX) })?;
    // SAFETY: made with `new` for the caller, and taken over once.
    Ok(unsafe { Tensor::from_ptr(out.cast()) })
}

/// This rank's buffer as a flat tensor of `kind`, fp32, bf16 or fp16, on the CPU, which keeps the buffer alive. Whoever uses it holds to what `Exchange` asks: what is
/// posted is left alone until it was waited for.
pub fn over(memory: PerRank, kind: Kind) -> Result<Tensor> {
    unsafe extern "C" fn give_back(owner: *mut c_void) {
        // SAFETY: made with `Box::into_raw` below, and given back once.
        drop(unsafe { Box::from_raw(owner.cast::<PerRank>()) });
    }
    let number = match kind {
        Kind::Float => 0,
        Kind::BFloat16 => 1,
        Kind::Half => 2,
        other => unreachable!("no room is of {other:?}"),
    };
    let (data, len) = (memory.as_mut_ptr(), memory.len() / kind.elt_size_in_bytes());
    assert!(data.cast::<f32>().is_aligned(), "buffers of ranks are page-aligned");
    let owner = Box::into_raw(Box::new(memory));
    let mut out = std::ptr::null_mut();
    // SAFETY: the buffer has `len` numbers, of which every pattern of bits is a value, and lives until libtorch gives the owner back: that is
    // once, from whichever thread, and never where the call fails (the mapping then stays until the process ends).
    checked(|error| unsafe {
        fleet_torch_over(data.cast(), len as i64, number, give_back, owner.cast(), &mut out, error, ERROR_MAX)
    })?;
    // SAFETY: made with `new` for the caller, and taken over once.
    Ok(unsafe { Tensor::from_ptr(out.cast()) })
}

/// Numbers in memory of the host.
pub enum Wide {
    Fp32(Vec<f32>),
    Bf16(Vec<bf16>),
}

/// The first `len` of them as a flat tensor of the CPU, which keeps them alive. It is read alone.
pub fn lent(numbers: Arc<Wide>, len: usize) -> Result<Tensor> {
    unsafe extern "C" fn give_back(owner: *mut c_void) {
        // SAFETY: made with `Arc::into_raw` below, and given back once.
        drop(unsafe { Arc::from_raw(owner.cast_const().cast::<Wide>()) });
    }
    let (data, number, there) = match &*numbers {
        Wide::Fp32(numbers) => (numbers.as_ptr().cast::<c_void>(), 0, numbers.len()),
        Wide::Bf16(numbers) => (numbers.as_ptr().cast(), 1, numbers.len()),
    };
    assert!(len <= there, "{len} of {there} numbers");
    let owner = Arc::into_raw(numbers).cast_mut().cast();
    let mut out = std::ptr::null_mut();
    // SAFETY: there are `len` numbers, which live, where they are, until libtorch gives the owner back: that is once, from whichever thread, and never
    // where the call fails. Nobody writes to the tensor.
    checked(|error| unsafe {
        fleet_torch_over(data.cast_mut(), len as i64, number, give_back, owner, &mut out, error, ERROR_MAX)
    })?;
    // SAFETY: made with `new` for the caller, and taken over once.
    Ok(unsafe { Tensor::from_ptr(out.cast()) })
}

/// Tensors of one optimizer step: all of the same lengths, on one device.
pub struct AdamWTensors<'a> {
    pub params: &'a [Tensor],
    pub grads: &'a [Tensor],
    pub moments1: &'a [Tensor],
    pub moments2: &'a [Tensor],
    /// Of one number each: how many steps there were, this one included.
    pub steps: &'a [Tensor],
    /// Of one number: gradients are divided by it.
    pub divisor: &'a Tensor,
    /// Of one number: 1 leaves everything as it is.
    pub skip: &'a Tensor,
}

/// Numbers of one optimizer step.
#[derive(Clone, Copy)]
pub struct AdamWNumbers {
    pub lr: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub decay: f64,
    pub eps: f64,
}

pub fn adamw(t: &AdamWTensors, n: AdamWNumbers) -> Result<()> {
    let lists = [t.params, t.grads, t.moments1, t.moments2, t.steps];
    assert!(lists.iter().all(|list| list.len() == t.params.len()), "one of each per parameter");
    let [params, grads, moments1, moments2, steps] = lists.map(pointers);
    // SAFETY: all pointers are tensors that live through the call, and every list has `count` of them.
    checked(|error| unsafe {
        fleet_torch_adamw(
            params.as_ptr(),
            grads.as_ptr(),
            moments1.as_ptr(),
            moments2.as_ptr(),
            steps.as_ptr(),
            params.len() as c_int,
            n.lr,
            n.beta1,
            n.beta2,
            n.decay,
            n.eps,
            t.divisor.as_ptr().cast(),
            t.skip.as_ptr().cast(),
            error,
            ERROR_MAX,
        )
    })
}

/// Loads a library for all that is asked of libtorch afterwards, or says why not.
pub fn load(name: &str) -> std::result::Result<(), String> {
    let name = CString::new(name).map_err(|e| e.to_string())?;
    // SAFETY: libraries of libtorch register themselves when they are loaded; they stay for the life of the process.
    let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) };
    if !handle.is_null() {
        return Ok(());
    }
    // SAFETY: dlerror gives a text that ends with a zero, or null, and is read before the next call.
    let why = unsafe { libc::dlerror() };
    match why.is_null() {
        true => Err("it cannot be loaded".into()),
        // SAFETY: see above.
        false => Err(unsafe { CStr::from_ptr(why) }.to_string_lossy().into_owned()),
    }
}
