//! Where each parameter lies in the flat buffer of all parameters, and which of them each part of a decoder reads.
//!
//! The buffer is cut into units, the grain of reduction, of sharding and of the optimizer: the embedding, each block, the head. Within a
//! block queries, keys and values lie side by side, gate and up too, so that each group is one product while every tensor of a file
//! stays a view.

use super::{Decoder, Family, Form, NormKind, Positions};
use std::ops::Range;

/// Units and groups begin at whole cache lines of every element type.
const ALIGN: usize = 64;

/// A tensor of a model's files, as a part of the flat buffer.
#[derive(Clone, Debug, PartialEq)]
pub struct Parameter {
    /// In the files.
    pub name: String,
    /// In the flat buffer: row-major; `[out, in]` for linear layers.
    pub shape: Vec<usize>,
    /// In elements of the flat buffer.
    pub range: Range<usize>,
    /// Number of its unit.
    pub unit: usize,
    pub role: Role,
    pub stored: Stored,
    pub fresh: Fresh,
    /// What the learning rate is multiplied with.
    pub rate: f64,
}

/// What a fresh parameter is filled with.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Fresh {
    Constant(f32),
    /// Drawn, with this standard deviation.
    Normal(f64),
    /// Drawn, from minus to plus this.
    Uniform(f64),
    /// The lengths of the rows of the matrix that it stands for, as products read it.
    RowLengths,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Rows of an embedding.
    Table,
    /// Of one that is the head as well.
    TiedTable,
    Weight,
    Bias,
    NormScale,
    NormBias,
    /// The one of an adapter's two matrices that is drawn: the first, `[rank, in]`, or, beside an embedding, the second, `[out, rank]`.
    LoraA,
    /// The other one, `[out, rank]`, or `[in, rank]` beside an embedding. While it is zero no gradient reaches that.
    LoraB,
    /// The lengths that rows of a changed matrix have, `[out]` (DoRA).
    Magnitude,
}

impl Role {
    /// Read in fp32, whatever products read.
    pub fn is_vector(self) -> bool {
        matches!(self, Role::Bias | Role::NormScale | Role::NormBias | Role::Magnitude)
    }

    /// Whether weight decay is for it: not for biases and norms, as in transformers' `Trainer`.
    pub fn decays(self) -> bool {
        !matches!(self, Role::Bias | Role::NormScale | Role::NormBias)
    }
}

/// How a file has a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stored {
    AsIs,
    /// `[in, out]`.
    Transposed,
    /// Rows ordered by head, then by query, key and value; in the flat buffer first all queries.
    ByHead {
        heads: usize,
    },
}

/// A matrix `[outputs, inputs]` and its bias, in the flat buffer.
#[derive(Clone, Debug, PartialEq)]
pub struct Linear {
    pub weight: Range<usize>,
    pub bias: Option<Range<usize>>,
    pub inputs: usize,
    pub outputs: usize,
}

/// A norm's parameters.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct Affine {
    pub scale: Option<Range<usize>>,
    pub bias: Option<Range<usize>>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Block {
    pub unit: Range<usize>,
    pub norm1: Affine,
    /// Queries of all heads, then keys, then values.
    pub qkv: Linear,
    pub q_norm: Option<Affine>,
    pub k_norm: Option<Affine>,
    pub out: Linear,
    /// `None` where there is one norm.
    pub norm2: Option<Affine>,
    /// Gate, then up, where the network is gated.
    pub up: Linear,
    pub down: Linear,
}

/// Parameters in a flat buffer that is cut into units.
#[derive(Clone, Debug, PartialEq)]
pub struct Layout {
    pub parameters: Vec<Parameter>,
    /// In the order of the forward pass.
    pub units: Vec<Range<usize>>,
    /// Elements of the flat buffer, with padding.
    pub len: usize,
}

impl Layout {
    /// Numbers of all parameters, without padding.
    pub fn count(&self) -> u64 {
        self.parameters.iter().map(|p| p.range.len() as u64).sum()
    }

