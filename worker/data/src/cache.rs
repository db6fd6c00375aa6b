//! The token cache: a data set tokenised once, packed and mapped, found again by a hash of everything it was made from.
//!
//! ```text
//! <output_dir>/cache/<hash>/
//!   train.bin validation.bin   token ids, 2 or 4 bytes little-endian, every document followed by the end of text
//!   tokens.bin loss.bin        of rows in their place: token ids of all examples, and a bit for each that says whether it carries loss
//!   train.index validation.index     which sequences of these each item has (rows/write.rs)
//!   tokenizer.json
//!   meta.json                  counts and SHA-256 of the others
//! ```
//!
//! It is built in a hidden directory, synced and renamed, under a lock; what appears under a hash is whole. What a build that was
//! killed leaves in `.part-<hash>` the next one goes on with (tokenise.rs, rows/done.rs).

use crate::blocks::{Input, WHOLE_MAX};
use crate::files::DataFiles;
use crate::formats::Kind;
use crate::rows::{self, Report};
use crate::tokenizer::{Encoder, ModelIds, guarded};
use crate::windows::{RowIndex, Width, Windows};
use crate::{Counts, Coverage, DataError, Note, build};
use fleet_common::events::DataStats;
use fleet_common::job::{BadRows, Job, Tokenizer};
use fleet_common::mapped::Mapped;
use fleet_common::model::Splits;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Raised when anything changes that makes the same data give other files: reading, cutting, splitting, tokenising, layout.
pub(crate) const FORMAT: &str = "fleet-tokens/2";

/// The same for rows alone.
const ROWS_FORMAT: &str = "rows/3";

pub(crate) const TRAIN: &str = "train.bin";
pub(crate) const VALIDATION: &str = "validation.bin";
/// Of rows: the tokens of both parts, which of them carry loss, and the items of each part.
pub(crate) const ROW_TOKENS: &str = "tokens.bin";
pub(crate) const LOSS: &str = "loss.bin";
pub(crate) const TRAIN_INDEX: &str = "train.index";
pub(crate) const VALIDATION_INDEX: &str = "validation.index";
pub(crate) const TOKENIZER: &str = "tokenizer.json";
pub(crate) const META: &str = "meta.json";

/// What `meta.json` says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Meta {
    pub format: String,
    /// Names the cache.
    pub hash: String,
    /// Tokens of a window.
    pub max_seq_len: u32,
    /// Token ids are below this.
    pub vocab_size: u32,
    /// Stands after every document.
    pub eos_id: u32,
    pub train_documents: u64,
    pub validation_documents: u64,
    pub train_tokens: u64,
    pub validation_tokens: u64,
    /// Bytes of UTF-8 per token, ends of text included, of the validation part; of the training part where nothing is held out.
    /// Bytes that are in no token do not count.
    pub validation_bytes_per_token: f64,
    pub read: Counts,
    /// Of both parts.
    pub coverage: Coverage,
    pub tokenizer_sha256: String,
    /// Of rows: of their indices.
    pub train_sha256: String,
    pub validation_sha256: String,
    /// Of a cache of rows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rows: Option<RowMeta>,
}

/// What a cache of rows has beside, or in the place of, what one of text has.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RowMeta {
    pub train_items: u64,
    pub validation_items: u64,
    /// Items are packs of examples.
    pub is_packed: bool,
    pub tokens_sha256: String,
    pub loss_sha256: String,
    /// The text of the chat template by which messages were written, where it is not the model's own.
    pub chat_template: Option<String>,
    /// Of examples that are left out as near duplicates: they are in the files and in no item.
    #[serde(default)]
    pub dropped_tokens: u64,
    pub report: Report,
}

impl Meta {
    /// Names of the files, but for this one, with their SHA-256.
    fn files(&self) -> Vec<(&'static str, &str)> {
        let parts = match &self.rows {
            None => vec![(TRAIN, &self.train_sha256), (VALIDATION, &self.validation_sha256)],
            Some(rows) => vec![
                (TRAIN_INDEX, &self.train_sha256),
                (VALIDATION_INDEX, &self.validation_sha256),
                (ROW_TOKENS, &rows.tokens_sha256),
                (LOSS, &rows.loss_sha256),
            ],
        };
        let all = parts.into_iter().chain([(TOKENIZER, &self.tokenizer_sha256)]);
        all.map(|(name, sha256)| (name, sha256.as_str())).collect()
    }

    fn notes(&self) -> Vec<Note> {
        let packs = |rows: &RowMeta| rows.is_packed.then_some(rows.train_items + rows.validation_items);
        let of_rows = self.rows.iter().flat_map(|rows| rows.report.notes(self.max_seq_len, packs(rows)));
        self.read.notes().into_iter().chain(of_rows).chain(self.coverage.notes()).collect()
    }
}

