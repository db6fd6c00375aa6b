//! Checkpoints that come from elsewhere, in pieces of any size.

#![allow(clippy::unwrap_used)] // in a test an unwrap is an assertion

use fleet_checkpoint::{
    Arrival, Claim, Dtype, MANIFEST_FILE, RunDir, Stock, TensorRef, Unfit, Writer, manifest_sha256, verify,
};
use proptest::prelude::*;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

fn save(place: &Path, run: &str) -> PathBuf {
    let claim = Claim { dir: place, run, resumed: None, overwrite: false, until: None, reads: &[] };
    let run = RunDir::claim(&claim).unwrap();
    let mut writer = Writer::begin(&run, 7).unwrap();
    let data: Vec<u8> = (0..4_000u32).map(|n| (n % 251) as u8).collect();
    let tensor = |name, from: usize| TensorRef {
        name,
        dtype: Dtype::F32,
        shape: &[500],
        first: 0,
        data: &data[from..from + 2_000],
    };
    writer.write_safetensors("model.safetensors", &[tensor("a", 0), tensor("b", 1)]).unwrap();
    writer.write_bytes("config.json", b"{}").unwrap();
    writer.write_bytes("empty", b"").unwrap();
    writer.finish(1.0).unwrap().path.into()
}

fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn it_is_the_same_in_pieces_of_any_size_and_appears_when_all_of_it_is_there(sizes in proptest::collection::vec(1usize..3_000, 1..20)) {
        let dir = tempfile::tempdir().unwrap();
        let original = save(&dir.path().join("one"), "r");
        let target = dir.path().join("two/step-00000007");
        let arrival = Arrival::begin(&target, &fs::read(original.join(MANIFEST_FILE)).unwrap()).unwrap();
        let mut sizes = sizes.iter().cycle();
        for (name, bytes, _) in arrival.files() {
            let data = fs::read(original.join(name)).unwrap();
            prop_assert_eq!(data.len() as u64, bytes);
            let mut file = arrival.file(name).unwrap();
            while !file.is_complete() {
                let from = file.next() as usize;
                file.push(&data[from..data.len().min(from + sizes.next().unwrap())]).unwrap();
            }
            file.finish().unwrap();
            prop_assert!(!target.exists());
        }
        arrival.finish().unwrap();
        prop_assert_eq!(verify(&target).unwrap(), verify(&original).unwrap());
        prop_assert_eq!(names(target.parent().unwrap()), ["step-00000007"]);
    }
}

#[test]
fn a_piece_that_changed_is_named_and_can_come_again() {
    let dir = tempfile::tempdir().unwrap();
    let original = save(&dir.path().join("one"), "r");
    let target = dir.path().join("two/step-00000007");
    let manifest = fs::read(original.join(MANIFEST_FILE)).unwrap();
    let arrival = Arrival::begin(&target, &manifest).unwrap();
    let data = fs::read(original.join("model.safetensors")).unwrap();
    let mut file = arrival.file("model.safetensors").unwrap();
    let mut changed = data.clone();
    *changed.last_mut().unwrap() ^= 1;
    let Err(Unfit::Changed(what)) = file.push(&changed) else { panic!("it was taken") };
    assert!(what.contains("tensor b in model.safetensors"), "{what}");
    let from = file.next() as usize;
    assert!(from > 2_000 && from < data.len());
    file.push(&data[from..]).unwrap();
    assert!(matches!(file.push(b"x"), Err(Unfit::Changed(what)) if what.contains("longer")));
    file.finish().unwrap();
    // The header is nobody's tensor.
    let mut header = data.clone();
    header[20] ^= 1;
    let mut file = arrival.file("model.safetensors").unwrap();
    file.push(&header).unwrap();
    let Err(Unfit::Changed(what)) = file.finish() else { panic!("it was taken") };
    assert!(what.contains("contents of model.safetensors"), "{what}");
    let unfinished = arrival.finish().unwrap_err().to_string();
    assert!(unfinished.contains("did not come"), "{unfinished}");
    assert_eq!(names(target.parent().unwrap()), Vec::<String>::new(), "nothing is left");
}

#[test]
fn what_is_another_run_s_or_nobody_s_is_never_replaced_and_its_own_is() {
    let dir = tempfile::tempdir().unwrap();
    let original = save(&dir.path().join("one"), "r");
    let manifest = fs::read(original.join(MANIFEST_FILE)).unwrap();
    let other = save(&dir.path().join("two"), "other");
    let refused = Arrival::begin(&other, &manifest).unwrap_err().to_string();
    assert!(refused.contains("move it away"), "{refused}");
    verify(&other).unwrap();
    let own = save(&dir.path().join("three"), "r");
    fs::write(own.join("config.json"), "[]").unwrap();
    let arrival = Arrival::begin(&own, &manifest).unwrap();
    for (name, ..) in arrival.files() {
        let mut file = arrival.file(name).unwrap();
        file.push(&fs::read(original.join(name)).unwrap()).unwrap();
        file.finish().unwrap();
    }
    arrival.finish().unwrap();
    verify(&own).unwrap();
}

#[test]
fn only_what_the_manifest_names_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let original = save(&dir.path().join("one"), "r");
    let sha256 = manifest_sha256(&original).unwrap();
    assert!(Stock::open(&original, &"ab".repeat(32)).is_err(), "another checkpoint");
    let stock = Stock::open(&original, &sha256).unwrap();
    let (mut file, bytes) = stock.read("config.json", 1).unwrap();
    let mut read = String::new();
    file.read_to_string(&mut read).unwrap();
    assert_eq!((read.as_str(), bytes), ("}", 1));
    assert_eq!(
        stock.read(MANIFEST_FILE, 0).unwrap().1,
        fs::metadata(original.join(MANIFEST_FILE)).unwrap().len()
    );
    fs::write(original.join("extra"), "x").unwrap();
    fs::remove_file(original.join("config.json")).unwrap();
    std::os::unix::fs::symlink("extra", original.join("config.json")).unwrap();
    fs::write(original.join("empty"), "no more").unwrap();
    for name in ["extra", "../one/.lock", "config.json", "empty", ""] {
        assert!(stock.read(name, 0).is_err(), "{name}");
    }
    fs::remove_file(original.join("config.json")).unwrap();
    assert!(stock.read("config.json", 0).unwrap_err().contains("missing"));
}
