//! Gangs that train on several nodes.

use super::*;

const BEGUN: &str = "> connected
     send hello
     > welcome
     registered as node-1
     > start train 2 from 2
     prepare for others
     spawn 2 ranks";

fn check_on(script: &str) {
    check(&format!("{BEGUN}\n{script}"));
}

#[test]
fn ranks_start_when_the_data_are_there_and_all_can_be_called_whichever_comes_last() {
    check_on(
        "> listens 500 501
         send 1: listening on [500, 501]
         > prepared
         send 2: data ready
         > peers 4
         meet 4 ranks
         rank 0: start on cpu with 4 threads as 2 of 4 on host 1 of 2
         rank 1: start on cpu with 4 threads as 3 of 4 on host 1 of 2
         > peers 4
         > start train 2 from 2",
    );
    check_on(
        "> listens 500 501
         send 1: listening on [500, 501]
         > peers 4
         meet 4 ranks
         > prepared
         rank 0: start on cpu with 4 threads as 2 of 4 on host 1 of 2
         rank 1: start on cpu with 4 threads as 3 of 4 on host 1 of 2
         send 2: data ready",
    );
}

#[test]
fn a_part_that_shall_stop_before_it_meets_never_starts() {
    check_on(
        "> listens 500 501
         send 1: listening on [500, 501]
         > prepared
         send 2: data ready
         > cancel
         kill rank 0
         kill rank 1
         > peers 4
         > rank 0 dies 9
         > rank 1 dies 9
         send 3: stopped after 0
         > committed 3
         forget job-1.1
         > peers 4",
    );
}

#[test]
fn a_list_of_other_ranks_than_the_gang_has_starts_nothing() {
    check_on(
        "> prepared
         send 1: data ready
         > peers 3",
    );
}

#[test]
fn a_report_is_sent_again_on_the_next_connection_and_the_answer_counts_once() {
    check_on(
        "> listens 500 501
         send 1: listening on [500, 501]
         > disconnected
         > prepared
         > connected
         send hello job-1.1
         > welcome
         send 1: listening on [500, 501], data ready
         > peers 4
         meet 4 ranks
         rank 0: start on cpu with 4 threads as 2 of 4 on host 1 of 2
         rank 1: start on cpu with 4 threads as 3 of 4 on host 1 of 2
         > disconnected
         > connected
         send hello job-1.1
         > welcome
         send 1: listening on [500, 501], data ready
         > peers 4",
    );
}

#[test]
fn a_rank_of_another_node_can_be_blamed() {
    check_on(
        "> prepared
         send 1: data ready
         > peers 4
         meet 4 ranks
         rank 0: start on cpu with 4 threads as 2 of 4 on host 1 of 2
         rank 1: start on cpu with 4 threads as 3 of 4 on host 1 of 2
         > rank 0 blames 0 rank 0 did not come
         > rank 0 exits 1
         abort collectives: rank 0
         > rank 1 was told of 0 aborted
         > rank 1 exits 1
         abort collectives: rank 1
         send 2: failed (Job): rank 0 did not come",
    );
}
