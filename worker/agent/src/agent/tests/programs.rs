//! Programs of the users' own, and the signals that they get.

use super::*;

#[test]
fn a_program_whose_secrets_were_removed_on_the_way_is_not_started() {
    check(
        "> start secretless 1
         > connected
         send hello job-1.1
         > welcome
         registered as node-1
         send 1: failed (Input): its secrets were removed before it was started (KEY); submit it again",
    );
}

#[test]
fn a_signal_is_passed_on_to_a_program_and_sterner_ones_follow() {
    check(
        "> connected
         send hello
         > welcome
         registered as node-1
         > start program 2
         spawn 2 ranks
         > interrupt
         interrupt rank 0
         interrupt rank 1
         > cancel
         > rank 0 exits 0
         > wait 9999
         > wait 1
         terminate rank 1
         > wait 9999
         > wait 1
         kill rank 1
         > rank 1 dies 9
         send 1: stopped after 0",
    );
}

#[test]
fn a_warning_is_passed_on_to_a_program_and_asks_for_nothing() {
    check(
        "> start program 2
         spawn 2 ranks
         > warning
         warn rank 0
         warn rank 1
         > rank 1 exits 0
         > warning
         warn rank 0
         > interrupt
         interrupt rank 0
         > warning
         warn rank 0
         > interrupt",
    );
    check(
        "> start train 1
         prepare
         spawn 1 ranks
         > prepared
         rank 0: start on cpu with 8 threads
         > warning",
    );
}

#[test]
fn a_second_signal_hastens_the_end_and_training_is_stopped_in_its_own_way() {
    check(
        "> start program 1
         spawn 1 ranks
         > interrupt
         interrupt rank 0
         > interrupt
         > cancel now
         kill rank 0",
    );
    check(
        "> start train 1
         prepare
         spawn 1 ranks
         > prepared
         rank 0: start on cpu with 8 threads
         > interrupt
         > cancel
         rank 0: stop",
    );
}

#[test]
fn of_a_program_the_first_failing_rank_is_named_with_its_code() {
    check(
        "> start program 3
         spawn 3 ranks
         > rank 2 exits 0
         > rank 1 exits 3
         terminate rank 0
         > wait 100
         > rank 0 dies 6
         > connected
         send hello job-1.1
         > welcome
         registered as node-1
         send 1: `of the other ranks: signal 6 (SIGABRT) (rank 0)`, failed (Job): rank 1 on box ended with exit code 3",
    );
}

#[test]
fn the_other_ranks_of_a_program_that_failed_have_half_a_minute_and_their_ends_blame_nobody_else() {
    let began = "> connected
         send hello
         > welcome
         registered as node-1
         > start program 4
         spawn 4 ranks
         > rank 2 dies 11
         terminate rank 0
         terminate rank 1
         terminate rank 3
         > wait 20000
         > rank 0 prints saved
         send 1: `saved`
         > rank 0 exits 5
         > rank 1 exits 0";
    check(&format!(
        "{began}
         > wait 9999
         > wait 1
         kill rank 3
         > rank 3 dies 9
         send 2: `of the other ranks: exit code 5 (rank 0); killed (rank 3)`, failed (Job): rank 2 on box was killed by signal 11 (SIGSEGV)"
    ));
    // Who asks for the end meanwhile has it when he asks again.
    check(&format!(
        "{began}
         > interrupt
         interrupt rank 3
         > cancel
         > cancel now
         kill rank 3"
    ));
}

#[test]
fn a_program_that_prints_and_succeeds() {
    check(
        "> connected
         send hello
         > welcome
         registered as node-1
         > start program 1
         spawn 1 ranks
         > rank 0 prints hello world
         send 1: `hello world`
         > rank 0 exits 0
         send 2: succeeded after 0
         > committed 2
         forget job-1.1",
    );
}
