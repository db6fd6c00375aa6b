//! The executor as training and generation use it: a network, its products, and the memory of a pass. A pass runs inside the threads' pool, which
//! keeps them awake from product to product.

use crate::decode::Cache;
use crate::network::{Network, Way};
use crate::product::{Products, Storage};
use crate::workspace::Workspace;
use fleet_common::model::Layout;
use fleet_kernels as kernels;
use fleet_learn::adapter::{Frozen, Trained};
use fleet_learn::{
    Batch, Executor, Gradients, Host, HostWeights, Result, Tally, UnitWeights, Units, Weigh, Which, Workers,
};
use std::ops::Range;
use std::sync::Arc;

pub struct CpuExecutor<E> {
    network: Network,
    products: Products,
    work: Workspace<E>,
    /// Of so many blocks the forward is computed a second time.
    again: usize,
    /// Summed since it was asked for.
    loss: f64,
    /// What is not trained, where an adapter is.
    base: Option<Base<E>>,
}

/// A frozen model, and what is trained beside it.
struct Base<E> {
    frozen: Frozen<E>,
    trained: Trained,
}

/// An adapter's weights, seen as the model's.
struct Beside<'a, U: ?Sized, E> {
    units: &'a mut U,
    base: &'a Base<E>,
}

impl<U: UnitWeights<Host<E>> + ?Sized, E: Storage> UnitWeights<Host<E>> for Beside<'_, U, E> {
    fn need(&mut self, unit: usize) -> Result<()> {
        self.units.need(unit)
    }
    fn release(&mut self, unit: usize) {
        self.units.release(unit);
    }
    fn weights(&self) -> HostWeights<'_, E> {
        self.units.weights().beside(self.base.frozen.weights(), &self.base.trained)
    }
}

impl<U: Units<Host<E>> + ?Sized, E: Storage> Units<Host<E>> for Beside<'_, U, E> {
    fn numbers(&mut self) -> (HostWeights<'_, E>, &mut dyn Gradients) {
        let (weights, sink) = self.units.numbers();
        (weights.beside(self.base.frozen.weights(), &self.base.trained), sink)
    }
    fn ready(&mut self, unit: usize) -> Result<()> {
        self.units.ready(unit)
    }
}

impl<E: Storage> CpuExecutor<E> {
    pub fn new(network: Network, workers: Arc<Workers>) -> CpuExecutor<E> {
        CpuExecutor {
            network,
            products: Products::new(workers),
            work: Workspace::new(),
            again: 0,
            loss: 0.0,
            base: None,
        }
    }

    /// Of the first `blocks` blocks nothing is kept between forward and backward but what they read (activation checkpointing).
    pub fn computing_again(mut self, blocks: usize) -> CpuExecutor<E> {
        self.again = blocks;
        self
    }

    /// Trains an adapter beside a model that stays as it is.
    pub fn beside(mut self, frozen: Frozen<E>, trained: Trained) -> CpuExecutor<E> {
        self.base = Some(Base { frozen, trained });
        self
    }

    pub fn network(&self) -> &Network {
        &self.network
    }

    /// Does `work` on one of the threads.
    fn pass<R: Send>(
        &mut self,
        work: impl FnOnce(&Network, &mut Products, &mut Workspace<E>) -> R + Send,
    ) -> R {
        self.pass_beside(|network, products, work_room, _| work(network, products, work_room))
    }

    /// The same, with the model that stays as it is.
    fn pass_beside<R: Send>(
        &mut self,
        work: impl FnOnce(&Network, &mut Products, &mut Workspace<E>, Option<&Base<E>>) -> R + Send,
    ) -> R {
        let workers = self.products.shared_workers();
        workers.inside(|| work(&self.network, &mut self.products, &mut self.work, self.base.as_ref()))
    }

    /// Of weights in few bits at most so many numbers are widened at a time, where nothing is trained: the memory of long products is spared.
    pub fn widening(mut self, numbers: usize) -> CpuExecutor<E> {
        self.products.widened = numbers;
        self
    }

    /// The weights are others from now on: nothing of them is kept.
    pub fn forget(&mut self) {
        self.work = Workspace::new();
    }

    /// From now on for texts that begin with so many tokens.
    pub fn made_for(&mut self, positions: usize) {
        self.network.made_for(positions);
    }

