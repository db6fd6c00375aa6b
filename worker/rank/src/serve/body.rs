//! The body of a response: bytes at once, or events (SSE) as the model writes.

use super::answer::Head;
use super::queue::{Told, is_whole};
use bytes::Bytes;
use hyper::body::{Body as HttpBody, Frame, SizeHint};
use serde_json::Value;
use std::collections::VecDeque;
use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};
use tokio::sync::mpsc::Receiver;

pub enum Body {
    Whole(Option<Bytes>),
    Events(Events),
}

/// A text as it comes. Dropped with its connection, which ends the generation.
pub struct Events {
    told: Receiver<Told>,
    head: Head,
    /// Tell the number of tokens at the end.
    usage: bool,
    /// What is to be sent next.
    ready: VecDeque<Bytes>,
    is_over: bool,
}

impl Events {
    pub fn new(told: Receiver<Told>, head: Head, usage: bool) -> Events {
        let ready = head.begin().iter().map(event).collect();
        Events { told, head, usage, ready, is_over: false }
    }

    fn hear(&mut self, told: Option<Told>) {
        match told {
            Some(Told::Begun) => {}
            Some(Told::Piece(text)) => self.ready.push_back(event(&self.head.piece(&text))),
            Some(Told::Done(generated)) if is_whole(&generated) => {
                self.ready.push_back(event(&self.head.end(generated.end)));
                if self.usage {
                    self.ready.push_back(event(&self.head.usage(&generated)));
                }
                self.ready.push_back(Bytes::from_static(b"data: [DONE]\n\n"));
                self.is_over = true;
            }
            Some(Told::Refused(refusal)) => {
                self.ready.push_back(event(&refusal.json()));
                self.is_over = true;
            }
            // This client was too slow.
            Some(Told::Done(_)) | None => self.is_over = true,
        }
    }
}

fn event(value: &Value) -> Bytes {
    format!("data: {value}\n\n").into()
}

impl HttpBody for Body {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let events = match self.get_mut() {
            Body::Whole(bytes) => return Poll::Ready(bytes.take().map(|bytes| Ok(Frame::data(bytes)))),
            Body::Events(events) => events,
        };
        loop {
            if let Some(bytes) = events.ready.pop_front() {
                return Poll::Ready(Some(Ok(Frame::data(bytes))));
            }
            if events.is_over {
                return Poll::Ready(None);
            }
            match events.told.poll_recv(context) {
                Poll::Ready(told) => events.hear(told),
                Poll::Pending => return Poll::Pending,
            }
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Body::Whole(bytes) => SizeHint::with_exact(bytes.as_ref().map_or(0, Bytes::len) as u64),
            Body::Events(_) => SizeHint::default(),
        }
    }

    fn is_end_stream(&self) -> bool {
        matches!(self, Body::Whole(None))
    }
}
