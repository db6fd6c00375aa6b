//! CUDA devices in numbers, as NVML tells them. It is loaded at run time; where it is not there, nothing is told.

use crate::machine::RankProcess;
use fleet_common::metrics::Page;
use fleet_common::metrics::worker::*;
use nvml_wrapper::Nvml;
use nvml_wrapper::enums::device::UsedGpuMemory;
use std::collections::BTreeMap;
use std::ffi::OsStr;

/// Comes with the driver.
const LIBRARY: &str = "libnvidia-ml.so.1";

pub struct Gpus(Option<Nvml>);

impl Gpus {
    /// May take a second, where no program keeps the driver awake.
    pub fn find() -> Gpus {
        let nvml = Nvml::builder().lib_path(OsStr::new(LIBRARY)).init();
        if let Err(why) = &nvml {
            tracing::debug!("no numbers of CUDA devices: {why}");
        }
        Gpus(nvml.ok())
    }

    /// All devices of the machine, and what of them these ranks hold. What a device does not tell is left out.
    pub fn measure(&self, ranks: &[RankProcess], page: &mut Page) {
        let Some(nvml) = &self.0 else { return };
        let mut held: BTreeMap<u32, u64> = BTreeMap::new();
        for index in 0..nvml.device_count().unwrap_or(0) {
            let Ok(device) = nvml.device_by_index(index) else { continue };
            let gpu = index.to_string();
            if let Ok(memory) = device.memory_info() {
                page.put(&GPU_MEMORY_BYTES, &[&gpu], memory.total as f64);
                page.put(&GPU_MEMORY_USED_BYTES, &[&gpu], memory.used as f64);
            }
            if let Ok(rates) = device.utilization_rates() {
                page.put(&GPU_UTILIZATION, &[&gpu], f64::from(rates.gpu) / 100.0);
            }
            for process in device.running_compute_processes().unwrap_or_default() {
                if let UsedGpuMemory::Used(bytes) = process.used_gpu_memory {
                    *held.entry(process.pid).or_default() += bytes;
                }
            }
        }
        for RankProcess { job, rank, pid } in ranks {
            page.put_some(&RANK_DEVICE_BYTES, &[job, rank], held.get(pid).map(|bytes| *bytes as f64));
        }
    }
}
