//! Kernels for what libtorch leaves unfused on CUDA. They are tried against libtorch's own operations before they are used; where they cannot
//! be compiled or compute something else, libtorch's are taken. Norms, attention and the optimizer are fused in libtorch already.

use crate::Result;
use crate::network::{activated, turned};
use crate::shim::fused::Fused;
use fleet_common::model::Activation;
use std::sync::{Mutex, PoisonError};
use tch::{Device, Kind, Tensor};

/// Kernels for `kind` on `device`, or why there are none. They are compiled once in a process, and live as long as it.
pub fn open(device: Device, kind: Kind) -> Result<&'static Fused, String> {
    type Opened = ((usize, Kind), Result<&'static Fused, String>);
    static OPENED: Mutex<Vec<Opened>> = Mutex::new(Vec::new());
    let Device::Cuda(number) = device else { return Err("they are for CUDA".into()) };
    if kind == Kind::Half {
        return Err("they are for fp32 and bf16".into());
    }
    let mut opened = OPENED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((_, known)) = opened.iter().find(|(of, _)| *of == (number, kind)) {
        return known.clone();
    }
    let made = checked(device, kind, number);
    opened.push(((number, kind), made.clone()));
    made
}

fn checked(device: Device, kind: Kind, number: usize) -> Result<&'static Fused, String> {
    let fused: &'static Fused = Box::leak(Box::new(Fused::compile(kind, number)?));
    match check(fused, device, kind) {
        Ok(None) => Ok(fused),
        Ok(Some(what)) => Err(format!("{what} differs from libtorch's")),
        Err(error) => Err(error.to_string()),
    }
}

/// The name of the first kernel whose results are others than those of libtorch's operations.
fn check(fused: &'static Fused, device: Device, kind: Kind) -> Result<Option<&'static str>> {
    let tolerance = if kind == Kind::BFloat16 { 2e-2 } else { 1e-4 };
    // Against the size of each number, where that is more than one.
    let same = |a: &Tensor, b: &Tensor| -> Result<bool> {
        let (a, b) = (a.f_to_kind(Kind::Float)?, b.f_to_kind(Kind::Float)?);
        let far = a.f_sub(&b)?.f_abs()?.f_div(&b.f_abs()?.f_clamp_min(1.0)?)?.f_max()?;
        Ok(f64::try_from(&far)? < tolerance)
    };
    // Between -3 and 3, always the same.
    let numbers = |shape: &[i64]| -> Result<Tensor> {
        let count: i64 = shape.iter().product();
        let at = Tensor::f_arange(count, (Kind::Float, device))?;
        Ok(at.f_mul_scalar(0.73)?.f_sin()?.f_mul_scalar(3.0)?.f_view(shape)?.f_to_kind(kind)?)
    };
    // Both ways forward and back, with the same seed of gradients.
    let both = |x: &Tensor,
                own: &dyn Fn(&Tensor) -> Result<Tensor>,
                plain: &dyn Fn(&Tensor) -> Result<Tensor>|
     -> Result<bool> {
        let run = |compute: &dyn Fn(&Tensor) -> Result<Tensor>| -> Result<(Tensor, Tensor)> {
            let x = x.f_detach()?.set_requires_grad(true);
            let out = compute(&x)?;
            let seed = out.f_ones_like()?.f_cumsum(-1, kind)?.f_div_scalar(out.size()[out.dim() - 1])?;
            let grads = crate::shim::grad(&out, &seed, &[&x])?;
            let flow = grads.into_iter().next().flatten().map_or_else(|| x.f_zeros_like(), Ok)?;
            Ok((out, flow))
        };
        let ((a, da), (b, db)) = (run(own)?, run(plain)?);
        Ok(same(&a, &b)? && same(&da, &db)?)
    };

    // More numbers than a block has threads.
    let x = numbers(&[2, 5, 602 * 2])?;
    let plain = |x: &Tensor| -> Result<Tensor> {
        Ok(activated(&x.f_narrow(-1, 0, 602)?, Activation::Silu)?.f_mul(&x.f_narrow(-1, 602, 602)?)?)
    };
    if !both(&x, &|x| fused.swiglu(x), &plain)? {
        return Ok(Some("SwiGLU"));
    }
    // Heads of ten numbers, eight of them turned, beside others that are not looked at.
    let x = numbers(&[2, 5, 104, 10])?;
    let angles = numbers(&[5, 4])?.f_to_kind(Kind::Float)?;
    let turn = (angles.f_cos()?, angles.f_sin()?);
    let cut = |x: &Tensor| -> Result<Tensor> { Ok(x.f_narrow(2, 0, 103)?) };
    if !both(&x, &|x| fused.rotary(&cut(x)?, &turn), &|x| turned(&cut(x)?, &turn))? {
        return Ok(Some("rotary embedding"));
    }
    let (rows, vocab) = (4, 5003);
    let logits = numbers(&[rows, vocab])?.f_mul_scalar(4.0)?;
    let targets = Tensor::f_from_slice(&[0i64, 5002, 7, 500])?.f_to_device(device)?;
    let weights = Tensor::f_from_slice(&[1f32, 2.0, 0.0, 0.5])?.f_to_device(device)?;
    let logs = logits.f_log_softmax(-1, Kind::Float)?;
    let at = targets.f_unsqueeze(1)?;
    let want = logs.f_gather(1, &at, false)?.f_squeeze_dim(1)?.f_mul(&weights)?.f_neg()?;
    let flow = logs.f_exp()?;
    let minus = Tensor::f_full([rows, 1], -1.0, (Kind::Float, device))?;
    let _ = flow.shallow_clone().f_scatter_add_(1, &at, &minus)?;
    let flow = flow.f_mul(&weights.f_unsqueeze(1)?)?;
    let losses = fused.cross_entropy(&logits, &targets, &weights, Some(1.0))?;
    if !same(&losses, &want)? || !same(&logits.f_to_kind(Kind::Float)?, &flow)? {
        return Ok(Some("cross-entropy"));
    }
    Ok(None)
}
