//! The real `worker` program on this machine: real processes, real QUIC with real certificates. The test speaks the coordinator's side of
//! the protocol itself, so that it decides when messages are acknowledged and connections break.

#![allow(clippy::unwrap_used)] // helpers of tests

use fleet_common::codec::{read_frame, write_frame};
use fleet_common::events::{Event, EventBody, JobError, Outcome};
use fleet_common::exit::Fault;
use fleet_common::ids::{JobId, NodeId, ReplicaId};
use fleet_common::job;
use fleet_common::net::{self, Accepted, ClusterCa, Identity, Socket};
use fleet_common::protocol::{AgentHello, FromAgent, Gang, Member, Program, ToAgent, Variable, Work};
use quinn::{Connection, Endpoint, RecvStream, SendStream};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, SystemTime};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::process::{Child, Command};
use tokio::time::{sleep, timeout};

const JOB: JobId = JobId(1);
const YEAR: Duration = Duration::from_secs(365 * 24 * 3600);
/// Nothing here takes a second on an idle machine.
const LIMIT: Duration = Duration::from_secs(60);

/// A node whose identity was made beforehand, and the address at which its coordinator is.
struct Node {
    dir: TempDir,
    endpoint: Endpoint,
}

struct Link {
    connection: Connection,
    send: SendStream,
    receive: RecvStream,
    hello: AgentHello,
}

impl Node {
    fn new() -> Node {
        let dir = tempfile::tempdir().unwrap();
        let now = SystemTime::now();
        let ca = ClusterCa::create("cluster-test", now).unwrap();
        let coordinator = ca.issue(Member::Coordinator(ReplicaId(1)), "coordinator", now, YEAR).unwrap();
        let worker: Identity = ca.issue(Member::Worker(NodeId(1)), "box", now, YEAR).unwrap();
        worker.store(&dir.path().join("identity")).unwrap();
        let endpoint = net::serve("127.0.0.1:0".parse().unwrap(), Socket::Members, &coordinator).unwrap();
        Node { dir, endpoint }
    }

    fn worker(&self) -> Child {
        self.worker_from(Path::new(env!("CARGO_BIN_EXE_worker")))
    }

    fn worker_from(&self, program: &Path) -> Child {
        let addr = self.endpoint.local_addr().unwrap().to_string();
        let mut command = Command::new(program);
        command.args(["join", &addr, "--slots", "64", "--device", "cpu", "--data-dir"]).arg(self.dir.path());
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true).spawn().unwrap()
    }

    /// Waits for the agent and reads its greeting.
    async fn accept(&self) -> Link {
        let work = async {
            loop {
                // An attempt that its maker gave up comes to nothing; the next one counts.
                let incoming = self.endpoint.accept().await.unwrap();
                let Ok((connection, Accepted::Peer(peer))) =
                    net::accept(incoming, Socket::Members, [0; 32], async |_, _| Ok(())).await
                else {
                    continue;
                };
                assert_eq!(peer.member, Member::Worker(NodeId(1)));
                let Ok((send, mut receive)) = connection.accept_bi().await else { continue };
                if let Ok(Some(FromAgent::Hello(hello))) = read_frame(&mut receive).await {
                    return Link { connection, send, receive, hello };
                }
            }
        };
        timeout(LIMIT, work).await.expect("the agent connects")
    }

    /// Accepts the agent and welcomes it.
    async fn welcome(&self) -> Link {
        let mut link = self.accept().await;
        link.tell(ToAgent::Welcome { node: NodeId(1) }).await;
        link
    }
}

impl Link {
    async fn tell(&mut self, message: ToAgent) {
        write_frame(&mut self.send, &message).await.unwrap();
    }

    async fn start(&mut self, world_size: u32, work: Work) {
        self.tell(ToAgent::StartGang(Gang {
            job: JOB,
            generation: 1,
            world_size,
            first_rank: 0,
            ranks: world_size,
            nodes: 1,
            node_index: 0,
            meeting: None,
            max_time_ms: None,
            resume: None,
            work,
        }))
        .await;
    }

