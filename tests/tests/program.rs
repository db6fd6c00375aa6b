//! `fleet launch -- PROGRAM`: any program, as torchrun would run it.

#![allow(clippy::unwrap_used)] // in a test an unwrap is an assertion

use fleet_tests::{Running, Terminal, World, eventually};
use nix::sys::signal::Signal;
use std::collections::BTreeSet;
use std::io::Write;
use std::process::Stdio;

#[test]
fn a_program_finds_its_rank_and_its_peers_in_the_environment() {
    let world = World::new();
    let script = "echo env $RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE $GROUP_RANK $ROLE_RANK $MASTER_ADDR $OMP_NUM_THREADS \
                  $TORCHELASTIC_RUN_ID $TORCHELASTIC_RESTART_COUNT $MASTER_PORT $PWD $GIVEN";
    let mut command = world.command("fleet");
    command.env("GIVEN", "through").args(["launch", "-n", "2", "--json", "--", "sh", "-c", script]);
    let done = fleet_tests::Running::start(command).finish().expect(0);
    assert_eq!(done.summary()["status"], "succeeded");
    let mut ports = BTreeSet::new();
    for rank in 0..2 {
        let logs = done.events("log");
        let line = logs
            .iter()
            .find(|log| log["rank"] == rank && log["line"].as_str().unwrap_or_default().starts_with("env "));
        let line = line.unwrap_or_else(|| panic!("rank {rank} printed nothing: {}", done.all()));
        let words: Vec<&str> = line["line"].as_str().unwrap().split(' ').collect();
        let rank = rank.to_string();
        assert_eq!(words[..9], ["env", &rank, &rank, "2", "2", "0", &rank, "127.0.0.1", "1"]);
        assert_eq!(words[10], "0");
        assert_eq!(words[12..], [world.path("").display().to_string().trim_end_matches('/'), "through"]);
        ports.insert(words[11].parse::<u16>().unwrap());
    }
    assert_eq!(ports.len(), 1, "one port for all");
}

#[test]
fn the_exit_code_is_that_of_the_first_rank_that_fails() {
    let world = World::new();
    let script = "if [ $RANK = 1 ]; then echo last words; exit 7; fi; sleep 60";
    let done = world.run("fleet", &["launch", "-n", "2", "--json", "--", "sh", "-c", script]).expect(7);
    let error = &done.summary()["error"];
    assert_eq!(
        (&error["rank"], &error["exit_code"], &error["signal"]),
        (&1.into(), &7.into(), &().into()),
        "{error}"
    );
    assert!(error["last_lines"].to_string().contains("last words"), "{error}");
    world.is_empty_soon();
}

#[test]
fn a_rank_that_dies_by_a_signal_gives_128_and_the_signal() {
    let world = World::new();
    let script = "if [ $RANK = 1 ]; then kill -SEGV $$; fi; sleep 60";
    let done =
        world.run("fleet", &["launch", "-n", "2", "--json", "--", "sh", "-c", script]).expect(128 + 11);
    let error = &done.summary()["error"];
    assert_eq!((&error["rank"], &error["signal"]), (&1.into(), &11.into()), "{error}");
    world.is_empty_soon();
}

#[test]
fn the_other_ranks_of_one_that_fails_can_save_before_they_end() {
    let world = World::new();
    let saves = "trap 'sleep 2; echo saved > saved; echo kept; exit 9' TERM; echo > ready; while :; do sleep 0.1; done";
    let script =
        format!("if [ $RANK = 1 ]; then until [ -e ready ]; do sleep 0.01; done; exit 7; fi; {saves}");
    let done = world.run("fleet", &["launch", "-n", "2", "--json", "--", "sh", "-c", &script]).expect(7);
    assert!(world.path("saved").is_file(), "{}", done.all());
    let logs = done.events("log");
    assert!(logs.iter().any(|log| log["line"] == "kept" && log["rank"] == 0), "{}", done.all());
    assert!(
        logs.iter().any(|log| log["line"] == "of the other ranks: exit code 9 (rank 0)"),
        "{}",
        done.all()
    );
    assert_eq!(done.summary()["error"]["rank"], 1);
    world.is_empty_soon();
}

