//! Builds a token cache: reads, splits, trains a tokenizer, tokenises, and writes the directory so that it appears whole.

use crate::cache::{FORMAT, META, Meta, TOKENIZER, TRAIN, VALIDATION};
use crate::split::split;
use crate::tokenizer::{Encoder, ModelIds};
use crate::windows::Width;
use crate::{Coverage, DataError, Note, documents, splits};
use fleet_common::job::{self, Job};
use rayon::prelude::*;
use sha2::{Digest, Sha256};
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// What is being built begins with this; no reader looks at it.
const TEMPORARY: &str = ".tmp-";

/// Held while building below this directory of caches. Gone with its process.
pub(crate) struct Lock(#[expect(dead_code, reason = "the lock lasts as long as the open file")] File);

/// Waits for other builders, and removes what dead ones have left.
pub(crate) fn lock(caches: &Path) -> Result<Lock, DataError> {
    let fail = |source| DataError::Write { path: caches.to_owned(), source };
    fs::create_dir_all(caches).map_err(fail)?;
    let file = File::create(caches.join(".lock")).map_err(fail)?;
    match file.lock() {
        Err(e) if e.kind() == io::ErrorKind::Unsupported => tracing::debug!("no file locks here: {e}"),
        other => other.map_err(fail)?,
    }
    for entry in fs::read_dir(caches).map_err(fail)? {
        let entry = entry.map_err(fail)?;
        if entry.file_name().to_string_lossy().starts_with(TEMPORARY) {
            fs::remove_dir_all(entry.path()).map_err(fail)?;
        }
    }
    Ok(Lock(file))
}

/// Builds `target`, replacing a damaged one. The caller holds the lock and has hashed the files.
pub(crate) fn build(
    job: &Job,
    files: &[PathBuf],
    hashes: &[[u8; 32]],
    ids: &ModelIds,
    target: &Path,
    progress: &dyn Fn(Note),
) -> Result<(), DataError> {
    let (documents, read) = documents::parse(files, read_files(files, hashes)?, &job.data)?;
    let parts = split(&documents, job.data.validation_fraction, job.max_seq_len);
    let texts = |indices: &[usize]| -> Vec<&str> { indices.iter().map(|&i| documents[i].as_str()).collect() };
    let (train, validation) = (texts(&parts.train), texts(&parts.validation));

    let encoder = match &job.tokenizer {
        job::Tokenizer::Train { vocab_size } => {
            ids.check_holds(*vocab_size)?;
            let what = format!("training a tokenizer of {vocab_size} tokens on {} documents", train.len());
            progress(Note::info(what));
            Encoder::train(&train, *vocab_size, ids.splits)?
        }
        job::Tokenizer::File(path) => {
            let encoder = Encoder::open(path, ids)?;
            splits::warning(&encoder.json, ids.splits).map(Note::warning).into_iter().for_each(progress);
            encoder
        }
    };
    ids.check_holds(encoder.vocab_size)?;

    progress(Note::info(format!("tokenising {} documents", documents.len())));
    let given = matches!(job.tokenizer, job::Tokenizer::File(_));
    let pack = |texts: &[&str]| Packed::new(&encoder, texts, given);
    let (train, validation) = (pack(&train)?, pack(&validation)?);
    let coverage = train.coverage.and(&validation.coverage);
    coverage.check()?;
    check_windows(job, train.tokens, validation.tokens)?;
    let measured = if validation.tokens > 0 { &validation } else { &train };
    let meta = Meta {
        format: FORMAT.to_owned(),
        hash: target.file_name().unwrap_or_default().to_string_lossy().into_owned(),
        max_seq_len: job.max_seq_len,
        vocab_size: encoder.vocab_size,
        eos_id: encoder.eos_id,
        train_documents: parts.train.len() as u64,
        validation_documents: parts.validation.len() as u64,
        train_tokens: train.tokens,
        validation_tokens: validation.tokens,
        validation_bytes_per_token: measured.coverage.said_bytes() as f64 / measured.tokens as f64,
        read,
        coverage,
        tokenizer_sha256: hex::encode(Sha256::digest(&encoder.json)),
        train_sha256: hex::encode(Sha256::digest(&train.bytes)),
        validation_sha256: hex::encode(Sha256::digest(&validation.bytes)),
        rows: None,
    };
    let meta = serde_json::to_vec_pretty(&meta).expect("counts and hashes are plain data");
    let contents: [(&str, &[u8]); 4] =
        [(TRAIN, &train.bytes), (VALIDATION, &validation.bytes), (TOKENIZER, &encoder.json), (META, &meta)];
    appear(target, |dir| contents.iter().try_for_each(|(name, bytes)| put(dir, name, bytes)))
}

/// The contents of the files, checked against the hashes that named the cache.
pub(crate) fn read_files(files: &[PathBuf], hashes: &[[u8; 32]]) -> Result<Vec<Vec<u8>>, DataError> {
    files.par_iter().zip(hashes).map(|(file, hash)| read_file(file, hash)).collect()
}

/// Those of one file.
pub(crate) fn read_file(file: &Path, hash: &[u8; 32]) -> Result<Vec<u8>, DataError> {
    let bytes = fs::read(file).map_err(|source| DataError::Read { path: file.to_owned(), source })?;
    match <[u8; 32]>::from(Sha256::digest(&bytes)) == *hash {
        true => Ok(bytes),
        false => Err(DataError::Changed(file.to_owned())),
    }
}

/// Token ids of one part as they lie on disk, each document followed by the end of text.
struct Packed {
    bytes: Vec<u8>,
    tokens: u64,
    coverage: Coverage,
}

impl Packed {
    /// `given`: the tokenizer was not trained here, and may not know every byte.
    fn new(encoder: &Encoder, texts: &[&str], given: bool) -> Result<Packed, DataError> {
        let width = Width::of_vocabulary(encoder.vocab_size);
        let (documents, coverage) = tokens(encoder, texts, given)?;
        let mut bytes = Vec::new();
        documents.iter().for_each(|ids| width.encode(ids, &mut bytes));
        let tokens = (bytes.len() / width.bytes()) as u64;
        Ok(Packed { bytes, tokens, coverage })
    }
}

/// Token ids of each text, which ends with the end of text, and how much of the texts is in them.
pub(crate) fn tokens(
    encoder: &Encoder,
    texts: &[&str],
    given: bool,
) -> Result<(Vec<Vec<u32>>, Coverage), DataError> {
    let encoded = encoder.encode(texts)?;
    let coverage = match given {
        true => encoder.coverage(texts, &encoded)?,
        false => Coverage::whole(texts),
    };
    let mut documents: Vec<Vec<u32>> = encoded.into_iter().map(|document| document.ids).collect();
    if !encoder.ends_texts() {
        documents.iter_mut().filter(|ids| encoder.lacks_end(ids)).for_each(|ids| ids.push(encoder.eos_id));
    }
    Ok((documents, coverage))
}

fn check_windows(job: &Job, train_tokens: u64, validation_tokens: u64) -> Result<(), DataError> {
    let length = u64::from(job.max_seq_len);
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

/// Lets `fill` write synced files into a hidden directory and renames it to `target`.
pub(crate) fn appear(
    target: &Path,
    fill: impl FnOnce(&Path) -> Result<(), DataError>,
) -> Result<(), DataError> {
    let failed = |source| DataError::Write { path: target.to_owned(), source };
    let parent = target.parent().unwrap_or(Path::new("."));
    let name = target.file_name().unwrap_or_default().to_string_lossy();
    let temporary = parent.join(format!("{TEMPORARY}{name}-{}", std::process::id()));
    let rename = || {
        File::open(&temporary)?.sync_all()?;
        if target.exists() {
            fs::remove_dir_all(target)?; // found damaged; no rank runs on it, because ranks start after this
        }
        fs::rename(&temporary, target)?;
        File::open(parent)?.sync_all()
    };
    let created = fs::create_dir(&temporary).map_err(failed);
    created.and_then(|()| fill(&temporary)).and_then(|()| rename().map_err(failed)).inspect_err(|_| {
        let _ = fs::remove_dir_all(&temporary); // the error of writing is the one to tell
    })
}

/// Writes and syncs one file.
pub(crate) fn put(dir: &Path, name: &str, bytes: &[u8]) -> Result<(), DataError> {
    let path = dir.join(name);
    let written = File::create_new(&path).and_then(|mut file| {
        file.write_all(bytes)?;
        file.sync_all()
    });
    written.map_err(|source| DataError::Write { path, source })
}
