//! Compiles the C++ shim, and the CUDA kernels as C++ for tests on the CPU.

fn main() {
    let libtorch = fleet_libtorch::Libtorch::find();
    libtorch.compile_shim("fleet_torch_shim");
    libtorch.link();

    let kernels = "../../kernels/cuda";
    for file in ["shim/emulated.cpp", &format!("{kernels}/fused.cu"), &format!("{kernels}/emulated.h")] {
        println!("cargo:rerun-if-changed={file}");
    }
    // Only tests call these; a program that does not is linked without them.
    for (element, prefix) in [("float", "fleet_f32_"), ("bf16", "fleet_bf16_")] {
        cc::Build::new()
            .cpp(true)
            .file("shim/emulated.cpp")
            .flag("-std=c++17")
            .define("ELEMENT", element)
            .define("PREFIX", prefix)
            .warnings(false)
            .compile(&format!("{prefix}emulated"));
    }
}
