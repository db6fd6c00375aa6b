//! Causal attention, fused: scores, softmax and weighted values of a few query rows at a time, so that neither scores nor
//! probabilities of a whole sequence exist, and nothing above the diagonal is computed beyond a tile's edge.
//!
//! Both passes read the fused buffer `qkv` (see [`Heads`]) after the rotary embedding. The forward pass saves the
//! log-sum-exp of each row; the backward pass makes the probabilities again from it.
//!
//! Where all buffers are bf16 and the CPU multiplies pairs of bf16 faster than it adds products in f32, both passes are
//! those of `pairs`; else numbers are widened to f32 as they are copied to scratch.

mod backward;
mod decode;
mod forward;
mod pairs;
mod tile;

use crate::{Element, Heads, Scratch, Sight};
pub use decode::attention_decode;

/// Adds what a slope says of the distance to scores of the query at `position` that are still to be multiplied by `scale`.
#[inline(always)]
fn slant(scores: &mut [f32], first: usize, position: usize, slope: f32, scale: f32) {
    if slope == 0.0 {
        return;
    }
    let per_token = slope / scale;
    for (key, score) in (first..).zip(scores) {
        *score -= (position - key) as f32 * per_token;
    }
}

/// Query rows of one tile; a multiple of every register tile's rows.
const QUERIES: usize = 48;

fn check(shape: &Heads, qkv: usize, out: usize, lse: usize) {
    let fits = qkv == shape.qkv_len() && out == shape.out_len() && lse == shape.lse_len();
    assert!(fits, "attention: qkv of {qkv}, out of {out}, lse of {lse} for {shape:?}");
    let grouped = shape.kv_heads > 0 && shape.q_heads.is_multiple_of(shape.kv_heads);
    assert!(grouped && shape.head_dim > 0, "attention: {shape:?}");
}

/// `out: [b, s, h * hd] = softmax(q k' / sqrt(hd), causal) v` from `qkv: [b, s, (h + 2 kv) * hd]`; saves `lse: [b, h, s]`.
/// `sight` says which keys count and what is added to scores. For several threads, split the batch.
pub fn attention<T: Element, O: Element>(
    qkv: &[T],
    shape: &Heads,
    sight: &Sight,
    out: &mut [O],
    lse: &mut [f32],
    scratch: &mut Scratch,
) {
    check(shape, qkv.len(), out.len(), lse.len());
    if let (Some(qkv), Some(out)) = (T::as_bf16(qkv), O::as_bf16_mut(out))
        && pairs::serve(shape)
    {
        let memory = scratch.take(pairs::Forward::memory(shape));
        return pairs::run(pairs::Forward { qkv, shape, sight, out, lse, memory });
    }
    let memory = scratch.take(forward::memory(shape));
    forward::run(qkv, shape, sight, out, lse, memory);
}

