//! The memory of a forward and backward pass, taken once and reused: nothing is allocated in a step.

use crate::adapter::LowRank;
use crate::norm::NormScratch;
use crate::product::Storage;
use fleet_common::model::{Decoder, Form};
use fleet_learn::Result;
use fleet_learn::zeros::{Part, zeros};

/// Most numbers of logits that exist at once: the head works in slices of tokens.
const LOGITS_MAX: usize = 1 << 20;

/// Fewest tokens in such a slice, lest the products become thin.
const LOGIT_ROWS_MIN: usize = 192;

/// Everything that a pass needs besides weights and gradients.
#[derive(Default)]
pub struct Workspace<E> {
    /// `[t, h]` each: what every block reads and what the last one gives; without a backward, two in turn.
    pub(crate) stream: Vec<Vec<f32>>,
    pub(crate) saved: Vec<Saved<E>>,
    pub(crate) embedded: Embedded,
    pub(crate) scratch: Scratch<E>,
    pub(crate) low: LowRank<E>,
}

/// What the embedding keeps from forward to backward.
#[derive(Default)]
pub(crate) struct Embedded {
    /// `[t, e]`, where a matrix follows.
    pub rows: Vec<f32>,
    /// `[t, h]`, where a norm follows.
    pub before_norm: Vec<f32>,
}

/// What one block keeps from forward to backward besides its input.
#[derive(Default)]
pub(crate) struct Saved<E> {
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

/// A buffer of a pass.
pub(crate) trait Buffer {
    /// Of `len` numbers.
    fn bytes(&self, len: usize) -> usize;
    /// Makes room for `len` numbers. Never shrinks.
    fn grow(&mut self, len: usize) -> Result<()>;
}

impl<T: Copy + Default> Buffer for Vec<T> {
    fn bytes(&self, len: usize) -> usize {
        len * size_of::<T>()
    }

    fn grow(&mut self, len: usize) -> Result<()> {
        if self.len() < len {
            *self = zeros(len, Part::Activations)?;
        }
        Ok(())
    }
}

/// How much is to be kept.
#[derive(Clone, Copy)]
pub(crate) struct Keep {
    pub tokens: usize,
    /// Inputs of so many blocks, the last one's output among them.
    pub streams: usize,
    /// What so many blocks keep.
    pub layers: usize,
}

impl Keep {
    /// For a backward through `blocks` blocks, of which the first `again` are computed a second time.
    pub fn for_backward(tokens: usize, blocks: usize, again: usize) -> Keep {
        let layers = if again == 0 { blocks } else { blocks - again.min(blocks) + 1 };
        Keep { tokens, streams: blocks + 1, layers }
    }

    pub fn for_forward(tokens: usize) -> Keep {
        Keep { tokens, streams: 2, layers: 1 }
    }
}

/// Bytes that a step keeps of `tokens` tokens: activations, and what each block uses again.
pub fn activation_bytes<E: Storage>(decoder: &Decoder, tokens: usize, again: usize) -> usize {
    let mut bytes = 0;
    let keep = Keep::for_backward(tokens, decoder.layers, again);
    let counted = Workspace::<E>::default().each(decoder, keep, &mut |buffer, len| {
        bytes += buffer.bytes(len);
        Ok(())
    });
    counted.expect("counting takes no memory");
    bytes
}

impl<E: Storage> Workspace<E> {
    pub fn new() -> Self {
        Self::default()
    }

    pub(crate) fn resize(&mut self, decoder: &Decoder, keep: Keep) -> Result<()> {
        self.each(decoder, keep, &mut |buffer, len| buffer.grow(len))
    }

    /// Every buffer, and how long it has to be.
    fn each(
        &mut self,
        d: &Decoder,
        keep: Keep,
        see: &mut dyn FnMut(&mut dyn Buffer, usize) -> Result<()>,
    ) -> Result<()> {
        let (a, h, e, f) = (&d.attention, d.hidden_size, d.embedding_size, d.mlp.size);
        let (t, q, qkv) = (keep.tokens, a.q_size(), a.qkv_size());
        let up = if d.mlp.gated { 2 * f } else { f };
        let projected = e != h;
        let where_so = |so: bool, len: usize| if so { len } else { 0 };
        self.stream.resize_with(self.stream.len().max(keep.streams), Vec::new);
        self.saved.resize_with(self.saved.len().max(keep.layers), Saved::default);
        for stream in &mut self.stream[..keep.streams] {
            see(stream, t * h)?;
        }
        for saved in &mut self.saved[..keep.layers] {
            see(&mut saved.qkv, t * qkv)?;
            see(&mut saved.raw, where_so(a.qk_norm, t * (q + a.kv_heads * a.head_dim)))?;
            see(&mut saved.attention, t * q)?;
            see(&mut saved.lse, t * a.heads)?;
            see(&mut saved.middle, where_so(d.form != Form::Parallel, t * h))?;
            see(&mut saved.up, t * up)?;
            see(&mut saved.last, where_so(d.form == Form::NormLast, t * h))?;
        }
        see(&mut self.embedded.rows, where_so(projected, t * e))?;
        see(&mut self.embedded.before_norm, where_so(d.embedding_norm, t * h))?;
        let scratch = &mut self.scratch;
        scratch.logit_rows = (LOGITS_MAX / d.vocab_size).max(LOGIT_ROWS_MIN).min(t);
        see(&mut scratch.normed, t * h)?;
        see(&mut scratch.inner, t * f)?;
        see(&mut scratch.rows, t * h.max(q).max(e))?;
        see(&mut scratch.more_rows, where_so(projected || d.form == Form::Parallel, t * h.max(e)))?;
        see(&mut scratch.dqkv, t * qkv)?;
        see(&mut scratch.g, t * h)?;
        see(&mut scratch.g_narrow, where_so(E::IS_BF16, t * h.max(e)))?;
        see(&mut scratch.stream, where_so(d.form == Form::NormLast || d.embedding_norm, t * h))?;
        see(&mut scratch.logits, scratch.logit_rows * d.vocab_size)?;
        scratch.norms.resize(t.max(a.heads), h.max(a.head_dim), see)
    }
}
