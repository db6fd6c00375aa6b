//! The wheel, from the programs that are built, installed by pip beside the libtorch that they were built with. No network is asked for anything.

#![allow(clippy::unwrap_used)] // in a test an unwrap is an assertion

use fleet_tests::{Finished, Running, TinyJob, World, program};
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The folder `torch` of a Python environment, which the programs were built with.
fn torch() -> Option<PathBuf> {
    let libraries = Command::new("ldd").arg(program("fleet-rank")).output().ok()?;
    let libraries = String::from_utf8_lossy(&libraries.stdout).into_owned();
    let library = libraries.lines().find_map(|line| line.trim().strip_prefix("libtorch_cpu.so => "))?;
    let library = Path::new(library.split(' ').next()?).canonicalize().ok()?; // cargo shows a link
    let torch = library.parent()?.parent()?;
    torch.join("version.py").is_file().then(|| torch.to_owned())
}

/// Whether there is what this needs; says loudly that it is skipped where not.
fn can_install() -> Option<PathBuf> {
    let pip = Command::new("python3").args(["-m", "pip", "--version"]).output();
    let missing = match (torch(), pip.is_ok_and(|pip| pip.status.success())) {
        (Some(torch), true) => return Some(torch),
        (None, _) => "a libtorch that is the folder of a wheel",
        (_, false) => "a python3 with pip",
    };
    println!("SKIPPED: there is no {missing}");
    None
}

fn python(world: &World, args: &[&str]) -> Finished {
    let mut python = Command::new("python3");
    python.args(args);
    Running::start(world.enter(python)).finish().expect(0)
}

/// Packs the programs of this build and returns the wheel.
fn packed(world: &World, out: &str) -> PathBuf {
    let pack = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/wheel/pack.py");
    let programs = program("fleet").parent().unwrap().display().to_string();
    python(world, &[pack, "wheel", "--programs", &programs, "--out", out]);
    fs::read_dir(world.path(out)).unwrap().next().unwrap().unwrap().path()
}

fn install(world: &World, wheel: &Path, place: &[&str]) {
    let wheel = wheel.display().to_string();
    let pip = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index", "--no-deps"];
    python(world, &[&pip[..], place, &[&wheel]].concat());
}

fn run(world: &World, program: &Path, args: &[&str]) -> Finished {
    let mut command = Command::new(program);
    command.args(args).env_remove("LD_LIBRARY_PATH"); // of cargo, which shows it libtorch
    Running::start(world.enter(command)).finish()
}

#[test]
fn a_wheel_trains_where_pip_puts_it_and_tells_another_torch_in_one_line() {
    let Some(torch) = can_install() else { return };
    let world = World::new();
    let wheel = packed(&world, "dist");
    assert!(wheel.to_str().unwrap().ends_with("_x86_64.whl") || !cfg!(target_arch = "x86_64"));
    assert_eq!(fs::read(&wheel).unwrap(), fs::read(packed(&world, "again")).unwrap(), "the same programs");

    // As a virtual environment has it, beside other packages; the way there has spaces in it.
    install(&world, &wheel, &["--prefix", "of a user"]);
    // Debian's Python installs into a folder below.
    let prefix = [world.path("of a user/local"), world.path("of a user")];
    let prefix = prefix.into_iter().find(|dir| dir.join("bin").is_dir()).unwrap();
    let fleet = prefix.join("bin/fleet");
    assert_eq!(
        run(&world, &fleet, &["--version"]).expect(0).stdout,
        world.run("fleet", &["--version"]).stdout
    );
    for file in [
        "share/man/man1/fleet-launch.1",
        "share/bash-completion/completions/worker",
        "share/fleet/examples/self.toml",
    ] {
        assert!(prefix.join(file).is_file(), "{file}");
    }

    // All in one folder.
    install(&world, &wheel, &["--target", "in one place"]);
    let place = world.path("in one place");
    let fleet = place.join("bin/fleet");
    let job = world.job(&TinyJob::default()).display().to_string();
    let launch = ["launch", "-n", "2", &job];
    let missing = run(&world, &fleet, &launch).expect(4);
    let line = missing.says("error: ");
    assert!(line.contains("without torch 2.11.0") && line.contains("`pip install torch==2.11.0`"), "{line}");

    fs::create_dir(place.join("torch")).unwrap();
    fs::write(place.join("torch/version.py"), "__version__ = '2.10.0+cpu'\n").unwrap();
    for args in [&launch[..], &["generate", "--model", ".", "--prompt", "a"]] {
        let other = run(&world, &fleet, args).expect(4);
        let line = other.says("error: ");
        assert!(line.contains("2.10.0+cpu") && line.contains("`pip install torch==2.11.0`"), "{line}");
        assert_eq!(other.stderr.matches("error: ").count(), 1, "{}", other.all());
    }

    fs::remove_dir_all(place.join("torch")).unwrap();
    symlink(&torch, place.join("torch")).unwrap();
    let done = run(&world, &fleet, &launch).expect(0);
    assert!(done.stdout.iter().any(|line| line.starts_with("checkpoint: ")), "{}", done.all());
    // By a link from elsewhere, as people have in their own bin.
    symlink(&fleet, world.path("linked")).unwrap();
    let model = "out/checkpoints/tiny/step-00000020";
    run(
        &world,
        &world.path("linked"),
        &["generate", "--model", model, "--prompt", "a", "--max-new-tokens", "4"],
    )
    .expect(0);
    world.is_empty_soon();
}
