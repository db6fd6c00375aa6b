//! One decoder block. Forward keeps what backward needs; backward computes the norms' outputs and the activation again, which costs less
//! than keeping them.

use crate::adapter::LowRank;
use crate::decode::Cache;
use crate::network::Network;
use crate::product::{Out, Products, Storage};
use crate::workspace::{Saved, Scratch};
use fleet_common::model::{Affine, Block, Form};
use fleet_kernels::{Heads, Store};
use fleet_learn::{Batch, Gradients, HostWeights, Workers};
use std::ops::Range;

/// What training changes at random.
#[derive(Clone, Copy, Default)]
pub(crate) struct Noise<'a> {
    /// For each sequence what decides which of its numbers adapters do not see, and where its embeddings are moved to.
    pub sequences: Option<&'a [u64]>,
    /// How far they are; 0: not at all.
    pub neftune: f32,
}

impl<'a> Noise<'a> {
    pub fn of(batch: &Batch<'a>) -> Noise<'a> {
        Noise { sequences: batch.noise, neftune: batch.neftune }
    }
}

/// One way through the network: what computes, with which weights, on sequences of which shape.
pub(crate) struct Pass<'a, E> {
    pub network: &'a Network,
    pub weights: HostWeights<'a, E>,
    /// Of all tokens as one sequence, where `lengths` says how they are cut.
    pub heads: Heads,
    pub lengths: Option<&'a [usize]>,
    /// The tokens that products work on, where these are not all: the head takes them slice by slice.
    pub slice: Option<Range<usize>>,
    /// Of each sequence the tokens that came before; empty where there are none.
    pub before: &'a [usize],
    pub noise: Noise<'a>,
    pub products: &'a mut Products,
    pub low: &'a mut LowRank<E>,
}

impl<'a, E: Storage> Pass<'a, E> {
    pub fn workers(&self) -> &Workers {
        self.products.workers()
    }

    pub fn tokens(&self) -> usize {
        self.slice.as_ref().map_or(self.heads.batch * self.heads.seq, Range::len)
    }

    /// The first token that products work on.
    pub fn first(&self) -> usize {
        self.slice.as_ref().map_or(0, |slice| slice.start)
    }

    /// The sequence that a token is of, and its position there.
    pub fn place(&self, token: usize) -> (usize, usize) {
        let Some(lengths) = self.lengths else { return (token / self.heads.seq, token % self.heads.seq) };
        let mut start = 0;
        for (number, length) in lengths.iter().enumerate() {
            if token < start + length {
                return (number, token - start);
            }
            start += length;
        }
        unreachable!("a token of the pass")
    }

    pub fn before(&self, sequence: usize) -> usize {
        self.before.get(sequence).copied().unwrap_or(0)
    }

