//! Documents into tokens on disk, on all cores, in the memory of some blocks. What is done is noted every so many blocks, so that a build
//! that was killed is gone on with.

use crate::blocks::{self, Block};
use crate::build::{replace, tokens};
use crate::cache::{TRAIN, VALIDATION};
use crate::documents::Documents;
use crate::survey::{Fate, Survey};
use crate::tokenizer::Encoder;
use crate::windows::Width;
use crate::{Coverage, DataError, Note};
use fleet_common::mapped::Mapped;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// What is held out, in the order of the data: of each document its number and its bytes, both of 8 bytes, then its tokens.
const HELD_OUT: &str = "held-out";

const DONE: &str = "done.json";

/// Raised when what a build leaves is to be read otherwise.
const LAYOUT: u32 = 1;

/// What has become of the documents.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Tokenised {
    pub train: Part,
    pub validation: Part,
}

/// Of documents, each counted once.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Part {
    pub coverage: Coverage,
    pub tokens: u64,
}

impl Part {
    fn add(&mut self, more: &Part) {
        self.coverage = self.coverage.and(&more.coverage);
        self.tokens += more.tokens;
    }
}

/// How far a build is.
#[derive(Default, Serialize, Deserialize)]
struct Done {
    layout: u32,
    blocks: usize,
    /// Bytes that were on the disk then.
    train_bytes: u64,
    held_out_bytes: u64,
    made: Tokenised,
}

/// Writes the tokens of both parts into `dir`, from where a build before was. `every`: blocks after which it is noted what is done.
pub(crate) fn tokenise(
    documents: &Documents,
    survey: &Survey,
    encoder: &Encoder,
    dir: &Path,
    every: usize,
    progress: &dyn Fn(Note),
) -> Result<Tokenised, DataError> {
    let (train, held_out) = (dir.join(TRAIN), dir.join(HELD_OUT));
    let mut done = left(dir, &train, &held_out).unwrap_or_default();
    let all = survey.blocks.len();
    if done.blocks > 0 {
        progress(Note::info(format!("going on where a build before ended, at {}", share(done.blocks, all))));
    }
    let mut train = Appended::open(train, done.train_bytes)?;
    let mut kept = Appended::open(held_out, done.held_out_bytes)?;
    // Some twenty times in a large data set.
    let every = every.max(all / 20);
    let mut noted = done.blocks;
    let (first, skipped) = survey.place(done.blocks);
    blocks::batches(documents.files(), documents.reading(), first, skipped, &mut |batch| {
        let from = done.blocks;
        let one = |(at, (file, block))| Made::of(documents, survey, encoder, from + at, file, block);
        let made: Vec<Result<Made, DataError>> = batch.into_par_iter().enumerate().map(one).collect();
        for made in made {
            let made = made?;
            train.write(&made.train_bytes)?;
            kept.write(&made.held_out_bytes)?;
            done.made.train.add(&made.train);
            done.made.validation.add(&made.validation);
            done.blocks += 1;
        }
        if done.blocks - noted >= every && done.blocks < all {
            noted = done.blocks;
            (done.layout, done.train_bytes, done.held_out_bytes) = (LAYOUT, train.sync()?, kept.sync()?);
            replace(dir, DONE, &serde_json::to_vec(&done).expect("counts are plain data"))?;
            progress(Note::info(format!("tokenised {}", share(done.blocks, all))));
        }
        Ok(())
    })?;
    train.sync()?;
    kept.sync()?;
    in_order(&survey.held_out, &kept.path, &dir.join(VALIDATION))?;
    for path in [&kept.path, &dir.join(DONE)] {
        match fs::remove_file(path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(failed(path, e)),
            _ => {}
        }
    }
    Ok(done.made)
}

fn share(blocks: usize, all: usize) -> String {
    format!("{:.0} % of the data", blocks as f64 * 100.0 / all.max(1) as f64)
}

