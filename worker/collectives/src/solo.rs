//! The gang of one rank: every reduction is the identity, every wait is over at once.

use crate::collective::{Activity, Exchange, Gang, Gather, Keep, Pace, Posted, SharedHost, Ticket};
use crate::dtype::{DType, Op};
use crate::error::{CollectiveError, Result};
use crate::memory::{Common, PerRank};
use std::ops::Range;
use std::time::Duration;

/// Rank 0 of 1. Its "shared" buffers are private memory.
#[derive(Debug, Default)]
pub struct Solo {
    generation: u64,
}

impl Solo {
    pub fn new(generation: u64) -> Solo {
        Solo { generation }
    }
}

fn copy(operation: &'static str, input: &[u8], output: &mut [u8]) -> Result<()> {
    if input.len() != output.len() {
        let message = format!("input of {} and output of {} bytes differ", input.len(), output.len());
        return Err(CollectiveError::Refused { operation, message });
    }
    output.copy_from_slice(input);
    Ok(())
}

impl Gang for Solo {
    fn rank(&self) -> usize {
        0
    }
    fn world_size(&self) -> usize {
        1
    }
    fn generation(&self) -> u64 {
        self.generation
    }
    fn set_deadline(&mut self, _deadline: Duration) {}
    fn note(&mut self, _activity: Activity) {}
    fn begin_step(&mut self, _step: u64, _last: Option<Pace>) {}
    fn barrier(&mut self) -> Result<()> {
        Ok(())
    }
    fn all_reduce_f64(&mut self, _values: &mut [f64], _op: Op) -> Result<()> {
        Ok(())
    }
}

impl Exchange for Solo {
    fn all_reduce(&mut self, _data: &mut [u8], _dtype: DType, _op: Op) -> Result<()> {
        Ok(())
    }
    fn reduce_scatter(&mut self, input: &[u8], output: &mut [u8], _dtype: DType, _op: Op) -> Result<()> {
        copy("reduce_scatter", input, output)
    }
    fn all_gather(&mut self, input: &[u8], output: &mut [u8]) -> Result<()> {
        copy("all_gather", input, output)
    }
    fn broadcast(&mut self, _data: &mut [u8], _root: usize) -> Result<()> {
        Ok(())
    }
    fn all_to_all(&mut self, input: &[u8], output: &mut [u8]) -> Result<()> {
        copy("all_to_all", input, output)
    }
    fn allocate_per_rank(&mut self, bytes: usize) -> Result<PerRank> {
        PerRank::private(bytes)
    }
    fn post(&mut self, buffers: &PerRank, bytes: Range<usize>, exchange: Posted) -> Result<Ticket> {
        exchange.check(buffers, &bytes, 1)?;
        if exchange == Posted::AllToAll {
            let mut claim = buffers.claim(bytes);
            let whole = claim.bytes();
            let half = whole.len() / 2;
            whole.copy_within(..half, half);
        }
        Ok(Ticket(0))
    }
    fn progress(&mut self) -> Result<()> {
        Ok(())
    }
    fn pending(&self) -> usize {
        0
    }
    fn wait(&mut self, _ticket: Ticket) -> Result<()> {
        Ok(())
    }
    fn finish(&mut self) -> Result<()> {
        Ok(())
    }
}

impl SharedHost for Solo {
    fn local_rank(&self) -> usize {
        0
    }
    fn local_size(&self) -> usize {
        1
    }
    fn host(&self) -> usize {
        0
    }
    fn size_of_host(&self, host: usize) -> usize {
        usize::from(host == 0)
    }
    fn all_reduce_f64_of_host(&mut self, _values: &mut [f64], _op: Op) -> Result<()> {
        Ok(())
    }
    fn allocate_common(&mut self, bytes: usize) -> Result<Common> {
        Common::private(bytes)
    }
    fn post_reduce(
        &mut self,
        buffers: &PerRank,
        bytes: Range<usize>,
        dtype: DType,
        _op: Op,
        _keep: Keep,
    ) -> Result<Ticket> {
        buffers.check(&bytes, dtype).map(|()| Ticket(0))
    }
    fn post_gather_of_host(
        &mut self,
        buffers: &PerRank,
        bytes: Range<usize>,
        dtype: DType,
    ) -> Result<Ticket> {
        self.post(buffers, bytes, Posted::AllGather(dtype))
    }
    fn post_gather(&mut self, gather: Gather<'_>) -> Result<Ticket> {
        let own = gather.check(0, 1)?;
        gather.place_own(own);
        Ok(Ticket(0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_rank_keeps_its_data_and_refuses_wrong_sizes() {
        let mut solo = Solo::new(7);
        let mut values = [1.5, -2.0];
        solo.all_reduce_f64(&mut values, Op::Sum).unwrap();
        assert_eq!(values, [1.5, -2.0]);
        let mut out = [0u8; 3];
        solo.all_gather(&[1, 2, 3], &mut out).unwrap();
        assert_eq!(out, [1, 2, 3]);
        assert!(solo.all_to_all(&[1, 2], &mut out).is_err());
        let grads = solo.allocate_per_rank(8).unwrap();
        grads.write(0, &2.5f32.to_ne_bytes());
        solo.post_reduce(&grads, 0..8, DType::F32, Op::Sum, Keep::MyPart).unwrap();
        solo.finish().unwrap();
        let mut four = [0u8; 4];
        grads.read(0, &mut four);
        assert_eq!(f32::from_ne_bytes(four), 2.5);
        assert!(solo.post_reduce(&grads, 0..9, DType::F32, Op::Sum, Keep::MyPart).is_err());
        assert!(solo.post_reduce(&grads, 4..12, DType::F32, Op::Sum, Keep::MyPart).is_err());
        let ticket = solo.post(&grads, 0..8, Posted::AllToAll).unwrap();
        solo.wait(ticket).unwrap();
        grads.read(4, &mut four);
        assert_eq!(f32::from_ne_bytes(four), 2.5);
        assert!(solo.post(&grads, 0..7, Posted::AllToAll).is_err());
    }
}
