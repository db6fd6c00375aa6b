//! A new job. It waits until the planner finds a place for it.

use crate::cluster::checkpoints::Continues;
use crate::cluster::fit::fit;
use crate::cluster::history::HistoryRow;
use crate::cluster::members::{LABELS_MAX, NAME_MAX, clip, is_label};
use crate::cluster::records::{JobRecord, Progress, Told};
use crate::cluster::{Answer, Context, Effect, State};
use fleet_common::ids::JobId;
use fleet_common::protocol::{JobState, Wish, Work};
use serde::{Deserialize, Serialize};

/// Unfinished jobs: with `WORK_MAX` bounds what the state holds of them.
pub const UNFINISHED_MAX: usize = 1_000;
/// Bytes of what one job is asked to do: a job file, or a program with its arguments and environment. Few have more than a tenth.
pub(super) const WORK_MAX: usize = 128 << 10;
/// Checkpoints of one job that are known as valid, at most.
const KEEP_MAX: u32 = 1_000;
/// Ranks of one job: what the largest cluster has.
pub const WORLD_MAX: u32 = 65_536;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SubmitJob {
    pub name: String,
    pub world_size: u32,
    pub work: Work,
    pub wish: Wish,
    pub keep_checkpoints: u32,
    pub continues: Continues,
}

impl SubmitJob {
    pub(super) fn apply(mut self, state: &mut State, context: &mut Context) -> Answer {
        let trains = matches!(self.work, Work::Train { .. });
        if trains {
            self.wish.nodes.get_or_insert(1);
        }
        if let Err(message) = self.check().and_then(|()| self.check_room(state)) {
            return Answer::invalid(message);
        }
        if state.jobs.values().filter(|job| !job.state.is_final()).count() >= UNFINISHED_MAX {
            return Answer::later(format!(
                "{UNFINISHED_MAX} jobs are unfinished, which is the limit; cancel some or wait"
            ));
        }
        state.last_job += 1;
        let job = JobId(state.last_job);
        let bytes = context.keep(HistoryRow::Work { job, work: self.work.clone().without_secrets() });
        context.effects.extend([Effect::Plan, Effect::Job(job)]);
        let record = JobRecord {
            name: clip(&self.name),
            world_size: self.world_size,
            wish: self.wish,
            trains,
            work: Some(self.work),
            keep_checkpoints: self.keep_checkpoints.min(KEEP_MAX),
            state: JobState::Queued,
            submitted_unix_ms: context.unix_ms,
            finished_unix_ms: None,
            generation: 0,
            placement: None,
            stop: None,
            requeue: false,
            ending: None,
            events: 0,
            bytes,
            told: Told::default(),
            progress: Progress::default(),
            data: None,
            checkpoints: Vec::new(),
            continues: self.continues,
            fetched: Vec::new(),
            passed_over: Vec::new(),
            error: None,
        };
        state.jobs.insert(job, record);
        Answer::Submitted { job }
    }

    /// What no cluster could do.
    fn check(&self) -> Result<(), String> {
        let Wish { nodes, slots_per_rank, labels, max_time_s, .. } = &self.wish;
        if self.world_size == 0 || self.world_size > WORLD_MAX {
            return Err(format!("a job has 1 to {WORLD_MAX} ranks, not {}", self.world_size));
        }
        if *slots_per_rank == 0 || slots_per_rank.checked_mul(self.world_size).is_none() {
            return Err(format!("each rank takes at least one slot and not {slots_per_rank}"));
        }
        if let Some(nodes) = nodes
            && (*nodes == 0 || !self.world_size.is_multiple_of(*nodes))
        {
            return Err(format!(
                "{} ranks cannot be divided evenly over {nodes} nodes; choose a number of ranks that can",
                self.world_size
            ));
        }
        if labels.len() > LABELS_MAX || labels.iter().any(|(name, value)| !is_label(name, value)) {
            return Err(format!(
                "a job asks for at most {LABELS_MAX} labels like `gpu=h200` of at most {NAME_MAX} characters each"
            ));
        }
        let flawed = self.work.environment().iter().find_map(|variable| Some((variable, variable.flaw()?)));
        if let Some((variable, flaw)) = flawed {
            return Err(format!(
                "the variable {:?} {flaw}",
                variable.name.chars().take(NAME_MAX).collect::<String>()
            ));
        }
        let size = size_of(&self.work);
        if size > WORK_MAX {
            return Err(format!(
                "what the job is asked to do has {size} bytes with its environment, and {WORK_MAX} is the limit; put long lists into files, unset variables that are not needed"
            ));
        }
        if *max_time_s == Some(0) {
            return Err("a job needs more time than none".into());
        }
        Ok(())
    }

