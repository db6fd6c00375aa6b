//! A coordinator in this process on free ports, and a client and an agent that speak the real protocol to it.

#![allow(dead_code, reason = "each test program uses a part")]

use fleet_common::codec::{read_frame, write_frame};
use fleet_common::events::{Event, EventBatch, EventBody, Outcome, Step};
use fleet_common::ids::{ClientId, Generation, JobId, NodeId};
use fleet_common::net::{self, Identity, JoinToken};
use fleet_common::protocol::*;
use fleet_coordinator::server::{Coordinator, Options};
use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;
use tokio::time::timeout;

/// Nothing here takes this long unless it hangs.
pub const DEADLINE: Duration = Duration::from_secs(30);

pub fn options(dir: &Path) -> Options {
    Options::local(dir.to_owned())
}

pub async fn start(dir: &Path) -> Coordinator {
    Coordinator::start(options(dir)).await.unwrap()
}

pub fn token(dir: &Path, role: &str) -> JoinToken {
    std::fs::read_to_string(dir.join(format!("tokens/{role}.token"))).unwrap().trim().parse().unwrap()
}

pub async fn join(
    coordinator: &Coordinator,
    token: &JoinToken,
    name: &str,
) -> Result<Identity, net::NetError> {
    let at = [coordinator.endpoint().quic.clone()];
    net::join(&at, token, name).await.map(|joined| joined.identity)
}

pub fn program(ranks: u32) -> Request {
    let program = Program {
        argv: vec!["/bin/true".into()],
        working_dir: "/".into(),
        env: vec![Variable::secret("SECRET", "hidden")],
    };
    Request::Submit(SubmitJob {
        world_size: ranks,
        work: Work::Program(program),
        wish: Wish { queue: true, ..Wish::default() },
    })
}

pub struct Client {
    connection: quinn::Connection,
    pub id: ClientId,
    pub seq: u64,
}

impl Client {
    /// With the identity in the data directory.
    pub async fn local(dir: &Path, coordinator: &Coordinator) -> Client {
        let identity = Identity::load(&dir.join("client")).unwrap().unwrap();
        Client::connect(&identity, coordinator).await
    }

    pub async fn connect(identity: &Identity, coordinator: &Coordinator) -> Client {
        // One that has just started may have to ask who leads whether it knows the caller, and a busy machine answers late.
        let connected = async {
            loop {
                match net::connect(&[coordinator.endpoint().quic.clone()], identity).await {
                    Err(net::NetError::Unreachable(_)) => {}
                    Err(error) if error.to_string().contains("no coordinator leads") => {}
                    connected => return connected,
                }
            }
        };
        Client::over(timeout(DEADLINE, connected).await.unwrap().unwrap())
    }

    pub fn over(connection: quinn::Connection) -> Client {
        Client { connection, id: ClientId(7), seq: 0 }
    }

    /// A new request.
    pub async fn ask(&mut self, request: Request) -> Reply {
        self.seq += 1;
        self.send(self.seq, request).await
    }

    /// A request with this sequence number, which may have been used.
    pub async fn send(&self, seq: u64, request: Request) -> Reply {
        let frame = ClientFrame::change(self.id, seq, request);
        let ask = async {
            let (mut send, mut receive) = self.connection.open_bi().await.unwrap();
            write_frame(&mut send, &frame).await.unwrap();
            send.finish().unwrap();
            read_frame(&mut receive).await.unwrap().unwrap()
        };
        timeout(DEADLINE, ask).await.unwrap()
    }

    pub async fn submit(&mut self, ranks: u32) -> JobId {
        match self.ask(program(ranks)).await {
            Reply::Submitted { job } => job,
            other => panic!("{other:?}"),
        }
    }

    pub async fn job(&mut self, job: JobId) -> JobView {
        match self.ask(Request::Job(job)).await {
            Reply::Job(view) => *view,
            other => panic!("{other:?}"),
        }
    }

    /// All events of a watch, which must end.
    pub async fn watch(&self, job: JobId, from: u64, follow: bool) -> Vec<(u64, Event)> {
        let request = Request::Watch { job, from, follow };
        let frame = ClientFrame::query(request);
        let watch = async {
            let (mut send, mut receive) = self.connection.open_bi().await.unwrap();
            write_frame(&mut send, &frame).await.unwrap();
            let mut events = Vec::new();
            loop {
                match read_frame(&mut receive).await.unwrap().unwrap() {
                    Reply::Event { index, event } => events.push((index, event)),
                    Reply::EndOfEvents => return events,
                    other => panic!("{other:?}"),
                }
            }
        };
        timeout(DEADLINE, watch).await.unwrap()
    }
}

