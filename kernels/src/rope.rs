//! Rotary embedding in Hugging Face's Llama convention (number `i` of a head turns with number `i + hd / 2`), and the moves
//! between the fused buffer `qkv` (see [`Heads`]) and head-major arrays `[b, heads, s, hd]`.

use crate::element::{load, store};
use crate::simd::{Vector, simd_fn};
use crate::{Element, Heads, RopeTable};

/// Turns one head by the angles of its position (`sign` 1) or back (-1).
#[inline(always)]
fn turn<V: Vector, I: Element, O: Element>(from: &[I], cos: &[f32], sin: &[f32], sign: f32, to: &mut [O]) {
    let half = cos.len();
    let (from_a, from_b) = from.split_at(half);
    let (to_a, to_b) = to.split_at_mut(half);
    for i in (0..half).step_by(V::LANES) {
        let (a, b): (V, V) = (load(&from_a[i..]), load(&from_b[i..]));
        let (c, s): (V, V) = (load(&cos[i..]), load::<V, _>(&sin[i..]).mul(V::splat(sign)));
        store(a.mul(c).sub(b.mul(s)), &mut to_a[i..]);
        store(b.mul(c).add(a.mul(s)), &mut to_b[i..]);
    }
}

#[inline(always)]
fn turn_in_place<V: Vector, T: Element>(head: &mut [T], cos: &[f32], sin: &[f32], sign: f32) {
    let half = cos.len();
    let (head_a, head_b) = head.split_at_mut(half);
    for i in (0..half).step_by(V::LANES) {
        let (a, b): (V, V) = (load(&head_a[i..]), load(&head_b[i..]));
        let (c, s): (V, V) = (load(&cos[i..]), load::<V, _>(&sin[i..]).mul(V::splat(sign)));
        store(a.mul(c).sub(b.mul(s)), &mut head_a[i..]);
        store(b.mul(c).add(a.mul(s)), &mut head_b[i..]);
    }
}

#[inline(always)]
fn copy<V: Vector, I: Element, O: Element>(from: &[I], to: &mut [O]) {
    for i in (0..from.len()).step_by(V::LANES) {
        store(load::<V, I>(&from[i..]), &mut to[i..]);
    }
}

fn check_table(shape: &Heads, table: &RopeTable, position: usize) {
    assert_eq!(table.half * 2, shape.head_dim, "rope: the table is for another head size");
    assert!(
        position + shape.seq <= table.positions(),
        "rope: the table ends before position {}",
        position + shape.seq
    );
}

simd_fn! {
    fn turn_qkv<V, T: Element>(qkv: &mut [T], shape: &Heads, table: &RopeTable, position: usize, sign: f32) {
        assert_eq!(qkv.len(), shape.qkv_len(), "rope: length of qkv");
        check_table(shape, table, position);
        for (t, token) in qkv.chunks_exact_mut(shape.qkv_width()).enumerate() {
            let (cos, sin) = table.row(position + t % shape.seq);
            for head in token.chunks_exact_mut(shape.head_dim).take(shape.q_heads + shape.kv_heads) {
                turn_in_place::<V, T>(head, cos, sin, sign);
            }
        }
    }
}

/// Turns queries and keys of the fused buffer in place; `position`: of the first token of each sequence.
pub fn rope<T: Element>(qkv: &mut [T], shape: &Heads, table: &RopeTable, position: usize) {
    turn_qkv(qkv, shape, table, position, 1.0);
}

/// The gradient of [`rope`], in place on the gradient of the fused buffer.
pub fn rope_backward<T: Element>(dqkv: &mut [T], shape: &Heads, table: &RopeTable, position: usize) {
    turn_qkv(dqkv, shape, table, position, -1.0);
}

/// Where the head `head` of token `t` (counted over all sequences) begins in a head-major array.
#[inline(always)]
fn head_major(shape: &Heads, heads: usize, t: usize, head: usize) -> usize {
    ((t / shape.seq * heads + head) * shape.seq + t % shape.seq) * shape.head_dim
}

