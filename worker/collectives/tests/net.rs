//! Gangs over real connections on loopback, against the plain definition of each call, and every way in which they can break.

#![allow(clippy::unwrap_used)] // helpers of tests, too

mod calls;
mod meeting;

use fleet_collectives::net::{Key, Listener, NetCollective, PublicKey, RankAddress, Rendezvous};
use fleet_collectives::{Abort, DType, Exchange, Gang, Op, Posted};
use meeting::{GENERATION, TIMEOUT, each, ranks};
use proptest::prelude::*;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::Barrier;
use std::time::{Duration, Instant};

/// The ranks of a gang as threads.
fn gang<T: Send>(hosts: &[usize], encryption: bool, body: impl Fn(NetCollective) -> T + Sync) -> Vec<T> {
    each(ranks(hosts, encryption), |before| body(before.connect(TIMEOUT).unwrap()))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, ..ProptestConfig::default() })]
    #[test]
    fn any_order_of_calls_agrees_with_the_definition(
        hosts in prop::collection::vec(0usize..3, 1..=8),
        encryption: bool,
        calls in prop::collection::vec(calls::any(), 1..10),
    ) {
        gang(&hosts, encryption, |mut gang| {
            for (index, call) in calls.iter().enumerate() {
                call.check(&mut gang, index as u64);
            }
        });
    }
}

#[test]
fn every_call_in_every_type_agrees_with_the_definition() {
    for (hosts, encryption) in
        [(&[0][..], true), (&[0, 1], true), (&[0, 0, 1], false), (&[0, 1, 1, 0, 2], true)]
    {
        gang(hosts, encryption, |mut gang| {
            for (index, call) in calls::all().into_iter().enumerate() {
                call.check(&mut gang, index as u64);
            }
        });
    }
}

#[test]
fn long_messages_both_ways_do_not_wait_for_each_other() {
    // More than two kernels keep for a connection.
    let size = 48 << 20;
    gang(&[0, 1], false, |mut gang| {
        let mut data = vec![gang.rank() as u8 + 1; size];
        gang.all_reduce(&mut data, DType::U8, Op::Sum).unwrap();
        assert!(data.iter().all(|byte| *byte == 3));
    });
}

#[test]
fn what_is_posted_is_done_while_the_caller_does_something_else() {
    gang(&[0, 1, 2], true, |mut gang| {
        let buffer = gang.allocate_per_rank(1 << 20).unwrap();
        let mut tickets = Vec::new();
        for at in 0..300 {
            buffer.write(at * 64, &(at as u64 + gang.rank() as u64).to_ne_bytes());
            let range = at * 64..at * 64 + 8;
            tickets.push(gang.post(&buffer, range, Posted::AllReduce(DType::U64, Op::Sum)).unwrap());
        }
        for (at, ticket) in tickets.into_iter().enumerate() {
            gang.wait(ticket).unwrap();
            let mut eight = [0; 8];
            buffer.read(at * 64, &mut eight);
            assert_eq!(u64::from_ne_bytes(eight), 3 * at as u64 + 3);
        }
        gang.barrier().unwrap();
    });
}

#[test]
fn a_rank_that_ends_early_takes_nothing_along() {
    for _ in 0..20 {
        gang(&[0, 1, 2, 3], true, |mut gang| {
            let mut data = vec![1; 100_000];
            gang.broadcast(&mut data, 0).unwrap();
        });
    }
}

/// The ranks of a gang as processes: this test binary again, which tells where it listens and is told of the others.
struct Processes(Vec<Child>);

