//! Kernels of one's own on a CUDA device, over libtorch's tensors: compiled by NVRTC for this device, launched on the stream that libtorch
//! uses as long as nobody chooses another (the default stream of the device's primary context).

#![allow(unsafe_code)]

use cudarc::driver::{result, sys};
use cudarc::nvrtc;
use std::ffi::{CStr, CString, c_char, c_void};
use std::path::{Path, PathBuf};

/// Threads of a block.
const BLOCK: u32 = 512;

/// Most blocks of a kernel that goes on to further rows by itself.
const GRID_MAX: u64 = 1 << 16;

/// Compiled kernels of one device.
pub struct Module {
    context: sys::CUcontext,
    module: sys::CUmodule,
}

// SAFETY: the driver's handles may be used by any thread that has made the context its current one, which `launch` does.
unsafe impl Send for Module {}
// SAFETY: see above; nothing is changed through them.
unsafe impl Sync for Module {}

/// An argument of a kernel.
#[derive(Clone, Copy, Debug)]
pub enum Arg {
    /// Memory of the device.
    Pointer(u64),
    Whole(i64),
    Real(f32),
}

/// How many blocks run a kernel.
#[derive(Clone, Copy, Debug)]
pub enum Grid {
    /// One for each of so many rows.
    Each(u64),
    /// Which take so many rows in turn.
    InTurn(u64),
}

impl Module {
    /// Compiles `source` with the type of its elements for CUDA device `number`, or says why that cannot be.
    pub fn compile(source: &str, element: &str, number: usize) -> Result<Module, String> {
        if !load_nvrtc() {
            return Err(
                "NVRTC cannot be loaded; run `make setup CUDA=1`, or `pip install` torch for CUDA".into()
            );
        }
        // SAFETY: only looks for a library.
        if !unsafe { sys::is_culib_present() } {
            return Err("NVIDIA's driver library (libcuda) cannot be loaded".into());
        }
        let failed = |what: &'static str| move |e: result::DriverError| format!("{what}: {e:?}");
        result::init().map_err(failed("the driver cannot be started"))?;
        let device = result::device::get(number as i32).map_err(failed("there is no such device"))?;
        use sys::CUdevice_attribute_enum::{
            CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR as MAJOR,
            CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR as MINOR,
        };
        // SAFETY: `device` was given by the driver.
        let attribute = |which| unsafe { result::device::get_attribute(device, which) };
        let major = attribute(MAJOR).map_err(failed("its version is not known"))?;
        let minor = attribute(MINOR).map_err(failed("its version is not known"))?;
        let image = compiled(source, element, &format!("sm_{major}{minor}"))?;
        // SAFETY: `device` was given by the driver; the context is the one that libtorch uses, and is kept for the life of the process.
        let context = unsafe { result::primary_ctx::retain(device) }.map_err(failed("no context"))?;
        // SAFETY: the context is alive; the image is one that NVRTC made, whose header says how long it is.
        let module = unsafe {
            result::ctx::set_current(context).map_err(failed("no context"))?;
            result::module::load_data(image.as_ptr().cast::<c_void>())
        };
        Ok(Module { context, module: module.map_err(failed("the kernels cannot be loaded"))? })
    }

    /// Starts a kernel; what it does is done before what is asked of libtorch afterwards.
    ///
    /// # Safety
    /// The arguments are those of the kernel, and its memory is as large as it takes it to be and lives until the device has come so far:
    /// libtorch keeps memory that is given back for the same stream.
    pub unsafe fn launch(&self, kernel: &CStr, grid: Grid, args: &[Arg]) -> Result<(), String> {
        let blocks = match grid {
            Grid::Each(rows) => rows,
            Grid::InTurn(rows) => rows.min(GRID_MAX),
        };
        if blocks == 0 {
            return Ok(());
        }
        let blocks = u32::try_from(blocks).map_err(|_| format!("{blocks} blocks are too many"))?;
        let mut values: Vec<[u8; 8]> = args
            .iter()
            .map(|arg| match arg {
                Arg::Pointer(pointer) => pointer.to_ne_bytes(),
                Arg::Whole(number) => number.to_ne_bytes(),
                Arg::Real(number) => {
                    let mut bytes = [0; 8];
                    bytes[..4].copy_from_slice(&number.to_ne_bytes());
                    bytes
                }
            })
            .collect();
        let mut pointers: Vec<*mut c_void> =
            values.iter_mut().map(|value| value.as_mut_ptr().cast()).collect();
        let name = CString::from(kernel);
        // SAFETY: context and module are alive; each pointer is to a value of at least the argument's size, and is read before this
        // returns; for the rest the caller answers. The null stream is the default one.
        unsafe {
            result::ctx::set_current(self.context)
                .and_then(|()| result::module::get_function(self.module, name))
                .and_then(|function| {
                    result::launch_kernel(
                        function,
                        (blocks, 1, 1),
                        (BLOCK, 1, 1),
                        0,
                        std::ptr::null_mut(),
                        &mut pointers,
                    )
                })
        }
        .map_err(|e| format!("{} cannot be started: {e:?}", kernel.to_string_lossy()))
    }
}

