//! For build scripts alone. What is printed are instructions to cargo.

use std::path::{Path, PathBuf};

/// The libtorch that torch-sys found.
pub struct Libtorch {
    lib: PathBuf,
}

impl Libtorch {
    /// Ends the build where there is none.
    pub fn find() -> Libtorch {
        println!("cargo:rerun-if-env-changed=LIBTORCH");
        let by_user = || std::env::var_os("LIBTORCH").map(|dir| Path::new(&dir).join("lib").into_os_string());
        // tch passes on where torch-sys found it.
        let lib = std::env::var_os("DEP_TCH_LIBTORCH_LIB").or_else(by_user);
        Libtorch { lib: lib.expect("LIBTORCH is set by .cargo/config.toml; run `make setup`").into() }
    }

    /// Compiles `shim/shim.cpp` of the package as the static library `name`.
    pub fn compile_shim(&self, name: &str) {
        println!("cargo:rerun-if-changed=shim/shim.cpp");
        let include = self.lib.parent().expect("the lib folder of libtorch has a parent").join("include");
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
            .compile(name);
    }

    /// Every binary and test of the package finds it without LD_LIBRARY_PATH.
    pub fn link(&self) {
        println!("cargo:rustc-link-search=native={}", self.lib.display());
        println!("cargo:rustc-link-lib=dylib=torch_cpu");
        println!("cargo:rustc-link-lib=dylib=c10");
        // Beside the binary in a clone (target/PROFILE and target/PROFILE/deps), then where it was built.
        for path in ["$ORIGIN/../../.libtorch/torch/lib", "$ORIGIN/../../../.libtorch/torch/lib"] {
            println!("cargo:rustc-link-arg=-Wl,-rpath,{path}");
        }
        println!("cargo:rustc-link-arg=-Wl,-rpath,{}", self.lib.display());
    }

    /// What cargo runs finds it too where `link` has no say: examples in documents, and programs of others that depend on the package. Cargo adds
    /// folders of build scripts to the search path, but none outside of the target folder: it gets a link to the one.
    pub fn show_to_cargo(&self) {
        let out = std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR for build scripts");
        let link = Path::new(&out).join("libtorch");
        let _ = std::fs::remove_file(&link); // of an earlier build, perhaps to another place
        std::os::unix::fs::symlink(&self.lib, &link).expect("the folder of a build script can be written");
        println!("cargo:rustc-link-search=native={}", link.display());
    }
}