/// An open cache. The windows of both parts are mapped, so ranks on one machine share them.
#[derive(Debug)]
pub struct TokenCache {
    dir: PathBuf,
    meta: Meta,
    train: Windows,
    validation: Windows,
}

impl TokenCache {
    /// Finds the cache of this job's data, or builds it. `progress` gets one line before each stage that takes time, and, whether
    /// the cache was there or not, what is to know of the data.
    pub fn build_or_open(
        job: &Job,
        files: &DataFiles,
        progress: &dyn Fn(Note),
    ) -> Result<(TokenCache, DataStats), DataError> {
        guarded(&job.tokenizer, || TokenCache::prepare(job, files, progress))
    }

    fn prepare(
        job: &Job,
        files: &DataFiles,
        progress: &dyn Fn(Note),
    ) -> Result<(TokenCache, DataStats), DataError> {
        let started = Instant::now();
        let ids = ModelIds::of(&job.model)?;
        let files = &files.hashed()?;
        let hash = cache_hash(job, files, &ids)?;
        let caches = job.output_dir.join("cache");
        let target = caches.join(&hash);

        let mut cached = true;
        // What the hash stands for is also what it was built for, unless somebody has changed it.
        let known =
            || TokenCache::open_verified(&target).filter(|cache| cache.meta.max_seq_len == job.max_seq_len);
        let cache = match known() {
            Some(cache) => cache,
            None => {
                let _lock = build::lock(&caches, &hash)?;
                match known() {
                    Some(cache) => cache, // another process built it while this one waited
                    None => {
                        cached = false;
                        match &job.data.rows {
                            None => build::build(job, files, &ids, &target, progress)?,
                            Some(rows) => rows::build(job, rows, files, &ids, &target, progress)?,
                        }
                        TokenCache::open(&target)?
                    }
                }
            }
        };
        ids.check_holds(cache.meta.vocab_size)?;
        cache.meta.notes().into_iter().for_each(progress);
        let stats = DataStats { cached, seconds: started.elapsed().as_secs_f64(), ..cache.stats() };
        Ok((cache, stats))
    }

