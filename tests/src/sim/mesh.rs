//! The network between the ranks of a large gang, as arithmetic: how long it takes until each is connected to each, and what they tell each
//! other when one of them dies. Who is to blame is for the code that ranks have (`fleet_collectives::net::parted`).

use super::queue::{MS, Micros};
use fleet_collectives::net::parted::{Farewell, Last, Met, Signature, verdict};
use fleet_collectives::{Abort, CollectiveError};
use fleet_common::ids::Rank;
use std::collections::BTreeMap;
use std::time::Duration;

/// Ranks on each host, each with a core of its own.
pub const RANKS: u32 = 8;
/// From host to host.
const LATENCY: Micros = 20;
/// Of the core of a rank for a handshake with keys at both ends: assumed, not measured.
const HANDSHAKE: Micros = 300;
/// Of a core for a last word that is sent or read.
const WORD: Micros = 5;
/// How long a rank listens for last words; as in `net/parting.rs`.
const GRACE: Micros = 300 * MS;
/// A process that has said why it ends is gone after so long.
pub const EXIT: Micros = 20 * MS;
/// Of the steps that the ranks make.
pub const STEP: Micros = 500 * MS;

/// When each rank was told of the others.
#[derive(Debug, Default)]
pub struct Mesh {
    told: BTreeMap<Rank, Micros>,
}

impl Mesh {
    pub fn told(&mut self, rank: Rank, now: Micros) {
        self.told.insert(rank, now);
    }

    /// A new start.
    pub fn clear(&mut self) {
        self.told.clear();
    }

    /// When the last of them is connected to all: each calls those before it, the nearest first, one after the other, and is called by
    /// those behind it. Both ends of a handshake compute at the same time.
    pub fn all_met(&self) -> Micros {
        let told: Vec<Micros> = self.told.values().copied().collect();
        let (mut calls, mut answers) = (told.clone(), told.clone());
        for distance in 1..told.len() {
            for (call, answer) in calls[distance..].iter_mut().zip(&mut answers) {
                *answer = (*call + LATENCY).max(*answer) + HANDSHAKE;
                *call = *answer + LATENCY;
            }
        }
        calls.into_iter().chain(answers).max().unwrap_or(0)
    }
}

/// When a rank is through with its last words after another one's death, and what it has found.
pub struct Parting {
    pub rank: Rank,
    pub at: Micros,
    pub error: CollectiveError,
}

/// `dead` of `world` ranks ends at `now`, while each waits in a collective for the one before it. The kernel of its host tells all others at once.
pub fn after_death(dead: Rank, world: u32, now: Micros) -> Vec<Parting> {
    let signature = Signature { sequence: 400, word: 1, bytes: 4096, place: 0 };
    let reason = Abort::RankDied(dead as usize);
    let before = |rank: Rank| (rank + world - 1) % world;
    let farewell = |rank: Rank| {
        let waits_for = Some(before(rank) as usize);
        Last::Said(signature, Farewell { reason: Some(reason), waits_for })
    };
    let lasts: Vec<Last> =
        (0..world).map(|rank| if rank == dead { Last::Ended } else { farewell(rank) }).collect();
    // Each says it to all, then reads what all others say.
    let words = Micros::from(world) * 2 * WORD;
    let at = now + LATENCY + (words + LATENCY).min(GRACE);
    let part = |rank: Rank| {
        let waits_for = Some(before(rank) as usize);
        let met = Met { rank: rank as usize, signature, reason, waits_for, deadline: None::<Duration> };
        Parting { rank, at, error: verdict(met, &lasts) }
    };
    (0..world).filter(|rank| *rank != dead).map(part).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_meet_in_the_time_of_one_rank_s_handshakes() {
        let met = |ranks: u32, late: Micros| {
            let mut mesh = Mesh::default();
            (0..ranks).for_each(|rank| mesh.told(rank, if rank == 0 { late } else { 0 }));
            mesh.all_met()
        };
        assert_eq!(met(1, 0), 0);
        let each = HANDSHAKE + 2 * LATENCY;
        assert_eq!(met(2, 0), each);
        let thousand = met(1024, 0);
        assert!(thousand >= 1023 * HANDSHAKE && thousand < 1100 * each, "{thousand}");
        assert!(met(1024, 1_000_000) >= 1_000_000, "a rank that is late is waited for");
    }

    #[test]
    fn every_rank_finds_the_one_that_died() {
        let parted = after_death(7, 64, 1000);
        assert_eq!(parted.len(), 63);
        assert!(parted.iter().all(|one| one.error.culprit() == Some(7) && one.at < 1000 + GRACE));
    }
}
