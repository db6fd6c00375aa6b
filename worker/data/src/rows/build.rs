//! Builds a cache of rows: reads file by file, tokenises row by row, holds out, packs, and writes.

use super::done::Done;
use super::example::Reader;
use super::fields::Fields;
use super::format;
use super::pack::best_fit;
use super::sequence::{Made, Maker};
use super::source::{self, Place};
use super::templates::{self, Chosen};
use super::write::{Span, Writer, index};
use super::{Row, Unused};
use crate::blocks::{self, Block, Input, Reading};
use crate::build::{appear, put};
use crate::cache::{FORMAT, META, Meta, RowMeta, TOKENIZER, TRAIN_INDEX, VALIDATION_INDEX};
use crate::model_dir::GivenTokenizer;
use crate::near::{self, Signature, Signatures};
use crate::tokenizer::{Encoder, ModelIds};
use crate::weights::times;
use crate::windows::Width;
use crate::{DataError, Note};
use fleet_common::job::{self, BadRows, ChatTemplate, Job, RowFormat, Rows};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// Rows that are tokenised at once.
const BATCH: usize = 1024;

/// Where signatures are while the cache is built.
const SIGNATURES: &str = "signatures";

/// Builds `target`, replacing a damaged one. The caller holds the lock and has hashed the files.
pub(crate) fn build(
    job: &Job,
    rows: &Rows,
    files: &[Input],
    ids: &ModelIds,
    target: &Path,
    progress: &dyn Fn(Note),
) -> Result<(), DataError> {
    let job::Tokenizer::File(path) = &job.tokenizer else {
        return Err(DataError::Vocabulary("rows need a tokenizer that is there; set tokenizer.path".into()));
    };
    let given = GivenTokenizer::open(path, ids.vocab_size)?;
    let encoder = Encoder::of(&given, path, ids)?;
    ids.check_holds(encoder.vocab_size)?;
    let adapter = job.adapter.as_ref().and_then(|adapter| adapter.path.as_deref());
    let maker = Maker::new(given, encoder, Chosen::of(rows, path, adapter)?, rows.loss_on);
    let s = if files.len() == 1 { "" } else { "s" };
    progress(Note::info(format!("tokenising the rows of {} file{s}", files.len())));
    appear(target, |dir| {
        let mut builder = Builder::open(job, rows, &maker, dir)?;
        builder.read(files, SAVED_BLOCKS, progress)?;
        builder.finish(target)
    })
}

/// Blocks of about a megabyte after which it is noted what is done.
const SAVED_BLOCKS: usize = 16;

/// An example that is written: what it is, and where.
#[derive(Serialize, Deserialize)]
pub(super) struct Kept {
    /// Of its tokens and which of them are learnt, before any was cut off.
    hash: [u8; 16],
    spans: Vec<Span>,
    loss_tokens: u64,
    /// Bytes of text in them.
    said: u64,
    /// How often it is trained on in an epoch.
    times: u8,
}

impl Kept {
    fn tokens(&self) -> u64 {
        self.spans.iter().map(|span| u64::from(span.len)).sum()
    }
}

struct Builder<'a> {
    job: &'a Job,
    rows: &'a Rows,
    maker: &'a Maker,
    dir: &'a Path,
    writer: Writer,
    /// Of the examples, where near ones are left out.
    signatures: Option<Signatures>,
    kept: Vec<Kept>,
    done: Done,
    file: PathBuf,
    weight: f64,
    /// The block holds bytes that are not UTF-8.
    is_damaged: bool,
    batch: Vec<(Place, Result<Row, String>)>,
}

