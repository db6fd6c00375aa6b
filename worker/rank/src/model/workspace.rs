//! The memory of a forward and backward pass, taken once and reused: nothing is allocated in a step.

use super::Llama;
use crate::product::Storage;

/// Most numbers of logits that exist at once: the head works in slices of tokens.
const LOGITS_MAX: usize = 1 << 20;

/// Fewest tokens in such a slice, lest the products become thin.
const LOGIT_ROWS_MIN: usize = 64;

pub struct Workspace<E> {
    pub(super) saved: Vec<Saved<E>>,
    /// `[t, h]` output of the last block.
    pub(super) last: Vec<f32>,
    pub(super) scratch: Scratch<E>,
}

/// What one block keeps from forward to backward.
pub(super) struct Saved<E> {
    /// `[t, h]` input.
    pub x: Vec<f32>,
    /// `[t, q + 2 kv]`, rotated.
    pub qkv: Vec<E>,
    /// `[t, q]` output of the attention.
    pub attention: Vec<E>,
    /// `[b, heads, s]`.
    pub lse: Vec<f32>,
    /// `[t, h]` after the attention's residual.
    pub middle: Vec<f32>,
    /// `[t, 2 f]`; becomes its gradient.
    pub gate_up: Vec<E>,
}

/// What is used again within every block.
pub(super) struct Scratch<E> {
    /// `[t, h]` a normed input.
    pub normed: Vec<E>,
    /// `[t]`.
    pub rstd: Vec<f32>,
    /// `[t, f]` activation, or its gradient.
    pub inner: Vec<E>,
    /// `[t, max(h, q)]` a gradient on its way.
    pub rows: Vec<E>,
    /// `[t, q + 2 kv]`.
    pub dqkv: Vec<E>,
    /// `[t, h]` gradient of the residual stream.
    pub g: Vec<f32>,
    /// `[t, h]` the same as operand of products.
    pub g_narrow: Vec<E>,
    /// `[logit_rows, v]`.
    pub logits: Vec<E>,
    pub logit_rows: usize,
    /// `[pieces, h]` partial sums of a norm's gradient.
    pub norm_sums: Vec<f32>,
    /// Of the attention kernels, one per piece of work.
    pub kernels: Vec<fleet_kernels::Scratch>,
}

impl<E: Storage> Workspace<E> {
    pub fn new() -> Self {
        Self {
            saved: Vec::new(),
            last: Vec::new(),
            scratch: Scratch {
                normed: Vec::new(),
                rstd: Vec::new(),
                inner: Vec::new(),
                rows: Vec::new(),
                dqkv: Vec::new(),
                g: Vec::new(),
                g_narrow: Vec::new(),
                logits: Vec::new(),
                logit_rows: 0,
                norm_sums: Vec::new(),
                kernels: Vec::new(),
            },
        }
    }

    /// Makes room for `t` tokens with `layers` blocks kept. Never shrinks.
    pub(super) fn resize(&mut self, model: &Llama, t: usize, layers: usize) {
        let c = &model.config;
        let [h, f, v] = [c.hidden_size, c.intermediate_size, c.vocab_size].map(|n| n as usize);
        let q = (c.num_attention_heads * c.head_dim) as usize;
        let qkv = q + 2 * (c.num_key_value_heads * c.head_dim) as usize;
        while self.saved.len() < layers {
            self.saved.push(Saved {
                x: Vec::new(),
                qkv: Vec::new(),
                attention: Vec::new(),
                lse: Vec::new(),
                middle: Vec::new(),
                gate_up: Vec::new(),
            });
        }
        for saved in &mut self.saved[..layers] {
            grow(&mut saved.x, t * h);
            grow(&mut saved.qkv, t * qkv);
            grow(&mut saved.attention, t * q);
            grow(&mut saved.lse, t * c.num_attention_heads as usize);
            grow(&mut saved.middle, t * h);
            grow(&mut saved.gate_up, t * 2 * f);
        }
        grow(&mut self.last, t * h);
        let scratch = &mut self.scratch;
        scratch.logit_rows = (LOGITS_MAX / v).max(LOGIT_ROWS_MIN).min(t);
        grow(&mut scratch.normed, t * h);
        grow(&mut scratch.rstd, t);
        grow(&mut scratch.inner, t * f);
        grow(&mut scratch.rows, t * h.max(q));
        grow(&mut scratch.dqkv, t * qkv);
        grow(&mut scratch.g, t * h);
        grow(&mut scratch.g_narrow, if E::IS_BF16 { t * h } else { 0 });
        grow(&mut scratch.logits, scratch.logit_rows * v);
    }
}

impl<E: Storage> Default for Workspace<E> {
    fn default() -> Self {
        Self::new()
    }
}

/// Fresh zeroed memory costs nothing until it is touched.
fn grow<T: Copy + Default>(buffer: &mut Vec<T>, len: usize) {
    if buffer.len() < len {
        *buffer = vec![T::default(); len];
    }
}