/// Asks to stop until it has ended, and looks how.
fn insist(mut launch: Running) {
    eventually("it ends", || {
        let ended = launch.has_ended();
        if !ended {
            launch.signal(Signal::SIGINT);
        }
        ended
    });
    launch.finish().expect(130);
}

#[test]
fn who_does_not_want_to_wait_for_the_other_ranks_asks_twice() {
    let world = World::new();
    let stays = "trap 'echo asked' TERM INT; echo > ready; while :; do sleep 0.1; done";
    let script =
        format!("if [ $RANK = 1 ]; then until [ -e ready ]; do sleep 0.01; done; exit 7; fi; {stays}");
    let mut launch = world.start("fleet", &["launch", "-n", "2", "--json", "--", "sh", "-c", &script]);
    launch.until("asked", |line| line["line"] == "asked");
    launch.signal(Signal::SIGINT);
    launch.until_it_says("once more, after a second, stops at once");
    insist(launch);
    world.is_empty_soon();
}

#[test]
fn a_program_that_does_not_exist_is_named() {
    let world = World::new();
    let done = world.run("fleet", &["launch", "-n", "1", "--", "no-such-program-here"]);
    assert!([2, 4, 127].contains(&done.code()), "{}", done.all());
    let line = done.says("could not start");
    assert_eq!(
        line,
        "error: rank 0 on local could not start: no-such-program-here: No such file or directory (os error 2)"
    );
    assert_eq!(done.stderr.matches("no-such-program-here").count(), 1, "said once: {}", done.all());
}

#[test]
fn what_cannot_start_is_told_from_what_ends_with_the_same_code() {
    use std::os::unix::fs::PermissionsExt;
    let world = World::new();
    let script = world.write("script", "#!/no/such/interpreter -x\necho hello\n");
    std::fs::set_permissions(&script, PermissionsExt::from_mode(0o755)).unwrap();
    let done = world.run("fleet", &["launch", "-n", "1", "--", "./script"]).expect(127);
    let line = done.says("could not start");
    assert!(
        line.contains(
            "./script: its first line names an interpreter that is not there: `/no/such/interpreter`"
        )
    );
    let done = world.run("fleet", &["launch", "-n", "1", "--", "sh", "-c", "no-such-command"]).expect(127);
    done.says("error: rank 0 on local ended with exit code 127");
}

#[test]
fn a_launch_or_submit_of_nothing_says_what_there_could_be() {
    let world = World::new();
    for command in ["launch", "submit"] {
        let done = world.run("fleet", &[command, "-n", "1"]).expect(2);
        assert!(done.says("error: nothing to run").contains("-- PROGRAM ARGS"), "{}", done.all());
    }
}

/// `fleet launch -n RANKS -- sh -c SCRIPT` with this on its stdin, and how it ended.
fn fed(world: &World, ranks: &str, script: &str, bytes: &[u8]) -> Option<i32> {
    let mut command = world.command("fleet");
    command.args(["launch", "-n", ranks, "--", "sh", "-c", script]).stdin(Stdio::piped());
    let mut launch = command.spawn().unwrap();
    let written = launch.stdin.take().unwrap().write_all(bytes); // closed with that
    let code = launch.wait().unwrap().code();
    assert!(written.is_ok() || bytes.len() > 64 << 10, "{written:?}");
    code
}

