//! `fleet-rank eval`: how well a model predicts texts, which are read, tokenised and joined as training reads them.

use crate::error::{Error, Result};
use crate::stored;
use fleet_checkpoint::ModelDir;
use fleet_common::events::Level;
use fleet_common::job::{Job, of_data};
use fleet_common::model::Positions;
use fleet_cpu::{Batch, Network, Products, Storage, Weights, Workers, Workspace};
use fleet_data::{Note, Stream};
use fleet_kernels::IGNORED;
use fleet_torch::{Executor, Memory, Numbers};
use half::bf16;
use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::time::{Duration, Instant};
use tch::{Device, Tensor};

/// Windows are no longer than this where nobody says how long.
const WINDOW: usize = 2048;
/// Longer ones are a slip of the finger.
const WINDOW_MAX: usize = 1 << 20;
/// Between two lines of progress.
const TOLD_EVERY: Duration = Duration::from_millis(250);

/// What to evaluate, and how.
pub struct Wanted {
    pub model: PathBuf,
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
    /// Predicted ones: all of a window but its first.
    pub tokens: u64,
    /// Of the text that is in the tokens.
    pub bytes: u64,
    pub documents: u64,
    pub windows: u64,
    pub max_seq_len: usize,
    pub device: String,
    pub seconds: f64,
}

/// Sums over what was predicted.
#[derive(Clone, Copy, Debug, Default)]
struct Sums {
    loss: f64,
    tokens: u64,
    hits: u64,
}

