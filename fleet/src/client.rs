//! A client of the coordinators: one request, one answer; or a job's events. Any coordinator will do; when one goes away or cannot answer,
//! the next is asked.

use crate::cluster::{Cluster, NoIdentity};
use crate::failure::Failure;
use crate::session::Session;
use crate::{doubt, out};
use fleet_common::codec;
use fleet_common::events::Event;
use fleet_common::ids::JobId;
use fleet_common::net::{self, Identity};
use fleet_common::protocol::{ClientFrame, CoordinatorAddress, RefusalKind, Reply, Request};
use quinn::{Connection, RecvStream};
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

/// How long a question is asked again before the cluster counts as unreachable.
pub const ASK_PATIENCE: Duration = Duration::from_secs(3);
/// Where there are several coordinators, an answer may have to wait for an election.
const ASK_PATIENCE_SEVERAL: Duration = Duration::from_secs(8);
/// Changes are worth waiting for: a coordinator that is restarted is back within seconds.
pub const CHANGE_PATIENCE: Duration = Duration::from_secs(10);
/// Between attempts; doubles up to the second.
const PAUSE_FIRST: Duration = Duration::from_millis(20);
const PAUSE_MAX: Duration = Duration::from_millis(500);
/// An answer takes milliseconds; a coordinator that takes this long without losing its connection is stuck.
const ANSWER_MAX: Duration = Duration::from_secs(20);
/// Or cut off from the others, one of which is asked then.
const ANSWER_MAX_SEVERAL: Duration = Duration::from_secs(3);

/// A watch that is open for so long is held by a coordinator that is well: one without a leader would have ended it, and one that is gone
/// would have been missed.
const WELL_AFTER: Duration = Duration::from_secs(10);

/// Times that a change is made anew because its answer was lost for good, as where leaders die one after another.
const SPENT_MAX: usize = 3;

pub struct Client {
    cluster: Cluster,
    connection: Option<Connection>,
    patience: Option<Duration>,
    /// How often another coordinator was chosen.
    turn: usize,
    stale: bool,
    /// Of the changes so far.
    session: Option<Session>,
}

impl Client {
    pub fn new(cluster: Cluster) -> Client {
        Client { cluster, connection: None, patience: None, turn: 0, stale: false, session: None }
    }

    /// A client that waits this long for an unreachable coordinator, whatever it asks.
    pub fn patient(cluster: Cluster, patience: Duration) -> Client {
        Client { patience: Some(patience), ..Client::new(cluster) }
    }

    /// Whether its queries may be answered from what one coordinator has.
    pub fn stale(self, stale: bool) -> Client {
        Client { stale, ..self }
    }

    /// Of the cluster, where it is on this machine.
    pub fn data_dir(&self) -> Option<&Path> {
        self.cluster.data_dir()
    }

    /// Keeps where the coordinators are, as one of them has just said.
    pub fn learn(&mut self, known: Vec<CoordinatorAddress>) {
        if !self.stale {
            self.cluster.learn(known);
        }
    }

    /// Asks without changing anything.
    pub async fn ask(&mut self, request: Request) -> Result<Reply, Failure> {
        let frame = ClientFrame { stale: self.stale, ..ClientFrame::query(request) };
        let usual = if self.cluster.has_several() { ASK_PATIENCE_SEVERAL } else { ASK_PATIENCE };
        self.exchange(&frame, Instant::now() + self.patience.unwrap_or(usual)).await
    }

    /// Asks for a change, which happens once however often it has to be sent. Fails with `exit::UNKNOWN` where it may have happened.
    pub async fn change(&mut self, request: Request) -> Result<Reply, Failure> {
        for _ in 1..SPENT_MAX {
            match self.change_once(request.clone()).await {
                // what it gave went with a lost answer: the same under a new number is another request
                Ok(Reply::Refused(refusal)) if refusal.kind == RefusalKind::Spent => {}
                reply => return reply,
            }
        }
        match self.change_once(request).await? {
            Reply::Refused(refusal) => Err(refusal.into()),
            reply => Ok(reply),
        }
    }

