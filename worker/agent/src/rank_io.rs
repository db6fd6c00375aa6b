//! What flows between the agent and one rank: its socket, its output and its end. Everything a rank wrote is delivered before its
//! exit is. Decides nothing.

use crate::gang::GangInput;
use crate::output::{Lines, OutputFile};
use crate::panics;
use crate::relay::Relay;
use crate::spawn::{Exited, Started};
use fleet_common::codec;
use fleet_common::events::{EventBody, FailureKind, JobError, Level};
use fleet_common::exit::Fault;
use fleet_common::ids::Rank;
use fleet_common::lines::LineSplitter;
use fleet_common::protocol::{FromRank, ToRank};
use std::path::Path;
use std::time::{Duration, Instant};
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::net::UnixStream;
use tokio::net::unix::OwnedReadHalf;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::{JoinError, JoinSet};

/// Bytes read at once from a pipe; the lines in it travel together.
const READ_MAX: usize = 16 << 10;
/// A rank that is gone may have left its pipe to a process that got away: what has not come by then does not come.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// Where a rank's messages go. Its lines and, behind them, its exit have a queue of their own, which the driver reads after the messages
/// and may leave full for a while.
#[derive(Clone, Debug)]
pub struct Deliveries<K> {
    /// Names the gang to the driver.
    pub key: K,
    pub messages: mpsc::Sender<(K, GangInput)>,
    pub lines: mpsc::Sender<(K, GangInput)>,
    /// Gets all that it prints, before anybody else.
    pub relay: Option<Relay>,
}

/// The driver's ends.
#[derive(Debug)]
pub struct RankIo {
    pub to_rank: mpsc::UnboundedSender<ToRank>,
    /// To be told when the process was reaped.
    pub exited: oneshot::Sender<Exited>,
}

/// Starts the tasks that serve one rank. `started_at` is the zero of the times reported.
pub fn attend<K: Copy + Send + Sync + 'static>(
    rank: Rank,
    started: Started,
    socket: Option<UnixStream>,
    log: &Path,
    deliveries: Deliveries<K>,
    started_at: Instant,
) -> std::io::Result<RankIo> {
    let stdout = tokio::process::ChildStdout::from_std(started.stdout)?;
    let stderr = started.stderr.map(tokio::process::ChildStderr::from_std).transpose()?;
    let log = OutputFile::create(log);
    let (to_rank, outbox) = mpsc::unbounded_channel(); // a handful of messages in a rank's life
    let (exited, exit) = oneshot::channel::<Exited>();
    let (gone_sender, gone) = watch::channel(false);

    let mut tasks = JoinSet::new();
    tasks.spawn(read_lines(stdout, rank, Level::Info, log.clone(), deliveries.clone(), gone.clone()));
    if let Some(stderr) = stderr {
        tasks.spawn(read_lines(stderr, rank, Level::Warn, log.clone(), deliveries.clone(), gone.clone()));
    }
    if let Some(socket) = socket {
        let (read, write) = socket.into_split();
        tasks.spawn(read_messages(read, rank, log, deliveries.clone(), gone.clone()));
        tasks.spawn(write_messages(write, outbox, gone));
    }
    tokio::spawn(async move {
        let mut exit = exit;
        let exited = loop {
            tokio::select! {
                exited = &mut exit => break exited,
                Some(ended) = tasks.join_next() => if let Err(panic) = ended {
                    let failed = GangInput::Rank(rank, FromRank::Failed(lost_touch(panic)));
                    let _ = deliveries.messages.send((deliveries.key, failed)).await; // the agent ends
                },
            }
        };
        let Ok(exited) = exited else { return };
        let _ = gone_sender.send(true);
        while tasks.join_next().await.is_some() {}
        let at = exited.at.saturating_duration_since(started_at);
        let input = GangInput::Exited { rank, at, exit: exited.exit };
        // Behind the lines, in their queue; messages are taken before lines.
        let _ = deliveries.lines.send((deliveries.key, input)).await;
    });
    Ok(RankIo { to_rank, exited })
}

async fn read_lines<K: Copy>(
    mut pipe: impl AsyncRead + Unpin,
    rank: Rank,
    level: Level,
    log: OutputFile,
    deliveries: Deliveries<K>,
    gone: watch::Receiver<bool>,
) {
    let (mut splitter, mut whole) = (LineSplitter::default(), Lines::default());
    let mut buffer = vec![0; READ_MAX];
    loop {
        let unheard = async {
            match &deliveries.relay {
                Some(relay) => relay.closed(level != Level::Info).await,
                None => std::future::pending().await,
            }
        };
        let read = tokio::select! {
            read = pipe.read(&mut buffer) => read.unwrap_or(0),
            // The pipe is closed with the end of this.
            () = unheard => 0,
            () = silence_after_the_end(gone.clone()) => 0,
        };
        if let Some(relay) = deliveries.relay.as_ref().filter(|_| read > 0) {
            relay.pass_on(rank, level != Level::Info, &buffer[..read]).await;
        }
        let lines =
            if read == 0 { splitter.finish().into_iter().collect() } else { splitter.push(&buffer[..read]) };
        match read {
            0 => whole.finish(&log),
            _ => whole.push(&buffer[..read], &log),
        }
        if !lines.is_empty() {
            let _ = deliveries.lines.send((deliveries.key, GangInput::Lines { rank, level, lines })).await;
        }
        if read == 0 {
            return;
        }
    }
}

