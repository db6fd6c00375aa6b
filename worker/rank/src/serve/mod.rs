//! `fleet-rank serve`: a model behind OpenAI's HTTP interface, for trying what was trained with any client. One request after the other is
//! answered, by this machine's CPU. It is no server for many users: there are others for that.
//!
//! ```text
//! connection ── Asked ──▶ queue (bounded) ──▶ one thread with the model ── pieces ──▶ the connection, which ends it by going
//!  (hyper)      (api.rs)     (queue.rs)            (generate/)                          (body.rs)
//! ```

mod answer;
mod api;
mod body;
mod http;
mod queue;
mod refusal;

use refusal::Refusal;

use crate::generate::TextModel;
use fleet_common::job::Quantization;
use fleet_learn::{Error, Result};
use http::Shared;
use queue::{Queue, Served};
use std::io::Write;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{SystemTime, UNIX_EPOCH};
use time::OffsetDateTime;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};

/// What to serve, and where.
#[derive(Clone, Debug)]
pub struct Wanted {
    pub model: PathBuf,
    /// The name by which the model is asked.
    pub name: String,
    /// Change the model, as it is served under its name.
    pub adapters: Vec<PathBuf>,
    /// Models of their own: the former with one adapter more, by its name.
    pub named: Vec<(String, PathBuf)>,
    /// The chat template by its name or file, where it is not the models' own.
    pub chat_template: Option<String>,
    pub listen: SocketAddr,
    pub threads: u32,
    /// Of matrices that the files have whole.
    pub quantization: Option<Quantization>,
}

/// Serves until it is told to end by SIGINT or SIGTERM. Says on stdout where it listens.
pub fn serve(wanted: &Wanted) -> Result<()> {
    let mut names = vec![wanted.name.clone()];
    names.extend(wanted.named.iter().map(|(name, _)| name.clone()));
    if let Some(name) = names.iter().enumerate().find(|(at, name)| names[..*at].contains(name)) {
        return Err(Error::Input(format!("two models have the name {}; give each its own", name.1)));
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|e| Error::Environment(format!("the runtime does not start: {e}")))?;
    // A port that is taken is told before the model is read.
    let listener = runtime.block_on(TcpListener::bind(wanted.listen)).map_err(|e| {
        let listen = wanted.listen;
        Error::Environment(format!(
            "cannot listen on {listen}: {e}; stop what uses that port or choose another with --port"
        ))
    })?;
    let mut model = TextModel::open(&wanted.model, &wanted.adapters, wanted.quantization, wanted.threads)?;
    for (_, adapter) in &wanted.named {
        model.add(&[&wanted.adapters[..], std::slice::from_ref(adapter)].concat())?;
    }
    let served = names.iter().enumerate();
    let served = served.map(|(variant, name)| served_as(&model, variant, name, wanted));
    let served = served.collect::<Result<Vec<Served>>>()?;
    let context = model.context();
    let shared = Arc::new(Shared {
        queue: Queue::start(model, served)?,
        names,
        context,
        only_local: wanted.listen.ip().is_loopback(),
        started: SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs(),
        asked: AtomicU64::new(0),
    });
    let ended = runtime.block_on(until_told(shared.clone(), listener));
    // With the connections their requests are gone, so the model stops at its next token.
    drop(runtime);
    if let Some(shared) = Arc::into_inner(shared) {
        shared.queue.end();
    }
    ended
}

async fn until_told(shared: Arc<Shared>, listener: TcpListener) -> Result<()> {
    let cannot = |e: std::io::Error| Error::Environment(format!("cannot serve: {e}"));
    let mut interrupt = signal(SignalKind::interrupt()).map_err(cannot)?;
    let mut terminate = signal(SignalKind::terminate()).map_err(cannot)?;
    let at = listener.local_addr().map_err(cannot)?;
    if !at.ip().is_loopback() {
        eprintln!("warning: whoever reaches {at} can use the model: there is no key and no encryption");
    }
    let line = format!("serving {} on http://{at}/v1", shared.names.join(", "));
    let mut out = std::io::stdout().lock();
    // Whoever started it may not listen.
    let _ = writeln!(out, "{line}").and_then(|()| out.flush());
    drop(out);
    tokio::select! {
        () = http::run(shared, listener) => {}
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
    Ok(())
}

/// With its chat template, if it has one, and what is to know of that.
fn served_as(model: &TextModel, variant: usize, name: &str, wanted: &Wanted) -> Result<Served> {
    let template = match model.template(variant, wanted.chat_template.as_deref()) {
        Ok(template) => Some(template),
        Err(error) if wanted.chat_template.is_some() => return Err(error),
        Err(_) => {
            eprintln!(
                "warning: {name} has no chat template, so /v1/chat/completions is refused; name one with --chat-template"
            );
            None
        }
    };
    let now = OffsetDateTime::now_utc();
    for misfit in template.iter().flat_map(|template| template.misfits(model.tokenizer(), now)) {
        eprintln!("warning: {name}: {misfit}");
    }
    Ok(Served { name: name.to_owned(), template })
}
