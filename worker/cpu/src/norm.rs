//! Norms of rows, and of the heads' queries and keys.

use crate::block::Pass;
use crate::network::summed;
use crate::product::Storage;
use crate::workspace::Buffer;
use fleet_common::model::{Affine, NormKind};
use fleet_kernels::{self as kernels, Element, RowStats, Store};
use fleet_learn::{Gradients, Result};

/// What norms keep of rows, and sums of their gradients by pieces.
#[derive(Default)]
pub(crate) struct NormScratch {
    rstd: Vec<f32>,
    stats: Vec<RowStats>,
    sums: Vec<f32>,
    /// Where a norm has no parameters.
    ones: Vec<f32>,
    zeros: Vec<f32>,
    /// Sums of a second kind.
    more_sums: Vec<f32>,
    /// A token's queries and keys, normed, and their gradients.
    token: Vec<f32>,
}

impl NormScratch {
    pub fn resize(
        &mut self,
        rows: usize,
        width: usize,
        see: &mut dyn FnMut(&mut dyn Buffer, usize) -> Result<()>,
    ) -> Result<()> {
        see(&mut self.rstd, rows)?;
        see(&mut self.stats, rows)?;
        if self.ones.len() < width {
            self.ones = vec![1.0; width];
            self.zeros = vec![0.0; width];
        }
        Ok(())
    }

    pub fn sums(&mut self) -> &mut Vec<f32> {
        &mut self.sums
    }
}

