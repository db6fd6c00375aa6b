//! What docs/reference says of the commands is what the programs say of themselves.

#![allow(clippy::unwrap_used)] // in a test an unwrap is an assertion

use fleet_tests::{World, program};
use std::process::Command;

#[test]
fn the_commands_in_docs_are_those_of_the_programs() {
    let said = ["fleet", "coordinator", "worker", "fleet-rank"].map(|name| {
        let output = Command::new(program(name)).arg("manual").output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    });
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/reference/commands.md");
    let there = std::fs::read_to_string(path).unwrap_or_default();
    assert!(
        there.ends_with(&said.concat()),
        "docs/reference/commands.md is not of these programs; `make reference` writes it anew"
    );
}

/// What bash offers for the last word of a line.
fn offered(world: &World, line: &str) -> Vec<String> {
    let script = r#"
        source <("$1" completions bash)
        # What bash adds to an answer.
        compopt() { [[ $* == *plusdirs* ]] && COMPREPLY+=($(compgen -d -- "$cur")); return 0; }
        read -ra COMP_WORDS <<< "$2"
        [[ $2 == *" " ]] && COMP_WORDS+=("")
        COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
        _fleet fleet "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD-1]}"
        printf '%s\n' "${COMPREPLY[@]}""#;
    let mut bash = Command::new("bash");
    bash.args(["-c", script, "bash"]).arg(program("fleet")).arg(line);
    let done = fleet_tests::Running::start(world.enter(bash)).finish().expect(0);
    done.stdout.iter().filter(|line| !line.is_empty()).cloned().collect()
}

#[test]
fn bash_completes_commands_options_values_and_files() {
    let world = World::new();
    std::fs::create_dir(world.path("models")).unwrap();
    assert_eq!(offered(&world, "fleet laun"), ["launch"]);
    assert_eq!(offered(&world, "fleet checkpoint v"), ["verify"]);
    assert!(offered(&world, "fleet launch --").contains(&"--trace".to_owned()));
    assert_eq!(offered(&world, "fleet token create --role cl"), ["client"]);
    assert_eq!(offered(&world, "fleet adapter combine --type li"), ["linear"]);
    assert_eq!(offered(&world, "fleet generate --model mo"), ["models"]);
    // A folder where folders are wanted, files where files are.
    assert!(offered(&world, "fleet generate --model corp").is_empty());
    assert_eq!(offered(&world, "fleet generate --prompts corp"), ["corpus.jsonl"]);
    // Where nothing is offered bash takes files.
    for line in ["fleet launch ", "fleet launch -n 4 corp", "fleet checkpoint verify "] {
        assert_eq!(offered(&world, line), Vec::<String>::new(), "{line}");
    }
}