/// `dqkv` from `dout`, the gradient of `out`; `qkv`, `sight`, `out` and `lse`: what the forward pass read and wrote.
#[allow(clippy::too_many_arguments)]
pub fn attention_backward<T: Element, O: Element, G: Element>(
    qkv: &[T],
    out: &[O],
    lse: &[f32],
    dout: &[O],
    shape: &Heads,
    sight: &Sight,
    dqkv: &mut [G],
    scratch: &mut Scratch,
) {
    check(shape, qkv.len(), out.len(), lse.len());
    assert!(dqkv.len() == qkv.len() && dout.len() == out.len(), "attention_backward: lengths of gradients");
    if let (Some(qkv), Some(out), Some(dout)) = (T::as_bf16(qkv), O::as_bf16(out), O::as_bf16(dout))
        && let Some(dqkv) = G::as_bf16_mut(dqkv)
        && pairs::serve(shape)
    {
        let memory = scratch.take(pairs::Backward::memory(shape));
        return pairs::run(pairs::Backward { qkv, out, lse, dout, shape, sight, dqkv, memory });
    }
    let memory = scratch.take(backward::memory(shape));
    backward::run(qkv, out, lse, dout, shape, sight, dqkv, memory);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::at_every_level;
    use crate::testing::*;
    use crate::{bf16, reference};
    use proptest::prelude::*;

    /// How far results may be from the reference: relative and absolute, in f32 for the log-sum-exp.
    struct Error {
        relative: f32,
        absolute: f32,
        lse: f32,
    }

    const F32: Error = Error { relative: 2e-5, absolute: 4e-6, lse: 2e-6 };
    /// Results are rounded to bf16. Where probabilities are too, each changes by 1/256 of itself at most; they add up to
    /// one, and values are below 2.
    const BF16: Error = Error { relative: BF16_STEP, absolute: 2.0 / 256.0, lse: 1e-5 };

    fn check<T: Element>(shape: &Heads, sight: &Sight, seed: u64, error: Error) {
        let mut scratch = Scratch::new();
        let qkv: Vec<T> =
            numbers::<f32>(seed, shape.qkv_len()).iter().map(|v| T::from_f32(v * 2.0)).collect();
        let dout = numbers::<T>(seed ^ 1, shape.out_len());
        let (mut out_exact, mut lse_exact) = (vec![T::default(); dout.len()], vec![0.0; shape.lse_len()]);
        let mut grad_exact = vec![T::default(); qkv.len()];
        reference::attention(&qkv, shape, sight, &mut out_exact, &mut lse_exact, &mut scratch);
        reference::attention_backward(
            &qkv,
            &out_exact,
            &lse_exact,
            &dout,
            shape,
            sight,
            &mut grad_exact,
            &mut scratch,
        );
        at_every_level(|| {
            let (out, lse, grad) = both_passes(&qkv, &dout, shape, sight);
            assert_close(&lse, &lse_exact, error.lse, error.lse);
            assert_close(&out, &out_exact, error.relative, error.absolute);
            // Sums over queries, and over what differs from a mean.
            assert_close(&grad, &grad_exact, error.relative, error.absolute * 10.0);
            let one = Heads { batch: 1, ..*shape };
            let parts = qkv.chunks(one.qkv_len()).zip(dout.chunks(one.out_len()));
            let parts: Vec<_> = parts.map(|(qkv, dout)| both_passes(qkv, dout, &one, sight)).collect();
            assert!(parts.iter().flat_map(|p| &p.0).eq(&out), "out differs where the batch is split");
            assert!(parts.iter().flat_map(|p| &p.1).eq(&lse), "lse differs where the batch is split");
            assert!(parts.iter().flat_map(|p| &p.2).eq(&grad), "gradients differ where the batch is split");
        });
    }

    /// `out`, `lse` and `dqkv`.
    fn both_passes<T: Element>(
        qkv: &[T],
        dout: &[T],
        shape: &Heads,
        sight: &Sight,
    ) -> (Vec<T>, Vec<f32>, Vec<T>) {
        let mut scratch = Scratch::new();
        let (mut out, mut lse) = (vec![T::default(); shape.out_len()], vec![0.0; shape.lse_len()]);
        let mut grad = vec![T::default(); qkv.len()];
        attention(qkv, shape, sight, &mut out, &mut lse, &mut scratch);
        attention_backward(qkv, &out, &lse, dout, shape, sight, &mut grad, &mut scratch);
        (out, lse, grad)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(12))]
        #[test]
        fn equals_its_oracle(
            batch in 1usize..3, seq in 1usize..130, kv_heads in 1usize..3, group in 1usize..4,
            head_dim in prop::sample::select(vec![2usize, 6, 16, 32, 64, 72, 128]), seed: u64,
        ) {
            let shape = Heads { batch, seq, q_heads: kv_heads * group, kv_heads, head_dim };
            let slopes: Vec<f32> = (0..shape.q_heads).map(|head| 0.5f32.powi(head as i32 + 1)).collect();
            let window = Some(1 + seed as usize % (seq + 2));
            for (window, slopes) in [(None, &[][..]), (window, &[][..]), (None, &slopes[..]), (window, &slopes[..])] {
                check::<f32>(&shape, &Sight { window, slopes }, seed, F32);
                check::<bf16>(&shape, &Sight { window, slopes }, seed, BF16);
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn decoding_continues_attention(seq in 1usize..40, half in 1usize..20, window in 1usize..50, seed: u64) {
            let shape = Heads { batch: 1, seq, q_heads: 4, kv_heads: 2, head_dim: 2 * half };
            let (width, kv) = (shape.qkv_width(), 2 * shape.head_dim);
            at_every_level(|| {
                let mut scratch = Scratch::new();
                let slopes = [0.5, 0.25, 0.0, 0.125];
                let sight = match window < 40 {
                    true => Sight { window: Some(window), slopes: &slopes },
                    false => Sight::ALL,
                };
                let qkv = numbers::<f32>(seed, shape.qkv_len());
                let (mut out, mut lse) = (vec![0.0; shape.out_len()], vec![0.0; shape.lse_len()]);
                reference::attention(&qkv, &shape, &sight, &mut out, &mut lse, &mut scratch);
                let column = |from: usize, len: usize| -> Vec<f32> {
                    qkv.chunks_exact(width).flat_map(|t| t[from..from + len].to_vec()).collect()
                };
                let (k, v) = (column(shape.out_width(), kv), column(shape.out_width() + kv, kv));
                let q = &qkv[(seq - 1) * width..][..shape.out_width()];
                let mut last = vec![0.0; shape.out_width()];
                attention_decode(q, &k, &v, seq, &shape, &sight, &mut last, &mut scratch);
                assert_close(&last, &out[(seq - 1) * shape.out_width()..], 1e-5, 1e-6);
            });
        }
    }
}