    /// `[t, v]` logits of whole sequences of `seq` tokens.
    pub fn logits(&mut self, weights: HostWeights<E>, ids: &[i64], seq: usize) -> Result<Vec<f32>> {
        self.pass(|network, products, work| network.logits(weights, ids, seq, products, work))
    }

    /// Fills an empty cache with a prompt; `[v]` logits of the token after it.
    pub fn prefill(
        &mut self,
        weights: HostWeights<E>,
        ids: &[i64],
        cache: &mut Cache<E>,
    ) -> Result<Vec<f32>> {
        self.pass(|network, products, work| network.prefill(weights, ids, cache, products, work))
    }

    /// `[n, v]` logits of the tokens after `ids`, which are added to their caches: each text's bits are the same whatever others there are.
    pub fn decode(
        &mut self,
        weights: HostWeights<E>,
        ids: &[i64],
        caches: &mut [&mut Cache<E>],
    ) -> Result<Vec<f32>> {
        self.network.reach(caches.iter().map(|cache| cache.len() + 1).max().unwrap_or(0));
        self.pass(|network, products, work| network.decode(weights, ids, caches, products, work))
    }
}

impl<E: Storage> Executor<Host<E>> for CpuExecutor<E> {
    fn layout(&self) -> &Layout {
        self.base.as_ref().map_or(&self.network.wiring.layout, |base| &base.trained.layout)
    }

    fn name(&self) -> &'static str {
        "cpu"
    }

    fn device(&self) -> String {
        "cpu".into()
    }

    fn describe(&self) -> String {
        format!("{} threads, {}", self.products.workers().count(), self.products.describe::<E>())
    }

    fn forward_weigh_backward(
        &mut self,
        units: &mut dyn Units<Host<E>>,
        batch: &Batch,
        scale: f32,
        weigh: Option<&mut Weigh>,
    ) -> Result<()> {
        let way = Way { scale, again: self.again, weigh };
        self.loss += self.pass_beside(|network, products, work, base| match base {
            None => network.forward_backward(units, batch, way, products, work),
            Some(base) => network.forward_backward(&mut Beside { units, base }, batch, way, products, work),
        })?;
        Ok(())
    }

    fn take_loss(&mut self) -> Result<f64> {
        Ok(std::mem::take(&mut self.loss))
    }

    fn row_lengths(&self, weight: &Range<usize>, first: usize, out: &mut [f32]) {
        let base = self.base.as_ref().expect("an adapter is trained beside a model");
        let weights = base.frozen.weights();
        let of = |numbers: &[E]| {
            let p = self.network.wiring.layout.parameters.iter().find(|p| p.range == *weight);
            let width = p.expect("a matrix of the model").shape[1];
            let rows = numbers.chunks_exact(width).skip(first);
            rows.zip(out).for_each(|(row, out)| *out = kernels::sum_squares(row).sqrt() as f32);
        };
        match weights.packed(weight) {
            None => of(weights.of(weight)),
            Some(packed) => {
                let mut wide = vec![E::default(); weight.len()];
                let outputs = packed.outputs(weight);
                let plain = |range: &Range<usize>| weights.of(range);
                packed.widen((weight, &outputs), plain, &mut wide, self.products.workers());
                of(&wide);
            }
        }
    }

    fn losses(
        &mut self,
        units: &mut dyn UnitWeights<Host<E>>,
        batch: &Batch,
        which: Which,
    ) -> Result<Vec<f64>> {
        self.pass_beside(|network, products, work, base| match (base, which) {
            (None, _) => network.losses(units, batch, products, work),
            (Some(base), Which::Trained) => {
                network.losses(&mut Beside { units, base }, batch, products, work)
            }
            (Some(base), Which::Base) => {
                let batch = Batch { noise: None, ..*batch };
                network.losses(&mut base.frozen.weights(), &batch, products, work)
            }
        })
    }

    fn evaluate(&mut self, units: &mut dyn UnitWeights<Host<E>>, batch: &Batch) -> Result<Tally> {
        self.pass_beside(|network, products, work, base| match base {
            None => network.loss(units, batch, products, work),
            Some(base) => network.loss(&mut Beside { units, base }, batch, products, work),
        })
    }
}
