//! Products and widening against the formats' plain meaning. That codes and scales are those of bitsandbytes and HQQ is shown in
//! `kernels/tests/quant.rs`.

use super::*;
use crate::simd::at_every_level;
use crate::testing::*;
use crate::{Matrix, Scratch, Store, bf16, gemm, reference, sheets};
use proptest::prelude::*;

/// Packed numbers that a [`Quantised`] borrows.
struct Packed {
    format: Format,
    rows: usize,
    cols: usize,
    codes: Vec<u8>,
    int8: Vec<i8>,
    scales: Vec<f32>,
    more: Vec<f32>,
    nested: Vec<u8>,
    offset: f32,
}

#[derive(Clone, Copy, Debug)]
enum Format {
    FourBit(FourBitMap, usize),
    Double(FourBitMap, usize),
    Int8,
    Hqq(HqqGroups),
}

impl Packed {
    fn new(format: Format, rows: usize, cols: usize, seed: u64) -> Packed {
        let x = numbers::<f32>(seed, rows * cols);
        let (codes, int8, scales, more, nested, offset) = Default::default();
        let mut to = Packed { format, rows, cols, codes, int8, scales, more, nested, offset };
        match format {
            Format::FourBit(map, block) | Format::Double(map, block) => {
                to.codes = vec![0; x.len().div_ceil(2)];
                to.scales = vec![0.0; x.len().div_ceil(block)];
                quantise_four_bit(&x, map, block, &mut to.codes, &mut to.scales);
                to.nested = vec![0; to.scales.len()];
                to.more = vec![0.0; to.scales.len().div_ceil(NESTED_BLOCK)];
                to.offset = double_quantise(&to.scales, &mut to.nested, &mut to.more);
            }
            Format::Int8 => {
                (to.int8, to.scales) = (vec![0; x.len()], vec![0.0; rows]);
                quantise_int8(&x, cols, &mut to.int8, &mut to.scales);
            }
            Format::Hqq(groups) => {
                to.codes = vec![0; groups.bytes(x.len())];
                to.scales = vec![0.0; groups.count(x.len())];
                to.more = to.scales.clone();
                quantise_hqq(&x, groups, &mut to.codes, &mut to.scales, &mut to.more);
            }
        }
        to
    }

    fn view(&self) -> Quantised<'_> {
        let Packed { codes, scales, more, .. } = self;
        let plain = Scales::Plain(scales);
        let double = Double { codes: &self.nested, largest: more, map: dynamic_map(), offset: self.offset };
        let codes = match self.format {
            Format::FourBit(map, block) => Codes::FourBit(FourBit { map, block, codes, scales: plain }),
            Format::Double(map, block) => {
                Codes::FourBit(FourBit { map, block, codes, scales: Scales::Double(double) })
            }
            Format::Int8 => Codes::Int8(Int8 { codes: &self.int8, scales }),
            Format::Hqq(groups) => Codes::Hqq(Hqq { groups, codes, scales, zeros: more }),
        };
        Quantised::new(codes, self.rows, self.cols)
    }

    fn plain(&self) -> Vec<f32> {
        let view = self.view();
        (0..self.rows * self.cols).map(|at| view.number(at / self.cols, at % self.cols)).collect()
    }
}

fn formats() -> impl Strategy<Value = Format> {
    use {Format::*, FourBitMap::*};
    prop_oneof![
        Just(FourBit(Nf4, 64)),
        Just(FourBit(Fp4, 32)),
        Just(Double(Nf4, 32)),
        Just(Double(Fp4, 128)),
        Just(Int8),
    ]
}

fn all_hqq() -> impl Iterator<Item = Format> {
    use HqqBits::*;
    let bits = [One, Two, Three, Four, Eight];
    let axes = [HqqAxis::Zero, HqqAxis::One];
    bits.into_iter().flat_map(move |bits| axes.map(|axis| Format::Hqq(HqqGroups { bits, axis, size: 16 })))
}

fn widened(packed: &Packed) {
    let plain = packed.plain();
    let mut all = vec![f32::NAN; plain.len()];
    dequantise(packed.view(), 0..packed.rows, &mut all);
    assert_eq!(all, plain, "{:?}", packed.format);
    let rows = packed.rows / 3..packed.rows - packed.rows / 4;
    let mut some = vec![bf16::NAN; rows.len() * packed.cols];
    dequantise(packed.view(), rows.clone(), &mut some);
    let rounded: Vec<bf16> =
        plain[rows.start * packed.cols..rows.end * packed.cols].iter().map(|v| bf16::from_f32(*v)).collect();
    assert_eq!(some, rounded);
}

