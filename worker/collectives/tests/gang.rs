//! Gangs of threads and of real processes against a plain reference, and every way in which a gang can break.

#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used)] // helpers of tests, too

mod calls;

use calls::{inputs, reduced};
use fleet_collectives::{
    Abort, Activity, CollectiveError, DType, Doing, Exchange, Gang, Keep, Op, Segment, SharedHost,
    ShmCollective, part,
};
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// The ranks of a gang as threads, each with a mapping of its own.
fn threads<T: Send>(world: usize, body: impl Fn(ShmCollective) -> T + Sync) -> Vec<T> {
    let segment = Segment::create(world, 1).unwrap();
    in_segment(&segment, world, body)
}

fn in_segment<T: Send>(segment: &Segment, world: usize, body: impl Fn(ShmCollective) -> T + Sync) -> Vec<T> {
    std::thread::scope(|scope| {
        let ranks: Vec<_> = (0..world)
            .map(|rank| {
                let gang = attach(segment, rank, world);
                scope.spawn(|| body(gang))
            })
            .collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

fn attach(segment: &Segment, rank: usize, world: usize) -> ShmCollective {
    ShmCollective::attach(segment.fd().as_raw_fd(), rank, world, 1).unwrap()
}

/// The ranks of a gang as processes: this test binary again, running `child`.
fn processes(segment: &Segment, world: usize, script: &str) -> Vec<Child> {
    let fd: OwnedFd = segment.inheritable().unwrap();
    (0..world)
        .map(|rank| {
            Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "child", "--ignored", "--nocapture"])
                .env("GANG", format!("{} {rank} {world} {script}", fd.as_raw_fd()))
                .stdout(Stdio::null())
                .stderr(Stdio::piped())
                .spawn()
                .unwrap()
        })
        .collect()
}

#[test]
#[ignore = "a rank of the tests that start processes"]
fn child() {
    let gang = std::env::var("GANG").expect("started by `processes`");
    let mut words = gang.split(' ');
    let mut number = || words.next().unwrap().parse::<usize>().unwrap();
    let mut gang = ShmCollective::attach(number() as i32, number(), number(), 1).unwrap();
    match words.next().unwrap() {
        "everything" => {
            for (index, call) in calls::all().into_iter().enumerate() {
                call.check(&mut gang, index as u64);
            }
            check_every_post_reduce(&mut gang);
        }
        "training" => train(gang, 5),
        "wait" => loop {
            if let Err(error) = gang.barrier() {
                panic!("{error}");
            }
            if gang.rank() == 1 {
                // Rank 1 never comes again; its death is the only way out for the others.
                loop {
                    std::thread::park();
                }
            }
        },
        "meet" => {
            gang.set_deadline(Duration::from_secs(2));
            loop {
                gang.barrier().unwrap();
                if gang.rank() == 1 {
                    std::thread::sleep(Duration::from_millis(100));
                }
            }
        }
        other => panic!("no script {other}"),
    }
}

/// `post_reduce` in both of its forms, two at once in one buffer.
fn check_post_reduce(gang: &mut ShmCollective, dtype: DType, op: Op, keep: Keep, size: usize) {
    let (rank, world) = (gang.rank(), gang.world_size());
    let (gap, length) = (24, size * dtype.size());
    let buffer = gang.allocate_per_rank(3 * gap + 2 * length).unwrap();
    let starts = [gap, 2 * gap + length];
    for (i, start) in starts.into_iter().enumerate() {
        buffer.write(start, &inputs(dtype, i as u64, rank, 0..size));
        gang.post_reduce(&buffer, start..start + length, dtype, op, keep).unwrap();
    }
    gang.finish().unwrap();
    for (i, start) in starts.into_iter().enumerate() {
        let mut got = vec![0; length];
        buffer.read(start, &mut got);
        let mut want = inputs(dtype, i as u64, rank, 0..size);
        let range = match keep {
            Keep::MyPart | Keep::MyPartOfHost | Keep::MyShard => part(size, rank, world),
            Keep::Everything => 0..size,
        };
        let sum = reduced(dtype, op, i as u64, world, range.clone());
        want[range.start * dtype.size()..range.end * dtype.size()].copy_from_slice(&sum);
        assert_eq!(got, want, "{dtype} {op:?} {keep:?} of {size}");
    }
    gang.barrier().unwrap();
}

fn check_every_post_reduce(gang: &mut ShmCollective) {
    for dtype in DType::ALL {
        for op in [Op::Sum, Op::Max] {
            for keep in [Keep::MyPart, Keep::MyPartOfHost, Keep::MyShard, Keep::Everything] {
                for size in [0, 1, 259, 10_001] {
                    check_post_reduce(gang, dtype, op, keep, size);
                }
            }
        }
    }
}

#[test]
fn processes_agree_with_the_reference_also_with_more_ranks_than_cores() {
    for world in 1..=8 {
        let segment = Segment::create(world, 1).unwrap();
        for (rank, child) in processes(&segment, world, "everything").into_iter().enumerate() {
            let output = child.wait_with_output().unwrap();
            let error = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "rank {rank} of {world}: {error}");
        }
    }
}

