//! One decoder block: norm, attention, residual, norm, SwiGLU, residual. Forward keeps what backward needs; backward computes the norms'
//! outputs and the activation again, which costs less than keeping them.

use super::workspace::{Saved, Scratch};
use super::{BlockLayout, Llama, Sink, Weights};
use crate::product::{Out, Products, Storage};
use crate::workers::Workers;
use fleet_kernels::{self as kernels, Activation, Heads, RopeTable, Sight, Store};
use std::ops::Range;

impl Llama {
    /// `out_th` from `saved.x`.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn block_forward<E: Storage>(
        &self,
        block: &BlockLayout,
        w: Weights<E>,
        heads: &Heads,
        products: &mut Products,
        saved: &mut Saved<E>,
        out: &mut [f32],
        scratch: &mut Scratch<E>,
    ) {
        let d = Dims::new(self, heads);
        let Scratch { normed, rstd, inner, .. } = scratch;
        let x = &saved.x[..d.t * d.h];
        let (normed, inner) = (&mut normed[..d.t * d.h], &mut inner[..d.t * d.f]);
        let qkv = &mut saved.qkv[..heads.qkv_len()];
        let attention = &mut saved.attention[..heads.out_len()];
        let middle = &mut saved.middle[..d.t * d.h];
        let gate_up = &mut saved.gate_up[..d.t * 2 * d.f];
        let out = &mut out[..d.t * d.h];

        norm(
            products.workers(),
            x,
            &w.master[block.input_norm.clone()],
            self.eps(),
            normed,
            &mut rstd[..d.t],
        );
        products.forward(normed, w.of(&block.qkv), Out::Store(qkv), (d.t, d.h, d.qkv));
        attend(products.workers(), qkv, heads, &self.rope, attention, &mut saved.lse, &mut scratch.kernels);
        middle.copy_from_slice(x);
        products.forward(attention, w.of(&block.o), Out::Add(middle), (d.t, d.q, d.h));

        norm(
            products.workers(),
            middle,
            &w.master[block.post_norm.clone()],
            self.eps(),
            normed,
            &mut rstd[..d.t],
        );
        products.forward(normed, w.of(&block.gate_up), Out::Store(gate_up), (d.t, d.h, 2 * d.f));
        let rows = products.workers().share(d.t, 1);
        products.workers().pieces(inner, rows * d.f, |i, y| {
            kernels::gated(&gate_up[i * rows * 2 * d.f..][..2 * y.len()], d.f, Activation::Silu, y);
        });
        out.copy_from_slice(middle);
        products.forward(inner, w.of(&block.down), Out::Add(out), (d.t, d.f, d.h));
    }

    /// Turns `scratch.g`, the gradient of the block's output, into that of its input, and adds the weights' gradients to `sink`.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn block_backward<E: Storage>(
        &self,
        block: &BlockLayout,
        w: Weights<E>,
        heads: &Heads,
        products: &mut Products,
        saved: &mut Saved<E>,
        scratch: &mut Scratch<E>,
        sink: &mut impl Sink,
    ) {
        let d = Dims::new(self, heads);
        let Scratch {
            normed,
            rstd,
            inner,
            rows: rows_buffer,
            dqkv,
            g,
            g_narrow,
            norm_sums,
            kernels: kernel_scratch,
            ..
        } = scratch;
        let (normed, inner) = (&mut normed[..d.t * d.h], &mut inner[..d.t * d.f]);
        let (rstd, dqkv, g) = (&mut rstd[..d.t], &mut dqkv[..heads.qkv_len()], &mut g[..d.t * d.h]);
        let gate_up = &mut saved.gate_up[..d.t * 2 * d.f];

        // The feed-forward half. `inner` holds the activation's gradient, then the activation; `gate_up` its own gradient.
        let gn = E::narrow(g, g_narrow, products.workers());
        products.backward_input(gn, w.of(&block.down), Out::Store(inner), (d.t, d.f, d.h));
        let share = products.workers().share(d.t, 1);
        let pairs = gate_up.chunks_mut(share * 2 * d.f).zip(inner.chunks_mut(share * d.f));
        products
            .workers()
            .each(pairs, |(gate_up, inner)| kernels::gated_backward(gate_up, d.f, Activation::Silu, inner));
        products.backward_weight(gn, inner, grad(sink, &block.down), (d.t, d.f, d.h));
        let middle = &saved.middle[..d.t * d.h];
        norm(products.workers(), middle, &w.master[block.post_norm.clone()], self.eps(), normed, rstd);
        products.backward_weight(gate_up, normed, grad(sink, &block.gate_up), (d.t, d.h, 2 * d.f));
        let dn = &mut rows_buffer[..d.t * d.h];
        products.backward_input(gate_up, w.of(&block.gate_up), Out::Store(dn), (d.t, d.h, 2 * d.f));
        let norm_w = &w.master[block.post_norm.clone()];
        norm_backward(
            products.workers(),
            dn,
            middle,
            norm_w,
            rstd,
            g,
            Store::Add,
            norm_sums,
            sink,
            &block.post_norm,
        );

        // The attention half.
        let gn = E::narrow(g, g_narrow, products.workers());
        let attention = &saved.attention[..heads.out_len()];
        products.backward_weight(gn, attention, grad(sink, &block.o), (d.t, d.q, d.h));
        let da = &mut rows_buffer[..d.t * d.q];
        products.backward_input(gn, w.of(&block.o), Out::Store(da), (d.t, d.q, d.h));
        let qkv = &saved.qkv[..heads.qkv_len()];
        attend_backward(
            products.workers(),
            qkv,
            attention,
            &saved.lse,
            da,
            heads,
            &self.rope,
            dqkv,
            kernel_scratch,
        );
        let x = &saved.x[..d.t * d.h];
        norm(products.workers(), x, &w.master[block.input_norm.clone()], self.eps(), normed, rstd);
        products.backward_weight(dqkv, normed, grad(sink, &block.qkv), (d.t, d.h, d.qkv));
        let dn = &mut rows_buffer[..d.t * d.h];
        products.backward_input(dqkv, w.of(&block.qkv), Out::Store(dn), (d.t, d.h, d.qkv));
        let norm_w = &w.master[block.input_norm.clone()];
        norm_backward(
            products.workers(),
            dn,
            x,
            norm_w,
            rstd,
            g,
            Store::Add,
            norm_sums,
            sink,
            &block.input_norm,
        );
    }
}

