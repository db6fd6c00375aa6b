//! Logits: of whole sequences, and of one token of each at a time with caches of keys and values.

use crate::block::Pass;
use crate::network::{Network, Texts, two};
use crate::product::{Products, Storage};
use crate::workspace::{Keep, Workspace};
use fleet_kernels::Heads;
use fleet_learn::zeros::{Part, reserve};
use fleet_learn::{HostWeights, Result};

/// Keys and values of the tokens so far, of every layer.
pub struct Cache<E> {
    pub(crate) layers: Vec<Layer<E>>,
    len: usize,
}

/// `[len, kv_heads * head_dim]` each.
#[derive(Default)]
pub(crate) struct Layer<E> {
    pub keys: Vec<E>,
    pub values: Vec<E>,
}

impl<E: Storage> Layer<E> {
    /// Adds the keys and values of the fused buffer.
    pub fn push(&mut self, qkv: &[E], heads: &Heads) {
        let kv = heads.kv_heads * heads.head_dim;
        for row in qkv.chunks_exact(heads.qkv_width()) {
            let row = &row[heads.out_width()..];
            self.keys.extend_from_slice(&row[..kv]);
            self.values.extend_from_slice(&row[kv..]);
        }
    }
}

impl<E: Storage> Cache<E> {
    pub fn new(network: &Network) -> Self {
        Self { layers: network.wiring.blocks.iter().map(|_| Layer::default()).collect(), len: 0 }
    }

    /// Room for so many tokens more, of `heads` each.
    fn reserve(&mut self, tokens: usize, heads: &Heads) -> Result<()> {
        let more = tokens * heads.kv_heads * heads.head_dim;
        self.layers.iter_mut().try_for_each(|layer| {
            reserve(&mut layer.keys, more, Part::Cache)?;
            reserve(&mut layer.values, more, Part::Cache)
        })
    }

    /// Tokens seen.
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

impl Network {
    /// `[t, v]` logits of whole sequences.
    pub fn logits<E: Storage>(
        &self,
        mut weights: HostWeights<E>,
        ids: &[i64],
        seq: usize,
        products: &mut Products,
        work: &mut Workspace<E>,
    ) -> Result<Vec<f32>> {
        let texts = Texts::Equal { batch: ids.len() / seq, seq };
        self.hidden_states(&mut weights, ids, texts, products, work, &mut |_, _| {})?;
        let mut pass = self.pass(weights, texts, products, &mut work.low);
        pass.head_logits(&work.stream[0][..ids.len() * self.hidden()], &mut work.scratch)
    }

    /// Fills an empty cache with a prompt; `[v]` logits of the token after it.
    pub fn prefill<E: Storage>(
        &self,
        mut weights: HostWeights<E>,
        ids: &[i64],
        cache: &mut Cache<E>,
        products: &mut Products,
        work: &mut Workspace<E>,
    ) -> Result<Vec<f32>> {
        assert!(cache.is_empty() && !ids.is_empty(), "a prompt for an empty cache");
        let heads = self.heads(1, ids.len());
        cache.reserve(ids.len(), &heads)?;
        let texts = Texts::Equal { batch: 1, seq: ids.len() };
        self.hidden_states(&mut weights, ids, texts, products, work, &mut |number, qkv| {
            cache.layers[number].push(qkv, &heads);
        })?;
        cache.len = ids.len();
        let h = self.hidden();
        let last = (ids.len() - 1) * h;
        let mut pass = self.pass(weights, Texts::Equal { batch: 1, seq: 1 }, products, &mut work.low);
        pass.head_logits(&work.stream[0][last..last + h], &mut work.scratch)
    }

    /// `[n, v]` logits of the tokens after `ids`, which are added to their caches. Those of a text are the same bits whatever others there are.
    pub fn decode<E: Storage>(
        &self,
        weights: HostWeights<E>,
        ids: &[i64],
        caches: &mut [&mut Cache<E>],
        products: &mut Products,
        work: &mut Workspace<E>,
    ) -> Result<Vec<f32>> {
        assert_eq!(ids.len(), caches.len(), "a cache for each token");
        work.resize(&self.decoder, Keep::for_forward(ids.len()))?;
        let one = self.heads(1, 1);
        caches.iter_mut().try_for_each(|cache| cache.reserve(1, &one))?;
        let before: Vec<usize> = caches.iter().map(|cache| cache.len).collect();
        let Workspace { stream, saved, embedded, scratch, low } = work;
        let (x, out, saved) = two(stream, saved);
        let mut products = products.each_alone();
        let texts = Texts::Equal { batch: ids.len(), seq: 1 };
        let mut pass = Pass { before: &before, ..self.pass(weights, texts, &mut products, low) };
        pass.embed(ids, x, embedded, scratch);
        for number in 0..self.wiring.blocks.len() {
            pass.block_forward(number, x, saved, Some(out), scratch, Some(caches));
            std::mem::swap(x, out);
        }
        caches.iter_mut().for_each(|cache| cache.len += 1);
        pass.head_logits(&x[..ids.len() * self.hidden()], scratch)
    }
}
