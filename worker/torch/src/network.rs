//! The forward pass of each unit, in libtorch's operations. `[b, s, h]` throughout.

use crate::adapter::View;
use crate::base::Matrix;
use crate::memory::{Stored, Weights};
use crate::shim::fused::Fused;
use crate::{Result, neftune};
use fleet_common::job::Precision;
use fleet_common::model::{Activation, Affine, Block, Decoder, Form, Linear, NormKind, Positions, Wiring};
use std::ops::Range;
use tch::{Device, Kind, Tensor};

/// In which types numbers are kept and computed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Numbers {
    /// Of weights, gradients and the optimizer's moments between two operations.
    pub kept: Kind,
    /// Of products and of attention.
    pub products: Kind,
    /// Of the residual stream and of norms.
    pub residual: Kind,
}

impl Numbers {
    pub const FP32: Numbers = Numbers { kept: Kind::Float, products: Kind::Float, residual: Kind::Float };
    /// What `torch.autocast` makes of a model in fp32.
    pub const BF16_MIXED: Numbers = Numbers { products: Kind::BFloat16, ..Numbers::FP32 };
    /// The same with fp16, for losses that are scaled.
    pub const FP16_MIXED: Numbers = Numbers { products: Kind::Half, ..Numbers::FP32 };
    /// A model in bf16.
    pub const BF16_TRUE: Numbers =
        Numbers { kept: Kind::BFloat16, products: Kind::BFloat16, residual: Kind::BFloat16 };

    /// The type of the weights that products read, where it is not the one in which they are kept.
    pub(crate) fn copied(self) -> Option<Kind> {
        (self.products != self.kept).then_some(self.products)
    }

    /// Bytes of a number that is kept, and of its copy for products.
    pub(crate) fn bytes(self) -> (usize, usize) {
        let size = Kind::elt_size_in_bytes;
        (size(self.kept), self.copied().map_or(0, size))
    }
}

impl From<Precision> for Numbers {
    fn from(precision: Precision) -> Numbers {
        match precision {
            Precision::Fp32 => Numbers::FP32,
            Precision::Bf16Mixed => Numbers::BF16_MIXED,
            Precision::Fp16Mixed => Numbers::FP16_MIXED,
            Precision::Bf16True => Numbers::BF16_TRUE,
        }
    }
}

/// A decoder on a device, without its weights.
pub struct Network {
    pub decoder: Decoder,
    pub wiring: Wiring,
    pub device: Device,
    pub numbers: Numbers,
    /// Tokens of a whole text, of which a batch may leave out the last: where rotary embeddings grow with it, they grow to this.
    pub text: usize,
    /// Kernels of our own, where there are any for the device.
    pub(crate) fused: Option<&'static Fused>,
}

/// The parameters of one unit as tensors: of those that are trained, gradients are asked for, in the order in which they were taken.
pub struct Leaves<'a> {
    network: &'a Network,
    view: View<'a>,
    wants_grad: bool,
    taken: Vec<Leaf>,
}

/// A parameter, or several that lie side by side, in a graph.
pub struct Leaf {
    pub tensor: Tensor,
    /// In the flat buffer of what is trained.
    pub range: Range<usize>,
}

/// What all blocks need of a sequence's length.
pub struct Frame {
    /// `[s, width / 2]` cosines and sines.
    turn: Option<(Tensor, Tensor)>,
    /// `[heads, s, s]`, added to scores, with the causal mask.
    bias: Option<Tensor>,
    /// `[s, s]`, added to scores, for each window that is shorter than the sequence.
    windows: Vec<(usize, Tensor)>,
    len: i64,
}

impl<'a> Leaves<'a> {
    pub fn new(network: &'a Network, view: View<'a>, wants_grad: bool) -> Self {
        Self { network, view, wants_grad, taken: Vec::new() }
    }

    pub fn into_taken(self) -> Vec<Leaf> {
        self.taken
    }

