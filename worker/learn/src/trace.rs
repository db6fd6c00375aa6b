//! What a rank did when, as a file that viewers of traces open (Perfetto, chrome://tracing): Chrome's trace events, one on each line.
//!
//! A rank is a process of the trace; its threads are what it computes, what it waits for, its data and its checkpoints. Reductions that go on
//! while something is computed are asynchronous events. Times are microseconds since the run began. The ranks of a machine share its
//! clock, so their rows are exact to each other; those of different machines are as far off as the machines' wall clocks are.

use crate::stopwatch::{Doing, Phase};
use serde_json::{Value, json};
use std::io::{self, Write};

/// Spans of one rank that are kept; a step has some four for each unit of a model. Each takes 40 bytes in memory and some 150 in the file.
pub const SPANS_MAX: usize = 200_000;

/// What takes time.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum What {
    /// By its number.
    Step(u64),
    Doing(Doing),
    /// The reduction of a unit's gradients, from when it was posted until it was seen to be over.
    Reduction(Option<usize>),
    /// Weights of a unit come in, likewise.
    Gather,
    /// A checkpoint of this step is written while training goes on.
    Writing(u64),
}

#[derive(Clone, Copy, Debug)]
struct Span {
    what: What,
    /// Nanoseconds of the machine's clock.
    began: u64,
    ended: u64,
}

#[derive(Debug, Default)]
pub(crate) struct Trace {
    spans: Vec<Span>,
    /// There was no room for so many.
    left_out: u64,
}

/// Whose trace it is.
#[derive(Clone, Debug)]
pub struct Row {
    pub rank: u32,
    pub host: String,
    /// Units of the model.
    pub units: usize,
    /// Nanoseconds of the machine's clock when the run began.
    pub zero: i64,
}

impl Trace {
    pub fn add(&mut self, what: What, began: u64, ended: u64) {
        match self.spans.len() < SPANS_MAX {
            true => self.spans.push(Span { what, began, ended }),
            false => self.left_out += 1,
        }
    }

    /// What the rank did, and for how many seconds.
    pub fn doings(self) -> impl Iterator<Item = (Doing, f64)> {
        self.spans.into_iter().filter_map(|span| match span.what {
            What::Doing(doing) => Some((doing, (span.ended - span.began) as f64 / 1e9)),
            _ => None,
        })
    }

    /// Writes all of it; the answer is how many spans had no room.
    pub fn write(&self, row: &Row, out: &mut impl Write) -> io::Result<u64> {
        let pid = row.rank;
        let name = format!("rank {pid} on {}", row.host);
        write!(out, "{{\"displayTimeUnit\":\"ms\",\"traceEvents\":[")?;
        let mut lines = Lines { out, any: false };
        let meta = |what: &str, tid: u32, args: Value| json!({"ph": "M", "name": what, "pid": pid, "tid": tid, "args": args});
        lines.write(&meta("process_name", 0, json!({"name": name})))?;
        lines.write(&meta("process_sort_index", 0, json!({"sort_index": pid})))?;
        for lane in [Lane::Compute, Lane::Communication, Lane::Data, Lane::Checkpoint, Lane::Writer] {
            lines.write(&meta("thread_name", lane as u32, json!({"name": lane.name()})))?;
            lines.write(&meta("thread_sort_index", lane as u32, json!({"sort_index": lane as u32})))?;
        }
        for (number, span) in self.spans.iter().enumerate() {
            let name = span.what.name(row.units);
            let tid = span.what.lane() as u32;
            let at = |ns: u64| microseconds(ns as i64 - row.zero);
            match span.what {
                What::Reduction(_) | What::Gather => {
                    let end = |ph: &str, ns: u64| json!({"ph": ph, "cat": "exchange", "name": name, "id": format!("{pid}.{number}"), "pid": pid, "tid": tid, "ts": at(ns)});
                    lines.write(&end("b", span.began))?;
                    lines.write(&end("e", span.ended))?;
                }
                _ => {
                    let length = microseconds(span.ended as i64 - span.began as i64);
                    lines.write(&json!({"ph": "X", "name": name, "pid": pid, "tid": tid, "ts": at(span.began), "dur": length}))?;
                }
            }
        }
        write!(out, "\n]}}\n")?;
        out.flush()?;
        Ok(self.left_out)
    }
}

fn microseconds(ns: i64) -> f64 {
    ns as f64 / 1000.0
}

/// A thread of the trace.
#[derive(Clone, Copy)]
enum Lane {
    Compute = 1,
    Communication,
    Data,
    Checkpoint,
    Writer,
}

impl Lane {
    fn name(self) -> &'static str {
        match self {
            Lane::Compute => "compute",
            Lane::Communication => "communication",
            Lane::Data => "data",
            Lane::Checkpoint => "checkpoint",
            Lane::Writer => "checkpoint writer",
        }
    }
}

impl What {
    fn lane(self) -> Lane {
        match self {
            What::Reduction(_) | What::Gather => Lane::Communication,
            What::Writing(_) => Lane::Writer,
            What::Step(_) => Lane::Compute,
            What::Doing(doing) => match doing.phase {
                Phase::Data => Lane::Data,
                Phase::Communication => Lane::Communication,
                Phase::Checkpoint => Lane::Checkpoint,
                Phase::Forward | Phase::Backward | Phase::Optimizer | Phase::Evaluation | Phase::Other => {
                    Lane::Compute
                }
            },
        }
    }

    fn name(self, units: usize) -> String {
        let of = |what: &str, unit: Option<usize>| match unit {
            None => what.to_owned(),
            Some(0) => format!("{what} embedding"),
            Some(unit) if unit + 1 == units => format!("{what} head"),
            Some(unit) => format!("{what} block {unit}"),
        };
        match self {
            What::Step(step) => format!("step {step}"),
            What::Writing(step) => format!("checkpoint of step {step}"),
            What::Reduction(unit) => of("reduce", unit),
            What::Gather => "gather".to_owned(),
            What::Doing(Doing { phase, unit }) => match phase {
                Phase::Data => of("data", unit),
                Phase::Forward => of("forward", unit),
                Phase::Backward => of("backward", unit),
                Phase::Communication => of("wait", unit),
                Phase::Optimizer => of("optimizer", unit),
                Phase::Checkpoint => of("checkpoint", unit),
                Phase::Evaluation => of("evaluation", unit),
                Phase::Other => of("other", unit),
            },
        }
    }
}

/// JSON values of a list, one on each line.
struct Lines<'a, W> {
    out: &'a mut W,
    any: bool,
}

impl<W: Write> Lines<'_, W> {
    fn write(&mut self, value: &Value) -> io::Result<()> {
        let comma = if std::mem::replace(&mut self.any, true) { "," } else { "" };
        write!(self.out, "{comma}\n{value}")
    }
}
