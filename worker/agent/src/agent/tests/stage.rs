//! Acts scripts with an agent.

use super::super::*;
use crate::gang::Prepared;
use crate::verdict::{Exit, agent_error};
use fleet_common::events::{
    CheckpointRecord, DataStats, Endpoint, Event, EventBody, FailureKind, JobError, Level, Outcome, Shard,
    Step,
};
use fleet_common::ids::JobId;
use fleet_common::job::*;
use fleet_common::protocol::{Files, FromRank, Holder, Peer, Program, ResumePoint, Value, Variable, Work};

pub const GANG: GangId = GangId { job: JobId(1), generation: 1 };

pub fn config() -> Config {
    Config {
        name: "box".into(),
        slots: 4,
        accelerator: Accelerator::Cpu,
        no_cuda: None,
        cores: 8,
        program_version: "0".into(),
        labels: BTreeMap::new(),
        host: "box".into(),
        checkpoint_port: 700,
        process: 1,
        lines: Rates::USUAL,
    }
}

fn checkpoint(step: u64) -> CheckpointRecord {
    let shard = Shard { writer: 0, name: "model".into(), bytes: 1, sha256: "ab".repeat(32) };
    CheckpointRecord {
        step,
        path: "/c".into(),
        manifest_sha256: "cd".repeat(32),
        bytes: 1,
        loss: 1.0,
        writers: 1,
        disks: vec![0],
        shards: vec![shard],
    }
}

pub fn job() -> Job {
    let text = r#"
        run_name = "r"
        output_dir = "/out"
        model.path = "/model"
        data.path = "/data"
    "#;
    parse_toml(text, "/".as_ref()).unwrap().0
}

pub fn gang(work: &str, world_size: u32, generation: u64) -> Gang {
    let work = match work {
        "train" => Work::Train { job_json: job().to_json() },
        other => {
            let key = Variable { name: "KEY".into(), value: Value::Removed };
            let env = if other == "secretless" { vec![key] } else { vec![] };
            Work::Program(Program { argv: vec!["true".into()], working_dir: "/".into(), env })
        }
    };
    Gang {
        job: JobId(1),
        generation,
        world_size,
        first_rank: 0,
        ranks: world_size,
        nodes: 1,
        node_index: 0,
        meeting: None,
        max_time_ms: None,
        resume: None,
        work,
    }
}

/// What one node, which is out of touch, has at `path`.
fn point(path: &str) -> ResumePoint {
    let (node, name, files) = (NodeId(7), "other".to_owned(), Files::All);
    let holder = Holder { node, name, address: None, key: [0; 32], files };
    ResumePoint { step: 5, path: path.into(), manifest_sha256: "cd".repeat(32), holders: vec![holder] }
}

pub struct Stage {
    pub agent: Agent,
    pub now: Now,
    pub seen: Vec<String>,
    /// A sweep takes until the script says that it is done; otherwise it is not mentioned.
    pub sweeps_last: bool,
}

