//! Gangs over real connections on loopback: how they meet, what goes over them, and every way in which they can break.

#![allow(clippy::unwrap_used)] // helpers of tests, too

mod meeting;

use fleet_collectives::net::{Key, NetCollective, Rendezvous};
use fleet_collectives::{Abort, DType, Exchange, Gang, Op, Posted};
use meeting::{TIMEOUT, WIRES, Wire, each, ranks};
use rustix::net::sockopt::set_socket_recv_buffer_size;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::{Arc, Barrier, Mutex};
use std::time::Duration;

/// The ranks of a gang as threads.
fn gang<T: Send>(hosts: &[usize], wire: Wire, body: impl Fn(NetCollective) -> T + Sync) -> Vec<T> {
    each(ranks(hosts, wire), |before| body(before.connect(TIMEOUT).unwrap()))
}

#[test]
fn long_messages_both_ways_do_not_wait_for_each_other() {
    for wire in WIRES {
        // More than two kernels keep for a connection.
        let size = 48 << 20;
        gang(&[0, 1], wire, |mut gang| {
            let mut data = vec![gang.rank() as u8 + 1; size];
            gang.all_reduce(&mut data, DType::U8, Op::Sum).unwrap();
            assert!(data.iter().all(|byte| *byte == 3));
        });
    }
}