fn check_heads(shape: &Heads, q: usize, k: usize, v: usize) {
    let kv = shape.batch * shape.seq * shape.kv_heads * shape.head_dim;
    assert!(q == shape.out_len() && k == kv && v == kv, "head-major slices of {q}, {k}, {v} for {shape:?}");
}

simd_fn! {
    /// From the fused buffer to `q: [b, h, s, hd]` and `k, v: [b, kv, s, hd]`, with q and k turned on the way if `rope` has a
    /// table and the first position.
    pub fn split_qkv<V, I: Element, O: Element>(
        qkv: &[I], shape: &Heads, rope: Option<(&RopeTable, usize)>, q: &mut [O], k: &mut [O], v: &mut [O],
    ) {
        assert_eq!(qkv.len(), shape.qkv_len(), "split_qkv: length of qkv");
        check_heads(shape, q.len(), k.len(), v.len());
        if let Some((table, position)) = rope {
            check_table(shape, table, position);
        }
        let (h, kv, hd) = (shape.q_heads, shape.kv_heads, shape.head_dim);
        for (t, token) in qkv.chunks_exact(shape.qkv_width()).enumerate() {
            for (n, head) in token.chunks_exact(hd).enumerate() {
                let to = if n < h {
                    &mut q[head_major(shape, h, t, n)..][..hd]
                } else if n < h + kv {
                    &mut k[head_major(shape, kv, t, n - h)..][..hd]
                } else {
                    &mut v[head_major(shape, kv, t, n - h - kv)..][..hd]
                };
                match rope {
                    Some((table, position)) if n < h + kv => {
                        let (cos, sin) = table.row(position + t % shape.seq);
                        turn::<V, I, O>(head, cos, sin, 1.0, to);
                    }
                    _ => copy::<V, I, O>(head, to),
                }
            }
        }
    }
}

simd_fn! {
    /// The gradient of [`split_qkv`]: head-major gradients back into the fused layout, turned back.
    pub fn merge_qkv_backward<V, I: Element, O: Element>(
        dq: &[I], dk: &[I], dv: &[I], shape: &Heads, rope: Option<(&RopeTable, usize)>, dqkv: &mut [O],
    ) {
        assert_eq!(dqkv.len(), shape.qkv_len(), "merge_qkv_backward: length of dqkv");
        check_heads(shape, dq.len(), dk.len(), dv.len());
        if let Some((table, position)) = rope {
            check_table(shape, table, position);
        }
        let (h, kv, hd) = (shape.q_heads, shape.kv_heads, shape.head_dim);
        for (t, token) in dqkv.chunks_exact_mut(shape.qkv_width()).enumerate() {
            for (n, head) in token.chunks_exact_mut(hd).enumerate() {
                let from = if n < h {
                    &dq[head_major(shape, h, t, n)..][..hd]
                } else if n < h + kv {
                    &dk[head_major(shape, kv, t, n - h)..][..hd]
                } else {
                    &dv[head_major(shape, kv, t, n - h - kv)..][..hd]
                };
                match rope {
                    Some((table, position)) if n < h + kv => {
                        let (cos, sin) = table.row(position + t % shape.seq);
                        turn::<V, I, O>(from, cos, sin, -1.0, head);
                    }
                    _ => copy::<V, I, O>(from, head),
                }
            }
        }
    }
}

simd_fn! {
    /// From `[b, h, s, hd]` to `[b, s, h * hd]`.
    pub fn merge_heads<V, I: Element, O: Element>(x: &[I], shape: &Heads, out: &mut [O]) {
        assert!(x.len() == shape.out_len() && out.len() == x.len(), "merge_heads: lengths");
        for (t, token) in out.chunks_exact_mut(shape.out_width()).enumerate() {
            for (n, head) in token.chunks_exact_mut(shape.head_dim).enumerate() {
                copy::<V, I, O>(&x[head_major(shape, shape.q_heads, t, n)..][..shape.head_dim], head);
            }
        }
    }
}

