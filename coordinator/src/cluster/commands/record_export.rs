//! A model was exported from a checkpoint.

use crate::cluster::history::HistoryRow;
use crate::cluster::members::{clean_text, is_plain};
use crate::cluster::retention::Unit;
use crate::cluster::{Answer, Context, State};
use fleet_common::events::is_sha256;
use fleet_common::ids::ExportId;
use fleet_common::protocol::{ExportView, NewExport};
use serde::{Deserialize, Serialize};

/// Bytes of a path on a node: what Linux allows.
const PATH_MAX: usize = 4_096;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RecordExport {
    pub record: NewExport,
}

impl RecordExport {
    pub(super) fn apply(self, state: &mut State, context: &mut Context) -> Answer {
        let mut record = self.record;
        let Some(manifest_sha256) = state.checkpoint(record.job, record.step).map(str::to_owned) else {
            return Answer::not_found(format!(
                "{} has no checkpoint of step {}; `fleet checkpoints ls` lists them",
                record.job, record.step
            ));
        };
        let Some(format) = clean_text(&record.format) else {
            return Answer::invalid("an export needs the name of its format");
        };
        if !(1..=PATH_MAX).contains(&record.path.len()) || !is_plain(&record.path) {
            return Answer::invalid(format!(
                "an export needs a path of at most {PATH_MAX} bytes, without control characters"
            ));
        }
        if !is_sha256(&record.sha256) {
            return Answer::invalid("an export needs the SHA-256 of its file, 64 hexadecimal digits");
        }
        record.format = format;
        state.last_export += 1;
        let export = ExportId(state.last_export);
        let view = ExportView { export, unix_ms: context.unix_ms, manifest_sha256, record };
        let bytes = context.keep(HistoryRow::Export { export, record: Box::new(view) });
        state.retention.ended(Unit::Export(export), bytes, context.unix_ms);
        Answer::ExportRecorded { export }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::commands::Change;
    use crate::cluster::tests::{Script, checkpoint, export, finished, why};
    use fleet_common::ids::JobId;

    fn record(spoil: impl Fn(&mut NewExport)) -> Change {
        let mut record = export(1, 5);
        spoil(&mut record);
        Change::RecordExport(RecordExport { record })
    }

    #[test]
    fn an_export_is_of_a_checkpoint_that_there_is() {
        let mut script = Script::with_node(4);
        let job = script.submit_training(1);
        script.assign(job);
        assert!(why(script.run(record(|_| {}))).contains("no checkpoint of step 5"));
        script.tell(job, 1, 1, vec![checkpoint(5), finished()]);
        assert_eq!(script.run(record(|_| {})), Answer::ExportRecorded { export: ExportId(1) });
        assert!(why(script.run(record(|export| export.step = 6))).contains("step 6"));
        assert!(why(script.run(record(|export| export.job = JobId(2)))).contains("job-2"));
        assert!(why(script.run(record(|export| export.sha256.clear()))).contains("SHA-256"));
        assert!(why(script.run(record(|export| export.path.clear()))).contains("path"));
        assert!(why(script.run(record(|export| export.path.push('\x1b')))).contains("control characters"));
        assert!(why(script.run(record(|export| export.format.clear()))).contains("format"));
    }
}