impl<'a, E: Storage> Weights<'a, E> {
    pub(super) fn of(&self, range: &Range<usize>) -> &'a [E] {
        &self.products[range.clone()]
    }
}

/// The gradient of a weight as the target of a product.
pub(super) fn grad<'a, E>(sink: &'a mut impl Sink, range: &Range<usize>) -> Out<'a, E> {
    match sink.fresh() {
        true => Out::Set(sink.range(range.clone())),
        false => Out::Add(sink.range(range.clone())),
    }
}

struct Dims {
    t: usize,
    h: usize,
    q: usize,
    qkv: usize,
    f: usize,
}

impl Dims {
    fn new(model: &Llama, heads: &Heads) -> Self {
        Self {
            t: heads.batch * heads.seq,
            h: model.hidden(),
            q: heads.out_width(),
            qkv: heads.qkv_width(),
            f: model.config.intermediate_size as usize,
        }
    }
}

pub(super) fn norm<E: Storage>(
    workers: &Workers,
    x: &[f32],
    w: &[f32],
    eps: f32,
    y: &mut [E],
    rstd: &mut [f32],
) {
    let (h, share) = (w.len(), workers.share(rstd.len(), 1));
    let pieces = x.chunks(share * h).zip(y.chunks_mut(share * h)).zip(rstd.chunks_mut(share));
    workers.each(pieces, |((x, y), rstd)| kernels::rms_norm(x, w, eps, y, rstd));
}

