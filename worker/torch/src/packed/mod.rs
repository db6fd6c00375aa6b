//! Matrices of a model that is not trained in few bits, widened when they are read: on the CPU where the host has them, on another device by that.

mod device;
mod host;

use crate::{Error, Result};
use device::OnDevice;
use fleet_learn::adapter;
use host::OnHost;
use std::ops::Range;
use tch::{Device, Kind, Tensor};

pub struct Packed(Kept);

enum Kept {
    Host(OnHost),
    Device(OnDevice),
}

impl Packed {
    /// Of what is in the memory of the host, a copy where `device` is another one; on the CPU so many threads widen.
    pub fn new(host: adapter::Packed, kind: Kind, device: Device, threads: usize) -> Result<Packed> {
        Ok(Packed(match device {
            Device::Cpu => Kept::Host(OnHost::new(host, kind, threads)?),
            device => Kept::Device(OnDevice::new(&host, kind, device)?),
        }))
    }

    /// Whether any of a product's weight is here.
    pub fn has(&self, weight: &Range<usize>) -> bool {
        match &self.0 {
            Kept::Host(host) => host.has(weight),
            Kept::Device(device) => device.has(weight),
        }
    }

    /// A product's weight, `[outputs, inputs]`, which may be several matrices one below the other.
    pub fn widen(&self, weight: &Range<usize>) -> Result<Tensor> {
        match &self.0 {
            Kept::Host(host) => host.widen(weight),
            Kept::Device(device) => device.widen(weight),
        }
    }
}

fn in_part() -> Error {
    Error::of("a product is in few bits in part, which executor = \"cpu\" alone computes; set it")
}

#[cfg(test)]
mod tests {
    use super::*;
    use fleet_checkpoint::ModelDir;
    use fleet_common::job::Quantization;
    use fleet_common::model::{Linear, Parameter};
    use fleet_learn::Workers;
    use fleet_learn::adapter::{self, FewBits, read_numbers};
    use std::path::Path;
    use std::sync::Arc;

    /// Also three matrices that are one product, and one whose rows files have in another order.
    #[test]
    fn what_is_widened_is_what_the_host_widens() {
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/parity/golden");
        for (model, (word, quantization)) in ["gqa", "families/bloom"]
            .into_iter()
            .flat_map(|model| Quantization::ALL.map(|kind| (model, kind)))
        {
            let name = format!("{model} {word}");
            let dir = ModelDir::open(&golden.join(model)).unwrap();
            let wiring = dir.wiring();
            let product = &wiring.blocks[1].qkv;
            let few = match FewBits::of(&dir, Some(quantization)) {
                Err(error) if model != "gqa" && word.starts_with("hqq") => {
                    assert!(error.to_string().contains("groups of 64"), "{name}: {error}");
                    continue;
                }
                few => few.unwrap(),
            };
            let mut gang = fleet_collectives::Solo::new(0);
            let mut read = |p: &Parameter, out: &mut [f32]| read_numbers(&dir, p.range.start, out, 1);
            let host = adapter::Packed::read(&dir, few, &mut gang, &mut read).unwrap();
            let mut wanted = vec![0.0f32; product.weight.len()];
            let (all, plain) =
                (host.outputs(&product.weight), |_: &Range<usize>| unreachable!("all is packed"));
            let workers = Workers::new(1, || ()).unwrap();
            host.widen((&product.weight, &all), plain, &mut wanted, &workers);
            let on_device = OnDevice::new(&host, Kind::Float, Device::Cpu).unwrap();
            let on_host = Packed::new(host, Kind::Float, Device::Cpu, 2).unwrap();
            for packed in [on_host, Packed(Kept::Device(on_device))].map(Arc::new) {
                is_the_same(&packed, product, &wanted, &name);
            }
        }
    }

    fn is_the_same(packed: &Arc<Packed>, product: &Linear, wanted: &[f32], name: &str) {
        let wide = packed.widen(&product.weight).unwrap();
        assert_eq!(wide.size(), [product.outputs as i64, product.inputs as i64], "{name}");
        assert_eq!(Vec::<f32>::try_from(&wide.view([-1])).unwrap(), wanted, "{name}");

        // What a graph has of it is another hand on it, until it is gone.
        let x = Tensor::ones([2, product.inputs as i64], (Kind::Float, Device::Cpu)).set_requires_grad(true);
        let y = crate::shim::widened::product(&x, packed, &product.weight).unwrap();
        assert!(y.allclose(&x.linear::<&Tensor>(&wide, None), 1e-5, 1e-5, false));
        assert_eq!(Arc::strong_count(packed), 2);
        let seed = Tensor::ones_like(&y.detach());
        let grad = crate::shim::grad(&y, &seed, &[&x]).unwrap().remove(0).unwrap();
        assert!(grad.allclose(&seed.matmul(&wide), 1e-4, 1e-4, false), "{name}");
        drop(y);
        assert_eq!(Arc::strong_count(packed), 1);
    }

    /// Memory in which a matrix is widened is used again, but not while somebody reads what is there.
    #[test]
    fn a_room_is_used_again_when_its_tensor_is_gone() {
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/parity/golden/gqa");
        let dir = ModelDir::open(&golden).unwrap();
        let wiring = dir.wiring();
        let [first, second] = [&wiring.blocks[0].up.weight, &wiring.blocks[1].up.weight];
        for kind in [Kind::Float, Kind::BFloat16, Kind::Half] {
            let few = FewBits::of(&dir, Some(Quantization::Nf4)).unwrap();
            let mut read = |p: &Parameter, out: &mut [f32]| read_numbers(&dir, p.range.start, out, 1);
            let host =
                adapter::Packed::read(&dir, few, &mut fleet_collectives::Solo::new(0), &mut read).unwrap();
            let packed = Packed::new(host, kind, Device::Cpu, 1).unwrap();
            let numbers =
                |wide: &Tensor| Vec::<f32>::try_from(&wide.to_kind(Kind::Float).view([-1])).unwrap();
            let wide = packed.widen(first).unwrap();
            let was = (wide.data_ptr(), numbers(&wide));
            let other = packed.widen(second).unwrap();
            assert!(wide.kind() == kind && numbers(&wide) == was.1 && numbers(&other) != was.1, "{kind:?}");
            drop((wide, other));
            let again = packed.widen(first).unwrap();
            assert_eq!(numbers(&again), was.1, "{kind:?}");
            let Kept::Host(host) = &packed.0 else { unreachable!("it is the CPU") };
            assert_eq!(host.rooms.lock().unwrap().len(), if kind == Kind::Half { 1 } else { 2 });
        }
    }
}
