//! Jobs and commands in the documents run as they stand there (`fleet_tests::documents`): how many jobs, how many commands.

use fleet_tests::documents::run;

#[test]
fn what_moving_shows_runs() {
    assert_eq!(run("docs/moving.md"), (4, 0));
}

#[test]
fn what_data_shows_runs() {
    assert_eq!(run("docs/data.md"), (3, 0));
}

#[test]
fn what_adapters_shows_runs() {
    assert_eq!(run("docs/adapters.md"), (3, 6));
}

#[test]
fn what_inference_shows_runs() {
    assert_eq!(run("docs/inference.md"), (1, 3));
}
