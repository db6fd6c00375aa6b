//! Rules about the source that no compiler checks: who may link libtorch, where `unsafe` lives, who makes files.

#![allow(clippy::unwrap_used)] // in a test an unwrap is an assertion

use fleet_tests::source::{root, visit};
use std::process::Command;

fn cargo_tree(args: &[&str]) -> String {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".into());
    let output =
        Command::new(cargo).current_dir(root()).args(["tree", "--offline"]).args(args).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Names of the workspace's packages in what `cargo tree` printed.
fn own_packages(tree: &str) -> Vec<String> {
    let own = |line: &str| {
        let name = line.trim_start_matches(|c: char| !c.is_ascii_alphanumeric()).split(' ').next()?;
        (line.contains(&format!("({}", root().display()))).then(|| name.to_owned())
    };
    let mut names: Vec<String> = tree.lines().filter_map(own).collect();
    names.sort();
    names.dedup();
    names
}

#[test]
fn only_the_rank_its_executors_and_the_library_reach_libtorch() {
    let tree = cargo_tree(&["--workspace", "--edges", "all", "--invert", "torch-sys"]);
    assert_eq!(own_packages(&tree), ["fleet-cpu", "fleet-rank", "fleet-torch", "fleet-tune"], "{tree}");
}

#[test]
fn only_the_coordinator_reaches_rocksdb_and_the_simulator_goes_without() {
    let tree = cargo_tree(&["--workspace", "--edges", "all", "--invert", "librocksdb-sys"]);
    assert_eq!(own_packages(&tree), ["fleet-coordinator", "fleet-tests"], "{tree}");
    let tree = cargo_tree(&["--package", "fleet-tests", "--edges", "all", "--prefix", "none"]);
    let found =
        tree.lines().find(|line| ["librocksdb-sys", "torch-sys"].iter().any(|name| line.starts_with(name)));
    assert_eq!(found, None, "`cargo run -p fleet-tests --bin simulate` builds in a moment");
}

#[test]
fn there_is_one_tls_provider() {
    let tree = cargo_tree(&["--workspace", "--edges", "normal,build", "--prefix", "none"]);
    let found: Vec<&str> =
        tree.lines().filter(|line| line.starts_with("aws-lc-") || line.starts_with("openssl-sys")).collect();
    assert_eq!(found, Vec::<&str>::new());
}

#[test]
fn the_trainer_knows_no_device_no_transport_and_no_executor() {
    // That `fleet-learn` reaches neither executor nor libtorch is the first test's; within it the trainer sees a `Learner` alone.
    let mut found = Vec::new();
    visit("worker/learn/src/trainer", &mut |path, text| {
        let code = text.split("#[cfg(test)]").next().unwrap_or_default();
        for word in [
            "cuda",
            "Shm",
            "strategy::Shared",
            "strategy::Sharded",
            "strategy::Solo",
            "Executor",
            "Units",
            "kernels",
            "Device",
        ] {
            if code.contains(word) {
                found.push(format!("{}: {word}", path.display()));
            }
        }
    });
    assert_eq!(found, Vec::<String>::new(), "see worker/learn/src/engine.rs");
}

/// Families of models, whose names stand in their own files alone: whoever else names one would have to be told of the next.
const FAMILIES: [&str; 7] = ["mistral", "qwen2", "qwen3", "phi", "gpt2", "opt", "bloom"];

#[test]
fn only_a_familys_own_file_names_it() {
    let mut found = Vec::new();
    for folder in ["common/src", "worker", "fleet/src", "coordinator/src"] {
        visit(folder, &mut |path, text| {
            let relative = path.display().to_string();
            // Chat templates have names of their own, some of them those of families.
            let is_template = relative.ends_with("chat/builtin.rs");
            if relative.contains("/families/") || relative.contains("tests") || is_template {
                return;
            }
            let code = text.split("#[cfg(test)]").next().unwrap_or_default();
            for (at, line) in code.lines().enumerate() {
                let line = line.split("//").next().unwrap_or_default();
                let names = |family: &&str| line.contains(&format!("\"{family}\""));
                found.extend(
                    FAMILIES.iter().filter(|f| names(f)).map(|f| format!("{relative}:{}: {f}", at + 1)),
                );
            }
        });
    }
    assert_eq!(found, Vec::<String>::new(), "see common/src/model/families");
}

/// Folders that may hold `unsafe`; ARCHITECTURE.md says which and why.
const UNSAFE_HOMES: [&str; 8] = [
    "kernels",
    "worker/collectives/src/memory",
    "worker/collectives/src/shm",
    "worker/collectives/src/nccl",
    "worker/learn/src/shim",
    "worker/cpu/src/shim.rs",
    "worker/torch/src/shim",
    // Maps files into memory, for all readers of weights and token caches.
    "common/src/mapped.rs",
];

#[test]
fn unsafe_code_lives_only_in_its_homes() {
    let mut found = Vec::new();
    let mut files = 0;
    for folder in ["common", "coordinator", "worker", "kernels", "fleet", "tests", "bench"] {
        visit(folder, &mut |relative, text| {
            files += 1;
            if !UNSAFE_HOMES.iter().any(|home| relative.starts_with(home)) {
                let lines = text.lines().enumerate().filter(|(_, line)| is_unsafe(line));
                found.extend(
                    lines.map(|(at, line)| format!("{}:{}: {}", relative.display(), at + 1, line.trim())),
                );
            }
        });
    }
    assert!(files > 50, "the source was not found");
    assert_eq!(found, Vec::<String>::new(), "unsafe code outside its homes");
}

fn is_unsafe(line: &str) -> bool {
    let code = line.split("//").next().unwrap_or_default();
    let words = ["unsafe {", "unsafe fn ", "unsafe impl ", "unsafe extern ", "allow(unsafe_code"];
    // This file names them in quotes.
    words.iter().any(|word| code.contains(word) && !code.contains(&format!("\"{word}")))
}

/// Crates whose files are fleet's own; what ranks write is the user's.
const KEEPERS: [&str; 4] = ["common/src", "coordinator/src", "fleet/src", "worker/agent/src"];
/// What makes them, and what writes to the kernel's own file systems, which have no modes of ours.
const MAKERS: [&str; 2] = ["common/src/files.rs", "worker/agent/src/cgroup.rs"];

#[test]
fn what_fleet_keeps_is_made_private_in_one_place() {
    // Each gives what it makes the mode that the umask leaves.
    let makers = [
        "File::create",
        "fs::write(",
        "OpenOptions::new(",
        "create_dir_all(",
        "fs::create_dir(",
        "DirBuilder::new(",
    ];
    let mut found = Vec::new();
    for folder in KEEPERS {
        visit(folder, &mut |path, text| {
            let relative = path.display().to_string();
            if relative.contains("tests") || MAKERS.contains(&relative.as_str()) {
                return;
            }
            let code = text.split("#[cfg(test)]").next().unwrap_or_default();
            let lines = code.lines().enumerate().filter(|(_, line)| {
                // A method of another type may end in the same words.
                makers.iter().any(|maker| {
                    line.match_indices(maker)
                        .any(|(at, _)| !line[..at].ends_with(|c: char| c.is_alphanumeric()))
                })
            });
            found.extend(lines.map(|(at, line)| format!("{relative}:{}: {}", at + 1, line.trim())));
        });
    }
    assert_eq!(found, Vec::<String>::new(), "use common/src/files.rs");
}
