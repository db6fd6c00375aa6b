//! Which rank is to blame when a gang fails, and how that is said. Pure: evidence in, one `JobError` out.
//!
//! When one rank dies the others fail a moment later, in whatever they were doing together. So evidence is gathered for a short
//! grace and weighed: a death by signal speaks for itself, a rank's own error comes next, then what one says of a peer that did not
//! come, and what a rank says only because the gang's calls had ended counts last. Within a class the earliest wins.

use fleet_common::events::{FailureKind, JobError};
use fleet_common::exit::Fault;
use fleet_common::ids::Rank;
use fleet_common::protocol::CANNOT_START;
use nix::sys::signal::Signal;
use std::time::Duration;

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    Code(i32),
    Signal(i32),
}

impl Exit {
    pub fn is_success(self) -> bool {
        self == Exit::Code(0)
    }
}

/// Why a rank is suspected.
#[derive(Clone, Debug, PartialEq)]
pub enum Cause {
    /// Killed by a signal that the agent did not send.
    Signal(i32),
    /// The rank ended with this code and without a word.
    Code(i32),
    /// What the rank said, or the agent where it could not be started.
    Said(JobError),
}

impl Cause {
    fn weight(&self) -> u8 {
        match self {
            Cause::Signal(_) => 0,
            Cause::Said(JobError { kind: FailureKind::Peer, .. }) => 2,
            Cause::Said(JobError { kind: FailureKind::Told, .. }) => 3,
            Cause::Said(_) | Cause::Code(_) => 1,
        }
    }
}

#[derive(Clone, Debug, PartialEq)]
pub struct Suspicion {
    pub at: Duration,
    pub rank: Rank,
    pub cause: Cause,
}

impl Suspicion {
    /// The rank to blame, which the suspected one may have named.
    pub fn blamed(&self) -> Rank {
        match &self.cause {
            Cause::Signal(_) | Cause::Code(_) => self.rank,
            Cause::Said(error) => error.rank.unwrap_or(self.rank),
        }
    }
}

/// The strongest and then earliest suspicion.
pub fn culprit(suspicions: &[Suspicion]) -> Option<&Suspicion> {
    suspicions.iter().min_by_key(|suspicion| (suspicion.cause.weight(), suspicion.at))
}

/// Says what happened. `exit` is how the blamed rank ended, unless it was made to, and `last_lines` what it printed last; one that `trains` is fleet's own.
pub fn sentence(
    suspicion: &Suspicion,
    trains: bool,
    node: &str,
    exit: Option<Exit>,
    last_lines: Vec<String>,
) -> JobError {
    let rank = suspicion.rank;
    let (signal, exit_code) = match exit {
        Some(Exit::Signal(signal)) => (Some(signal), None),
        Some(Exit::Code(code)) => (None, Some(code)),
        None => (None, None),
    };
    match &suspicion.cause {
        Cause::Signal(signal) => JobError {
            kind: FailureKind::Signal,
            fault: Fault::Job,
            rank: Some(rank),
            node: Some(node.to_owned()),
            signal: Some(*signal),
            exit_code: None,
            message: format!(
                "rank {rank} on {node} was killed by {}{}",
                signal_name(*signal),
                hint(*signal, trains)
            ),
            last_lines,
        },
        Cause::Code(code) => {
            let why = why_not_started(*code, trains, &last_lines).map(str::to_owned);
            JobError {
                kind: if why.is_some() { FailureKind::NotStarted } else { FailureKind::ExitCode },
                fault: fault_of(*code),
                rank: Some(rank),
                node: Some(node.to_owned()),
                signal: None,
                exit_code: Some(*code),
                // Said once: what is told is not among the lines that follow.
                last_lines: last_lines
                    .into_iter()
                    .filter(|line| !why.as_ref().is_some_and(|why| line.contains(why)))
                    .collect(),
                message: match (code, why) {
                    (_, Some(why)) => format!("rank {rank} on {node} could not start: {why}"),
                    (0, _) => format!("rank {rank} on {node} ended before the job was done"),
                    (code, _) => format!("rank {rank} on {node} ended with exit code {code}"),
                },
            }
        }
        Cause::Said(error) => JobError {
            rank: Some(suspicion.blamed()),
            node: error.node.clone().or_else(|| Some(node.to_owned())),
            signal: error.signal.or(signal),
            exit_code: error.exit_code.or(exit_code),
            last_lines: if error.last_lines.is_empty() { last_lines } else { error.last_lines.clone() },
            ..error.clone()
        },
    }
}

/// What was said where a rank did not start. The codes alone do not tell: a shell that finds no command ends with them, too.
fn why_not_started(code: i32, trains: bool, last_lines: &[String]) -> Option<&str> {
    let last = last_lines.iter().rev().map(|line| line.trim()).find(|line| !line.is_empty());
    let last = last.filter(|_| matches!(code, 126 | 127))?;
    last.strip_prefix(CANNOT_START).or(trains.then_some(last))
}

/// An error that the agent tells, with no rank to blame.
pub fn agent_error(kind: FailureKind, fault: Fault, node: &str, message: impl Into<String>) -> JobError {
    JobError {
        kind,
        fault,
        rank: None,
        node: Some(node.to_owned()),
        signal: None,
        exit_code: None,
        message: message.into(),
        last_lines: Vec::new(),
    }
}

/// fleet's own programs end with these codes; 126 and 127 are the shell's and the loader's.
fn fault_of(code: i32) -> Fault {
    match u8::try_from(code) {
        Ok(fleet_common::exit::REFUSED_INPUT) => Fault::Input,
        Ok(fleet_common::exit::ENVIRONMENT | 126 | 127) => Fault::Environment,
        _ => Fault::Job,
    }
}