impl Processes {
    fn start(world: usize, script: &str) -> Processes {
        let start = |rank: usize| {
            Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "child", "--ignored", "--nocapture"])
                .env("GANG", format!("{rank} {world} {script}"))
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .unwrap()
        };
        Processes((0..world).map(start).collect())
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
    let gang = std::env::var("GANG").expect("started by `processes`");
    let words: Vec<&str> = gang.split(' ').collect();
    let (rank, world) = (words[0].parse().unwrap(), words[1].parse().unwrap());
    let listener = Listener::bind((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
    let key = Key::generate().unwrap();
    let hex: String = key.public().0.iter().map(|byte| format!("{byte:02x}")).collect();
    println!("> {} {hex}", listener.address().unwrap());
    let told = std::io::stdin().lines().take(world).enumerate().map(|(host, line)| {
        let line = line.unwrap();
        let (address, hex) = line.split_once(' ').unwrap();
        let byte = |at: usize| u8::from_str_radix(&hex[at..at + 2], 16).unwrap();
        let key = PublicKey((0..hex.len()).step_by(2).map(byte).collect());
        RankAddress { host, address: address.parse().unwrap(), key }
    });
    let told =
        Rendezvous { generation: GENERATION, rank, ranks: told.collect(), encryption: words[2] == "tls" };
    let mut gang = listener.tcp(&told, &key, TIMEOUT).unwrap();
    gang.barrier().unwrap();
    println!("> ready");
    if rank == 2 && words[3] == "die" {
        loop {
            std::thread::park();
        }
    }
    let mut data = vec![0; 32 << 20];
    match gang.all_reduce(&mut data, DType::F32, Op::Sum) {
        Ok(()) => println!("> done"),
        Err(error) => println!("> {error}; then {}", gang.barrier().unwrap_err()),
    }
}

#[test]
fn a_killed_process_is_named_by_all_others_at_once() {
    for security in ["tls", "plain"] {
        let mut ranks = Processes::start(4, &format!("{security} die"));
        let mut said = ranks.meet();
        for lines in &mut said {
            assert_eq!(lines.next().unwrap(), "ready");
        }
        ranks.0[2].kill().unwrap();
        let since = Instant::now();
        for rank in [0, 1, 3] {
            let error = said[rank].next().unwrap();
            assert_eq!(error, "aborted: rank 2 died; then aborted: rank 2 died", "rank {rank}");
        }
        assert!(since.elapsed() < Duration::from_secs(30), "the deadline is 60 s");
    }
}

#[test]
fn processes_come_together_and_leave() {
    let mut ranks = Processes::start(3, "tls work");
    for (lines, child) in ranks.meet().into_iter().zip(&mut ranks.0) {
        assert_eq!(lines.collect::<Vec<_>>(), ["ready", "done"]);
        assert!(child.wait().unwrap().success());
    }
}

#[test]
fn a_deadline_names_the_rank_that_did_not_come_also_to_those_who_wait_for_others() {
    let over = Barrier::new(5);
    let errors = gang(&[0, 1, 2, 3, 4], true, |mut gang| {
        gang.barrier().unwrap();
        let late = gang.rank() == 3;
        gang.set_deadline(Duration::from_millis(if gang.rank() == 0 { 400 } else { 60_000 }));
        if late {
            over.wait();
        }
        let error = gang.all_reduce(&mut vec![0; 4 << 20], DType::F32, Op::Sum).unwrap_err();
        if !late {
            over.wait();
        }
        error
    });
    let text = errors[0].to_string();
    assert!(
        text.starts_with("rank 3 did not enter all_reduce #2 within 0.4 s; nothing came from it for "),
        "{text}"
    );
    for error in &errors[1..] {
        assert_eq!(error.to_string(), "aborted: rank 3 did not come to a collective in time");
    }
}

#[test]
fn a_rank_that_comes_late_but_in_time_is_waited_for() {
    gang(&[0, 1, 2], true, |mut gang| {
        gang.set_deadline(Duration::from_secs(60));
        if gang.rank() == 1 {
            std::thread::sleep(Duration::from_millis(600));
        }
        let mut numbers = [gang.rank() as f64];
        gang.all_reduce_f64(&mut numbers, Op::Sum).unwrap();
        assert_eq!(numbers, [3.0]);
    });
}

#[test]
fn calls_that_differ_are_told_by_all() {
    let errors = gang(&[0, 1, 2], true, |mut gang| {
        let mut data = vec![7; if gang.rank() == 1 { 16 } else { 8 }];
        gang.all_reduce(&mut data, DType::F32, Op::Sum).unwrap_err().to_string()
    });
    let want = "rank 1 called all_reduce #1 (f32 sum, 16 bytes) where rank 0 called all_reduce #1 (f32 sum, 8 bytes); \
                all ranks must make the same calls";
    assert_eq!(errors, [want, want, want]);
}

#[test]
fn a_wrong_size_ends_the_gang_for_all() {
    let errors = gang(&[0, 1], true, |mut gang| {
        let mut data = vec![0; if gang.rank() == 1 { 7 } else { 8 }];
        gang.all_reduce(&mut data, DType::F32, Op::Sum).unwrap_err().to_string()
    });
    assert_eq!(errors[1], "all_reduce: 7 bytes are not whole f32 elements");
    assert_eq!(errors[0], "aborted: rank 1 failed in a collective; its log says why");
}

#[test]
fn an_abort_ends_a_wait_and_is_told() {
    let over = Barrier::new(3);
    let errors = gang(&[0, 1, 2], true, |mut gang| {
        gang.barrier().unwrap();
        let (rank, handle) = (gang.rank(), gang.abort_handle());
        // Who comes late may still find all that the others have sent.
        let mut gather = move || {
            let gathered = gang.all_gather(&[1], &mut [0, 0, 0]);
            gathered.and_then(|()| gang.barrier()).unwrap_err().to_string()
        };
        let error = std::thread::scope(|scope| match rank {
            // Comes when it is over.
            2 => None,
            _ => {
                let waiting = scope.spawn(&mut gather);
                if rank == 0 {
                    handle.abort(Abort::Stopped);
                    handle.abort(Abort::RankDied(1));
                }
                Some(waiting.join().unwrap())
            }
        });
        over.wait();
        error.unwrap_or_else(gather)
    });
    assert_eq!(errors, ["aborted: the job was stopped"; 3]);
}

#[test]
fn strangers_are_refused_and_keep_nobody_out() {
    for encryption in [true, false] {
        let mut all = ranks(&[0, 1], encryption);
        let address = all[0].told.ranks[0].address;
        // One says nothing, one says nonsense, one has a key of its own.
        let silent = TcpStream::connect(address).unwrap();
        let mut nonsense = TcpStream::connect(address).unwrap();
        nonsense.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
        let mut stranger = ranks(&[0, 1], encryption).remove(1);
        stranger.told.ranks[0] = all[0].told.ranks[0].clone();
        let one = all.remove(1);
        let errors = std::thread::scope(|scope| {
            let zero = all.remove(0);
            let zero = scope.spawn(move || {
                let mut gang = zero.connect(TIMEOUT).unwrap();
                gang.barrier().unwrap();
            });
            let error = stranger.connect(TIMEOUT).err().unwrap();
            let one = scope.spawn(move || one.connect(TIMEOUT).unwrap().barrier().unwrap());
            one.join().unwrap();
            zero.join().unwrap();
            error
        });
        let text = errors.to_string();
        assert!(text.starts_with(&format!("rank 0 at {address} does not know this rank's key")), "{text}");
        drop((silent, nonsense));
    }
}

#[test]
fn the_one_that_is_missing_is_named_with_those_that_were_refused() {
    let mut all = ranks(&[0, 1, 2], true);
    let mut stranger = ranks(&[0, 1, 2], true).remove(2);
    stranger.told.ranks[0] = all[0].told.ranks[0].clone();
    stranger.told.generation = 6;
    let zero = all.remove(0);
    let one = all.remove(0);
    std::thread::scope(|scope| {
        let zero = scope.spawn(move || zero.connect(Duration::from_secs(3)).err().unwrap().to_string());
        let one = scope.spawn(move || one.connect(Duration::from_secs(3)).err().unwrap().to_string());
        assert!(stranger.connect(Duration::from_secs(2)).is_err());
        let text = zero.join().unwrap();
        assert!(text.starts_with("rank 2 did not connect in time; refused 127.0.0.1:"), "{text}");
        assert!(text.contains(" that calls itself rank-2.generation-6: "), "{text}");
        assert_eq!(one.join().unwrap(), "rank 2 did not connect in time");
    });
}

#[test]
fn a_peer_with_another_key_another_generation_or_without_encryption_is_named() {
    // The rendezvous has another key for rank 0 than it shows.
    let mut all = ranks(&[0, 1], true);
    all[1].told.ranks[0].key = Key::generate().unwrap().public().clone();
    let address = all[0].told.ranks[0].address;
    let one = all.remove(1);
    let zero = all.remove(0);
    std::thread::scope(|scope| {
        let zero = scope.spawn(move || zero.connect(Duration::from_secs(2)).err().unwrap().to_string());
        let text = one.connect(TIMEOUT).err().unwrap().to_string();
        assert_eq!(text, format!("rank 0 at {address} shows another key than the rendezvous has for it"));
        assert!(zero.join().unwrap().starts_with("rank 1 did not connect in time"));
    });
    let both = |change: fn(&mut Rendezvous)| -> Vec<String> {
        let mut all = ranks(&[0, 1], true);
        change(&mut all[1].told);
        each(all, |before| before.connect(TIMEOUT).err().unwrap().to_string())
    };
    assert_eq!(
        both(|told| told.generation = 8),
        ["rank 1 is of generation 8, this rank of 7", "rank 0 is of generation 7, this rank of 8"]
    );
    let errors = both(|told| told.encryption = false);
    assert!(errors.iter().all(|error| error.contains("encrypt")), "{errors:?}");
}

#[test]
fn what_is_sent_is_encrypted_where_it_shall_be() {
    // Rank 1 calls rank 0 through a relay that listens in.
    for encryption in [true, false] {
        let mut all = ranks(&[0, 1], encryption);
        let relay = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let target = all[0].told.ranks[0].address;
        all[1].told.ranks[0].address = relay.local_addr().unwrap();
        let heard = std::thread::spawn(move || {
            let (mut near, _) = relay.accept().unwrap();
            let mut far = TcpStream::connect(target).unwrap();
            let (mut back_from, mut back_to) = (far.try_clone().unwrap(), near.try_clone().unwrap());
            let back = std::thread::spawn(move || drop(std::io::copy(&mut back_from, &mut back_to)));
            let mut heard = Vec::new();
            let mut some = [0; 4096];
            while let Ok(count @ 1..) = near.read(&mut some) {
                heard.extend_from_slice(&some[..count]);
                far.write_all(&some[..count]).unwrap();
            }
            drop(far.shutdown(std::net::Shutdown::Write));
            back.join().unwrap();
            heard
        });
        each(all, |before| {
            let mut gang = before.connect(TIMEOUT).unwrap();
            let mut data = *b"nobody else should read this line";
            gang.broadcast(&mut data, 1).unwrap();
        });
        let heard = heard.join().unwrap();
        let readable = heard.windows(19).any(|window| window == b"nobody else should ");
        assert_eq!(readable, !encryption);
    }
}