    /// Where the parameters that are wanted lie, in ascending order. Several that touch may be read as one.
    pub fn ranges(&self, is_wanted: impl Fn(&Parameter) -> bool) -> Vec<Range<usize>> {
        let wanted = self.parameters.iter().filter(|p| is_wanted(p));
        let mut ranges: Vec<Range<usize>> = wanted.map(|p| p.range.clone()).collect();
        ranges.sort_by_key(|range| range.start);
        ranges.into_iter().fold(Vec::new(), |mut joined: Vec<Range<usize>>, range| {
            match joined.last_mut() {
                Some(last) if last.end == range.start => last.end = range.end,
                _ => joined.push(range),
            }
            joined
        })
    }

    /// Whether the last unit reads the first one's table.
    pub fn is_tied(&self) -> bool {
        self.parameters.iter().any(|p| p.role == Role::TiedTable)
    }
}

/// A decoder's layout, and which ranges each of its parts reads.
#[derive(Clone, Debug, PartialEq)]
pub struct Wiring {
    pub layout: Layout,
    pub embedding: Range<usize>,
    pub positions: Option<Range<usize>>,
    pub project_in: Option<Linear>,
    pub embedding_norm: Option<Affine>,
    pub blocks: Vec<Block>,
    pub final_norm: Option<Affine>,
    pub project_out: Option<Linear>,
    /// The embedding where they are tied.
    pub head: Linear,
}

impl Wiring {
    pub fn new(d: &Decoder, family: &Family) -> Wiring {
        let names = &family.names;
        let (a, h) = (&d.attention, d.hidden_size);
        let layer_norm = d.norm.kind == NormKind::Layer;
        let norm = |b: &mut Builder, name: &str, size: usize| match d.norm.affine {
            true => b.affine(name, size, layer_norm),
            false => Affine::default(),
        };
        let mut b = Builder { std: d.init.std, ..Builder::default() };

        let embedding = b.add(
            &weight(names.embedding),
            &[d.vocab_size, d.embedding_size],
            if d.tied { Role::TiedTable } else { Role::Table },
        );
        let positions = match d.positions {
            Positions::Learned { offset } => {
                Some(b.add(&weight(names.positions), &[d.max_positions + offset, h], Role::Table))
            }
            _ => None,
        };
        let projected = d.embedding_size != h;
        let project_in =
            projected.then(|| b.linear(&[(names.project_in, h)], d.embedding_size, false, Stored::AsIs));
        let embedding_norm = d.embedding_norm.then(|| norm(&mut b, names.embedding_norm, h));
        b.end_unit();

        // Drawn smaller: two such per layer.
        let residual_std = match d.init.scale_residual {
            true => d.init.std / ((2 * d.layers) as f64).sqrt(),
            false => d.init.std,
        };
        let blocks = (0..d.layers)
            .map(|layer| {
                let of = |part: &str| format!("{}{part}", names.layer.replace("{}", &layer.to_string()));
                let norm1 = norm(&mut b, &of(names.norm1), h);
                let sizes = [a.q_size(), a.kv_heads * a.head_dim, a.kv_heads * a.head_dim];
                let qkv_names: Vec<String> = names.qkv.iter().map(|name| of(name)).collect();
                let rows: Vec<(&str, usize)> = match &qkv_names[..] {
                    [fused] => vec![(fused, a.qkv_size())],
                    split => split.iter().map(String::as_str).zip(sizes).collect(),
                };
                let qkv = b.linear(&rows, h, a.qkv_bias, family.stored_qkv(a.heads));
                let qk_norm = |b: &mut Builder, name: &str| a.qk_norm.then(|| norm(b, &of(name), a.head_dim));
                let (q_norm, k_norm) = (qk_norm(&mut b, names.q_norm), qk_norm(&mut b, names.k_norm));
                b.std = residual_std;
                let out = b.linear(&[(&of(names.out), h)], a.q_size(), a.out_bias, family.stored);
                b.std = d.init.std;
                let norm2 = (d.form != Form::Parallel).then(|| norm(&mut b, &of(names.norm2), h));
                let up_names: Vec<String> = names.up.iter().map(|name| of(name)).collect();
                let up: Vec<(&str, usize)> =
                    up_names.iter().map(|name| (name.as_str(), d.mlp.size)).collect();
                let up = b.linear(&up, h, d.mlp.bias, family.stored);
                b.std = residual_std;
                let down = b.linear(&[(&of(names.down), h)], d.mlp.size, d.mlp.bias, family.stored);
                b.std = d.init.std;
                Block { unit: b.end_unit(), norm1, qkv, q_norm, k_norm, out, norm2, up, down }
            })
            .collect();

        let final_norm = d.final_norm.then(|| norm(&mut b, names.final_norm, h));
        let project_out =
            projected.then(|| b.linear(&[(names.project_out, d.embedding_size)], h, false, Stored::AsIs));
        b.align();
        let head = Linear {
            weight: match d.tied {
                true => embedding.clone(),
                false => b.add(&weight(names.head), &[d.vocab_size, d.embedding_size], Role::Weight),
            },
            bias: d.head_bias.then(|| b.add(&bias(names.head), &[d.vocab_size], Role::Bias)),
            inputs: d.embedding_size,
            outputs: d.vocab_size,
        };
        b.end_unit();
        Wiring {
            layout: Layout { parameters: b.parameters, units: b.units, len: b.next },
            embedding,
            positions,
            project_in,
            embedding_norm,
            blocks,
            final_norm,
            project_out,
            head,
        }
    }
}