    /// Opens a cache that is there. Checks lengths, not hashes: ranks do this at every start.
    pub fn open(dir: &Path) -> Result<TokenCache, DataError> {
        let bad = |what: String| DataError::Cache { path: dir.to_owned(), what };
        let bytes = fs::read(dir.join(META)).map_err(|e| bad(format!("{META}: {e}")))?;
        let meta: Meta = serde_json::from_slice(&bytes).map_err(|e| bad(format!("{META}: {e}")))?;
        if meta.format != FORMAT || meta.max_seq_len == 0 {
            return Err(bad(format!("its format is `{}` and this fleet reads `{FORMAT}`", meta.format)));
        }
        let width = Width::of_vocabulary(meta.vocab_size);
        let map = |name: &str| Mapped::open(&dir.join(name)).map_err(|e| bad(format!("{name}: {e}")));
        let tokens = |name: &str, tokens: u64| {
            let mapped = map(name)?;
            if mapped.len() as u64 != tokens.saturating_mul(width.bytes() as u64) {
                return Err(bad(format!(
                    "{name} has {} bytes and should hold {tokens} tokens",
                    mapped.len()
                )));
            }
            Ok(mapped)
        };
        let most = meta.max_seq_len as usize;
        let of_text = |name: &str, count: u64| Ok(Windows::new(tokens(name, count)?, width, most));
        let of_rows = |name: &str, items: u64| {
            let dropped = meta.rows.as_ref().map_or(0, |rows| rows.dropped_tokens);
            let count = meta.train_tokens.saturating_add(meta.validation_tokens).saturating_add(dropped);
            let rows = RowIndex { index: map(name)?, loss: map(LOSS)?, items };
            match rows.is_whole(count) {
                true => Ok(Windows::of_rows(tokens(ROW_TOKENS, count)?, width, most, rows)),
                false => Err(bad(format!("{name} or {LOSS} is not as long as it should be"))),
            }
        };
        let (train, validation) = match &meta.rows {
            None => (of_text(TRAIN, meta.train_tokens)?, of_text(VALIDATION, meta.validation_tokens)?),
            Some(rows) => {
                (of_rows(TRAIN_INDEX, rows.train_items)?, of_rows(VALIDATION_INDEX, rows.validation_items)?)
            }
        };
        Ok(TokenCache { dir: dir.to_owned(), meta, train, validation })
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    pub fn meta(&self) -> &Meta {
        &self.meta
    }

    /// The text of the chat template by which messages were written, where it is not the model's own.
    pub fn chat_template(&self) -> Option<&str> {
        self.meta.rows.as_ref()?.chat_template.as_deref()
    }

    /// Names data, tokenizer, window length and cleaning together.
    pub fn hash(&self) -> &str {
        &self.meta.hash
    }

    pub fn train(&self) -> &Windows {
        &self.train
    }

    pub fn validation(&self) -> &Windows {
        &self.validation
    }

    pub fn tokenizer_path(&self) -> PathBuf {
        self.dir.join(TOKENIZER)
    }

    /// As when it was built, `cached` true, no time.
    pub fn stats(&self) -> DataStats {
        DataStats {
            documents: self.meta.train_documents + self.meta.validation_documents,
            train_windows: self.train.len(),
            validation_windows: self.validation.len(),
            train_tokens: self.meta.train_tokens,
            validation_bytes_per_token: self.meta.validation_bytes_per_token,
            vocab_size: self.meta.vocab_size,
            fingerprint: self.fingerprint(),
            cached: true,
            seconds: 0.0,
        }
    }

    /// SHA-256 of what ranks read, wherever and by whom it was built.
    fn fingerprint(&self) -> String {
        let Meta { format, tokenizer_sha256, train_sha256, validation_sha256, max_seq_len, .. } = &self.meta;
        let read = [format, tokenizer_sha256, train_sha256, validation_sha256, &max_seq_len.to_string()];
        let of_rows = self.meta.rows.iter().flat_map(|rows| [&rows.tokens_sha256, &rows.loss_sha256]);
        let read: Vec<&str> = read.into_iter().chain(of_rows).map(String::as_str).collect();
        hex::encode(Sha256::digest(read.join("\n")))
    }

    /// The cache, if it is there and every file has its hash. A damaged one is built again.
    fn open_verified(dir: &Path) -> Option<TokenCache> {
        if !dir.exists() {
            return None;
        }
        let checked = TokenCache::open(dir).and_then(|cache| {
            cache.meta.files().into_par_iter().try_for_each(|(name, sha256)| {
                match build::sha256(&dir.join(name))? == sha256 {
                    true => Ok(()),
                    false => {
                        Err(DataError::Cache { path: dir.to_owned(), what: format!("{name} has changed") })
                    }
                }
            })?;
            Ok(cache)
        });
        checked.inspect_err(|e| tracing::warn!("building a token cache again: {e}")).ok()
    }
}

// ---- the hash ---------------------------------------------------------------------------------------------------------

/// Hex of SHA-256 over all that decides what is in the cache. Paths do not: the same data elsewhere are the same.
fn cache_hash(job: &Job, files: &[Input], ids: &ModelIds) -> Result<String, DataError> {
    let tokenizer = match &job.tokenizer {
        Tokenizer::Train { vocab_size } => {
            format!("train {vocab_size}{}", if ids.splits == Splits::ByDigit { " by digit" } else { "" })
        }
        Tokenizer::File(path) => Encoder::open(path, ids)?.name(ids),
    };
    let clean = serde_json::to_string(&job.data.clean).expect("plain data");
    let fraction = job.data.validation_fraction.to_bits();
    let field = &job.data.text_field;
    let mut hasher = Sha256::new();
    let head = format!("{FORMAT}\n{tokenizer}\n{}\n{fraction:x}\n{clean}\n{field:?}\n", job.max_seq_len);
    hasher.update(head);
    let adapter = job.adapter.as_ref().and_then(|adapter| adapter.path.as_deref());
    if let (Some(rows), Tokenizer::File(path)) = (&job.data.rows, &job.tokenizer) {
        hasher.update(format!("{ROWS_FORMAT}\n{}\n", rows::described(rows, path, adapter)?));
    }
    if job.data.bad_rows == BadRows::Skip {
        hasher.update("without bad rows\n");
    }
    for Input { path, sha256, weight } in files {
        let kind = match Kind::by_name(path) {
            Kind::Text | Kind::Packed(_) => b't',
            Kind::Json => b'j',
            Kind::Csv => b',',
            Kind::Tsv => b'\t',
            Kind::Parquet => b'p',
        };
        hasher.update([kind]);
        hasher.update(sha256);
        // It is read in pieces, as it was not at first.
        if kind == b't' && fs::metadata(path).is_ok_and(|file| file.len() > WHOLE_MAX as u64) {
            hasher.update("in pieces\n");
        }
        if *weight != 1.0 {
            hasher.update(format!(" x {weight}\n"));
        }
    }
    Ok(hex::encode(&hasher.finalize()[..16]))
}