/// What a build before has done, if all of it is there.
fn left(dir: &Path, train: &Path, held_out: &Path) -> Option<Done> {
    let done: Done = serde_json::from_slice(&fs::read(dir.join(DONE)).ok()?).ok()?;
    let has = |path: &Path, bytes: u64| fs::metadata(path).is_ok_and(|meta| meta.len() >= bytes);
    (done.layout == LAYOUT && has(train, done.train_bytes) && has(held_out, done.held_out_bytes))
        .then_some(done)
}

/// A file that is written at its end.
pub(crate) struct Appended {
    path: PathBuf,
    file: File,
    len: u64,
}

impl Appended {
    /// With its first `len` bytes.
    pub fn open(path: PathBuf, len: u64) -> Result<Appended, DataError> {
        let opened = OpenOptions::new().create(true).append(true).open(&path).and_then(|file| {
            file.set_len(len)?;
            Ok(file)
        });
        let file = opened.map_err(|source| failed(&path, source))?;
        Ok(Appended { path, file, len })
    }

    pub fn write(&mut self, bytes: &[u8]) -> Result<(), DataError> {
        self.len += bytes.len() as u64;
        self.file.write_all(bytes).map_err(|source| failed(&self.path, source))
    }

    /// How many bytes are on the disk then.
    pub fn sync(&mut self) -> Result<u64, DataError> {
        self.file.sync_all().map_err(|source| failed(&self.path, source))?;
        Ok(self.len)
    }
}

fn failed(path: &Path, source: io::Error) -> DataError {
    DataError::Write { path: path.to_owned(), source }
}

/// Of one block.
#[derive(Default)]
struct Made {
    train: Part,
    validation: Part,
    train_bytes: Vec<u8>,
    held_out_bytes: Vec<u8>,
}

impl Made {
    fn of(
        documents: &Documents,
        survey: &Survey,
        encoder: &Encoder,
        number: usize,
        file: usize,
        block: Block,
    ) -> Result<Made, DataError> {
        let found = documents.found(file, block)?.texts;
        let changed = || DataError::Changed(documents.files()[file].path.clone());
        let fates = survey
            .fates_of(number)
            .filter(|fates| fates.len() == found.len() && survey.is_same(number, file));
        let fates = fates.ok_or_else(changed)?;
        let first = survey.blocks[number].1;
        let width = Width::of_vocabulary(encoder.vocab_size);
        let mut made = Made::default();
        let (mut trained, mut times) = (Vec::new(), Vec::new());
        let (mut kept, mut numbers) = (Vec::new(), Vec::new());
        for ((number, text), fate) in (first..).zip(&found).zip(fates) {
            match *fate {
                Fate::Train(0) | Fate::Dropped => {}
                Fate::Train(count) => {
                    trained.push(text.as_str());
                    times.push(count);
                }
                Fate::HeldOut => {
                    kept.push(text.as_str());
                    numbers.push(number);
                }
            }
        }
        let part = |texts: &[&str]| {
            let (ids, coverage) = tokens(encoder, texts)?;
            let tokens = ids.iter().map(|ids| ids.len() as u64).sum();
            Ok((ids, Part { coverage, tokens }))
        };
        let (ids, train) = part(&trained)?;
        for (ids, times) in ids.iter().zip(times) {
            (0..times).for_each(|_| width.encode(ids, &mut made.train_bytes));
        }
        let (ids, validation) = part(&kept)?;
        for (ids, number) in ids.iter().zip(numbers) {
            made.held_out_bytes.extend(number.to_le_bytes());
            made.held_out_bytes.extend(((ids.len() * width.bytes()) as u64).to_le_bytes());
            width.encode(ids, &mut made.held_out_bytes);
        }
        (made.train, made.validation) = (train, validation);
        Ok(made)
    }
}

