//! Which devices there are. libtorch's CUDA part is loaded when it is asked for the first time, so that a machine without it misses nothing.

use crate::shim;
use std::sync::OnceLock;

/// How many CUDA devices can be used, or why none.
pub fn cuda_devices() -> Result<usize, String> {
    static FOUND: OnceLock<Result<usize, String>> = OnceLock::new();
    FOUND.get_or_init(find_cuda).clone()
}

fn find_cuda() -> Result<usize, String> {
    shim::load("libtorch_cuda.so").map_err(|why| format!("libtorch's CUDA part cannot be loaded: {why}"))?;
    match tch::Cuda::device_count() {
        count @ 1.. => Ok(count as usize),
        _ => Err("libtorch finds no CUDA device; look at nvidia-smi".into()),
    }
}
