//! Checkpoints as one file each: those of earlier versions, and those that are made of several ranks'.

#![allow(clippy::unwrap_used)] // helpers of tests panic as tests do

use fleet_checkpoint::{
    CheckpointError, Claim, Difference, Differs, Dtype, Manifest, ModelDir, RunDir, TensorRef, Tensors,
    TrainerState, Writer, consolidate, diff, latest, step_dir, verify,
};
use fleet_common::exit::Fault;
use std::fs;
use std::path::{Path, PathBuf};

/// As the first format had it: written by a fleet of that time, each number made of its kind, its parameter and its place.
fn old() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/format-1")
}

fn number(kind: usize, parameter: usize, at: usize) -> f32 {
    (kind * 100_000 + parameter * 1000 + at) as f32 / 8.0
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

/// That `dir` has the numbers of `old`.
fn has_the_old_numbers(dir: &Path) {
    let model = ModelDir::open(dir).unwrap();
    let mut flat = vec![0.0; model.layout.len];
    model.read(&mut flat).unwrap();
    let optimizer = Tensors::of_optimizer(dir).unwrap();
    for (at, p) in model.layout.parameters.iter().enumerate() {
        let expected = |kind| (0..p.range.len()).map(|n| number(kind, at, n)).collect::<Vec<_>>();
        assert_eq!(flat[p.range.clone()], expected(0), "{}", p.name);
        for (kind, suffix) in [(1, "exp_avg"), (2, "exp_avg_sq")] {
            let tensor = optimizer.get(&format!("{}.{suffix}", p.name)).unwrap();
            assert_eq!(floats(&tensor.data().unwrap()), expected(kind), "{}.{suffix}", p.name);
            let middle = tensor.len() / 8 * 4;
            assert_eq!(floats(&tensor.bytes(middle..tensor.len()).unwrap()), expected(kind)[middle / 4..]);
        }
    }
}

#[test]
fn a_checkpoint_of_the_first_format_is_found_verified_and_read() {
    let (path, manifest) = latest(&old()).unwrap().newest.unwrap();
    assert_eq!((manifest.step, manifest.run.as_str(), manifest.world_size), (100, "c/job-1", 1));
    assert_eq!(TrainerState::read(&path).unwrap().world_size, 4);
    has_the_old_numbers(&path);
}

#[test]
fn a_run_goes_on_from_one_of_the_first_format_and_rotates_it() {
    let dir = tempfile::tempdir().unwrap();
    let from = step_dir(dir.path(), 100);
    fs::create_dir(&from).unwrap();
    for entry in fs::read_dir(step_dir(&old(), 100)).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, from.join(path.file_name().unwrap())).unwrap();
    }
    let claim =
        Claim { dir: dir.path(), run: "b", resumed: Some(&from), overwrite: false, until: None, reads: &[] };
    let mut run = RunDir::claim(&claim).unwrap();
    assert_eq!(run.run(), "c/job-1");
    let mut writer = Writer::begin(&run, 101).unwrap();
    writer.write_bytes("config.json", b"{}").unwrap();
    writer.finish(1.0).unwrap();
    assert_eq!(run.rotate(1, 101, false).unwrap(), [from]);
}

#[test]
fn consolidating_gives_a_checkpoint_of_one_file_with_the_same_numbers() {
    let dir = tempfile::tempdir().unwrap();
    let (from, to) = (step_dir(&old(), 100), dir.path().join("whole"));
    consolidate(&from, &to).unwrap();
    let manifest = verify(&to).unwrap();
    assert_eq!((manifest.step, manifest.run.as_str(), manifest.world_size), (100, "c/job-1", 1));
    let files: Vec<&str> = manifest.files.keys().map(String::as_str).collect();
    let expected =
        ["config.json", "model.safetensors", "optimizer.safetensors", "tokenizer.json", "trainer_state.json"];
    assert_eq!(files, expected);
    has_the_old_numbers(&to);
    assert_eq!(diff(&from, &to).unwrap(), []);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "nothing temporary is left");

    let again = consolidate(&from, &to).unwrap_err();
    assert_eq!(again.fault(), Fault::Environment);
    assert!(again.to_string().contains("whole: entity already exists"), "{again}");
    let damaged = dir.path().join("damaged");
    fs::create_dir(&damaged).unwrap();
    fs::write(damaged.join("manifest.json"), "{").unwrap();
    assert!(matches!(consolidate(&damaged, &dir.path().join("x")), Err(CheckpointError::Damaged { .. })));
    assert!(!dir.path().join("x").exists());
}

#[test]
fn the_tensors_that_differ_are_named_with_their_largest_difference() {
    let dir = tempfile::tempdir().unwrap();
    let model = |name: &str, tensors: &[(&str, &[f32])]| {
        let place = dir.path().join(name);
        let claim = Claim { dir: &place, run: "r", resumed: None, overwrite: false, until: None, reads: &[] };
        let run = RunDir::claim(&claim).unwrap();
        let mut writer = Writer::begin(&run, 1).unwrap();
        let data: Vec<(Vec<u8>, [usize; 1])> = tensors
            .iter()
            .map(|(_, numbers)| (numbers.iter().flat_map(|x| x.to_le_bytes()).collect(), [numbers.len()]))
            .collect();
        let refs: Vec<TensorRef> = tensors
            .iter()
            .zip(&data)
            .map(|((name, _), (data, shape))| TensorRef { name, dtype: Dtype::F32, shape, first: 0, data })
            .collect();
        writer.write_safetensors("model.safetensors", &refs).unwrap();
        PathBuf::from(writer.finish(1.0).unwrap().path)
    };
    let one: &[f32] = &[1.0, 2.0];
    let a =
        model("a", &[("left", one), ("same", one), ("shape", one), ("some", &[1.0, 2.0, 3.0]), ("nan", one)]);
    let b = model(
        "b",
        &[
            ("right", one),
            ("same", one),
            ("shape", &[1.0]),
            ("some", &[1.5, 2.0, 2.0]),
            ("nan", &[1.0, f32::NAN]),
        ],
    );
    let shape = |len| (Dtype::F32, vec![len]);
    let expected = [
        ("left", Differs::OnlyInFirst),
        ("nan", Differs::Numbers { count: 1, largest: f64::INFINITY }),
        ("right", Differs::OnlyInSecond),
        ("shape", Differs::Shape([shape(2), shape(1)])),
        ("some", Differs::Numbers { count: 2, largest: 1.0 }),
    ]
    .map(|(tensor, what)| Difference { tensor: tensor.into(), what });
    assert_eq!(diff(&a, &b).unwrap(), expected);
    assert_eq!(diff(&a, &a).unwrap(), []);
    assert_eq!(Manifest::read(&a).unwrap().tensors.len(), 5);
}
