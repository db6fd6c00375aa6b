//! Where is computed, and in which numbers.

use crate::{DpoConfig, Model, SftConfig, Trainer};
use fleet_common::job;
use fleet_learn::{Error, Result};
use fleet_rank::local;
use std::fmt;
use std::path::Path;

/// Kinds of devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Device {
    Cpu,
    Cuda,
    Mps,
}

impl Device {
    /// The fastest that this machine has: CUDA, then Metal, then the CPU.
    pub fn optimal() -> Device {
        Device::of_rank(&local::best_device())
    }

    fn of_rank(name: &str) -> Device {
        match name {
            "cpu" => Device::Cpu,
            "mps" => Device::Mps,
            _ => Device::Cuda,
        }
    }

    /// As a rank is told it.
    pub(crate) fn of_a_rank(self) -> &'static str {
        match self {
            Device::Cpu => "cpu",
            Device::Cuda => "cuda:0",
            Device::Mps => "mps",
        }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(match self {
            Device::Cpu => "cpu",
            Device::Cuda => "cuda",
            Device::Mps => "mps",
        })
    }
}

/// Numbers in which products are computed; weights that are trained are in fp32.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Dtype {
    #[default]
    Float32,
    Bfloat16,
    /// With losses that are scaled. By libtorch on every device.
    Float16,
}

impl Dtype {
    /// By PyTorch's names.
    pub fn named(name: &str) -> Result<Dtype> {
        match name {
            "float32" => Ok(Dtype::Float32),
            "bfloat16" => Ok(Dtype::Bfloat16),
            "float16" => Ok(Dtype::Float16),
            other => Err(Error::Input(format!(
                "Unknown dtype: {other}; take \"float32\", \"bfloat16\" or \"float16\""
            ))),
        }
    }

    /// Which is a `precision` of a job, too.
    pub fn name(self) -> &'static str {
        match self {
            Dtype::Float32 => "float32",
            Dtype::Bfloat16 => "bfloat16",
            Dtype::Float16 => "float16",
        }
    }
}

/// What a backend is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackendConfig {
    /// `cuda`, `mps`, `mlx` and `cpu`; `pytorch` is libtorch on the best of them, `gpu` the best accelerator, `auto` the best device. `None` is as
    /// `pytorch`.
    pub backend_type: Option<String>,
    /// `auto`, or one of `cuda`, `gpu`, `mps` and `cpu`, which then counts for `pytorch` and has to be the backend's own for the others.
    pub device: String,
    pub dtype: Dtype,
    /// Of the order of data, fresh adapters and dropout.
    pub seed: u64,
}

impl Default for BackendConfig {
    fn default() -> BackendConfig {
        BackendConfig { backend_type: None, device: "auto".into(), dtype: Dtype::default(), seed: 42 }
    }
}

/// A device that is there, with what is computed on it. Loads models and makes trainers.
///
/// Adapters are trained on its device. Texts are written on the CPU.
///
/// ```
/// use fleet_tune::{Backend, Device};
///
/// let backend = Backend::new("cpu")?;
/// assert_eq!((backend.name(), backend.device()), ("cpu", Device::Cpu));
/// let error = Backend::new("jax").unwrap_err().to_string();
/// assert!(error.starts_with("Unknown backend: jax"));
/// # Ok::<(), fleet_tune::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backend {
    name: String,
    device: Device,
    dtype: Dtype,
    seed: u64,
}

impl Backend {
    /// The backend of this name with everything else as it is usual.
    pub fn new(name: &str) -> Result<Backend> {
        Backend::create(&BackendConfig { backend_type: Some(name.into()), ..BackendConfig::default() })
    }

    /// Refused where the name is not known, or the device not there.
    pub fn create(config: &BackendConfig) -> Result<Backend> {
        let name = config.backend_type.as_deref().unwrap_or("pytorch");
        let unknown = || {
            Error::Input(format!(
                "Unknown backend: {name}; take \"cpu\", \"cuda\", \"mps\", \"mlx\", \"pytorch\", \"gpu\" or \"auto\""
            ))
        };
        let own = wanted(name).ok_or_else(unknown)?;
        let asked = wanted(&config.device).filter(|_| config.device != "pytorch").ok_or_else(|| {
            Error::Input(format!(
                "Unknown device: {}; take \"auto\", \"cpu\", \"cuda\", \"gpu\" or \"mps\"",
                config.device
            ))
        })?;
        let device = match (own, asked) {
            (own, Wanted::Best) => own,
            (Wanted::Best, asked) => asked,
            (own, asked) if own == asked => own,
            (Wanted::Accelerator, asked @ (Wanted::Cuda | Wanted::Mps)) => asked,
            (own @ (Wanted::Cuda | Wanted::Mps), Wanted::Accelerator) => own,
            _ => {
                return Err(Error::Input(format!(
                    "the backend {name} does not compute on the device {}; leave one of them out",
                    config.device
                )));
            }
        };
        let device = device.found()?;
        Ok(Backend { name: name.to_owned(), device, dtype: config.dtype, seed: config.seed })
    }

