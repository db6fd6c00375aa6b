//! Scripts: a line that begins with `>` is something that happens, the lines below it are what the agent does about it. `play` acts
//! the script and writes down what really came out; the two texts must be equal. Heartbeats and looks at memory are left out.

mod meeting;
mod programs;
mod stage;
mod stalls;

use super::*;
use fleet_common::events::EventBody;
use stage::{GANG, Stage, check, config, gang, input, job};

#[test]
fn a_checkpoint_that_is_not_whole_is_not_passed_on_and_never_counts() {
    check(
        "> connected
         send hello
         > welcome
         registered as node-1
         > start train 1
         prepare
         spawn 1 ranks
         > prepared
         rank 0: start on cpu with 8 threads
         send 1: data ready
         > rank 0 saved-without-a-hash 1
         send 2: no checkpoint 1: its manifest is not whole: `` is not the hash of a manifest
         > committed 2
         > rank 0 saved 2
         send 3: checkpoint 2
         > committed 3
         rank 0: checkpoint 2 counts",
    );
}

#[test]
fn a_job_from_its_start_to_its_last_event() {
    check(
        "> connected
         send hello
         > welcome
         registered as node-1
         > start train 2
         prepare
         spawn 2 ranks
         > start train 2
         > prepared
         rank 0: start on cpu with 4 threads
         rank 1: start on cpu with 4 threads
         send 1: data ready
         > rank 0 step 1
         send 2: step 1
         > rank 0 saved 1
         send 3: checkpoint 1
         > committed 3
         rank 0: checkpoint 1 counts
         > rank 0 done 1
         > rank 1 done 1
         > rank 0 exits 0
         > rank 1 exits 0
         send 4: succeeded after 1
         > committed 4
         forget job-1.1",
    );
}

#[test]
fn the_second_node_of_a_job_counts_its_ranks_on() {
    check(
        "> connected
         send hello
         > welcome
         registered as node-1
         > start program 2 from 10
         spawn 2 ranks
         > rank 1 prints hello
         send 1: rank 11: `hello`
         > rank 1 exits 3
         terminate rank 0
         > rank 0 dies 15
         send 2: failed (Job): rank 11 on box ended with exit code 3
         > committed 2
         forget job-1.1",
    );
}

#[test]
fn a_gang_that_has_had_its_time_saves_what_it_can_and_fails_for_it() {
    check(
        "> connected
         send hello
         > welcome
         registered as node-1
         > start train 1 for 60000
         prepare
         spawn 1 ranks
         > prepared
         rank 0: start on cpu with 8 threads
         send 1: data ready
         > wait 60000
         rank 0: stop
         > rank 0 stopped 4
         > rank 0 exits 0
         send 2: failed (Job): the job had its maximum time of 60 s and was stopped; give it more with --max-time, or go on from its last checkpoint",
    );
}

#[test]
fn a_later_generation_goes_on_from_the_recorded_checkpoint() {
    check(
        "> connected
         send hello
         > welcome
         registered as node-1
         > start train 1 resumes /c/step-5
         prepare from /c/step-5
         spawn 1 ranks",
    );
}

#[test]
fn what_a_gang_cannot_go_on_from_is_told_and_the_cluster_says_what_becomes_of_it() {
    check(
        "> connected
         send hello
         > welcome
         registered as node-1
         > start train 1 resumes /c/step-5
         prepare from /c/step-5
         spawn 1 ranks
         > lost a file of node other
         send 1: checkpoint lost: a file of node other
         > cancel now
         kill rank 0
         > rank 0 dies 9
         send 2: stopped after 0",
    );
}

#[test]
fn what_was_lent_counts_until_the_cluster_says_otherwise_or_is_found_again() {
    check(
        "> connected
         send hello
         > welcome
         registered as node-1
         > lend 2 3
         lend 2
         > disconnected
         > connected
         send hello
         > welcome
         lend 0
         > lend
         lend 0",
    );
}

#[test]
fn what_newer_checkpoints_have_replaced_is_removed() {
    check(
        "> connected
         send hello
         > welcome
         registered as node-1
         > superseded 5 6
         remove 2
         > superseded",
    );
}