/// `signal 9 (SIGKILL)`.
pub fn signal_name(signal: i32) -> String {
    match Signal::try_from(signal) {
        Ok(known) => format!("signal {signal} ({known})"),
        Err(_) => format!("signal {signal}"),
    }
}

fn hint(signal: i32, trains: bool) -> &'static str {
    match Signal::try_from(signal) {
        Ok(Signal::SIGKILL) if trains => {
            "; if nobody did that, the machine ran out of memory: lower batch_size or the number of ranks"
        }
        Ok(Signal::SIGKILL) => {
            "; if nobody did that, the machine ran out of memory, which the kernel's log (dmesg) tells: start fewer ranks, or let each take less"
        }
        Ok(Signal::SIGBUS) => "; a full disk or no memory left for shared segments does that",
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(kind: FailureKind, message: &str) -> Cause {
        Cause::Said(JobError { node: None, ..agent_error(kind, Fault::Job, "", message) })
    }

    fn blames(other: Rank, kind: FailureKind, message: &str) -> Cause {
        let error = agent_error(kind, Fault::Job, "", message);
        Cause::Said(JobError { node: None, rank: Some(other), ..error })
    }

    fn suspicion(at_ms: u64, rank: Rank, cause: Cause) -> Suspicion {
        Suspicion { at: Duration::from_millis(at_ms), rank, cause }
    }

    #[test]
    fn a_rank_killed_by_a_signal_is_blamed_before_those_that_noticed_first() {
        let all = [
            suspicion(10, 0, said(FailureKind::Told, "all_reduce #7: aborted: rank 2 is gone")),
            suspicion(11, 1, said(FailureKind::Rank, "broken pipe")),
            suspicion(30, 2, Cause::Signal(9)),
            suspicion(31, 3, Cause::Signal(11)),
        ];
        assert_eq!(culprit(&all).unwrap().rank, 2);
    }

    #[test]
    fn a_rank_with_an_error_of_its_own_is_blamed_before_those_that_were_aborted() {
        let all = [
            suspicion(10, 0, said(FailureKind::Told, "aborted: rank 1 left")),
            suspicion(20, 1, said(FailureKind::Rank, "the loss is not a number")),
        ];
        assert_eq!(culprit(&all).unwrap().rank, 1);
    }

    #[test]
    fn a_report_that_names_another_rank_counts_last_but_keeps_that_name() {
        let all =
            [suspicion(5, 0, blames(3, FailureKind::Peer, "rank 3 did not enter all_reduce #4 within 60 s"))];
        let error = sentence(culprit(&all).unwrap(), true, "node-1", Some(Exit::Code(1)), vec![]);
        assert_eq!((error.rank, error.exit_code), (Some(3), Some(1)));
    }

    #[test]
    fn who_saw_that_a_rank_did_not_come_is_believed_before_those_who_were_told() {
        let told = "aborted: rank 3 did not come to a collective in time";
        let saw = "rank 3 did not enter all_reduce #4 within 900 s; it is in backward since 901.0 s";
        let all = [
            suspicion(10, 0, blames(3, FailureKind::Told, told)),
            suspicion(11, 1, blames(3, FailureKind::Peer, saw)),
            suspicion(12, 3, blames(3, FailureKind::Told, told)),
        ];
        let first = culprit(&all).unwrap();
        assert_eq!((first.rank, first.blamed()), (1, 3));
        let error = sentence(first, true, "node-1", None, vec![]);
        assert_eq!((error.rank, error.message.as_str()), (Some(3), saw));
    }

    #[test]
    fn the_sentence_names_rank_node_and_signal() {
        let error = sentence(&suspicion(0, 2, Cause::Signal(11)), true, "node-1", None, vec!["bye".into()]);
        assert_eq!(error.message, "rank 2 on node-1 was killed by signal 11 (SIGSEGV)");
        assert_eq!((error.rank, error.signal, error.exit_code), (Some(2), Some(11), None));
        assert_eq!(error.last_lines, ["bye"]);
    }

    #[test]
    fn a_program_that_cannot_be_loaded_is_the_environments_fault_with_the_loaders_line() {
        let lines = vec![
            "fleet-rank: error while loading shared libraries: libtorch_cpu.so".to_owned(),
            String::new(),
        ];
        let error = sentence(&suspicion(0, 0, Cause::Code(127)), true, "node-1", None, lines);
        assert_eq!(error.fault, Fault::Environment);
        assert!(error.message.contains("libtorch_cpu.so"), "{}", error.message);
    }

    #[test]
    fn what_did_not_start_is_told_from_what_ended_with_the_same_code() {
        let said = |line: &str| {
            let lines = vec![line.to_owned()];
            let error =
                sentence(&suspicion(0, 0, Cause::Code(127)), false, "box", Some(Exit::Code(127)), lines);
            assert_eq!(error.last_lines.is_empty(), error.kind == FailureKind::NotStarted, "{error:?}");
            error.message
        };
        let why = "rank 0 on box could not start: nothere: No such file or directory (os error 2)";
        assert_eq!(said("error: cannot start nothere: No such file or directory (os error 2)"), why);
        assert_eq!(said("sh: 1: nothere: not found"), "rank 0 on box ended with exit code 127");
    }

    #[test]
    fn a_program_has_no_batch_size() {
        let told = |trains| sentence(&suspicion(0, 0, Cause::Signal(9)), trains, "box", None, vec![]).message;
        assert!(told(true).contains("batch_size") && !told(false).contains("batch_size"));
        assert!(told(false).contains("out of memory"), "{}", told(false));
    }
}