#[test]
fn what_is_posted_is_done_while_the_caller_does_something_else() {
    for wire in WIRES {
        gang(&[0, 1, 2], wire, |mut gang| {
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
}

#[test]
fn a_rank_that_ends_early_takes_nothing_along() {
    for wire in WIRES {
        for _ in 0..10 {
            gang(&[0, 1, 2, 3], wire, |mut gang| {
                let mut data = vec![1; 100_000];
                gang.broadcast(&mut data, 0).unwrap();
            });
        }
    }
}

#[test]
fn a_deadline_names_the_rank_that_did_not_come_also_to_those_who_wait_for_others() {
    for wire in WIRES {
        let (met, over) = (Barrier::new(5), Barrier::new(5));
        let errors = gang(&[0, 1, 2, 3, 4], wire, |mut gang| {
            gang.barrier().unwrap();
            met.wait();
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
}

#[test]
fn a_rank_that_comes_late_but_in_time_is_waited_for() {
    for wire in WIRES {
        gang(&[0, 1, 2], wire, |mut gang| {
            gang.set_deadline(Duration::from_secs(60));
            if gang.rank() == 1 {
                std::thread::sleep(Duration::from_millis(600));
            }
            let mut numbers = [gang.rank() as f64];
            gang.all_reduce_f64(&mut numbers, Op::Sum).unwrap();
            assert_eq!(numbers, [3.0]);
        });
    }
}

#[test]
fn calls_that_differ_are_told_by_all() {
    for wire in WIRES {
        let errors = gang(&[0, 1, 2], wire, |mut gang| {
            let mut data = vec![7; if gang.rank() == 1 { 16 } else { 8 }];
            gang.all_reduce(&mut data, DType::F32, Op::Sum).unwrap_err().to_string()
        });
        let want = "rank 1 called all_reduce #1 (f32 sum, 16 bytes) where rank 0 called all_reduce #1 (f32 sum, 8 bytes); \
                all ranks must make the same calls";
        assert_eq!(errors, [want, want, want]);
    }
}

#[test]
fn a_wrong_size_ends_the_gang_for_all() {
    for wire in WIRES {
        let errors = gang(&[0, 1], wire, |mut gang| {
            let mut data = vec![0; if gang.rank() == 1 { 7 } else { 8 }];
            gang.all_reduce(&mut data, DType::F32, Op::Sum).unwrap_err().to_string()
        });
        assert_eq!(errors[1], "all_reduce: 7 bytes are not whole f32 elements");
        assert_eq!(errors[0], "aborted: rank 1 failed in a collective; its log says why");
    }
}

#[test]
fn an_abort_ends_a_wait_and_is_told() {
    for wire in WIRES {
        let (met, over) = (Barrier::new(3), Barrier::new(3));
        let errors = gang(&[0, 1, 2], wire, |mut gang| {
            gang.barrier().unwrap();
            met.wait();
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
}

#[test]
fn strangers_are_refused_and_keep_nobody_out() {
    for wire in WIRES {
        let mut all = ranks(&[0, 1], wire);
        let address = all[0].told.ranks[0].address;
        // One says nothing, one says nonsense, one has a key of its own.
        let nonsense = b"GET / HTTP/1.1\r\n\r\n";
        let _open: Box<dyn std::any::Any> = match wire {
            Wire::Quic => {
                let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
                socket.send_to(nonsense, address).unwrap();
                Box::new(socket)
            }
            Wire::Tls | Wire::Plain => {
                let silent = TcpStream::connect(address).unwrap();
                let mut noisy = TcpStream::connect(address).unwrap();
                noisy.write_all(nonsense).unwrap();
                Box::new((silent, noisy))
            }
        };
        let mut stranger = ranks(&[0, 1], wire).remove(1);
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
    }
}

#[test]
fn the_one_that_is_missing_is_named_with_those_that_were_refused() {
    for wire in WIRES {
        let mut all = ranks(&[0, 1, 2], wire);
        let mut stranger = ranks(&[0, 1, 2], wire).remove(2);
        // The nearest is called first, and there it ends.
        stranger.told.ranks[1] = all[1].told.ranks[1].clone();
        stranger.told.generation = 6;
        let zero = all.remove(0);
        let one = all.remove(0);
        std::thread::scope(|scope| {
            let zero = scope.spawn(move || zero.connect(Duration::from_secs(3)).err().unwrap().to_string());
            let one = scope.spawn(move || one.connect(Duration::from_secs(3)).err().unwrap().to_string());
            assert!(stranger.connect(Duration::from_secs(2)).is_err());
            let text = one.join().unwrap();
            assert!(text.starts_with("rank 2 did not connect in time; refused 127.0.0.1:"), "{text}");
            assert!(text.contains(" that calls itself rank-2.generation-6: "), "{text}");
            assert_eq!(zero.join().unwrap(), "rank 2 did not connect in time");
        });
    }
}

#[test]
fn a_peer_with_another_key_or_another_generation_is_named() {
    for wire in WIRES {
        // The rendezvous has another key for rank 0 than it shows.
        let mut all = ranks(&[0, 1], wire);
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
        let errors = both(wire, |told| told.generation = 8);
        let want = ["rank 1 is of generation 8, this rank of 7", "rank 0 is of generation 7, this rank of 8"];
        assert_eq!(errors, want, "{wire:?}");
    }
}

/// What both ranks of a gang say of which one was told something else.
fn both(wire: Wire, change: fn(&mut Rendezvous)) -> Vec<String> {
    let mut all = ranks(&[0, 1], wire);
    change(&mut all[1].told);
    each(all, |before| before.connect(TIMEOUT).err().unwrap().to_string())
}

#[test]
fn all_encrypt_or_nobody_does() {
    let errors = both(Wire::Tls, |told| told.encryption = false);
    assert!(errors.iter().all(|error| error.contains("encrypt")), "{errors:?}");
    let mut alone = ranks(&[0], Wire::Quic).remove(0);
    alone.told.encryption = false;
    assert_eq!(
        alone.connect(TIMEOUT).err().unwrap().to_string(),
        "connect: QUIC always encrypts; without encryption ranks are connected by TCP"
    );
}

/// Listens in on what one connection to `target` carries. Returns where to call instead.
fn tap(wire: Wire, target: SocketAddr) -> (SocketAddr, Arc<Mutex<Vec<u8>>>) {
    let heard = Arc::new(Mutex::new(Vec::new()));
    let hear = heard.clone();
    let address = match wire {
        Wire::Quic => {
            let near = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
            let far = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
            far.connect(target).unwrap();
            let address = near.local_addr().unwrap();
            std::thread::spawn(move || {
                let mut packet = [0; 65_536];
                let (count, caller) = near.recv_from(&mut packet).unwrap();
                near.connect(caller).unwrap();
                far.send(&packet[..count]).unwrap();
                let (back_from, back_to) = (far.try_clone().unwrap(), near.try_clone().unwrap());
                std::thread::spawn(move || carry(&back_from, &back_to, &mut |_| {}));
                carry(&near, &far, &mut |packet| hear.lock().unwrap().extend_from_slice(packet));
            });
            address
        }
        Wire::Tls | Wire::Plain => {
            let relay = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
            let address = relay.local_addr().unwrap();
            std::thread::spawn(move || {
                let (mut near, _) = relay.accept().unwrap();
                let mut far = TcpStream::connect(target).unwrap();
                let (mut back_from, mut back_to) = (far.try_clone().unwrap(), near.try_clone().unwrap());
                std::thread::spawn(move || drop(std::io::copy(&mut back_from, &mut back_to)));
                let mut some = [0; 4096];
                while let Ok(count @ 1..) = near.read(&mut some) {
                    hear.lock().unwrap().extend_from_slice(&some[..count]);
                    far.write_all(&some[..count]).unwrap();
                }
                drop(far.shutdown(std::net::Shutdown::Write));
            });
            address
        }
    };
    (address, heard)
}

/// Carries a connection to `target`; what the caller sends goes at this many bytes in a second. Returns where to call instead.
fn narrow(target: SocketAddr, rate: usize) -> SocketAddr {
    let relay = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    // As much as a switch would hold.
    set_socket_recv_buffer_size(&relay, 128 << 10).unwrap();
    let address = relay.local_addr().unwrap();
    std::thread::spawn(move || {
        let (mut near, _) = relay.accept().unwrap();
        let mut far = TcpStream::connect(target).unwrap();
        let (mut back_from, mut back_to) = (far.try_clone().unwrap(), near.try_clone().unwrap());
        std::thread::spawn(move || drop(std::io::copy(&mut back_from, &mut back_to)));
        let mut some = vec![0; 32 << 10];
        while let Ok(count @ 1..) = near.read(&mut some) {
            std::thread::sleep(Duration::from_secs_f64(count as f64 / rate as f64));
            if far.write_all(&some[..count]).is_err() {
                return;
            }
        }
        drop(far.shutdown(std::net::Shutdown::Write));
    });
    address
}

#[test]
fn a_link_that_is_slower_than_the_others_is_named() {
    for wire in [Wire::Tls, Wire::Plain] {
        let mut all = ranks(&[0, 1, 2], wire);
        all[2].told.ranks[0].address = narrow(all[0].told.ranks[0].address, 8 << 20);
        let said = each(all, |before| {
            let mut gang = before.connect(TIMEOUT).unwrap();
            gang.all_reduce(&mut vec![0; 32 << 20], DType::F32, Op::Sum).unwrap();
            let slow = gang.slow_link().unwrap().map(|link| link.to_string());
            (slow, gang.slow_link().unwrap())
        });
        for (slow, later) in said {
            let slow = slow.expect("it is a hundred times slower");
            assert!(slow.starts_with("slow link: host 2 to host 0, "), "{slow}");
            assert_eq!(later, None, "nothing has gone over it since");
        }
    }
}

/// Packets, until one of the two is closed.
fn carry(from: &UdpSocket, to: &UdpSocket, hear: &mut dyn FnMut(&[u8])) {
    let mut packet = [0; 65_536];
    while let Ok(count) = from.recv(&mut packet) {
        hear(&packet[..count]);
        if to.send(&packet[..count]).is_err() {
            return;
        }
    }
}

#[test]
fn what_is_sent_is_encrypted_where_it_shall_be() {
    for wire in WIRES {
        // Rank 1 calls rank 0 through a relay that listens in.
        let mut all = ranks(&[0, 1], wire);
        let (address, heard) = tap(wire, all[0].told.ranks[0].address);
        all[1].told.ranks[0].address = address;
        each(all, |before| {
            let mut gang = before.connect(TIMEOUT).unwrap();
            let mut data = *b"nobody else should read this line";
            gang.broadcast(&mut data, 1).unwrap();
            gang.barrier().unwrap();
        });
        let heard = heard.lock().unwrap();
        assert!(heard.len() > 200, "{} bytes were heard", heard.len());
        let readable = heard.windows(19).any(|window| window == b"nobody else should ");
        assert_eq!(readable, !wire.encrypts());
    }
}