impl<'a> Builder<'a> {
    /// Goes on from what a build before has left in `dir`.
    fn open(job: &'a Job, rows: &'a Rows, maker: &'a Maker, dir: &'a Path) -> Result<Builder<'a>, DataError> {
        let width = Width::of_vocabulary(maker.encoder.vocab_size);
        let near = job.data.clean.near_duplicates;
        let (done, kept) = Done::left(dir, |done| {
            let signatures = near.map(|_| (SIGNATURES, near::bytes(done.kept)));
            done.written.files(width).into_iter().chain(signatures).collect()
        });
        let writer = Writer::open(dir, width, done.written)?;
        let signatures = near.map(|_| Signatures::with(&dir.join(SIGNATURES), kept.len())).transpose()?;
        let (file, weight, is_damaged, batch) = (PathBuf::new(), 1.0, false, Vec::new());
        Ok(Builder { job, rows, maker, dir, writer, signatures, kept, done, file, weight, is_damaged, batch })
    }

    /// Reads what is not done yet. `every`: blocks after which it is noted what is.
    fn read(&mut self, files: &[Input], every: usize, progress: &dyn Fn(Note)) -> Result<(), DataError> {
        self.done.counts.files = files.len() as u64;
        let (first, skipped) = (self.done.file, self.done.blocks);
        let rows = |done: &Done| format!("{} rows", done.counts.rows);
        if first + skipped > 0 {
            let line = format!("going on where a build before ended, after {}", rows(&self.done));
            progress(Note::info(line));
        }
        let reading = Reading { damaged_too: self.rows.bad_rows == BadRows::Skip, ..Reading::default() };
        let mut blocks = 0;
        blocks::batches(files, reading, first, skipped, &mut |batch| {
            blocks += batch.len();
            batch.into_iter().try_for_each(|(number, block)| self.block(number, &files[number], block))?;
            if blocks >= every {
                blocks = 0;
                self.done.written = self.writer.sync()?;
                self.signatures.as_mut().map_or(Ok(()), Signatures::sync)?;
                self.done.note(self.dir, &self.kept)?;
                progress(Note::info(format!("tokenised {}", rows(&self.done))));
            }
            Ok(())
        })
    }

    fn block(&mut self, number: usize, input: &Input, block: Block) -> Result<(), DataError> {
        if self.done.file != number {
            (self.done.file, self.done.blocks, self.done.format) = (number, 0, None);
        }
        (self.file, self.weight) = (input.path.clone(), input.weight);
        self.is_damaged = block.is_damaged;
        source::each(&input.path, block, &mut |place, row| {
            self.batch.push((place, row));
            if self.batch.len() == BATCH { self.flush() } else { Ok(()) }
        })?;
        self.flush()?;
        self.done.blocks += 1;
        Ok(())
    }

    /// Tokenises what has been read, and writes it in its order.
    fn flush(&mut self) -> Result<(), DataError> {
        let batch = std::mem::take(&mut self.batch);
        let Some(format) = self.format_of(&batch)? else { return self.all_bad(batch) };
        let reader = Reader {
            data: &self.job.data,
            rows: self.rows,
            has_template: self.maker.templates.is_some(),
            is_templated: self
                .rows
                .chat_template
                .as_ref()
                .is_some_and(|chosen| *chosen != ChatTemplate::None)
                || self.maker.templates.as_ref().is_some_and(Chosen::is_other),
        };
        let one = |(place, row): (Place, Result<Row, String>)| {
            let is_damaged = self.is_damaged && row.as_ref().is_ok_and(holds_damage);
            let mut unread = Vec::new();
            let made = row.map_err(Unused::Bad).and_then(|row| {
                if let Some(why) = format::labelled(self.rows, format, &row) {
                    return Err(Unused::Bad(why));
                }
                let fields = Fields::of(&row);
                let made = self.maker.make(&reader.read(format, &fields)?)?;
                unread = fields.unread();
                Ok(made)
            });
            let is_compared = self.signatures.is_some();
            let signature = made.as_ref().ok().filter(|_| is_compared).map(Made::signature);
            (place, is_damaged, unread, made, signature)
        };
        let made: Vec<_> = batch.into_par_iter().map(one).collect();
        self.measure(made.iter().filter_map(|(.., made, _)| made.as_ref().ok()))?;
        for (place, is_damaged, unread, made, signature) in made {
            self.done.counts.rows += 1;
            self.done.report.count_unread(unread);
            match made {
                _ if is_damaged => self.done.report.not_utf8 += 1,
                Ok(made) => self.keep(place, made, signature)?,
                Err(Unused::Empty) => self.done.report.empty += 1,
                Err(Unused::Same) => self.done.report.same += 1,
                Err(Unused::NoTemplate) => return Err(templates::missing()),
                Err(Unused::Bad(what)) => self.bad(place, what)?,
            }
        }
        Ok(())
    }

    /// What the rows of this file are; `None` as long as none could be read.
    fn format_of(&mut self, batch: &[(Place, Result<Row, String>)]) -> Result<Option<RowFormat>, DataError> {
        let first: Vec<&Row> =
            batch.iter().filter_map(|(_, row)| row.as_ref().ok()).take(format::FIRST).collect();
        if self.done.format.is_none() && !first.is_empty() {
            let found = format::of(&self.job.data, self.rows, &first);
            let found = found.map_err(|why| DataError::Rows(format!("{}: {why}", self.file.display())))?;
            let name = format::name(found).to_owned();
            if !self.done.report.formats.contains(&name) {
                self.done.report.formats.push(name);
            }
            self.done.format = Some(found);
        }
        Ok(self.done.format)
    }

    fn all_bad(&mut self, batch: Vec<(Place, Result<Row, String>)>) -> Result<(), DataError> {
        for (place, row) in batch {
            self.done.counts.rows += 1;
            self.bad(place, row.err().unwrap_or_default())?;
        }
        Ok(())
    }

    fn bad(&mut self, place: Place, what: String) -> Result<(), DataError> {
        let (path, place) = (self.file.clone(), place.to_string());
        if self.rows.bad_rows == BadRows::Stop {
            return Err(DataError::BadRow { path, place, what });
        }
        self.done.report.bad += 1;
        self.done.report.first_bad.get_or_insert_with(|| format!("{}, {place}: {what}", path.display()));
        Ok(())
    }

    fn keep(&mut self, place: Place, made: Made, signature: Option<Signature>) -> Result<(), DataError> {
        let Made { mut sequences, is_joined, is_templated, left_out, has_silent_turn, .. } = made;
        self.done.is_templated |= is_templated;
        self.done.report.silent_turns += u64::from(has_silent_turn);
        for what in BTreeSet::from_iter(left_out) {
            self.done.report.count_left_out(what, || format!("{}, {place}", self.file.display()));
        }
        if !is_joined {
            self.done.report.unjoined += 1;
            self.done
                .report
                .first_unjoined
                .get_or_insert_with(|| format!("{}, {place}", self.file.display()));
        }
        let mut hasher = Sha256::new();
        for sequence in &sequences {
            sequence.ids.iter().for_each(|id| hasher.update(id.to_le_bytes()));
            sequence.learnt.iter().for_each(|learnt| hasher.update([u8::from(*learnt)]));
        }
        if sequences.iter().any(|sequence| sequence.loss_tokens() == 0) {
            self.done.report.masked += 1;
            return Ok(());
        }
        let cut: u64 = sequences.iter_mut().map(|sequence| sequence.cut(self.job.max_seq_len as usize)).sum();
        if cut > 0 {
            self.done.report.truncated += 1;
            self.done.report.truncated_tokens += cut;
        }
        if sequences.iter().any(|sequence| sequence.loss_tokens() == 0) {
            self.done.report.cut_off += 1;
            let left: usize = sequences.iter().map(|sequence| sequence.ids.len()).sum();
            self.done.report.truncated_tokens += left as u64;
            return Ok(());
        }
        let spans = sequences.iter().map(|sequence| self.writer.add(&sequence.ids, &sequence.learnt));
        let mut hash = [0; 16];
        hash.copy_from_slice(&hasher.finalize()[..16]);
        if let (Some(signatures), Some(signature)) = (&mut self.signatures, signature) {
            signatures.add(&[signature])?;
        }
        let half = u64::from_le_bytes(*hash.last_chunk().expect("sixteen bytes"));
        self.kept.push(Kept {
            hash,
            times: times(self.weight, half),
            spans: spans.collect::<Result<_, _>>()?,
            loss_tokens: sequences.iter().map(|sequence| sequence.loss_tokens()).sum(),
            said: sequences.iter().map(|sequence| sequence.said).sum(),
        });
        Ok(())
    }

    /// How much of the texts is in their tokens.
    fn measure<'m>(&mut self, made: impl Iterator<Item = &'m Made>) -> Result<(), DataError> {
        let (texts, encoded): (Vec<&str>, Vec<_>) =
            made.flat_map(|made| &made.texts).map(|(text, encoded)| (text.as_str(), encoded.clone())).unzip();
        let coverage = self.maker.encoder.coverage(&texts, &encoded)?;
        self.done.coverage = self.done.coverage.and(&coverage);
        Ok(())
    }

    fn finish(mut self, target: &Path) -> Result<(), DataError> {
        let (dir, mut dropped_tokens) = (self.dir, 0);
        if let (Some(signatures), Some(similar)) =
            (self.signatures.take(), self.job.data.clean.near_duplicates)
        {
            let mut is_dropped = signatures.duplicates(similar)?.into_iter();
            let (dropped, kept): (Vec<Kept>, Vec<Kept>) =
                std::mem::take(&mut self.kept).into_iter().partition(|_| is_dropped.next() == Some(true));
            self.kept = kept;
            self.done.report.near_duplicates = dropped.len() as u64;
            dropped_tokens = dropped.iter().map(Kept::tokens).sum();
        }
        let template = self.maker.templates.as_ref().filter(|_| self.done.is_templated);
        let report = &mut self.done.report;
        report.template = template.map(|chosen| self.maker.misfits(chosen)).unwrap_or_default();
        report.rows = self.done.counts.rows;
        report.examples = self.kept.len() as u64;
        report.tokens = self.kept.iter().map(Kept::tokens).sum();
        report.loss_tokens = self.kept.iter().map(|kept| kept.loss_tokens).sum();
        report.check(self.job.max_seq_len)?;
        self.done.coverage.check()?;
        let left_out = report.rows.saturating_sub(report.examples);
        let (train, validation, duplicates) = split(&self.kept, self.job.data.validation_fraction, left_out)?;
        report.duplicates = duplicates;
        let is_packed = self.rows.packing && self.rows.format != Some(RowFormat::Preference);
        let most = is_packed.then_some(self.job.max_seq_len);
        let repeated =
            train.iter().flat_map(|at| std::iter::repeat_n(*at, usize::from(self.kept[*at].times)));
        let repeated: Vec<usize> = repeated.collect();
        let [train_items, validation_items] =
            [&repeated, &validation].map(|part| items(&self.kept, part, most));
        let [train_index, validation_index] = [&train_items, &validation_items].map(|items| index(items));
        put(dir, TRAIN_INDEX, &train_index)?;
        put(dir, VALIDATION_INDEX, &validation_index)?;
        let (tokens_sha256, loss_sha256) = self.writer.finish()?;
        let sum =
            |part: &[usize], of: fn(&Kept) -> u64| part.iter().map(|at| of(&self.kept[*at])).sum::<u64>();
        let measured = if validation.is_empty() { &train } else { &validation };
        let bytes = sum(measured, |kept| kept.said) as f64;
        let encoder = &self.maker.encoder;
        let meta = Meta {
            format: FORMAT.to_owned(),
            hash: target.file_name().unwrap_or_default().to_string_lossy().into_owned(),
            max_seq_len: self.job.max_seq_len,
            vocab_size: encoder.vocab_size,
            eos_id: encoder.eos_id,
            train_documents: train.len() as u64,
            validation_documents: validation.len() as u64,
            train_tokens: sum(&train, Kept::tokens),
            validation_tokens: sum(&validation, Kept::tokens),
            validation_bytes_per_token: bytes / sum(measured, |kept| kept.loss_tokens) as f64,
            read: self.done.counts,
            coverage: self.done.coverage,
            tokenizer_sha256: hex::encode(Sha256::digest(&encoder.json)),
            train_sha256: hex::encode(Sha256::digest(&train_index)),
            validation_sha256: hex::encode(Sha256::digest(&validation_index)),
            rows: Some(RowMeta {
                train_items: train_items.len() as u64,
                validation_items: validation_items.len() as u64,
                is_packed,
                tokens_sha256,
                loss_sha256,
                chat_template: template.and_then(Chosen::carried).map(str::to_owned),
                dropped_tokens,
                report: self.done.report,
            }),
        };
        put(dir, TOKENIZER, &encoder.json)?;
        Done::forget(dir)?;
        put(dir, META, &serde_json::to_vec_pretty(&meta).expect("counts and hashes are plain data"))
    }
}