pub fn input(words: &[&str], now: Now) -> Input {
    let number = |text: &str| text.parse::<u64>().unwrap();
    let rank = |text: &str| text.parse::<Rank>().unwrap();
    let event = |body| FromRank::Event(Event { unix_ms: 0, body });
    let of_gang = |input| Input::Gang(GANG, input);
    let (job, generation) = (GANG.job, GANG.generation);
    match words {
        ["connected"] => Input::Connected,
        ["disconnected"] => Input::Disconnected,
        ["welcome"] => Input::Message(ToAgent::Welcome { node: NodeId(1) }),
        ["refused", why @ ..] => Input::Message(ToAgent::Refused { message: why.join(" "), fatal: true }),
        ["start", work, ranks] => Input::Message(ToAgent::StartGang(gang(work, rank(ranks), 1))),
        ["start", work, ranks, "generation", n] => {
            Input::Message(ToAgent::StartGang(gang(work, rank(ranks), number(n))))
        }
        ["start", work, ranks, "for", ms] => {
            let gang = Gang { max_time_ms: Some(number(ms)), ..gang(work, rank(ranks), 1) };
            Input::Message(ToAgent::StartGang(gang))
        }
        ["start", work, ranks, "from", first] => {
            let (ranks, first_rank) = (rank(ranks), rank(first));
            let (world_size, node_index) = (first_rank + ranks, 1);
            let gang = Gang { first_rank, ranks, node_index, nodes: 2, ..gang(work, world_size, 1) };
            Input::Message(ToAgent::StartGang(gang))
        }
        ["start", work, ranks, "resumes", path] => {
            let gang = Gang { resume: Some(point(path)), ..gang(work, rank(ranks), 1) };
            Input::Message(ToAgent::StartGang(gang))
        }
        ["lend", to @ ..] => {
            let loan = |to: &&str| Loan {
                to: NodeId(number(to)),
                key: [1; 32],
                path: "/c".into(),
                manifest_sha256: "cd".repeat(32),
            };
            Input::Message(ToAgent::Lend(to.iter().map(loan).collect()))
        }
        ["superseded", steps @ ..] => {
            let one = |step: &&str| Superseded {
                path: format!("/c/step-{step}"),
                manifest_sha256: "cd".repeat(32),
            };
            Input::Message(ToAgent::Superseded(steps.iter().map(one).collect()))
        }
        ["lost", why @ ..] => {
            of_gang(GangInput::CheckpointLost { manifest_sha256: "cd".repeat(32), why: why.join(" ") })
        }
        ["committed", seq] => Input::Message(ToAgent::EventsCommitted { job, generation, seq: number(seq) }),
        ["resend", "from", seq] => {
            Input::Message(ToAgent::ResendEvents { job, generation, next_seq: number(seq) })
        }
        ["peers", count] => {
            let peer = |n: u16| Peer { host: 0, address: "box".into(), port: 500 + n, key: vec![1; 44] };
            let peers = (0..number(count) as u16).map(peer).collect();
            Input::Message(ToAgent::MeetPeers { job, generation, peers })
        }
        ["cancel"] => Input::Message(ToAgent::StopGang { job, generation, now: false }),
        ["cancel", "now"] => Input::Message(ToAgent::StopGang { job, generation, now: true }),
        ["signal"] => Input::Stop,
        ["interrupt"] => Input::PassOn(Blow::Interrupt),
        ["warning"] => Input::PassOn(Blow::User1),
        ["swept"] => of_gang(GangInput::Swept { left: 0 }),
        ["swept", "but", left] => of_gang(GangInput::Swept { left: number(left) as usize }),
        ["listens", ports @ ..] => {
            let endpoint = |port: &&str| Endpoint { port: number(port) as u16, key: vec![1; 44] };
            of_gang(GangInput::Listening(ports.iter().map(endpoint).collect()))
        }
        ["probe", "fails", why @ ..] => Input::Probed(Err(why.join(" "))),
        ["prepared"] => {
            let (stats, run) = (DataStats::default(), "c/job-1".to_owned());
            let prepared = Prepared { cache_dir: "/cache".into(), stats, resume: None, run };
            of_gang(GangInput::Prepared(Ok(prepared)))
        }
        ["data", "bad", why @ ..] => of_gang(GangInput::Prepared(Err(agent_error(
            FailureKind::Refused,
            Fault::Input,
            "box",
            why.join(" "),
        )))),
        ["no", "process", n] => {
            of_gang(GangInput::SpawnFailed { rank: rank(n), error: "too many processes".into() })
        }
        ["rank", n, rest @ ..] => {
            let n = rank(n);
            of_gang(match rest {
                ["prints", words @ ..] => {
                    GangInput::Lines { rank: n, level: Level::Info, lines: vec![words.join(" ")] }
                }
                ["step", step] => {
                    let step = Step {
                        step: number(step),
                        total_steps: 9,
                        epoch: 0.0,
                        loss: 1.0,
                        lr: 0.1,
                        grad_norm: 1.0,
                        tokens_per_s: 1.0,
                    };
                    GangInput::Rank(n, event(EventBody::Step(step)))
                }
                ["saved", step] => GangInput::Rank(n, event(EventBody::Checkpoint(checkpoint(number(step))))),
                ["saved-without-a-hash", step] => {
                    let record =
                        CheckpointRecord { manifest_sha256: String::new(), ..checkpoint(number(step)) };
                    GangInput::Rank(n, event(EventBody::Checkpoint(record)))
                }
                ["done", steps] => {
                    let outcome =
                        Outcome::Succeeded { steps: number(steps), final_loss: None, tokens_per_s: 1.0 };
                    GangInput::Rank(n, FromRank::Done(outcome))
                }
                ["stopped", steps] => {
                    GangInput::Rank(n, FromRank::Done(Outcome::Stopped { steps: number(steps) }))
                }
                ["fails", why @ ..] => failed(n, FailureKind::Rank, None, why),
                ["blames", other, why @ ..] => failed(n, FailureKind::Peer, Some(rank(other)), why),
                ["was", "told", "of", other, why @ ..] => {
                    failed(n, FailureKind::Told, Some(rank(other)), why)
                }
                ["was", "told", why @ ..] => failed(n, FailureKind::Told, None, why),
                ["exits", code] => {
                    GangInput::Exited { rank: n, at: now.mono, exit: Exit::Code(code.parse().unwrap()) }
                }
                ["dies", signal] => {
                    GangInput::Exited { rank: n, at: now.mono, exit: Exit::Signal(signal.parse().unwrap()) }
                }
                other => panic!("a rank cannot {other:?}"),
            })
        }
        other => panic!("nothing like {other:?} happens"),
    }
}