    fn layout(&self, number: usize) -> &'a Block {
        &self.network.wiring.blocks[number]
    }

    /// `out_th` from `x_th`; where it is not wanted, as much as `block_backward` looks at. With caches there is one token of each sequence.
    pub fn block_forward(
        &mut self,
        number: usize,
        x: &[f32],
        saved: &mut Saved<E>,
        out: Option<&mut [f32]>,
        scratch: &mut Scratch<E>,
        caches: Option<&mut [&mut Cache<E>]>,
    ) {
        let block = self.layout(number);
        let len = self.tokens() * self.network.hidden();
        let out_len = self.heads.out_len();
        let Scratch { normed, inner, stream, norms, kernels, g_narrow, .. } = scratch;
        let (normed, x, out) = (&mut normed[..len], &x[..len], out.map(|out| &mut out[..len]));
        match self.network.decoder.form {
            Form::NormFirst => {
                self.norm(x, &block.norm1, normed, norms);
                self.attend(number, normed, saved, caches, norms, kernels);
                let mut middle = std::mem::take(&mut saved.middle);
                middle[..len].copy_from_slice(x);
                self.linear_add(&saved.attention[..out_len], &block.out, &mut middle[..len]);
                self.norm(&middle[..len], norm2(block), normed, norms);
                self.mlp_up(number, normed, &mut saved.up);
                if let Some(out) = out {
                    out.copy_from_slice(&middle[..len]);
                    self.mlp_down(number, &saved.up, inner, out);
                }
                saved.middle = middle;
            }
            Form::Parallel => {
                self.norm(x, &block.norm1, normed, norms);
                self.attend(number, normed, saved, caches, norms, kernels);
                self.mlp_up(number, normed, &mut saved.up);
                if let Some(out) = out {
                    out.copy_from_slice(x);
                    self.linear_add(&saved.attention[..out_len], &block.out, out);
                    self.mlp_down(number, &saved.up, inner, out);
                }
            }
            Form::NormLast => {
                let narrow = E::narrow(x, g_narrow, self.products.workers());
                self.attend(number, narrow, saved, caches, norms, kernels);
                let (mut middle, mut last) =
                    (std::mem::take(&mut saved.middle), std::mem::take(&mut saved.last));
                middle[..len].copy_from_slice(x);
                self.linear_add(&saved.attention[..out_len], &block.out, &mut middle[..len]);
                self.norm(&middle[..len], &block.norm1, &mut stream[..len], norms);
                last[..len].copy_from_slice(&stream[..len]);
                let narrow = E::narrow(&stream[..len], g_narrow, self.products.workers());
                self.mlp_up(number, narrow, &mut saved.up);
                self.mlp_down(number, &saved.up, inner, &mut last[..len]);
                if let Some(out) = out {
                    self.norm(&last[..len], norm2(block), out, norms);
                }
                (saved.middle, saved.last) = (middle, last);
            }
        }
    }

    /// Turns `scratch.g`, the gradient of the block's output, into that of its input `x_th`, and adds the weights' gradients to `sink`.
    pub fn block_backward(
        &mut self,
        number: usize,
        x: &[f32],
        saved: &mut Saved<E>,
        scratch: &mut Scratch<E>,
        sink: &mut dyn Gradients,
    ) {
        let block = self.layout(number);
        let (t, h) = (self.tokens(), self.network.hidden());
        let len = t * h;
        let qkv_len = self.heads.qkv_len();
        let out_len = self.heads.out_len();
        let Scratch { normed, inner, rows, more_rows, dqkv, g, g_narrow, stream, norms, kernels, .. } =
            scratch;
        let (x, normed, g, dqkv) = (&x[..len], &mut normed[..len], &mut g[..len], &mut dqkv[..qkv_len]);
        let up_len = t * block.up.outputs;
        match self.network.decoder.form {
            Form::NormFirst => {
                // `inner` holds the activation's gradient, then the activation; `up` its own gradient.
                let gn = E::narrow(g, g_narrow, self.products.workers());
                self.mlp_backward(number, gn, &mut saved.up, inner, norms.sums(), sink);
                let middle = &saved.middle[..len];
                self.norm(middle, norm2(block), normed, norms);
                self.linear_weight_backward(&saved.up[..up_len], normed, &block.up, norms.sums(), sink);
                let dn = &mut rows[..len];
                self.linear_input_backward(&saved.up[..up_len], &block.up, Out::Store(dn));
                self.norm_backward(dn, middle, norm2(block), g, Store::Add, false, norms, sink);

                let gn = E::narrow(g, g_narrow, self.products.workers());
                self.linear_weight_backward(gn, &saved.attention[..out_len], &block.out, norms.sums(), sink);
                let da = &mut rows[..out_len];
                self.linear_input_backward(gn, &block.out, Out::Store(da));
                self.attend_backward(number, saved, da, dqkv, norms, kernels, sink);
                self.norm(x, &block.norm1, normed, norms);
                self.linear_weight_backward(dqkv, normed, &block.qkv, norms.sums(), sink);
                let dn = &mut rows[..len];
                self.linear_input_backward(dqkv, &block.qkv, Out::Store(dn));
                self.norm_backward(dn, x, &block.norm1, g, Store::Add, false, norms, sink);
            }
            Form::Parallel => {
                let gn = E::narrow(g, g_narrow, self.products.workers());
                self.mlp_backward(number, gn, &mut saved.up, inner, norms.sums(), sink);
                let da = &mut rows[..out_len];
                self.linear_weight_backward(gn, &saved.attention[..out_len], &block.out, norms.sums(), sink);
                self.linear_input_backward(gn, &block.out, Out::Store(da));
                self.attend_backward(number, saved, da, dqkv, norms, kernels, sink);
                self.norm(x, &block.norm1, normed, norms);
                self.linear_weight_backward(&saved.up[..up_len], normed, &block.up, norms.sums(), sink);
                self.linear_weight_backward(dqkv, normed, &block.qkv, norms.sums(), sink);
                // Both halves read the same norm.
                let (of_mlp, of_attention) = (&mut more_rows[..len], &mut rows[..len]);
                self.linear_input_backward(&saved.up[..up_len], &block.up, Out::Store(of_mlp));
                self.linear_input_backward(dqkv, &block.qkv, Out::Store(of_attention));
                self.norm_backward(of_mlp, x, &block.norm1, g, Store::Add, false, norms, sink);
                self.norm_backward(of_attention, x, &block.norm1, g, Store::Add, true, norms, sink);
            }
            Form::NormLast => {
                // The stream's gradient, in turn before and behind each norm.
                let flow = &mut stream[..len];
                let last = &saved.last[..len];
                self.norm(last, norm2(block), normed, norms);
                self.norm_backward(g, last, norm2(block), flow, Store::Set, false, norms, sink);
                let gn = E::narrow(flow, g_narrow, self.products.workers());
                self.mlp_backward(number, gn, &mut saved.up, inner, norms.sums(), sink);
                let middle = &saved.middle[..len];
                self.norm(middle, &block.norm1, normed, norms);
                self.linear_weight_backward(&saved.up[..up_len], normed, &block.up, norms.sums(), sink);
                self.linear_input_backward(&saved.up[..up_len], &block.up, Out::Add(flow));
                self.norm(middle, &block.norm1, normed, norms);
                self.norm_backward(flow, middle, &block.norm1, g, Store::Set, false, norms, sink);

                let gn = E::narrow(g, g_narrow, self.products.workers());
                self.linear_weight_backward(gn, &saved.attention[..out_len], &block.out, norms.sums(), sink);
                let da = &mut rows[..out_len];
                self.linear_input_backward(gn, &block.out, Out::Store(da));
                self.attend_backward(number, saved, da, dqkv, norms, kernels, sink);
                let narrow = E::narrow(x, g_narrow, self.products.workers());
                self.linear_weight_backward(dqkv, narrow, &block.qkv, norms.sums(), sink);
                self.linear_input_backward(dqkv, &block.qkv, Out::Add(g));
            }
        }
    }
}

pub(crate) fn norm2(block: &Block) -> &Affine {
    block.norm2.as_ref().expect("only parallel blocks have one norm")
}
