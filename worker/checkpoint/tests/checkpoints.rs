//! Checkpoints from the outside: written, found, damaged, rotated, and written to a disk that is full.

#![allow(clippy::unwrap_used)] // helpers of tests panic as tests do

use fleet_checkpoint::{
    CheckpointError, Claim, Dtype, MANIFEST_FILE, MODEL_FILE, RunDir, TensorRef, Tensors, Writer, latest,
    manifest_sha256, step_dir, verify,
};
use fleet_common::events::CheckpointRecord;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

fn claim(dir: &Path) -> RunDir {
    RunDir::claim(&Claim { dir, run: "run", resumed: None, overwrite: false, until: None, reads: &[] })
        .unwrap()
}

fn save(dir: &Path, step: u64) -> CheckpointRecord {
    let dir = claim(dir);
    let mut writer = Writer::begin(&dir, step).unwrap();
    let (embedding, norm, counts) = ([1u8; 24], [2u8; 8], [3u8; 6]);
    let tensors = [
        TensorRef { name: "counts", dtype: Dtype::BF16, shape: &[3], first: 0, data: &counts },
        TensorRef {
            name: "model.embed_tokens.weight",
            dtype: Dtype::F32,
            shape: &[3, 2],
            first: 0,
            data: &embedding,
        },
        TensorRef { name: "model.norm.weight", dtype: Dtype::F32, shape: &[2], first: 0, data: &norm },
    ];
    writer.write_safetensors(MODEL_FILE, &tensors).unwrap();
    writer.write_bytes("config.json", format!("{{\"step\":{step}}}").as_bytes()).unwrap();
    writer.finish(1.5).unwrap()
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.retain(|name| name != ".lock"); // of who holds the directory just now
    names.sort();
    names
}

#[test]
fn what_is_written_is_verified_and_read_back() {
    let dir = tempfile::tempdir().unwrap();
    let record = save(dir.path(), 100);
    let path = PathBuf::from(&record.path);
    assert!(path.is_absolute() && path.ends_with("step-00000100"));
    assert_eq!(names(&path), ["config.json", MANIFEST_FILE, MODEL_FILE]);
    let shards = names(&path).into_iter().filter(|name| name != MANIFEST_FILE);
    let on_disk: u64 = shards.map(|n| fs::metadata(path.join(n)).unwrap().len()).sum();
    assert_eq!((record.step, record.loss, record.bytes), (100, 1.5, on_disk));
    assert_eq!(record.manifest_sha256, manifest_sha256(&path).unwrap());

    let manifest = verify(&path).unwrap();
    assert_eq!((manifest.step, manifest.loss, manifest.files.len()), (100, Some(1.5), 2));

    let tensors = Tensors::open(&path).unwrap();
    let embedding = tensors.get("model.embed_tokens.weight").unwrap();
    assert_eq!((embedding.dtype, embedding.shape), (Dtype::F32, &[3, 2][..]));
    assert_eq!(embedding.data().unwrap(), [1; 24]);
    assert_eq!(tensors.get("counts").unwrap().data().unwrap(), [3; 6]);
    assert_eq!(
        tensors.names().collect::<Vec<_>>(),
        ["counts", "model.embed_tokens.weight", "model.norm.weight"]
    );
    assert!(tensors.get("other").is_none());
    // Readers that cast in place need every tensor aligned to its elements.
    let file = fs::read(path.join(MODEL_FILE)).unwrap();
    let parsed = safetensors::SafeTensors::deserialize(&file).unwrap();
    let data = parsed.tensor("model.embed_tokens.weight").unwrap().data();
    assert_eq!((data.as_ptr() as usize - file.as_ptr() as usize) % 4, 0);
}

#[test]
fn weights_that_are_written_while_they_are_read_are_refused_and_replaced_ones_stay_as_they_were() {
    let dir = tempfile::tempdir().unwrap();
    let path = PathBuf::from(save(dir.path(), 1).path).join(MODEL_FILE);
    let whole = fs::read(&path).unwrap();
    let read = |tensors: &Tensors| tensors.get("counts").unwrap().data();
    let opened = Tensors::open(&path).unwrap();
    fs::rename(&path, dir.path().join("old")).unwrap();
    fs::write(&path, "another file").unwrap();
    assert_eq!(read(&opened).unwrap(), [3; 6]);

    for change in [&whole[..whole.len() - 30], &[&whole[..], &[0]].concat()] {
        fs::write(&path, &whole).unwrap();
        let opened = Tensors::open(&path).unwrap();
        fs::write(&path, change).unwrap();
        let error = read(&opened).unwrap_err().to_string();
        assert!(error.contains("changed while it was being read"), "{error}");
        let error = Tensors::open(&path).unwrap_err().to_string();
        assert!(error.contains("it was not copied or fetched to its end"), "{error}");
    }
}

