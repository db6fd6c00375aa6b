//! Lets every binary and test of this package find libtorch without LD_LIBRARY_PATH.

use std::path::PathBuf;

fn main() {
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    // tch passes on where torch-sys found libtorch.
    let lib = PathBuf::from(
        std::env::var_os("DEP_TCH_LIBTORCH_LIB")
            .or_else(|| {
                std::env::var_os("LIBTORCH").map(|dir| PathBuf::from(dir).join("lib").into_os_string())
            })
            .expect("LIBTORCH is set by .cargo/config.toml; run `make setup`"),
    );
    println!("cargo:rustc-link-search=native={}", lib.display());
    println!("cargo:rustc-link-lib=dylib=torch_cpu");
    println!("cargo:rustc-link-lib=dylib=c10");
    // Beside the binary in a clone (target/PROFILE and target/PROFILE/deps), then where it was built.
    for path in ["$ORIGIN/../../.libtorch/torch/lib", "$ORIGIN/../../../.libtorch/torch/lib"] {
        println!("cargo:rustc-link-arg=-Wl,-rpath,{path}");
    }
    println!("cargo:rustc-link-arg=-Wl,-rpath,{}", lib.display());
}
