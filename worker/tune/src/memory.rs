//! The memory of a device, and how many sequences fit into it.

use crate::Device;
use fleet_torch::device::{self, InUse};
use serde::Serialize;

/// Of a sequence, where nobody has measured one.
const BYTES_PER_SAMPLE: u64 = 2 << 30;

/// Share of the free memory that a batch may take.
const SHARE: f64 = 0.8;

/// Looks at the memory of a device, as far as that tells of it. There is no collector of garbage to call: what is dropped is free.
///
/// ```
/// use fleet_tune::{Device, MemoryManager, MemoryUsage};
///
/// let memory = MemoryManager::new(Device::Cpu);
/// assert_eq!(memory.usage(), MemoryUsage::Unsupported { status: "unsupported_device" });
/// assert_eq!(memory.optimize_batch_size(4, None), 4);
/// memory.clear_cache();
/// ```
#[derive(Clone, Copy, Debug)]
pub struct MemoryManager {
    device: Device,
}

/// Bytes of a CUDA device that this process takes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum MemoryUsage {
    Cuda {
        /// By tensors.
        allocated: u64,
        /// With what is kept for the next ones.
        cached: u64,
        /// The most by tensors so far.
        max_allocated: u64,
    },
    /// `unsupported_device`: others do not tell.
    Unsupported { status: &'static str },
}

impl MemoryManager {
    pub fn new(device: Device) -> MemoryManager {
        MemoryManager { device }
    }

    /// Gives back what is kept of the device's memory and nothing uses.
    pub fn clear_cache(&self) {
        if let Ok(device) = device::open(self.device.of_a_rank()) {
            drop(device::empty_cache(device)); // what cannot be given back stays where it is
        }
    }

    /// What of the device's memory is in use.
    pub fn usage(&self) -> MemoryUsage {
        match self.in_use() {
            Some((_, InUse { allocated, cached, max_allocated })) => {
                MemoryUsage::Cuda { allocated, cached, max_allocated }
            }
            None => MemoryUsage::Unsupported { status: "unsupported_device" },
        }
    }

    /// How many sequences at once use the device well: as many as four fifths of its free memory hold, from 1 up to four times `base`.
    /// `bytes_per_sample`: measured, else 2 GiB. `base` where the device does not tell of its memory.
    pub fn optimize_batch_size(&self, base: u32, bytes_per_sample: Option<u64>) -> u32 {
        match self.in_use() {
            Some((total, in_use)) => {
                suggested(base, total.saturating_sub(in_use.allocated), bytes_per_sample)
            }
            None => base,
        }
    }

    /// Of a CUDA device that is there: its bytes, and what is in use.
    fn in_use(&self) -> Option<(u64, InUse)> {
        if self.device != Device::Cuda {
            return None;
        }
        let device = device::open(self.device.of_a_rank()).ok()?;
        Some((device::memory(device)? as u64, device::in_use(device).ok()?))
    }
}

fn suggested(base: u32, free: u64, bytes_per_sample: Option<u64>) -> u32 {
    let bytes = bytes_per_sample.unwrap_or(BYTES_PER_SAMPLE).max(1);
    let fit = (free as f64 * SHARE / bytes as f64) as u64;
    let most = u64::from(base.saturating_mul(4));
    u32::try_from(fit.min(most)).unwrap_or(u32::MAX).max(1)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // in a test an unwrap is an assertion
mod tests {
    use super::*;

    #[test]
    fn a_batch_fits_into_four_fifths_of_what_is_free() {
        const GIB: u64 = 1 << 30;
        assert_eq!(suggested(1, 80 * GIB, None), 4);
        assert_eq!(suggested(8, 40 * GIB, None), 16);
        assert_eq!(suggested(8, 40 * GIB, Some(4 * GIB)), 8);
        assert_eq!(suggested(8, 0, None), 1);
        assert_eq!(suggested(0, 40 * GIB, None), 1);
    }

    #[test]
    fn devices_that_do_not_tell_of_their_memory_say_so() {
        for device in [Device::Cpu, Device::Mps] {
            let memory = MemoryManager::new(device);
            let usage = serde_json::to_value(memory.usage()).unwrap();
            assert_eq!(usage, serde_json::json!({"status": "unsupported_device"}));
            assert_eq!(memory.optimize_batch_size(3, Some(1)), 3);
            memory.clear_cache();
        }
    }
}