    pub(crate) fn network(&self) -> &'a Network {
        self.network
    }

    pub(crate) fn view(&self) -> View<'a> {
        self.view
    }

    /// Numbers that are trained.
    pub(crate) fn leaf(&mut self, numbers: Tensor, range: &Range<usize>, shape: &[i64]) -> Result<Tensor> {
        let tensor = numbers.f_view(shape)?;
        let tensor = if self.wants_grad { tensor.set_requires_grad(true) } else { tensor };
        self.taken.push(Leaf { tensor: tensor.shallow_clone(), range: range.clone() });
        Ok(tensor)
    }

    /// A range of the model, of which `stored` has the numbers.
    fn take(
        &mut self,
        range: &Range<usize>,
        shape: &[i64],
        stored: impl Fn(Weights<'a>) -> Stored<'a>,
    ) -> Result<Tensor> {
        let (weights, at) = self.view.find(range);
        let numbers = stored(weights).of(&at)?;
        match self.view.place(range) {
            Some(place) => self.leaf(numbers, &place, shape),
            None => Ok(numbers.f_view(shape)?),
        }
    }

    fn matrix(&mut self, linear: &Linear) -> Result<Matrix> {
        let shape = [linear.outputs as i64, linear.inputs as i64];
        match (self.view.place(&linear.weight), self.view.beside) {
            (None, Some(beside)) => beside.base.matrix(&linear.weight, &shape),
            _ => Ok(Matrix::Wide(self.take(&linear.weight, &shape, |weights| weights.products)?)),
        }
    }

    /// A bias of products.
    fn bias(&mut self, range: Option<&Range<usize>>) -> Result<Option<Tensor>> {
        range.map(|range| self.take(range, &[range.len() as i64], |weights| weights.products)).transpose()
    }

    /// Of a norm or a table of the residual stream.
    fn residual(&mut self, range: &Range<usize>, shape: &[i64]) -> Result<Tensor> {
        let network = self.network;
        self.take(range, shape, |weights| network.residual_of(weights))
    }

    pub(crate) fn linear(&mut self, x: &Tensor, linear: &Linear) -> Result<Tensor> {
        let weight = self.matrix(linear)?;
        let bias = self.bias(linear.bias.as_ref())?;
        let Some(added) = self.added(linear, &weight)? else { return weight.product(x, bias.as_ref()) };
        // Of a product that is multiplied with factors the bias is none.
        let (now, later) = if added.changes.is_some() { (None, bias) } else { (bias, None) };
        let own = weight.product(x, now.as_ref())?;
        let sum = own.f_add(&self.addition(&added, x, &weight, Some(&own))?)?;
        match later {
            Some(bias) => Ok(sum.f_add(&bias)?),
            None => Ok(sum),
        }
    }

    /// Of a product that is computed elsewhere.
    pub(crate) fn matrix_and_bias(&mut self, linear: &Linear) -> Result<(Matrix, Option<Tensor>)> {
        Ok((self.matrix(linear)?, self.bias(linear.bias.as_ref())?))
    }

    fn norm(&mut self, x: &Tensor, affine: &Affine) -> Result<Tensor> {
        let size = *x.size().last().unwrap_or(&0);
        let mut of = |range: &Option<Range<usize>>| {
            range.as_ref().map(|range| self.residual(range, &[size])).transpose()
        };
        let (scale, bias) = (of(&affine.scale)?, of(&affine.bias)?);
        let eps = self.network.decoder.norm.eps;
        let x = x.f_to_kind(self.network.numbers.residual)?;
        Ok(match self.network.decoder.norm.kind {
            NormKind::Rms => x.f_rms_norm([size], scale.as_ref(), eps)?,
            NormKind::Layer => x.f_layer_norm([size], scale.as_ref(), bias.as_ref(), eps, true)?,
        })
    }
}

impl Network {
    fn kind(&self) -> Kind {
        self.numbers.products
    }

