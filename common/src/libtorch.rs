//! The libtorch that `fleet-rank` was compiled for, and the one that it finds where both were installed as Python packages: then `torch` lies
//! beside the package of fleet's programs.

use std::fs::File;
use std::io::Read;
use std::path::Path;

/// Its C++ interface changes with every version, so that no other one will do.
pub const VERSION: &str = "2.11.0";
/// The package that a wheel installs; its programs are in its folder `bin`.
const PACKAGE: &str = "fleet_train";
/// Of `torch/version.py`, which is a few lines.
const FILE_MAX: u64 = 64 << 10;

/// Why the `fleet-rank` at this path cannot run with the torch beside it, and what mends that. `None` where it can, and where the loader finds
/// another one: it belongs to no Python package, or LD_LIBRARY_PATH has one.
pub fn flaw(fleet_rank: &Path) -> Option<String> {
    let packages = packages(fleet_rank)?;
    let paths = std::env::var_os("LD_LIBRARY_PATH").unwrap_or_default();
    let is_elsewhere = std::env::split_paths(&paths).any(|dir| dir.join("libtorch_cpu.so").is_file());
    if is_elsewhere { None } else { flaw_beside(packages) }
}

/// What puts libtorch in its place for the `fleet-rank` at this path, in words for the end of an error.
pub fn cure(fleet_rank: &Path) -> String {
    match packages(fleet_rank) {
        Some(_) => format!("`pip install torch=={VERSION}` puts libtorch in place"),
        None => format!(
            "is libtorch {VERSION} in place (`make setup` in a clone, elsewhere LD_LIBRARY_PATH=LIBTORCH/lib)?"
        ),
    }
}

/// The folder of the Python packages to which a program belongs.
fn packages(program: &Path) -> Option<&Path> {
    let package = program.parent()?.parent()?;
    if package.file_name()? == PACKAGE { package.parent() } else { None }
}

fn flaw_beside(packages: &Path) -> Option<String> {
    let (place, mends) = (packages.display(), format!("`pip install torch=={VERSION}`"));
    let mut text = String::new();
    let read = File::open(packages.join("torch/version.py"));
    if read.and_then(|file| file.take(FILE_MAX).read_to_string(&mut text)).is_err() {
        return Some(format!(
            "fleet lies in {place} without torch {VERSION}, whose libraries it needs; {mends} puts it there"
        ));
    }
    let version = text
        .lines()
        .find_map(|line| line.strip_prefix("__version__")?.trim_start().strip_prefix('='))?
        .trim_matches(['\'', '"', ' ']);
    // What follows is how it was built: +cpu, +cu130.
    let is_ours = version.split('+').next() == Some(VERSION);
    let differs = || {
        format!(
            "the torch in {place} is {version}, and fleet needs {VERSION}, for which it was compiled; {mends} mends that"
        )
    };
    (!is_ours).then(differs)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn another_torch_and_none_are_told_with_what_mends_it() {
        let dir = tempfile::tempdir().unwrap();
        let packages = dir.path();
        let rank = packages.join("fleet_train/bin/fleet-rank");
        assert_eq!(super::packages(&rank), Some(packages));
        assert_eq!(super::packages(Path::new("/clone/target/debug/fleet-rank")), None);
        assert!(flaw_beside(packages).unwrap().contains("without torch 2.11.0"));
        fs::create_dir(packages.join("torch")).unwrap();
        let with = |version: &str| {
            fs::write(
                packages.join("torch/version.py"),
                format!("debug = False\n__version__ = '{version}'\n"),
            )
            .unwrap();
            flaw_beside(packages)
        };
        for ours in ["2.11.0", "2.11.0+cpu", "2.11.0+cu130"] {
            assert_eq!(with(ours), None);
        }
        for other in ["2.10.0", "2.11.1+cpu", "2.12.0.dev20261101"] {
            let told = with(other).unwrap();
            assert!(told.contains(other) && told.contains("`pip install torch==2.11.0`"), "{told}");
        }
    }
}