impl<E: Storage> Pass<'_, E> {
    /// `y: [t, d]` of `x: [t, d]`; what the backward needs stays in `scratch` until the next norm.
    pub(crate) fn norm<Y: Element>(
        &self,
        x: &[f32],
        affine: &Affine,
        y: &mut [Y],
        scratch: &mut NormScratch,
    ) {
        let t = self.tokens();
        let d = x.len() / t;
        self.norm_rows(&x[..t * d], d, affine, &mut y[..t * d], scratch);
    }

    fn norm_rows<Y: Element>(
        &self,
        x: &[f32],
        d: usize,
        affine: &Affine,
        y: &mut [Y],
        scratch: &mut NormScratch,
    ) {
        let rows = x.len() / d;
        let NormScratch { rstd, stats, ones, zeros, .. } = scratch;
        let scale = affine.scale.as_ref().map_or(&ones[..d], |range| self.weights.exact(range));
        let bias = affine.bias.as_ref().map_or(&zeros[..d], |range| self.weights.exact(range));
        let eps = self.network.eps();
        let share = self.workers().share(rows, 1);
        let pieces = x.chunks(share * d).zip(y.chunks_mut(share * d));
        match self.network.decoder.norm.kind {
            NormKind::Rms => {
                let pieces = pieces.zip(rstd[..rows].chunks_mut(share));
                self.workers().each(pieces, |((x, y), rstd)| kernels::rms_norm(x, scale, eps, y, rstd));
            }
            NormKind::Layer => {
                let pieces = pieces.zip(stats[..rows].chunks_mut(share));
                self.workers()
                    .each(pieces, |((x, y), stats)| kernels::layer_norm(x, scale, bias, eps, y, stats));
            }
        }
    }

    /// `dx` from `dy`, after `norm` of the same rows; the parameters' gradients are summed by pieces and then in the order of the pieces.
    /// `fresh` as the sink's, or not where this norm's have been added to already.
    #[allow(clippy::too_many_arguments)]
    pub(crate) fn norm_backward<G: Element>(
        &self,
        dy: &[G],
        x: &[f32],
        affine: &Affine,
        dx: &mut [f32],
        store: Store,
        again: bool,
        scratch: &mut NormScratch,
        sink: &mut dyn Gradients,
    ) {
        let t = self.tokens();
        let d = x.len() / t;
        let NormScratch { rstd, stats, sums, ones, .. } = scratch;
        let scale = affine.scale.as_ref().map_or(&ones[..d], |range| self.weights.exact(range));
        let share = self.workers().share(t, 1);
        sums.clear();
        sums.resize(t.div_ceil(share) * 2 * d, 0.0);
        let pieces =
            dy[..t * d].chunks(share * d).zip(x.chunks(share * d)).zip(dx[..t * d].chunks_mut(share * d));
        let pieces = pieces.zip(sums.chunks_mut(2 * d));
        match self.network.decoder.norm.kind {
            NormKind::Rms => {
                let pieces = pieces.zip(rstd[..t].chunks(share));
                self.workers().each(pieces, |((((dy, x), dx), sums), rstd)| {
                    kernels::rms_norm_backward(dy, x, scale, rstd, dx, store, &mut sums[..d])
                });
            }
            NormKind::Layer => {
                let pieces = pieces.zip(stats[..t].chunks(share));
                self.workers().each(pieces, |((((dy, x), dx), sums), stats)| {
                    let (dw, db) = sums.split_at_mut(d);
                    kernels::layer_norm_backward(dy, x, scale, stats, dx, store, dw, db)
                });
            }
        }
        for (range, from) in [(&affine.scale, 0), (&affine.bias, d)] {
            let Some(range) = range.as_ref().and_then(|range| self.weights.trained(range)) else { continue };
            let total = if again { sink.range(range) } else { summed(sink, range) };
            sums.chunks(2 * d).for_each(|piece| kernels::add(total, &piece[from..from + d]));
        }
    }

    /// Norms the queries and keys of `qkv` in place, head by head; `raw` keeps what they were, `[t, q + kv]`.
    pub(crate) fn norm_heads(
        &self,
        number: usize,
        qkv: &mut [E],
        raw: &mut [f32],
        scratch: &mut NormScratch,
    ) {
        let block = &self.network.wiring.blocks[number];
        let (Some(q_norm), Some(k_norm)) = (&block.q_norm, &block.k_norm) else { return };
        let (q, n, width) = self.head_widths();
        for (token, raw) in qkv.chunks_exact_mut(width).zip(raw.chunks_exact_mut(n)) {
            kernels::convert(&token[..n], raw);
            let hd = self.heads.head_dim;
            self.norm_rows(&raw[..q], hd, q_norm, &mut token[..q], scratch);
            self.norm_rows(&raw[q..], hd, k_norm, &mut token[q..n], scratch);
        }
    }

    /// The gradient of `norm_heads`, in place on that of the fused buffer.
    pub(crate) fn norm_heads_backward(
        &self,
        number: usize,
        dqkv: &mut [E],
        raw: &[f32],
        scratch: &mut NormScratch,
        sink: &mut dyn Gradients,
    ) {
        let block = &self.network.wiring.blocks[number];
        let (Some(q_norm), Some(k_norm)) = (&block.q_norm, &block.k_norm) else { return };
        let (q, n, width) = self.head_widths();
        let hd = self.heads.head_dim;
        for affine in [q_norm, k_norm] {
            let ranges = [&affine.scale, &affine.bias].into_iter().flatten();
            for range in ranges.filter_map(|range| self.weights.trained(range)) {
                summed(sink, range);
            }
        }
        let mut token_rows = std::mem::take(&mut scratch.token);
        token_rows.resize(2 * n, 0.0);
        let (normed, dx) = token_rows.split_at_mut(n);
        for (token, raw) in dqkv.chunks_exact_mut(width).zip(raw.chunks_exact(n)) {
            for (affine, part) in [(q_norm, 0..q), (k_norm, q..n)] {
                // The statistics are made anew: two numbers for each head would have to be kept otherwise.
                self.norm_rows(&raw[part.clone()], hd, affine, &mut normed[part.clone()], scratch);
                self.heads_backward(
                    &token[part.clone()],
                    &raw[part.clone()],
                    affine,
                    &mut dx[part],
                    scratch,
                    sink,
                );
            }
            kernels::convert(dx, &mut token[..n]);
        }
        scratch.token = token_rows;
    }

    fn heads_backward(
        &self,
        dy: &[E],
        x: &[f32],
        affine: &Affine,
        dx: &mut [f32],
        scratch: &mut NormScratch,
        sink: &mut dyn Gradients,
    ) {
        let d = self.heads.head_dim;
        let rows = x.len() / d;
        let NormScratch { rstd, stats, ones, more_sums, sums, .. } = scratch;
        let scale = affine.scale.as_ref().map_or(&ones[..d], |range| self.weights.exact(range));
        sums.clear();
        sums.resize(d, 0.0);
        more_sums.clear();
        more_sums.resize(d, 0.0);
        match self.network.decoder.norm.kind {
            NormKind::Rms => {
                kernels::rms_norm_backward(dy, x, scale, &rstd[..rows], dx, Store::Set, sums);
            }
            NormKind::Layer => {
                kernels::layer_norm_backward(dy, x, scale, &stats[..rows], dx, Store::Set, sums, more_sums);
            }
        }
        for (range, from) in [(&affine.scale, &*sums), (&affine.bias, &*more_sums)] {
            if let Some(range) = range.as_ref().and_then(|range| self.weights.trained(range)) {
                kernels::add(sink.range(range), from);
            }
        }
    }

    /// Numbers of a token's queries, of its queries and keys, and of all.
    fn head_widths(&self) -> (usize, usize, usize) {
        let q = self.heads.out_width();
        (q, q + self.heads.kv_heads * self.heads.head_dim, self.heads.qkv_width())
    }
}
