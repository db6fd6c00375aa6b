//! From tokens to what the first block reads, and back.

use crate::block::Pass;
use crate::network::summed;
use crate::product::{Out, Storage};
use crate::workspace::{Embedded, Scratch};
use fleet_common::model::Positions;
use fleet_kernels::{self as kernels, Store};
use fleet_learn::{Gradients, neftune};

impl<E: Storage> Pass<'_, E> {
    /// `x_th` of the ids.
    pub(crate) fn embed(
        &mut self,
        ids: &[i64],
        x: &mut [f32],
        kept: &mut Embedded,
        scratch: &mut Scratch<E>,
    ) {
        let wiring = &self.network.wiring;
        let (t, h, e) = (ids.len(), self.network.hidden(), self.network.decoder.embedding_size);
        let table = self.weights.table(&wiring.embedding);
        let target = match wiring.embedding_norm.is_some() {
            true => &mut kept.before_norm[..t * h],
            false => &mut x[..t * h],
        };
        match &wiring.project_in {
            Some(project) => {
                let rows = &mut kept.rows[..t * e];
                table.rows(e, ids, rows);
                self.adapter_rows(ids, rows);
                self.move_rows(e, rows);
                let narrow = E::narrow(rows, &mut scratch.g_narrow, self.products.workers());
                self.times(narrow, &project.weight, Out::Set(target), (t, e, h));
            }
            None => {
                table.rows(h, ids, target);
                self.adapter_rows(ids, target);
                self.move_rows(h, target);
            }
        }
        if let Some(table) = &wiring.positions {
            let table = self.weights.table(table);
            for (at, row) in target.chunks_exact_mut(h).enumerate() {
                table.add_row(self.position_row(at), row);
            }
        }
        if let Some(affine) = &wiring.embedding_norm {
            self.norm(&kept.before_norm[..t * h], affine, &mut x[..t * h], &mut scratch.norms);
        }
    }

    /// Noise on the embeddings `rows_te`, through which gradients flow unchanged.
    fn move_rows(&self, e: usize, rows: &mut [f32]) {
        let Some(noise) = self.noise.sequences.filter(|_| self.noise.neftune > 0.0) else { return };
        let pieces = self.workers().share(self.tokens(), 1);
        self.workers().pieces(rows, pieces * e, |piece, rows| {
            for (at, row) in rows.chunks_exact_mut(e).enumerate() {
                let (sequence, position) = self.place(piece * pieces + at);
                let length = self.lengths.map_or(self.heads.seq, |lengths| lengths[sequence]);
                neftune::apply(noise[sequence], self.noise.neftune, (position, length), row);
            }
        });
    }

    /// The gradients of the embedding, of positions and of what lies behind them, for `scratch.g`.
    pub(crate) fn embed_backward(
        &mut self,
        ids: &[i64],
        kept: &Embedded,
        scratch: &mut Scratch<E>,
        sink: &mut dyn Gradients,
    ) {
        let wiring = &self.network.wiring;
        let (t, h, e) = (ids.len(), self.network.hidden(), self.network.decoder.embedding_size);
        let Scratch { normed, rows, more_rows, g, g_narrow, stream, norms, .. } = scratch;
        let flow = match &wiring.embedding_norm {
            Some(affine) => {
                let x = &kept.before_norm[..t * h];
                self.norm(x, affine, &mut normed[..t * h], norms);
                self.norm_backward(
                    &g[..t * h],
                    x,
                    affine,
                    &mut stream[..t * h],
                    Store::Set,
                    false,
                    norms,
                    sink,
                );
                &stream[..t * h]
            }
            None => &g[..t * h],
        };
        if let Some(table) = wiring.positions.as_ref().and_then(|table| self.weights.trained(table)) {
            let sums = summed(sink, table);
            for (at, row) in flow.chunks_exact(h).enumerate() {
                kernels::add(&mut sums[self.position_row(at) * h..][..h], row);
            }
        }
        // A head that is the embedding has written there already.
        let is_first = wiring.head.weight != wiring.embedding;
        match &wiring.project_in {
            Some(project) => {
                let gn = E::narrow(flow, g_narrow, self.products.workers());
                let read = &mut more_rows[..t * e];
                kernels::convert(&kept.rows[..t * e], read);
                self.linear_weight_backward(gn, read, project, norms.sums(), sink);
                let (trained, changed) = (self.weights.trained(&wiring.embedding), self.weights.added_rows());
                if trained.is_none() && changed.is_none() {
                    return;
                }
                let dx = &mut rows[..t * e];
                self.linear_input_backward(gn, project, Out::Store(dx));
                self.adapter_rows_backward(ids, dx, sink);
                if let Some(range) = trained {
                    kernels::embedding_backward(dx, e, ids, table_of(sink, range, is_first));
                }
            }
            None => {
                if self.weights.added_rows().is_some() {
                    let gn = E::narrow(flow, g_narrow, self.products.workers());
                    self.adapter_rows_backward(ids, gn, sink);
                }
                if let Some(range) = self.weights.trained(&wiring.embedding) {
                    kernels::embedding_backward(flow, h, ids, table_of(sink, range, is_first));
                }
            }
        }
    }

    /// The row of the positions' table for token `at` of the pass.
    fn position_row(&self, at: usize) -> usize {
        let Positions::Learned { offset } = self.network.decoder.positions else { return 0 };
        let (sequence, position) = self.place(at);
        offset + self.before(sequence) + position
    }
}

fn table_of(sink: &mut dyn Gradients, range: std::ops::Range<usize>, is_first: bool) -> &mut [f32] {
    match is_first {
        true => summed(sink, range),
        false => sink.range(range),
    }
}
