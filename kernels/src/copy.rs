//! Copies of more numbers than the caches hold.

use crate::simd::simd_fn;

simd_fn! {
    /// `to = from`, written past the caches: the memory of `to` is not read first, and what the caches hold stays there. Whoever reads `to`
    /// next waits for memory.
    pub fn copy<V>(from: &[f32], to: &mut [f32]) {
        assert_eq!(from.len(), to.len(), "copy: lengths differ");
        let head = to.as_ptr().align_offset(V::LANES * size_of::<f32>()).min(to.len());
        let whole = head + (to.len() - head) / V::LANES * V::LANES;
        to[..head].copy_from_slice(&from[..head]);
        for at in (head..whole).step_by(V::LANES) {
            // SAFETY: a whole vector lies in both from `at` on, in `to` where a vector may.
            unsafe { V::load(from.as_ptr().add(at)).stream(to.as_mut_ptr().add(at)) };
        }
        V::streamed();
        to[whole..].copy_from_slice(&from[whole..]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::at_every_level;
    use crate::testing::numbers;

    #[test]
    fn every_number_arrives_wherever_it_lies() {
        let from = numbers::<f32>(3, 1100);
        at_every_level(|| {
            for (start, len) in [(0, 0), (1, 3), (0, 16), (5, 31), (17, 1000), (3, 1097)] {
                let mut to = vec![7.0; 1200];
                copy(&from[start..start + len], &mut to[start + 1..start + 1 + len]);
                assert_eq!(to[start + 1..start + 1 + len], from[start..start + len]);
                assert!(
                    to[..=start].iter().chain(&to[start + 1 + len..]).all(|v| *v == 7.0),
                    "{start} {len}"
                );
            }
        });
    }
}