#[test]
fn a_lost_connection_is_invisible_to_the_ranks_and_nothing_is_sent_twice_or_never() {
    check(
        "> connected
         send hello
         > welcome
         registered as node-1
         > start train 1
         prepare
         spawn 1 ranks
         > prepared
         rank 0: start on cpu with 8 threads
         send 1: data ready
         > rank 0 step 1
         send 2: step 1
         > committed 1
         > disconnected
         > rank 0 step 2
         > rank 0 saved 2
         > wait 30000
         > connected
         send hello job-1.1
         > welcome
         send 2: step 1, step 2, checkpoint 2
         > resend from 4
         send 4: checkpoint 2
         > committed 4
         rank 0: checkpoint 2 counts",
    );
}

#[test]
fn the_rank_that_was_killed_is_named_and_not_those_that_noticed() {
    check(
        "> connected
         send hello
         > welcome
         registered as node-1
         > start train 2
         prepare
         spawn 2 ranks
         > prepared
         rank 0: start on cpu with 4 threads
         rank 1: start on cpu with 4 threads
         send 1: data ready
         > rank 0 was told all_reduce #3: aborted: rank 1 died
         > wait 100
         > rank 1 dies 11
         abort collectives: rank 1
         kill rank 0
         > rank 0 dies 9
         send 2: failed (Job): rank 1 on box was killed by signal 11 (SIGSEGV)",
    );
}

#[test]
fn the_others_get_half_a_second_after_a_failure_and_are_killed_then() {
    check(
        "> start train 2
         prepare
         spawn 2 ranks
         > prepared
         rank 0: start on cpu with 4 threads
         rank 1: start on cpu with 4 threads
         > rank 1 fails the loss is not a number
         > rank 1 exits 1
         abort collectives: rank 1
         > wait 499
         > wait 1
         kill rank 0
         > rank 0 dies 9
         > connected
         send hello job-1.1
         > welcome
         registered as node-1
         send 1: data ready, failed (Job): the loss is not a number",
    );
}

#[test]
fn a_rank_that_leaves_without_a_result_fails_the_job() {
    check(
        "> start train 1
         prepare
         spawn 1 ranks
         > prepared
         rank 0: start on cpu with 8 threads
         > rank 0 exits 0
         abort collectives: rank 0
         > connected
         send hello job-1.1
         > welcome
         registered as node-1
         send 1: data ready, failed (Job): rank 0 on box ended before the job was done",
    );
}

#[test]
fn bad_data_ends_the_job_before_it_starts() {
    check(
        "> start train 2
         prepare
         spawn 2 ranks
         > data bad data.path /x does not exist
         kill rank 0
         kill rank 1
         > rank 0 dies 9
         > rank 1 dies 9
         > connected
         send hello job-1.1
         > welcome
         registered as node-1
         send 1: failed (Input): data.path /x does not exist",
    );
}

#[test]
fn without_libtorch_training_is_refused_at_once_and_programs_still_run() {
    check(
        "> probe fails libtorch_cpu.so is missing
         > start train 2
         > start program 1 generation 2
         spawn 1 ranks
         > connected
         send hello job-1.1 job-1.2
         > welcome
         registered as node-1
         send 1: failed (Environment): libtorch_cpu.so is missing",
    );
}

#[test]
fn a_cancelled_job_stops_with_a_checkpoint_and_the_second_request_kills() {
    check(
        "> start train 1
         prepare
         spawn 1 ranks
         > prepared
         rank 0: start on cpu with 8 threads
         > rank 0 step 7
         > cancel
         rank 0: stop
         > wait 60000
         > cancel
         > cancel now
         kill rank 0
         > rank 0 dies 9
         > connected
         send hello job-1.1
         > welcome
         registered as node-1
         send 1: data ready, step 7, stopped after 7",
    );
}

#[test]
fn a_job_that_is_cancelled_while_its_data_is_prepared_is_over_at_once() {
    check(
        "> start train 1
         prepare
         spawn 1 ranks
         > cancel
         kill rank 0
         > rank 0 dies 9
         > prepared
         > connected
         send hello job-1.1
         > welcome
         registered as node-1
         send 1: stopped after 0",
    );
}