    /// What all nodes that ever joined could not do, even idle.
    fn check_room(&self, state: &State) -> Result<(), String> {
        // Nobody knows yet what a node has that is just joining. One that never greeted is lost when its lease has passed.
        if self.wish.queue || state.nodes.values().any(|node| node.slots == 0 && !node.lost) {
            return Ok(());
        }
        let each = self.wish.slots_per_rank;
        let suitable = state.nodes.iter().filter(|(_, node)| node.slots > 0 && node.suits(&self.wish));
        let room: Vec<_> = suitable.map(|(id, node)| (*id, node.slots / each)).collect();
        if fit(&room, self.world_size, self.wish.nodes).is_some() {
            return Ok(());
        }
        let labels: Vec<_> = self.wish.labels.iter().map(|(name, value)| format!("{name}={value}")).collect();
        let like = match labels.is_empty() {
            true => String::new(),
            false => format!(" with {}", labels.join(",")),
        };
        let ranks = match each {
            1 => format!("{} ranks", self.world_size),
            _ => format!("{} ranks of {each} slots", self.world_size),
        };
        let places = |places: u64| match (each, places) {
            (1, _) => format!("{places} slots"),
            (_, 1) => format!("1 place of {each} slots"),
            _ => format!("{places} places of {each} slots"),
        };
        let cure = "ask for less, join more nodes, or wait for them with --queue";
        let largest = room.iter().map(|(_, places)| u64::from(*places)).max();
        Err(match (largest, self.wish.nodes) {
            (None, _) if like.is_empty() => {
                "no node has joined; start one with `worker join`, or wait for one with --queue".into()
            }
            (None, _) => format!("no node{like} has joined; {cure}"),
            (Some(largest), Some(1)) => {
                format!(
                    "the job has {ranks} on one node, and the largest node{like} has {}; {cure}",
                    places(largest)
                )
            }
            (Some(largest), Some(nodes)) => format!(
                "the job has {ranks} on {nodes} nodes, and the nodes{like} that joined are {}, the largest with {}; {cure}",
                room.len(),
                places(largest)
            ),
            (Some(largest), None) if room.len() == 1 => {
                format!("the job has {ranks}, and the only node{like} has {}; {cure}", places(largest))
            }
            (Some(_), None) => {
                let sum: u64 = room.iter().map(|(_, places)| u64::from(*places)).sum();
                format!(
                    "the job has {ranks}, and all {} nodes{like} together have {}; {cure}",
                    room.len(),
                    places(sum)
                )
            }
        })
    }
}

