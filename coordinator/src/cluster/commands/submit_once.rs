//! A new job under a name of the user's own, which makes it the same job however often and by whomever it is submitted.

use super::SubmitJob;
use crate::cluster::submissions::Submission;
use crate::cluster::{Answer, Context, State};
use fleet_common::codec;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// Characters of a name.
pub const ID_MAX: usize = 64;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SubmitOnce {
    pub id: String,
    pub job: SubmitJob,
}

impl SubmitOnce {
    pub(super) fn apply(self, state: &mut State, context: &mut Context) -> Answer {
        let SubmitOnce { id, job } = self;
        if !is_id(&id) {
            return Answer::invalid(format!(
                "--id takes 1 to {ID_MAX} letters, digits and . _ - and begins with a letter or digit"
            ));
        }
        // Without secrets: their values may change, and must not be guessed from what is kept.
        let asked = SubmitJob { work: job.work.clone().without_secrets(), ..job.clone() };
        let digest = match codec::encode(&asked) {
            Ok(bytes) => Sha256::digest(bytes).into(),
            Err(error) => return Answer::invalid(format!("the job cannot be kept: {error}")),
        };
        match state.submissions.get(&id) {
            Some(known) if known.digest == digest => return Answer::Submitted { job: known.job },
            Some(known) => {
                return Answer::invalid(format!(
                    "`{id}` is {}, which was submitted with another job file, program, environment or options; see `fleet status {}`, or choose another --id",
                    known.job, known.job
                ));
            }
            None => {}
        }
        let answer = job.apply(state, context);
        if let Answer::Submitted { job } = answer {
            let jobs = &state.jobs;
            let unfinished = |job| jobs.get(&job).is_some_and(|record| !record.state.is_final());
            state.submissions.keep(id, Submission { job, digest }, unfinished);
        }
        answer
    }
}

fn is_id(text: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    text.len() <= ID_MAX && text.starts_with(|c: char| c.is_ascii_alphanumeric()) && text.chars().all(plain)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::commands::Change;
    use crate::cluster::ends::FINISHED_IN_STATE;
    use crate::cluster::tests::{Script, finished, job, program, submit, why};
    use fleet_common::ids::JobId;
    use fleet_common::protocol::{Program, Variable, Wish, Work};

    fn once(id: &str, world_size: u32) -> Change {
        let Change::SubmitJob(job) = submit(world_size) else { unreachable!("it is a submit") };
        Change::SubmitOnce(SubmitOnce { id: id.into(), job })
    }

    #[test]
    fn a_name_is_one_job_whoever_submits_it_and_another_job_is_refused_by_name() {
        let mut script = Script::with_node(4);
        let first = script.submit_as(once("nightly-7", 1));
        assert_eq!(script.submit_as(once("nightly-7", 1)), first);
        assert_ne!(script.submit_as(once("nightly-8", 1)), first);
        let refusal = why(script.run(once("nightly-7", 2)));
        assert!(refusal.contains("`nightly-7` is job-1") && refusal.contains("another --id"), "{refusal}");
        assert_eq!(script.state.jobs().len(), 2);
    }

    #[test]
    fn another_value_of_a_secret_is_no_other_job_and_another_open_one_is() {
        let mut script = Script::with_node(4);
        let once = |variable| {
            let env = vec![variable];
            let work = Work::Program(Program { argv: vec!["a".into()], working_dir: "/".into(), env });
            let Change::SubmitJob(job) = job(work, 1, Wish::default()) else {
                unreachable!("it is a submit")
            };
            Change::SubmitOnce(SubmitOnce { id: "s".into(), job })
        };
        let first = script.submit_as(once(Variable::secret("KEY", "old")));
        assert_eq!(script.submit_as(once(Variable::secret("KEY", "new"))), first);
        assert!(why(script.run(once(Variable::secret("OTHER", "old")))).contains("is job-1"));
        assert!(why(script.run(once(Variable::open("KEY", "old")))).contains("is job-1"));
    }

    #[test]
    fn it_stays_so_after_the_job_has_ended_and_is_only_in_the_history() {
        let mut script = Script::with_node(1);
        let first = script.submit_as(once("first", 1));
        script.assign(first);
        script.tell(first, 1, 1, vec![finished()]);
        assert_eq!(script.submit_as(once("first", 1)), first);
        for _ in 0..=FINISHED_IN_STATE {
            let job = script.submit(1);
            script.assign(job);
            script.tell(job, 1, 1, vec![finished()]);
        }
        assert!(!script.state.jobs().contains_key(&first));
        assert_eq!(script.submit_as(once("first", 1)), first);
    }

    #[test]
    fn what_was_refused_leaves_its_name_free() {
        let mut script = Script::with_node(1);
        let Change::SubmitJob(job) = job(program(), 2, Wish::default()) else {
            unreachable!("it is a submit")
        };
        let too_large = Change::SubmitOnce(SubmitOnce { id: "a".into(), job });
        assert!(why(script.run(too_large)).contains("2 ranks"));
        assert_eq!(script.submit_as(once("a", 1)), JobId(1));
        for bad in ["", "-x", "a b", "\u{1b}[31m", &"x".repeat(ID_MAX + 1)] {
            assert!(why(script.run(once(bad, 1))).contains("--id takes"), "{bad:?}");
        }
    }
}
