//! A rank whose process ends in the middle of a call: all others leave it and name the one that died.

#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used)] // helpers of tests, too

mod meeting;

use fleet_collectives::net::{Key, PublicKey, RankAddress, Rendezvous};
use fleet_collectives::{Abort, CollectiveError, DType, Exchange, Op, Posted, Segment, ShmCollective};
use meeting::{GENERATION, TIMEOUT, Wire};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

const CALLS: [&str; 7] =
    ["all_reduce", "reduce_scatter", "all_gather", "broadcast", "all_to_all", "barrier", "posted"];
const WORLD: usize = 4;
const VICTIM: usize = 2;

/// Makes one call again and again.
fn again_and_again(gang: &mut dyn Exchange, call: &str) -> Result<(), CollectiveError> {
    let (world, part) = (gang.world_size(), 256 << 10);
    let (mut one, mut whole) = (vec![0; part], vec![0; part * world]);
    let input = whole.clone();
    let buffers = gang.allocate_per_rank(part * world)?;
    loop {
        match call {
            "all_reduce" => gang.all_reduce(&mut whole, DType::F32, Op::Sum)?,
            "reduce_scatter" => gang.reduce_scatter(&input, &mut one, DType::F32, Op::Sum)?,
            "all_gather" => gang.all_gather(&one, &mut whole)?,
            "broadcast" => gang.broadcast(&mut whole, 1)?,
            "all_to_all" => gang.all_to_all(&input, &mut whole)?,
            "barrier" => gang.barrier()?,
            "posted" => {
                let all = 0..buffers.len();
                let ticket = gang.post(&buffers, all, Posted::AllReduce(DType::F32, Op::Sum))?;
                gang.wait(ticket)?;
            }
            other => panic!("no call {other}"),
        }
    }
}

/// The ranks of a gang as processes: this test binary again, which tells where it listens and is told of the others.
struct Processes(Vec<Child>);

impl Processes {
    fn start(script: &str) -> Processes {
        let start = |rank: usize| {
            Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "child", "--ignored", "--nocapture"])
                .env("GANG", format!("{rank} {script}"))
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .unwrap()
        };
        Processes((0..WORLD).map(start).collect())
    }

    /// Introduces them to each other; returns what they say from then on.
    fn meet(&mut self) -> Vec<impl Iterator<Item = String> + use<>> {
        let mut said: Vec<_> = self.0.iter_mut().map(|child| lines(child.stdout.take().unwrap())).collect();
        let told: Vec<String> = said.iter_mut().map(|lines| lines.next().unwrap()).collect();
        for child in &mut self.0 {
            child.stdin.take().unwrap().write_all((told.join("\n") + "\n").as_bytes()).unwrap();
        }
        said
    }
}

/// Nothing is left behind where a test fails.
impl Drop for Processes {
    fn drop(&mut self) {
        for child in &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// What a rank says, without what the test harness does.
fn lines(from: impl Read) -> impl Iterator<Item = String> {
    let lines = BufReader::new(from).lines().map(Result::unwrap);
    lines.filter_map(|line| Some(line.split_once("> ")?.1.to_owned()))
}

#[test]
#[ignore = "a rank of the tests that start processes"]
fn child() {
    let gang = std::env::var("GANG").expect("started by `Processes`");
    let words: Vec<&str> = gang.split(' ').collect();
    let (rank, transport, call) = (words[0].parse().unwrap(), words[1], words[2]);
    let wire = match transport {
        "tls" => Wire::Tls,
        "plain" => Wire::Plain,
        "quic" => Wire::Quic,
        fd => {
            println!("> {rank}");
            let fd = fd.parse().unwrap();
            return until_the_end(&mut ShmCollective::attach(fd, rank, WORLD, GENERATION).unwrap(), call);
        }
    };
    let (listener, key) = (wire.listen(), Key::generate().unwrap());
    let hex: String = key.public().0.iter().map(|byte| format!("{byte:02x}")).collect();
    println!("> {} {hex}", listener.address().unwrap());
    let ranks = std::io::stdin().lines().take(WORLD).enumerate().map(|(host, line)| {
        let line = line.unwrap();
        let (address, hex) = line.split_once(' ').unwrap();
        let byte = |at: usize| u8::from_str_radix(&hex[at..at + 2], 16).unwrap();
        let key = PublicKey((0..hex.len()).step_by(2).map(byte).collect());
        RankAddress { host, address: address.parse().unwrap(), key }
    });
    let ranks = ranks.collect();
    let told = Rendezvous { generation: GENERATION, rank, ranks, encryption: wire.encrypts() };
    until_the_end(&mut listener.connect(&told, &key, TIMEOUT).unwrap(), call);
}

fn until_the_end(gang: &mut dyn Exchange, call: &str) {
    gang.barrier().unwrap();
    println!("> ready");
    if call == "leave" {
        return println!("> done");
    }
    let error = again_and_again(gang, call).unwrap_err();
    println!("> {error}; then {}", gang.barrier().unwrap_err());
}

/// Kills one in the middle of `call`. `mourn` is what its agent would do.
fn kill_one(transport: &str, call: &str, mourn: impl Fn()) {
    let mut ranks = Processes::start(&format!("{transport} {call}"));
    let mut said = ranks.meet();
    for lines in &mut said {
        assert_eq!(lines.next().unwrap(), "ready");
    }
    ranks.0[VICTIM].kill().unwrap();
    ranks.0[VICTIM].wait().unwrap();
    mourn();
    let since = Instant::now();
    for rank in (0..WORLD).filter(|rank| *rank != VICTIM) {
        let error = said[rank].next().unwrap();
        let want = format!("aborted: rank {VICTIM} died; then aborted: rank {VICTIM} died");
        assert_eq!(error, want, "rank {rank}, {call} over {transport}");
    }
    assert!(since.elapsed().as_secs() < 50, "the deadline is 60 s");
}

#[test]
fn over_tcp_the_dead_one_is_named_by_all_others_at_once() {
    for transport in ["tls", "plain"] {
        for call in CALLS {
            kill_one(transport, call, || {});
        }
    }
}

/// Nobody is told of the end of a process: it is missed, in all calls at the same time.
#[test]
fn over_quic_the_dead_one_is_missed_and_named_by_all_others() {
    std::thread::scope(|scope| {
        for call in CALLS {
            scope.spawn(|| kill_one("quic", call, || {}));
        }
    });
}

#[test]
fn in_shared_memory_the_dead_one_is_named_when_its_agent_says_so() {
    for call in CALLS {
        let segment = Segment::create(WORLD, GENERATION).unwrap();
        let fd: OwnedFd = segment.inheritable().unwrap();
        kill_one(&fd.as_raw_fd().to_string(), call, || segment.abort(Abort::RankDied(VICTIM)));
    }
}

#[test]
fn processes_come_together_and_leave() {
    for transport in ["tls", "plain", "quic"] {
        let mut ranks = Processes::start(&format!("{transport} leave"));
        for (lines, child) in ranks.meet().into_iter().zip(&mut ranks.0) {
            assert_eq!(lines.collect::<Vec<_>>(), ["ready", "done"]);
            assert!(child.wait().unwrap().success());
        }
    }
}