    /// Where the numbers of the residual stream and of norms are.
    pub(crate) fn residual_of<'a>(&self, weights: Weights<'a>) -> Stored<'a> {
        if self.numbers.residual == Kind::Float { weights.exact } else { weights.products }
    }

    /// What the blocks need for sequences of `len` tokens.
    pub fn frame(&self, len: usize) -> Result<Frame> {
        let a = &self.decoder.attention;
        let turn = match &self.decoder.positions {
            Positions::Rotary(rotary) => {
                let frequencies = rotary.frequencies(len.max(self.text));
                let angles = Tensor::f_arange(len as i64, (Kind::Double, Device::Cpu))?
                    .f_outer(&Tensor::f_from_slice(&frequencies)?)?;
                let of = |x: Tensor| -> Result<Tensor> {
                    Ok(x.f_mul_scalar(rotary.amplitude())?
                        .f_to_kind(Kind::Float)?
                        .f_to_device(self.device)?)
                };
                Some((of(angles.f_cos()?)?, of(angles.f_sin()?)?))
            }
            _ => None,
        };
        let bias = match self.decoder.positions {
            Positions::Alibi => {
                let slopes = a.alibi_slopes();
                let slopes = Tensor::f_from_slice(&slopes)?.f_view([-1, 1, 1])?.f_to_device(self.device)?;
                let at = Tensor::f_arange(len as i64, (Kind::Float, self.device))?;
                // From the query, not from the start: what is near is small, and exact in bf16.
                let distances = at.f_view([1, 1, -1])?.f_sub(&at.f_view([1, -1, 1])?)?;
                let bias = slopes.f_mul(&distances)?;
                let hidden = self.hidden_places(len, None)?;
                Some(bias.f_masked_fill(&hidden, f64::NEG_INFINITY)?.f_to_kind(self.kind())?)
            }
            _ => None,
        };
        let mut windows: Vec<(usize, Tensor)> = Vec::new();
        for window in a.windows.iter().flatten().filter(|window| **window < len) {
            if windows.iter().all(|(known, _)| known != window) {
                let hidden = self.hidden_places(len, Some(*window))?;
                let zeros = Tensor::f_zeros([len as i64; 2], (self.kind(), self.device))?;
                windows.push((*window, zeros.f_masked_fill(&hidden, f64::NEG_INFINITY)?));
            }
        }
        Ok(Frame { turn, bias, windows, len: len as i64 })
    }

    /// `[s, s]`: which keys a query does not see.
    fn hidden_places(&self, len: usize, window: Option<usize>) -> Result<Tensor> {
        let ones = Tensor::f_ones([len as i64; 2], (Kind::Bool, self.device))?;
        let mut hidden = ones.f_triu(1)?;
        if let Some(window) = window {
            hidden = hidden.f_logical_or(&ones.f_tril(-(window as i64))?)?;
        }
        Ok(hidden)
    }

    /// `[b, s, h]` of `[b, s]` ids: what the first block reads.
    pub fn embed(&self, leaves: &mut Leaves, ids: &Tensor) -> Result<Tensor> {
        let (d, l) = (&self.decoder, &self.wiring);
        let table = leaves.residual(&l.embedding, &[d.vocab_size as i64, d.embedding_size as i64])?;
        let mut x = Tensor::f_embedding(&table, ids, -1, false, false)?;
        if let Some(rows) = leaves.added_rows(ids)? {
            x = x.f_add(&rows)?;
        }
        if let Some(moving) = leaves.view().moving {
            x = neftune::moved(&x, &moving)?;
        }
        if let Some(project) = &l.project_in {
            x = leaves.linear(&x.f_to_kind(self.kind())?, project)?.f_to_kind(self.numbers.residual)?;
        }
        if let (Some(range), Positions::Learned { offset }) = (&l.positions, &d.positions) {
            let rows = (range.len() / d.hidden_size) as i64;
            let table = leaves.residual(range, &[rows, d.hidden_size as i64])?;
            let len = ids.size()[1];
            x = x.f_add(&table.f_narrow(0, *offset as i64, len)?)?;
        }
        match &l.embedding_norm {
            Some(affine) => leaves.norm(&x, affine),
            None => Ok(x),
        }
    }

    /// The output of block `number` for its input `x`.
    pub fn block(&self, leaves: &mut Leaves, number: usize, x: &Tensor, frame: &Frame) -> Result<Tensor> {
        let block = &self.wiring.blocks[number];
        match self.decoder.form {
            Form::NormFirst => {
                let normed = leaves.norm(x, &block.norm1)?;
                let x = x.f_add(&self.attention(leaves, block, number, &normed, frame)?)?;
                let normed = leaves.norm(&x, norm2(block))?;
                Ok(x.f_add(&self.mlp(leaves, block, &normed)?)?)
            }
            Form::NormLast => {
                let x = x.f_add(&self.attention(leaves, block, number, x, frame)?)?;
                let x = leaves.norm(&x, &block.norm1)?;
                let x = x.f_add(&self.mlp(leaves, block, &x)?)?;
                leaves.norm(&x, norm2(block))
            }
            Form::Parallel => {
                let normed = leaves.norm(x, &block.norm1)?;
                let attended = self.attention(leaves, block, number, &normed, frame)?;
                Ok(x.f_add(&attended.f_add(&self.mlp(leaves, block, &normed)?)?)?)
            }
        }
    }

    fn attention(
        &self,
        leaves: &mut Leaves,
        block: &Block,
        number: usize,
        x: &Tensor,
        frame: &Frame,
    ) -> Result<Tensor> {
        let a = &self.decoder.attention;
        let [heads, kv, dim] = [a.heads, a.kv_heads, a.head_dim].map(|n| n as i64);
        let (batch, len) = (x.size()[0], frame.len);
        let qkv = leaves.linear(&x.f_to_kind(self.kind())?, &block.qkv)?;
        let qkv = qkv.f_view([batch, len, heads + 2 * kv, dim])?;
        let [mut qk, v] = split(&qkv, [heads + kv, kv])?;
        if let (Some(q_norm), Some(k_norm)) = (&block.q_norm, &block.k_norm) {
            let [q, k] = split(&qk, [heads, kv])?;
            let (q, k) = (leaves.norm(&q, q_norm)?, leaves.norm(&k, k_norm)?);
            qk = Tensor::f_cat(&[q, k], 2)?.f_to_kind(self.kind())?;
        }
        if let Some(turn) = &frame.turn {
            qk = match &self.fused {
                Some(fused) if qk.kind() == self.kind() => fused.rotary(&qk, turn)?,
                _ => turned(&qk, turn)?,
            };
        }
        let [q, k] = split(&qk, [heads, kv])?;
        let window = a.windows[number];
        let of_window = frame.windows.iter().find(|(of, _)| Some(*of) == window).map(|(_, mask)| mask);
        let mask = frame.bias.as_ref().or(of_window);
        // Of what does not hold all scores at once, only that for 16 bits and without a mask takes fewer heads of keys and values.
        let shared = heads != kv && mask.is_none() && self.kind() != Kind::Float;
        let own = |x: Tensor| -> Result<Tensor> {
            let x = match shared || heads == kv {
                true => x,
                false => {
                    let each = [batch, len, kv, heads / kv, dim];
                    x.f_unsqueeze(3)?.f_expand(each, false)?.f_reshape([batch, len, heads, dim])?
                }
            };
            Ok(x.f_transpose(1, 2)?)
        };
        let (q, k, v) = (q.f_transpose(1, 2)?, own(k)?, own(v)?);
        let (causal, none) = (mask.is_none(), 0.0);
        let attended = Tensor::f_scaled_dot_product_attention(&q, &k, &v, mask, none, causal, None, shared)?;
        let attended = attended.f_transpose(1, 2)?.f_reshape([batch, len, heads * dim])?;
        leaves.linear(&attended, &block.out)
    }

    fn mlp(&self, leaves: &mut Leaves, block: &Block, x: &Tensor) -> Result<Tensor> {
        let mlp = &self.decoder.mlp;
        // All of a group's rows in one product.
        let outputs = if mlp.gated { 2 * mlp.size } else { mlp.size };
        debug_assert_eq!(block.up.outputs, outputs);
        let x = leaves.linear(&x.f_to_kind(self.kind())?, &block.up)?;
        let x = match (mlp.gated, mlp.activation, &self.fused) {
            (true, Activation::Silu, Some(fused)) => fused.swiglu(&x)?,
            (true, ..) => {
                let size = mlp.size as i64;
                let gate = activated(&x.f_narrow(-1, 0, size)?, mlp.activation)?;
                gate.f_mul(&x.f_narrow(-1, size, size)?)?
            }
            (false, ..) => activated(&x, mlp.activation)?,
        };
        leaves.linear(&x, &block.down)
    }

    /// `[b, s, e]` in the type of products: what the head multiplies.
    pub fn last(&self, leaves: &mut Leaves, x: &Tensor) -> Result<Tensor> {
        let mut x = match &self.wiring.final_norm {
            Some(affine) => leaves.norm(x, affine)?,
            None => x.shallow_clone(),
        };
        x = x.f_to_kind(self.kind())?;
        if let Some(project) = &self.wiring.project_out {
            x = leaves.linear(&x, project)?;
        }
        Ok(x)
    }
}

