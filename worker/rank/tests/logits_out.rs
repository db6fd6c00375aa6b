//! Where `fleet-rank logits` writes: never over what it reads, and whole or not at all.

#![allow(clippy::unwrap_used)] // a test may panic

use fleet_common::exit::Fault;
use fleet_rank::logits::{Wanted, write};
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

/// A directory with a model in `m` and `ids.json`.
fn place() -> (tempfile::TempDir, impl Fn(&str) -> Wanted) {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/parity/golden/families/gpt2");
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("m")).unwrap();
    for file in ["config.json", "model.safetensors"] {
        fs::copy(golden.join(file), dir.path().join("m").join(file)).unwrap();
    }
    fs::write(dir.path().join("ids.json"), "[1, 2]").unwrap();
    let at = dir.path().to_owned();
    let wanted = move |out: &str| Wanted {
        adapters: Vec::new(),
        model: at.join("m"),
        ids: at.join("ids.json"),
        out: at.join(out),
        device: "cpu".into(),
        bf16: false,
    };
    (dir, wanted)
}

fn files(dir: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let entries = fs::read_dir(dir).unwrap().chain(fs::read_dir(dir.join("m")).unwrap());
    let paths = entries.map(|entry| entry.unwrap().path()).filter(|path| path.is_file());
    let mut all: Vec<_> = paths.map(|path| (path.clone(), fs::read(path).unwrap())).collect();
    all.sort();
    all
}

#[test]
fn what_is_read_is_never_written_over() {
    let (dir, wanted) = place();
    symlink("m/model.safetensors", dir.path().join("link")).unwrap();
    symlink("link", dir.path().join("link2")).unwrap();
    symlink("m", dir.path().join("n")).unwrap();
    fs::hard_link(dir.path().join("m/config.json"), dir.path().join("hard")).unwrap();
    let before = files(dir.path());
    for (out, why) in [
        ("m/model.safetensors", "a file of the model"),
        ("n/config.json", "a file of the model"),
        ("link", "a file of the model"),
        ("link2", "a file of the model"),
        ("hard", "a file of the model"),
        ("m/other.safetensors", "read as a part of it"),
        ("ids.json", "the file of --ids"),
        ("m", "it is a directory"),
        ("nowhere/x", "there is no directory"),
    ] {
        let error = write(&wanted(out)).unwrap_err();
        assert_eq!(error.fault(), Fault::Input);
        assert!(error.to_string().contains(why), "{out}: {error}");
        assert!(files(dir.path()) == before, "{out}");
    }
}

#[test]
fn a_file_is_replaced_in_one_step_and_links_and_devices_stay() {
    let (dir, wanted) = place();
    let at = |name: &str| dir.path().join(name);
    fs::write(at("old"), "old").unwrap();
    symlink("real", at("link")).unwrap();
    for out in ["old", "link", "new"] {
        write(&wanted(out)).unwrap();
    }
    assert!(fs::symlink_metadata(at("link")).unwrap().is_symlink());
    let numbers = fs::read(at("new")).unwrap();
    assert!(
        numbers.len() > 100
            && fs::read(at("real")).unwrap() == numbers
            && fs::read(at("old")).unwrap() == numbers
    );
    symlink("/dev/null", at("null")).unwrap();
    write(&wanted("null")).unwrap();
    assert!(!fs::metadata("/dev/null").unwrap().is_file());
    // As /dev/stdout leads to a pipe.
    let (mut reader, pipe) = std::io::pipe().unwrap();
    let open = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&pipe));
    symlink(open, at("pipe")).unwrap();
    write(&wanted("pipe")).unwrap();
    drop(pipe);
    let mut read = Vec::new();
    std::io::Read::read_to_end(&mut reader, &mut read).unwrap();
    assert!(read == numbers);
    fs::remove_file(at("pipe")).unwrap();
    let left: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left.len(), 7, "{left:?}");
}
