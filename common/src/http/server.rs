//! Connections: so many at once, each with a time for what it sends and for what it takes.

use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioIo, TokioTimer};
use rustls::ServerConfig;
use std::convert::Infallible;
use std::future::Future;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::timeout;
use tokio_io_timeout::TimeoutStream;
use tokio_rustls::TlsAcceptor;
use tracing::debug;

/// Between attempts to accept when the process has too many files open.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);
/// Between looks whether one of so many connections has been answered.
const ROOM_RETRY: Duration = Duration::from_millis(20);

/// What a listener grants.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Connections at once. Where one more comes, the oldest that has asked nothing yet makes room, else the oldest that waits for its next
    /// request; while all are being answered it waits.
    pub connections: usize,
    /// Bytes of a request line and its headers.
    pub head: usize,
    /// For a handshake, and for a head to arrive, also the next one of a connection that is kept open.
    pub asking: Duration,
    /// For anything that is sent to be taken.
    pub taking: Duration,
}

/// Serves until it is dropped, which ends all connections. With `tls` it speaks nothing else. `answer` finds the address of who asks among the
/// request's extensions.
pub async fn serve<A, F, B>(listener: TcpListener, limits: Limits, tls: Option<Arc<ServerConfig>>, answer: A)
where
    A: Fn(Request<Incoming>) -> F + Clone + Send + 'static,
    F: Future<Output = Response<B>> + Send + 'static,
    B: Body<Error = Infallible> + Send + Unpin + 'static,
    B::Data: Send,
{
    let tls = tls.map(TlsAcceptor::from);
    let (mut tasks, mut connections) = (JoinSet::new(), Vec::new());
    loop {
        match listener.accept().await {
            Ok((stream, from)) => {
                while !make_room(&mut connections, limits.connections) {
                    tokio::time::sleep(ROOM_RETRY).await;
                }
                let use_ = Arc::new(Use::default());
                let connection = Connection { limits, use_: use_.clone(), from, answer: answer.clone() };
                let task = tasks.spawn(connection.accept(stream, tls.clone()));
                connections.push(Open { task, use_ });
            }
            Err(error) => {
                debug!("HTTP: {error}");
                tokio::time::sleep(ACCEPT_RETRY).await;
            }
        }
        while tasks.try_join_next().is_some() {}
    }
}

/// What a connection is used for now.
#[derive(Debug, Default)]
struct Use {
    has_asked: AtomicBool,
    /// Requests whose answers have not been sent whole.
    open: AtomicUsize,
}

struct Open {
    task: AbortHandle,
    use_: Arc<Use>,
}

/// For one more, if there is any to be had. They are in the order in which they came.
fn make_room(connections: &mut Vec<Open>, most: usize) -> bool {
    connections.retain(|connection| !connection.task.is_finished());
    if connections.len() < most {
        return true;
    }
    let first = |is: fn(&Use) -> bool| connections.iter().position(|connection| is(&connection.use_));
    let silent = first(|of| !of.has_asked.load(Ordering::Relaxed));
    let idle = silent.or_else(|| first(|of| of.open.load(Ordering::Relaxed) == 0));
    idle.map(|at| connections.remove(at).task.abort()).is_some()
}

struct Connection<A> {
    limits: Limits,
    use_: Arc<Use>,
    from: SocketAddr,
    answer: A,
}

impl<A, F, B> Connection<A>
where
    A: Fn(Request<Incoming>) -> F + Clone + Send + 'static,
    F: Future<Output = Response<B>> + Send + 'static,
    B: Body<Error = Infallible> + Send + Unpin + 'static,
    B::Data: Send,
{
    async fn accept(self, stream: TcpStream, tls: Option<TlsAcceptor>) {
        // Where it is not granted, small answers are slower.
        let _ = stream.set_nodelay(true);
        let mut stream = TimeoutStream::new(stream);
        stream.set_write_timeout(Some(self.limits.taking));
        let stream = Box::pin(stream);
        let Some(tls) = tls else { return self.drive(stream).await };
        match timeout(self.limits.asking, tls.accept(stream)).await {
            Ok(Ok(stream)) => self.drive(stream).await,
            Ok(Err(error)) => debug!("HTTP: {}: no TLS: {error}", self.from),
            Err(_) => debug!("HTTP: {}: no handshake in time", self.from),
        }
    }

    async fn drive(self, stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static) {
        let Connection { limits, use_, from, answer } = self;
        let service = service_fn(move |mut request: Request<Incoming>| {
            request.extensions_mut().insert(from);
            use_.has_asked.store(true, Ordering::Relaxed);
            let counted = Counted::new(&use_);
            let answer = answer(request);
            async move { Ok::<_, Infallible>(answer.await.map(|body| Sent { body, _counted: counted })) }
        });
        let mut http = http1::Builder::new();
        http.timer(TokioTimer::new()).header_read_timeout(limits.asking).max_buf_size(limits.head);
        // What is wrong with a connection concerns its client.
        let _ = http.serve_connection(TokioIo::new(stream), service).await;
    }
}

