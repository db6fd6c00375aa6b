//! Causal attention, fused: scores, softmax and weighted values of a few query rows at a time, so that neither scores nor
//! probabilities of a whole sequence exist, and nothing above the diagonal is computed beyond a tile's edge.
//!
//! Both passes read the fused buffer `qkv` (see [`Heads`]) after the rotary embedding. The forward pass saves the
//! log-sum-exp of each row; the backward pass makes the probabilities again from it.

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

    fn check<T: Element>(shape: &Heads, sight: &Sight, seed: u64, relative: f32, absolute: f32) {
        let mut scratch = Scratch::new();
        let qkv: Vec<T> =
            numbers::<f32>(seed, shape.qkv_len()).iter().map(|v| T::from_f32(v * 2.0)).collect();
        let (mut out, mut lse) = (vec![T::default(); shape.out_len()], vec![0.0; shape.lse_len()]);
        let (mut out_exact, mut lse_exact) = (out.clone(), lse.clone());
        attention(&qkv, shape, sight, &mut out, &mut lse, &mut scratch);
        reference::attention(&qkv, shape, sight, &mut out_exact, &mut lse_exact, &mut scratch);
        assert_close(&lse, &lse_exact, 2e-6, 2e-6);
        assert_close(&out, &out_exact, relative, absolute);
        let dout = numbers::<T>(seed ^ 1, out.len());
        let (mut grad, mut exact) = (vec![T::default(); qkv.len()], vec![T::default(); qkv.len()]);
        attention_backward(&qkv, &out, &lse, &dout, shape, sight, &mut grad, &mut scratch);
        reference::attention_backward(&qkv, &out, &lse, &dout, shape, sight, &mut exact, &mut scratch);
        assert_close(&grad, &exact, relative, absolute * 10.0);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(12))]
        #[test]
        fn equals_its_oracle(
            batch in 1usize..3, seq in 1usize..130, kv_heads in 1usize..3, group in 1usize..4,
            head_dim in prop::sample::select(vec![2usize, 6, 16, 32, 64, 72]), seed: u64,
        ) {
            let shape = Heads { batch, seq, q_heads: kv_heads * group, kv_heads, head_dim };
            at_every_level(|| {
                check::<f32>(&shape, &Sight::ALL, seed, 2e-5, 4e-6);
                check::<bf16>(&shape, &Sight::ALL, seed, BF16_STEP, 4e-3);
                let slopes: Vec<f32> = (0..shape.q_heads).map(|head| 0.5f32.powi(head as i32 + 1)).collect();
                let window = Some(1 + seed as usize % (seq + 2));
                for sight in [Sight { window, slopes: &[] }, Sight { window: None, slopes: &slopes }, Sight { window, slopes: &slopes }] {
                    check::<f32>(&shape, &sight, seed, 2e-5, 4e-6);
                }
            });
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
