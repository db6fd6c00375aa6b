//! `fleet checkpoint` on directories that two ranks have written.

#![allow(clippy::unwrap_used)] // helpers of tests

use fleet_checkpoint::{Claim, Dtype, PartWriter, RunDir, TensorRef, Writer, model_file, optimizer_file};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Of two tensors that hold `number`, each written by a rank of its own, and a moment of which each has a half.
fn checkpoint(dir: &Path, number: f32) -> PathBuf {
    let run = RunDir::claim(&Claim {
        dir,
        run: "c/job-1",
        resumed: None,
        overwrite: false,
        until: None,
        reads: &[],
    })
    .unwrap();
    let mut writer = Writer::begin(&run, 7).unwrap().of("shared", 2);
    let data = number.to_le_bytes().repeat(4);
    let write = |part: &mut PartWriter, rank: usize| {
        let name = format!("w{rank}");
        let whole = TensorRef { name: &name, dtype: Dtype::F32, shape: &[2, 2], first: 0, data: &data };
        part.write_safetensors(&model_file(rank, 2), &[whole]).unwrap();
        let half = TensorRef { name: "w0.exp_avg", shape: &[8], first: 4 * rank, ..whole };
        part.write_safetensors(&optimizer_file(rank, 2), &[half]).unwrap();
    };
    let mut other = PartWriter::join(dir, 7, writer.ticket(), 1);
    write(&mut other, 1);
    other.hand_in().unwrap();
    write(writer.part(), 0);
    PathBuf::from(writer.finish_together(2.5, &|| true).unwrap().path)
}

fn fleet(args: &[&str], paths: &[&Path]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_fleet")).args(["checkpoint"]).args(args).args(paths).output().unwrap()
}

/// The exit code and what `--json` prints.
fn asked(args: &[&str], paths: &[&Path]) -> (i32, Value) {
    let output = fleet(&[args, &["--json"]].concat(), paths);
    (output.status.code().unwrap(), serde_json::from_slice(&output.stdout).unwrap())
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

#[test]
fn show_says_who_trained_and_what_is_in_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = checkpoint(dir.path(), 1.0);
    let output = fleet(&["show"], &[&path]);
    assert_eq!(output.status.code(), Some(0));
    let said = text(&output.stdout);
    for line in
        ["step 7 of run c/job-1, loss 2.5", "trained by 2 ranks, strategy shared; 3 tensors in 5 files"]
    {
        assert!(said.contains(line), "{said}");
    }
    assert!(said.lines().any(|line| line.starts_with("w0.exp_avg  F32   [8]     2 ")), "{said}");
    let (code, shown) = asked(&["show"], &[&path]);
    assert_eq!(
        (code, &shown["world_size"], &shown["strategy"], &shown["step"]),
        (0, &json!(2), &json!("shared"), &json!(7))
    );
    assert_eq!(shown["tensors"]["w0.exp_avg"]["pieces"][1]["file"], "optimizer-00002-of-00002.safetensors");
}

#[test]
fn verify_names_file_tensor_and_rank_of_a_changed_byte() {
    let dir = tempfile::tempdir().unwrap();
    let path = checkpoint(dir.path(), 1.0);
    let (code, said) = asked(&["verify"], &[&path]);
    assert_eq!((code, &said["whole"], &said["errors"]), (0, &json!(true), &json!([])));
    let file = path.join("optimizer-00002-of-00002.safetensors");
    let mut bytes = std::fs::read(&file).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&file, bytes).unwrap();
    std::fs::remove_file(path.join("model-00001-of-00002.safetensors")).unwrap();
    let output = fleet(&["verify"], &[&path]);
    assert_eq!(output.status.code(), Some(2));
    let lines = text(&output.stderr);
    for part in [
        "model-00001-of-00002.safetensors, which rank 0 wrote, is missing",
        "the tensor w0.exp_avg in optimizer-00002-of-00002.safetensors, which rank 1 wrote, have changed",
    ] {
        assert!(lines.contains(part), "{lines}");
    }
    let (code, said) = asked(&["verify"], &[&path]);
    assert_eq!((code, &said["whole"], said["errors"].as_array().unwrap().len()), (2, &json!(false), 2));
    let nowhere = fleet(&["verify"], &[&dir.path().join("nowhere")]);
    assert_eq!((nowhere.status.code(), text(&nowhere.stderr).lines().count()), (Some(2), 1));
}

#[test]
fn diff_names_what_differs_and_consolidate_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (checkpoint(&dir.path().join("a"), 1.0), checkpoint(&dir.path().join("b"), 1.5));
    let whole = dir.path().join("whole");
    let output = fleet(&["consolidate", "--out"], &[&whole, &a]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    assert!(whole.join("model.safetensors").exists() && whole.join("optimizer.safetensors").exists());
    assert_eq!(asked(&["diff"], &[&a, &whole]), (0, json!([])));
    assert_eq!(asked(&["verify"], &[&whole]).0, 0);
    let (code, found) = asked(&["diff"], &[&whole, &b]);
    let differs =
        |tensor: &str, numbers: u64| json!({ "tensor": tensor, "numbers": numbers, "largest": 0.5 });
    assert_eq!((code, found), (1, json!([differs("w0", 4), differs("w1", 4), differs("w0.exp_avg", 8)])));
    let output = fleet(&["diff"], &[&a, &b]);
    assert!(
        text(&output.stdout).contains("w0.exp_avg  8 numbers, by up to 5e-1"),
        "{}",
        text(&output.stdout)
    );
    assert_eq!(fleet(&["consolidate", "--out"], &[&whole, &a]).status.code(), Some(4), "it is there");
}
