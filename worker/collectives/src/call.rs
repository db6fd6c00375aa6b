//! What ranks say to each other about a call: its kind as one word, its number and size; and which rank is the odd one where they differ.

use crate::collective::Keep;
use crate::dtype::{DType, Op};
use crate::error::CollectiveError;

/// The calls a rank can be in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Call {
    AllReduce(DType, Op),
    ReduceScatter(DType, Op),
    AllGather(DType),
    Broadcast {
        root: usize,
    },
    AllToAll,
    Barrier,
    Allocate {
        common: bool,
    },
    Reduce(DType, Op, Keep),
    /// Of parts into memory of the host.
    Gather,
}

impl Call {
    fn kind(self) -> u64 {
        match self {
            Call::AllReduce(..) => 1,
            Call::ReduceScatter(..) => 2,
            Call::AllGather(_) => 3,
            Call::Broadcast { .. } => 4,
            Call::AllToAll => 5,
            Call::Barrier => 6,
            Call::Allocate { .. } => 7,
            Call::Reduce(..) => 8,
            Call::Gather => 9,
        }
    }

    /// One word, never 0: kind, then dtype, operation and keep or root.
    pub fn word(self) -> u64 {
        let element = |dtype: DType, op: Op| ((dtype as u64 + 1) << 8) | ((op as u64) << 16);
        let more = match self {
            Call::AllReduce(dtype, op) | Call::ReduceScatter(dtype, op) => element(dtype, op),
            Call::Reduce(dtype, op, keep) => element(dtype, op) | ((keep as u64) << 24),
            Call::Broadcast { root } => (root as u64) << 24,
            Call::Allocate { common } => u64::from(common) << 24,
            Call::AllGather(dtype) => element(dtype, Op::Sum),
            Call::AllToAll | Call::Barrier | Call::Gather => 0,
        };
        self.kind() | more
    }
}

/// The name of the call in a word.
pub(crate) fn name(word: u64) -> &'static str {
    match word & 0xff {
        1 => "all_reduce",
        2 => "reduce_scatter",
        3 => "all_gather",
        4 => "broadcast",
        5 => "all_to_all",
        6 => "barrier",
        7 => "allocate",
        8 => "reduce",
        9 => "gather",
        _ => "an unknown call",
    }
}

/// What a rank says about a call; equal on all ranks, or the gang is broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Signature {
    /// The number of the call, from 1.
    pub sequence: u64,
    /// `Call::word`.
    pub word: u64,
    pub bytes: u64,
    /// Where in the shared buffers; 0 for other calls.
    pub place: u64,
}

impl Signature {
    /// Of a rank that is in none.
    pub const NONE: Signature = Signature { sequence: 0, word: 0, bytes: 0, place: 0 };

    /// `all_reduce #412`.
    pub fn short(&self) -> String {
        format!("{} #{}", name(self.word), self.sequence)
    }
}

/// `all_reduce #412 (f32 sum, 4096 bytes)`.
impl std::fmt::Display for Signature {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let word = self.word;
        let dtype = (((word >> 8) & 0xff) as usize).checked_sub(1).and_then(|at| DType::ALL.get(at));
        let dtype = dtype.map_or(String::new(), |dtype| match (word & 0xff, (word >> 16) & 0xff) {
            (3, _) => format!("{dtype}, "),
            (_, op) if op == Op::Sum as u64 => format!("{dtype} sum, "),
            _ => format!("{dtype} max, "),
        });
        let rest = match (word & 0xff, word >> 24) {
            (4, root) => format!("from rank {root}, "),
            (8, keep) if keep == Keep::Everything as u64 => "all-reduce, ".to_owned(),
            (7, common) if common != 0 => "common, ".to_owned(),
            _ => String::new(),
        };
        write!(f, "{} ({dtype}{rest}{} bytes)", self.short(), self.bytes)
    }
}

/// Compares what ranks say, each by its name. The error names the first that is not with the majority; with as many on each side, the
/// side of the first rank is the majority.
pub(crate) fn compare(says: &[(usize, Signature)]) -> Result<(), CollectiveError> {
    let agree = |one: &Signature| says.iter().filter(|(_, other)| other == one).count();
    let Some(most) = says.iter().rev().max_by_key(|(_, one)| agree(one)) else { return Ok(()) };
    let Some(odd) = says.iter().find(|(_, one)| *one != most.1) else { return Ok(()) };
    Err(CollectiveError::Mismatch {
        rank: odd.0,
        other: most.0,
        theirs: odd.1.to_string(),
        others: most.1.to_string(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn says(rank: usize, call: Call, bytes: u64) -> (usize, Signature) {
        (rank, Signature { sequence: 4, word: call.word(), bytes, place: 0 })
    }

    #[test]
    fn the_odd_one_is_named_with_what_it_called() {
        let sum = Call::AllReduce(DType::F32, Op::Sum);
        assert!(compare(&[says(0, sum, 8), says(1, sum, 8)]).is_ok());
        let error = compare(&[says(0, Call::Barrier, 0), says(1, sum, 8), says(2, sum, 8)]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "rank 0 called barrier #4 (0 bytes) where rank 1 called all_reduce #4 (f32 sum, 8 bytes); all ranks must make the same calls"
        );
        let error = compare(&[says(0, sum, 8), says(1, sum, 4)]).unwrap_err();
        assert_eq!(error.culprit(), Some(1), "a tie goes against the later rank");
    }

    #[test]
    fn a_word_says_the_type_the_operation_and_the_root() {
        let text = |call: Call| says(0, call, 2).1.to_string();
        for dtype in DType::ALL {
            assert_eq!(
                text(Call::ReduceScatter(dtype, Op::Max)),
                format!("reduce_scatter #4 ({dtype} max, 2 bytes)")
            );
        }
        assert_eq!(text(Call::Broadcast { root: 3 }), "broadcast #4 (from rank 3, 2 bytes)");
        assert_eq!(
            text(Call::Reduce(DType::F32, Op::Sum, Keep::Everything)),
            "reduce #4 (f32 sum, all-reduce, 2 bytes)"
        );
    }
}