simd_fn! {
    /// From `[b, s, h * hd]` to `[b, h, s, hd]`.
    pub fn split_heads<V, I: Element, O: Element>(x: &[I], shape: &Heads, out: &mut [O]) {
        assert!(x.len() == shape.out_len() && out.len() == x.len(), "split_heads: lengths");
        for (t, token) in x.chunks_exact(shape.out_width()).enumerate() {
            for (n, head) in token.chunks_exact(shape.head_dim).enumerate() {
                copy::<V, I, O>(head, &mut out[head_major(shape, shape.q_heads, t, n)..][..shape.head_dim]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::at_every_level;
    use crate::testing::*;
    use crate::{bf16, reference};
    use proptest::prelude::*;

    fn shapes() -> impl Strategy<Value = Heads> {
        (1usize..3, 1usize..6, 1usize..3, 1usize..3, 1usize..20).prop_map(
            |(batch, seq, kv_heads, group, half)| Heads {
                batch,
                seq,
                q_heads: kv_heads * group,
                kv_heads,
                head_dim: 2 * half,
            },
        )
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn equals_its_oracle(shape in shapes(), position in 0usize..9, seed: u64) {
            let table = RopeTable::new(position + shape.seq, shape.head_dim, 10_000.0);
            let kv_len = shape.batch * shape.kv_heads * shape.seq * shape.head_dim;
            at_every_level(|| {
                let x = numbers::<f32>(seed, shape.qkv_len());
                let (mut fast, mut exact) = (x.clone(), x.clone());
                rope(&mut fast, &shape, &table, position);
                reference::rope(&mut exact, &shape, &table, position);
                assert_close(&fast, &exact, 1e-6, 1e-7);
                rope_backward(&mut fast, &shape, &table, position);
                assert_close(&fast, &x, 1e-5, 1e-6); // a rotation's gradient is its inverse

                let mut parts = [vec![0.0f32; shape.out_len()], vec![0.0; kv_len], vec![0.0; kv_len]];
                let mut parts_exact = parts.clone();
                let [q, k, v] = &mut parts;
                split_qkv(&x, &shape, Some((&table, position)), q, k, v);
                let [qe, ke, ve] = &mut parts_exact;
                reference::split_qkv(&x, &shape, Some((&table, position)), qe, ke, ve);
                (0..3).for_each(|i| assert_close(&parts[i], &parts_exact[i], 1e-6, 1e-7));
                let [q, k, v] = &parts;
                let mut back = x.clone();
                let mut back_exact = x.clone();
                merge_qkv_backward(q, k, v, &shape, Some((&table, position)), &mut back);
                reference::merge_qkv_backward(q, k, v, &shape, Some((&table, position)), &mut back_exact);
                assert_close(&back, &back_exact, 1e-6, 1e-6);
                assert_close(&back, &x, 1e-5, 1e-6);

                let mut merged = vec![bf16::ZERO; shape.out_len()];
                let mut merged_exact = merged.clone();
                merge_heads(q, &shape, &mut merged);
                reference::merge_heads(q, &shape, &mut merged_exact);
                assert_eq!(merged, merged_exact);
                let mut split = vec![bf16::ZERO; shape.out_len()];
                split_heads(&merged, &shape, &mut split);
                let mut q_bf16 = split.clone();
                crate::convert(q, &mut q_bf16);
                assert_eq!(split, q_bf16);
            });
        }
    }

    #[test]
    fn angles_are_those_of_hugging_face() {
        // torch 2.11: angles = 255 * (1 / 10000 ** (torch.arange(0, 64, 2).float() / 64)); angles.cos()[5], angles.sin()[9]
        let table = RopeTable::new(256, 64, 10_000.0);
        let (cos, sin) = table.row(255);
        assert!(
            (cos[5] - -0.711_077_03).abs() < 3e-6 && (sin[9] - 0.269_376_16).abs() < 3e-6,
            "{} {}",
            cos[5],
            sin[9]
        );
        assert_eq!(table.row(0).0, [1.0; 32]);
    }
}