pub(super) fn size_of(work: &Work) -> usize {
    match work {
        Work::Train { job_json } => job_json.len(),
        Work::Program(program) => {
            let env =
                program.env.iter().map(|variable| variable.name.len() + variable.text().map_or(0, str::len));
            program.argv.iter().map(String::len).chain(env).sum::<usize>() + program.working_dir.len()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::commands::{Change, DrainNode, MarkNodeLost};
    use crate::cluster::tests::{Script, program, redeem, submit, training, why};
    use fleet_common::ids::NodeId;
    use fleet_common::protocol::{Program, Variable};

    fn wishing(world_size: u32, wish: Wish) -> Change {
        Change::SubmitJob(SubmitJob {
            name: "n".into(),
            world_size,
            work: program(),
            wish,
            keep_checkpoints: 1,
            continues: Continues::Nothing,
        })
    }

    #[test]
    fn jobs_are_numbered_and_wait() {
        let mut script = Script::new();
        assert_eq!(script.run(submit(2)), Answer::Submitted { job: JobId(1) });
        assert_eq!(script.run(submit(2)), Answer::Submitted { job: JobId(2) });
        assert_eq!(script.state.jobs()[&JobId(2)].state, JobState::Queued);
    }

    #[test]
    fn what_the_state_keeps_of_a_job_is_bounded() {
        let mut script = Script::with_nodes(&[4]);
        let submit = |name: &str, value: usize| {
            let env = vec![Variable::secret("LIST", "x".repeat(value))];
            let program = Program { argv: vec!["true".into()], working_dir: "/".into(), env };
            let (name, work) = (name.to_owned(), Work::Program(program));
            let wish = Wish::default();
            Change::SubmitJob(SubmitJob {
                name,
                world_size: 1,
                work,
                wish,
                keep_checkpoints: u32::MAX,
                continues: Continues::Nothing,
            })
        };
        assert!(why(script.run(submit("n", WORK_MAX))).contains("131072 is the limit"));
        let answer = script.run(submit(&"n".repeat(5_000), WORK_MAX / 2));
        assert_eq!(answer, Answer::Submitted { job: JobId(1) });
        let job = &script.state.jobs()[&JobId(1)];
        assert!(job.name.len() < 1_000 && job.keep_checkpoints == KEEP_MAX);
    }

    #[test]
    fn more_than_all_nodes_have_is_refused_with_what_there_is_unless_it_may_wait() {
        let mut script = Script::with_nodes(&[4, 2]);
        let refusal = why(script.run(wishing(8, Wish::default())));
        assert!(
            refusal.contains("8 ranks") && refusal.contains("2 nodes together have 6 slots"),
            "{refusal}"
        );
        let refusal = why(script.run(wishing(8, Wish { nodes: Some(1), ..Wish::default() })));
        assert!(refusal.contains("8 ranks") && refusal.contains("largest node has 4 slots"), "{refusal}");
        let labels = [("gpu".to_owned(), "h200".to_owned())].into();
        let refusal = why(script.run(wishing(1, Wish { labels, ..Wish::default() })));
        assert!(refusal.contains("no node with gpu=h200 has joined"), "{refusal}");
        assert!(script.state.jobs().is_empty());
        assert!(matches!(script.run(wishing(6, Wish::default())), Answer::Submitted { .. }));
        assert!(matches!(
            script.run(wishing(8, Wish { queue: true, ..Wish::default() })),
            Answer::Submitted { .. }
        ));
    }

    #[test]
    fn what_a_node_has_for_a_rank_of_several_slots_is_said_in_such_places() {
        let mut script = Script::with_nodes(&[3, 3]);
        let wish = |nodes| Wish { slots_per_rank: 2, nodes, ..Wish::default() };
        let refusal = why(script.run(wishing(3, wish(None))));
        assert!(
            refusal.contains("3 ranks of 2 slots, and all 2 nodes together have 2 places of 2 slots"),
            "{refusal}"
        );
        let refusal = why(script.run(wishing(2, wish(Some(1)))));
        assert!(refusal.contains("the largest node has 1 place of 2 slots"), "{refusal}");
        assert!(matches!(script.run(wishing(2, wish(None))), Answer::Submitted { .. }));
    }

    #[test]
    fn a_node_that_is_just_joining_may_have_room_and_one_that_never_came_has_none() {
        let mut script = Script::with_node(4);
        script.run(redeem("w", "half"));
        assert!(matches!(script.run(wishing(8, Wish::default())), Answer::Submitted { .. }));
        script.run(Change::MarkNodeLost(MarkNodeLost { node: NodeId(2), silent_ms: 10_000 }));
        let refusal = why(script.run(wishing(8, Wish::default())));
        assert!(refusal.contains("the only node has 4 slots"), "{refusal}");
    }

    #[test]
    fn lost_and_drained_nodes_count_and_none_at_all_is_said() {
        let mut script = Script::with_nodes(&[4, 4]);
        script.lose_node();
        script.run(Change::DrainNode(DrainNode { node: NodeId(2), now: false }));
        assert!(matches!(script.run(wishing(8, Wish::default())), Answer::Submitted { .. }));
        assert!(why(script.run(wishing(9, Wish::default()))).contains("all 2 nodes together have 8 slots"));
        let mut script = Script::new();
        assert!(why(script.run(wishing(1, Wish::default()))).contains("no node has joined"));
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        let mut script = Script::with_nodes(&[4, 4]);
        let mut refusal = |world, wish| why(script.run(wishing(world, wish)));
        assert!(refusal(0, Wish::default()).contains("1 to 65536 ranks"));
        assert!(refusal(5, Wish { nodes: Some(2), ..Wish::default() }).contains("divided evenly"));
        assert!(refusal(1, Wish { max_time_s: Some(0), ..Wish::default() }).contains("more time"));
        assert!(refusal(1, Wish { slots_per_rank: 0, ..Wish::default() }).contains("at least one slot"));
        let labels = [("a b".to_owned(), "c".to_owned())].into();
        assert!(refusal(1, Wish { labels, ..Wish::default() }).contains("labels like"));
    }

    #[test]
    fn a_training_job_keeps_to_one_node_unless_it_asks_for_more() {
        let mut script = Script::with_nodes(&[2, 2]);
        let train = |nodes| {
            let wish = Wish { nodes, ..Wish::default() };
            let work = training();
            Change::SubmitJob(SubmitJob {
                name: "t".into(),
                world_size: 4,
                work,
                wish,
                keep_checkpoints: 1,
                continues: Continues::Nothing,
            })
        };
        assert!(why(script.run(train(None))).contains("4 ranks on one node"));
        assert!(why(script.run(train(Some(3)))).contains("divided evenly over 3 nodes"));
        assert!(matches!(script.run(train(Some(2))), Answer::Submitted { .. }));
    }
}
