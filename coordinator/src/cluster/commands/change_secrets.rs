//! Secrets in a job's environment are given again or removed. What runs keeps what it was started with.

use super::submit_job::{WORK_MAX, size_of};
use crate::cluster::{Answer, Context, Effect, State};
use fleet_common::ids::JobId;
use fleet_common::protocol::{Secret, Value, Work, listed};
use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ChangeSecrets {
    pub job: JobId,
    /// By name; `None`: all values go, and the job is not started before they were given again.
    pub values: Option<Vec<(String, Secret)>>,
}

impl ChangeSecrets {
    pub(super) fn apply(self, state: &mut State, context: &mut Context) -> Answer {
        let id = self.job;
        let Some(job) = state.jobs.get_mut(&id).filter(|job| !job.state.is_final()) else {
            return match id.0 {
                // It has none any more.
                1.. if id.0 <= state.last_job && self.values.is_none() => Answer::Done,
                1.. if id.0 <= state.last_job => {
                    Answer::invalid(format!("{id} has ended and needs no secrets"))
                }
                _ => Answer::not_found(format!("there is no {id}")),
            };
        };
        let Some(work) = job.work.clone() else { return Answer::Done };
        let (work, line) = match self.values {
            None => (work.without_secrets(), "the values of its secrets were removed".to_owned()),
            Some(values) => match give(id, work, values) {
                Ok(given) => given,
                Err(message) => return Answer::invalid(message),
            },
        };
        if job.work.as_ref() == Some(&work) {
            return Answer::Done;
        }
        job.work = Some(work);
        job.note(id, line, context);
        context.effects.extend([Effect::Job(id), Effect::Plan]);
        Answer::Done
    }
}

/// The work with these values, and a line about it.
fn give(id: JobId, mut work: Work, values: Vec<(String, Secret)>) -> Result<(Work, String), String> {
    let mut names = Vec::new();
    for (name, value) in values {
        let Some(variable) = work.secrets().find(|variable| variable.name == name) else {
            let known: Vec<&str> = work.secrets().map(|variable| variable.name.as_str()).collect();
            return Err(match known.is_empty() {
                true => format!("{id} was submitted without secrets"),
                false => format!("{id} has no secret of that name; it has {}", listed(known)),
            });
        };
        variable.value = Value::Secret(value);
        if let Some(flaw) = variable.flaw() {
            return Err(format!("the variable {name} {flaw}"));
        }
        names.push(name);
    }
    if size_of(&work) > WORK_MAX {
        return Err(format!("with these values the environment of {id} is larger than {WORK_MAX} bytes"));
    }
    Ok((work, format!("secrets were given: {}", listed(names.iter().map(String::as_str)))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::checkpoints::Continues;
    use crate::cluster::commands::{CancelJob, Change, SubmitJob};
    use crate::cluster::history::HistoryRow;
    use crate::cluster::records::Stop;
    use crate::cluster::tests::{Script, why};
    use fleet_common::protocol::{Program, ToAgent, Variable, Wish};

    fn submit(script: &mut Script) -> JobId {
        let env = vec![Variable::open("PATH", "/bin"), Variable::secret("KEY", "hidden")];
        let program = Program { argv: vec!["true".into()], working_dir: "/".into(), env };
        let (work, wish) = (Work::Program(program), Wish::default());
        let submit = SubmitJob {
            name: "n".into(),
            world_size: 1,
            work,
            wish,
            keep_checkpoints: 1,
            continues: Continues::Nothing,
        };
        match script.run(Change::SubmitJob(submit)) {
            Answer::Submitted { job } => job,
            other => panic!("{other:?}"),
        }
    }

    fn change(script: &mut Script, job: JobId, values: Option<&[(&str, &str)]>) -> Answer {
        let own = |(name, value): &(&str, &str)| ((*name).to_owned(), Secret::new((*value).to_owned()));
        let values = values.map(|values| values.iter().map(own).collect());
        script.run(Change::ChangeSecrets(ChangeSecrets { job, values }))
    }

    fn removed(script: &Script, job: JobId) -> usize {
        script.state.jobs()[&job].removed_secrets().count()
    }

    #[test]
    fn without_its_secrets_a_job_is_not_started_and_with_them_again_it_is() {
        let mut script = Script::with_node(2);
        let job = submit(&mut script);
        assert_eq!(change(&mut script, job, None), Answer::Done);
        assert_eq!(removed(&script, job), 1);
        let assign = Change::AssignGang(crate::cluster::commands::AssignGang {
            job,
            generation: 1,
            parts: vec![(script.node(), 1)],
        });
        assert!(why(script.run(assign)).contains("lacks secrets"));
        assert!(why(change(&mut script, job, Some(&[("PATH", "/")]))).contains("it has KEY"));
        assert_eq!(change(&mut script, job, Some(&[("KEY", "other")])), Answer::Done);
        script.assign(job);
        let orders = script.state.orders(script.node());
        let [ToAgent::StartGang(gang)] = &orders[..] else { panic!("{orders:?}") };
        let texts: Vec<_> = gang.work.environment().iter().map(Variable::text).collect();
        assert_eq!(texts, [Some("/bin"), Some("other")]);
    }

    #[test]
    fn neither_the_history_nor_what_is_backed_up_has_the_values_and_an_end_removes_them() {
        let mut script = Script::with_node(2);
        let job = submit(&mut script);
        let rows = |script: &Script| {
            let rows = script.history.iter().map(|row| row.encode().unwrap());
            rows.flatten().collect::<Vec<u8>>()
        };
        let hidden = |bytes: &[u8]| bytes.windows(6).any(|window| window == b"hidden");
        assert!(script.history.iter().any(|row| matches!(row, HistoryRow::Work { .. })));
        assert!(!hidden(&rows(&script)));
        let state = |state: &State| fleet_common::codec::encode_record(state).unwrap();
        assert!(hidden(&state(&script.state)), "it is needed to start the job");
        assert!(!hidden(&state(&script.state.clone().without_secrets())));
        script.run(Change::CancelJob(CancelJob { job, stop: Stop::Now }));
        assert!(!hidden(&state(&script.state)) && !hidden(&rows(&script)));
        assert_eq!(change(&mut script, job, None), Answer::Done);
        assert!(why(change(&mut script, job, Some(&[("KEY", "x")]))).contains("has ended"));
        assert!(why(change(&mut script, JobId(9), None)).contains("there is no job-9"));
    }
}
