//! What the tests of this package share.

use tch::Device;

/// CUDA as well where there is one.
pub fn devices() -> Vec<Device> {
    match fleet_torch::device::cuda_devices() {
        Ok(_) => vec![Device::Cpu, Device::Cuda(0)],
        Err(why) => {
            eprintln!("SKIPPED on CUDA: {why}");
            vec![Device::Cpu]
        }
    }
}
