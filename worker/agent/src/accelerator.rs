//! What ranks compute on, on this node.

use crate::agent::Accelerator;
use crate::join::DeviceWish;
use crate::ranks::{Launcher, Probe};
use crate::spawn::Exited;
use fleet_common::capability::CUDA_DRIVER;
use fleet_common::libtorch;
use std::path::Path;
use tokio::signal::unix::Signal;
use tokio::sync::mpsc;

pub struct Found {
    pub accelerator: Accelerator,
    /// Why none can run.
    pub unfit: Option<String>,
    /// Why a CUDA device that may be there cannot be used.
    pub no_cuda: Option<String>,
}

/// Only looks closer where there may be something to see: loading libtorch takes a moment that a plain CPU node can spend better.
pub async fn accelerator(
    launcher: &Launcher,
    wish: DeviceWish,
    exits: &mut mpsc::UnboundedReceiver<Exited>,
    child: &mut Signal,
) -> Result<Found, String> {
    let plain = Found { accelerator: Accelerator::Cpu, unfit: None, no_cuda: None };
    if let Some(flaw) = libtorch::flaw(&launcher.fleet_rank) {
        tracing::warn!("{flaw}");
        return Ok(Found { unfit: Some(flaw), ..plain });
    }
    let worth_a_look = match wish {
        DeviceWish::Cpu => false,
        DeviceWish::Auto => cfg!(target_os = "macos") || Path::new(CUDA_DRIVER).exists(),
        DeviceWish::Cuda | DeviceWish::Mps => true,
    };
    if !worth_a_look {
        return Ok(plain);
    }
    let probe = launcher.probe(async |pid| {
        loop {
            tokio::select! {
                _ = child.recv() => launcher.spawner.reap(),
                exited = exits.recv() => match exited {
                    Some(exited) if exited.pid == pid => return Some(exited),
                    Some(_) => {}
                    None => return None,
                },
            }
        }
    });
    match (wish, probe.await) {
        (DeviceWish::Auto | DeviceWish::Cuda, Ok(Probe { cuda_devices: devices @ 1.., .. })) => {
            Ok(Found { accelerator: Accelerator::Cuda { devices }, ..plain })
        }
        (DeviceWish::Auto | DeviceWish::Mps, Ok(Probe { mps: true, .. })) => {
            Ok(Found { accelerator: Accelerator::Mps, ..plain })
        }
        (DeviceWish::Auto, Ok(probe)) => {
            let no_cuda = probe.no_cuda.filter(|_| Path::new(CUDA_DRIVER).exists());
            if let Some(reason) = &no_cuda {
                tracing::warn!("{reason}");
            }
            Ok(Found { no_cuda, ..plain })
        }
        (DeviceWish::Auto, Err(reason)) => {
            tracing::warn!("{reason}");
            Ok(Found { unfit: Some(reason), ..plain })
        }
        (DeviceWish::Cuda, Ok(Probe { no_cuda: Some(why), .. })) => {
            Err(format!("{why}; or use --device auto or cpu"))
        }
        (_, Ok(probe)) => {
            Err(format!("libtorch {} finds no such device; use --device auto or cpu", probe.libtorch))
        }
        (_, Err(reason)) => Err(reason),
    }
}