/// Writes what is held out in the order of `numbers`.
fn in_order(numbers: &[usize], held_out: &Path, target: &Path) -> Result<(), DataError> {
    let all = Mapped::open(held_out).map_err(|source| failed(held_out, source))?;
    let number = |at: usize| {
        let bytes = all.get(at..at + 8)?;
        Some(u64::from_le_bytes(bytes.try_into().expect("eight bytes")) as usize)
    };
    let mut places = HashMap::with_capacity(numbers.len());
    let mut at = 0;
    while let (Some(document), Some(bytes)) = (number(at), number(at + 8)) {
        places.insert(document, at + 16..at + 16 + bytes);
        at += 16 + bytes;
    }
    let write = || {
        let mut file = io::BufWriter::new(File::create(target)?);
        for number in numbers {
            let bytes = places.get(number).and_then(|place| all.get(place.clone()));
            file.write_all(bytes.ok_or_else(|| io::Error::other("a document that is held out is missing"))?)?;
        }
        file.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all()
    };
    write().map_err(|source| failed(target, source))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::blocks::Input;
    use crate::files::tests::data;
    use fleet_common::job::parse_toml;
    use fleet_common::model::Splits;
    use sha2::{Digest, Sha256};
    use std::cell::RefCell;
    use std::panic::{AssertUnwindSafe, catch_unwind};

    /// A build that ends at a random place is gone on with, to the same bytes.
    #[test]
    fn what_a_build_that_was_killed_has_done_is_not_done_again() {
        let dir = tempfile::tempdir().unwrap();
        let input = |file: u32| {
            let rows: String = (0..24_000)
                .map(|i| {
                    format!(
                        "{{\"text\":\"document {i} of {file}, which the sea has brought ashore {}\"}}\n",
                        i * 7919 % 1000
                    )
                })
                .collect();
            let path = dir.path().join(format!("{file}.jsonl"));
            fs::write(&path, &rows).unwrap();
            Input { path, sha256: Sha256::digest(&rows).into(), weight: 1.0 }
        };
        let files: Vec<Input> = (0..3).map(input).collect();
        let text = "max_seq_len = 16\nvocab_size = 300\nmodel = { hidden_size = 8, num_hidden_layers = 1, num_attention_heads = 1 }\ndata = { path = \"x\" }";
        let mut job = parse_toml(text, dir.path()).unwrap().0;
        job.data = data(vec![], &[], &[]);
        let encoder = Encoder::train(["the sea, ".repeat(200)].iter(), 260, Splits::AsWritten).unwrap();
        let documents = Documents::of(&files, &job.data).unwrap();
        let survey = Survey::of(&documents, &job, dir.path()).unwrap();
        assert!(survey.blocks.len() > 4 && survey.documents == 72_000, "{} blocks", survey.blocks.len());

        let whole = dir.path().join("whole");
        fs::create_dir(&whole).unwrap();
        let made = tokenise(&documents, &survey, &encoder, &whole, 1, &|_| {}).unwrap();
        assert_eq!(fs::metadata(whole.join(TRAIN)).unwrap().len(), 2 * made.train.tokens);
        assert!(made.train.tokens > 8 * made.validation.tokens && made.validation.tokens > 0);

        let part = dir.path().join("part");
        fs::create_dir(&part).unwrap();
        let notes = RefCell::new(Vec::new());
        let mut killed = 0;
        loop {
            let tell = |note: Note| {
                notes.borrow_mut().push(note.line.clone());
                assert!(!note.line.starts_with("tokenised") || killed == 2, "killed");
            };
            match catch_unwind(AssertUnwindSafe(|| tokenise(&documents, &survey, &encoder, &part, 1, &tell)))
            {
                Err(_) => {
                    killed += 1;
                    // What was written behind the last note is not counted on.
                    let mut train = OpenOptions::new().append(true).open(part.join(TRAIN)).unwrap();
                    train.write_all(b"garbage").unwrap();
                }
                Ok(again) => {
                    let again = again.unwrap();
                    assert_eq!(again.train.tokens, made.train.tokens);
                    break;
                }
            }
        }
        assert!(
            killed > 0
                && notes.borrow().iter().any(|line| line.starts_with("going on where a build before ended"))
        );
        for name in [TRAIN, VALIDATION] {
            assert!(fs::read(whole.join(name)).unwrap() == fs::read(part.join(name)).unwrap(), "{name}");
        }
        assert!(!part.join(DONE).exists() && !part.join(HELD_OUT).exists());
    }
}