#[test]
fn a_model_in_shards_is_read_as_one() {
    let dir = tempfile::tempdir().unwrap();
    let data = [5u8; 4];
    for (step, name) in [(1, "a"), (2, "b")] {
        let claimed = claim(dir.path());
        let mut writer = Writer::begin(&claimed, step).unwrap();
        let tensor = TensorRef { name, dtype: Dtype::F32, shape: &[1], first: 0, data: &data };
        writer.write_safetensors(MODEL_FILE, &[tensor]).unwrap();
        writer.finish(0.0).unwrap();
        fs::copy(step_dir(dir.path(), step).join(MODEL_FILE), dir.path().join(format!("{step}.safetensors")))
            .unwrap();
    }
    let index = r#"{"metadata":{},"weight_map":{"a":"1.safetensors","b":"2.safetensors"}}"#;
    fs::write(dir.path().join("model.safetensors.index.json"), index).unwrap();
    let tensors = Tensors::open(dir.path()).unwrap();
    assert_eq!(tensors.names().collect::<Vec<_>>(), ["a", "b"]);
    for (place, wrong) in [
        ("\"a\":\"1", "\"c\":\"1"),
        ("\"a\":\"1.safetensors\"", "\"a\":\"1.safetensors\",\"ghost\":\"2.safetensors\""),
    ] {
        fs::write(dir.path().join("model.safetensors.index.json"), index.replace(place, wrong)).unwrap();
        let error = Tensors::open(dir.path()).unwrap_err().to_string();
        assert!(error.contains("and there they are not"), "{error}");
    }
    let moved = index
        .replace("1.safetensors", "x")
        .replace("2.safetensors", "1.safetensors")
        .replace('x', "2.safetensors");
    fs::write(dir.path().join("model.safetensors.index.json"), moved).unwrap();
    let error = Tensors::open(dir.path()).unwrap_err().to_string();
    assert!(error.contains("a in 2.safetensors, b in 1.safetensors"), "{error}");
    fs::write(dir.path().join("model.safetensors.index.json"), index).unwrap();
    fs::remove_file(dir.path().join("2.safetensors")).unwrap();
    assert!(Tensors::open(dir.path()).unwrap_err().to_string().contains("2.safetensors"));
}

#[test]
fn every_kind_of_damage_has_its_line() {
    let damage = |change: &dyn Fn(&Path)| -> String {
        let dir = tempfile::tempdir().unwrap();
        let path = PathBuf::from(save(dir.path(), 7).path);
        change(&path);
        let error = verify(&path).unwrap_err();
        assert!(matches!(error, CheckpointError::Damaged { .. }), "{error}");
        error.to_string()
    };
    let flip = |p: &Path| {
        let mut bytes = fs::read(p.join(MODEL_FILE)).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(p.join(MODEL_FILE), bytes).unwrap();
    };
    let cut = |p: &Path| {
        let bytes = fs::read(p.join(MODEL_FILE)).unwrap();
        fs::write(p.join(MODEL_FILE), &bytes[..20]).unwrap();
    };
    assert!(damage(&flip).contains("the contents of the tensor counts in model.safetensors have changed"));
    assert!(damage(&cut).contains("model.safetensors has 20 bytes and should have"));
    assert!(damage(&|p| fs::remove_file(p.join("config.json")).unwrap()).contains("config.json is missing"));
    assert!(
        damage(&|p| fs::write(p.join(MANIFEST_FILE), "{").unwrap()).contains("manifest.json cannot be read")
    );
}

#[test]
fn what_fleet_did_not_write_is_named_for_what_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let message = |path: &Path| verify(path).unwrap_err().to_string();
    assert!(message(&dir.path().join("nowhere")).contains("there is no checkpoint at"));
    assert!(message(dir.path()).contains("has no manifest.json"));

    let file = dir.path().join("last.ckpt");
    fs::write(&file, b"PK\x03\x04").unwrap();
    assert!(message(&file).contains("Lightning .ckpt"));

    let model = dir.path().join("llama");
    fs::create_dir(&model).unwrap();
    fs::write(model.join(MODEL_FILE), "").unwrap();
    assert!(message(&model).contains("as a Hugging Face model has"));
    assert!(Tensors::open(&model).unwrap_err().to_string().contains("not a usable safetensors file"));

    let run = dir.path().join("run");
    save(&run, 3);
    save(&run, 12);
    assert!(message(&run).contains("such as step-00000012"));
}

#[test]
fn the_newest_whole_one_is_found_and_damaged_ones_are_told() {
    let dir = tempfile::tempdir().unwrap();
    assert!(latest(&dir.path().join("none")).unwrap().newest.is_none());
    for step in [10, 20, 30] {
        save(dir.path(), step);
    }
    fs::remove_file(step_dir(dir.path(), 30).join(MODEL_FILE)).unwrap();
    fs::create_dir(dir.path().join("step-00000040")).unwrap();
    let found = latest(dir.path()).unwrap();
    let (path, manifest) = found.newest.unwrap();
    assert_eq!((path, manifest.step), (step_dir(dir.path(), 20), 20));
    let told: Vec<String> = found.passed_over.iter().map(ToString::to_string).collect();
    assert!(told.len() == 2 && told.iter().any(|t| t.contains("step-00000030")), "{told:?}");
}