/// Whether a row holds what stands for bytes that are not UTF-8.
fn holds_damage(row: &Row) -> bool {
    serde_json::to_string(row).is_ok_and(|text| text.contains(char::REPLACEMENT_CHARACTER))
}

/// Which examples are trained on, in the order of the data, and which are held out, in that of their hashes, so that the first of them are a
/// fair sample; and how many were there before. Examples that are the same are on the same side.
/// `left_out`: rows that are no examples.
fn split(kept: &[Kept], fraction: f64, left_out: u64) -> Result<(Vec<usize>, Vec<usize>, u64), DataError> {
    let mut by_hash: Vec<usize> = (0..kept.len()).collect();
    by_hash.sort_by_key(|at| (kept[*at].hash, *at));
    let is_again = |at: usize| at > 0 && kept[by_hash[at - 1]].hash == kept[by_hash[at]].hash;
    let duplicates = (0..by_hash.len()).filter(|at| is_again(*at)).count() as u64;
    if fraction <= 0.0 {
        return Ok(((0..kept.len()).collect(), Vec::new(), duplicates));
    }
    let mut count = ((kept.len() as f64 * fraction).round() as usize).max(1);
    while count < by_hash.len() && is_again(count) {
        count += 1;
    }
    if count >= by_hash.len() {
        return Err(DataError::TooLittle(format!(
            "of {} examples {count} would be held out, and none is left to train on ({left_out} rows teach nothing or cannot be read); add rows, or set data.validation_fraction = 0",
            by_hash.len()
        )));
    }
    let mut train = by_hash.split_off(count);
    train.sort_unstable();
    Ok((train, by_hash, duplicates))
}