    /// The next batch: its first number and its events.
    async fn batch(&mut self) -> (u64, Vec<Event>) {
        let next = async {
            loop {
                match read_frame::<_, FromAgent>(&mut self.receive)
                    .await
                    .unwrap()
                    .expect("the stream goes on")
                {
                    FromAgent::Events(batch) => return (batch.first_seq, batch.events),
                    FromAgent::Heartbeat { .. } => {}
                    other => panic!("a second greeting, or {other:?}"),
                }
            }
        };
        timeout(LIMIT, next).await.expect("events come")
    }

    /// Acknowledges everything until the gang is finished. All events, in order.
    async fn until_finished(&mut self) -> (Vec<Event>, Outcome) {
        let mut all = Vec::new();
        loop {
            let (first, events) = self.batch().await;
            assert_eq!(first, all.len() as u64 + 1, "no gap and nothing twice");
            all.extend(events);
            self.commit(all.len() as u64).await;
            if let Some(EventBody::Finished(outcome)) = all.last().map(|event| event.body.clone()) {
                return (all, outcome);
            }
        }
    }

    /// Reads until a line that `rank` printed begins with `start`; what follows it in the line.
    async fn line(&mut self, start: &str) -> String {
        loop {
            let (_, events) = self.batch().await;
            if let Some(found) = logged(&events, None).iter().find_map(|line| line.strip_prefix(start)) {
                return found.trim().to_owned();
            }
        }
    }

    async fn commit(&mut self, seq: u64) {
        self.tell(ToAgent::EventsCommitted { job: JOB, generation: 1, seq }).await;
    }
}

/// What was logged, by one rank or by all.
fn logged(events: &[Event], rank: Option<u32>) -> Vec<String> {
    let lines = events.iter().filter_map(|event| match &event.body {
        EventBody::Log { rank: by, line, .. } if rank.is_none() || *by == rank => Some(line.clone()),
        _ => None,
    });
    lines.collect()
}

fn shell(script: &str) -> Work {
    let path = Variable::open("PATH", std::env::var("PATH").unwrap());
    let argv = ["sh", "-c", script].map(str::to_owned).to_vec();
    Work::Program(Program { argv, working_dir: "/tmp".into(), env: vec![path] })
}

fn failure(outcome: Outcome) -> JobError {
    match outcome {
        Outcome::Failed(error) => error,
        other => panic!("{other:?}"),
    }
}

/// Waits until there is no such process, or only what init has yet to reap.
async fn gone(pid: &str) {
    let state = || std::fs::read_to_string(format!("/proc/{pid}/stat")).ok();
    let dead = |stat: String| stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('Z'));
    let wait = async {
        while state().is_some_and(|stat| !dead(stat)) {
            sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(LIMIT, wait).await.unwrap_or_else(|_| panic!("process {pid} is still there"));
}

async fn ends(mut worker: Child) -> (Option<i32>, String) {
    let mut stderr = String::new();
    timeout(LIMIT, worker.stderr.take().unwrap().read_to_string(&mut stderr)).await.unwrap().unwrap();
    (timeout(LIMIT, worker.wait()).await.unwrap().unwrap().code(), stderr)
}

fn signal(worker: &Child, signal: nix::sys::signal::Signal) {
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(worker.id().unwrap() as i32), signal).unwrap();
}

#[tokio::test]
async fn a_program_runs_on_every_rank_and_its_output_arrives() {
    let node = Node::new();
    let mut worker = node.worker();
    let mut link = node.welcome().await;
    assert_eq!((link.hello.name.as_str(), link.hello.slots, link.hello.device.as_str()), ("box", 64, "cpu"));
    let first = BufReader::new(worker.stdout.take().unwrap()).lines().next_line().await.unwrap().unwrap();
    assert_eq!(first, format!("{{\"node\":\"node-1\",\"pid\":{}}}", worker.id().unwrap()));

    link.start(
        3,
        shell("echo $RANK of $WORLD_SIZE at $MASTER_ADDR:$MASTER_PORT in $PWD; echo oh >&2; printf end"),
    )
    .await;
    let (events, outcome) = link.until_finished().await;
    assert!(matches!(outcome, Outcome::Succeeded { .. }), "{outcome:?}");
    let mut ports = Vec::new();
    for rank in 0..3 {
        let lines = logged(&events, Some(rank));
        let greeting =
            lines.iter().find_map(|line| line.strip_prefix(&format!("{rank} of 3 at 127.0.0.1:"))).unwrap();
        ports.push(greeting.strip_suffix(" in /tmp").unwrap().parse::<u16>().unwrap());
        assert!(lines.contains(&"oh".to_owned()) && lines.contains(&"end".to_owned()), "{lines:?}");
        let file =
            std::fs::read_to_string(node.dir.path().join(format!("gangs/job-1.1/rank-{rank}.log"))).unwrap();
        assert_eq!(file.lines().count(), 3, "{file}");
    }
    assert!(ports.iter().all(|port| *port == ports[0]));
}

