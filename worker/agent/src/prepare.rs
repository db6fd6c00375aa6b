//! What must be there before ranks start: the checkpoint to resume from, a directory that takes new ones, and the token cache; found,
//! verified, built. Blocking work for a thread of its own; its errors carry their fault.

use crate::fetch::{self, Unfetched};
use crate::gang::Prepared;
use crate::panics;
use crate::verdict::agent_error;
use fleet_checkpoint::{CheckpointError, Claim, Manifest, RunDir, can_begin, continued};
use fleet_common::events::{FailureKind, JobError, Level};
use fleet_common::exit::Fault;
use fleet_common::ids::JobId;
use fleet_common::job::{Job, Model, Resume};
use fleet_common::net::Identity;
use fleet_common::protocol::ResumePoint;
use fleet_data::{DataError, DataFiles, Note, TokenCache};
use std::path::{Path, PathBuf};

/// Where and for whom a job is prepared.
pub struct Place {
    /// The node's name.
    pub node: String,
    pub identity: Identity,
    /// Rank 0 is here.
    pub leads: bool,
    /// All ranks are.
    pub alone: bool,
    /// The name of a run that begins with the job.
    pub run: String,
    /// The recorded checkpoint that it goes on from.
    pub resume: Option<ResumePoint>,
}

impl Place {
    /// Of a job on several nodes it is said on which.
    fn refused(&self, fault: Fault, error: &dyn std::fmt::Display) -> JobError {
        let message = if self.alone { error.to_string() } else { format!("on node {}: {error}", self.node) };
        agent_error(FailureKind::Refused, fault, &self.node, message)
    }
}

/// Why ranks cannot start.
#[derive(Debug)]
pub enum Unprepared {
    Failed(JobError),
    /// The checkpoint to go on from is not here and cannot be fetched: why, in one line.
    Lost {
        manifest_sha256: String,
        why: String,
    },
}

impl From<JobError> for Unprepared {
    fn from(error: JobError) -> Unprepared {
        Unprepared::Failed(error)
    }
}

/// Does `work`, which prepares `job` on the node `node`, on a thread of its own. A panic there is an error of the job.
pub async fn in_a_thread(
    job: JobId,
    node: String,
    work: impl FnOnce() -> Result<Prepared, Unprepared> + Send + 'static,
) -> Result<Prepared, Unprepared> {
    let done = panics::blocking(work).await;
    done.unwrap_or_else(|said| {
        let message = format!(
            "preparing the data of {job} failed on {node}, by a fault of fleet: {said}; the worker's log says where: please report it"
        );
        Err(agent_error(FailureKind::Refused, Fault::Job, &node, message).into())
    })
}

/// Prepares a job, telling `progress` what goes on. The directory of its run is claimed where rank 0 is.
pub fn prepare(job: &Job, place: Place, progress: &dyn Fn(Level, String)) -> Result<Prepared, Unprepared> {
    let failed = |error: CheckpointError| place.refused(error.fault(), &error);
    let no_data = |error: DataError| place.refused(error.fault(), &error);
    let tell = |note: Note| progress(note.level, note.line);
    let resume = resume(job, &place, progress)?;
    let mut job = job.clone();
    let reads = job.inputs();
    if let Some(checkpoint) = &resume {
        let notes = fleet_checkpoint::take_what_is_gone(&mut job, checkpoint);
        notes.into_iter().for_each(|note| progress(Level::Warn, note));
    }
    if let (None, Model::Pretrained(dir)) = (&resume, &job.model) {
        // What cannot be run is told before the data are tokenised.
        can_begin(dir, &job).map_err(failed)?;
    }
    let files = DataFiles::find(&job, &tell).map_err(no_data)?;
    let claim = Claim {
        dir: &job.checkpoint_dir(),
        run: &place.run,
        resumed: resume.as_deref(),
        overwrite: job.checkpoint.overwrite,
        until: job.max_steps,
        reads: &reads,
    };
    // Kept until the data are read, so that nobody else reads them for the same place in vain; then rank 0 takes it.
    let _claimed = place.leads.then(|| RunDir::claim(&claim)).transpose().map_err(failed)?;
    let (cache, stats) = TokenCache::build_or_open(&job, &files, &tell).map_err(no_data)?;
    Ok(Prepared { cache_dir: cache.dir().to_owned(), stats, resume, run: place.run })
}