/// Data-parallel steps as `SharedHost` describes them, on numbers whose result is known in closed form.
fn train(mut gang: ShmCollective, steps: usize) {
    let (rank, world) = (gang.rank(), gang.world_size());
    let blocks = [0..1000usize, 1024..1025, 1088..5000];
    let grads = gang.allocate_per_rank(5000 * 4).unwrap();
    let weights = gang.allocate_common(5000 * 4).unwrap();
    let get = |read: &dyn Fn(usize, &mut [u8]), i: usize| {
        let mut four = [0; 4];
        read(i * 4, &mut four);
        f32::from_ne_bytes(four)
    };
    for step in 0..steps {
        for block in blocks.iter().rev() {
            gang.note(Activity::Backward);
            for i in block.clone() {
                grads.write(i * 4, &((rank + 1) as f32 * (i % 7) as f32).to_ne_bytes());
            }
            let bytes = block.start * 4..block.end * 4;
            gang.post_reduce(&grads, bytes, DType::F32, Op::Sum, Keep::MyPart).unwrap();
        }
        gang.finish().unwrap();
        let owned = || {
            blocks.iter().flat_map(|block| {
                let mine = part(block.len(), rank, world);
                block.start + mine.start..block.start + mine.end
            })
        };
        let mut squares = [owned().map(|i| f64::from(get(&|o, b| grads.read(o, b), i)).powi(2)).sum()];
        gang.all_reduce_f64(&mut squares, Op::Sum).unwrap();
        let ranks = (world * (world + 1) / 2) as f64;
        let want: f64 = blocks.iter().cloned().flatten().map(|i| ((i % 7) as f64 * ranks).powi(2)).sum();
        assert_eq!(squares[0], want);
        gang.note(Activity::Optimizer);
        for i in owned() {
            let old = get(&|o, b| weights.read(o, b), i);
            let new = old + get(&|o, b| grads.read(o, b), i);
            weights.write(i * 4, &new.to_ne_bytes());
        }
        gang.barrier().unwrap();
        for i in blocks.iter().cloned().flatten() {
            let want = (step + 1) as f32 * ranks as f32 * (i % 7) as f32;
            assert_eq!(get(&|o, b| weights.read(o, b), i), want, "weight {i} after step {step}");
        }
    }
}