#[test]
fn rank_0_reads_what_the_launch_is_given_to_read() {
    let world = World::new();
    let bytes: Vec<u8> = (0..=255).cycle().take(1_000_000).collect();
    assert_eq!(fed(&world, "2", "cat > got-$RANK", &bytes), Some(0));
    assert!(std::fs::read(world.path("got-0")).unwrap() == bytes);
    assert_eq!(std::fs::read(world.path("got-1")).unwrap(), b"");
    // Who does not read holds nothing up but who writes.
    assert_eq!(fed(&world, "1", "exit 7", &bytes), Some(7));
    world.is_empty_soon();
}

#[test]
fn rank_0_alone_reads_what_is_typed_at_a_terminal() {
    let world = World::new();
    let script =
        "if [ $RANK = 1 ]; then cat > typed-1; exit; fi; echo ready; read x; echo got $x; cat > typed-0";
    let mut terminal = Terminal::start(&world, &["fleet", "launch", "-n", "2", "--", "sh", "-c", script]);
    terminal.until("ready");
    terminal.type_in("first\n");
    terminal.until("got first");
    terminal.type_in("second\n\x04");
    assert_eq!(terminal.finish(), Some(0));
    let typed = |rank: u32| std::fs::read_to_string(world.path(&format!("typed-{rank}"))).unwrap();
    assert_eq!((typed(0).as_str(), typed(1).as_str()), ("second\n", ""));
    world.is_empty_soon();
}

#[test]
fn ctrl_c_at_a_terminal_interrupts_a_program_that_waits_for_a_line() {
    let world = World::new();
    let script = "trap 'echo caught; exit 3' INT; echo ready; read x";
    let mut terminal = Terminal::start(&world, &["fleet", "launch", "-n", "1", "--", "sh", "-c", script]);
    terminal.until("ready");
    terminal.type_in("\x03");
    terminal.until("caught");
    assert_eq!(terminal.finish(), Some(130));
    world.is_empty_soon();
}

#[test]
fn who_asks_for_the_terminal_itself_is_told_that_there_is_none() {
    let world = World::new();
    let script = "(read x < /dev/tty) 2> /dev/null || echo nobody to ask";
    let terminal = Terminal::start(&world, &["fleet", "launch", "-n", "1", "--", "sh", "-c", script]);
    terminal.until("nobody to ask");
    assert_eq!(terminal.finish(), Some(0));
    world.is_empty_soon();
}

#[test]
fn a_launch_in_the_background_takes_nothing_that_is_typed() {
    let world = World::new();
    let launch = format!(
        "{} launch -n 1 -- sh -c 'cat; echo nothing to read'",
        fleet_tests::program("fleet").display()
    );
    let mut terminal =
        Terminal::start(&world, &["sh", "-c", &format!("set -m; {launch} & wait; read x; echo $x too")]);
    terminal.until("nothing to read");
    terminal.type_in("mine\n");
    terminal.until("mine too");
    assert_eq!(terminal.finish(), Some(0));
    world.is_empty_soon();
}

#[test]
fn the_signal_that_came_is_passed_on_to_every_rank() {
    for (signal, name, code) in
        [(Signal::SIGINT, "INT", 130), (Signal::SIGHUP, "HUP", 129), (Signal::SIGTERM, "TERM", 143)]
    {
        let world = World::new();
        // What it does with another signal would be told as well.
        let traps: String = ["INT", "HUP", "TERM"]
            .map(|other| format!("trap 'echo {other} > got-$RANK; exit 0' {other}; "))
            .concat();
        let script = format!("{traps} echo ready; while :; do sleep 1; done");
        let mut command = world.enter(std::process::Command::new("env"));
        // As from a terminal, also where the tests run under nohup.
        command.arg("--default-signal=HUP").arg(fleet_tests::program("fleet"));
        command.args(["launch", "-n", "2", "--json", "--", "sh", "-c", &script]);
        let mut launch = fleet_tests::Running::start(command);
        launch.until("ready", |line| line["line"] == "ready");
        launch.until("ready", |line| line["line"] == "ready");
        launch.signal(signal);
        let done = launch.finish().expect(code);
        assert_eq!(done.summary()["status"], "cancelled", "{}", done.all());
        for rank in 0..2 {
            let got = std::fs::read_to_string(world.path(&format!("got-{rank}"))).unwrap_or_default();
            assert_eq!(got.trim(), name, "rank {rank}: {}", done.all());
        }
        world.is_empty_soon();
    }
}

