//! Hosts with networks of their own on one machine: a namespace each, joined by a router that can cut, lose and slow what it forwards.
//!
//! Needs `ip` (iproute2), `nft` and `tc`, and the right to make network namespaces. Where that is missing a test says so and is skipped.

use std::io::Write as _;
use std::net::{SocketAddr, UdpSocket};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Namespaces go when this is dropped, and with them the one interface that this machine gets to reach them.
pub struct Network {
    /// `10.SUBNET.HOST.2` are the hosts.
    subnet: u32,
    outside: String,
    router: String,
    hosts: Vec<String>,
}

fn sh(program: &str, args: &[&str]) -> Result<(), String> {
    let output = Command::new(program).args(args).output();
    let output = output.map_err(|error| format!("{program}: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("{program} {}: {}", args.join(" "), String::from_utf8_lossy(&output.stderr).trim()))
}

/// A line for whoever runs the tests: what `eprintln` prints is kept back where a test passes.
fn say(line: &str) {
    // Nobody is there to read it.
    let _ = std::io::stderr().lock().write_all(format!("{line}\n").as_bytes());
}

impl Network {
    /// This many hosts. `None`, with the reason printed, where namespaces are not allowed.
    pub fn new(hosts: usize) -> Option<Network> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let base = format!("ft{}x{count}", std::process::id());
        let network = Network {
            subnet: 64 + (std::process::id() * 16 + count) % 128,
            outside: format!("{base}o"),
            router: format!("{base}r"),
            hosts: (0..hosts).map(|n| format!("{base}h{n}")).collect(),
        };
        match network.build() {
            Ok(()) => Some(network),
            Err(why) => {
                say(&format!("skipped: networks of its own cannot be made here ({why})"));
                None
            }
        }
    }

    fn build(&self) -> Result<(), String> {
        let router = self.router.as_str();
        sh("ip", &["netns", "add", router])?;
        for (n, host) in self.hosts.iter().enumerate() {
            let (port, gateway) = (format!("r{n}"), format!("10.{}.{n}.1", self.subnet));
            sh("ip", &["netns", "add", host])?;
            sh(
                "ip",
                &["link", "add", &port, "netns", router, "type", "veth", "peer", "name", "e0", "netns", host],
            )?;
            sh("ip", &["-n", router, "addr", "add", &format!("{gateway}/24"), "dev", &port])?;
            sh("ip", &["-n", router, "link", "set", &port, "up"])?;
            sh("ip", &["-n", host, "addr", "add", &format!("{}/24", self.address(n)), "dev", "e0"])?;
            sh("ip", &["-n", host, "link", "set", "e0", "up"])?;
            sh("ip", &["-n", host, "link", "set", "lo", "up"])?;
            sh("ip", &["-n", host, "route", "add", "default", "via", &gateway])?;
        }
        let net = |tail: &str| format!("10.{}.{tail}", self.subnet);
        let outside = self.outside.as_str();
        sh("ip", &["link", "add", outside, "type", "veth", "peer", "name", "out", "netns", router])?;
        sh("ip", &["addr", "add", &net("255.2/24"), "dev", outside])?;
        sh("ip", &["link", "set", outside, "up"])?;
        sh("ip", &["-n", router, "addr", "add", &net("255.1/24"), "dev", "out"])?;
        sh("ip", &["-n", router, "link", "set", "out", "up"])?;
        sh("ip", &["route", "add", &net("0.0/16"), "via", &net("255.1")])?;
        self.in_router(&["sysctl", "-qw", "net.ipv4.ip_forward=1"])?;
        // What slows a link must be there before a test is half through.
        self.in_router(&["tc", "qdisc", "show"])?;
        self.in_router(&["nft", "add table inet fleet"])?;
        self.in_router(&[
            "nft",
            "add chain inet fleet cuts { type filter hook forward priority 0; policy accept; }",
        ])
    }

    fn in_router(&self, command: &[&str]) -> Result<(), String> {
        sh("ip", &[&["netns", "exec", &self.router], command].concat())
    }

    fn rule(&self, rule: &str) {
        let added = self.in_router(&["nft", &format!("add rule inet fleet cuts {rule}")]);
        added.expect("the router took its table, so it takes a rule");
    }

    pub fn address(&self, host: usize) -> String {
        format!("10.{}.{host}.2", self.subnet)
    }

    /// The same command, run on a host.
    pub fn on(&self, host: usize, command: &Command) -> Command {
        let mut inside = Command::new("ip");
        inside.args(["netns", "exec", &self.hosts[host]]).arg(command.get_program()).args(command.get_args());
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => inside.env(name, value),
                None => inside.env_remove(name),
            };
        }
        if let Some(dir) = command.get_current_dir() {
            inside.current_dir(dir);
        }
        inside
    }

    /// Drops what goes from one host to another, that way only. The machine itself still reaches both.
    pub fn cut(&self, from: usize, to: usize) {
        self.rule(&format!("iifname \"r{from}\" oifname \"r{to}\" drop"));
    }

    /// Cuts a host off from all other hosts, both ways.
    pub fn isolate(&self, host: usize) {
        for other in (0..self.hosts.len()).filter(|other| *other != host) {
            self.cut(host, other);
            self.cut(other, host);
        }
    }

    /// Drops this share of all packets.
    pub fn lose(&self, percent: u32) {
        self.rule(&format!("numgen random mod 100 < {percent} drop"));
    }

    /// Ends cuts and losses.
    pub fn heal(&self) {
        self.in_router(&["nft", "flush chain inet fleet cuts"]).expect("the chain is there");
    }

    /// Limits what goes to a host.
    pub fn slow(&self, host: usize, rate: &str) {
        let port = format!("r{host}");
        let shaped = self.in_router(&[
            "tc", "qdisc", "add", "dev", &port, "root", "tbf", "rate", rate, "burst", "16kb", "latency",
            "200ms",
        ]);
        shaped.expect("the router shapes its own port");
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for name in self.hosts.iter().chain([&self.router]) {
            let _ = sh("ip", &["netns", "del", name]); // one that was never made
        }
    }
}

