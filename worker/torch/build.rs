//! Compiles the C++ shim and lets every binary and test of this package find libtorch without LD_LIBRARY_PATH.

use std::path::PathBuf;

fn main() {
    let kernels = "../../kernels/cuda";
    for file in [
        "shim/shim.cpp",
        "shim/emulated.cpp",
        &format!("{kernels}/fused.cu"),
        &format!("{kernels}/emulated.h"),
    ] {
        println!("cargo:rerun-if-changed={file}");
    }
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    // tch passes on where torch-sys found libtorch.
    let lib = PathBuf::from(
        std::env::var_os("DEP_TCH_LIBTORCH_LIB")
            .or_else(|| {
                std::env::var_os("LIBTORCH").map(|dir| PathBuf::from(dir).join("lib").into_os_string())
            })
            .expect("LIBTORCH is set by .cargo/config.toml; run `make setup`"),
    );
    let include = lib.parent().expect("the lib folder of libtorch has a parent").join("include");

    cc::Build::new()
        .cpp(true)
        .file("shim/shim.cpp")
        .include(&include)
        .include(include.join("torch/csrc/api/include"))
        .flag("-std=c++17")
        .flag("-fno-math-errno")
        .flag("-fno-trapping-math")
        .define("_GLIBCXX_USE_CXX11_ABI", "1")
        .warnings(false)
        .compile("fleet_torch_shim");

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

    println!("cargo:rustc-link-search=native={}", lib.display());
    println!("cargo:rustc-link-lib=dylib=torch_cpu");
    println!("cargo:rustc-link-lib=dylib=c10");
    // Beside the binary in a clone (target/PROFILE and target/PROFILE/deps), then where it was built.
    for path in ["$ORIGIN/../../.libtorch/torch/lib", "$ORIGIN/../../../.libtorch/torch/lib"] {
        println!("cargo:rustc-link-arg=-Wl,-rpath,{path}");
    }
    println!("cargo:rustc-link-arg=-Wl,-rpath,{}", lib.display());
}
