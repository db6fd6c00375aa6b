//! Long lists, newest first, from what is in memory and what is in the history.

use super::{View, unreadable};
use crate::raft::disk::{Disk, Table};
use fleet_common::protocol::{Listing, PAGE_MAX, Page, Refusal};
use serde::de::DeserializeOwned;
use std::collections::BTreeMap;
use std::ops::Range;

/// Rows read at once, and numbers that are looked at for them. A page that finds fewer than it may have looks again, up to
/// `LOOKS_MAX` times, and further each time that it finds none: a restore leaves gaps.
const CHUNK: u64 = 256;
/// Bounds the work for one page where most numbers are not what it lists.
const LOOKS_MAX: usize = 64;

impl<D: Disk + ?Sized> View<'_, D> {
    /// Numbers from `last` down: those that `remembered` has of a range, and otherwise the rows of `table` as `show` makes them.
    pub(super) fn page<R: DeserializeOwned, T>(
        &self,
        page: Page,
        last: u64,
        table: Table,
        remembered: impl Fn(Range<u64>) -> Vec<(u64, T)>,
        mut show: impl FnMut(u64, R) -> Option<T>,
    ) -> Result<Listing<T>, Refusal> {
        let max = page.max.clamp(1, PAGE_MAX) as usize;
        let mut before = page.before.unwrap_or(u64::MAX).min(last.saturating_add(1));
        // Rows may be large where pages are small.
        let chunk = CHUNK.min(2 * max as u64);
        let (mut items, mut width) = (Vec::new(), chunk);
        for _ in 0..LOOKS_MAX {
            let from = before.saturating_sub(width).max(1);
            let rows: Vec<(u64, R)> =
                self.history.rows_between(table, from, before, chunk as usize + 1).map_err(unreadable)?;
            if rows.len() > chunk as usize {
                // The far end of what was looked at is full: this end of it may be as well.
                width = chunk;
                continue;
            }
            let none = rows.is_empty();
            let rows = rows.into_iter().filter_map(|(number, row)| Some((number, show(number, row)?)));
            let mut found: BTreeMap<u64, T> = rows.collect();
            found.extend(remembered(from..before));
            width = if none && found.is_empty() { width.saturating_mul(2) } else { chunk };
            for (number, item) in found.into_iter().rev() {
                items.push(item);
                if items.len() >= max {
                    return Ok(Listing { items, next: (number > 1).then_some(number) });
                }
            }
            before = from;
            if before <= 1 {
                return Ok(Listing { items, next: None });
            }
        }
        Ok(Listing { items, next: Some(before) })
    }
}
