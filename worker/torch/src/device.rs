//! Which devices there are. libtorch's CUDA part is loaded when it is asked for the first time, so that a machine without it misses nothing.

use crate::{Result, shim};
use std::sync::OnceLock;
use tch::{Device, Kind, Tensor};

/// How many CUDA devices can be used, or why none, and what to do.
pub fn cuda_devices() -> Result<usize, String> {
    static FOUND: OnceLock<Result<usize, String>> = OnceLock::new();
    FOUND.get_or_init(find_cuda).clone()
}

fn find_cuda() -> Result<usize, String> {
    shim::cuda::load_nvrtc(); // cuDNN wants it for attention
    shim::load("libtorch_cuda.so")
        .map_err(|why| format!("libtorch's CUDA part cannot be loaded ({why}); run `make setup CUDA=1`, or `pip install` torch for CUDA"))?;
    match tch::Cuda::device_count() {
        count @ 1.. => Ok(count as usize),
        _ => Err("libtorch finds no CUDA device; look at `nvidia-smi`".into()),
    }
}

/// The device of this name (`cpu`, `cuda:0`, `mps`), once it has shown that it computes; or why not.
pub fn open(name: &str) -> Result<Device, String> {
    let device = match (name, name.strip_prefix("cuda:").map(str::parse)) {
        ("cpu", _) => Device::Cpu,
        ("mps", _) if tch::utils::has_mps() => Device::Mps,
        ("mps", _) => return Err("libtorch finds no Metal device".into()),
        (_, Some(Ok(number))) => match cuda_devices()? {
            count if number < count => Device::Cuda(number),
            count => return Err(format!("there is no {name}: this machine has {count} CUDA devices")),
        },
        _ => return Err(format!("{name} is no device that fleet knows")),
    };
    let works = || -> std::result::Result<f64, tch::TchError> {
        let ones = Tensor::f_ones([8, 8], (Kind::Float, device))?;
        f64::try_from(&ones.f_matmul(&ones)?.f_sum(Kind::Float)?)
    };
    match works() {
        Ok(512.0) => Ok(device),
        Ok(other) => Err(format!("{name} computes wrongly: 512 ones add up to {other}")),
        Err(error) => Err(format!("{name} cannot compute: {}", crate::Error::from(error))),
    }
}

/// As `open` takes it.
pub fn name(device: Device) -> String {
    match device {
        Device::Cuda(number) => format!("cuda:{number}"),
        Device::Mps => "mps".into(),
        _ => "cpu".into(),
    }
}

/// Bytes of memory that a device has of its own, as far as that is known.
pub fn memory(device: Device) -> Option<usize> {
    match device {
        Device::Cuda(number) => shim::cuda::memory(number),
        _ => None,
    }
}

/// Bytes of a device that this process takes through libtorch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct InUse {
    /// By tensors.
    pub allocated: u64,
    /// With what libtorch keeps for the next ones.
    pub cached: u64,
    /// The most by tensors since the process began.
    pub max_allocated: u64,
}

/// Of a CUDA device; others do not tell.
pub fn in_use(device: Device) -> Result<InUse> {
    let Device::Cuda(number) = device else {
        return Err(crate::Error::of("memory in use is known of CUDA devices alone"));
    };
    let [allocated, cached, max_allocated] = shim::memory_in_use(number)?;
    Ok(InUse { allocated, cached, max_allocated })
}

/// Gives back what libtorch keeps of the device's memory and no tensor has. The CPU keeps nothing.
pub fn empty_cache(device: Device) -> Result<()> {
    match device {
        Device::Cuda(_) => shim::empty_cache(true),
        Device::Mps => shim::empty_cache(false),
        _ => Ok(()),
    }
}

/// For the log.
pub fn describe(device: Device) -> String {
    match device {
        Device::Cpu => format!("{} threads", tch::get_num_threads()),
        other => name(other),
    }
}

/// A copy on the device, which a host that goes on at once does not wait for.
pub(crate) fn to(tensor: &Tensor, device: Device) -> Result<Tensor> {
    match device {
        Device::Cuda(_) => Ok(shim::pinned(tensor)?.f_to_device_(device, tensor.kind(), true, false)?),
        _ => Ok(tensor.f_to_device(device)?),
    }
}

/// Whether libtorch's words say that.
pub(crate) fn memory_is_short(what: &str) -> bool {
    [
        "out of memory",
        "not enough memory",
        "CUBLAS_STATUS_ALLOC_FAILED",
        "CUBLAS_STATUS_NOT_INITIALIZED",
        "CUDNN_STATUS_ALLOC_FAILED",
    ]
    .iter()
    .any(|words| what.contains(words))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cpu_computes_and_what_is_not_there_is_told() {
        assert_eq!(open("cpu"), Ok(Device::Cpu));
        assert!(open("tpu").unwrap_err().contains("tpu"));
        if let Err(why) = cuda_devices() {
            assert_eq!(open("cuda:0").unwrap_err(), why);
        }
    }

    #[test]
    fn memory_that_is_kept_is_known_of_cuda_and_given_back() {
        empty_cache(Device::Cpu).unwrap();
        assert!(in_use(Device::Cpu).is_err());
        if cuda_devices().is_err() {
            // An error, and no end of the process.
            assert!(in_use(Device::Cuda(0)).is_err() && empty_cache(Device::Cuda(0)).is_err());
            return;
        }
        let tensor = Tensor::ones([1 << 20], (Kind::Float, Device::Cuda(0)));
        let before = in_use(Device::Cuda(0)).unwrap();
        assert!(before.allocated >= 4 << 20 && before.max_allocated >= before.allocated, "{before:?}");
        drop(tensor);
        empty_cache(Device::Cuda(0)).unwrap();
        let after = in_use(Device::Cuda(0)).unwrap();
        assert!(after.allocated < before.allocated && after.cached < before.cached, "{before:?} {after:?}");
    }
}
