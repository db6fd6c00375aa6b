//! The feed-forward network of a block.

use crate::block::Pass;
use crate::product::{Out, Storage};
use fleet_common::model;
use fleet_kernels::{self as kernels, Activation};
use fleet_learn::Gradients;

fn activation(activation: model::Activation) -> Activation {
    match activation {
        model::Activation::Silu => Activation::Silu,
        model::Activation::Gelu => Activation::Gelu,
        model::Activation::GeluTanh => Activation::GeluTanh,
        model::Activation::Relu => Activation::Relu,
    }
}

impl<E: Storage> Pass<'_, E> {
    /// `up`, `[t, f]` or `[t, 2 f]`, of `x_th`.
    pub(crate) fn mlp_up(&mut self, number: usize, x: &[E], up: &mut [E]) {
        self.linear(x, &self.network.wiring.blocks[number].up, up);
    }

    /// `out_th += down(activation(up))`.
    pub(crate) fn mlp_down(&mut self, number: usize, up: &[E], inner: &mut [E], out: &mut [f32]) {
        let block = &self.network.wiring.blocks[number];
        let (t, f, kind) = self.mlp_shape();
        let (up, inner) = (&up[..t * block.up.outputs], &mut inner[..t * f]);
        let rows = self.workers().share(t, 1);
        let gated = self.network.decoder.mlp.gated;
        let pieces = up.chunks(rows * block.up.outputs).zip(inner.chunks_mut(rows * f));
        self.workers().each(pieces, |(up, inner)| match gated {
            true => kernels::gated(up, f, kind, inner),
            false => kernels::activate(up, kind, inner),
        });
        self.linear_add(inner, &block.down, out);
    }

    /// For `gn_th`, the gradient of the network's output: those of its weights, and `up` becomes its own gradient. `x_th`: what it read,
    /// written anew by `normed`.
    pub(crate) fn mlp_backward(
        &mut self,
        number: usize,
        gn: &[E],
        up: &mut [E],
        inner: &mut [E],
        sums: &mut Vec<f32>,
        sink: &mut dyn Gradients,
    ) {
        let block = &self.network.wiring.blocks[number];
        let (t, f, kind) = self.mlp_shape();
        let (up, inner) = (&mut up[..t * block.up.outputs], &mut inner[..t * f]);
        self.linear_input_backward(gn, &block.down, Out::Store(inner));
        let rows = self.workers().share(t, 1);
        let gated = self.network.decoder.mlp.gated;
        let pieces = up.chunks_mut(rows * block.up.outputs).zip(inner.chunks_mut(rows * f));
        self.workers().each(pieces, |(up, inner)| match gated {
            true => kernels::gated_backward(up, f, kind, inner),
            false => kernels::activate_backward(up, kind, inner),
        });
        self.linear_weight_backward(gn, inner, &block.down, sums, sink);
    }

    fn mlp_shape(&self) -> (usize, usize, Activation) {
        let mlp = &self.network.decoder.mlp;
        (self.tokens(), mlp.size, activation(mlp.activation))
    }
}
