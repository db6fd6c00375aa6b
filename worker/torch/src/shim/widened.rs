//! Products with matrices in few bits, which are widened when they are read.

#![allow(unsafe_code)]

use super::{ERROR_MAX, at_tensor, checked};
use crate::Result;
use crate::packed::Packed;
use std::ffi::{c_char, c_int, c_void};
use std::mem::ManuallyDrop;
use std::ops::Range;
use std::sync::Arc;
use tch::Tensor;

type Widen = unsafe extern "C" fn(from: *const c_void, start: i64, end: i64) -> *mut at_tensor;

unsafe extern "C" {
    fn fleet_torch_widened(
        x: *const at_tensor,
        widen: Widen,
        give_back: unsafe extern "C" fn(from: *mut c_void),
        from: *mut c_void,
        start: i64,
        end: i64,
        out: *mut *mut at_tensor,
        error: *mut c_char,
        error_len: usize,
    ) -> c_int;
}

// SAFETY: its tensors are never changed after it was made, and libtorch lets several threads read a tensor.
unsafe impl Sync for Packed {}

/// `x` times the transpose of a product's weight in `packed`, without a gradient for that. A graph keeps nothing of the weight: its backward widens it again.
pub fn product(x: &Tensor, packed: &Arc<Packed>, weight: &Range<usize>) -> Result<Tensor> {
    unsafe extern "C" fn give_back(from: *mut c_void) {
        // SAFETY: made with `Arc::into_raw` below, and given back once.
        drop(unsafe { Arc::from_raw(from.cast_const().cast::<Packed>()) });
    }
    let from = Arc::into_raw(packed.clone()).cast_mut().cast();
    let (start, end) = (weight.start as i64, weight.end as i64);
    let mut out = std::ptr::null_mut();
    // SAFETY: `x` lives through the call, `from` until it is given back.
    checked(|error| unsafe {
        let x = x.as_ptr().cast();
        fleet_torch_widened(x, widen, give_back, from, start, end, &mut out, error, ERROR_MAX)
    })?;
    // SAFETY: made with `new` for the caller, and taken over once.
    Ok(unsafe { Tensor::from_ptr(out.cast()) })
}

/// Called by the shim, on whatever thread autograd works.
///
/// # Safety
/// `from` is a living `Packed`.
unsafe extern "C" fn widen(from: *const c_void, start: i64, end: i64) -> *mut at_tensor {
    // SAFETY: the caller says so.
    let packed = unsafe { &*from.cast::<Packed>() };
    match packed.widen(&(start as usize..end as usize)) {
        // The shim deletes it.
        Ok(wide) => ManuallyDrop::new(wide).as_mut_ptr().cast(),
        Err(_) => std::ptr::null_mut(),
    }
}