/// Heads, in two parts: back from there they come together in one piece.
fn split(x: &Tensor, sizes: [i64; 2]) -> Result<[Tensor; 2]> {
    let parts = x.f_split_with_sizes(sizes, 2)?;
    parts.try_into().map_err(|_| crate::Error::of("heads were not split in two"))
}

fn norm2(block: &Block) -> &Affine {
    block.norm2.as_ref().expect("only parallel blocks have one norm")
}

pub(crate) fn activated(x: &Tensor, activation: Activation) -> Result<Tensor> {
    Ok(match activation {
        Activation::Silu => x.f_silu()?,
        Activation::Gelu => x.f_gelu("none")?,
        Activation::GeluTanh => x.f_gelu("tanh")?,
        Activation::Relu => x.f_relu()?,
    })
}

/// The first numbers of each head, turned by its position, and the rest. `x` is `[b, s, n, d]`.
pub(crate) fn turned(x: &Tensor, (cos, sin): &(Tensor, Tensor)) -> Result<Tensor> {
    let (half, dim) = (cos.size()[1], x.size()[3]);
    let kind = x.kind();
    let of = |table: &Tensor| -> Result<Tensor> { Ok(table.f_view([1, -1, 1, half])?.f_to_kind(kind)?) };
    let (cos, sin) = (of(cos)?, of(sin)?);
    let (a, b) = (x.f_narrow(3, 0, half)?, x.f_narrow(3, half, half)?);
    let first = a.f_mul(&cos)?.f_sub(&b.f_mul(&sin)?)?;
    let second = b.f_mul(&cos)?.f_add(&a.f_mul(&sin)?)?;
    Ok(match dim - 2 * half {
        0 => Tensor::f_cat(&[first, second], 3)?,
        rest => Tensor::f_cat(&[first, second, x.f_narrow(3, 2 * half, rest)?], 3)?,
    })
}
