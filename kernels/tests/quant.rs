//! Codes and scales against what bitsandbytes and HQQ made of the same tensors (`tests/parity/quant.py`).

#![allow(clippy::unwrap_used)] // in a test an unwrap is an assertion

use fleet_kernels::bf16;
use fleet_kernels::quant::*;
use safetensors::{Dtype, SafeTensors};
use std::path::Path;

/// A golden file, read whole.
struct Golden(Vec<u8>);

impl Golden {
    fn open(name: &str) -> Golden {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/parity/golden/quant");
        Golden(std::fs::read(folder.join(name)).unwrap())
    }
    fn tensors(&self) -> SafeTensors<'_> {
        SafeTensors::deserialize(&self.0).unwrap()
    }
    fn bytes(&self, name: &str) -> Vec<u8> {
        self.tensors().tensor(name).unwrap().data().to_vec()
    }
    fn shape(&self, name: &str) -> (usize, usize) {
        let shape = self.tensors().tensor(name).unwrap().shape().to_vec();
        (shape[0], shape[1])
    }
    fn numbers(&self, name: &str) -> Vec<f32> {
        let (tensors, bytes) = (self.tensors(), self.bytes(name));
        match tensors.tensor(name).unwrap().dtype() {
            Dtype::F32 => bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
            Dtype::BF16 => bytes.as_chunks().0.iter().map(|b| bf16::from_le_bytes(*b).to_f32()).collect(),
            other => panic!("{name} is {other:?}"),
        }
    }
    /// Names of the tensors that were quantised.
    fn cases(&self) -> Vec<String> {
        let mut names: Vec<String> = self.tensors().names().into_iter().map(ToOwned::to_owned).collect();
        names.retain(|name| !name.contains('.') && name != "map");
        names.sort();
        names
    }
}

/// The same bits, but for the sign of zeros.
#[track_caller]
fn assert_same(ours: &[f32], theirs: &[f32], what: &str) {
    assert_eq!(ours.len(), theirs.len(), "{what}");
    for (i, (a, b)) in ours.iter().zip(theirs).enumerate() {
        assert!(a == b, "{what}, number {i}: {a:e} is not {b:e}");
    }
}

fn dequantised(codes: Codes, (rows, cols): (usize, usize)) -> Vec<f32> {
    let mut numbers = vec![f32::NAN; rows * cols];
    dequantise(Quantised::new(codes, rows, cols), 0..rows, &mut numbers);
    numbers
}

#[test]
fn four_bits_are_those_of_bitsandbytes() {
    let golden = Golden::open("four_bit.safetensors");
    let cases = golden.cases();
    assert_eq!(cases.len(), 11);
    for (case, (kind, map)) in cases
        .iter()
        .flat_map(|case| [("nf4", FourBitMap::Nf4), ("fp4", FourBitMap::Fp4)].map(|map| (case, map)))
    {
        let x = golden.numbers(case);
        for block in [32, 64, 4096] {
            let key = format!("{case}.{kind}.{block}");
            let (mut codes, mut scales) = (vec![0; x.len().div_ceil(2)], vec![0.0; x.len().div_ceil(block)]);
            quantise_four_bit(&x, map, block, &mut codes, &mut scales);
            assert_same(&scales, &golden.numbers(&format!("{key}.absmax")), &key);
            assert_eq!(codes, golden.bytes(&format!("{key}.codes")), "{key}");
            if (kind, block) == ("nf4", 64) {
                let (codes, scales) = (&codes[..], Scales::Plain(&scales));
                let ours =
                    dequantised(Codes::FourBit(FourBit { map, block, codes, scales }), golden.shape(case));
                assert_same(&ours, &golden.numbers(&format!("{key}.numbers")), &key);
            }
        }
    }
    assert_same(FourBitMap::Nf4.values(), &golden.numbers("map.nf4"), "the map of NF4");
    assert_same(FourBitMap::Fp4.values(), &golden.numbers("map.fp4"), "the map of FP4");
}

#[test]
fn bf16_is_quantised_as_its_f32() {
    let golden = Golden::open("four_bit.safetensors");
    let x: Vec<bf16> = golden.numbers("bf16").into_iter().map(bf16::from_f32).collect();
    let (mut codes, mut scales) = (vec![0; x.len() / 2], vec![0.0; x.len().div_ceil(64)]);
    quantise_four_bit(&x, FourBitMap::Nf4, 64, &mut codes, &mut scales);
    assert_eq!(codes, golden.bytes("bf16.nf4.64.codes"));
}