#[test]
fn an_agent_that_is_told_to_end_saves_first_but_not_for_ever() {
    check(
        "> connected
         send hello
         > welcome
         registered as node-1
         > start train 1
         prepare
         spawn 1 ranks
         > prepared
         rank 0: start on cpu with 8 threads
         send 1: data ready
         > signal
         rank 0: stop
         > wait 9999
         > wait 1
         kill rank 0
         > rank 0 dies 9
         send 2: stopped after 0
         > wait 999
         > wait 1
         exit",
    );
}

#[test]
fn an_agent_that_ends_leaves_once_its_last_events_are_committed() {
    check(
        "> connected
         send hello
         > welcome
         registered as node-1
         > start train 1
         prepare
         spawn 1 ranks
         > prepared
         rank 0: start on cpu with 8 threads
         send 1: data ready
         > signal
         rank 0: stop
         > rank 0 saved 5
         send 2: checkpoint 5
         > rank 0 stopped 5
         > rank 0 exits 0
         send 3: stopped after 5
         > committed 3
         forget job-1.1
         exit",
    );
}

#[test]
fn a_second_signal_ends_everything_at_once_but_not_what_comes_with_the_first() {
    check(
        "> start program 2
         spawn 2 ranks
         > signal
         terminate rank 0
         terminate rank 1
         > signal
         > wait 999
         > signal
         > wait 1
         > signal
         kill rank 0
         kill rank 1
         > rank 0 dies 9
         > rank 1 dies 9
         exit",
    );
}

#[test]
fn a_process_that_cannot_be_started_fails_the_job() {
    check(
        "> start train 2
         prepare
         spawn 2 ranks
         > no process 1
         > wait 500
         kill rank 0
         > rank 0 dies 9
         > connected
         send hello job-1.1
         > welcome
         registered as node-1
         send 1: failed (Environment): rank 1 could not be started: too many processes",
    );
}

#[test]
fn a_newer_generation_replaces_an_older_one_and_never_the_other_way_round() {
    check(
        "> start program 1 generation 3
         spawn 1 ranks
         > start program 1
         > connected
         send hello job-1.3",
    );
}

#[test]
fn a_coordinator_with_another_stream_gets_the_gang_ended_instead_of_gaps() {
    check(
        "> connected
         send hello
         > welcome
         registered as node-1
         > start program 1
         spawn 1 ranks
         > rank 0 prints a
         send 1: `a`
         > resend from 7
         kill rank 0
         > rank 0 dies 9
         connect anew
         > disconnected
         > start program 1
         > connected
         send hello, lost job-1.1
         > welcome
         forget job-1.1",
    );
}

#[test]
fn a_gang_is_over_only_when_nothing_that_it_started_lives() {
    let mut stage = Stage::new(Past::default());
    stage.sweeps_last = true;
    stage.check(
        "> connected
         send hello
         > welcome
         registered as node-1
         > start program 2
         spawn 2 ranks
         > rank 0 exits 0
         > rank 1 exits 0
         > wait 60000
         > cancel now
         > resend from 1
         > swept but 3
         send 1: `3 processes that the ranks started hang in the kernel of box and end when it lets them go`, succeeded after 0
         > swept
         > committed 2
         forget job-1.1",
    );
}

#[test]
fn what_an_earlier_process_started_is_told_until_the_cluster_knows_and_never_started_again() {
    let past = Past { processes: vec![8, 9], gangs: [GANG].into() };
    Stage::new(past).check(
        "> connected
         send hello, lost job-1.1, after 8 9
         > start program 1
         > disconnected
         > connected
         send hello, lost job-1.1, after 8 9
         > welcome
         forget job-1.1
         registered as node-1
         > start program 1 generation 2
         spawn 1 ranks
         > disconnected
         > connected
         send hello job-1.2",
    );
}

#[test]
fn a_node_that_is_not_wanted_leaves() {
    check(
        "> connected
         send hello
         > refused node-1 was removed
         exit: node-1 was removed",
    );
}