impl Stage {
    pub fn new(past: Past) -> Stage {
        let agent = Agent::new(config(), past);
        Stage { agent, now: Now::default(), seen: Vec::new(), sweeps_last: false }
    }

    /// Acts the `>` lines of a script and returns what came of it, in the script's form.
    pub fn play(&mut self, script: &str) -> String {
        for line in script.lines().filter_map(|line| line.trim().strip_prefix("> ")) {
            self.seen.push(format!("> {line}"));
            let words: Vec<&str> = line.split(' ').collect();
            if let ["wait", ms] = words[..] {
                self.wait(ms.parse().unwrap());
            } else {
                let input = input(&words, self.now);
                self.happen(input);
            }
        }
        self.seen.join("\n")
    }

    pub fn check(&mut self, script: &str) {
        let wanted: Vec<&str> = script.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        assert_eq!(self.play(script), wanted.join("\n"));
    }

    /// False once the agent has left.
    pub fn happen(&mut self, input: Input) -> bool {
        let actions = self.agent.handle(self.now, input);
        self.seen.extend(actions.iter().filter_map(describe));
        let stays = !actions.iter().any(|action| matches!(action, Action::Exit { .. }));
        let swept = actions.into_iter().filter_map(|action| match action {
            Action::Sweep(gang) if !self.sweeps_last => Some(gang),
            _ => None,
        });
        let swept: Vec<GangId> = swept.collect();
        swept.into_iter().all(|gang| self.happen(Input::Gang(gang, GangInput::Swept { left: 0 }))) && stays
    }

    /// Time goes by, and the agent is woken when it asked to be.
    fn wait(&mut self, ms: u64) {
        let end = self.now.mono + Duration::from_millis(ms);
        while let Some(deadline) = self.agent.deadline().filter(|&deadline| deadline <= end) {
            self.now.mono = self.now.mono.max(deadline);
            if !self.happen(Input::Tick) {
                return;
            }
        }
        self.now.mono = end;
    }
}

