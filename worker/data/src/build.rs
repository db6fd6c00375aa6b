//! Builds a token cache of text: looks at all documents, holds some out, trains a tokenizer where none is given, tokenises, and lets the
//! directory appear whole. What a build that was killed has tokenised the next one goes on from.

use crate::blocks::Input;
use crate::cache::{FORMAT, META, Meta, TOKENIZER, TRAIN, VALIDATION};
use crate::documents::Documents;
use crate::survey::{Fate, Survey};
use crate::tokenise::{Tokenised, tokenise};
use crate::tokenizer::{Encoder, ModelIds};
use crate::windows::Width;
use crate::{Coverage, DataError, Note, blocks, splits};
use fleet_common::job::{self, Job};
use fleet_common::model::Splits;
use sha2::{Digest, Sha256};
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;
use std::sync::mpsc;

/// What is being built begins with this; no reader looks at it. It is gone on from.
const PART: &str = ".part-";
/// What earlier versions were building, from which nothing goes on.
const TEMPORARY: &str = ".tmp-";

/// Held while building below this directory of caches. Gone with its process.
pub(crate) struct Lock(#[expect(dead_code, reason = "the lock lasts as long as the open file")] File);

/// Waits for other builders, and removes what dead ones have left, but for a part of this cache.
pub(crate) fn lock(caches: &Path, cache: &str) -> Result<Lock, DataError> {
    let fail = |source| DataError::Write { path: caches.to_owned(), source };
    fs::create_dir_all(caches).map_err(fail)?;
    let file = File::create(caches.join(".lock")).map_err(fail)?;
    match file.lock() {
        Err(e) if e.kind() == io::ErrorKind::Unsupported => tracing::debug!("no file locks here: {e}"),
        other => other.map_err(fail)?,
    }
    for entry in fs::read_dir(caches).map_err(fail)? {
        let entry = entry.map_err(fail)?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let is_other = name.strip_prefix(PART).is_some_and(|part| part != cache);
        if name.starts_with(TEMPORARY) || is_other {
            fs::remove_dir_all(entry.path()).map_err(fail)?;
        }
    }
    Ok(Lock(file))
}

/// Builds `target`, replacing a damaged one. The caller holds the lock and has hashed the files.
pub(crate) fn build(
    job: &Job,
    files: &[Input],
    ids: &ModelIds,
    target: &Path,
    progress: &dyn Fn(Note),
) -> Result<(), DataError> {
    appear(target, |dir| {
        let documents = Documents::of(files, &job.data)?;
        let survey = Survey::of(&documents, job, dir)?;
        let encoder = encoder(job, &documents, &survey, ids, dir, progress)?;
        ids.check_holds(encoder.vocab_size)?;
        progress(Note::info(format!("tokenising {} documents", survey.documents)));
        let made = tokenise(&documents, &survey, &encoder, dir, SAVED_BLOCKS, progress)?;
        finish(job, &survey, &encoder, &made, dir, target)
    })
}

/// Blocks of about a megabyte after which what has been tokenised is synced, where there are so many.
const SAVED_BLOCKS: usize = 64;

fn encoder(
    job: &Job,
    documents: &Documents,
    survey: &Survey,
    ids: &ModelIds,
    dir: &Path,
    progress: &dyn Fn(Note),
) -> Result<Encoder, DataError> {
    let vocab_size = match &job.tokenizer {
        job::Tokenizer::Train { vocab_size } => *vocab_size,
        job::Tokenizer::File(path) => {
            let encoder = Encoder::open(path, ids)?;
            splits::warning(&encoder.json, ids.splits).map(Note::warning).into_iter().for_each(progress);
            return Ok(encoder);
        }
    };
    ids.check_holds(vocab_size)?;
    let path = dir.join(TOKENIZER);
    if let Some(trained) = fs::read(&path).ok().and_then(|json| Encoder::trained(json).ok()) {
        return Ok(trained);
    }
    let what = format!("training a tokenizer of {vocab_size} tokens on {} documents", survey.trained_on());
    progress(Note::info(what));
    let encoder = train(documents, survey, vocab_size, ids.splits)?;
    replace(dir, TOKENIZER, &encoder.json)?;
    Ok(encoder)
}

/// Trains a tokenizer on what the model will be trained on, once each.
fn train(
    documents: &Documents,
    survey: &Survey,
    vocab_size: u32,
    splits: Splits,
) -> Result<Encoder, DataError> {
    std::thread::scope(|scope| {
        let (sender, texts) = mpsc::sync_channel(1024);
        let reader = scope.spawn(move || {
            let mut number = 0;
            // Not on the threads of rayon, all of which wait for these texts.
            blocks::each(documents.files(), documents.reading(), 0, 0, &mut |file, block| {
                let found = documents.found(file, block)?;
                let fates = survey.fates_of(number).unwrap_or_default();
                number += 1;
                let mut trained_on =
                    found.texts.into_iter().zip(fates).filter(|(_, fate)| matches!(fate, Fate::Train(1..)));
                Ok(trained_on.all(|(text, _)| sender.send(text).is_ok()))
            })
        });
        let trained = Encoder::train(texts.into_iter(), vocab_size, splits);
        match reader.join() {
            Ok(Ok(())) => trained,
            Ok(Err(error)) => trained.and(Err(error)),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

fn finish(
    job: &Job,
    survey: &Survey,
    encoder: &Encoder,
    made: &Tokenised,
    dir: &Path,
    target: &Path,
) -> Result<(), DataError> {
    let Tokenised { train, validation } = made;
    let coverage = train.coverage.and(&validation.coverage);
    coverage.check()?;
    let width = Width::of_vocabulary(encoder.vocab_size);
    let tokens = |name: &str| -> Result<u64, DataError> {
        let path = dir.join(name);
        let len = fs::metadata(&path).map_err(|source| DataError::Read { path, source })?.len();
        Ok(len / width.bytes() as u64)
    };
    let (train_tokens, validation_tokens) = (tokens(TRAIN)?, tokens(VALIDATION)?);
    check_windows(job, train_tokens, validation_tokens)?;
    let measured = if validation_tokens > 0 { validation } else { train };
    let meta = Meta {
        format: FORMAT.to_owned(),
        hash: target.file_name().unwrap_or_default().to_string_lossy().into_owned(),
        max_seq_len: job.max_seq_len,
        vocab_size: encoder.vocab_size,
        eos_id: encoder.eos_id,
        train_documents: survey.trained_on(),
        validation_documents: survey.held_out.len() as u64,
        train_tokens,
        validation_tokens,
        validation_bytes_per_token: measured.coverage.said_bytes() as f64 / measured.tokens as f64,
        read: survey.counts.clone(),
        coverage,
        tokenizer_sha256: hex::encode(Sha256::digest(&encoder.json)),
        train_sha256: sha256(&dir.join(TRAIN))?,
        validation_sha256: sha256(&dir.join(VALIDATION))?,
        rows: None,
    };
    replace(dir, TOKENIZER, &encoder.json)?;
    put(dir, META, &serde_json::to_vec_pretty(&meta).expect("counts and hashes are plain data"))
}

/// Of a file, in hex.
pub(crate) fn sha256(path: &Path) -> Result<String, DataError> {
    let read = |source| DataError::Read { path: path.to_owned(), source };
    let mut hasher = Sha256::new();
    io::copy(&mut File::open(path).map_err(read)?, &mut hasher).map_err(read)?;
    Ok(hex::encode(hasher.finalize()))
}

/// Token ids of each text, which ends with the end of text, and how much of the texts is in them.
pub(crate) fn tokens(encoder: &Encoder, texts: &[&str]) -> Result<(Vec<Vec<u32>>, Coverage), DataError> {
    let encoded = encoder.encode(texts)?;
    let coverage = encoder.coverage(texts, &encoded)?;
    let mut documents: Vec<Vec<u32>> = encoded.into_iter().map(|document| document.ids).collect();
    if !encoder.ends_texts() {
        documents.iter_mut().filter(|ids| encoder.lacks_end(ids)).for_each(|ids| ids.push(encoder.eos_id));
    }
    Ok((documents, coverage))
}

fn check_windows(job: &Job, train_tokens: u64, validation_tokens: u64) -> Result<(), DataError> {
    let length = u64::from(job.max_seq_len);
    if train_tokens == 0 && validation_tokens > 0 {
        return Err(DataError::TooLittle(
            "all of the data is held out, and nothing is left to train on; add data, or set data.validation_fraction = 0".into(),
        ));
    }
    if train_tokens < length {
        return Err(DataError::TooLittle(format!(
            "a sequence is longer than the data: max_seq_len is {length} and the training part has {train_tokens} tokens; lower \
             max_seq_len to at most {train_tokens}, or add data"
        )));
    }
    if job.data.validation_fraction > 0.0 && validation_tokens < length {
        return Err(DataError::TooLittle(format!(
            "a sequence is longer than the data held out: max_seq_len is {length} and the validation part has {validation_tokens} \
             tokens; lower max_seq_len, add data, or set data.validation_fraction = 0"
        )));
    }
    Ok(())
}

/// Lets `fill` write synced files into a hidden directory, and renames it to `target`.
pub(crate) fn appear(
    target: &Path,
    fill: impl FnOnce(&Path) -> Result<(), DataError>,
) -> Result<(), DataError> {
    let failed = |source| DataError::Write { path: target.to_owned(), source };
    let parent = target.parent().unwrap_or(Path::new("."));
    let name = target.file_name().unwrap_or_default().to_string_lossy();
    let temporary = parent.join(format!("{PART}{name}"));
    let rename = || {
        File::open(&temporary)?.sync_all()?;
        if target.exists() {
            fs::remove_dir_all(target)?; // found damaged; no rank runs on it, because ranks start after this
        }
        fs::rename(&temporary, target)?;
        File::open(parent)?.sync_all()
    };
    let created = fs::create_dir_all(&temporary).map_err(failed);
    created.and_then(|()| fill(&temporary)).and_then(|()| rename().map_err(failed)).inspect_err(|_| {
        let _ = fs::remove_dir_all(&temporary); // the error of writing is the one to tell
    })
}

/// Writes and syncs one file.
pub(crate) fn put(dir: &Path, name: &str, bytes: &[u8]) -> Result<(), DataError> {
    let path = dir.join(name);
    let written = File::create(&path).and_then(|mut file| {
        file.write_all(bytes)?;
        file.sync_all()
    });
    written.map_err(|source| DataError::Write { path, source })
}

/// The same, whole or not at all, whatever was there.
pub(crate) fn replace(dir: &Path, name: &str, bytes: &[u8]) -> Result<(), DataError> {
    let new = format!("{name}.new");
    put(dir, &new, bytes)?;
    let path = dir.join(name);
    fs::rename(dir.join(new), &path).map_err(|source| DataError::Write { path, source })
}