/// Forwards datagrams to one address and back, each after a delay: the kernel of many machines cannot.
pub struct Relay {
    pub address: SocketAddr,
    cut: Arc<AtomicBool>,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Relay {
    /// In this process, on loopback.
    pub fn start(target: SocketAddr, delay: Duration) -> std::io::Result<Relay> {
        let outside = UdpSocket::bind("127.0.0.1:0")?;
        let address = outside.local_addr()?;
        outside.set_read_timeout(Some(Duration::from_millis(20)))?;
        let (cut, stop) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let lost = cut.clone();
        let (ended, outside) = (stop.clone(), Arc::new(outside));
        let thread = std::thread::spawn(move || {
            let mut peers = std::collections::BTreeMap::new();
            let mut buffer = [0; 65_536];
            while !ended.load(Ordering::Relaxed) {
                let Ok((length, from)) = outside.recv_from(&mut buffer) else { continue };
                let peer = peers.entry(from).or_insert_with(|| {
                    let inside = Arc::new(UdpSocket::bind("127.0.0.1:0").expect("loopback has ports"));
                    inside.set_read_timeout(Some(Duration::from_millis(20))).expect("a timeout is not zero");
                    let (reader, writer, over) = (inside.clone(), outside.clone(), ended.clone());
                    let back =
                        Line::start(delay, lost.clone(), move |bytes| drop(writer.send_to(bytes, from)));
                    std::thread::spawn(move || {
                        let mut buffer = [0; 65_536];
                        while !over.load(Ordering::Relaxed) {
                            if let Ok(length) = reader.recv(&mut buffer) {
                                back.carry(&buffer[..length]);
                            }
                        }
                    });
                    Line::start(delay, lost.clone(), move |bytes| drop(inside.send_to(bytes, target)))
                });
                peer.carry(&buffer[..length]);
            }
        });
        Ok(Relay { address, cut, stop, threads: vec![thread] })
    }

    /// While it is cut all is lost that would come out, also what is on its way.
    pub fn cut(&self, cut: bool) {
        self.cut.store(cut, Ordering::Relaxed);
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// One direction: what goes in comes out after the delay, in order.
struct Line {
    queue: std::sync::mpsc::SyncSender<(Instant, Vec<u8>)>,
    delay: Duration,
}

impl Line {
    fn start(delay: Duration, cut: Arc<AtomicBool>, deliver: impl Fn(&[u8]) + Send + 'static) -> Line {
        let (queue, waiting) = std::sync::mpsc::sync_channel::<(Instant, Vec<u8>)>(4_096);
        std::thread::spawn(move || {
            while let Ok((due, bytes)) = waiting.recv() {
                std::thread::sleep(due.saturating_duration_since(Instant::now()));
                if !cut.load(Ordering::Relaxed) {
                    deliver(&bytes);
                }
            }
        });
        Line { queue, delay }
    }

    /// A full line loses what comes, as a router does.
    fn carry(&self, bytes: &[u8]) {
        let _ = self.queue.try_send((Instant::now() + self.delay, bytes.to_vec()));
    }
}
