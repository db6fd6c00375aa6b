//! A model that is not trained: whole on the device of each rank, in the types in which it is read.

use crate::memory::{Stored, Weights, set};
use crate::network::Numbers;
use crate::packed::Packed;
use crate::shim::widened;
use crate::{Error, Result};
use fleet_checkpoint::ModelDir;
use fleet_collectives::SharedHost;
use fleet_common::model::{Layout, Linear, Parameter, Role, Wiring};
use fleet_learn::Places;
use fleet_learn::adapter::{self, FewBits, Trained, TrainedAdapter, read_numbers};
use fleet_learn::zeros::{Part, zeros};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use tch::{Device, Kind, Tensor};

/// Numbers that are read at a time.
const CHUNK: usize = 1 << 22;

/// With the layout of what is trained beside it.
pub struct Base {
    pub trained: Trained,
    /// As products read it, or all of it where that is one.
    products: Buffer,
    /// What else is read in fp32, while products are in 16 bits.
    exact: Option<Buffer>,
    /// Matrices of blocks, where they have few bits.
    packed: Option<Arc<Packed>>,
    /// Of products whose rows get magnitudes, by their number, the squared length of each row, `[outputs]` in fp32.
    squares: BTreeMap<usize, Tensor>,
}

struct Buffer {
    places: Places,
    numbers: Tensor,
}

/// A product's matrix, `[outputs, inputs]`.
pub enum Matrix {
    Wide(Tensor),
    /// In few bits; without a gradient. Where it is in the model's flat buffer.
    Packed(Arc<Packed>, Range<usize>),
}

impl Matrix {
    /// `x` times its transpose.
    pub fn product(&self, x: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        match (self, bias) {
            (Matrix::Wide(matrix), bias) => Ok(x.f_linear(matrix, bias)?),
            (Matrix::Packed(packed, range), None) => widened::product(x, packed, range),
            (Matrix::Packed(packed, range), Some(bias)) => {
                Ok(widened::product(x, packed, range)?.f_add(bias)?)
            }
        }
    }

    /// For who asks for no gradient.
    pub fn widened(&self) -> Result<Tensor> {
        match self {
            Matrix::Wide(matrix) => Ok(matrix.shallow_clone()),
            Matrix::Packed(packed, range) => packed.widen(range),
        }
    }
}

impl Base {
    /// All of the model beside which `adapter` is trained, also what is trained itself: that is compared with. Its matrices may be quantised, by all ranks
    /// of the host together. A collective call.
    pub fn read(
        adapter: &TrainedAdapter,
        numbers: Numbers,
        device: Device,
        gang: &mut dyn SharedHost,
        threads: usize,
    ) -> fleet_learn::Result<Base> {
        let dir = ModelDir::open(&adapter.base)?;
        let (trained, few) = (&adapter.trained, &adapter.few_bits);
        let [products, exact] = places(&dir.layout, numbers, few);
        let packed = (!few.is_empty()).then(|| {
            let read = &mut |p: &Parameter, out: &mut [f32]| read_numbers(&dir, p.range.start, out, threads);
            let host = adapter::Packed::read(&dir, few.clone(), gang, read);
            gang.barrier()?;
            Ok::<_, fleet_learn::Error>(Arc::new(Packed::new(host?, numbers.products, device, threads)?))
        });
        let packed = packed.transpose()?;
        let buffer = |places: Places, kind| -> fleet_learn::Result<Buffer> {
            let numbers = Tensor::f_zeros([places.end() as i64], (kind, device)).map_err(Error::from)?;
            let mut wide = Vec::new();
            for (range, place) in places.iter() {
                for first in range.clone().step_by(CHUNK) {
                    let len = CHUNK.min(range.end - first);
                    if wide.len() < len {
                        wide = zeros(len, Part::Weights)?;
                    }
                    read_numbers(&dir, first, &mut wide[..len], threads)?;
                    set(&numbers, place + first - range.start, &wide[..len])?;
                }
            }
            Ok(Buffer { places, numbers })
        };
        let exact = numbers.copied().map(|_| buffer(exact, numbers.kept)).transpose()?;
        let products = buffer(products, numbers.products)?;
        let trained = trained.clone();
        let mut base = Base { trained, products, exact, packed, squares: BTreeMap::new() };
        base.measure(&dir.wiring())?;
        Ok(base)
    }

    /// The matrix of a product.
    pub fn matrix(&self, weight: &Range<usize>, shape: &[i64]) -> Result<Matrix> {
        match self.packed.as_ref().filter(|packed| packed.has(weight)) {
            Some(packed) => Ok(Matrix::Packed(packed.clone(), weight.clone())),
            None => Ok(Matrix::Wide(self.products.view().of(weight)?.f_view(shape)?)),
        }
    }

    fn measure(&mut self, wiring: &Wiring) -> Result<()> {
        for linear in products(wiring) {
            if let Some(added) = self.trained.added(&linear.weight).filter(|added| added.is_dora()) {
                let lengths = self.lengths(&linear.weight, linear.inputs)?;
                self.squares.insert(added.number, lengths.f_square()?);
            }
        }
        Ok(())
    }

    /// The length of each row, in fp32, of a matrix with rows of `width` numbers.
    pub fn lengths(&self, weight: &Range<usize>, width: usize) -> Result<Tensor> {
        let _guard = tch::no_grad_guard();
        let matrix = self.matrix(weight, &[-1, width as i64])?.widened()?;
        Ok(matrix.f_norm_scalaropt_dim_dtype(2.0, [1].as_slice(), false, Kind::Float)?)
    }

    /// The squared lengths of rows of a product that an adapter gives magnitudes.
    pub fn squares(&self, number: usize) -> &Tensor {
        &self.squares[&number]
    }

    pub fn view(&self) -> Weights<'_> {
        let exact = self.exact.as_ref().unwrap_or(&self.products);
        Weights { products: self.products.view(), exact: exact.view() }
    }

    /// Bytes for each of `sharing` ranks that read the same codes and scales: those of a host, on the CPU; each device has its own.
    pub fn bytes(layout: &Layout, adapter: &TrainedAdapter, numbers: Numbers, sharing: usize) -> usize {
        let few = &adapter.few_bits;
        let [products, exact] = places(layout, numbers, few);
        let size = Kind::elt_size_in_bytes;
        let exact = numbers.copied().map_or(0, |_| exact.end() * size(numbers.kept));
        exact + products.end() * size(numbers.products) + few.bytes().div_ceil(sharing)
    }
}

impl Buffer {
    fn view(&self) -> Stored<'_> {
        Stored { flat: &self.numbers, places: Some(&self.places) }
    }
}

/// What products read, and what is read as it is kept. Where both are of one type, the first has all. What has few bits is in neither.
fn places(layout: &Layout, numbers: Numbers, few: &FewBits) -> [Places; 2] {
    let of =
        |wanted: &dyn Fn(&Parameter) -> bool| Places::in_a_row(layout.ranges(|p| wanted(p) && !few.has(p)));
    match numbers.copied() {
        None => [of(&|_| true), Places::default()],
        Some(_) => [
            of(&|p| matches!(p.role, Role::Weight | Role::TiedTable | Role::Bias)),
            of(&|p| !matches!(p.role, Role::Weight | Role::Bias)),
        ],
    }
}

/// All products of a decoder.
fn products(wiring: &Wiring) -> impl Iterator<Item = &Linear> {
    let of_blocks = wiring.blocks.iter().flat_map(|block| [&block.qkv, &block.out, &block.up, &block.down]);
    of_blocks.chain([&wiring.head])
}