/// The checkpoint that the job continues from, with every hash checked. What the cluster knows of and is not here is fetched.
fn resume(job: &Job, place: &Place, progress: &dyn Fn(Level, String)) -> Result<Option<PathBuf>, Unprepared> {
    let failed = |error: CheckpointError| Unprepared::from(place.refused(error.fault(), &error));
    let Some(point) = &place.resume else { return continued(job, progress).map_err(failed) };
    // What this node has and no other can be as new only where all ranks are here: those of several nodes go on from the same one.
    let is_as_new = |dir: &Path| Manifest::read(dir).is_ok_and(|manifest| manifest.step >= point.step);
    if job.checkpoint.resume == Resume::Latest
        && place.alone
        && let Ok(Some(dir)) = continued(job, &|_, _| {})
        && is_as_new(&dir)
    {
        progress(Level::Info, format!("continuing from {}", dir.display()));
        return Ok(Some(dir));
    }
    let dir = Path::new(&point.path);
    let here = fleet_checkpoint::manifest_sha256(dir).is_ok_and(|sha256| sha256 == point.manifest_sha256);
    if !here || fleet_checkpoint::verify(dir).is_err() {
        let told = |line| progress(Level::Info, line);
        fetch::fetch(point, place.identity.clone(), fetch::PATIENCE, &told).map_err(|unfetched| {
            match unfetched {
                Unfetched::Refused(error) => failed(error),
                Unfetched::Lost(why) => {
                    Unprepared::Lost { manifest_sha256: point.manifest_sha256.clone(), why }
                }
            }
        })?;
    }
    progress(Level::Info, format!("continuing from {}", dir.display()));
    Ok(Some(dir.to_owned()))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // in a test an unwrap is an assertion
mod tests {
    use super::*;
    use fleet_checkpoint::Writer;
    use fleet_common::ids::NodeId;
    use fleet_common::job::parse_toml;
    use fleet_common::net::ClusterCa;
    use fleet_common::protocol::Member;
    use std::time::{Duration, SystemTime};

    fn on_n(run: &str) -> Place {
        let now = SystemTime::now();
        let ca = ClusterCa::create("c", now).unwrap();
        let identity = ca.issue(Member::Worker(NodeId(1)), "n", now, Duration::from_secs(600)).unwrap();
        Place { node: "n".into(), identity, leads: true, alone: true, run: run.into(), resume: None }
    }

    fn error(unprepared: Result<Prepared, Unprepared>) -> JobError {
        match unprepared {
            Err(Unprepared::Failed(error)) => error,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_model_that_cannot_be_run_is_told_before_the_data_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let model = dir.path().join("model");
        std::fs::create_dir(&model).unwrap();
        std::fs::write(model.join("config.json"), r#"{"model_type": "mamba"}"#).unwrap();
        let mut job = job(dir.path(), NEW);
        job.model = Model::Pretrained(model);
        let progress = |_: Level, line: String| panic!("{line}");
        let error = error(prepare(&job, on_n("b"), &progress));
        assert!(error.fault == Fault::Input && error.message.contains("mamba"), "{}", error.message);
    }

    #[tokio::test]
    async fn a_panic_is_an_error_of_the_job_that_names_it() {
        let nothing: Vec<u8> = Vec::new();
        let error = in_a_thread(JobId(7), "box".to_owned(), move || {
            let _ = nothing[0];
            Err(agent_error(FailureKind::Refused, Fault::Input, "box", "not reached").into())
        });
        let error = super::tests::error(error.await);
        assert_eq!((error.fault, error.rank), (Fault::Job, None));
        assert!(error.message.contains("job-7 failed on box"), "{}", error.message);
        assert!(error.message.contains("index out of bounds"), "{}", error.message);
        assert!(!error.message.contains('\n'), "{}", error.message);
    }

    fn job(dir: &Path, model: &str) -> Job {
        let text: String =
            (0..200).map(|i| format!("Line {i} of a text about a cat and a dog.\n\n")).collect();
        std::fs::write(dir.join("data.txt"), text).unwrap();
        let text = format!(
            "output_dir = \"out\"\nrun_name = \"r\"\nmax_seq_len = 8\n[model]\n{model}\n[data]\npath = \"data.txt\"\n"
        );
        parse_toml(&text, dir).unwrap().0
    }

    const NEW: &str = "vocab_size = 270\nhidden_size = 8\nnum_hidden_layers = 1\nnum_attention_heads = 1";

    #[test]
    fn nobody_else_prepares_for_the_same_place_meanwhile() {
        let dir = tempfile::tempdir().unwrap();
        let job = job(dir.path(), NEW);
        let (place, told) = (job.checkpoint_dir(), std::cell::Cell::new(0));
        let claim = || {
            RunDir::claim(&Claim {
                dir: &place,
                run: "other",
                resumed: None,
                overwrite: false,
                until: None,
                reads: &[],
            })
        };
        let progress = |_: Level, line: String| {
            if line.starts_with("tokenising") {
                told.set(told.get() + 1);
                assert!(matches!(claim(), Err(CheckpointError::Busy(_))));
            }
        };
        prepare(&job, on_n("mine"), &progress).unwrap();
        assert_eq!(told.get(), 1);
        claim().unwrap(); // now it is for rank 0
    }

    #[test]
    fn a_checkpoint_whose_weights_are_taken_is_checked_before_the_data_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().join("model");
        let run = RunDir::claim(&Claim {
            dir: &place,
            run: "a",
            resumed: None,
            overwrite: false,
            until: None,
            reads: &[],
        })
        .unwrap();
        let mut writer = Writer::begin(&run, 1).unwrap();
        for name in ["config.json", "model.safetensors", "tokenizer.json"] {
            writer.write_bytes(name, b"{}").unwrap();
        }
        let path = writer.finish(1.0).unwrap().path;
        std::fs::write(Path::new(&path).join("model.safetensors"), "[]").unwrap();
        let mut job = job(dir.path(), NEW);
        job.model = Model::Pretrained(path.into());
        let progress = |_: Level, line: String| panic!("{line}");
        let error = error(prepare(&job, on_n("b"), &progress));
        assert!(error.message.contains("model.safetensors"), "{}", error.message);
    }
}