    /// A change under one number. `Spent` is passed on as it is.
    async fn change_once(&mut self, request: Request) -> Result<Reply, Failure> {
        let deadline = Instant::now() + self.patience.unwrap_or(CHANGE_PATIENCE);
        let mut session = match self.session.take().filter(|session| !session.is_idle()) {
            Some(session) => session,
            None => match self.exchange(&ClientFrame::query(Request::Position), deadline).await? {
                Reply::Position(since) => Session::begin(since)?,
                other => return Err(unexpected(&other)),
            },
        };
        let frame = session.number(request);
        self.session = Some(session);
        self.exchange(&frame, deadline).await
    }

    /// Sends a frame until it is answered or refused for good.
    async fn exchange(&mut self, frame: &ClientFrame, deadline: Instant) -> Result<Reply, Failure> {
        let mut in_doubt = false;
        let failure = match self.exchange_until(frame, deadline, &mut in_doubt).await {
            Ok(reply) => return Ok(reply),
            Err(failure) => failure,
        };
        match in_doubt && frame.request.is_change() {
            true => Err(doubt::unknown(&frame.request, &failure.message)),
            false => Err(failure),
        }
    }

    /// A failure counts only where nothing is `in_doubt`.
    async fn exchange_until(
        &mut self,
        frame: &ClientFrame,
        deadline: Instant,
        in_doubt: &mut bool,
    ) -> Result<Reply, Failure> {
        let mut pause = PAUSE_FIRST;
        let answer_max = if self.cluster.has_several() { ANSWER_MAX_SEVERAL } else { ANSWER_MAX };
        loop {
            let connection = self.connect(deadline).await?;
            let failure = match tokio::time::timeout(answer_max, once(&connection, frame)).await {
                Ok(Ok(Reply::Refused(refusal))) => match refusal.kind {
                    RefusalKind::Spent => return Ok(Reply::Refused(refusal)),
                    RefusalKind::Unavailable | RefusalKind::Undecided => {
                        *in_doubt |= refusal.kind == RefusalKind::Undecided;
                        self.ask_another();
                        Failure::unreachable(refusal.message)
                    }
                    RefusalKind::Forgotten => {
                        *in_doubt = true;
                        return Err(refusal.into());
                    }
                    // said at the door, where nobody looks whether an earlier try was done
                    RefusalKind::Forbidden => return Err(refusal.into()),
                    // of the cluster: they hold for all tries
                    RefusalKind::Invalid | RefusalKind::NotFound | RefusalKind::Later => {
                        *in_doubt = false;
                        return Err(refusal.into());
                    }
                },
                Ok(Ok(reply)) => return Ok(reply),
                Ok(Err(Silence { heard, why })) => {
                    *in_doubt |= heard;
                    self.connection = None;
                    self.turn += 1;
                    Failure::unreachable(format!("the coordinator went away before it answered: {why}"))
                }
                Err(_) => {
                    *in_doubt = true;
                    self.connection = None;
                    self.turn += 1;
                    Failure::unreachable(format!(
                        "the coordinator did not answer within {} s; where no majority of them is alive, only --stale queries are answered",
                        answer_max.as_secs()
                    ))
                }
            };
            if Instant::now() + pause > deadline {
                return Err(failure);
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(PAUSE_MAX);
        }
    }

    /// The connection, made anew where it is closed.
    async fn connect(&mut self, deadline: Instant) -> Result<Connection, Failure> {
        if let Some(connection) = self.connection.as_ref().filter(|c| c.close_reason().is_none()) {
            return Ok(connection.clone());
        }
        let mut pause = PAUSE_FIRST;
        loop {
            let failure = match self.attempt().await {
                Ok(connection) => return Ok(self.connection.insert(connection).clone()),
                Err(failure) if failure.code != fleet_common::exit::UNREACHABLE => return Err(failure),
                Err(failure) => failure,
            };
            if Instant::now() + pause > deadline {
                return Err(failure);
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(PAUSE_MAX);
        }
    }

    async fn attempt(&mut self) -> Result<Connection, Failure> {
        let mut addresses = self.cluster.addresses()?;
        if !addresses.is_empty() {
            let first = self.turn % addresses.len();
            addresses.rotate_left(first);
        }
        let identity = self.identity(&addresses).await?;
        let reached = net::reach(&addresses, &identity).await;
        let net::Reached { mut connection, mark, .. } =
            reached.map_err(|error| self.cluster.with_the_way_out(error))?;
        let behind = mark != identity.authorities.mark() || !identity.is_of_issuing_ca();
        if behind || identity.is_due(SystemTime::now()) {
            match renew(&connection, &identity, &self.cluster.client_dir).await {
                // the cluster counts it as moved to another CA when it has shown the new certificate
                Ok(renewed) if !identity.is_of_same_ca(&renewed) => {
                    connection.close(net::DONE, b"");
                    connection = net::connect(&addresses, &renewed).await?;
                }
                Ok(_) => {}
                Err(why) => out::note(&format!(
                    "warning: the certificate of {} was not renewed: {why}",
                    identity.member
                )),
            }
        }
        if self.cluster.wants_addresses()
            && let Ok(Reply::Addresses(known)) =
                once(&connection, &ClientFrame::query(Request::Addresses)).await
        {
            self.cluster.learn(known);
        }
        Ok(connection)
    }

    /// Its own, with a damaged file of CAs mended where a coordinator shows what it should be.
    async fn identity(&self, addresses: &[String]) -> Result<Identity, Failure> {
        match self.cluster.identity() {
            Err(NoIdentity::DamagedCa { fingerprint, failure }) => {
                let mended = net::mend_authorities(addresses, &fingerprint, &self.cluster.client_dir).await;
                if mended.is_err() {
                    return Err(failure);
                }
                out::note(&format!("warning: {}; it was mended", failure.message));
                Ok(self.cluster.identity()?)
            }
            identity => Ok(identity?),
        }
    }

    /// The next connection is to another coordinator, where there are several.
    fn ask_another(&mut self) {
        if self.connection.as_ref().is_some_and(|c| c.close_reason().is_some()) || self.cluster.has_several()
        {
            self.connection = None;
            self.turn += 1;
        }
    }

    /// Hands every event of the job from the `from`-th on to `on`, in order, each once, and reads on when `on` is done with it. With
    /// `follow`, until the job has ended.
    pub async fn watch<F: Future<Output = Flow>>(
        &mut self,
        job: JobId,
        mut from: u64,
        follow: bool,
        mut on: impl FnMut(Event) -> F,
    ) -> Result<(), Failure> {
        let mut trouble = Trouble { since: None, patience: self.patience.unwrap_or(CHANGE_PATIENCE) };
        loop {
            let connection = self.connect(trouble.give_up(Instant::now())).await?;
            let begun = Instant::now();
            let request = Request::Watch { job, from, follow };
            let frame = ClientFrame { stale: self.stale, ..ClientFrame::query(request) };
            let why = match open(&connection, &frame).await {
                Err(Silence { why, .. }) => why,
                Ok(mut stream) => loop {
                    match codec::read_frame(&mut stream).await {
                        Ok(Some(Reply::Event { index, event })) => {
                            trouble.since = None;
                            if index < from {
                                continue;
                            }
                            from = index + 1;
                            if on(event).await == Flow::Stop {
                                return Ok(());
                            }
                        }
                        Ok(Some(Reply::EndOfEvents)) => return Ok(()),
                        Ok(Some(Reply::Refused(refusal))) if refusal.kind.is_passing() => {
                            break refusal.message;
                        }
                        Ok(Some(Reply::Refused(refusal))) => return Err(refusal.into()),
                        Ok(Some(other)) => return Err(unexpected(&other)),
                        Ok(None) => break "the stream ended early".to_owned(),
                        Err(error) => break error.to_string(),
                    }
                },
            };
            if trouble.is_enough(begun, Instant::now()) {
                return Err(Failure::unreachable(format!("the coordinator went away: {why}")));
            }
            self.ask_another();
            tokio::time::sleep(PAUSE_FIRST).await;
        }
    }
}

/// How long it is that a watch went wrong again and again. A silence is none: a quiet job says nothing for hours.
struct Trouble {
    since: Option<Instant>,
    patience: Duration,
}

impl Trouble {
    fn give_up(&mut self, now: Instant) -> Instant {
        *self.since.get_or_insert(now) + self.patience
    }

    /// What was open since `begun` has ended: whether to give up.
    fn is_enough(&mut self, begun: Instant, now: Instant) -> bool {
        if now.duration_since(begun) >= WELL_AFTER {
            self.since = None;
        }
        now > self.give_up(now)
    }
}

/// Whether to go on with the events.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    Continue,
    Stop,
}

/// For an answer that does not belong to the question.
pub fn unexpected(reply: &Reply) -> Failure {
    let text = format!("{reply:?}");
    let name: String = text.chars().take_while(|c| c.is_ascii_alphanumeric()).collect();
    Failure::unreachable(format!(
        "the coordinator gave an answer of another kind ({name}); are both of the same version?"
    ))
}

async fn renew(connection: &Connection, identity: &Identity, dir: &Path) -> Result<Identity, String> {
    let request = Request::Renew { csr_der: identity.signing_request()? };
    match once(connection, &ClientFrame::query(request)).await.map_err(|silence| silence.why)? {
        Reply::Certificate { certificate_der, authorities } => {
            let renewed = identity.renewed(certificate_der, authorities)?;
            renewed.store_renewed(dir, identity).map_err(|error| error.to_string())?;
            Ok(renewed)
        }
        Reply::Refused(refusal) => Err(refusal.message),
        other => Err(unexpected(&other).message),
    }
}

/// No answer came.
struct Silence {
    /// The request may have arrived.
    heard: bool,
    why: String,
}

async fn open(connection: &Connection, frame: &ClientFrame) -> Result<RecvStream, Silence> {
    let opened = connection.open_bi().await;
    let (mut send, receive) = opened.map_err(|error| Silence { heard: false, why: net::describe(&error) })?;
    let lost = |why: String| Silence { heard: true, why };
    codec::write_frame(&mut send, frame).await.map_err(|error| lost(error.to_string()))?;
    send.finish().map_err(|error| lost(error.to_string()))?;
    Ok(receive)
}

async fn once(connection: &Connection, frame: &ClientFrame) -> Result<Reply, Silence> {
    let mut stream = open(connection, frame).await?;
    let lost = |why: String| Silence { heard: true, why };
    let reply = codec::read_frame(&mut stream).await.map_err(|error| match connection.close_reason() {
        Some(reason) => lost(net::describe(&reason)),
        None => lost(error.to_string()),
    })?;
    reply.ok_or_else(|| lost("it closed the stream".to_owned()))
}

/// A runtime for one command. Everything happens on the calling thread.
pub fn block_on<T>(work: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.map_err(|e| Failure::environment(format!("cannot start: {e}")))?.block_on(work)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patience_is_for_trouble_and_not_for_silence() {
        let begin = Instant::now();
        let at = |s| begin + Duration::from_secs(s);
        let mut trouble = Trouble { since: None, patience: Duration::from_secs(60) };
        trouble.give_up(begin);
        // An hour without a word, then the connection breaks.
        assert!(!trouble.is_enough(begin, at(3600)));
        // It comes back, is quiet for a while, and breaks again.
        assert!(!trouble.is_enough(at(3601), at(3700)));
        // Nobody leads: each attempt is refused after five seconds.
        assert!((3700..3760).step_by(5).all(|s| !trouble.is_enough(at(s), at(s + 5))));
        assert!(trouble.is_enough(at(3760), at(3765)));
    }
}
