//! Ranges of libtorch's tensors for NCCL, as addresses.

#![allow(unsafe_code)]

use fleet_collectives::nccl::{NcclCollective, Numbers, Work};
use fleet_collectives::{DType, Result};
use std::ops::Range;
use tch::Tensor;

/// Starts a call on a range of a flat tensor on the communicator's device. The tensor's owner keeps it for longer than `nccl`, and leaves
/// the range alone until the call was waited for.
pub fn post(
    nccl: &mut NcclCollective,
    tensor: &Tensor,
    (range, dtype): (Range<usize>, DType),
    work: Work,
) -> Result<u64> {
    assert!(tensor.device().is_cuda() && tensor.is_contiguous());
    assert!(tensor.kind().elt_size_in_bytes() == dtype.size(), "numbers of this type");
    assert!(range.start <= range.end && range.end <= tensor.numel(), "a range inside of the tensor");
    let address = tensor.data_ptr() as u64 + (range.start * dtype.size()) as u64;
    // SAFETY: inside the tensor, which `NcclTransport` drops after the communicator; its one user, the strategy, waits for a range before it
    // touches it again.
    unsafe { nccl.post(work, Numbers { address, count: range.len(), dtype }) }
}
