//! `fleet-rank eval`: how well a model predicts texts, which are read, tokenised and joined as training reads them; of rows of instructions their
//! answers, with the template and the masks of training.

use crate::host_model::read_weights;
use crate::logits::device_of;
use fleet_checkpoint::ModelDir;
use fleet_common::events::Level;
use fleet_common::job::{ChatTemplate, Job, of_data};
use fleet_common::model::Positions;
use fleet_cpu::{CpuExecutor, Network, Storage, workers};
use fleet_data::chat::CHAT_TEMPLATE;
use fleet_data::{DataFiles, Note, Stream, TokenCache, Windows, holds_rows};
use fleet_learn::zeros::{Part, zeros};
use fleet_learn::{Error, Executor, HostWeights, IGNORED, NextToken, Objective, Result, Tally, TokenBatch};
use fleet_torch::{FlatWeights, Numbers, TorchExecutor};
use half::bf16;
use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::time::{Duration, Instant};
use tch::Device;

/// Windows are no longer than this where nobody says how long.
const WINDOW: usize = 2048;
/// Longer ones are a slip of the finger.
const WINDOW_MAX: usize = 1 << 20;
/// Between two lines of progress.
const TOLD_EVERY: Duration = Duration::from_millis(250);

/// What to evaluate, and how.
pub struct Wanted {
    pub model: PathBuf,
    /// What changes it, as PEFT writes it.
    pub adapters: Vec<PathBuf>,
    pub data: Vec<PathBuf>,
    /// Settings of `[data]`, as `key=value`.
    pub sets: Vec<String>,
    /// auto, cpu, cuda.
    pub device: String,
    pub bf16: bool,
    /// Tokens of a window.
    pub window: Option<usize>,
    /// Windows that are computed at once.
    pub batch: usize,
}

/// How well the model predicts.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Evaluation {
    /// Nats per predicted token.
    pub loss: f64,
    pub perplexity: f64,
    /// Share of the predicted tokens that the model finds likelier than any other.
    pub accuracy: f64,
    /// Of the text that is in the tokens, ends of documents included.
    pub bits_per_byte: f64,
    /// Predicted ones: all of a window but its first; of rows those of the answers.
    pub tokens: u64,
    /// Of the text that is in the tokens.
    pub bytes: u64,
    /// Documents, or rows.
    pub documents: u64,
    /// Windows, or sequences of rows.
    pub windows: u64,
    pub max_seq_len: usize,
    /// The data are rows of instructions.
    pub rows: bool,
    pub device: String,
    pub seconds: f64,
}

pub fn evaluate(wanted: &Wanted) -> Result<Evaluation> {
    let began = Instant::now();
    let here = std::env::current_dir()
        .map_err(|e| Error::Environment(format!("there is no directory to work in: {e}")))?;
    let input = |e: &dyn std::fmt::Display| Error::Input(e.to_string());
    let job =
        |is_rows| of_data(&wanted.model, &wanted.data, &wanted.sets, &here, is_rows).map_err(|e| input(&e));
    let of_rows = job(true)?;
    let is_rows = holds_rows(&of_rows);
    let job = if is_rows { of_rows } else { job(false)? };
    let (model, flat) = read_weights(&wanted.model, &wanted.adapters)?;
    let window = window(wanted, &model)?;
    let device = device_of(&wanted.device)?;
    let data = match is_rows {
        true => Told::rows(job, wanted, window)?,
        false => Told::text(&job, wanted, &model, window)?,
    };
    let mut progress = Progress::new(data.tokens);
    let batches = data.batches(wanted.batch);
    let positions = is_rows.then_some(window);
    let sums = match (device, wanted.bf16) {
        (Device::Cpu, false) => {
            on_cpu::<f32>(&model, HostWeights::flat(&flat, &[]), positions, batches, &mut progress)?
        }
        (Device::Cpu, true) => {
            let mut copy: Vec<bf16> = zeros(flat.len(), Part::Weights)?;
            fleet_kernels::convert(&flat, &mut copy);
            on_cpu::<bf16>(&model, HostWeights::flat(&flat, &copy), positions, batches, &mut progress)?
        }
        (device, bf16) => {
            let numbers = if bf16 { Numbers::BF16_MIXED } else { Numbers::FP32 };
            on_torch(&model, &flat, (device, numbers), batches, &mut progress)?
        }
    };
    progress.clear();
    let loss = sums.loss / sums.tokens as f64;
    if !loss.is_finite() {
        return Err(Error::Input(format!(
            "{}: the model computes NaN or infinite logits for these data; its weights cannot be used{}",
            wanted.model.display(),
            if wanted.bf16 { ", or not in bf16-mixed" } else { "" }
        )));
    }
    Ok(Evaluation {
        loss,
        perplexity: loss.exp(),
        accuracy: sums.hits as f64 / sums.tokens as f64,
        bits_per_byte: loss / std::f64::consts::LN_2 * data.said as f64 / data.bytes.max(1) as f64,
        tokens: sums.tokens,
        bytes: data.bytes,
        documents: data.documents,
        windows: data.windows,
        max_seq_len: window,
        rows: is_rows,
        device: if device == Device::Cpu { "cpu".into() } else { "cuda".into() },
        seconds: began.elapsed().as_secs_f64(),
    })
}

