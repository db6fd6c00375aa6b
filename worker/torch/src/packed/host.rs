//! Codes and scales in the memory of the host, which its ranks share, widened by the kernels of the CPU into memory that is used again.

use crate::shim::{self, Wide};
use crate::{Error, Result};
use fleet_kernels::Element;
use fleet_learn::{Workers, adapter};
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use tch::{Kind, Tensor};

pub(super) struct OnHost {
    packed: adapter::Packed,
    workers: Workers,
    /// To which matrices are widened.
    kind: Kind,
    /// Where they are: one for each that is read at a time, which is mostly one.
    pub(super) rooms: Mutex<Vec<Arc<Wide>>>,
}

impl OnHost {
    pub fn new(packed: adapter::Packed, kind: Kind, threads: usize) -> Result<OnHost> {
        let workers = Workers::new(threads as u32, || ())
            .map_err(|e| Error::of(&format!("no threads can be started: {e}")))?;
        Ok(OnHost { packed, workers, kind, rooms: Mutex::default() })
    }

    pub fn has(&self, weight: &Range<usize>) -> bool {
        self.packed.has(weight)
    }

    /// `[outputs, inputs]`. Its memory gets other numbers when nothing reads the tensor any more.
    pub fn widen(&self, weight: &Range<usize>) -> Result<Tensor> {
        let outputs = self.packed.outputs(weight);
        let shape = [outputs.len() as i64, (weight.len() / outputs.len().max(1)) as i64];
        let mut room = self.room();
        match Arc::get_mut(&mut room).expect("nobody else has it") {
            Wide::Fp32(numbers) => self.fill(weight, &outputs, numbers)?,
            Wide::Bf16(numbers) => self.fill(weight, &outputs, numbers)?,
        }
        let wide = shim::lent(room.clone(), weight.len())?.f_view(shape)?.f_to_kind(self.kind)?;
        self.rooms.lock().unwrap_or_else(PoisonError::into_inner).push(room);
        Ok(wide)
    }

    fn fill<E: Element>(
        &self,
        weight: &Range<usize>,
        outputs: &Range<usize>,
        room: &mut Vec<E>,
    ) -> Result<()> {
        if !self.packed.rows(weight, outputs, outputs.len()).1.is_empty() {
            return Err(super::in_part());
        }
        if room.len() < weight.len() {
            // What is there is of no use while it is made anew.
            *room = Vec::new();
            *room = vec![E::default(); weight.len()];
        }
        let plain = |_: &Range<usize>| unreachable!("all rows are packed");
        self.packed.widen((weight, outputs), plain, &mut room[..weight.len()], &self.workers);
        Ok(())
    }

    /// One that no tensor reads.
    fn room(&self) -> Arc<Wide> {
        let mut rooms = self.rooms.lock().unwrap_or_else(PoisonError::into_inner);
        match rooms.iter_mut().position(|room| Arc::get_mut(room).is_some()) {
            Some(free) => rooms.swap_remove(free),
            None if self.kind == Kind::BFloat16 => Arc::new(Wide::Bf16(Vec::new())),
            None => Arc::new(Wide::Fp32(Vec::new())),
        }
    }
}
