//! Noise on embeddings in training, found on the device: to the last bit that of `fleet_learn::neftune`, but for how products of it are rounded.

use crate::dropout::mixed;
use crate::{Result, device};
use fleet_learn::neftune;
use tch::{Kind, Tensor};

/// Numbers that are moved by one draw.
const LANES: i64 = 2;
/// Random bits that say how far one number is moved.
const BITS: i64 = 32;

/// How embeddings of a batch are moved.
#[derive(Clone, Copy, Debug)]
pub struct Moving<'a> {
    /// `[b]`, of each sequence.
    pub noise: &'a [u64],
    /// `[b]`.
    pub lengths: &'a [usize],
    pub alpha: f32,
}

/// Embeddings `x`, `[b, s, e]`, moved by at most `alpha / sqrt(length e)`.
pub fn moved(x: &Tensor, moving: &Moving) -> Result<Tensor> {
    let Moving { noise, lengths, alpha } = *moving;
    let [b, s, e] = x.size()[..] else { unreachable!("embeddings of a batch") };
    let tokens = || noise.iter().flat_map(|noise| (0..s as usize).map(move |token| (noise, token)));
    let seeds: Vec<i64> = tokens().map(|(noise, token)| neftune::seed(*noise, token) as i64).collect(); // the same bits
    let most: Vec<f32> = lengths.iter().map(|length| neftune::most(alpha, *length, e as usize)).collect();
    let on_device = |tensor: Tensor| device::to(&tensor, x.device());
    let seeds = on_device(Tensor::f_from_slice(&seeds)?)?;
    let most = on_device(Tensor::f_from_slice(&most)?)?.f_view([b, 1, 1])?;
    let draws = (e + LANES - 1) / LANES;
    let steps =
        Tensor::f_arange(draws, (Kind::Int64, x.device()))?.f_mul_scalar(0x9e37_79b9_7f4a_7c15_u64 as i64)?;
    let bits = mixed(&seeds.f_unsqueeze(1)?.f_add(&steps.f_unsqueeze(0)?)?)?;
    // Both keep the sign.
    let low = bits.f_bitwise_left_shift_tensor_scalar(BITS)?.f_bitwise_right_shift_tensor_scalar(BITS)?;
    let high = bits.f_bitwise_right_shift_tensor_scalar(BITS)?;
    let both = Tensor::f_stack(&[low, high], 2)?.f_view([b, s, draws * LANES])?.f_narrow(2, 0, e)?;
    let by = both.f_to_kind(Kind::Float)?.f_div_scalar((1i64 << (BITS - 1)) as f64)?.f_mul(&most)?;
    Ok(x.f_add(&by.f_to_kind(x.kind())?)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use fleet_learn::dropout;

    #[test]
    fn embeddings_are_moved_as_on_the_host() {
        let (noise, lengths, s) = ([dropout::of_sequence(1, 2, 3), u64::MAX], [5, 3], 5);
        for e in [1, 8, 13] {
            let x: Vec<f32> = (0..2 * s * e).map(|at| at as f32 / 7.0).collect();
            let mut wanted = x.clone();
            for (at, row) in wanted.chunks_mut(e).enumerate() {
                neftune::apply(noise[at / s], 5.0, (at % s, lengths[at / s]), row);
            }
            let x = Tensor::from_slice(&x).view([2, s as i64, e as i64]);
            let moving = Moving { noise: &noise, lengths: &lengths, alpha: 5.0 };
            let found = Vec::<f32>::try_from(&moved(&x, &moving).unwrap().view([-1])).unwrap();
            let far = found.iter().zip(&wanted).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(far < 1e-5, "{e}: {far}");
        }
    }
}
