//! Long lists, newest first, from what is in memory and what is in the history.

use super::{View, unreadable};
use crate::raft::disk::{Disk, Table};
use fleet_common::protocol::{Listing, PAGE_MAX, Page, Refusal};
use serde::de::DeserializeOwned;

/// Rows read at once. A page that finds fewer than it may have looks at this many numbers once more, up to `LOOKS_MAX` times.
const CHUNK: u64 = 256;
/// Bounds the work for one page where most numbers are not what it lists.
const LOOKS_MAX: usize = 64;

impl<D: Disk + ?Sized> View<'_, D> {
    /// Numbers from `last` down, each with what `remembered` has of it, or else its row of `table`, as `show` makes them.
    pub(super) fn page<R: DeserializeOwned, T>(
        &self,
        page: Page,
        last: u64,
        table: Table,
        mut remembered: impl FnMut(u64) -> Option<T>,
        mut show: impl FnMut(u64, R) -> Option<T>,
    ) -> Result<Listing<T>, Refusal> {
        let max = page.max.clamp(1, PAGE_MAX) as usize;
        let mut before = page.before.unwrap_or(u64::MAX).min(last.saturating_add(1));
        let mut items = Vec::new();
        for _ in 0..LOOKS_MAX {
            let from = before.saturating_sub(CHUNK).max(1);
            let rows: Vec<(u64, R)> =
                self.history.rows_between(table, from, before, CHUNK as usize).map_err(unreadable)?;
            let mut rows = rows.into_iter().rev().peekable();
            for number in (from..before).rev() {
                let row = rows.next_if(|(of, _)| *of == number);
                let item = remembered(number).or_else(|| row.and_then(|(of, row)| show(of, row)));
                items.extend(item);
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
