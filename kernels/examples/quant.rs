//! Products with quantised weights beside plain ones in fp32, measured in turn in one run: how much longer each takes, and how many bytes a
//! parameter needs. `cargo run -p fleet-kernels --example quant [ROWS COLS]`; one thread, by its own time.

#![allow(unsafe_code)] // the thread's clock

use fleet_kernels::quant::*;
use fleet_kernels::{Matrix, Scratch, Store, gemm};
use std::hint::black_box;

/// Rows of activations: a token, a few, a sequence.
const ROWS_OF_X: [usize; 4] = [1, 8, 64, 512];
const ROUNDS: usize = 9;

/// Packed weights with what they borrow.
#[derive(Default)]
struct Packed {
    name: &'static str,
    codes: Vec<u8>,
    int8: Vec<i8>,
    scales: Vec<f32>,
    more: Vec<f32>,
    nested: Vec<u8>,
    offset: f32,
}

fn four_bit(name: &'static str, map: FourBitMap, w: &[f32], double: bool) -> Packed {
    let mut to = Packed {
        name,
        codes: vec![0; w.len().div_ceil(2)],
        scales: vec![0.0; w.len().div_ceil(BLOCK)],
        ..Packed::default()
    };
    quantise_four_bit(w, map, BLOCK, &mut to.codes, &mut to.scales);
    if double {
        to.nested = vec![0; to.scales.len()];
        to.more = vec![0.0; to.scales.len().div_ceil(NESTED_BLOCK)];
        to.offset = double_quantise(&to.scales, &mut to.nested, &mut to.more);
        to.scales.clear();
    }
    to
}

fn int8(w: &[f32], rows: usize, cols: usize) -> Packed {
    let (int8, scales) = (vec![0; w.len()], vec![0.0; rows]);
    let mut to = Packed { name: "int8", int8, scales, ..Packed::default() };
    quantise_int8(w, cols, &mut to.int8, &mut to.scales);
    to
}

const BLOCK: usize = 64;
const GROUPS: HqqGroups = HqqGroups { bits: HqqBits::Four, axis: HqqAxis::One, size: 64 };

/// HQQ takes long to quantise; how fast its codes multiply does not depend on what they are.
fn hqq(w: &[f32]) -> Packed {
    let groups = GROUPS.count(w.len());
    let codes = vec![0x5a; GROUPS.bytes(w.len())];
    Packed {
        name: "hqq 4 bit",
        codes,
        scales: vec![0.1; groups],
        more: vec![7.5; groups],
        ..Packed::default()
    }
}

impl Packed {
    fn bytes(&self) -> usize {
        self.codes.len() + self.int8.len() + self.nested.len() + 4 * (self.scales.len() + self.more.len())
    }

    fn codes(&self) -> Codes<'_> {
        let Packed { codes, scales, more, .. } = self;
        let map = if self.name.starts_with("fp4") { FourBitMap::Fp4 } else { FourBitMap::Nf4 };
        let double = Double { codes: &self.nested, largest: more, map: dynamic_map(), offset: self.offset };
        match self.name {
            "int8" => Codes::Int8(Int8 { codes: &self.int8, scales }),
            "hqq 4 bit" => Codes::Hqq(Hqq { groups: GROUPS, codes, scales, zeros: more }),
            _ => {
                let scales = if scales.is_empty() { Scales::Double(double) } else { Scales::Plain(scales) };
                Codes::FourBit(FourBit { map, block: BLOCK, codes, scales })
            }
        }
    }
}

/// Seconds that this thread has run: time in which other programs had the core does not count.
fn thread_seconds() -> f64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the kernel writes one timespec.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut now) };
    now.tv_sec as f64 + now.tv_nsec as f64 * 1e-9
}

fn seconds(run: impl FnOnce()) -> f64 {
    let began = thread_seconds();
    run();
    thread_seconds() - began
}

fn least(times: Vec<f64>) -> f64 {
    times.into_iter().fold(f64::INFINITY, f64::min)
}

fn main() {
    let sizes: Vec<usize> = std::env::args().skip(1).filter_map(|a| a.parse().ok()).collect();
    let (rows, cols) = (sizes.first().copied().unwrap_or(2048), sizes.get(1).copied().unwrap_or(2048));
    let w: Vec<f32> = (0..rows * cols).map(|i| (i * 7919 % 2003) as f32 / 1000.0 - 1.0).collect();
    let x: Vec<f32> = w.iter().copied().cycle().take(512 * rows.max(cols)).collect();
    let mut y = vec![0.0f32; 512 * rows.max(cols)];
    let mut scratch = Scratch::new();
    println!("{rows} x {cols}; time beside plain fp32 (best of {ROUNDS}), x W^T / dy W");
    print!("{:<12} {:>12}", "", "bytes/param");
    ROWS_OF_X.iter().for_each(|t| print!(" {:>15}", format!("t = {t}")));
    println!();
    for packed in [
        four_bit("nf4 double", FourBitMap::Nf4, &w, true),
        four_bit("nf4", FourBitMap::Nf4, &w, false),
        four_bit("fp4 double", FourBitMap::Fp4, &w, true),
        int8(&w, rows, cols),
        hqq(&w),
    ] {
        let quantised = Quantised::new(packed.codes(), rows, cols);
        print!("{:<12} {:>12.4}", packed.name, packed.bytes() as f64 / w.len() as f64);
        for t in ROWS_OF_X {
            let (mut forward, mut back) = ([Vec::new(), Vec::new()], [Vec::new(), Vec::new()]);
            for _ in 0..ROUNDS {
                let (into, from) =
                    (Matrix::new(&x[..t * cols], t, cols), Matrix::new(&x[..t * rows], t, rows));
                let plain = Matrix::new(&w, rows, cols);
                let mut product =
                    |run: &mut dyn FnMut(&mut [f32], &mut Scratch)| seconds(|| run(&mut y, &mut scratch));
                forward[0]
                    .push(product(&mut |y, s| gemm(into, plain.t(), Store::Set, &mut y[..t * rows], s)));
                forward[1]
                    .push(product(&mut |y, s| gemm(into, quantised.t(), Store::Set, &mut y[..t * rows], s)));
                back[0].push(product(&mut |y, s| gemm(from, plain, Store::Set, &mut y[..t * cols], s)));
                back[1].push(product(&mut |y, s| gemm(from, quantised, Store::Set, &mut y[..t * cols], s)));
                black_box(&y);
            }
            let ratio = |[plain, quantised]: [Vec<f64>; 2]| least(quantised) / least(plain);
            print!(" {:>15}", format!("{:.2} / {:.2}", ratio(forward), ratio(back)));
        }
        println!();
    }
}
