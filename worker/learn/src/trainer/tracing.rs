//! The trace of a run: every rank writes its part when it ends, however it ends.

use super::Trainer;
use crate::agent_link::AgentLink;
use crate::error::{Error, Result};
use crate::shim::monotonic_ns;
use crate::stopwatch::Stopwatch;
use crate::trace::{Row, SPANS_MAX};
use fleet_collectives::Op;
use fleet_common::events::Level;
use fleet_common::files::NewFile;
use fleet_common::protocol::RankStart;
use std::io::{self, BufWriter};
use std::time::{SystemTime, UNIX_EPOCH};

/// One rank's part of a trace, which is written while the rank trains.
pub(super) struct Tracing {
    watch: Stopwatch,
    row: Row,
    file: NewFile,
}

impl Trainer {
    /// Begins it, where the job wants one. A collective call.
    pub(super) fn begin_trace(&mut self, start: &RankStart) -> Result<Option<Tracing>> {
        let Some(path) = self.job.trace_of(start.rank) else { return Ok(None) };
        let file = NewFile::create(&path)
            .map_err(|e| Error::Environment(format!("no trace can be written: {e}")))?;
        let zero = self.zero(start)?;
        let row = Row { rank: start.rank, host: host(start), units: self.learner.layout().units.len(), zero };
        self.watch.begin_trace();
        Ok(Some(Tracing { watch: self.watch.clone(), row, file }))
    }

    /// This machine's clock when the run began, on which all ranks agree: for all of a machine it is the same number. A collective call.
    fn zero(&mut self, start: &RankStart) -> Result<i64> {
        let clock = monotonic_ns() as f64;
        let wall = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_nanos() as f64);
        let mut offsets = vec![0.0; start.hosts.max(1) as usize];
        offsets[start.host as usize] = wall - clock;
        self.learner.gang().all_reduce_f64(&mut offsets, Op::Max)?;
        let offset = offsets[start.host as usize];
        // The earliest of all.
        let mut began = [-(clock + offset)];
        self.learner.gang().all_reduce_f64(&mut began, Op::Max)?;
        Ok((-began[0] - offset) as i64)
    }
}

impl Tracing {
    /// The part is there then, or a line says why not.
    pub fn end(self, link: &mut AgentLink) {
        let Tracing { watch, row, mut file } = self;
        let written: io::Result<u64> = (|| {
            let left_out = watch.write_trace(&row, &mut BufWriter::new(&mut file))?;
            file.commit()?;
            Ok(left_out)
        })();
        match written {
            Ok(0) => {}
            Ok(left_out) => link.log(
                Level::Warn,
                format!("the trace has the first {SPANS_MAX} spans of this rank; {left_out} later ones are left out"),
            ),
            Err(e) => link.log(Level::Warn, format!("the trace of this rank is lost: {e}")),
        }
    }
}

/// The machine's name.
fn host(start: &RankStart) -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    match name.trim() {
        "" => format!("host {}", start.host),
        name => name.to_owned(),
    }
}
