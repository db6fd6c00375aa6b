//! The attention of a block: turning and attending, sequence by sequence.

use crate::block::Pass;
use crate::decode::Layer;
use crate::norm::NormScratch;
use crate::product::Storage;
use crate::workspace::Saved;
use fleet_kernels::{self as kernels, Heads};
use fleet_learn::Gradients;

impl<E: Storage> Pass<'_, E> {
    /// `saved.attention` of `x_th`; keeps queries, keys and values as they were attended with. With a cache `x` is one token, which is added to
    /// it and attends over all.
    #[allow(clippy::too_many_arguments)]
    pub(crate) fn attend(
        &mut self,
        number: usize,
        x: &[E],
        saved: &mut Saved<E>,
        cache: Option<&mut Layer<E>>,
        norms: &mut NormScratch,
        scratch: &mut Vec<kernels::Scratch>,
    ) {
        let block = &self.network.wiring.blocks[number];
        let heads = self.heads;
        self.linear(x, &block.qkv, &mut saved.qkv);
        let qkv = &mut saved.qkv[..heads.qkv_len()];
        self.norm_heads(number, qkv, &mut saved.raw, norms);
        let (piece, count) = self.sequences_per_piece();
        scratch.resize_with(count.max(scratch.len()), kernels::Scratch::new);
        let (rope, sight) = (self.network.rope(), self.network.sight(number));
        if let Some(layer) = cache {
            if let Some(rope) = rope {
                kernels::rope(qkv, &heads, rope, self.position);
            }
            layer.push(qkv, &heads);
            let (q, len) = (&qkv[..heads.out_width()], self.position + 1);
            let out = &mut saved.attention[..heads.out_len()];
            return kernels::attention_decode(
                q,
                &layer.keys,
                &layer.values,
                len,
                &heads,
                &sight,
                out,
                &mut scratch[0],
            );
        }
        let pieces = qkv
            .chunks_mut(piece.qkv_len())
            .zip(saved.attention[..heads.out_len()].chunks_mut(piece.out_len()))
            .zip(saved.lse[..heads.lse_len()].chunks_mut(piece.lse_len()))
            .zip(scratch.iter_mut());
        self.workers().each(pieces, |(((qkv, out), lse), scratch)| {
            let part = Heads { batch: qkv.len() / (heads.seq * heads.qkv_width()), ..piece };
            if let Some(rope) = rope {
                kernels::rope(qkv, &part, rope, 0);
            }
            kernels::attention(qkv, &part, &sight, out, lse, scratch);
        });
    }

    /// `dqkv`, the gradient of what the block's first product gave, from that of the attention's output.
    #[allow(clippy::too_many_arguments)]
    pub(crate) fn attend_backward(
        &self,
        number: usize,
        saved: &Saved<E>,
        dout: &[E],
        dqkv: &mut [E],
        norms: &mut NormScratch,
        scratch: &mut [kernels::Scratch],
        sink: &mut dyn Gradients,
    ) {
        let heads = self.heads;
        let (piece, _) = self.sequences_per_piece();
        let (rope, sight) = (self.network.rope(), self.network.sight(number));
        let pieces = saved.qkv[..heads.qkv_len()]
            .chunks(piece.qkv_len())
            .zip(saved.attention[..heads.out_len()].chunks(piece.out_len()))
            .zip(saved.lse[..heads.lse_len()].chunks(piece.lse_len()))
            .zip(dout.chunks(piece.out_len()))
            .zip(dqkv.chunks_mut(piece.qkv_len()))
            .zip(scratch.iter_mut());
        self.workers().each(pieces, |(((((qkv, out), lse), dout), dqkv), scratch)| {
            let part = Heads { batch: qkv.len() / (heads.seq * heads.qkv_width()), ..piece };
            kernels::attention_backward(qkv, out, lse, dout, &part, &sight, dqkv, scratch);
            if let Some(rope) = rope {
                kernels::rope_backward(dqkv, &part, rope, 0);
            }
        });
        self.norm_heads_backward(number, dqkv, &saved.raw, norms, sink);
    }

    fn sequences_per_piece(&self) -> (Heads, usize) {
        let batch = self.workers().share(self.heads.batch, 1);
        (Heads { batch, ..self.heads }, self.heads.batch.div_ceil(batch))
    }
}
