//! The memory of a forward and backward pass, taken once and reused: nothing is allocated in a step.

use crate::network::Network;
use crate::norm::NormScratch;
use crate::product::Storage;
use fleet_common::model::Form;
use fleet_learn::Result;
use fleet_learn::zeros::{Part, zeros};

/// Most numbers of logits that exist at once: the head works in slices of tokens.
const LOGITS_MAX: usize = 1 << 20;

/// Fewest tokens in such a slice, lest the products become thin.
const LOGIT_ROWS_MIN: usize = 192;

/// Everything that a pass needs besides weights and gradients.
#[derive(Default)]
pub struct Workspace<E> {
    pub(crate) saved: Vec<Saved<E>>,
    /// `[t, h]` output of the last block.
    pub(crate) last: Vec<f32>,
    pub(crate) embedded: Embedded,
    pub(crate) scratch: Scratch<E>,
}

/// What the embedding keeps from forward to backward.
#[derive(Default)]
pub(crate) struct Embedded {
    /// `[t, e]`, where a matrix follows.
    pub rows: Vec<f32>,
    /// `[t, h]`, where a norm follows.
    pub before_norm: Vec<f32>,
}

/// What one block keeps from forward to backward.
#[derive(Default)]
pub(crate) struct Saved<E> {
    /// `[t, h]` input.
    pub x: Vec<f32>,
    /// `[t, q + 2 kv]`, normed and turned.
    pub qkv: Vec<E>,
    /// `[t, q + kv]` before the heads' norms, where there are any.
    pub raw: Vec<f32>,
    /// `[t, q]` output of the attention.
    pub attention: Vec<E>,
    /// `[b, heads, s]`.
    pub lse: Vec<f32>,
    /// `[t, h]` after the attention's residual, where that is another than the network's.
    pub middle: Vec<f32>,
    /// `[t, f]`, or `[t, 2 f]` where it is gated; becomes its gradient.
    pub up: Vec<E>,
    /// `[t, h]` before the last norm, where the norms are last.
    pub last: Vec<f32>,
}

/// What is used again within every block.
#[derive(Default)]
pub(crate) struct Scratch<E> {
    /// `[t, h]` a normed input.
    pub normed: Vec<E>,
    /// `[t, f]` activation, or its gradient.
    pub inner: Vec<E>,
    /// `[t, max(h, q, e)]` a gradient on its way.
    pub rows: Vec<E>,
    /// A second one, where two are on their way at once; also `[t, e]` before the head.
    pub more_rows: Vec<E>,
    /// `[t, q + 2 kv]`.
    pub dqkv: Vec<E>,
    /// `[t, h]` gradient of the residual stream.
    pub g: Vec<f32>,
    /// `[t, max(h, e)]` of the residual stream as operand of products.
    pub g_narrow: Vec<E>,
    /// `[t, h]` of the residual stream between two norms.
    pub stream: Vec<f32>,
    /// `[logit_rows, v]`.
    pub logits: Vec<E>,
    pub logit_rows: usize,
    pub norms: NormScratch,
    /// Of the attention kernels, one per piece of work.
    pub kernels: Vec<fleet_kernels::Scratch>,
}

impl<E: Storage> Workspace<E> {
    pub fn new() -> Self {
        Self::default()
    }

    /// Makes room for `t` tokens with `layers` blocks kept. Never shrinks.
    pub(crate) fn resize(&mut self, network: &Network, t: usize, layers: usize) -> Result<()> {
        let d = &network.decoder;
        let (a, h, e, f) = (&d.attention, d.hidden_size, d.embedding_size, d.mlp.size);
        let (q, qkv) = (a.q_size(), a.qkv_size());
        let up = if d.mlp.gated { 2 * f } else { f };
        let projected = e != h;
        let where_so = |so: bool, len: usize| if so { len } else { 0 };
        while self.saved.len() < layers {
            self.saved.push(Saved::default());
        }
        for saved in &mut self.saved[..layers] {
            grow(&mut saved.x, t * h)?;
            grow(&mut saved.qkv, t * qkv)?;
            grow(&mut saved.raw, where_so(a.qk_norm, t * (q + a.kv_heads * a.head_dim)))?;
            grow(&mut saved.attention, t * q)?;
            grow(&mut saved.lse, t * a.heads)?;
            grow(&mut saved.middle, where_so(d.form != Form::Parallel, t * h))?;
            grow(&mut saved.up, t * up)?;
            grow(&mut saved.last, where_so(d.form == Form::NormLast, t * h))?;
        }
        grow(&mut self.last, t * h)?;
        grow(&mut self.embedded.rows, where_so(projected, t * e))?;
        grow(&mut self.embedded.before_norm, where_so(d.embedding_norm, t * h))?;
        let scratch = &mut self.scratch;
        scratch.logit_rows = (LOGITS_MAX / d.vocab_size).max(LOGIT_ROWS_MIN).min(t);
        grow(&mut scratch.normed, t * h)?;
        grow(&mut scratch.inner, t * f)?;
        grow(&mut scratch.rows, t * h.max(q).max(e))?;
        grow(&mut scratch.more_rows, where_so(projected || d.form == Form::Parallel, t * h.max(e)))?;
        grow(&mut scratch.dqkv, t * qkv)?;
        grow(&mut scratch.g, t * h)?;
        grow(&mut scratch.g_narrow, where_so(E::IS_BF16, t * h.max(e)))?;
        grow(&mut scratch.stream, where_so(d.form == Form::NormLast || d.embedding_norm, t * h))?;
        grow(&mut scratch.logits, scratch.logit_rows * d.vocab_size)?;
        scratch.norms.resize(t.max(a.heads), h.max(a.head_dim))
    }
}

pub(crate) fn grow<T: Copy + Default>(buffer: &mut Vec<T>, len: usize) -> Result<()> {
    if buffer.len() < len {
        *buffer = zeros(len, Part::Activations)?;
    }
    Ok(())
}