/// A request that is being answered.
struct Counted(Arc<Use>);

impl Counted {
    fn new(use_: &Arc<Use>) -> Counted {
        use_.open.fetch_add(1, Ordering::Relaxed);
        Counted(use_.clone())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A body, counted until it is sent.
struct Sent<B> {
    body: B,
    _counted: Counted,
}

impl<B: Body + Unpin> Body for Sent<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::Body as Bytes;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    const LIMITS: Limits = Limits {
        connections: 2,
        head: 8 << 10,
        asking: Duration::from_millis(200),
        taking: Duration::from_millis(200),
    };
    const PATIENCE: Duration = Duration::from_secs(60);

    /// Answers `/large` with more than a socket holds, `/never` with what does not end, and everything else with `ok`.
    async fn start() -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = listener.local_addr().unwrap();
        tokio::spawn(serve(listener, LIMITS, None, async |request: Request<Incoming>| {
            assert!(request.extensions().get::<SocketAddr>().is_some());
            match request.uri().path() {
                "/large" => Response::new(Bytes::from(vec![b'x'; 64 << 20])),
                "/never" => {
                    let (feed, body) = Bytes::growing(4);
                    feed.send("begun").unwrap();
                    tokio::spawn(async move { feed.left().await });
                    Response::new(body)
                }
                _ => Response::new(Bytes::from("ok")),
            }
        }));
        at
    }

    async fn ask(at: SocketAddr, path: &str) -> TcpStream {
        let mut stream = TcpStream::connect(at).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nHost: a\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        stream
    }

    /// Until a part of what is said was heard.
    async fn hear(stream: &mut TcpStream, wanted: &str) {
        let mut heard = Vec::new();
        while !String::from_utf8_lossy(&heard).contains(wanted) {
            assert_ne!(stream.read_buf(&mut heard).await.unwrap(), 0, "{}", String::from_utf8_lossy(&heard));
        }
    }

    async fn is_ended(mut stream: TcpStream) {
        let mut rest = Vec::new();
        // A connection that is reset has ended as well.
        let _ = timeout(PATIENCE, stream.read_to_end(&mut rest)).await.expect("it ends");
    }

    #[tokio::test]
    async fn who_does_not_take_what_is_sent_is_cut_off() {
        let at = start().await;
        let (one, other) = (ask(at, "/large").await, ask(at, "/large").await);
        // There is room for two more when both are given up, who read nothing till then.
        let mut stays = ask(at, "/never").await;
        hear(&mut stays, "begun").await;
        hear(&mut ask(at, "/").await, "ok").await;
        for mut stream in [one, other] {
            let mut taken = 0;
            let mut piece = vec![0; 1 << 20];
            while let Ok(read @ 1..) = stream.read(&mut piece).await {
                taken += read;
            }
            assert!(taken < 64 << 20, "{taken}");
        }
    }

    #[tokio::test]
    async fn who_says_nothing_is_cut_off_and_makes_room_before() {
        let at = start().await;
        is_ended(TcpStream::connect(at).await.unwrap()).await;
        let (mut kept, silent) = (ask(at, "/").await, TcpStream::connect(at).await.unwrap());
        hear(&mut kept, "ok").await;
        hear(&mut ask(at, "/").await, "ok").await;
        is_ended(silent).await;
    }

    #[tokio::test]
    async fn an_answer_that_grows_is_not_cut_off_for_one_more() {
        let at = start().await;
        let mut growing = ask(at, "/never").await;
        hear(&mut growing, "begun").await;
        for _ in 0..4 {
            hear(&mut ask(at, "/").await, "ok").await;
        }
        let ends = timeout(LIMITS.taking * 2, growing.read_u8()).await;
        assert!(ends.is_err(), "nothing more comes, and it does not end: {ends:?}");
    }

    #[tokio::test]
    async fn a_reader_for_whom_too_much_waits_is_given_up() {
        let (feed, body) = Bytes::growing(2);
        assert_eq!(
            [feed.send("a"), feed.send("b"), feed.send("c")].map(|sent| sent.is_ok()),
            [true, true, false]
        );
        drop(body);
        timeout(PATIENCE, feed.left()).await.expect("it has left");
    }
}