#[test]
fn heartbeats_go_out_every_second_while_connected_and_only_then() {
    let mut stage = Stage::new(Past::default());
    let beats = |agent: &mut Agent, from_ms: u64, to_ms: u64| {
        let mut beats = 0;
        while let Some(at) = agent.deadline().filter(|at| *at < Duration::from_millis(to_ms)) {
            let now = Now { mono: at.max(Duration::from_millis(from_ms)), unix_ms: 0 };
            beats += agent
                .handle(now, Input::Tick)
                .iter()
                .filter(|a| matches!(a, Action::Send(FromAgent::Heartbeat { .. })))
                .count();
        }
        beats
    };
    stage.happen(Input::Connected);
    assert_eq!(beats(&mut stage.agent, 0, 5000), 0, "not before the welcome");
    stage.happen(Input::Message(ToAgent::Welcome { node: NodeId(1) }));
    assert_eq!(beats(&mut stage.agent, 0, 5000), 4, "the first went out with the welcome");
    stage.happen(Input::Disconnected);
    assert_eq!(beats(&mut stage.agent, 5000, 9000), 0);
}

#[test]
fn the_device_of_a_rank_is_the_jobs_wish_or_the_nodes_best() {
    let cuda = Config { accelerator: Accelerator::Cuda { devices: 2 }, ..config() };
    let job = |device, devices| Job { device, devices, ..job() };
    let auto = job(Device::Auto, Devices::Auto);
    let among = |config: &Config, job: &Job, ranks: (u32, u32), taken: &[u32]| {
        let place = config.place(job, 0, ranks, &taken.iter().copied().collect())?;
        Ok::<_, String>((place.device, place.note.unwrap_or_default()))
    };
    let device = |config: &Config, job: &Job, ranks, taken: &[u32]| among(config, job, (ranks, ranks), taken);
    let plain = |device: &str| Ok((device.to_owned(), String::new()));
    assert_eq!(device(&cuda, &auto, 1, &[]), plain("cuda:0"));
    assert_eq!(device(&cuda, &auto, 1, &[0]), plain("cuda:1"), "the first belongs to another job");
    assert_eq!(device(&cuda, &job(Device::Cuda, Devices::Ids(vec![1])), 1, &[]), plain("cuda:1"));
    assert_eq!(device(&cuda, &job(Device::Cpu, Devices::Auto), 4, &[]), plain("cpu"));

    assert_eq!(device(&cuda, &auto, 2, &[]), plain("cuda:0"));
    let (place, note) = device(&cuda, &auto, 3, &[]).unwrap();
    assert!(place == "cpu" && note.contains("has 2 CUDA devices"), "rank 0 goes where rank 2 can: {note}");
    let over_nodes = |device| Job { num_nodes: Some(2), ..job(device, Devices::Auto) };
    for device in [Device::Cuda, Device::Auto] {
        assert_eq!(among(&cuda, &over_nodes(device), (2, 4), &[]), plain("cuda:0"), "ranks ask each other");
    }
    let refused = device(&cuda, &job(Device::Cuda, Devices::Ids(vec![2])), 1, &[]).unwrap_err();
    assert!(refused.contains("has 2 CUDA devices"), "{refused}");

    let refused = device(&config(), &job(Device::Cuda, Devices::Auto), 1, &[]).unwrap_err();
    assert!(refused.contains("no CUDA device; set"), "{refused}");
    let broken = Config { no_cuda: Some("the driver is too old".into()), ..config() };
    let (place, note) = device(&broken, &auto, 1, &[]).unwrap();
    assert_eq!((place.as_str(), note.as_str()), ("cpu", "the driver is too old: training on the CPU"));
    let refused = device(&broken, &job(Device::Cuda, Devices::Auto), 1, &[]).unwrap_err();
    assert!(refused.contains("the driver is too old; set device"), "{refused}");
}

#[test]
fn memory_is_reported_as_peaks_when_they_have_grown() {
    let mut stage = Stage::new(Past::default());
    let memory =
        |rss: &[u64]| Input::Gang(GANG, GangInput::Memory { rss_mib: rss.to_vec(), pss_mib: rss.to_vec() });
    stage.happen(Input::Connected);
    stage.happen(Input::Message(ToAgent::Welcome { node: NodeId(1) }));
    stage.happen(Input::Message(ToAgent::StartGang(gang("program", 2, 1))));
    stage.happen(memory(&[10, 20]));
    stage.happen(memory(&[15, 0]));
    stage.happen(input(&["rank", "0", "exits", "0"], stage.now));
    stage.happen(input(&["rank", "1", "exits", "0"], stage.now));
    assert_eq!(
        stage.seen[3..],
        ["send 1: memory [10, 20]", "send 2: memory [15, 20]", "send 3: succeeded after 0"]
    );
}
