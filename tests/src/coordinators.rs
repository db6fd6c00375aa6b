//! Several coordinators of one cluster as real processes, which a test may kill, stop and start again.

use crate::{Client, Network, Relay, Running, Standing, World, eventually};
use fleet_common::protocol::{CoordinatorView, Reply, Request, Role};
use nix::sys::signal::Signal;
use serde_json::Value;
use std::net::UdpSocket;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

/// Coordinators `0..n`. With a network each is on the host of its number.
pub struct Coordinators<'a> {
    world: &'a World,
    network: Option<&'a Network>,
    members: Vec<Option<Standing>>,
    /// Where each listened first, so that it comes back there: client, member, HTTP.
    listen: Vec<[String; 3]>,
    /// Through which the others reach each one, where it is far away.
    relays: Vec<Relay>,
}

impl<'a> Coordinators<'a> {
    /// On loopback; returns when all are voters.
    pub fn start(world: &'a World, count: usize) -> Coordinators<'a> {
        let any = || "127.0.0.1:0".to_owned();
        let listen = (0..count).map(|_| [any(), any(), any()]).collect();
        Coordinators::begin(world, None, listen, Vec::new())
    }

    /// On loopback, with this long a way from one to the other.
    pub fn far_apart(world: &'a World, count: usize, way: Duration) -> Coordinators<'a> {
        let any = || "127.0.0.1:0".to_owned();
        let (mut listen, mut relays) = (Vec::new(), Vec::new());
        for _ in 0..count {
            let free = UdpSocket::bind("127.0.0.1:0").expect("loopback has ports");
            let member = free.local_addr().expect("it is bound");
            relays.push(Relay::start(member, way).expect("loopback has ports"));
            listen.push([any(), member.to_string(), any()]);
        }
        Coordinators::begin(world, None, listen, relays)
    }

    /// One on each of the first hosts.
    pub fn on(world: &'a World, network: &'a Network, count: usize) -> Coordinators<'a> {
        let at = |host: usize, port: u16| format!("{}:{port}", network.address(host));
        let listen = (0..count).map(|n| [at(n, 7070), at(n, 7071), "127.0.0.1:7080".to_owned()]).collect();
        Coordinators::begin(world, Some(network), listen, Vec::new())
    }

    fn begin(
        world: &'a World,
        network: Option<&'a Network>,
        listen: Vec<[String; 3]>,
        relays: Vec<Relay>,
    ) -> Coordinators<'a> {
        let mut all = Coordinators { world, network, members: Vec::new(), listen, relays };
        for n in 0..all.listen.len() {
            all.members.push(None);
            if n == 0 {
                all.start_again(0);
            } else {
                all.join(n);
            }
        }
        all
    }

    pub fn data_dir(&self, n: usize) -> PathBuf {
        self.world.path(&format!("coordinator-{n}"))
    }

    fn command(&self, n: usize, verb: &[&str]) -> Command {
        let mut command = self.world.command("coordinator");
        command.args(verb).arg("--data-dir").arg(self.data_dir(n));
        for (flag, address) in ["--listen", "--member-listen", "--http"].iter().zip(&self.listen[n]) {
            command.args([flag, address.as_str()]);
        }
        if let Some(relay) = self.relays.get(n) {
            command.args(["--member-advertise", &relay.address.to_string()]);
        }
        self.placed(n, command)
    }

    /// On the host of this number, if there is a network.
    pub fn placed(&self, host: usize, command: Command) -> Command {
        match self.network {
            Some(network) => network.on(host, &command),
            None => command,
        }
    }

    fn join(&mut self, n: usize) {
        let create = Request::CreateToken { role: Role::Coordinator, ttl_s: 600, uses: 1 };
        let Reply::Token { text } = self.client(0).change(create).expect("a token is made") else {
            panic!("no token")
        };
        let mut command = self.command(n, &["join", &self.listen[0][0].clone()]);
        command.env("FLEET_TOKEN", text);
        self.stand(n, Running::start(command));
        eventually("the new coordinator votes", || {
            let views = self.client(0).coordinators();
            views.is_ok_and(|views| views.iter().filter(|view| view.voter).count() > n)
        });
    }

    fn stand(&mut self, n: usize, process: Running) {
        let standing = self.world.standing(process, &self.data_dir(n));
        let endpoint = &standing.endpoint;
        self.listen[n] = match self.relays.is_empty() {
            true => [endpoint.quic.clone(), endpoint.member.clone(), endpoint.http.clone()],
            // What it calls its member address is the relay's.
            false => [endpoint.quic.clone(), self.listen[n][1].clone(), endpoint.http.clone()],
        };
        self.members[n] = Some(standing);
    }

    pub fn start_again(&mut self, n: usize) {
        let process = Running::start(self.command(n, &["start"]));
        self.stand(n, process);
    }

    /// Starts one that may have to stop at once.
    pub fn try_again(&self, n: usize) -> Running {
        Running::start(self.command(n, &["start"]))
    }