async fn read_messages<K: Copy>(
    mut socket: OwnedReadHalf,
    rank: Rank,
    log: OutputFile,
    deliveries: Deliveries<K>,
    gone: watch::Receiver<bool>,
) {
    loop {
        // A frame cut off by the time limit is lost with its rank; nothing is read after it.
        let message = tokio::select! {
            message = codec::read_frame::<_, FromRank>(&mut socket) => message,
            () = silence_after_the_end(gone.clone()) => Ok(None),
        };
        match message {
            Ok(Some(message)) => {
                if let FromRank::Event(event) = &message
                    && let EventBody::Log { line, .. } = &event.body
                {
                    log.write(format!("{line}\n").as_bytes());
                }
                let _ = deliveries.messages.send((deliveries.key, GangInput::Rank(rank, message))).await;
            }
            Ok(None) => return,
            // Its end is reported by another way.
            Err(error) if error.is_end() || *gone.borrow() => {
                tracing::debug!(rank, %error, "the rank left in the middle of a message");
                return;
            }
            Err(error) => {
                let line = format!("rank {rank} sent something that cannot be read: {error}");
                let _ =
                    deliveries.messages.send((deliveries.key, GangInput::Progress(Level::Warn, line))).await;
                return;
            }
        }
    }
}

/// One of the tasks below panicked.
fn lost_touch(panic: JoinError) -> JobError {
    JobError {
        kind: FailureKind::Node,
        fault: Fault::Job,
        rank: None,
        node: None,
        signal: None,
        exit_code: None,
        message: format!(
            "the worker lost touch with the rank, by a fault of fleet: {}; the worker's log says where: please report it",
            panics::said(panic)
        ),
        last_lines: Vec::new(),
    }
}

async fn write_messages(
    mut socket: tokio::net::unix::OwnedWriteHalf,
    mut outbox: mpsc::UnboundedReceiver<ToRank>,
    mut gone: watch::Receiver<bool>,
) {
    loop {
        let message = tokio::select! {
            message = outbox.recv() => message,
            _ = gone.wait_for(|gone| *gone) => None,
        };
        let Some(message) = message else { return };
        if let Err(error) = codec::write_frame(&mut socket, &message).await {
            // Its exit is reported by another way.
            tracing::debug!(%error, "a message did not reach its rank");
            return;
        }
    }
}

async fn silence_after_the_end(mut gone: watch::Receiver<bool>) {
    let _ = gone.wait_for(|gone| *gone).await;
    tokio::time::sleep(LAST_WORDS).await;
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // in a test an unwrap is an assertion
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::net::UnixStream as Blocking;

    /// What is told of a rank that does this with its end of the socket. The agent has sent it something.
    async fn told(does: impl FnOnce(Blocking)) -> Vec<GangInput> {
        let (mut here, there) = Blocking::pair().unwrap();
        here.write_all(b"to be read").unwrap();
        does(there);
        here.set_nonblocking(true).unwrap();
        let (socket, _keep) = UnixStream::from_std(here).unwrap().into_split();
        let (messages, mut inbox) = mpsc::channel(8);
        let (lines, _lines) = mpsc::channel(8);
        let (_gone, gone) = watch::channel(false);
        let dir = tempfile::tempdir().unwrap();
        let log = OutputFile::create(&dir.path().join("rank.log"));
        let deliveries = Deliveries { key: (), messages, lines, relay: None };
        read_messages(socket, 1, log, deliveries, gone).await;
        std::iter::from_fn(|| inbox.try_recv().ok()).map(|((), input)| input).collect()
    }

    #[tokio::test]
    async fn a_rank_that_is_gone_has_sent_nothing_wrong() {
        let left = |input: Vec<GangInput>| assert!(input.is_empty(), "{input:?}");
        // What was sent to it is unread: the connection is reset.
        left(told(drop).await);
        left(told(|mut rank| rank.write_all(&[9, 0]).unwrap()).await);
        let wrong = told(|mut rank| rank.write_all(&[0xff; 64]).unwrap()).await;
        assert!(
            matches!(&wrong[..], [GangInput::Progress(Level::Warn, line)] if line.starts_with("rank 1 sent something that cannot be read")),
            "{wrong:?}"
        );
    }
}
