//! The steps of one rank, with what each waits for.

use super::{Kind, Step};
use std::collections::BTreeMap;

/// A list of steps and, of each, the earlier ones that it must not overtake.
pub(crate) struct Plan {
    pub steps: Vec<Step>,
    /// All lists one behind the other; that of step `i` begins at `starts[i]`.
    earlier: Vec<u32>,
    starts: Vec<usize>,
}

/// Bytes that the same steps have touched.
#[derive(Clone, Default)]
struct Piece {
    end: usize,
    writer: Option<u32>,
    /// Since the writer.
    readers: Vec<u32>,
}

impl Plan {
    pub fn new(steps: Vec<Step>) -> Plan {
        let mut pieces: BTreeMap<usize, Piece> = BTreeMap::new();
        let end = steps.iter().map(|step| step.range.end).max().unwrap_or(0);
        pieces.insert(0, Piece { end, ..Piece::default() });
        let (mut earlier, mut starts) = (Vec::new(), vec![0]);
        for (at, step) in steps.iter().enumerate() {
            let from = earlier.len();
            if !step.range.is_empty() {
                cut(&mut pieces, step.range.start);
                cut(&mut pieces, step.range.end);
                for (_, piece) in pieces.range_mut(step.range.clone()) {
                    earlier.extend(piece.writer);
                    if step.kind == Kind::Send {
                        piece.readers.push(at as u32);
                    } else {
                        earlier.append(&mut piece.readers);
                        piece.writer = Some(at as u32);
                    }
                }
            }
            earlier[from..].sort_unstable();
            let mut kept = from;
            for next in from..earlier.len() {
                if next == from || earlier[next] != earlier[kept - 1] {
                    earlier[kept] = earlier[next];
                    kept += 1;
                }
            }
            earlier.truncate(kept);
            starts.push(earlier.len());
        }
        Plan { steps, earlier, starts }
    }

    /// The steps that step `at` must not overtake, byte by byte.
    pub fn earlier(&self, at: usize) -> impl Iterator<Item = usize> + '_ {
        self.earlier[self.starts[at]..self.starts[at + 1]].iter().map(|step| *step as usize)
    }

    /// Up to which byte step `at` may go now, `positions` being the next byte of each step.
    pub fn limit(&self, at: usize, positions: &[usize]) -> usize {
        let step = &self.steps[at];
        let unfinished = self.earlier(at).filter(|other| positions[*other] < self.steps[*other].range.end);
        unfinished.map(|other| positions[other]).min().unwrap_or(usize::MAX).min(step.range.end)
    }
}

/// Lets a piece begin at `place`, where there is one around it.
fn cut(pieces: &mut BTreeMap<usize, Piece>, place: usize) {
    if let Some((start, piece)) = pieces.range_mut(..place).next_back()
        && piece.end > place
        && *start < place
    {
        let rest = piece.clone();
        piece.end = place;
        pieces.insert(place, rest);
    }
}