/// Bytes of memory of CUDA device `number`.
pub fn memory(number: usize) -> Option<usize> {
    // SAFETY: only looks for a library.
    if !unsafe { sys::is_culib_present() } || result::init().is_err() {
        return None;
    }
    let device = result::device::get(number as i32).ok()?;
    // SAFETY: `device` was given by the driver.
    unsafe { result::device::total_mem(device) }.ok()
}

/// The source as machine code for an architecture such as `sm_90`: PTX of an NVRTC that is newer than the driver would be refused by it.
/// NVRTC has to be loadable.
pub fn compiled(source: &str, element: &str, architecture: &str) -> Result<Vec<u8>, String> {
    let failed = |what: &'static str| move |e: nvrtc::result::NvrtcError| format!("NVRTC: {what}: {e:?}");
    let source = CString::new(source).map_err(|e| e.to_string())?;
    let program = nvrtc::result::create_program(&source, Some(c"fused.cu")).map_err(failed("no program"))?;
    let options = [format!("-DELEMENT={element}"), format!("-arch={architecture}")];
    // SAFETY: `program` is alive until it is destroyed at the end; the image is as long as NVRTC says.
    let image = unsafe {
        match nvrtc::result::compile_program(program, &options) {
            Ok(()) => {
                let mut len = 0;
                let got = nvrtc::sys::nvrtcGetCUBINSize(program, &mut len).result();
                let mut image = vec![0u8; len];
                got.and_then(|()| nvrtc::sys::nvrtcGetCUBIN(program, image.as_mut_ptr().cast()).result())
                    .map(|()| image)
                    .map_err(failed("no machine code"))
            }
            Err(error) => Err(nvrtc::result::get_program_log(program).map_or_else(
                |_| failed("the kernels cannot be compiled")(error),
                |log| {
                    // A text of NVRTC's; what it says first is enough.
                    let text: Vec<u8> = log.iter().map(|c| *c as u8).take_while(|c| *c != 0).collect();
                    let text = String::from_utf8_lossy(&text);
                    format!("the kernels cannot be compiled: {}", text.lines().next().unwrap_or_default())
                },
            )),
        }
    };
    // SAFETY: it is not used any more. What cannot be destroyed stays.
    let _ = unsafe { nvrtc::result::destroy_program(program) };
    image
}

/// Whether NVRTC can be loaded, from where the torch wheel has it or from the system. cuDNN looks for it by its name, too.
pub fn load_nvrtc() -> bool {
    // Python's wheels: torch/lib beside nvidia/cu13/lib, or nvidia/cuda_nvrtc/lib for CUDA 12. NVRTC opens its built-in functions by their
    // name alone, so they come first.
    let nvidia = own_libraries().map(|dir| dir.join("../../nvidia"));
    for folder in
        ["cu13/lib", "cuda_nvrtc/lib"].iter().filter_map(|folder| Some(nvidia.as_ref()?.join(folder)))
    {
        let entries = std::fs::read_dir(&folder).into_iter().flatten().flatten();
        let names: Vec<String> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
        for start in ["libnvrtc-builtins.so.", "libnvrtc.so."] {
            for name in names.iter().filter(|name| name.starts_with(start)) {
                let _ = super::load(&folder.join(name).to_string_lossy()); // it is looked for by its name below
            }
        }
    }
    // SAFETY: only looks for a library.
    unsafe { nvrtc::sys::is_culib_present() }
}

/// The folder that libtorch was loaded from.
fn own_libraries() -> Option<PathBuf> {
    unsafe extern "C" {
        fn fleet_torch_library() -> *const c_char;
    }
    // SAFETY: gives null, or a text of the dynamic linker that lives as long as libtorch is loaded.
    let path = unsafe { fleet_torch_library() };
    if path.is_null() {
        return None;
    }
    // SAFETY: not null, and ends with a zero.
    let path = unsafe { CStr::from_ptr(path) }.to_str().ok()?;
    Path::new(path).parent().map(Path::to_owned)
}