/// The data in tokens.
struct Told {
    tokenised: Tokenised,
    /// Tokens that are predicted.
    tokens: u64,
    /// Tokens that say the bytes.
    said: u64,
    bytes: u64,
    documents: u64,
    windows: u64,
}

enum Tokenised {
    /// Documents one after the other, in windows of so many tokens.
    Text { ids: Vec<i64>, window: usize },
    /// The cache that training has of rows, of which nothing is held out.
    Rows(Box<TokenCache>),
}

impl Told {
    fn text(job: &Job, wanted: &Wanted, model: &ModelDir, window: usize) -> Result<Told> {
        let stream = Stream::read(job, &tell)?;
        let vocab = model.decoder.vocab_size;
        if let Some(id) = stream.ids.iter().find(|id| **id as usize >= vocab) {
            return Err(Error::Input(format!(
                "{}: its tokenizer gives token {id}, and the model knows {vocab}; put the model's own tokenizer.json there, or make the model larger with transformers: \
                 resize_token_embeddings",
                wanted.model.display()
            )));
        }
        if stream.ids.len() < 2 {
            return Err(Error::Input(format!(
                "the data have {} token, and at least two are needed, one to predict the other; add text",
                stream.ids.len()
            )));
        }
        let ids: Vec<i64> = stream.ids.iter().map(|id| i64::from(*id)).collect();
        Ok(Told {
            tokens: predicted(ids.len(), window),
            said: ids.len() as u64,
            bytes: stream.bytes,
            documents: stream.documents,
            windows: ids.chunks(window).filter(|window| window.len() > 1).count() as u64,
            tokenised: Tokenised::Text { ids, window },
        })
    }

    fn rows(mut job: Job, wanted: &Wanted, window: usize) -> Result<Told> {
        let files = DataFiles::find(&job, &tell)?;
        let room = tempfile::tempdir()
            .map_err(|e| Error::Environment(format!("there is no room for the tokens of the rows: {e}")))?;
        (job.output_dir, job.max_seq_len) = (room.path().to_owned(), window as u32);
        job.data.validation_fraction = 0.0;
        if let Some(rows) = &mut job.data.rows {
            // With the last one that an adapter brings the model was trained.
            let brought = wanted.adapters.iter().rev().map(|dir| dir.join(CHAT_TEMPLATE));
            let brought = brought.filter(|file| file.is_file()).map(ChatTemplate::File).next();
            rows.chat_template = rows.chat_template.take().or(brought);
        }
        // Its files stay mapped when the directory is gone.
        let (cache, _) = TokenCache::build_or_open(&job, &files, &tell)?;
        let meta = cache.meta();
        let report = meta.rows.as_ref().map(|rows| &rows.report);
        let (tokens, documents) = report.map_or((0, 0), |report| (report.loss_tokens, report.examples));
        Ok(Told {
            tokens,
            said: tokens,
            bytes: (meta.validation_bytes_per_token * tokens as f64).round() as u64,
            documents,
            windows: cache.train().len(),
            tokenised: Tokenised::Rows(Box::new(cache)),
        })
    }

    fn batches(&self, batch: usize) -> Box<dyn Iterator<Item = TokenBatch> + '_> {
        match &self.tokenised {
            Tokenised::Text { ids, window } => Box::new(batches(ids, *window, batch)),
            Tokenised::Rows(cache) => Box::new(of_rows(cache.train(), batch as u64)),
        }
    }
}

/// Tokens of a window: as asked, else as many as the model was made for, up to a limit.
fn window(wanted: &Wanted, model: &ModelDir) -> Result<usize> {
    let decoder = &model.decoder;
    let positions = decoder.max_positions;
    let window = wanted.window.unwrap_or(positions.min(WINDOW));
    if !(2..=WINDOW_MAX).contains(&window) {
        return Err(Error::Input(format!("--max-seq-len is {window}; give a number from 2 to {WINDOW_MAX}")));
    }
    if matches!(decoder.positions, Positions::Learned { .. }) && window > positions {
        return Err(Error::Input(format!(
            "--max-seq-len is {window} and the model has learned {positions} positions; give at most {positions}"
        )));
    }
    Ok(window)
}

fn tell(note: Note) {
    match note.level {
        Level::Info if std::io::stderr().is_terminal() => eprintln!("{}", note.line),
        Level::Info => {}
        _ => eprintln!("warning: {}", note.line),
    }
}

/// How many tokens of a stream are predicted, in windows that follow each other: all of a window but its first.
fn predicted(tokens: usize, window: usize) -> u64 {
    (tokens / window * (window - 1) + (tokens % window).saturating_sub(1)) as u64
}

/// Windows of one length, in which each token predicts the next. They are whole, as transformers would get them: some rotary embeddings
/// depend on how long a sequence is.
fn whole(ids: &[i64], len: usize) -> TokenBatch {
    let targets = ids.chunks(len).flat_map(|window| window[1..].iter().copied().chain([IGNORED]));
    TokenBatch { ids: ids.to_vec(), targets: targets.collect(), seq: len, ..Default::default() }
}