fn multiplied<A: Element, C: Element>(packed: &Packed, t: usize, mode: Store, tolerance: f32) {
    let (o, i, plain) = (packed.rows, packed.cols, packed.plain());
    let w = Matrix::new(&plain, o, i);
    let check = |(k, n): (usize, usize), b: Matrix<f32>, packed: Quantised| {
        let a = numbers::<A>(5, t * k);
        let (mut c, mut exact) = (numbers::<C>(6, t * n), numbers::<C>(6, t * n));
        let a = Matrix::new(&a, t, k);
        gemm(a, packed, mode, &mut c, &mut Scratch::new());
        reference::gemm(a, b, mode, &mut exact, &mut Scratch::new());
        assert_close(&c, &exact, tolerance, 4e-7 * (k as f32 + 4.0));
    };
    check((i, o), w.t(), packed.view().t());
    check((o, i), w, packed.view());
}

fn everything(packed: &Packed, t: usize, mode: Store) {
    at_every_level(|| {
        widened(packed);
        multiplied::<f32, f32>(packed, t, mode, 1e-6);
        multiplied::<bf16, bf16>(packed, t, mode, BF16_STEP);
        multiplied::<bf16, f32>(packed, t, mode, 1e-6);
    });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    #[test]
    fn products_are_those_of_the_widened_matrix(
        format in formats(), o in 1usize..70, i in 1usize..150, t in 0usize..20, add: bool, seed: u64
    ) {
        everything(&Packed::new(format, o, i, seed), t, if add { Store::Add } else { Store::Set });
    }
}

#[test]
fn products_with_hqq_of_every_width_and_axis() {
    for format in all_hqq() {
        everything(&Packed::new(format, 48, 40, 1), 1, Store::Set);
        everything(&Packed::new(format, 24, 80, 2), 7, Store::Add);
    }
}

#[test]
fn several_sheets_and_blocks() {
    let packed = Packed::new(Format::Double(FourBitMap::Nf4, 64), 2100, 800, 1);
    multiplied::<f32, f32>(&packed, 5, Store::Add, 1e-6);
}

#[test]
fn threads_compute_the_same() {
    at_every_level(|| {
        let packed = Packed::new(Format::FourBit(FourBitMap::Nf4, 64), 130, 203, 1);
        for w in [packed.view(), packed.view().t()] {
            let (k, n) = if w.transposed { (203, 130) } else { (130, 203) };
            let a = numbers::<f32>(2, 9 * k);
            let (mut c, mut whole) = (vec![0.0f32; 9 * n], vec![0.0f32; 9 * n]);
            gemm(Matrix::new(&a, 9, k), w, Store::Set, &mut whole, &mut Scratch::new());
            for sheet in sheets(k, n) {
                let mut copy = vec![f32::NAN; sheet.packed_len()];
                let share = sheet.share(3);
                copy.chunks_mut(share).enumerate().for_each(|(i, to)| sheet.pack(w, i * share, to));
                for (c, a) in c.chunks_mut(4 * n).zip(a.chunks(4 * k)) {
                    let a = Matrix::new(a, a.len() / k, k);
                    sheet.multiply(a, &copy, Store::Set, c, &mut Scratch::new());
                }
            }
            assert_eq!(c, whole);
        }
    });
}

#[test]
fn a_single_row_may_be_cut_by_columns() {
    let packed = Packed::new(Format::Double(FourBitMap::Nf4, 32), 50, 77, 1);
    let x = numbers::<f32>(2, 77);
    let x = Matrix::new(&x, 1, 77);
    let (mut whole, mut parts) = (vec![0.0f32; 50], vec![0.0f32; 50]);
    gemm(x, packed.view().t(), Store::Set, &mut whole, &mut Scratch::new());
    for (part, to) in parts.chunks_mut(13).enumerate() {
        let rows = part * 13..part * 13 + to.len();
        gemm(x, packed.view().slice(rows).t(), Store::Set, to, &mut Scratch::new());
    }
    assert_eq!(parts, whole);
}

#[test]
#[should_panic(expected = "codes of 12 numbers")]
fn too_few_codes_are_refused() {
    let codes = FourBit { map: FourBitMap::Nf4, block: 64, codes: &[0; 5], scales: Scales::Plain(&[1.0]) };
    Quantised::new(Codes::FourBit(codes), 3, 4);
}
