//! Rows of an embedding table by token id, and the gradient back into the table.

use crate::Element;
use crate::element::{load, store};
use crate::simd::simd_fn;

fn check(name: &str, table: usize, d: usize, ids: &[i64], rows: usize) {
    assert!(
        d > 0 && table.is_multiple_of(d) && rows == ids.len() * d,
        "{name}: table {table}, d {d}, rows of {rows}"
    );
    let bad = ids.iter().find(|id| !(0..(table / d) as i64).contains(*id));
    assert!(bad.is_none(), "{name}: token {bad:?} of {}", table / d);
}

simd_fn! {
    /// `out: [rows, d]` from `table: [V, d]`.
    pub fn embedding<V, T: Element, O: Element>(table: &[T], d: usize, ids: &[i64], out: &mut [O]) {
        check("embedding", table.len(), d, ids, out.len());
        for (id, out) in ids.iter().zip(out.chunks_exact_mut(d)) {
            let row = &table[*id as usize * d..][..d];
            for i in (0..d).step_by(V::LANES) {
                store(load::<V, T>(&row[i..]), &mut out[i..]);
            }
        }
    }
}

simd_fn! {
    /// `dtable[id] += dout[row]` for each row, in the order of the rows.
    pub fn embedding_backward<V, G: Element>(dout: &[G], d: usize, ids: &[i64], dtable: &mut [f32]) {
        check("embedding_backward", dtable.len(), d, ids, dout.len());
        for (id, g) in ids.iter().zip(dout.chunks_exact(d)) {
            let row = &mut dtable[*id as usize * d..][..d];
            for i in (0..d).step_by(V::LANES) {
                let sum = load::<V, f32>(&row[i..]).add(load(&g[i..]));
                store(sum, &mut row[i..]);
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

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn equals_its_oracle(d in 1usize..60, ids in prop::collection::vec(0i64..7, 0..12), seed: u64) {
            at_every_level(|| {
                let table = numbers::<f32>(seed, 7 * d);
                let (mut out, mut exact) = (vec![bf16::ZERO; ids.len() * d], vec![bf16::ZERO; ids.len() * d]);
                embedding(&table, d, &ids, &mut out);
                reference::embedding(&table, d, &ids, &mut exact);
                assert_eq!(out, exact);
                let (mut grad, mut exact) = (table.clone(), table.clone());
                embedding_backward(&out, d, &ids, &mut grad);
                reference::embedding_backward(&out, d, &ids, &mut exact);
                assert_eq!(grad, exact);
            });
        }
    }
}