fn describe(action: &Action) -> Option<String> {
    Some(match action {
        Action::SampleMemory(_)
        | Action::Look(_)
        | Action::Send(FromAgent::Heartbeat { .. })
        | Action::Sweep(_) => return None,
        Action::Send(FromAgent::Hello(hello)) => {
            let gangs: Vec<String> =
                hello.gangs.iter().map(|(job, generation)| format!(" {job}.{generation}")).collect();
            let of = |(job, generation): &(JobId, u64)| format!(" {job}.{generation}");
            let lost: String = hello.lost.iter().map(of).collect();
            let earlier: Vec<String> = hello.earlier.iter().map(u64::to_string).collect();
            let lost = if lost.is_empty() { lost } else { format!(", lost{lost}") };
            let heir =
                if earlier.is_empty() { String::new() } else { format!(", after {}", earlier.join(" ")) };
            format!("send hello{}{lost}{heir}", gangs.concat())
        }
        Action::Send(FromAgent::Events(batch)) => {
            let events: Vec<String> = batch.events.iter().map(|event| tell(&event.body)).collect();
            format!("send {}: {}", batch.first_seq, events.join(", "))
        }
        Action::Send(FromAgent::Renew { .. }) => "ask for a certificate".into(),
        Action::Send(FromAgent::Output { .. }) => "send output".into(),
        Action::Send(FromAgent::Removed { manifests }) => format!("has removed {}", manifests.len()),
        Action::Lend(loans) => format!("lend {}", loans.len()),
        Action::Remove(checkpoints) => format!("remove {}", checkpoints.len()),
        Action::ReadOutput(wish) => format!("read rank {} from {}", wish.local_rank, wish.from),
        Action::Registered(node) => format!("registered as {node}"),
        Action::Spawn(gang) => format!("spawn {} ranks", gang.ranks),
        Action::Prepare { job, leads, .. } => match &job.checkpoint.resume {
            Resume::Path(path) => format!("prepare from {}", path.display()),
            _ if !leads => "prepare for others".into(),
            _ => "prepare".into(),
        },
        Action::ToRank { rank, message: ToRank::Start(start), .. } => {
            let of = match start.hosts {
                0 | 1 => String::new(),
                hosts => {
                    format!(" as {} of {} on host {} of {hosts}", start.rank, start.world_size, start.host)
                }
            };
            format!("rank {rank}: start on {} with {} threads{of}", start.device, start.threads)
        }
        Action::ToRank { rank, message: ToRank::Stop, .. } => format!("rank {rank}: stop"),
        Action::ToRank { rank, message: ToRank::CheckpointCommitted { step }, .. } => {
            format!("rank {rank}: checkpoint {step} counts")
        }
        Action::Strike { rank, blow, .. } => {
            let how = match blow {
                Blow::HangUp => "hang up on",
                Blow::Interrupt => "interrupt",
                Blow::User1 => "warn",
                Blow::User2 => "warn again",
                Blow::Terminate => "terminate",
                Blow::Kill => "kill",
            };
            format!("{how} rank {rank}")
        }
        Action::AbortCollectives { rank, .. } => format!("abort collectives: rank {rank}"),
        Action::Meet { peers, .. } => format!("meet {} ranks", peers.len()),
        Action::Reconnect => "connect anew".into(),
        Action::Forget(gang) => format!("forget {gang}"),
        Action::Exit { refused: None } => "exit".into(),
        Action::Exit { refused: Some(why) } => format!("exit: {why}"),
    })
}

fn tell(body: &EventBody) -> String {
    match body {
        EventBody::DataReady(_) => "data ready".into(),
        EventBody::Listening(endpoints) => {
            let ports: Vec<u16> = endpoints.iter().map(|endpoint| endpoint.port).collect();
            format!("listening on {ports:?}")
        }
        EventBody::Step(step) => format!("step {}", step.step),
        EventBody::Checkpoint(record) => format!("checkpoint {}", record.step),
        EventBody::Log { rank: Some(rank @ 10..), line, .. } => format!("rank {rank}: `{line}`"),
        EventBody::Log { line, .. } => format!("`{line}`"),
        EventBody::Memory { rss_mib, .. } => format!("memory {rss_mib:?}"),
        EventBody::Finished(Outcome::Succeeded { steps, .. }) => format!("succeeded after {steps}"),
        EventBody::Finished(Outcome::Stopped { steps }) => format!("stopped after {steps}"),
        EventBody::Finished(Outcome::Failed(error)) => {
            format!("failed ({:?}): {}", error.fault, error.message)
        }
        EventBody::CheckpointFailed { step, error } => format!("no checkpoint {step}: {error}"),
        EventBody::CheckpointLost { why, .. } => format!("checkpoint lost: {why}"),
        EventBody::Stall(Some(stall)) => format!("stands still since {}", stall.since_unix_ms),
        EventBody::Stall(None) => "goes on".into(),
        other => format!("{other:?}"),
    }
}

pub fn check(script: &str) {
    Stage::new(Past::default()).check(script);
}

/// A rank's own report.
fn failed(rank: Rank, kind: FailureKind, blamed: Option<Rank>, why: &[&str]) -> GangInput {
    let error = agent_error(kind, Fault::Job, "", why.join(" "));
    GangInput::Rank(rank, FromRank::Failed(JobError { node: None, rank: blamed, ..error }))
}
