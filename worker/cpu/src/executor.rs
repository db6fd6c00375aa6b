//! The executor as training and generation use it: a network, its products, and the memory of a pass. A pass runs inside the threads' pool, which
//! keeps them awake from product to product.

use crate::decode::Cache;
use crate::network::Network;
use crate::product::{Products, Storage};
use crate::workspace::Workspace;
use fleet_common::model::Layout;
use fleet_learn::{Batch, Executor, Host, HostWeights, Result, Tally, UnitWeights, Units, Workers};
use std::sync::Arc;

pub struct CpuExecutor<E> {
    network: Network,
    products: Products,
    work: Workspace<E>,
    /// Of so many blocks the forward is computed a second time.
    again: usize,
    /// Summed since it was asked for.
    loss: f64,
}

impl<E: Storage> CpuExecutor<E> {
    pub fn new(network: Network, workers: Arc<Workers>) -> CpuExecutor<E> {
        CpuExecutor { network, products: Products::new(workers), work: Workspace::new(), again: 0, loss: 0.0 }
    }

    /// Of the first `blocks` blocks nothing is kept between forward and backward but what they read (activation checkpointing).
    pub fn computing_again(mut self, blocks: usize) -> CpuExecutor<E> {
        self.again = blocks;
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
        let workers = self.products.shared_workers();
        workers.inside(|| work(&self.network, &mut self.products, &mut self.work))
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

    /// `[v]` logits of the token after `id`, which is added to the cache.
    pub fn decode(&mut self, weights: HostWeights<E>, id: i64, cache: &mut Cache<E>) -> Result<Vec<f32>> {
        self.network.reach(cache.len() + 1);
        self.pass(|network, products, work| network.decode(weights, id, cache, products, work))
    }
}

impl<E: Storage> Executor<Host<E>> for CpuExecutor<E> {
    fn layout(&self) -> &Layout {
        &self.network.layout
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

    fn forward_backward(&mut self, units: &mut dyn Units<Host<E>>, batch: &Batch, scale: f32) -> Result<()> {
        let how = (scale, self.again);
        self.loss +=
            self.pass(|network, products, work| network.forward_backward(units, batch, how, products, work))?;
        Ok(())
    }

    fn take_loss(&mut self) -> Result<f64> {
        Ok(std::mem::take(&mut self.loss))
    }

    fn evaluate(&mut self, units: &mut dyn UnitWeights<Host<E>>, batch: &Batch) -> Result<Tally> {
        self.pass(|network, products, work| network.loss(units, batch, products, work))
    }
}
