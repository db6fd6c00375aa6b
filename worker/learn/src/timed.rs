//! What stands between the engine and what it calls, and tells the stopwatch: a strategy's units, and its gang.

use crate::stopwatch::{Doing, Phase, Stopwatch};
use crate::trace::What;
use crate::units::Memory;
use crate::watched::Watch;
use fleet_collectives::net::SlowLink;
use fleet_collectives::{
    Activity, Common, DType, Exchange, Gang, Gather, Keep, Op, Pace, PerRank, Posted, Result, SharedHost,
    Ticket,
};
use std::collections::VecDeque;
use std::ops::Range;
use std::time::Duration;

/// Tells of units of which an executor asks for one after the other: forward to the head, the last one, and back.
pub(crate) struct Pass<'a> {
    watch: &'a Stopwatch,
    head: usize,
    /// The head has been asked for.
    back: bool,
}

impl Pass<'_> {
    /// `head` is the number of the last unit.
    pub fn new(watch: &Stopwatch, head: usize) -> Pass<'_> {
        Pass { watch, head, back: false }
    }
}

impl<M: Memory> Watch<M> for Pass<'_> {
    fn needed(&mut self, unit: usize) {
        self.back |= unit == self.head;
        let phase = if self.back { Phase::Backward } else { Phase::Forward };
        self.watch.switch(Doing { phase, unit: Some(unit) });
    }
}

/// A gang whose calls are communication.
pub struct TimedGang<G: ?Sized> {
    gang: Box<G>,
    watch: Stopwatch,
    /// What is posted and was not seen to be over, for the trace, and since when.
    posted: VecDeque<(What, u64)>,
}

impl<G: ?Sized> TimedGang<G> {
    pub fn new(gang: Box<G>, watch: Stopwatch) -> TimedGang<G> {
        TimedGang { gang, watch, posted: VecDeque::new() }
    }

    fn call<R>(&mut self, call: impl FnOnce(&mut G) -> R) -> R {
        let Doing { unit, .. } = self.watch.now().1;
        let before = self.watch.switch(Doing { phase: Phase::Communication, unit });
        let done = call(&mut self.gang);
        self.watch.switch(before);
        done
    }
}

impl<G: Exchange + ?Sized> TimedGang<G> {
    /// A call that posts something, as it is told what is done now, or ends what was posted.
    fn exchange<R>(&mut self, posts: Option<fn(Doing) -> What>, call: impl FnOnce(&mut G) -> R) -> R {
        if let Some(what) = posts.filter(|_| self.watch.is_tracing()) {
            let (now, doing) = self.watch.now();
            self.posted.push_back((what(doing), now));
        }
        let done = self.call(call);
        while self.posted.len() > self.gang.pending() {
            let (what, began) = self.posted.pop_front().expect("there are more than none");
            self.watch.keep(what, began);
        }
        done
    }
}

impl<G: Gang + ?Sized> Gang for TimedGang<G> {
    fn rank(&self) -> usize {
        self.gang.rank()
    }
    fn world_size(&self) -> usize {
        self.gang.world_size()
    }
    fn generation(&self) -> u64 {
        self.gang.generation()
    }
    fn set_deadline(&mut self, deadline: Duration) {
        self.gang.set_deadline(deadline);
    }
    fn note(&mut self, activity: Activity) {
        self.gang.note(activity);
    }
    fn begin_step(&mut self, step: u64, last: Option<Pace>) {
        self.gang.begin_step(step, last);
    }
    fn barrier(&mut self) -> Result<()> {
        self.call(|gang| gang.barrier())
    }
    fn all_reduce_f64(&mut self, values: &mut [f64], op: Op) -> Result<()> {
        self.call(|gang| gang.all_reduce_f64(values, op))
    }
    fn slow_link(&mut self) -> Result<Option<SlowLink>> {
        self.call(|gang| gang.slow_link())
    }
}

impl<G: Exchange + ?Sized> Exchange for TimedGang<G> {
    fn all_reduce(&mut self, data: &mut [u8], dtype: DType, op: Op) -> Result<()> {
        self.call(|gang| gang.all_reduce(data, dtype, op))
    }
    fn reduce_scatter(&mut self, input: &[u8], output: &mut [u8], dtype: DType, op: Op) -> Result<()> {
        self.call(|gang| gang.reduce_scatter(input, output, dtype, op))
    }
    fn all_gather(&mut self, input: &[u8], output: &mut [u8]) -> Result<()> {
        self.call(|gang| gang.all_gather(input, output))
    }
    fn broadcast(&mut self, data: &mut [u8], root: usize) -> Result<()> {
        self.call(|gang| gang.broadcast(data, root))
    }
    fn all_to_all(&mut self, input: &[u8], output: &mut [u8]) -> Result<()> {
        self.call(|gang| gang.all_to_all(input, output))
    }
    fn allocate_per_rank(&mut self, bytes: usize) -> Result<PerRank> {
        self.call(|gang| gang.allocate_per_rank(bytes))
    }
    fn post(&mut self, buffers: &PerRank, bytes: Range<usize>, exchange: Posted) -> Result<Ticket> {
        self.exchange(Some(reduction), |gang| gang.post(buffers, bytes, exchange))
    }
    fn pending(&self) -> usize {
        self.gang.pending()
    }
    fn progress(&mut self) -> Result<()> {
        self.exchange(None, |gang| gang.progress())
    }
    fn wait(&mut self, ticket: Ticket) -> Result<()> {
        self.exchange(None, |gang| gang.wait(ticket))
    }
    fn finish(&mut self) -> Result<()> {
        self.exchange(None, |gang| gang.finish())
    }
}

impl<G: SharedHost + ?Sized> SharedHost for TimedGang<G> {
    fn local_rank(&self) -> usize {
        self.gang.local_rank()
    }
    fn local_size(&self) -> usize {
        self.gang.local_size()
    }
    fn host(&self) -> usize {
        self.gang.host()
    }
    fn size_of_host(&self, host: usize) -> usize {
        self.gang.size_of_host(host)
    }
    fn all_reduce_f64_of_host(&mut self, values: &mut [f64], op: Op) -> Result<()> {
        self.call(|gang| gang.all_reduce_f64_of_host(values, op))
    }
    fn allocate_common(&mut self, bytes: usize) -> Result<Common> {
        self.call(|gang| gang.allocate_common(bytes))
    }
    fn post_reduce(
        &mut self,
        buffers: &PerRank,
        bytes: Range<usize>,
        dtype: DType,
        op: Op,
        keep: Keep,
    ) -> Result<Ticket> {
        self.exchange(Some(reduction), |gang| gang.post_reduce(buffers, bytes, dtype, op, keep))
    }
    fn post_gather_of_host(
        &mut self,
        buffers: &PerRank,
        bytes: Range<usize>,
        dtype: DType,
    ) -> Result<Ticket> {
        self.exchange(Some(|_| What::Gather), |gang| gang.post_gather_of_host(buffers, bytes, dtype))
    }
    fn post_gather(&mut self, gather: Gather<'_>) -> Result<Ticket> {
        self.exchange(Some(|_| What::Gather), |gang| gang.post_gather(gather))
    }
}

/// Of the unit that was computed last.
fn reduction(doing: Doing) -> What {
    What::Reduction(doing.unit)
}