#[tokio::test]
async fn a_rank_killed_by_a_signal_is_named_with_its_last_lines_and_the_others_are_ended() {
    let node = Node::new();
    let _worker = node.worker();
    let mut link = node.welcome().await;
    link.start(3, shell("if [ $RANK = 1 ]; then echo last words; kill -SEGV $$; fi; sleep 1000")).await;
    let error = failure(link.until_finished().await.1);
    assert_eq!((error.rank, error.signal, error.exit_code), (Some(1), Some(11), None));
    assert_eq!(error.node.as_deref(), Some("box"));
    assert_eq!(error.last_lines, ["last words"]);
}

#[tokio::test]
async fn a_program_that_is_not_there_says_so() {
    let node = Node::new();
    let _worker = node.worker();
    let mut link = node.welcome().await;
    let argv = vec!["/nowhere/program".to_owned()];
    link.start(1, Work::Program(Program { argv, working_dir: "/".into(), env: vec![] })).await;
    let error = failure(link.until_finished().await.1);
    assert_eq!(error.exit_code, Some(127));
    assert!(error.message.contains("/nowhere/program"), "{}", error.message);
}

#[tokio::test]
async fn what_a_program_leaves_behind_ends_with_it_also_in_a_session_of_its_own() {
    let node = Node::new();
    let _worker = node.worker();
    let mut link = node.welcome().await;
    let script = "sleep 1000 & echo pid $!; echo pid $(setsid sh -c 'sleep 1000 >/dev/null 2>&1 & echo $!')";
    link.start(1, shell(script)).await;
    let (events, outcome) = link.until_finished().await;
    assert!(matches!(outcome, Outcome::Succeeded { .. }), "{outcome:?}");
    let pids: Vec<String> = logged(&events, None)
        .iter()
        .filter_map(|line| line.strip_prefix("pid "))
        .map(str::to_owned)
        .collect();
    assert_eq!(pids.len(), 2);
    for pid in pids {
        gone(&pid).await;
    }
}

#[tokio::test]
async fn every_rank_leads_a_session_of_its_own_and_has_no_terminal() {
    let node = Node::new();
    let _worker = node.worker();
    let mut link = node.welcome().await;
    let script =
        "read pid name state parent group session tty rest < /proc/self/stat; echo $pid $group $session $tty";
    link.start(2, shell(script)).await;
    let (events, outcome) = link.until_finished().await;
    assert!(matches!(outcome, Outcome::Succeeded { .. }), "{outcome:?}");
    for rank in 0..2 {
        let lines = logged(&events, Some(rank));
        let words: Vec<&str> = lines[0].split(' ').collect();
        assert_eq!(words, [words[0], words[0], words[0], "0"], "{lines:?}");
    }
}

#[tokio::test]
async fn ranks_die_with_an_agent_that_is_killed() {
    let node = Node::new();
    let mut worker = node.worker();
    let mut link = node.welcome().await;
    link.start(2, shell("echo pid $$; exec sleep 1000")).await;
    let pid = link.line("pid ").await;
    worker.kill().await.unwrap();
    gone(&pid).await;
}

#[tokio::test]
async fn a_broken_connection_costs_no_event() {
    let node = Node::new();
    let _worker = node.worker();
    let mut link = node.welcome().await;
    assert_eq!(link.hello.gangs, []);
    link.start(1, shell("echo one; sleep 0.1; echo two; sleep 0.1; echo three")).await;
    let (first, events) = link.batch().await;
    assert_eq!((first, logged(&events, None).first().map(String::as_str)), (1, Some("one")));
    link.connection.close(9u32.into(), b"test"); // unacknowledged
    let mut link = node.welcome().await;
    assert_eq!(link.hello.gangs, [(JOB, 1)]);
    let (events, outcome) = link.until_finished().await;
    assert_eq!(logged(&events, None), ["one", "two", "three"]);
    assert!(matches!(outcome, Outcome::Succeeded { .. }));
}