#[test]
fn a_run_that_starts_over_counts_as_newer_than_the_steps_it_left() {
    let dir = tempfile::tempdir().unwrap();
    save(dir.path(), 500);
    save(dir.path(), 100);
    assert_eq!(latest(dir.path()).unwrap().newest.unwrap().1.step, 100);
    save(dir.path(), 500);
    assert_eq!(latest(dir.path()).unwrap().newest.unwrap().1.step, 500);
    assert_eq!(
        names(dir.path()),
        ["step-00000100", "step-00000500"],
        "a step that is saved again replaces the old one"
    );
}

#[test]
fn unfinished_checkpoints_and_those_of_dead_writers_go() {
    let dir = tempfile::tempdir().unwrap();
    let claimed = claim(dir.path());
    let mut writer = Writer::begin(&claimed, 5).unwrap();
    writer.write_bytes("config.json", b"{}").unwrap();
    assert_eq!(names(dir.path()).len(), 1);
    drop(writer);
    assert_eq!(names(dir.path()), [] as [String; 0]);
    drop(claimed);

    let mut dead = Command::new("true").spawn().unwrap();
    dead.wait().unwrap();
    for pid in [dead.id(), 1] {
        fs::create_dir(dir.path().join(format!(".tmp-step-00000004-{pid}"))).unwrap();
    }
    save(dir.path(), 5);
    assert_eq!(
        names(dir.path()),
        [".tmp-step-00000004-1", "step-00000005"],
        "process 1 lives and may be writing"
    );
}

/// Not a test: fills a small disk, in a mount namespace of its own.
#[test]
#[ignore = "run by another test, with FLEET_TEST_DIR"]
fn child_saves_to_a_full_disk() {
    let Some(dir) = std::env::var_os("FLEET_TEST_DIR").map(PathBuf::from) else { return };
    let small = save(&dir, 1);
    let big = vec![7u8; 8 << 20];
    let claimed = claim(&dir);
    let mut writer = Writer::begin(&claimed, 2).unwrap();
    let tensor = TensorRef { name: "w", dtype: Dtype::U8, shape: &[big.len()], first: 0, data: &big };
    let error = writer.write_safetensors(MODEL_FILE, &[tensor]).unwrap_err();
    drop(writer);
    drop(claimed);
    assert!(error.is_full_disk());
    println!("FOUND {error}");
    assert_eq!(names(&dir), ["step-00000001"]);
    assert_eq!(latest(&dir).unwrap().newest.unwrap().0, PathBuf::from(small.path));
    save(&dir, 3);

    // A run that continues makes room of its older ones, so it may begin though the disk is full to the last byte.
    let fill = || std::io::copy(&mut std::io::repeat(1), &mut fs::File::create(dir.join("filler")).unwrap());
    assert!(fill().is_err());
    let from = |step| Some(step_dir(&dir, step));
    let resume = |from: Option<PathBuf>| {
        let resumed = from.as_deref();
        RunDir::claim(&Claim { dir: &dir, run: "b", resumed, overwrite: false, until: None, reads: &[] })
    };
    let mut run = resume(from(3)).unwrap();
    assert_eq!(run.make_room(1, Some(3)).unwrap(), [step_dir(&dir, 1)]);
    drop(run);
    assert!(fill().is_err());
    let line = resume(from(3)).unwrap_err().to_string();
    assert!(line.contains("checkpoints cannot be written to"), "nothing older could go: {line}");
}

#[test]
fn a_full_disk_fails_one_save_and_spoils_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let script = r#"mount -t tmpfs -o size=4m none "$FLEET_TEST_DIR" && exec "$0" --exact child_saves_to_a_full_disk --ignored --nocapture"#;
    let permitted =
        Command::new("unshare").args(["-Urm", "mount", "-t", "tmpfs", "none"]).arg(dir.path()).output();
    if !permitted.is_ok_and(|out| out.status.success()) {
        println!("skipped: this machine does not let `unshare -Urm` mount a tmpfs");
        return;
    }
    let out = Command::new("unshare")
        .args(["-Urm", "sh", "-c", script])
        .arg(std::env::current_exe().unwrap())
        .env("FLEET_TEST_DIR", dir.path())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&out.stdout);
    assert!(out.status.success(), "{text}{}", String::from_utf8_lossy(&out.stderr));
    let line = text.lines().find(|l| l.contains("FOUND")).unwrap();
    assert!(line.contains("checkpoint of step 2 was not saved") && line.contains("make room"), "{line}");
    assert!(line.contains("model.safetensors: No space left on device"), "{line}");
}
