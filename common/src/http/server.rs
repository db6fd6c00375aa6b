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

/// What a listener grants.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Connections at once. Where one more comes, the oldest that has asked nothing yet makes room, else the oldest that waits for its next
    /// request, else the oldest of all.
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
                make_room(&mut connections, limits.connections);
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

/// For one more. They are in the order in which they came.
fn make_room(connections: &mut Vec<Open>, most: usize) {
    connections.retain(|connection| !connection.task.is_finished());
    if connections.len() >= most {
        let first = |is: fn(&Use) -> bool| connections.iter().position(|connection| is(&connection.use_));
        let silent = first(|of| !of.has_asked.load(Ordering::Relaxed));
        let oldest = silent.or_else(|| first(|of| of.open.load(Ordering::Relaxed) == 0)).unwrap_or(0);
        connections.remove(oldest).task.abort();
    }
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