/// Batches of full windows, then what is left over.
fn batches(ids: &[i64], window: usize, batch: usize) -> impl Iterator<Item = TokenBatch> {
    let (full, rest) = ids.split_at(ids.len() / window * window);
    let rest = (rest.len() > 1).then(|| whole(rest, rest.len()));
    full.chunks(window * batch).map(move |ids| whole(ids, window)).chain(rest)
}

/// Batches of examples, as training evaluates them.
fn of_rows(items: &Windows, batch: u64) -> impl Iterator<Item = TokenBatch> {
    let first = (0..items.len()).step_by(batch.max(1) as usize);
    first.map(move |first| NextToken.batch(items, &mut (first..items.len().min(first + batch))))
}

/// `positions`: what sequences are made for, where that is not their length.
fn on_cpu<E: Storage>(
    model: &ModelDir,
    mut weights: HostWeights<E>,
    positions: Option<usize>,
    batches: impl Iterator<Item = TokenBatch>,
    progress: &mut Progress,
) -> Result<Tally> {
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get() as u32);
    let workers = workers(threads)?;
    let made = |seq| {
        let network = Network::new(model.decoder.clone(), model.wiring(), seq);
        CpuExecutor::<E>::new(network, workers.clone())
    };
    let (mut tally, mut seq, mut executor) = (Tally::default(), 0, made(1));
    for batch in batches {
        let wanted = positions.unwrap_or(batch.seq);
        if wanted != seq {
            (seq, executor) = (wanted, made(wanted));
        }
        tally.add(executor.evaluate(&mut weights, &batch.view())?);
        progress.tell(&tally);
    }
    Ok(tally)
}

fn on_torch(
    model: &ModelDir,
    flat: &[f32],
    (device, numbers): (Device, Numbers),
    batches: impl Iterator<Item = TokenBatch>,
    progress: &mut Progress,
) -> Result<Tally> {
    let mut weights = FlatWeights::new(model.layout.len, device, numbers)?;
    weights.set(0, flat).and_then(|()| weights.refresh())?;
    let mut executor = TorchExecutor::new(model.decoder.clone(), model.wiring(), device, numbers);
    let mut tally = Tally::default();
    for batch in batches {
        tally.add(executor.evaluate(&mut weights, &batch.view())?);
        progress.tell(&tally);
    }
    Ok(tally)
}

/// One line on a terminal that is written over, and nothing elsewhere.
struct Progress {
    total: u64,
    shows: bool,
    told: Option<Instant>,
}

impl Progress {
    fn new(total: u64) -> Progress {
        Progress { total, shows: std::io::stderr().is_terminal(), told: None }
    }

    fn tell(&mut self, sums: &Tally) {
        if !self.shows || self.told.is_some_and(|told| told.elapsed() < TOLD_EVERY) {
            return;
        }
        self.told = Some(Instant::now());
        let share = 100 * sums.tokens / self.total.max(1);
        eprint!(
            "\r\x1b[K{share}% of {} tokens, loss {:.4}",
            self.total,
            sums.loss / sums.tokens.max(1) as f64
        );
        let _ = std::io::stderr().flush(); // progress that is not seen is no error
    }

    fn clear(&self) {
        if self.told.is_some() {
            eprint!("\r\x1b[K");
        }
    }
}

impl Evaluation {
    /// As people read it.
    pub fn table(&self) -> String {
        let (windows, documents) = if self.rows { ("sequences", "rows") } else { ("windows", "documents") };
        let rest = format!(
            "{} in {} {windows} of at most {}, of {} {documents}",
            self.tokens, self.windows, self.max_seq_len, self.documents
        );
        let rows = [
            ("loss", format!("{:.6} nats per token", self.loss)),
            ("perplexity", format!("{:.4}", self.perplexity)),
            ("accuracy", format!("{:.6}", self.accuracy)),
            ("bits per byte", format!("{:.6}", self.bits_per_byte)),
            ("tokens", rest),
            ("bytes", self.bytes.to_string()),
        ];
        rows.map(|(name, value)| format!("{name:<14} {value}")).join("\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_follow_each_other_and_the_rest_is_a_shorter_one() {
        let ids: Vec<i64> = (0..11).collect();
        for (window, batch, want) in
            [(4, 2, vec![6, 2]), (4, 1, vec![3, 3, 2]), (5, 8, vec![8]), (20, 1, vec![10]), (10, 3, vec![9])]
        {
            let counted = |batch: TokenBatch| batch.view().tokens() as usize;
            let counts: Vec<usize> = batches(&ids, window, batch).map(counted).collect();
            assert_eq!(counts, want, "{window} {batch}");
            assert_eq!(predicted(ids.len(), window), counts.iter().sum::<usize>() as u64);
        }
        let last = batches(&ids, 4, 2).last().unwrap();
        assert_eq!((last.ids, last.targets, last.seq), (vec![8, 9, 10], vec![9, 10, IGNORED], 3));
    }
}
