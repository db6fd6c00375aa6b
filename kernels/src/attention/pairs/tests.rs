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

/// Rounding a probability or the gradient of a score to bf16 changes it by at most this share.
const HALF_STEP: f32 = 1.0 / 256.0;

/// Both passes over random heads. `slopes` are a head's own powers of 1/2.
struct Passes {
    shape: Heads,
    window: Option<usize>,
    slopes: Vec<f32>,
    qkv: Vec<bf16>,
    dout: Vec<bf16>,
}

/// What both passes write.
struct Results {
    out: Vec<bf16>,
    lse: Vec<f32>,
    dqkv: Vec<bf16>,
}

impl Passes {
    fn new(shape: Heads, window: Option<usize>, slanted: bool, seed: u64) -> Passes {
        let slopes = (1..=shape.q_heads).map(|head| 0.5f32.powi(head as i32)).filter(|_| slanted).collect();
        let qkv = numbers::<f32>(seed, shape.qkv_len()).iter().map(|v| bf16::from_f32(v * 2.0)).collect();
        Passes { shape, window, slopes, qkv, dout: numbers(seed ^ 1, shape.out_len()) }
    }
    fn sight(&self) -> Sight<'_> {
        Sight { window: self.window, slopes: &self.slopes }
    }
    fn room(&self) -> Results {
        let shape = &self.shape;
        let zeros = |len| vec![bf16::ZERO; len];
        Results { out: zeros(shape.out_len()), lse: vec![0.0; shape.lse_len()], dqkv: zeros(shape.qkv_len()) }
    }
    fn results<P: Pairs>(&self, pairs: &P) -> Results {
        let (shape, sight, mut r) = (&self.shape, &self.sight(), self.room());
        // Whatever stood in scratch before must not matter.
        let mut memory = vec![f32::NAN; Forward::memory(shape).max(Backward::memory(shape))];
        let (out, lse) = (&mut r.out, &mut r.lse);
        Forward { qkv: &self.qkv, shape, sight, out, lse, memory: &mut memory }.run(pairs);
        memory.fill(f32::NAN);
        let (out, lse, dqkv) = (&r.out, &r.lse, &mut r.dqkv);
        let dout = &self.dout;
        Backward { qkv: &self.qkv, out, lse, dout, shape, sight, dqkv, memory: &mut memory }.run(pairs);
        r
    }
    fn exact(&self) -> Results {
        let (shape, sight, mut r, mut no) = (&self.shape, &self.sight(), self.room(), Scratch::new());
        reference::attention(&self.qkv, shape, sight, &mut r.out, &mut r.lse, &mut no);
        reference::attention_backward(
            &self.qkv,
            &r.out,
            &r.lse,
            &self.dout,
            shape,
            sight,
            &mut r.dqkv,
            &mut no,
        );
        r
    }
}

fn wide(numbers: &[bf16]) -> Vec<f32> {
    numbers.iter().map(|number| number.to_f32()).collect()
}
