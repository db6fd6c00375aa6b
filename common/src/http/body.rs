//! The body of a response: bytes at once, or pieces as they come.

use bytes::Bytes;
use hyper::body::{Body as HttpBody, Frame, SizeHint};
use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};
use tokio::sync::mpsc::{Receiver, Sender, channel};

pub enum Body {
    Whole(Option<Bytes>),
    Pieces(Receiver<Bytes>),
}

/// Where the pieces of a body come from. Dropped, the body is over.
#[derive(Clone, Debug)]
pub struct Feed(Sender<Bytes>);

/// Whoever reads a body has left, or does not read: nothing more is to be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Left;

impl Body {
    /// A body that grows while it is read. A reader for whom more than `pieces` wait is given up.
    pub fn growing(pieces: usize) -> (Feed, Body) {
        let (sender, receiver) = channel(pieces);
        (Feed(sender), Body::Pieces(receiver))
    }
}

impl<T: Into<Bytes>> From<T> for Body {
    fn from(bytes: T) -> Body {
        Body::Whole(Some(bytes.into()))
    }
}

impl Feed {
    pub fn send(&self, piece: impl Into<Bytes>) -> Result<(), Left> {
        self.0.try_send(piece.into()).map_err(|_| Left)
    }

    /// The same of a piece that may wait until the reader has room for it.
    pub async fn give(&self, piece: impl Into<Bytes>) -> Result<(), Left> {
        self.0.send(piece.into()).await.map_err(|_| Left)
    }

    /// Returns when the reader has left.
    pub async fn left(&self) {
        self.0.closed().await;
    }
}

impl HttpBody for Body {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        match self.get_mut() {
            Body::Whole(bytes) => Poll::Ready(bytes.take().map(|bytes| Ok(Frame::data(bytes)))),
            Body::Pieces(pieces) => pieces.poll_recv(context).map(|piece| Some(Ok(Frame::data(piece?)))),
        }
    }

    fn is_end_stream(&self) -> bool {
        matches!(self, Body::Whole(None))
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Body::Whole(bytes) => SizeHint::with_exact(bytes.as_ref().map_or(0, Bytes::len) as u64),
            Body::Pieces(_) => SizeHint::default(),
        }
    }
}
