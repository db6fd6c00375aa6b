//! What buffers hold, and how elements of different ranks become one.

use std::fmt;

/// Type of the elements that a reduction works on. All are in the machine's byte order; buffers need no alignment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    F32,
    /// Summed in f32 and rounded: once where memory is shared, once per hop where parts travel.
    Bf16,
    /// As `Bf16`.
    F16,
    F64,
    /// Sums of integers wrap.
    I32,
    I64,
    U64,
    U8,
}

impl DType {
    pub const ALL: [DType; 8] =
        [DType::F32, DType::Bf16, DType::F16, DType::F64, DType::I32, DType::I64, DType::U64, DType::U8];

    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            DType::U8 => 1,
            DType::Bf16 | DType::F16 => 2,
            DType::F32 | DType::I32 => 4,
            DType::F64 | DType::I64 | DType::U64 => 8,
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DType::F32 => "f32",
            DType::Bf16 => "bf16",
            DType::F16 => "f16",
            DType::F64 => "f64",
            DType::I32 => "i32",
            DType::I64 => "i64",
            DType::U64 => "u64",
            DType::U8 => "u8",
        })
    }
}

/// How elements of different ranks become one. The order in which ranks are taken is fixed by the world and its hosts, and the result is
/// computed once or by everybody alike: every rank gets the same bits, run after run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Op {
    Sum,
    /// A NaN on any rank gives NaN.
    Max,
}
