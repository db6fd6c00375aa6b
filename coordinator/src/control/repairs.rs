//! Rows of the history that cannot be read. Whoever comes upon one gets an error; it is told once, and the table is made anew beside the
//! damaged one: from the rows that can be read here, and from those of another coordinator where they cannot. Rows are facts, so
//! another one's are the same.
//!
//! A coordinator is only asked for rows if it has applied all that this one has, so that it lacks none of them.

use super::{Action, Control, Now, PeerMessage};
use crate::raft::disk::{Disk, DiskError, Renewal, Table};
use crate::raft::seal;
use crate::raft::stretch::{self, Damage, End, Row, Stretch};
use fleet_common::ids::ReplicaId;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// Rows that are copied in one tick: twenty megabytes a second.
const STEP_BYTES: usize = 1 << 20;
/// Rows in one answer, but for a single one that is larger.
const ANSWER_BYTES: usize = 256 << 10;
/// For another coordinator to answer.
const PATIENCE_MS: u64 = 2_000;
/// Between attempts.
const AGAIN_MS: u64 = 30_000;

/// "Give me the rows behind this one."
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RowsWanted {
    /// Position in `Table::HISTORY`.
    table: u8,
    after: Vec<u8>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RowsTold {
    wanted: RowsWanted,
    /// The sender has all rows that follow from the log up to here.
    applied: u64,
    found: Found,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Found {
    Rows {
        rows: Vec<Row>,
        /// There are no more.
        are_all: bool,
    },
    /// They cannot be read there either.
    Damaged,
}

#[derive(Default)]
pub(super) struct Repairs {
    /// What was found first of each damaged table.
    found: BTreeMap<Table, String>,
    work: Option<Work>,
    /// No other attempt before.
    again_ms: u64,
    /// A tick has come.
    due: bool,
    /// What others want, the newest wish of each.
    wanted: BTreeMap<ReplicaId, RowsWanted>,
    arrived: Option<(ReplicaId, RowsTold)>,
    /// Rows that came from others, ever.
    mended: u64,
}

/// A table that is being made anew.
struct Work {
    table: Table,
    /// All rows up to this one are in the new table.
    after: Vec<u8>,
    asked: Option<Asked>,
    /// Who cannot help with what comes next.
    useless: BTreeSet<ReplicaId>,
    fetched: u64,
}

#[derive(Clone, Copy)]
struct Asked {
    of: ReplicaId,
    at_ms: u64,
    /// What was applied here then.
    applied: u64,
}

impl Repairs {
    pub fn tick(&mut self) {
        self.due = true;
    }

    pub fn want(&mut self, from: ReplicaId, wanted: RowsWanted) {
        self.wanted.insert(from, wanted);
    }

    pub fn arrived(&mut self, from: ReplicaId, told: RowsTold) {
        self.arrived = Some((from, told));
    }

    /// What is damaged, one of them in words.
    pub fn damaged(&self) -> Option<String> {
        let (table, why) = self.found.first_key_value()?;
        Some(format!("rows of {} cannot be read: {why}", table.name()))
    }

    pub fn damaged_tables(&self) -> usize {
        self.found.len()
    }

    pub fn mended(&self) -> u64 {
        self.mended
    }
}

impl Work {
    fn wanted(&self) -> RowsWanted {
        let table = Table::HISTORY.iter().position(|known| *known == self.table).unwrap_or_default() as u8;
        RowsWanted { table, after: self.after.clone() }
    }
}

impl<D: Disk> Control<D> {
    pub(super) fn damage_found(&mut self, damage: Damage) {
        let Damage { table, why } = damage;
        if let std::collections::btree_map::Entry::Vacant(new) = self.repairs.found.entry(table) {
            self.out.push(Action::Alarm(format!(
                "the history is damaged: rows of {} cannot be read: {why}",
                table.name()
            )));
            new.insert(why);
        }
    }

    /// Answers the others, and goes on with what is mended here.
    pub(super) fn look_after_history(&mut self, now: Now) {
        if let Some(damage) = self.history.take_noted() {
            self.damage_found(damage);
        }
        if self.replica.full().is_some() {
            return;
        }
        self.tell_rows();
        let gone_on = self.take_rows().and_then(|()| match std::mem::take(&mut self.repairs.due) {
            true => self.mend(now),
            false => Ok(()),
        });
        if let Err(error) = gone_on {
            self.give_up(now, &error.to_string());
        }
    }

    fn tell_rows(&mut self) {
        for (to, wanted) in std::mem::take(&mut self.repairs.wanted) {
            let Some(table) = Table::HISTORY.get(usize::from(wanted.table)) else { continue };
            let found = match stretch::read(self.history.disk(), *table, &wanted.after, ANSWER_BYTES) {
                Ok(Stretch { rows, end: End::Damage(why) }) if rows.is_empty() => {
                    self.damage_found(Damage { table: *table, why });
                    Found::Damaged
                }
                Ok(Stretch { rows, end }) => Found::Rows { rows, are_all: end == End::OfTable },
                Err(_) => Found::Damaged,
            };
            let told = RowsTold { wanted, applied: self.replica.applied_index(), found };
            self.out.push(Action::ToPeer { to, message: PeerMessage::Rows(Box::new(told)) });
        }
    }

    fn take_rows(&mut self) -> Result<(), DiskError> {
        let Repairs { arrived, work: Some(work), .. } = &mut self.repairs else { return Ok(()) };
        let Some((from, told)) = arrived.take() else { return Ok(()) };
        let Some(asked) = work.asked.filter(|asked| asked.of == from && told.wanted == work.wanted()) else {
            return Ok(());
        };
        work.asked = None;
        let sealed = |(key, value): &Row| seal::open(work.table, key, value).is_some();
        match told.found {
            Found::Rows { rows, are_all }
                if told.applied >= asked.applied
                    && rows.iter().all(sealed)
                    && (are_all || !rows.is_empty()) =>
            {
                work.fetched += rows.len() as u64;
                if let Some((last, _)) = rows.last() {
                    work.after.clone_from(last);
                }
                self.history.disk().renew(Renewal::Rows(rows))?;
                if are_all {
                    self.mended()?;
                }
            }
            _ => drop(work.useless.insert(from)),
        }
        Ok(())
    }

    fn mend(&mut self, now: Now) -> Result<(), DiskError> {
        if let Some((table, why)) = self.history.disk().damaged() {
            self.damage_found(Damage { table, why });
        }
        let Some(work) = &mut self.repairs.work else { return self.begin_mending(now) };
        match work.asked {
            Some(asked) if now.mono_ms.saturating_sub(asked.at_ms) < PATIENCE_MS => return Ok(()),
            Some(silent) => drop(work.useless.insert(silent.of)),
            None => {}
        }
        work.asked = None;
        let Stretch { rows, end } = stretch::read(self.history.disk(), work.table, &work.after, STEP_BYTES)?;
        if let Some((last, _)) = rows.last() {
            work.after.clone_from(last);
            // Further on others may help who could not before.
            work.useless.clear();
            self.history.disk().renew(Renewal::Rows(rows))?;
        }
        match end {
            End::Full => Ok(()),
            End::OfTable => self.mended(),
            End::Damage(_) => {
                self.ask_for_rows(now);
                Ok(())
            }
        }
    }

    /// Whom rows can be asked of.
    fn keepers(&self) -> Vec<ReplicaId> {
        let me = self.me();
        self.replica.state().replicas().keys().copied().filter(|other| *other != me).collect()
    }

    fn begin_mending(&mut self, now: Now) -> Result<(), DiskError> {
        let Some(table) = self.repairs.found.keys().next().copied() else { return Ok(()) };
        if now.mono_ms < self.repairs.again_ms || self.keepers().is_empty() {
            return Ok(());
        }
        self.history.disk().renew(Renewal::Begin(table))?;
        let (after, useless) = (Vec::new(), BTreeSet::new());
        self.repairs.work = Some(Work { table, after, asked: None, useless, fetched: 0 });
        Ok(())
    }

    fn ask_for_rows(&mut self, now: Now) {
        let (others, applied) = (self.keepers(), self.replica.applied_index());
        let Some(work) = &mut self.repairs.work else { return };
        match others.into_iter().find(|other| !work.useless.contains(other)) {
            Some(of) => {
                work.asked = Some(Asked { of, at_ms: now.mono_ms, applied });
                let message = PeerMessage::FetchRows(work.wanted());
                self.out.push(Action::ToPeer { to: of, message });
            }
            None => self.give_up(now, "no other coordinator has them, or is there to be asked"),
        }
    }

    fn give_up(&mut self, now: Now, why: &str) {
        self.repairs.again_ms = now.mono_ms + AGAIN_MS;
        if let Some(work) = self.repairs.work.take() {
            // What is left of it goes with the next attempt, or with the process.
            let _ = self.history.disk().renew(Renewal::Drop);
            let table = work.table.name();
            self.out.push(Action::Alarm(format!("the damaged rows of {table} are not mended yet: {why}")));
        }
    }

    fn mended(&mut self) -> Result<(), DiskError> {
        self.history.disk().renew(Renewal::Finish)?;
        if let Some(Work { table, fetched, .. }) = self.repairs.work.take() {
            self.repairs.found.remove(&table);
            self.repairs.mended += fetched;
            let what =
                format!("the damaged rows of {} are mended: {fetched} rows came from others", table.name());
            self.out.push(Action::Decided(what));
        }
        Ok(())
    }
}