    pub fn kill(&mut self, n: usize) {
        // Dropping kills with SIGKILL.
        self.members[n] = None;
    }

    pub fn is_up(&self, n: usize) -> bool {
        self.members[n].is_some()
    }

    pub fn signal(&self, n: usize, signal: Signal) {
        if let Some(member) = &self.members[n] {
            member.process.signal(signal);
        }
    }

    pub fn count(&self) -> usize {
        self.members.len()
    }

    /// Addresses for clients of all of them.
    pub fn addresses(&self) -> Vec<String> {
        self.listen.iter().map(|[client, ..]| client.clone()).collect()
    }

    /// Addresses for HTTP of all of them.
    pub fn pages(&self) -> Vec<String> {
        self.listen.iter().map(|[.., http]| http.clone()).collect()
    }

    /// Talks to one of them only.
    pub fn client(&self, n: usize) -> Client {
        Client::new(&self.data_dir(0).join("client"), vec![self.listen[n][0].clone()])
    }

    /// Talks to whoever answers.
    pub fn any_client(&self) -> Client {
        Client::new(&self.data_dir(0).join("client"), self.addresses())
    }

    /// Where it serves HTTP.
    pub fn http(&self, n: usize) -> &str {
        &self.listen[n][2]
    }

    /// What it wrote to stderr since its last start.
    pub fn complaints(&self, n: usize) -> String {
        self.members[n].as_ref().map(|member| member.process.complaints()).unwrap_or_default()
    }

    /// What it says at `/metrics`.
    pub fn metrics(&self, n: usize) -> std::io::Result<String> {
        crate::http::get(&self.listen[n][2], "/metrics")
    }

    /// What it says at `/healthz`.
    pub fn health(&self, n: usize) -> std::io::Result<String> {
        crate::http::get(&self.listen[n][2], "/healthz")
    }

    /// Which of them leads, as most of those that run say.
    pub fn leader(&self) -> Option<usize> {
        let up: Vec<usize> = (0..self.count()).filter(|n| self.is_up(*n)).collect();
        let said = up.iter().filter_map(|n| {
            let leads = |views: Vec<CoordinatorView>| {
                views.into_iter().find(|view| view.leads).map(|view| view.address.client)
            };
            self.client(*n).coordinators().ok().and_then(leads)
        });
        let leader = said.into_iter().next()?;
        self.listen.iter().position(|[client, ..]| *client == leader)
    }

    /// The answer of `fleet COMMAND --json`, asked of whoever answers.
    pub fn ask(&self, args: &[&str]) -> Value {
        let cluster = self.data_dir(0).display().to_string();
        // What lies behind `--` is a program's.
        let (own, program) = args.split_at(args.iter().position(|arg| *arg == "--").unwrap_or(args.len()));
        let done =
            self.world.run("fleet", &[own, &["--json", "--cluster", &cluster], program].concat()).expect(0);
        serde_json::from_str(&done.stdout.concat()).unwrap_or_else(|error| panic!("{error}: {}", done.all()))
    }

    /// A worker that knows all of them, once it is registered.
    pub fn worker(&self, host: usize, slots: u32) -> Running {
        self.registered(self.placed(host, self.join_worker(host, slots)))
    }

    /// The same with more options.
    pub fn worker_with(&self, host: usize, slots: u32, more: &[&str]) -> Running {
        let mut command = self.join_worker(host, slots);
        command.args(more);
        self.registered(self.placed(host, command))
    }

    /// The same on a network, with a disk of its own: what is written to `out` lies in `disk-HOST`, and no other worker sees it.
    pub fn worker_with_disk(&self, host: usize, slots: u32) -> Running {
        let (out, disk) = (self.world.path("out"), self.world.path(&format!("disk-{host}")));
        for dir in [&out, &disk] {
            std::fs::create_dir_all(dir).expect("the world is writable");
        }
        let joins = self.join_worker(host, slots);
        // A host has mounts of its own.
        let mut command = self.world.enter(Command::new("sh"));
        command.args(["-c", "mount --bind \"$0\" \"$1\" && shift && exec \"$@\""]).args([&disk, &out]);
        command.arg(joins.get_program()).args(joins.get_args());
        self.registered(self.placed(host, command))
    }

    fn join_worker(&self, host: usize, slots: u32) -> Command {
        let mut command = self.world.command("worker");
        command.args(["join", &self.addresses().join(","), "--device", "cpu"]);
        command.args(["--slots", &slots.to_string(), "--name", &format!("box-{host}")]);
        command.arg("--token-file").arg(self.data_dir(0).join("tokens/worker.token"));
        command.arg("--data-dir").arg(self.world.path(&format!("node-{host}")));
        command
    }

    fn registered(&self, command: Command) -> Running {
        let mut worker = Running::start(command);
        worker.until("registration", |line| line["node"].is_string());
        worker
    }
}
