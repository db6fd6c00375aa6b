//! Rotary embedding in Hugging Face's Llama convention (number `i` of what is turned of a head, `hd` numbers, turns with number `i + hd / 2`), in place in
//! the fused buffer `qkv` (see [`Heads`]). A table that is narrower than a head turns its first numbers.

use crate::element::{load, store};
use crate::simd::{Vector, simd_fn};
use crate::{Element, Heads, RopeTable};

/// Turns one head by the angles of its position (`sign` 1) or back (-1).
#[inline(always)]
fn turn<V: Vector, T: Element>(head: &mut [T], cos: &[f32], sin: &[f32], sign: f32) {
    let half = cos.len();
    let (head_a, head_b) = head[..2 * half].split_at_mut(half);
    for i in (0..half).step_by(V::LANES) {
        let (a, b): (V, V) = (load(&head_a[i..]), load(&head_b[i..]));
        let (c, s): (V, V) = (load(&cos[i..]), load::<V, _>(&sin[i..]).mul(V::splat(sign)));
        store(a.mul(c).sub(b.mul(s)), &mut head_a[i..]);
        store(b.mul(c).add(a.mul(s)), &mut head_b[i..]);
    }
}

fn check_table(shape: &Heads, table: &RopeTable, position: usize) {
    assert!(table.half * 2 <= shape.head_dim, "rope: the table is for a larger head");
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
                turn::<V, T>(head, cos, sin, sign);
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reference;
    use crate::simd::at_every_level;
    use crate::testing::*;
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
            at_every_level(|| {
                let x = numbers::<f32>(seed, shape.qkv_len());
                let (mut fast, mut exact) = (x.clone(), x.clone());
                rope(&mut fast, &shape, &table, position);
                reference::rope(&mut exact, &shape, &table, position);
                assert_close(&fast, &exact, 1e-6, 1e-7);
                rope_backward(&mut fast, &shape, &table, position);
                assert_close(&fast, &x, 1e-5, 1e-6); // a rotation's gradient is its inverse
            });
        }
    }

    #[test]
    fn a_narrow_table_turns_the_beginning_of_each_head() {
        let shape = Heads { batch: 1, seq: 5, q_heads: 2, kv_heads: 1, head_dim: 10 };
        let narrow = Heads { head_dim: 6, ..shape };
        let table = RopeTable::from_frequencies(5, &[1.0, 0.1, 0.01], 1.5);
        at_every_level(|| {
            let whole = numbers::<f32>(3, shape.qkv_len());
            let begin =
                |x: &[f32]| -> Vec<f32> { x.chunks(10).flat_map(|head| head[..6].to_vec()).collect() };
            let (mut turned, mut alone) = (whole.clone(), begin(&whole));
            rope(&mut turned, &shape, &table, 0);
            reference::rope(&mut alone, &narrow, &table, 0);
            assert_close(&begin(&turned), &alone, 1e-6, 1e-7);
            assert!(turned.chunks(10).zip(whole.chunks(10)).all(|(a, b)| a[6..] == b[6..]));
        });
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
