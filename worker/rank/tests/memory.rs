//! Too little memory is one line that says for what, and what helps; the process is not aborted.

use std::process::Command;

/// `fleet-rank bench` where a process may have 4 GiB of addresses.
fn limited(args: &str) -> (Option<i32>, String) {
    let script = format!(
        "ulimit -v 4194304; exec {} bench --threads 1 --steps 1 {args}",
        env!("CARGO_BIN_EXE_fleet-rank")
    );
    let output = Command::new("sh").args(["-c", &script]).output().expect("sh runs");
    (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
}

#[test]
fn what_does_not_fit_into_memory_is_named_with_what_helps() {
    let (code, weights) = limited("--hidden 4096 --heads 32 --ffn 11008 --layers 32 --seq 64 --batch 1");
    assert_eq!(code, Some(4), "{weights}");
    assert!(weights.contains("not enough memory for weights, gradients and optimizer state ("), "{weights}");
    let (code, pass) = limited("--hidden 64 --heads 2 --ffn 8192 --layers 2 --seq 4096 --batch 16");
    assert_eq!(code, Some(4), "{pass}");
    assert!(pass.contains("the activations of a pass (") && pass.contains("lower batch_size"), "{pass}");
    for told in [weights, pass] {
        assert!(told.starts_with("error: ") && told.trim_end().lines().count() == 1, "{told}");
    }
}
