//! What adapters do not see in a training step, found on the device: to the last bit what `fleet_learn::dropout` drops.

use crate::{Result, device};
use fleet_learn::dropout;
use tch::{Kind, Tensor};

/// Rows that a product reads, of a batch of sequences of one length.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a> {
    /// Of each sequence.
    pub noise: &'a [u64],
    /// Tokens of a sequence.
    pub seq: usize,
    /// Tokens of the batch before the first row.
    pub first: usize,
}

/// Numbers that are decided by one draw.
const LANES: i64 = 4;
/// Random bits that decide over one number.
const BITS: i64 = 16;

/// What of `x`, `[.., inputs]`, an adapter sees at the product whose weight begins at `weight`: about `share` of it is zero, the rest larger.
pub fn seen(x: &Tensor, rows: Rows, weight: usize, share: f32) -> Result<Tensor> {
    if share >= 1.0 {
        return Ok(x.f_zeros_like()?);
    }
    let inputs = *x.size().last().unwrap_or(&1);
    let count = x.size().iter().product::<i64>() / inputs;
    let seeds = (rows.first..).take(count as usize).map(|at| {
        dropout::of_row(rows.noise[at / rows.seq], weight, at % rows.seq) as i64 // the same bits
    });
    let seeds = device::to(&Tensor::f_from_slice(&seeds.collect::<Vec<i64>>())?, x.device())?;
    let dropped = dropped(&seeds, inputs, share)?.f_view(x.size().as_slice())?;
    Ok(x.f_mul_scalar(f64::from(1.0 / (1.0 - share)))?.f_masked_fill(&dropped, 0.0)?)
}

/// `[t, inputs]`: what is dropped of rows with these seeds, `[t]`.
fn dropped(seeds: &Tensor, inputs: i64, share: f32) -> Result<Tensor> {
    let _guard = tch::no_grad_guard();
    let on = (Kind::Int64, seeds.device());
    let draws = (inputs + LANES - 1) / LANES;
    let steps = Tensor::f_arange(draws, on)?.f_mul_scalar(0x9e37_79b9_7f4a_7c15_u64 as i64)?;
    let bits = mixed(&seeds.f_unsqueeze(1)?.f_add(&steps.f_unsqueeze(0)?)?)?;
    let below = (share * (1 << BITS) as f32) as i64;
    let lane = |number: i64| -> Result<Tensor> {
        let bits = bits.f_bitwise_right_shift_tensor_scalar(number * BITS)?;
        Ok(bits.f_bitwise_and((1 << BITS) - 1)?.f_lt(below)?)
    };
    let lanes = (0..LANES).map(lane).collect::<Result<Vec<Tensor>>>()?;
    Ok(Tensor::f_stack(&lanes, 2)?.f_view([-1, draws * LANES])?.f_narrow(1, 0, inputs)?.f_contiguous()?)
}

/// The finaliser of splitmix64. libtorch's products of whole numbers wrap; its shifts keep the sign.
pub(crate) fn mixed(z: &Tensor) -> Result<Tensor> {
    let shifted = |z: &Tensor, by: i64| -> Result<Tensor> {
        let right = z.f_bitwise_right_shift_tensor_scalar(by)?.f_bitwise_and((1 << (64 - by)) - 1)?;
        Ok(z.f_bitwise_xor_tensor(&right)?)
    };
    let z = shifted(z, 30)?.f_mul_scalar(0xbf58_476d_1ce4_e5b9_u64 as i64)?;
    let z = shifted(&z, 27)?.f_mul_scalar(0x94d0_49bb_1331_11eb_u64 as i64)?;
    shifted(&z, 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_dropped_is_what_the_host_drops() {
        let noise = [dropout::of_sequence(1, 2, 3), u64::MAX, 0];
        for (inputs, share) in [(64, 0.05f32), (7, 0.5), (1, 0.3), (130, 1.0), (12, 0.999)] {
            let (seq, first) = (5, 3);
            let values: Vec<f32> = (0..12 * inputs).map(|at| at as f32 - 7.3).collect();
            let mut wanted = values.clone();
            for (at, row) in (first..).zip(wanted.chunks_mut(inputs)) {
                dropout::apply(dropout::of_row(noise[at / seq], 192, at % seq), share, row);
            }
            let x = Tensor::from_slice(&values).view([3, 4, inputs as i64]);
            let found = seen(&x, Rows { noise: &noise, seq, first }, 192, share).unwrap();
            assert_eq!(Vec::<f32>::try_from(&found.view([-1])).unwrap(), wanted, "{inputs} {share}");
        }
    }
}