#[test]
fn scales_in_eight_bits_are_those_of_bitsandbytes() {
    let golden = Golden::open("double.safetensors");
    assert_same(dynamic_map(), &golden.numbers("map"), "the dynamic map");
    for n in [1, 2, 3, 5, 15, 16, 17, 40, 64, 250, 256, 257, 1023, 1024, 3000] {
        let of = |what: &str| golden.numbers(&format!("{n}.{what}"));
        let scales = of("scales");
        let (mut codes, mut largest) = (vec![0; n], vec![0.0; n.div_ceil(NESTED_BLOCK)]);
        let offset = double_quantise(&scales, &mut codes, &mut largest);
        assert_same(&[offset], &of("offset"), &format!("offset of {n}"));
        assert_same(&largest, &of("absmax"), &format!("scales of {n}"));
        assert_eq!(codes, golden.bytes(&format!("{n}.codes")), "codes of {n}");
        // A block whose only number is 1 has its scale for a number.
        let blocks: Vec<u8> = [[0xf7].as_slice(), &[0x77; 15]].concat().repeat(n);
        let double = Double { codes: &codes, largest: &largest, map: dynamic_map(), offset };
        let (map, scales) = (FourBitMap::Nf4, Scales::Double(double));
        let numbers =
            dequantised(Codes::FourBit(FourBit { map, block: 32, codes: &blocks, scales }), (n, 32));
        let first: Vec<f32> = numbers.into_iter().step_by(32).collect();
        assert_same(&first, &of("numbers"), &format!("scales of {n}, widened"));
    }
}

#[test]
fn int8_rows_are_those_of_bitsandbytes() {
    let golden = Golden::open("int8.safetensors");
    let cases = golden.cases();
    assert_eq!(cases.len(), 7);
    for case in cases {
        let (x, (rows, cols)) = (golden.numbers(&case), golden.shape(&case));
        let (mut codes, mut scales) = (vec![0; x.len()], vec![0.0; rows]);
        quantise_int8(&x, cols, &mut codes, &mut scales);
        assert_same(&scales, &golden.numbers(&format!("{case}.scales")), &case);
        let theirs: Vec<i8> =
            golden.bytes(&format!("{case}.codes")).into_iter().map(u8::cast_signed).collect();
        assert_eq!(codes, theirs, "{case}");
        let ours = dequantised(Codes::Int8(Int8 { codes: &codes, scales: &scales }), (rows, cols));
        assert_same(&ours, &golden.numbers(&format!("{case}.numbers")), &case);
    }
}

#[test]
fn hqq_is_that_of_the_original() {
    let golden = Golden::open("hqq.safetensors");
    for (bits, axis) in [1, 2, 3, 4, 8].into_iter().flat_map(|bits| [(bits, 0), (bits, 1)]) {
        let key = format!("{bits}.{axis}");
        let (x, of) = (golden.numbers(&key), |what: &str| golden.numbers(&format!("{key}.{what}")));
        let axis = [HqqAxis::Zero, HqqAxis::One][axis];
        let groups = HqqGroups { bits: HqqBits::of(bits).unwrap(), axis, size: 64 };
        let mut codes = vec![0; groups.bytes(x.len())];
        let (mut scales, mut zeros) = (vec![0.0; groups.count(x.len())], vec![0.0; groups.count(x.len())]);
        quantise_hqq(&x, groups, &mut codes, &mut scales, &mut zeros);
        assert_same(&scales, &of("scales"), &key);
        for (i, (ours, theirs)) in zeros.iter().zip(of("zeros")).enumerate() {
            assert!(
                (ours - theirs).abs() <= 1e-6 * theirs.abs().max(1.0),
                "{key}, zero {i}: {ours} {theirs}"
            );
        }
        assert_eq!(codes, golden.bytes(&format!("{key}.codes")), "{key}");
        let (zeros, scales) = (of("zeros"), of("scales"));
        let hqq = Hqq { groups, codes: &codes, scales: &scales, zeros: &zeros };
        assert_same(&dequantised(Codes::Hqq(hqq), golden.shape(&key)), &of("numbers"), &key);
    }
}
