//! Fresh weights: each a pure function of (seed, parameter name, position), so that any number of ranks or threads makes the same model.

use fleet_common::model::{Fresh, Parameter};
use std::ops::Range;

/// Numbers drawn from one stream; streams can be drawn in any order.
const STREAM: usize = 4096;

/// Fills the elements of `parameter` that lie in `range` (of the flat buffer). `out` begins at the flat element `out_start` and covers
/// them.
pub fn fill(parameter: &Parameter, range: Range<usize>, seed: u64, out: &mut [f32], out_start: usize) {
    let begin = range.start.max(parameter.range.start);
    let end = range.end.min(parameter.range.end);
    if begin >= end {
        return;
    }
    let draw: &dyn Fn(u64, &mut [f32; STREAM]) = match parameter.fresh {
        Fresh::Constant(constant) => return out[begin - out_start..end - out_start].fill(constant),
        Fresh::Normal(std) => &move |state, out| normals(state, std as f32, out),
        // Who has that matrix writes them.
        Fresh::RowLengths => return,
        Fresh::Uniform(bound) => &move |state, out| uniform(state, bound as f32, out),
    };
    let base = parameter.range.start;
    let key = mix(seed ^ fnv(parameter.name.as_bytes()));
    let mut block = [0.0; STREAM];
    for stream in (begin - base) / STREAM..(end - base).div_ceil(STREAM) {
        draw(mix(key.wrapping_add(stream as u64)), &mut block);
        let first = base + stream * STREAM;
        let (from, to) = (begin.max(first), end.min(first + STREAM));
        out[from - out_start..to - out_start].copy_from_slice(&block[from - first..to - first]);
    }
}

/// Box-Muller over splitmix64.
fn normals(mut state: u64, std: f32, out: &mut [f32; STREAM]) {
    for pair in out.chunks_exact_mut(2) {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let bits = mix(state);
        // In (0, 1] and [0, 1).
        let a = ((bits >> 40) as f32 + 1.0) * (1.0 / 16_777_216.0);
        let b = ((bits >> 8) as u32 >> 8) as f32 * (1.0 / 16_777_216.0);
        let radius = (-2.0 * a.ln()).sqrt() * std;
        let (sin, cos) = (std::f32::consts::TAU * b).sin_cos();
        pair[0] = radius * cos;
        pair[1] = radius * sin;
    }
}

/// Splitmix64.
fn uniform(mut state: u64, bound: f32, out: &mut [f32; STREAM]) {
    for x in out {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let unit = (mix(state) >> 40) as f32 * (1.0 / 16_777_216.0);
        *x = (2.0 * unit - 1.0) * bound;
    }
}

/// The finaliser of splitmix64.
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn fnv(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;
    use fleet_common::model::{Role, Stored};

    fn parameter(name: &str, range: Range<usize>) -> Parameter {
        let shape = vec![1, range.len()];
        Parameter {
            name: name.into(),
            shape,
            range,
            unit: 0,
            role: Role::Weight,
            stored: Stored::AsIs,
            fresh: Fresh::Normal(0.02),
            rate: 1.0,
        }
    }

    #[test]
    fn any_cut_of_a_parameter_gives_the_same_numbers() {
        let p = parameter("w", 64..64 + 10_000);
        let mut whole = vec![0.0; 10_000];
        fill(&p, 0..usize::MAX, 1, &mut whole, 64);
        let mut parts = vec![0.0; 10_000];
        fill(&p, 0..5_001, 1, &mut parts, 64);
        fill(&p, 5_001..20_000, 1, &mut parts, 64);
        assert_eq!(whole, parts);
    }

    #[test]
    fn numbers_are_normal_and_hang_on_seed_and_name() {
        let draw = |seed, name: &str| {
            let mut out = vec![0.0; 100_000];
            fill(&parameter(name, 0..100_000), 0..100_000, seed, &mut out, 0);
            out
        };
        let x = draw(1, "a");
        let mean = x.iter().map(|v| f64::from(*v)).sum::<f64>() / 1e5;
        let var = x.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / 1e5;
        assert!(mean.abs() < 3e-4, "{mean}");
        assert!((var.sqrt() - 0.02).abs() < 2e-4, "{}", var.sqrt());
        let beyond = x.iter().filter(|v| v.abs() > 0.04).count() as f64 / 1e5;
        assert!((beyond - 0.0455).abs() < 0.004, "{beyond}");
        assert_ne!(x, draw(2, "a"));
        assert_ne!(x, draw(1, "b"));
        assert_ne!(x[..50], x[STREAM..STREAM + 50]);
    }

    #[test]
    fn uniform_numbers_fill_their_interval() {
        let p = Parameter { fresh: Fresh::Uniform(0.5), ..parameter("a", 0..100_000) };
        let mut x = vec![0.0; 100_000];
        fill(&p, 0..100_000, 1, &mut x, 0);
        let var = x.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / 1e5;
        assert!(x.iter().all(|v| v.abs() <= 0.5) && (var - 0.25 / 3.0).abs() < 2e-3, "{var}");
    }
}