/// The items of a part: an example each, or packs of at most so many tokens.
fn items(kept: &[Kept], part: &[usize], most: Option<u32>) -> Vec<Vec<Span>> {
    let Some(most) = most else { return part.iter().map(|at| kept[*at].spans.clone()).collect() };
    let lengths: Vec<u32> = part.iter().map(|at| kept[*at].tokens() as u32).collect();
    let spans =
        |pack: &Vec<u32>| pack.iter().flat_map(|at| &kept[part[*at as usize]].spans).copied().collect();
    best_fit(&lengths, most).iter().map(spans).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::{LOSS, ROW_TOKENS};
    use fleet_common::job::parse_toml;
    use std::fs::{self, OpenOptions};
    use std::io::Write;
    use std::panic::{AssertUnwindSafe, catch_unwind};

    /// A build that ends at a random place is gone on with, to the same bytes.
    #[test]
    fn what_a_build_that_was_killed_has_done_is_not_done_again() {
        let room = tempfile::tempdir().unwrap();
        let row = |n: usize| {
            format!(
                "{{\"prompt\":\"question {n} of the sea\",\"completion\":\" answer {}\"}}\n",
                n * 7919 % 997
            )
        };
        let rows = |from: usize| (from..from + 18_000).map(row).collect::<String>();
        let input = |(name, text): (&str, String)| {
            let path = room.path().join(name);
            fs::write(&path, &text).unwrap();
            Input { path, sha256: Sha256::digest(&text).into(), weight: 1.0 }
        };
        let array = format!("[{}]", rows(40_000).trim_end().replace('\n', ","));
        let files: Vec<Input> = [("a.jsonl", rows(0)), ("b.json", array)].into_iter().map(input).collect();
        let model =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/parity/golden/foreign/byte_level");
        let text = format!(
            "task_name = \"sft\"\nmax_seq_len = 64\nmodel.path = {model:?}\n[data]\npath = \"x\"\nclean.near_duplicates = 1.0"
        );
        let job = parse_toml(&text, room.path()).unwrap().0;
        let of_rows = job.data.rows.as_ref().unwrap();
        let job::Tokenizer::File(path) = &job.tokenizer else { panic!("the model's") };
        let ids = ModelIds::of(&job.model).unwrap();
        let given = GivenTokenizer::open(path, ids.vocab_size).unwrap();
        let encoder = Encoder::of(&given, path, &ids).unwrap();
        let maker = Maker::new(given, encoder, None, of_rows.loss_on);
        let build = |dir: &Path, progress: &dyn Fn(Note)| {
            fs::create_dir_all(dir).unwrap();
            let mut builder = Builder::open(&job, of_rows, &maker, dir).unwrap();
            builder.read(&files, 1, progress).unwrap();
            builder.finish(dir).unwrap();
        };
        let (whole, part) = (room.path().join("whole"), room.path().join("part"));
        build(&whole, &|_| {});
        let mut killed = 0;
        let told = std::cell::RefCell::new(Vec::new());
        while killed < 2 {
            let tell = |note: Note| {
                assert!(!note.line.starts_with("tokenised"), "killed");
                told.borrow_mut().push(note.line);
            };
            if catch_unwind(AssertUnwindSafe(|| build(&part, &tell))).is_ok() {
                break;
            }
            killed += 1;
            // What was written behind the last note is not counted on.
            for name in [ROW_TOKENS, LOSS, SIGNATURES] {
                OpenOptions::new().append(true).open(part.join(name)).unwrap().write_all(b"garbage").unwrap();
            }
        }
        build(&part, &|note| told.borrow_mut().push(note.line));
        assert!(killed > 0);
        let told = told.into_inner().join("\n");
        assert!(told.contains("going on where a build before ended, after"), "{told}");
        for name in [ROW_TOKENS, LOSS, TRAIN_INDEX, VALIDATION_INDEX] {
            assert!(fs::read(whole.join(name)).unwrap() == fs::read(part.join(name)).unwrap(), "{name}");
        }
        let meta = |dir: &Path| {
            let text = fs::read_to_string(dir.join(META)).unwrap();
            serde_json::from_str::<Meta>(&text).unwrap()
        };
        assert_eq!(Meta { hash: "whole".into(), ..meta(&part) }, meta(&whole));
        let names: Vec<_> = fs::read_dir(&part).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names.len(), 6, "{names:?}");
    }
}
