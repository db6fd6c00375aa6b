//! Data as one stream of tokens in memory, in the order of the files: what a cache would train on if nothing were held out.

use crate::documents::{self, Documents, Found};
use crate::tokenizer::{Encoder, ModelIds, guarded};
use crate::{Counts, Coverage, DataError, DataFiles, Note, blocks, build};
use fleet_common::job::{Job, Tokenizer};
use rayon::prelude::*;

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
        let files = DataFiles::find(job, progress)?.hashed()?;
        let Tokenizer::File(path) = &job.tokenizer else {
            return Err(DataError::Vocabulary(
                "a stream of tokens needs a tokenizer that is there; set tokenizer.path".into(),
            ));
        };
        let ids = ModelIds::of(&job.model)?;
        let encoder = Encoder::open(path, &ids)?;
        ids.check_holds(encoder.vocab_size)?;
        let documents = Documents::of(&files, &job.data)?;
        let mut counts = Counts { files: files.len() as u64, ..Counts::default() };
        let mut stream = Stream { ids: Vec::new(), documents: 0, bytes: 0 };
        let mut coverage = Coverage::default();
        blocks::batches(&files, documents.reading(), 0, 0, &mut |batch| {
            let one = |(file, block)| {
                let Found { texts, counts } = documents.found(file, block)?;
                let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
                Ok((build::tokens(&encoder, &texts)?, counts))
            };
            let made: Vec<Result<_, DataError>> = batch.into_par_iter().map(one).collect();
            for made in made {
                let ((documents, more), read) = made?;
                stream.documents += documents.len() as u64;
                stream.ids.extend(documents.into_iter().flatten());
                coverage = coverage.and(&more);
                counts.add(read);
            }
            Ok(())
        })?;
        counts.settle();
        documents::check(stream.documents, &counts, &files)?;
        coverage.check()?;
        counts.notes().into_iter().chain(coverage.notes()).for_each(progress);
        Ok(Stream { bytes: coverage.said_bytes(), ..stream })
    }
}
