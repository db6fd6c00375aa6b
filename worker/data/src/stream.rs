//! Data as one stream of tokens in memory, in the order of the files: what a cache would train on if nothing were held out.

use crate::tokenizer::{Encoder, ModelIds, guarded};
use crate::{DataError, DataFiles, Note, build, cache, documents};
use fleet_common::job::{Job, Tokenizer};

/// Every document with what the tokenizer puts around it, and its end.
#[derive(Debug)]
pub struct Stream {
    pub ids: Vec<u32>,
    pub documents: u64,
    /// Of the text that is in the tokens, in UTF-8.
    pub bytes: u64,
}

impl Stream {
    /// Reads, cleans and tokenises the data of a job whose tokenizer is given. `progress` gets what is to know of them.
    pub fn read(job: &Job, progress: &dyn Fn(Note)) -> Result<Stream, DataError> {
        guarded(&job.tokenizer, || Stream::tokenised(job, progress))
    }

    fn tokenised(job: &Job, progress: &dyn Fn(Note)) -> Result<Stream, DataError> {
        let files = DataFiles::find(job, progress)?.files;
        let Tokenizer::File(path) = &job.tokenizer else {
            return Err(DataError::Vocabulary(
                "a stream of tokens needs a tokenizer that is there; set tokenizer.path".into(),
            ));
        };
        let ids = ModelIds::of(&job.model)?;
        let encoder = Encoder::open(path, &ids)?;
        ids.check_holds(encoder.vocab_size)?;
        let hashes = cache::hash_files(&files)?;
        let (texts, counts) = documents::parse(&files, build::read_files(&files, &hashes)?, &job.data)?;
        let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
        let (documents, coverage) = build::tokens(&encoder, &texts, true)?;
        coverage.check()?;
        counts.notes().into_iter().chain(coverage.notes()).for_each(progress);
        let count = documents.len() as u64;
        Ok(Stream {
            ids: documents.into_iter().flatten().collect(),
            documents: count,
            bytes: coverage.said_bytes(),
        })
    }
}
