//! Requests in their order, and the thread that answers one after the other: it has the model.

use super::Refusal;
use super::api::{Asked, Question};
use crate::generate::{Ask, Chat, End, Generated, Sampling, Settings, TextModel};
use fleet_data::chat::Template;
use fleet_learn::Error;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use time::OffsetDateTime;
use tokio::sync::mpsc;

/// Requests that wait. More are turned away at once, so that a client can ask elsewhere.
const WAITING_MAX: usize = 16;

/// Pieces of a text that its client has not taken yet. One that is further behind is given up: others wait.
const PIECES_MAX: usize = 4096;

/// For the token that is computed when the server is told to end.
const END_TIME: Duration = Duration::from_secs(5);

/// A model that can be asked by a name.
pub struct Served {
    pub name: String,
    pub template: Option<Template>,
}

/// What its client hears of a request.
#[derive(Debug)]
pub enum Told {
    /// It can be answered.
    Begun,
    Piece(String),
    Done(Generated),
    Refused(Refusal),
}

/// A request that waits. Nobody answers it once its client is gone.
struct Order {
    asked: Asked,
    /// The number of the variant.
    variant: usize,
    seed: u64,
    to: mpsc::Sender<Told>,
}

pub struct Queue {
    orders: SyncSender<Order>,
    thread: JoinHandle<()>,
}

impl Queue {
    /// Of the variants of `model`.
    pub fn start(model: TextModel, served: Vec<Served>) -> Result<Queue, Error> {
        let (orders, waiting) = sync_channel(WAITING_MAX);
        let work = move || answer_all(model, &served, &waiting);
        let thread = std::thread::Builder::new().name("model".into()).spawn(work);
        let thread =
            thread.map_err(|e| Error::Environment(format!("no thread can be started for the model: {e}")))?;
        Ok(Queue { orders, thread })
    }

    /// Lines a request up. What becomes of it comes by the receiver; whoever drops that ends it.
    pub fn ask(&self, asked: Asked, variant: usize, seed: u64) -> Result<mpsc::Receiver<Told>, Refusal> {
        let (to, told) = mpsc::channel(PIECES_MAX);
        match self.orders.try_send(Order { asked, variant, seed, to }) {
            Ok(()) => Ok(told),
            Err(TrySendError::Full(_)) => {
                let message = format!("{WAITING_MAX} requests wait already; try again later");
                Err(Refusal::new(503, message).coded("overloaded"))
            }
            Err(TrySendError::Disconnected(_)) => {
                Err(Refusal::new(500, "the model is gone; start fleet serve again"))
            }
        }
    }

    /// Waits until the model stands still, for some seconds: a long prompt is computed at once, and ends with the process.
    pub fn end(self) {
        drop(self.orders);
        let begun = Instant::now();
        while !self.thread.is_finished() && begun.elapsed() < END_TIME {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

fn answer_all(mut model: TextModel, served: &[Served], waiting: &Receiver<Order>) {
    for order in waiting.iter().filter(|order| !order.to.is_closed()) {
        let began = Instant::now();
        let name = &served[order.variant].name;
        let answer = || answer(&mut model, &served[order.variant], &order);
        let failed =
            |_| Err(Refusal::new(500, "the model failed at this request; see what fleet serve says"));
        let told = catch_unwind(AssertUnwindSafe(answer)).unwrap_or_else(failed);
        let seconds = began.elapsed().as_secs_f64();
        match &told {
            Ok(Generated { prompt_tokens, new_tokens, end, .. }) => {
                let end = serde_json::json!(end);
                eprintln!("{name}: {prompt_tokens} + {new_tokens} tokens in {seconds:.2} s, {end}");
            }
            Err(refusal) => eprintln!("{name}: refused: {}", refusal.message),
        }
        // Nobody listens any more, or has not for long.
        let _ = order.to.try_send(told.map_or_else(Told::Refused, Told::Done));
    }
}

fn answer(model: &mut TextModel, served: &Served, order: &Order) -> Result<Generated, Refusal> {
    let Order { asked, variant, seed, to } = order;
    let mine = |error: Error| Refusal::new(500, error.to_string());
    model.choose(*variant).map_err(mine)?;
    let ask = match (&asked.question, &served.template) {
        (Question::Text(text), _) => Ask::Text(text),
        (Question::Chat(conversation), Some(template)) => {
            Ask::Chat(Chat { conversation, template, now: OffsetDateTime::now_utc() })
        }
        (Question::Chat(_), None) => {
            let message = format!(
                "the model {} has no chat template: ask /v1/completions, or start fleet serve with --chat-template",
                served.name
            );
            return Err(Refusal::new(400, message).coded("no_chat_template"));
        }
    };
    let param = if matches!(ask, Ask::Text(_)) { "prompt" } else { "messages" };
    let prompt = model.prompt(&ask).map_err(|error| Refusal::of(param, error.to_string()))?;
    model
        .check_room(&prompt)
        .map_err(|error| Refusal::of(param, error.to_string()).coded("context_length_exceeded"))?;
    let settings = Settings {
        max_new_tokens: asked.max_tokens,
        sampling: Sampling {
            temperature: asked.temperature,
            top_k: asked.top_k,
            top_p: asked.top_p,
            seed: *seed,
        },
        stop: asked.stop.clone(),
    };
    let is_heard = to.try_send(Told::Begun).is_ok();
    let mut emit = |piece: &str| match asked.stream && !piece.is_empty() {
        true => to.try_send(Told::Piece(piece.to_owned())).is_ok(),
        false => !to.is_closed(),
    };
    match is_heard {
        true => model.write(&prompt, &settings, &mut emit).map_err(mine),
        false => Err(Refusal::new(499, "its client has hung up")),
    }
}

/// Whether a client was told all of a text.
pub fn is_whole(generated: &Generated) -> bool {
    generated.end != End::Unread
}
