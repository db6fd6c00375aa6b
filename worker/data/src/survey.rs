//! A first look at all documents, before any is tokenised: how many there are, which of them are nearly the same, and what becomes of each.

use crate::Counts;
use crate::DataError;
use crate::blocks::{self, Input};
use crate::documents::{Documents, Found};
use crate::near::{self, Signatures};
use crate::split::{Record, held_out};
use crate::weights;
use fleet_common::job::Job;
use rayon::prelude::*;
use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

/// What is known of the data.
pub(crate) struct Survey {
    /// Of each block, in the order of the data: its file, and how many documents were before it.
    pub blocks: Vec<(u32, u64)>,
    pub documents: u64,
    pub counts: Counts,
    /// Of each document.
    pub fates: Vec<Fate>,
    /// Numbers of those that are held out, in their order.
    pub held_out: Vec<usize>,
}

/// What becomes of a document.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    /// It is trained on so many times in an epoch.
    Train(u8),
    HeldOut,
    /// One before it is nearly the same.
    Dropped,
}

/// Bytes of a record on disk.
const RECORD: usize = 16;

impl Survey {
    /// Reads all that there is. `dir` takes what is too much to be held in memory, for as long as this lasts.
    pub fn of(documents: &Documents, job: &Job, dir: &Path) -> Result<Survey, DataError> {
        let similar = job.data.clean.near_duplicates;
        let records = dir.join("records");
        let failed = |source| DataError::Write { path: records.clone(), source };
        let mut file = BufWriter::new(File::create(&records).map_err(failed)?);
        let mut signatures = similar.map(|_| Signatures::create(&dir.join("signatures"))).transpose()?;
        let files = documents.files();
        let mut survey = Survey {
            blocks: Vec::new(),
            documents: 0,
            counts: Counts { files: files.len() as u64, ..Counts::default() },
            fates: Vec::new(),
            held_out: Vec::new(),
        };
        blocks::batches(files, documents.reading(), 0, 0, &mut |batch| {
            let seen: Vec<Result<Seen, DataError>> = batch
                .into_par_iter()
                .map(|(file, block)| Ok(Seen::of(file, documents.found(file, block)?, similar.is_some())))
                .collect();
            for seen in seen {
                let Seen { file: number, records, signatures: more, counts } = seen?;
                survey.blocks.push((number as u32, survey.documents));
                survey.documents += records.len() as u64;
                survey.counts.add(counts);
                for Record { hash, bytes } in records {
                    file.write_all(&hash.to_le_bytes())
                        .and_then(|()| file.write_all(&bytes.to_le_bytes()))
                        .map_err(failed)?;
                }
                if let Some(signatures) = &mut signatures {
                    signatures.add(&more)?;
                }
            }
            Ok(())
        })?;
        file.flush().map_err(failed)?;
        survey.counts.settle();
        let dropped = match (signatures, similar) {
            (Some(signatures), Some(least)) => signatures.duplicates(least)?,
            _ => Vec::new(),
        };
        survey.counts.near_duplicates = dropped.iter().filter(|dropped| **dropped).count() as u64;
        let left = survey.documents - survey.counts.near_duplicates;
        crate::documents::check(left, &survey.counts, files)?;
        survey.decide(&records, &dropped, job, files)?;
        std::fs::remove_file(&records).map_err(failed)?;
        Ok(survey)
    }

    fn decide(
        &mut self,
        records: &PathBuf,
        dropped: &[bool],
        job: &Job,
        files: &[Input],
    ) -> Result<(), DataError> {
        let count = self.documents as usize;
        let failed = |source| DataError::Read { path: records.clone(), source };
        let is_dropped = |number: usize| dropped.get(number) == Some(&true);
        let each = |take: &mut dyn FnMut(usize, Record)| {
            let mut file = BufReader::new(File::open(records).map_err(failed)?);
            for number in 0..count {
                let mut bytes = [0; RECORD];
                file.read_exact(&mut bytes).map_err(failed)?;
                let (hash, length) = bytes.split_at(RECORD / 2);
                let number_of =
                    |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().expect("half of a record"));
                if !is_dropped(number) {
                    take(number, Record { hash: number_of(hash), bytes: number_of(length) });
                }
            }
            Ok(())
        };
        self.held_out = held_out(&each, job.data.validation_fraction, job.max_seq_len)?;
        self.fates = vec![Fate::Dropped; count];
        let mut block = 0;
        each(&mut |number, record| {
            while self.blocks.get(block + 1).is_some_and(|(_, first)| *first <= number as u64) {
                block += 1;
            }
            let weight = files[self.blocks[block].0 as usize].weight;
            self.fates[number] = Fate::Train(weights::times(weight, record.hash));
        })?;
        for &number in &self.held_out {
            self.fates[number] = Fate::HeldOut;
        }
        Ok(())
    }

    /// Where the block with this number is: its file, and how many blocks of the file are before it.
    pub fn place(&self, block: usize) -> (usize, usize) {
        let Some((file, _)) = self.blocks.get(block) else { return (usize::MAX, 0) };
        let before = self.blocks[..block].iter().rev().take_while(|(other, _)| other == file).count();
        (*file as usize, before)
    }

    /// What becomes of the documents of a block.
    pub fn fates_of(&self, block: usize) -> Option<&[Fate]> {
        let first = self.blocks.get(block)?.1 as usize;
        let end = self.blocks.get(block + 1).map_or(self.documents, |(_, next)| *next) as usize;
        self.fates.get(first..end)
    }

    pub fn is_same(&self, block: usize, file: usize) -> bool {
        self.blocks.get(block).is_some_and(|(of, _)| *of as usize == file)
    }

    pub fn trained_on(&self) -> u64 {
        self.fates.iter().filter(|fate| matches!(fate, Fate::Train(1..))).count() as u64
    }
}

/// What is seen of a block.
struct Seen {
    file: usize,
    records: Vec<Record>,
    signatures: Vec<near::Signature>,
    counts: Counts,
}

impl Seen {
    fn of(file: usize, found: Found, is_compared: bool) -> Seen {
        let records = found.texts.iter().map(|text| Record::of(text)).collect();
        let signatures = match is_compared {
            true => found.texts.iter().map(|text| near::signature(text)).collect(),
            false => Vec::new(),
        };
        Seen { file, records, signatures, counts: found.counts }
    }
}
