//! The attention of a block: turning and attending, sequence by sequence.

use crate::block::Pass;
use crate::decode::Cache;
use crate::norm::NormScratch;
use crate::product::Storage;
use crate::workspace::Saved;
use fleet_kernels::{self as kernels, Heads};
use fleet_learn::Gradients;

impl<E: Storage> Pass<'_, E> {
    /// `saved.attention` of `x_th`; keeps queries, keys and values as they were attended with. With caches `x` is one token of each
    /// sequence, which is added to its own and attends over all there.
    #[allow(clippy::too_many_arguments)]
    pub(crate) fn attend(
        &mut self,
        number: usize,
        x: &[E],
        saved: &mut Saved<E>,
        caches: Option<&mut [&mut Cache<E>]>,
        norms: &mut NormScratch,
        scratch: &mut Vec<kernels::Scratch>,
    ) {
        let block = &self.network.wiring.blocks[number];
        let heads = self.heads;
        self.linear(x, &block.qkv, &mut saved.qkv);
        let qkv = &mut saved.qkv[..heads.qkv_len()];
        self.norm_heads(number, qkv, &mut saved.raw, norms);
        let (rope, sight) = (self.network.rope(), self.network.sight(number));
        if let Some(caches) = caches {
            let one = Heads { batch: 1, seq: 1, ..heads };
            scratch.resize_with(caches.len().max(scratch.len()), kernels::Scratch::new);
            let texts = qkv
                .chunks_exact_mut(one.qkv_len())
                .zip(saved.attention.chunks_exact_mut(one.out_len()))
                .zip(caches)
                .zip(self.before)
                .zip(scratch.iter_mut());
            return self.workers().each(texts, |((((qkv, out), cache), before), scratch)| {
                if let Some(rope) = rope {
                    kernels::rope(qkv, &one, rope, *before);
                }
                let layer = &mut cache.layers[number];
                layer.push(qkv, &one);
                let (q, keys, values) = (&qkv[..one.out_width()], &layer.keys, &layer.values);
                kernels::attention_decode(q, keys, values, before + 1, &one, &sight, out, scratch);
            });
        }
        let shares = self.shares();
        scratch.resize_with(shares.len().max(scratch.len()), kernels::Scratch::new);
        let pieces = cut_mut(qkv, &shares, Heads::qkv_len)
            .zip(cut_mut(&mut saved.attention, &shares, Heads::out_len))
            .zip(cut_mut(&mut saved.lse, &shares, Heads::lse_len))
            .zip(&shares)
            .zip(scratch.iter_mut());
        self.workers().each(pieces, |((((mut qkv, mut out), mut lse), share), scratch)| {
            for part in share {
                let qkv = take_mut(&mut qkv, part.qkv_len());
                if let Some(rope) = rope {
                    kernels::rope(qkv, part, rope, 0);
                }
                let (out, lse) = (take_mut(&mut out, part.out_len()), take_mut(&mut lse, part.lse_len()));
                kernels::attention(qkv, part, &sight, out, lse, scratch);
            }
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
        let shares = self.shares();
        let (rope, sight) = (self.network.rope(), self.network.sight(number));
        let pieces = cut(&saved.qkv, &shares, Heads::qkv_len)
            .zip(cut(&saved.attention, &shares, Heads::out_len))
            .zip(cut(&saved.lse, &shares, Heads::lse_len))
            .zip(cut(dout, &shares, Heads::out_len))
            .zip(cut_mut(dqkv, &shares, Heads::qkv_len))
            .zip(&shares)
            .zip(scratch.iter_mut());
        self.workers().each(
            pieces,
            |((((((mut qkv, mut out), mut lse), mut dout), mut dqkv), share), scratch)| {
                for part in share {
                    let (qkv, out) = (take(&mut qkv, part.qkv_len()), take(&mut out, part.out_len()));
                    let (lse, dout) = (take(&mut lse, part.lse_len()), take(&mut dout, part.out_len()));
                    let dqkv = take_mut(&mut dqkv, part.qkv_len());
                    kernels::attention_backward(qkv, out, lse, dout, part, &sight, dqkv, scratch);
                    if let Some(rope) = rope {
                        kernels::rope_backward(dqkv, part, rope, 0);
                    }
                }
            },
        );
        self.norm_heads_backward(number, dqkv, &saved.raw, norms, sink);
    }

    /// The sequences, cut into shares for the threads: each a few calls of the kernels, one after the other.
    fn shares(&self) -> Vec<Vec<Heads>> {
        let Some(lengths) = self.lengths else {
            let batch = self.workers().share(self.heads.batch, 1);
            let shares = (0..self.heads.batch).step_by(batch);
            return shares
                .map(|at| vec![Heads { batch: batch.min(self.heads.batch - at), ..self.heads }])
                .collect();
        };
        // A sequence costs what it reads, and each token all before it.
        let cost = |length: usize| (length * (length + PLAIN)) as u64;
        let all: u64 = lengths.iter().map(|length| cost(*length)).sum();
        let (mut shares, mut done) = (vec![Vec::new()], 0);
        for length in lengths {
            let full = all * shares.len() as u64 / self.workers().count() as u64;
            if done >= full {
                shares.push(Vec::new());
            }
            done += cost(*length);
            let share = shares.last_mut().expect("there is one from the beginning");
            share.push(Heads { batch: 1, seq: *length, ..self.heads });
        }
        shares
    }
}

/// Tokens whose attention costs a token as much as its own products there.
const PLAIN: usize = 128;

/// The numbers of each share.
fn cut<'a, T>(
    numbers: &'a [T],
    shares: &'a [Vec<Heads>],
    len: fn(&Heads) -> usize,
) -> impl Iterator<Item = &'a [T]> {
    let mut rest = numbers;
    shares.iter().map(move |share| take(&mut rest, share.iter().map(len).sum()))
}

fn cut_mut<'a, T>(
    numbers: &'a mut [T],
    shares: &'a [Vec<Heads>],
    len: fn(&Heads) -> usize,
) -> impl Iterator<Item = &'a mut [T]> {
    let mut rest = numbers;
    shares.iter().map(move |share| take_mut(&mut rest, share.iter().map(len).sum()))
}

/// The first numbers, which are gone from there.
fn take<'a, T>(rest: &mut &'a [T], len: usize) -> &'a [T] {
    let (now, later) = rest.split_at(len);
    *rest = later;
    now
}

fn take_mut<'a, T>(rest: &mut &'a mut [T], len: usize) -> &'a mut [T] {
    let (now, later) = std::mem::take(rest).split_at_mut(len);
    *rest = later;
    now
}
