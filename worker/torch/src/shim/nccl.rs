//! Ranges of libtorch's tensors for NCCL, as addresses.

#![allow(unsafe_code)]

use fleet_collectives::Result;
use fleet_collectives::nccl::{Call, NcclCollective, Numbers};
use std::ops::Range;
use tch::{Kind, Tensor};

/// Starts a call on a range of a flat tensor in fp32 on the communicator's device. The tensor's owner keeps it for longer than `nccl`, and leaves
/// the range alone until the call was waited for.
pub fn post(nccl: &mut NcclCollective, tensor: &Tensor, range: Range<usize>, call: Call) -> Result<u64> {
    assert!(tensor.device().is_cuda() && tensor.kind() == Kind::Float && tensor.is_contiguous());
    assert!(range.start <= range.end && range.end <= tensor.numel(), "a range inside of the tensor");
    let address = tensor.data_ptr() as u64 + (range.start * size_of::<f32>()) as u64;
    // SAFETY: inside the tensor, which `NcclTransport` drops after the communicator; its one user, the strategy, waits for a range before it
    // touches it again.
    unsafe { nccl.post(call, Numbers { address, count: range.len() }) }
}
