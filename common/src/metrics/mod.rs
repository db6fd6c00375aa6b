//! What fleet's programs measure of themselves, for Prometheus: each metric is defined once, in `coordinator` or `worker`, and a `Page` of
//! them is written in the format that is asked for.
//!
//! A label's value is an id of the cluster, a member's name or a fixed word, so there are no more series than the cluster has members and
//! unfinished jobs.

mod accept;
pub mod coordinator;
#[cfg(test)]
mod document;
mod page;
pub mod target;
pub mod worker;

pub use accept::Format;
pub use page::Page;

use prometheus::{Histogram, HistogramOpts, IntCounterVec, IntGauge, Opts};

/// A metric, by the rules of OpenMetrics.
#[derive(Debug)]
pub struct Definition {
    /// A counter's ends in `_total`; what has a unit ends in it.
    pub name: &'static str,
    pub kind: Kind,
    pub labels: &'static [&'static str],
    pub at: At,
    pub help: &'static str,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kind {
    Gauge,
    Counter,
    /// Of so many buckets besides the last, the first up to `first`, each of the others `factor` times as wide.
    Histogram {
        first: f64,
        factor: f64,
        buckets: usize,
    },
}

/// Who has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum At {
    Coordinator,
    /// A coordinator while it leads; at the others it is left out.
    Leader,
    Worker,
}

const UNITS: [&str; 4] = ["seconds", "bytes", "ratio", "entries"];

impl Definition {
    /// The name of the family: a counter's samples end in `_total`.
    pub fn family(&self) -> &'static str {
        match self.kind {
            Kind::Counter => self.name.strip_suffix("_total").unwrap_or(self.name),
            Kind::Gauge | Kind::Histogram { .. } => self.name,
        }
    }

    pub fn unit(&self) -> Option<&'static str> {
        let ends = |unit: &&str| self.family().strip_suffix(*unit).is_some_and(|rest| rest.ends_with('_'));
        UNITS.into_iter().find(ends)
    }

    /// Counts of this metric, each with its labels.
    pub fn counters(&self) -> IntCounterVec {
        let counters = IntCounterVec::new(Opts::new(self.name, self.help), self.labels);
        counters.expect("a test holds all definitions against the rules")
    }

    pub fn gauge(&self) -> IntGauge {
        IntGauge::new(self.name, self.help).expect("a test holds all definitions against the rules")
    }

    /// Times or sizes of this metric, which has no labels.
    pub fn histogram(&self) -> Histogram {
        let Kind::Histogram { first, factor, buckets } = self.kind else {
            unreachable!("{} is no histogram", self.name)
        };
        let buckets = prometheus::exponential_buckets(first, factor, buckets);
        let opts = HistogramOpts::new(self.name, self.help);
        let histogram = buckets.and_then(|buckets| Histogram::with_opts(opts.buckets(buckets)));
        histogram.expect("a test holds all definitions against the rules")
    }
}

/// Definitions, and the list of them all.
macro_rules! define {
    ($all:ident; $($id:ident: $kind:expr, $at:ident, $name:literal $({$($label:literal),+})?, $help:literal;)*) => {
        $(
            #[doc = $help]
            pub static $id: Definition = Definition {
                name: $name,
                kind: $kind,
                labels: &[$($($label),+)?],
                at: At::$at,
                help: $help,
            };
        )*
        /// All of them, in the order of the documentation.
        pub static $all: &[&Definition] = &[$(&$id),*];
    };
}
use define;

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    pub fn all() -> impl Iterator<Item = &'static Definition> {
        coordinator::ALL.iter().chain(worker::ALL).copied()
    }

    #[test]
    fn every_definition_keeps_the_rules() {
        let mut names = BTreeSet::new();
        for definition in all() {
            let Definition { name, kind, labels, help, .. } = definition;
            let word = |text: &str| {
                text.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_')
            };
            assert!(name.starts_with("fleet_") && word(name), "{name}");
            assert!(names.insert(definition.family()), "{name} is there twice");
            assert_eq!(*kind == Kind::Counter, name.ends_with("_total"), "{name}");
            for reserved in ["_bucket", "_sum", "_count", "_created"] {
                assert!(!definition.family().ends_with(reserved), "{name}");
            }
            assert!(labels.iter().all(|label| word(label) && *label != "le"), "{name}: {labels:?}");
            assert!(help.len() > 10 && !help.ends_with('.') && !help.contains(['\n', '|']), "{name}: {help}");
            match kind {
                Kind::Histogram { .. } => {
                    assert!(labels.is_empty() && definition.unit().is_some(), "{name}");
                    definition.histogram();
                }
                Kind::Counter => drop(definition.counters()),
                Kind::Gauge => {}
            }
        }
    }

    #[test]
    fn a_unit_is_what_the_name_ends_in() {
        assert_eq!(coordinator::RAFT_FSYNC_SECONDS.unit(), Some("seconds"));
        assert_eq!(coordinator::JOB_TOKENS_PER_SECOND.unit(), None);
        assert_eq!(worker::RANK_CPU_SECONDS.unit(), Some("seconds"));
        assert_eq!(worker::RANK_CPU_SECONDS.family(), "fleet_rank_cpu_seconds");
    }
}
