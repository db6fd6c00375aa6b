//! CPU kernels of the training engine, over slices: no tensors, no allocation on the hot path, no threads of their own.
//!
//! Every kernel exists twice: here, for the SIMD of the machine (AVX-512, AVX2 with FMA, or plain code; chosen at run
//! time, see [`Level`]), and in [`reference`] under the same name, as simple loops that are its oracle in the tests.
//!
//! Legend of the shapes: `rows` tokens, `d` hidden size, `b` sequences, `s` tokens of a sequence, `h` query heads, `kv`
//! key/value heads, `hd` head size, `f` feed-forward size, `V` vocabulary. All row-major. Numbers are computed in f32 and
//! stored as the [`Element`] of the slice (f32, or bf16 rounded to nearest even); sums over a whole buffer are f64. Only
//! attention in bf16 multiplies bf16 numbers as they are, with sums in f32, where the CPU has fast instructions for that.
//!
//! Weights that are not trained may have few bits: [`quant`]. The oracle of their codes are golden files, that of their products
//! [`Quantised::number`](quant::Quantised::number) with [`reference::gemm`].
//!
//! Kernels run in the calling thread. A caller with several threads splits rows (or elements) among them; every kernel
//! but the sums over rows (`dw` of a norm, the embedding's gradient, losses) gives the same bits however it is split.
//!
//! # Panics
//! Slices whose lengths do not fit together are a bug of the caller: every kernel checks them once and panics.
#![allow(unsafe_code)] // intrinsics and AMX; each block says why it is sound

mod activation;
mod adamw;
mod attention;
mod copy;
mod cross_entropy;
pub mod cuda;
mod element;
mod elementwise;
mod embedding;
mod gemm;
mod layer_norm;
mod math;
pub mod quant;
pub mod reference;
mod rms_norm;
mod rope;
mod shapes;
mod simd;
#[cfg(test)]
mod testing;

pub use activation::{activate, activate_backward, gated, gated_backward};
pub use adamw::adamw;
pub use attention::{attention, attention_backward, attention_decode};
pub use copy::copy;
pub use cross_entropy::{cross_entropy, cross_entropy_loss};
pub use element::Element;
pub use elementwise::{
    add, add_rows, add_scaled_columns, all_finite, convert, scale_columns, sum_products, sum_rows,
    sum_squares,
};
pub use embedding::{embedding, embedding_backward};
pub use gemm::{Operand, Sheet, gemm, gemm_by_row, sheets};
pub use half::bf16;
pub use layer_norm::{RowStats, layer_norm, layer_norm_backward};
pub use rms_norm::{rms_norm, rms_norm_backward};
pub use rope::{rope, rope_backward};
pub use shapes::{Activation, AdamWStep, Heads, IGNORED, Matrix, RopeTable, Scratch, Sight, Store};
pub use simd::Level;