/// `dx` from `dy`; the weight's gradient is summed by pieces and then in the order of the pieces.
#[allow(clippy::too_many_arguments)]
pub(super) fn norm_backward<E: Storage>(
    workers: &Workers,
    dy: &[E],
    x: &[f32],
    w: &[f32],
    rstd: &[f32],
    dx: &mut [f32],
    store: Store,
    sums: &mut Vec<f32>,
    sink: &mut impl Sink,
    range: &Range<usize>,
) {
    let (h, share) = (w.len(), workers.share(rstd.len(), 1));
    sums.clear();
    sums.resize(rstd.len().div_ceil(share) * h, 0.0);
    let pieces = dy.chunks(share * h).zip(x.chunks(share * h)).zip(rstd.chunks(share));
    let pieces = pieces.zip(dx.chunks_mut(share * h)).zip(sums.chunks_mut(h));
    workers.each(pieces, |((((dy, x), rstd), dx), dw)| {
        kernels::rms_norm_backward(dy, x, w, rstd, dx, store, dw)
    });
    let fresh = sink.fresh();
    let dw = sink.range(range.clone());
    if fresh {
        dw.fill(0.0);
    }
    sums.chunks(h).for_each(|piece| kernels::add(dw, piece));
}

/// Rotates `qkv` in place and attends, sequence by sequence.
fn attend<E: Storage>(
    workers: &Workers,
    qkv: &mut [E],
    heads: &Heads,
    rope: &RopeTable,
    out: &mut [E],
    lse: &mut [f32],
    scratch: &mut Vec<kernels::Scratch>,
) {
    let (piece, count) = sequences_per_piece(workers, heads);
    scratch.resize_with(count.max(scratch.len()), kernels::Scratch::new);
    let pieces = qkv
        .chunks_mut(piece.qkv_len())
        .zip(out.chunks_mut(piece.out_len()))
        .zip(lse[..heads.lse_len()].chunks_mut(piece.lse_len()))
        .zip(scratch.iter_mut());
    workers.each(pieces, |(((qkv, out), lse), scratch)| {
        let part = Heads { batch: qkv.len() / (heads.seq * heads.qkv_width()), ..piece };
        kernels::rope(qkv, &part, rope, 0);
        kernels::attention(qkv, &part, &Sight::ALL, out, lse, scratch);
    });
}

#[allow(clippy::too_many_arguments)]
fn attend_backward<E: Storage>(
    workers: &Workers,
    qkv: &[E],
    out: &[E],
    lse: &[f32],
    dout: &[E],
    heads: &Heads,
    rope: &RopeTable,
    dqkv: &mut [E],
    scratch: &mut [kernels::Scratch],
) {
    let (piece, _) = sequences_per_piece(workers, heads);
    let pieces = qkv
        .chunks(piece.qkv_len())
        .zip(out.chunks(piece.out_len()))
        .zip(lse[..heads.lse_len()].chunks(piece.lse_len()))
        .zip(dout.chunks(piece.out_len()))
        .zip(dqkv.chunks_mut(piece.qkv_len()))
        .zip(scratch.iter_mut());
    workers.each(pieces, |(((((qkv, out), lse), dout), dqkv), scratch)| {
        let part = Heads { batch: qkv.len() / (heads.seq * heads.qkv_width()), ..piece };
        kernels::attention_backward(qkv, out, lse, dout, &part, &Sight::ALL, dqkv, scratch);
        kernels::rope_backward(dqkv, &part, rope, 0);
    });
}

fn sequences_per_piece(workers: &Workers, heads: &Heads) -> (Heads, usize) {
    let batch = workers.share(heads.batch, 1);
    (Heads { batch, ..*heads }, heads.batch.div_ceil(batch))
}
