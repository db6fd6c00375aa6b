//! What a run is trained for, and with what the model is compared meanwhile.

use crate::agent_link::AgentLink;
use crate::engine::Learner;
use crate::error::{Error, Result};
use crate::executor::Which;
use crate::model::Model;
use crate::objective::{NextToken, Objective};
use crate::preference::{Beside, Preferences, REFERENCE_FILE, Reference, Share};
use fleet_checkpoint::ModelDir;
use fleet_collectives::Activity;
use fleet_common::events::Level;
use fleet_common::job::{self, Dpo, Job};
use fleet_common::protocol::RankStart;
use fleet_data::TokenCache;
use std::path::Path;
use std::time::{Duration, Instant};

/// Between two lines on how far measuring the reference is.
const TOLD_EVERY: Duration = Duration::from_secs(10);

pub(super) struct Aim {
    pub objective: Box<dyn Objective>,
    /// What checkpoints have of the reference.
    pub reference: Option<Vec<u8>>,
}

impl Aim {
    /// Of a job. Measures the reference where one is needed and `start` goes on from no checkpoint that has it; what the learner's weights are
    /// then is not said. None where the run was told to stop meanwhile. A collective call.
    pub fn of(
        job: &Job,
        start: &RankStart,
        model: &Model,
        cache: &TokenCache,
        learner: &mut dyn Learner,
        link: &mut AgentLink,
    ) -> Result<Option<Aim>> {
        let Some(dpo) = job.dpo.clone() else {
            return Ok(Some(Aim { objective: Box::new(NextToken), reference: None }));
        };
        let Some(beside) = Origin::of(&dpo, job, model).beside(job, start, cache, learner, link)? else {
            return Ok(None);
        };
        let reference = match &beside {
            Beside::Reference(reference) if start.rank == 0 => Some(reference.to_bytes()),
            _ => None,
        };
        Ok(Some(Aim { objective: Box::new(Preferences { dpo, beside }), reference }))
    }
}

/// Which model the reference is.
enum Origin<'a> {
    None,
    /// That beside which an adapter is trained.
    Base {
        is_measured: bool,
    },
    /// With the weights of this directory.
    Weights(&'a Path),
}

impl<'a> Origin<'a> {
    fn of(dpo: &'a Dpo, job: &'a Job, model: &'a Model) -> Origin<'a> {
        if !dpo.loss_type.has_reference() {
            return Origin::None;
        }
        let trained = match (&model.adapter, &job.model) {
            (Some(adapter), _) => adapter.from.as_deref(),
            (None, job::Model::Pretrained(dir)) => Some(dir.as_path()),
            (None, job::Model::New(_)) => None,
        };
        match dpo.ref_model.as_deref().or(trained) {
            Some(dir) => Origin::Weights(dir),
            None => Origin::Base { is_measured: dpo.precompute_ref_log_probs },
        }
    }

    fn beside(
        self,
        job: &Job,
        start: &RankStart,
        cache: &TokenCache,
        learner: &mut dyn Learner,
        link: &mut AgentLink,
    ) -> Result<Option<Beside>> {
        let which = match self {
            Origin::None => return Ok(Some(Beside::Nothing)),
            Origin::Base { .. } => Which::Base,
            Origin::Weights(_) => Which::Trained,
        };
        if let Some(checkpoint) = start.resume.as_deref().map(Path::new) {
            if let Some(reference) = Reference::read(checkpoint, cache)? {
                return Ok(Some(Beside::Reference(reference)));
            }
            if which == Which::Trained {
                return Err(Error::Input(format!(
                    "{}: has no {REFERENCE_FILE}, in which a run that learns preferences keeps what its model is compared with; take a checkpoint of such a run, or begin a new one with the checkpoint as model.path or adapter.path",
                    checkpoint.display()
                )));
            }
        }
        match self {
            Origin::Base { is_measured: false } => return Ok(Some(Beside::Base)),
            Origin::Weights(dir) => {
                if job.adapter.is_none() && ModelDir::open(dir)?.is_quantised() {
                    return Err(Error::Input(format!(
                        "{}: its weights are quantised, and a whole model is compared with one that is not; take the model as it was before as dpo.ref_model",
                        dir.display()
                    )));
                }
                learner.load_weights(dir)?;
            }
            Origin::Base { .. } | Origin::None => {}
        }
        learner.gang().note(Activity::Evaluating);
        let share = Share {
            rank: start.rank as usize,
            world: start.world_size as usize,
            batch_size: job.batch_size as usize,
        };
        let mut told = Instant::now();
        let reference = Reference::measure(learner, which, cache, &share, &mut |done, of| {
            if start.rank == 0 && told.elapsed() > TOLD_EVERY {
                told = Instant::now();
                link.log(Level::Info, format!("the reference: {done} of {of} pairs are measured"));
            }
            !link.stop_asked()
        })?;
        Ok(reference.map(Beside::Reference))
    }
}