#[test]
fn the_data_parallel_step_needs_two_waits_and_gives_every_rank_the_same_weights() {
    for world in [1, 2, 3, 4] {
        threads(world, |gang| train(gang, 3));
    }
    let segment = Segment::create(4, 1).unwrap();
    for child in processes(&segment, 4, "training") {
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
}

#[test]
fn more_posts_than_marks_wait_for_the_slowest_rank() {
    threads(3, |mut gang| {
        let (rank, posts) = (gang.rank(), 300);
        let buffer = gang.allocate_per_rank(posts * 8).unwrap();
        for i in 0..posts {
            buffer.write(i * 8, &((rank * 1000 + i) as u64).to_ne_bytes());
            let keep = if i % 3 == 0 { Keep::MyPart } else { Keep::Everything };
            gang.post_reduce(&buffer, i * 8..i * 8 + 8, DType::U64, Op::Sum, keep).unwrap();
        }
        gang.finish().unwrap();
        for i in 0..posts {
            let mut eight = [0; 8];
            buffer.read(i * 8, &mut eight);
            if i % 3 != 0 || rank == 0 {
                assert_eq!(u64::from_ne_bytes(eight), (3000 + 3 * i) as u64, "post {i}");
            }
        }
        gang.barrier().unwrap();
    });
}

/// Waits until `rank` waits in a call.
fn until_inside(segment: &Segment, rank: usize) {
    while !matches!(segment.report()[rank].doing, Doing::Inside { .. }) {
        std::thread::yield_now();
    }
}

#[test]
fn an_abort_ends_a_wait_and_stays() {
    let segment = Segment::create(2, 1).unwrap();
    std::thread::scope(|scope| {
        let mut gang = attach(&segment, 0, 2);
        let waiter = scope.spawn(move || {
            let first = gang.barrier().unwrap_err().to_string();
            (first, gang.all_reduce_f64(&mut [1.0], Op::Sum).unwrap_err().to_string())
        });
        until_inside(&segment, 0);
        segment.abort(Abort::RankDied(1));
        segment.abort(Abort::Stopped);
        let (first, second) = waiter.join().unwrap();
        assert_eq!(first, "aborted: rank 1 died");
        assert_eq!(second, first);
    });
    let late = attach(&segment, 1, 2).barrier().unwrap_err();
    assert_eq!(late.to_string(), "aborted: rank 1 died");
}

#[test]
fn a_handle_aborts_from_another_thread() {
    let segment = Segment::create(2, 1).unwrap();
    let mut gang = attach(&segment, 0, 2);
    let handle = gang.abort_handle();
    std::thread::scope(|scope| {
        let waiter = scope.spawn(move || gang.all_gather(&[1], &mut [0, 0]).unwrap_err());
        until_inside(&segment, 0);
        handle.abort(Abort::Stopped);
        assert_eq!(waiter.join().unwrap().to_string(), "aborted: the job was stopped");
    });
}

#[test]
fn a_killed_process_does_not_hang_the_others() {
    let segment = Segment::create(3, 1).unwrap();
    let mut ranks = processes(&segment, 3, "wait");
    // In the second barrier, which rank 1 never enters.
    let waits = |rank: usize| {
        let report = &segment.report()[rank];
        matches!(&report.doing, Doing::Inside { operation, .. } if operation == "barrier #2")
    };
    while !(waits(0) && waits(2)) {
        std::thread::yield_now();
    }
    let calls: Vec<u64> = segment.report().iter().map(|report| report.calls).collect();
    assert_eq!(calls, [2, 1, 2]);
    ranks[1].kill().unwrap();
    ranks[1].wait().unwrap();
    segment.abort(Abort::RankDied(1));
    for rank in [ranks.remove(0), ranks.remove(1)] {
        let output = rank.wait_with_output().unwrap();
        assert!(!output.status.success());
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(error.contains("aborted: rank 1 died"), "{error}");
    }
}

#[test]
fn a_deadline_names_the_late_rank_and_what_it_does() {
    let segment = Segment::create(3, 1).unwrap();
    let mut late = attach(&segment, 1, 3);
    late.note(Activity::LoadingData);
    let errors = std::thread::scope(|scope| {
        let ranks: Vec<_> = [0, 2]
            .map(|rank| {
                let mut gang = attach(&segment, rank, 3);
                gang.set_deadline(Duration::from_millis(if rank == 0 { 30 } else { 60_000 }));
                scope.spawn(move || gang.all_reduce(&mut [0; 8], DType::F32, Op::Sum).unwrap_err())
            })
            .into_iter()
            .collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect::<Vec<CollectiveError>>()
    });
    let text = errors[0].to_string();
    assert!(
        text.starts_with("rank 1 did not enter all_reduce #1 within 0.03 s; it is loading data since "),
        "{text}"
    );
    assert_eq!(errors[0].culprit(), Some(1));
    assert_eq!(errors[1].to_string(), "aborted: rank 1 did not come to a collective in time");
    let latched = late.barrier().unwrap_err();
    assert!(latched.to_string().starts_with("aborted: "), "{latched}");
    assert_eq!([errors[1].culprit(), latched.culprit()], [Some(1), Some(1)]);
}

#[test]
fn who_stood_still_itself_has_not_waited() {
    let segment = Segment::create(2, 1).unwrap();
    let mut ranks = processes(&segment, 2, "meet");
    let signal = |rank: &Child, signal: &str| {
        let sent = Command::new("kill").args([signal, &rank.id().to_string()]).status();
        assert!(sent.unwrap().success());
    };
    let calls = || segment.report().iter().map(|report| report.calls).min().unwrap();
    while calls() < 3 {
        std::thread::yield_now();
    }
    signal(&ranks[1], "-STOP");
    until_inside(&segment, 0);
    signal(&ranks[0], "-STOP");
    let before = calls();
    // Longer than the deadline; and the one that waits goes on first.
    std::thread::sleep(Duration::from_secs(3));
    signal(&ranks[0], "-CONT");
    std::thread::sleep(Duration::from_millis(300));
    signal(&ranks[1], "-CONT");
    while calls() < before + 3 {
        assert!(ranks.iter_mut().all(|rank| rank.try_wait().unwrap().is_none()), "a deadline was missed");
        std::thread::yield_now();
    }
    for rank in &mut ranks {
        rank.kill().unwrap();
        rank.wait().unwrap();
    }
}

#[test]
fn a_posted_reduction_that_a_peer_never_posts_ends_at_the_deadline() {
    let segment = Segment::create(2, 1).unwrap();
    let errors = in_segment(&segment, 2, |mut gang| {
        let buffer = gang.allocate_per_rank(64).unwrap();
        if gang.rank() == 1 {
            return None;
        }
        gang.set_deadline(Duration::from_millis(30));
        gang.post_reduce(&buffer, 0..64, DType::F32, Op::Sum, Keep::MyPart).unwrap();
        gang.progress().unwrap();
        Some(gang.finish().unwrap_err().to_string())
    });
    let text = errors[0].clone().unwrap();
    assert!(text.starts_with("rank 1 did not enter reduce #2 within 0.03 s"), "{text}");
}

#[test]
fn a_rank_that_differs_is_named_by_all() {
    let errors = threads(3, |mut gang| {
        let mut data = vec![7; if gang.rank() == 1 { 16 } else { 8 }];
        let error = gang.all_reduce(&mut data, DType::F32, Op::Sum).unwrap_err().to_string();
        assert!(data.iter().all(|byte| *byte == 7), "no result was written");
        error
    });
    let want = "rank 1 called all_reduce #1 (f32 sum, 16 bytes) where rank 0 called all_reduce #1 (f32 sum, 8 bytes); \
                all ranks must make the same calls";
    assert_eq!(errors, [want, want, want]);

    let errors = threads(3, |mut gang| match gang.rank() {
        2 => gang.barrier().unwrap_err().to_string(),
        _ => gang.broadcast(&mut [1], 0).unwrap_err().to_string(),
    });
    assert!(
        errors
            .iter()
            .all(|e| e.starts_with("rank 2 called barrier #1 (0 bytes) where rank 0 called broadcast #1 "))
    );

    let errors = threads(2, |mut gang| {
        let buffer = gang.allocate_per_rank(128).unwrap();
        let start = gang.rank() * 64;
        gang.post_reduce(&buffer, start..start + 64, DType::F32, Op::Sum, Keep::MyPart)
            .and_then(|_| gang.finish())
            .is_err()
    });
    assert_eq!(errors, [true, true], "another place in the buffer");
}

#[test]
fn wrong_sizes_are_refused_before_anything_moves() {
    let errors = threads(1, |mut gang| {
        let first = gang.all_reduce(&mut [0; 7], DType::F32, Op::Sum).unwrap_err().to_string();
        (first, gang.barrier().unwrap_err().to_string())
    });
    assert_eq!(errors[0].0, "all_reduce: 7 bytes are not whole f32 elements");
    assert_eq!(errors[0].1, errors[0].0);
}

#[test]
fn a_segment_is_joined_only_by_its_own_gang() {
    let segment = Segment::create(2, 5).unwrap();
    let fd = segment.fd().as_raw_fd();
    let text = |rank, world, generation| {
        ShmCollective::attach(fd, rank, world, generation).err().unwrap().to_string()
    };
    assert_eq!(text(0, 2, 4), "the shared segment belongs to generation 5 of the gang, this rank to 4");
    assert!(text(0, 3, 5).contains("is no segment for 3 ranks"));
    assert!(text(2, 2, 5).contains("rank 2 of 2"));
    let file = tempfile::tempfile().unwrap();
    let error = ShmCollective::attach(file.as_raw_fd(), 0, 2, 5).err().unwrap().to_string();
    assert!(error.contains("is no segment"), "{error}");
    assert!(ShmCollective::attach(-1, 0, 2, 5).is_err());
    assert!(Segment::create(0, 1).is_err());
    assert_eq!(segment.report()[0].doing, Doing::NotAttached);
    assert!(ShmCollective::attach(fd, 1, 2, 5).is_ok());
}
