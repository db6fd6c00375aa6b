//! Products against their emulation, and both passes against the reference.

use super::emulated::Emulated;
use super::*;
use crate::testing::*;
use crate::{Element, Scratch, Sight, bf16, reference};
use proptest::prelude::*;

/// A test of pairs, generic over whose they are.
trait Test {
    fn check<P: Pairs>(&self, pairs: &P);
}

/// A kernel that is a test.
struct Tested<'a, T>(&'a T);

impl<T: Test> Kernel for Tested<'_, T> {
    #[inline(always)]
    fn run<P: Pairs>(self, pairs: &P) {
        self.0.check(pairs);
    }
}

/// Runs a test on all pairs that this machine has, and says which it has not.
fn with_all_pairs(test: &impl Test) {
    test.check(&Emulated);
    for level in [Level::Avx512Bf16, Level::Amx] {
        match level <= Level::best() {
            true => level.limit(|| run(Tested(test))),
            false => println!("skipped {level:?}: this CPU has only {:?}", Level::best()),
        }
    }
}

fn words(numbers: &[f32]) -> Vec<u32> {
    let bits = |number: f32| u32::from(<bf16 as Element>::from_f32(number).to_bits());
    numbers.chunks_exact(2).map(|pair| bits(pair[0]) | bits(pair[1]) << 16).collect()
}

/// A block with rows farther apart than they are long, and what must be left alone between them.
struct Product {
    steps: usize,
    gap: usize,
    mode: Store,
    a: Vec<f32>,
    b: Vec<f32>,
    c: Vec<f32>,
    /// Of sums, relative to the sum of sizes.
    error: f32,
}

impl Product {
    fn new(
        seed: u64,
        steps: usize,
        gap: usize,
        mode: Store,
        number: impl Fn(f32) -> f32,
        error: f32,
    ) -> Product {
        let make = |seed, len| numbers::<f32>(seed, len).into_iter().map(&number).collect();
        let terms = steps * SIDE;
        let a = make(seed, SIDE * (terms + 2 * gap));
        let (b, c) = (make(seed ^ 1, terms * SIDE), make(seed ^ 2, SIDE * (SIDE + gap)));
        Product { steps, gap, mode, a, b, c, error }
    }
}

impl Test for Product {
    #[inline(always)] // compiled for the CPU of `P`
    fn check<P: Pairs>(&self, pairs: &P) {
        let (a, b) = (words(&self.a), words(&self.b));
        let count = self.steps * STEP;
        let left = Left { words: &a, row: count + self.gap };
        let (mut fast, mut exact) = (self.c.clone(), self.c.clone());
        let row = SIDE + self.gap;
        product(pairs, count, left, &b, self.mode, Block { numbers: &mut fast, row });
        product(&Emulated, count, left, &b, self.mode, Block { numbers: &mut exact, row });
        assert_close(&fast, &exact, 0.0, self.error * (2 * count + 1) as f32);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn products_equal_the_emulation(steps in 1usize..6, gap in 0usize..20, add: bool, seed: u64) {
        let mode = if add { Store::Add } else { Store::Set };
        // Sums of whole numbers below 2^24 are exact in every order.
        with_all_pairs(&Product::new(seed, steps, gap, mode, |x| (x * 100.0).round(), 0.0));
        // Each of so many additions of numbers below that count rounds by at most 2^-24 of their sum; some CPUs round
        // in between as well.
        let terms = (steps * SIDE + 1) as f32;
        with_all_pairs(&Product::new(seed, steps, gap, mode, |x| x, 2.0 * terms * f32::EPSILON));
    }
}

/// Both passes over one sequence of more than one chunk.
struct Passes {
    shape: Heads,
    window: Option<usize>,
    slopes: Vec<f32>,
    qkv: Vec<bf16>,
    dout: Vec<bf16>,
    exact: Results,
}

#[derive(Clone)]
struct Results {
    out: Vec<bf16>,
    lse: Vec<f32>,
    dqkv: Vec<bf16>,
}

impl Passes {
    fn new(shape: Heads, window: Option<usize>, slanted: bool, seed: u64) -> Passes {
        let slopes = vec![0.01; if slanted { shape.q_heads } else { 0 }];
        let qkv: Vec<bf16> =
            numbers::<f32>(seed, shape.qkv_len()).iter().map(|v| bf16::from_f32(v * 2.0)).collect();
        let dout: Vec<bf16> = numbers(seed ^ 1, shape.out_len());
        let (out, lse, dqkv) = (dout.clone(), vec![0.0; shape.lse_len()], qkv.clone());
        let mut passes = Passes { shape, window, slopes, qkv, dout, exact: Results { out, lse, dqkv } };
        let (mut exact, mut no) = (passes.exact.clone(), Scratch::new());
        let (qkv, dout, sight) = (&passes.qkv, &passes.dout, &passes.sight());
        let Results { out, lse, dqkv } = &mut exact;
        reference::attention(qkv, &shape, sight, out, lse, &mut no);
        reference::attention_backward(qkv, out, lse, dout, &shape, sight, dqkv, &mut no);
        passes.exact = exact;
        passes
    }

    fn sight(&self) -> Sight<'_> {
        Sight { window: self.window, slopes: &self.slopes }
    }
}

impl Test for Passes {
    #[inline(always)] // compiled for the CPU of `P`
    fn check<P: Pairs>(&self, pairs: &P) {
        let (Passes { shape, qkv, dout, exact, .. }, sight) = (self, &self.sight());
        let Results { mut out, mut lse, mut dqkv } = exact.clone();
        // What stood in scratch before must not matter.
        let mut memory = vec![f32::NAN; Forward::memory(shape)];
        let forward = Forward { qkv, shape, sight, out: &mut out, lse: &mut lse, memory: &mut memory };
        forward.run(pairs);
        let mut memory = vec![f32::NAN; Backward::memory(shape)];
        let dqkv_out = &mut dqkv;
        let backward =
            Backward { qkv, out: &out, lse: &lse, dout, shape, sight, dqkv: dqkv_out, memory: &mut memory };
        backward.run(pairs);
        assert_close(&lse, &exact.lse, 1e-5, 1e-5);
        // A result is rounded, and before it probabilities and gradients of scores, by 1/256 at most and half of that in
        // the mean.
        for (fast, exact) in [(&out, &exact.out), (&dqkv, &exact.dqkv)] {
            let off = fast.iter().zip(exact).map(|(fast, exact)| (fast.to_f32() - exact.to_f32()).powi(2));
            let size = exact.iter().map(|number| number.to_f32().powi(2));
            let relative = (off.sum::<f32>() / size.sum::<f32>()).sqrt();
            assert!(relative < 1.0 / 128.0, "off by {relative} of their size");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4))]
    #[test]
    fn long_sequences_equal_the_reference(
        seq in 500usize..1100, head_dim in prop::sample::select(vec![2usize, 16, 40]), group in 1usize..3,
        window in prop::option::of(1usize..700), slanted: bool, seed: u64,
    ) {
        let shape = Heads { batch: 1, seq, q_heads: group, kv_heads: 1, head_dim };
        with_all_pairs(&Passes::new(shape, window, slanted, seed));
    }
}