pub fn evaluate(wanted: &Wanted) -> Result<Evaluation> {
    let began = Instant::now();
    let here = std::env::current_dir()
        .map_err(|e| Error::Environment(format!("there is no directory to work in: {e}")))?;
    let input = |e: &dyn std::fmt::Display| Error::Input(e.to_string());
    let job = of_data(&wanted.model, &wanted.data, &wanted.sets, &here).map_err(|e| input(&e))?;
    let model = stored::open(&wanted.model)?;
    let window = window(wanted, &model)?;
    let device = stored::device(&wanted.device)?;
    let stream = read(&job)?;
    let vocab = model.decoder.vocab_size;
    if let Some(id) = stream.ids.iter().find(|id| **id as usize >= vocab) {
        return Err(Error::Input(format!(
            "{}: its tokenizer gives token {id}, and the model knows {vocab}; put the model's own tokenizer.json there",
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
    let flat = stored::weights(&wanted.model, &model)?;
    let total = predicted(ids.len(), window);
    let mut progress = Progress::new(total);
    let sums = match (device, wanted.bf16) {
        (Device::Cpu, false) => on_cpu::<f32>(&model, &flat, &[], &ids, window, wanted.batch, &mut progress)?,
        (Device::Cpu, true) => {
            let copy: Vec<bf16> = flat.iter().map(|x| bf16::from_f32(*x)).collect();
            on_cpu::<bf16>(&model, &flat, &copy, &ids, window, wanted.batch, &mut progress)?
        }
        (device, bf16) => {
            let numbers = if bf16 { Numbers::BF16_MIXED } else { Numbers::FP32 };
            on_torch(&model, &flat, (device, numbers), &ids, window, wanted.batch, &mut progress)?
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
        bits_per_byte: loss / std::f64::consts::LN_2 * ids.len() as f64 / stream.bytes.max(1) as f64,
        tokens: sums.tokens,
        bytes: stream.bytes,
        documents: stream.documents,
        windows: ids.chunks(window).filter(|window| window.len() > 1).count() as u64,
        max_seq_len: window,
        device: if device == Device::Cpu { "cpu".into() } else { "cuda".into() },
        seconds: began.elapsed().as_secs_f64(),
    })
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

fn read(job: &Job) -> Result<Stream> {
    let shows = std::io::stderr().is_terminal();
    let tell = |note: Note| match note.level {
        Level::Info if shows => eprintln!("{}", note.line),
        Level::Info => {}
        _ => eprintln!("warning: {}", note.line),
    };
    Ok(Stream::read(job, &tell)?)
}

/// How many tokens of a stream are predicted, in windows that follow each other: all of a window but its first.
fn predicted(tokens: usize, window: usize) -> u64 {
    (tokens / window * (window - 1) + (tokens % window).saturating_sub(1)) as u64
}

/// Windows of one length, and for each token the next one of its window. They are whole, as transformers would get them: some rotary
/// embeddings depend on how long a sequence is.
struct Windows {
    ids: Vec<i64>,
    targets: Vec<i64>,
    len: usize,
}

impl Windows {
    fn new(ids: &[i64], len: usize) -> Windows {
        let targets = ids.chunks(len).flat_map(|window| window[1..].iter().copied().chain([IGNORED]));
        Windows { ids: ids.to_vec(), targets: targets.collect(), len }
    }

    fn view(&self) -> Batch<'_> {
        Batch { ids: &self.ids, targets: &self.targets, seq: self.len }
    }
}

/// Batches of full windows, then what is left over.
fn batches(ids: &[i64], window: usize, batch: usize) -> impl Iterator<Item = Windows> {
    let (full, rest) = ids.split_at(ids.len() / window * window);
    let rest = (rest.len() > 1).then(|| Windows::new(rest, rest.len()));
    full.chunks(window * batch).map(move |ids| Windows::new(ids, window)).chain(rest)
}

fn on_cpu<E: Storage>(
    model: &ModelDir,
    master: &[f32],
    copy: &[bf16],
    ids: &[i64],
    window: usize,
    batch: usize,
    progress: &mut Progress,
) -> Result<Sums> {
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get() as u32);
    let workers = Workers::new(threads)
        .map_err(|e| Error::Environment(format!("cannot start {threads} threads: {e}")))?;
    let (mut products, mut work) = (Products::new(workers), Workspace::new());
    let weights = Weights::<E>::new(master, copy);
    let mut sums = Sums::default();
    let mut network: Option<(usize, Network)> = None;
    for batch in batches(ids, window, batch) {
        let batch = batch.view();
        if network.as_ref().is_none_or(|(seq, _)| *seq != batch.seq) {
            let (decoder, layout) = (model.decoder.clone(), model.layout.clone());
            network = Some((batch.seq, Network::new(decoder, layout, batch.seq)));
        }
        let Some((_, network)) = &network else { unreachable!("made above") };
        let score = network.score(weights, batch, &mut products, &mut work);
        sums.loss += score.loss.sum;
        sums.tokens += score.loss.tokens;
        sums.hits += score.hits;
        progress.tell(&sums);
    }
    Ok(sums)
}

fn on_torch(
    model: &ModelDir,
    flat: &[f32],
    (device, numbers): (Device, Numbers),
    ids: &[i64],
    window: usize,
    batch: usize,
    progress: &mut Progress,
) -> Result<Sums> {
    let failed = |error: fleet_torch::Error| {
        Error::Environment(format!(
            "the model cannot be computed on {device:?}: {error}; give a smaller --batch-size"
        ))
    };
    let mut executor = Executor::new(model.decoder.clone(), model.layout.clone(), device, numbers);
    let mut memory = Memory::new(&executor.network, false).map_err(failed)?;
    memory.set(flat).map_err(failed)?;
    let mut sums = Sums::default();
    for batch in batches(ids, window, batch) {
        let batch = batch.view();
        let of = |ids: &[i64]| -> std::result::Result<Tensor, fleet_torch::Error> {
            Ok(Tensor::f_from_slice(ids)?.f_view([-1, batch.seq as i64])?.f_to_device(device)?)
        };
        let both = (&of(batch.ids).map_err(failed)?, &of(batch.targets).map_err(failed)?);
        let (loss, hits) = executor.score(&memory, both).map_err(failed)?;
        sums.loss += loss;
        sums.tokens += batch.targets.iter().filter(|target| **target != IGNORED).count() as u64;
        sums.hits += hits;
        progress.tell(&sums);
    }
    Ok(sums)
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

    fn tell(&mut self, sums: &Sums) {
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
        let rest = format!(
            "{} in {} windows of at most {}, of {} documents",
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
            let counted = |batch: Windows| batch.targets.iter().filter(|target| **target != IGNORED).count();
            let counts: Vec<usize> = batches(&ids, window, batch).map(counted).collect();
            assert_eq!(counts, want, "{window} {batch}");
            assert_eq!(predicted(ids.len(), window), counts.iter().sum::<usize>() as u64);
        }
        let last = batches(&ids, 4, 2).last().unwrap();
        assert_eq!((last.ids, last.targets, last.len), (vec![8, 9, 10], vec![9, 10, IGNORED], 3));
    }
}