    /// As it was asked for.
    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn device(&self) -> Device {
        self.device
    }

    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// The model in a directory of Hugging Face's layout, with its own tokenizer; a checkpoint is one. Its weights are read when it is asked.
    pub fn load_model(&self, path: impl AsRef<Path>) -> Result<Model> {
        Model::open(self, path.as_ref())
    }

    /// A trainer of texts and rows. It goes on from the adapter that `model` has switched on, else it begins a new one.
    pub fn create_sft_trainer(&self, model: &Model, config: SftConfig) -> Result<Trainer> {
        Trainer::of(self, model, config.training, config.lora, None)
    }

    /// A trainer of preferences. The reference is the model without its adapter, or, where it goes on from one, with that as it was.
    pub fn create_dpo_trainer(&self, model: &Model, config: DpoConfig) -> Result<Trainer> {
        Trainer::of(self, model, config.training, config.lora, Some(config.dpo))
    }

    /// A model of another device is none of this backend's.
    pub(crate) fn expects(&self, model: &Model) -> Result<()> {
        let of = |device: Device| format!("{}Model", device.to_string().to_uppercase());
        match model.device() == self.device {
            true => Ok(()),
            false => Err(Error::Input(format!(
                "Expected {}, got {}; load the model by the backend that trains it",
                of(self.device),
                of(model.device())
            ))),
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Wanted {
    Best,
    Accelerator,
    Cpu,
    Cuda,
    Mps,
}

fn wanted(name: &str) -> Option<Wanted> {
    Some(match name {
        "pytorch" | "auto" => Wanted::Best,
        "gpu" => Wanted::Accelerator,
        "cpu" => Wanted::Cpu,
        "cuda" => Wanted::Cuda,
        "mps" | "mlx" => Wanted::Mps,
        _ => return None,
    })
}

impl Wanted {
    fn found(self) -> Result<Device> {
        let device = match self {
            Wanted::Best => job::Device::Auto,
            Wanted::Cpu => job::Device::Cpu,
            Wanted::Mps => job::Device::Mps,
            Wanted::Cuda => job::Device::Cuda,
            Wanted::Accelerator => match Device::optimal() {
                Device::Mps => job::Device::Mps,
                _ => job::Device::Cuda,
            },
        };
        Ok(Device::of_rank(&local::device_of(device)?))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // in a test an unwrap is an assertion
mod tests {
    use super::*;

    #[test]
    fn names_of_backends_lead_to_devices_that_are_there() {
        let best = Device::optimal();
        for name in ["pytorch", "auto"] {
            assert_eq!(Backend::new(name).unwrap().device(), best, "{name}");
        }
        let usual = Backend::create(&BackendConfig::default()).unwrap();
        assert_eq!((usual.name(), usual.device(), usual.seed()), ("pytorch", best, 42));
        assert_eq!(Backend::new("cpu").unwrap().device(), Device::Cpu);
        let on = |backend: &str, device: &str| {
            let config = BackendConfig {
                backend_type: Some(backend.into()),
                device: device.into(),
                ..BackendConfig::default()
            };
            Backend::create(&config)
        };
        assert_eq!(on("pytorch", "cpu").unwrap().device(), Device::Cpu);
        assert!(on("mlx", "cpu").unwrap_err().to_string().contains("leave one of them out"));
        assert!(on("cpu", "tpu").unwrap_err().to_string().starts_with("Unknown device: tpu"));
        assert!(on("tpu", "auto").unwrap_err().to_string().starts_with("Unknown backend: tpu"));
        if best == Device::Cpu {
            assert!(matches!(Backend::new("gpu"), Err(Error::Environment(_))));
        }
        assert_eq!(Dtype::named("bfloat16").unwrap(), Dtype::Bfloat16);
        assert!(Dtype::named("int4").is_err());
    }
}
