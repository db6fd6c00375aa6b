//! Who is to blame, from what all ranks say when they part. Pure.

use super::frame::Farewell;
use crate::abort::Abort;
use crate::call::{self, Signature};
use crate::error::CollectiveError;
use std::time::Duration;

/// What is known of a peer when this rank gives up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Last {
    /// It was not heard; how long ago it was heard last.
    Silent(Duration),
    /// Its connection ended without a word.
    Ended,
    Said(Signature, Farewell),
}

/// What this rank itself has met, in the middle of a call.
#[derive(Clone, Copy, Debug)]
pub struct Met {
    pub rank: usize,
    pub signature: Signature,
    pub reason: Abort,
    /// From whom it expected something, where it has waited.
    pub waits_for: Option<usize>,
    /// Where its own deadline has passed.
    pub deadline: Option<Duration>,
}

/// `lasts` has one entry for each rank; that of this rank itself does not count.
pub fn verdict(met: Met, lasts: &[Last]) -> CollectiveError {
    let others = || (0..lasts.len()).filter(|rank| *rank != met.rank);
    let reasons = || {
        let said = others().filter_map(|rank| match lasts[rank] {
            Last::Said(_, farewell) => farewell.reason,
            _ => None,
        });
        std::iter::once(met.reason).chain(said)
    };
    if reasons().any(|reason| matches!(reason, Abort::RankDiffers(_))) {
        let same = |(rank, last): (usize, &Last)| match last {
            Last::Said(signature, _) if rank != met.rank => Some((rank, *signature)),
            _ => (rank == met.rank).then_some((rank, met.signature)),
        };
        let says: Vec<(usize, Signature)> = lasts
            .iter()
            .enumerate()
            .filter_map(same)
            .filter(|(_, signature)| {
                *signature != Signature::NONE && signature.sequence == met.signature.sequence
            })
            .collect();
        if let Err(error) = call::compare(&says) {
            return error;
        }
    }
    // Whoever took leave has not died, whatever others make of its end.
    let alive = |rank: usize| rank == met.rank || matches!(lasts.get(rank), Some(Last::Said(..)));
    let died = reasons().find(|reason| matches!(reason, Abort::RankDied(rank) if !alive(*rank)));
    if let Some(died) = died {
        return died.into();
    }
    if reasons().any(|reason| matches!(reason, Abort::RankLate(_))) {
        let late = |rank: usize| late(met, lasts, rank);
        let start = met.waits_for.or_else(|| {
            reasons().find_map(|reason| match reason {
                Abort::RankLate(rank) => Some(rank),
                _ => None,
            })
        });
        if let Some(rank) = start.map(late) {
            return match met.deadline {
                Some(deadline) if rank != met.rank => CollectiveError::Deadline {
                    rank,
                    operation: met.signature.short(),
                    seconds: deadline.as_secs_f64(),
                    doing: doing(lasts[rank]),
                },
                _ => Abort::RankLate(rank).into(),
            };
        }
    }
    let better = |reason: &Abort| match reason {
        Abort::RankDied(rank) => !alive(*rank),
        _ => true,
    };
    reasons().find(better).unwrap_or(met.reason).into()
}

/// Follows who waits for whom, to the one who does not say that it waits.
fn late(met: Met, lasts: &[Last], from: usize) -> usize {
    let mut rank = from;
    for _ in 0..lasts.len() {
        let next = match lasts.get(rank) {
            _ if rank == met.rank => met.waits_for,
            Some(Last::Said(_, farewell)) => farewell.waits_for.or(match farewell.reason {
                // It has waited elsewhere, among the ranks of its host.
                Some(Abort::RankLate(late)) if late != rank => Some(late),
                _ => None,
            }),
            _ => None,
        };
        match next {
            Some(next) => rank = next,
            None => return rank,
        }
    }
    from
}

fn doing(last: Last) -> String {
    match last {
        Last::Silent(since) => format!("nothing came from it for {:.1} s", since.as_secs_f64()),
        Last::Ended => "its connection ended".to_owned(),
        Last::Said(signature, _) => format!("it was in {}", signature.short()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::call::Call;

    fn call(sequence: u64, bytes: u64) -> Signature {
        Signature { sequence, word: Call::Barrier.word(), bytes, place: 0 }
    }

    fn met(rank: usize, reason: Abort, waits_for: Option<usize>) -> Met {
        Met { rank, signature: call(4, 8), reason, waits_for, deadline: None }
    }

    fn said(reason: Abort, waits_for: Option<usize>) -> Last {
        Last::Said(call(4, 8), Farewell { reason: Some(reason), waits_for })
    }

    const SILENT: Last = Last::Silent(Duration::from_secs(3));

    #[test]
    fn in_a_ring_of_waiters_the_one_that_did_not_come_is_named() {
        // 0 waits for 3, 3 for 2, and 2 for 1, which computes.
        let lasts = [SILENT, SILENT, said(Abort::RankLate(1), Some(1)), said(Abort::RankLate(2), Some(2))];
        let mine = Met { deadline: Some(Duration::from_secs(1)), ..met(0, Abort::RankLate(3), Some(3)) };
        assert_eq!(
            verdict(mine, &lasts).to_string(),
            "rank 1 did not enter barrier #4 within 1 s; nothing came from it for 3.0 s"
        );
        assert_eq!(
            verdict(met(0, Abort::RankLate(1), Some(3)), &lasts).to_string(),
            "aborted: rank 1 did not come to a collective in time"
        );
        // The one that comes at last.
        let lasts = [said(Abort::RankLate(3), Some(3)), SILENT, lasts[2], lasts[3]];
        assert_eq!(verdict(met(1, Abort::RankLate(3), None), &lasts).culprit(), Some(1));
    }

    #[test]
    fn the_dead_are_named_and_not_those_who_left_because_of_them() {
        let lasts = [SILENT, said(Abort::RankDied(2), Some(2)), Last::Ended];
        assert_eq!(verdict(met(0, Abort::RankDied(1), Some(1)), &lasts).culprit(), Some(2));
        let lasts = [SILENT, said(Abort::Stopped, None), SILENT];
        assert_eq!(
            verdict(met(0, Abort::RankDied(1), Some(1)), &lasts).to_string(),
            "aborted: the job was stopped"
        );
    }

    #[test]
    fn of_calls_that_differ_the_odd_one_is_named() {
        let differs = |bytes| {
            Last::Said(call(4, bytes), Farewell { reason: Some(Abort::RankDiffers(1)), waits_for: None })
        };
        let error = verdict(met(0, Abort::RankDiffers(1), None), &[SILENT, differs(16), differs(8)]);
        assert_eq!(error.culprit(), Some(1));
        let error = verdict(met(1, Abort::RankDiffers(0), None), &[differs(16), SILENT, differs(8)]);
        assert_eq!(error.culprit(), Some(0));
        let behind =
            Last::Said(call(3, 0), Farewell { reason: Some(Abort::RankDiffers(1)), waits_for: None });
        let outside =
            Last::Said(Signature::NONE, Farewell { reason: Some(Abort::RankDiffers(1)), waits_for: None });
        let error =
            verdict(met(0, Abort::RankDiffers(1), None), &[SILENT, differs(16), behind, outside, outside]);
        assert_eq!(error.culprit(), Some(1), "who is at another call says nothing about this one");
    }
}