#[test]
fn a_program_that_minds_no_signal_is_ended_by_the_second_ctrl_c() {
    let world = World::new();
    let script = "trap '' INT TERM; echo ready; while :; do sleep 1; done";
    let mut launch = world.start("fleet", &["launch", "-n", "1", "--json", "--", "sh", "-c", script]);
    launch.until("ready", |line| line["line"] == "ready");
    launch.signal(Signal::SIGINT);
    launch.until_it_says("once more, after a second, stops at once");
    insist(launch);
    world.is_empty_soon();
}

#[test]
fn signals_that_come_together_leave_a_program_its_time() {
    let world = World::new();
    let save = "trap '' INT TERM; sleep 0.7; echo saved > saved; exit 0";
    let script = format!("trap \"{save}\" INT TERM; echo ready; while :; do sleep 0.1; done");
    let mut launch = world.start("fleet", &["launch", "-n", "1", "--json", "--", "sh", "-c", &script]);
    launch.until("ready", |line| line["line"] == "ready");
    launch.signal(Signal::SIGTERM);
    launch.signal(Signal::SIGINT);
    let done = launch.finish();
    assert!([130, 143].contains(&done.code()), "{}", done.all());
    assert!(world.path("saved").is_file(), "{}", done.all());
    world.is_empty_soon();
}

#[test]
fn a_schedulers_warning_reaches_every_rank_and_a_quit_is_an_end_in_order() {
    let world = World::new();
    let traps =
        "trap 'echo warned' USR1; trap 'echo again' USR2; trap 'echo ended > ended-$RANK; exit 0' TERM";
    let script = format!("{traps}; echo ready; while :; do sleep 0.1; done");
    let mut launch = world.start("fleet", &["launch", "-n", "2", "--json", "--", "sh", "-c", &script]);
    let both = |launch: &mut Running, word: &str| {
        let ranks = [(), ()].map(|()| launch.until(word, |line| line["line"] == word)["rank"].as_u64());
        assert!(ranks[0] != ranks[1], "{word}: {ranks:?}");
    };
    both(&mut launch, "ready");
    launch.signal(Signal::SIGUSR1);
    both(&mut launch, "warned");
    launch.signal(Signal::SIGUSR2);
    both(&mut launch, "again");
    launch.signal(Signal::SIGQUIT);
    launch.finish().expect(131);
    assert!((0..2).all(|rank| world.path(&format!("ended-{rank}")).is_file()));
    world.is_empty_soon();
}

#[test]
fn a_worker_is_not_ended_by_a_schedulers_warning() {
    let world = World::new();
    let cluster = world.coordinator(&world.path("cluster"), "127.0.0.1:0");
    let mut worker = world.worker(&cluster, 1);
    worker.signal(Signal::SIGUSR1);
    worker.until_it_says("a signal that a worker does not pass on");
    worker.must_live();
    worker.signal(Signal::SIGQUIT);
    worker.finish().expect(131);
}

#[test]
fn what_a_program_left_behind_ends_with_fleet() {
    let world = World::new();
    // The rank leaves a child in a session of its own.
    let script = "setsid sleep 600 & echo ready; sleep 600";
    let mut launch = world.start("fleet", &["launch", "-n", "1", "--json", "--", "sh", "-c", script]);
    launch.until("ready", |line| line["line"] == "ready");
    eventually("the stray child runs", || {
        world.processes().iter().any(|(_, line)| line.starts_with("sleep 600"))
    });
    launch.signal(Signal::SIGTERM);
    launch.finish().expect(143);
    world.is_empty_soon();
}