fn weight(name: &str) -> String {
    format!("{name}.weight")
}

fn bias(name: &str) -> String {
    format!("{name}.bias")
}

#[derive(Default)]
struct Builder {
    parameters: Vec<Parameter>,
    units: Vec<Range<usize>>,
    unit_start: usize,
    next: usize,
    std: f64,
}

impl Builder {
    fn add(&mut self, name: &str, shape: &[usize], role: Role) -> Range<usize> {
        self.add_stored(name, shape, role, Stored::AsIs)
    }

    fn add_stored(&mut self, name: &str, shape: &[usize], role: Role, stored: Stored) -> Range<usize> {
        let range = self.next..self.next + shape.iter().product::<usize>();
        self.next = range.end;
        self.parameters.push(Parameter {
            name: name.to_owned(),
            shape: shape.to_vec(),
            range: range.clone(),
            unit: self.units.len(),
            role,
            stored,
            fresh: match role {
                Role::NormScale => Fresh::Constant(1.0),
                Role::Bias | Role::NormBias => Fresh::Constant(0.0),
                _ => Fresh::Normal(self.std),
            },
            rate: 1.0,
        });
        range
    }

    fn affine(&mut self, name: &str, size: usize, has_bias: bool) -> Affine {
        self.align();
        let scale = self.add(&weight(name), &[size], Role::NormScale);
        let bias = has_bias.then(|| self.add(&bias(name), &[size], Role::NormBias));
        Affine { scale: Some(scale), bias }
    }

    /// The named matrices lie one below the other, and so do their biases after them.
    fn linear(&mut self, parts: &[(&str, usize)], inputs: usize, has_bias: bool, stored: Stored) -> Linear {
        self.align();
        let (start, outputs) = (self.next, parts.iter().map(|(_, rows)| rows).sum());
        for (name, rows) in parts {
            self.add_stored(&weight(name), &[*rows, inputs], Role::Weight, stored);
        }
        let end = self.next;
        let bias_stored = if stored == Stored::Transposed { Stored::AsIs } else { stored };
        let bias = has_bias.then(|| {
            self.align();
            let start = self.next;
            for (name, rows) in parts {
                self.add_stored(&bias(name), &[*rows], Role::Bias, bias_stored);
            }
            start..self.next
        });
        Linear { weight: start..end, bias, inputs, outputs }
    }

    fn align(&mut self) {
        self.next = self.next.next_multiple_of(ALIGN);
    }

    fn end_unit(&mut self) -> Range<usize> {
        self.align();
        let unit = std::mem::replace(&mut self.unit_start, self.next)..self.next;
        self.units.push(unit.clone());
        unit
    }
}