pub struct Agent {
    pub identity: Identity,
    connection: quinn::Connection,
    send: quinn::SendStream,
    receive: quinn::RecvStream,
}

impl Agent {
    pub async fn join(dir: &Path, coordinator: &Coordinator, slots: u32) -> Agent {
        let identity = join(coordinator, &token(dir, "worker"), "box").await.unwrap();
        Agent::greet(identity, coordinator, slots, vec![]).await
    }

    /// Connects and greets, and takes the welcome.
    pub async fn greet(
        identity: Identity,
        coordinator: &Coordinator,
        slots: u32,
        gangs: Vec<(JobId, Generation)>,
    ) -> Agent {
        Agent::greet_as(identity, coordinator, slots, AgentHello { gangs, ..hello() }).await
    }

    /// The same with this greeting.
    pub async fn greet_as(
        identity: Identity,
        coordinator: &Coordinator,
        slots: u32,
        hello: AgentHello,
    ) -> Agent {
        let connection = net::connect(&[coordinator.endpoint().member.clone()], &identity).await.unwrap();
        let (send, receive) = connection.open_bi().await.unwrap();
        let mut agent = Agent { identity, connection, send, receive };
        agent.tell(FromAgent::Hello(AgentHello { slots, ..hello })).await;
        let node = agent.node();
        assert_eq!(agent.next().await, ToAgent::Welcome { node });
        agent
    }

    pub fn node(&self) -> NodeId {
        self.identity.node().unwrap()
    }

    /// Waits until the coordinator ends the connection, and returns its words.
    pub async fn closed(&self) -> String {
        net::describe(&timeout(DEADLINE, self.connection.closed()).await.unwrap())
    }

    pub async fn tell(&mut self, message: FromAgent) {
        write_frame(&mut self.send, &message).await.unwrap();
    }

    /// The next message that is not about connections.
    pub async fn next(&mut self) -> ToAgent {
        loop {
            match self.next_of_any().await {
                ToAgent::Coordinators(_) | ToAgent::Authorities { .. } | ToAgent::Heard { .. } => {}
                message => return message,
            }
        }
    }

    pub async fn next_of_any(&mut self) -> ToAgent {
        timeout(DEADLINE, read_frame(&mut self.receive)).await.unwrap().unwrap().unwrap()
    }

    pub async fn gang(&mut self) -> Gang {
        match self.next().await {
            ToAgent::StartGang(gang) => gang,
            other => panic!("{other:?}"),
        }
    }

    pub async fn events(&mut self, gang: (JobId, Generation), first_seq: u64, bodies: Vec<EventBody>) {
        let events = bodies.into_iter().map(|body| Event { unix_ms: 5, body }).collect();
        self.tell(FromAgent::Events(EventBatch { job: gang.0, generation: gang.1, first_seq, events })).await;
    }

    pub fn vanish(self) -> Identity {
        self.connection.close(0u32.into(), b"");
        self.identity
    }
}

/// The greeting of a worker's first process that knows no gang.
pub fn hello() -> AgentHello {
    AgentHello {
        version: PROTOCOL_VERSION,
        name: "box".into(),
        slots: 1,
        device: "cpu".into(),
        program_version: "test".into(),
        labels: BTreeMap::new(),
        host: "127.0.0.1".into(),
        checkpoint_port: 0,
        process: 1,
        gangs: vec![],
        lost: vec![],
        earlier: vec![],
    }
}

pub fn started() -> EventBody {
    EventBody::Started { step: 0, parameters: 10, device: "cpu".into() }
}

pub fn step(step: u64) -> EventBody {
    EventBody::Step(Step {
        step,
        total_steps: 10,
        epoch: 0.0,
        loss: 2.5,
        lr: 1e-3,
        grad_norm: 1.0,
        tokens_per_s: 100.0,
    })
}

pub fn succeeded() -> EventBody {
    EventBody::Finished(Outcome::Succeeded { steps: 3, final_loss: Some(2.5), tokens_per_s: 100.0 })
}
