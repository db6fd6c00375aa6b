//! What data looked like in a run, to compare later data with.

use crate::cluster::history::HistoryRow;
use crate::cluster::members::{NAME_MAX, clean_text, is_plain};
use crate::cluster::retention::Unit;
use crate::cluster::{Answer, Context, State};
use fleet_common::ids::ProfileId;
use fleet_common::protocol::{Feature, NewProfile, ProfileView};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// Features of one profile.
const FEATURES_MAX: usize = 1_000;
/// Bins of one histogram.
const BINS_MAX: usize = 256;
/// Bins of all histograms of one profile: lists of profiles are read with them.
const ALL_BINS_MAX: usize = 16_384;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RecordProfile {
    pub record: NewProfile,
}

impl RecordProfile {
    pub(super) fn apply(self, state: &mut State, context: &mut Context) -> Answer {
        let mut record = self.record;
        if !state.is_run(record.run) {
            return Answer::not_found(format!("there is no run {}; `fleet runs ls` lists them", record.run));
        }
        let Some(name) = clean_text(&record.name) else {
            return Answer::invalid("a profile needs a name");
        };
        if record.features.is_empty() || record.features.len() > FEATURES_MAX {
            return Answer::invalid(format!("a profile has 1 to {FEATURES_MAX} features"));
        }
        let bins: usize = record.features.iter().map(|feature| feature.counts.len()).sum();
        if bins > ALL_BINS_MAX {
            return Answer::invalid(format!(
                "a profile has at most {ALL_BINS_MAX} bins in all, not {bins}; use fewer for each feature"
            ));
        }
        let mut names = BTreeSet::new();
        if let Some(twice) = record.features.iter().find(|feature| !names.insert(&feature.name)) {
            return Answer::invalid(format!("the feature {} is there twice", shown(&twice.name)));
        }
        if let Some(why) = record.features.iter().find_map(flaw) {
            return Answer::invalid(why);
        }
        record.name = name;
        state.last_profile += 1;
        let profile = ProfileId(state.last_profile);
        let view = ProfileView { profile, unix_ms: context.unix_ms, record };
        let bytes = context.keep(HistoryRow::Profile { profile, record: Box::new(view) });
        state.retention.ended(Unit::Profile(profile), bytes, context.unix_ms);
        Answer::ProfileRecorded { profile }
    }
}

fn shown(name: &str) -> String {
    name.chars().filter(|c| !c.is_control()).take(NAME_MAX).collect()
}

/// What is wrong with a feature.
fn flaw(feature: &Feature) -> Option<String> {
    let Feature { name, samples, mean, std_dev, edges, counts } = feature;
    if name.is_empty() || name.len() > 4 * NAME_MAX || !is_plain(name) {
        return Some(format!(
            "the name of a feature has 1 to {} bytes and no control characters",
            4 * NAME_MAX
        ));
    }
    let name = shown(name);
    if !mean.is_finite() || !std_dev.is_finite() || *std_dev < 0.0 {
        return Some(format!(
            "the mean and the deviation of {name} must be numbers, the deviation not below 0"
        ));
    }
    if !(1..=BINS_MAX).contains(&counts.len()) || edges.len() != counts.len() + 1 {
        return Some(format!("{name} must have 1 to {BINS_MAX} bins and one edge more than bins"));
    }
    let rising = edges.windows(2).all(|pair| matches!(pair, [low, high] if low < high));
    if !rising || !edges.iter().all(|edge| edge.is_finite()) {
        return Some(format!("the edges of {name} must be rising numbers"));
    }
    let counted = counts.iter().fold(0u64, |sum, count| sum.saturating_add(*count));
    (counted > *samples).then(|| format!("the bins of {name} hold {counted} of only {samples} samples"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::commands::{Change, StartRun};
    use crate::cluster::tests::{Script, profile, why};
    use fleet_common::ids::{JobId, RunId};
    use fleet_common::protocol::RunKey;

    #[test]
    fn a_profile_belongs_to_a_run() {
        let mut script = Script::with_node(4);
        let record = |run| Change::RecordProfile(RecordProfile { record: profile(run) });
        assert!(why(script.run(record(RunKey::Own(RunId(1))))).contains("no run run-1"));
        script.run(Change::StartRun(StartRun { name: "r".into() }));
        assert_eq!(
            script.run(record(RunKey::Own(RunId(1)))),
            Answer::ProfileRecorded { profile: ProfileId(1) }
        );
        let program = script.submit(1);
        assert!(why(script.run(record(RunKey::Job(program)))).contains("no run job-1"));
        let job = script.submit_training(1);
        assert_eq!(script.run(record(RunKey::Job(job))), Answer::ProfileRecorded { profile: ProfileId(2) });
        assert!(why(script.run(record(RunKey::Job(JobId(9))))).contains("job-9"));
    }

    #[test]
    fn its_histograms_make_sense() {
        let mut script = Script::new();
        script.run(Change::StartRun(StartRun { name: "r".into() }));
        let mut refusal = |spoil: fn(&mut NewProfile)| {
            let mut record = profile(RunKey::Own(RunId(1)));
            spoil(&mut record);
            why(script.run(Change::RecordProfile(RecordProfile { record })))
        };
        assert!(refusal(|p| p.name.clear()).contains("needs a name"));
        assert!(refusal(|p| p.features.clear()).contains("1 to 1000 features"));
        assert!(refusal(|p| p.features.push(p.features[0].clone())).contains("there twice"));
        assert!(refusal(|p| p.features[0].mean = f64::NAN).contains("must be numbers"));
        assert!(refusal(|p| p.features[0].edges.truncate(1)).contains("one edge more"));
        assert!(refusal(|p| p.features[0].name.push('\x07')).contains("no control characters"));
        let nothing = refusal(|p| (p.features[0].edges, p.features[0].counts) = (vec![1.0], vec![]));
        assert!(nothing.contains("1 to 256 bins"));
        assert!(refusal(|p| p.features[0].edges.reverse()).contains("rising"));
        assert!(refusal(|p| p.features[0].samples = 1).contains("of only 1 samples"));
    }
}