#[tokio::test]
async fn a_terminated_agent_lets_its_ranks_finish_what_they_do() {
    let node = Node::new();
    let worker = node.worker();
    let mut link = node.welcome().await;
    link.start(1, shell("trap 'echo saved; exit 0' TERM; echo ready; while :; do sleep 0.05; done")).await;
    link.line("ready").await;
    link.commit(1).await;
    signal(&worker, nix::sys::signal::Signal::SIGTERM);
    let (_, mut events) = link.batch().await;
    while !matches!(events.last().map(|event| &event.body), Some(EventBody::Finished(_))) {
        events.extend(link.batch().await.1);
    }
    assert!(logged(&events, None).contains(&"saved".to_owned()));
    assert!(matches!(events.last().unwrap().body, EventBody::Finished(Outcome::Stopped { .. })));
    link.commit(1 + events.len() as u64).await;
    assert_eq!(ends(worker).await.0, Some(143));
}

#[tokio::test]
async fn without_fleet_rank_a_training_job_fails_as_the_environments_fault() {
    let node = Node::new();
    let alone = tempfile::tempdir().unwrap();
    let program: PathBuf = alone.path().join("worker");
    std::fs::copy(env!("CARGO_BIN_EXE_worker"), &program).unwrap();
    let _worker = node.worker_from(&program);
    let mut link = node.welcome().await;
    let text: String = (0..5000).map(|n| format!("line {n} says {}\n", n * 7919)).collect();
    std::fs::write(node.dir.path().join("text.txt"), text).unwrap();
    let file = node.dir.path().join("job.toml");
    let text = "data.path = \"text.txt\"\nmax_seq_len = 16\n[model]\nvocab_size = 300\nhidden_size = 16\nnum_hidden_layers = 1\nnum_attention_heads = 2\nintermediate_size = 32\n";
    std::fs::write(&file, text).unwrap();
    let (job, _) = job::load(&file, &[], node.dir.path()).unwrap();
    link.start(1, Work::Train { job_json: job.to_json() }).await;
    let error = failure(link.until_finished().await.1);
    assert_eq!(error.fault, Fault::Environment, "{}", error.message);
    assert!(error.message.contains("fleet-rank"), "{}", error.message);
}

#[tokio::test]
async fn a_refused_node_leaves_with_the_reason() {
    let node = Node::new();
    let worker = node.worker();
    let mut link = node.accept().await;
    link.tell(ToAgent::Refused { message: "node-1 was removed".into(), fatal: true }).await;
    let (code, stderr) = ends(worker).await;
    assert_eq!(code, Some(2));
    assert!(stderr.contains("error: the coordinator refuses this node: node-1 was removed"), "{stderr}");
}

#[tokio::test]
async fn wrong_use_is_one_line_and_an_exit_code() {
    let join = |token: Option<&str>| {
        let dir = tempfile::tempdir().unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_worker"));
        // A port that nobody listens on: it was just free, and UDP on it is not taken by accident.
        let port = std::net::UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        command
            .args(["join", &format!("127.0.0.1:{port}"), "--data-dir"])
            .arg(dir.path())
            .env_remove("FLEET_TOKEN");
        command.args(token.into_iter().flat_map(|token| ["--token", token]));
        async move {
            let output = command.output().await.unwrap();
            drop(dir);
            (output.status.code(), String::from_utf8(output.stderr).unwrap())
        }
    };
    let (code, stderr) = join(None).await;
    assert_eq!(code, Some(2));
    assert!(stderr.contains("a token for a worker is needed"), "{stderr}");
    let (code, stderr) = join(Some("rubbish")).await;
    assert_eq!(code, Some(2));
    assert!(stderr.contains("--token"), "{stderr}");
    let token = format!("fleet_worker_{}_{}_{}", "a".repeat(16), "b".repeat(64), "c".repeat(64));
    let (code, stderr) = join(Some(&token)).await;
    assert_eq!(code, Some(3), "{stderr}");
    assert!(stderr.contains("127.0.0.1"), "{stderr}");
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
}
