//! What ranks post: each marks that its buffer is complete, and when all have, does its share of the work where the buffers lie.

#![allow(unsafe_code)]

use super::gang::ShmCollective;
use super::segment::{Mark, POSTS_MAX, RANKS_MAX, Slot};
use crate::call::{Call, Signature};
use crate::collective::{Posted, Ticket, part, refuse};
use crate::dtype::{DType, Op};
use crate::error::Result;
use crate::memory::PerRank;
use crate::memory::reduce::reduce;
use std::ops::Range;
use std::sync::atomic::Ordering::SeqCst;

pub(super) struct Pending {
    pub number: u64,
    signature: Signature,
    buffers: PerRank,
    bytes: Range<usize>,
    exchange: Posted,
    /// What this rank reduces, where that is not its `part`: bytes of the buffer.
    own: Option<Vec<Range<usize>>>,
}

/// An exchange among the ranks of the host, as peers are told of it.
pub(super) struct Told {
    pub exchange: Posted,
    pub call: Call,
    /// Over only when every rank has done its share.
    pub of_all: bool,
    pub own: Option<Vec<Range<usize>>>,
}

fn post_mark(slot: &Slot, number: u64) -> &Mark {
    &slot.posts[(number % POSTS_MAX as u64) as usize]
}

/// Of the bytes of a range of elements of `size`, those that `rank` works on.
fn share(bytes: &Range<usize>, size: usize, rank: usize, world: usize) -> Range<usize> {
    let mine = part(bytes.len() / size, rank, world);
    bytes.start + mine.start * size..bytes.start + mine.end * size
}

impl Pending {
    /// Copies `bytes` of `from`'s buffer to `start` of `to`'s.
    ///
    /// # Safety
    /// Nobody else writes to what is read, nor uses what is written.
    unsafe fn copy(&self, from: usize, bytes: Range<usize>, to: usize, start: usize) {
        let length = self.buffers.len();
        assert!(bytes.end <= length && start + bytes.len() <= length, "a copy outside of the buffers");
        let source = self.buffers.of(from).wrapping_add(bytes.start);
        // SAFETY: both ends lie inside the mapping, and differ in rank or in half; the rest is the caller's contract.
        unsafe { std::ptr::copy_nonoverlapping(source, self.buffers.of(to).wrapping_add(start), bytes.len()) }
    }
}

impl ShmCollective {
    /// Every rank's input is complete: does this rank's share and says so.
    fn work_off(&mut self, posted: &Pending) -> Result<()> {
        self.compare(posted.signature, |slot| post_mark(slot, posted.number))?;
        let (me, world, bytes) = (self.rank, self.world(), &posted.bytes);
        let others = || (0..world).filter(|rank| *rank != me);
        match posted.exchange {
            Posted::AllReduce(dtype, op) => self.reduce_share(posted, dtype, op, 0..world),
            Posted::ReduceScatter(dtype, op) => self.reduce_share(posted, dtype, op, me..me + 1),
            Posted::AllGather(dtype) => {
                let mine = share(bytes, dtype.size(), me, world);
                // SAFETY: all have marked their part complete, and this rank alone uses its own part of any buffer.
                others().for_each(|to| unsafe { posted.copy(me, mine.clone(), to, mine.start) });
            }
            Posted::Broadcast { root } => {
                let mine = share(bytes, 1, me, world);
                let to = (0..world).filter(|rank| *rank != root);
                // SAFETY: nobody writes to the root's buffer, and this rank alone writes to its share of the others.
                to.for_each(|to| unsafe { posted.copy(root, mine.clone(), to, mine.start) });
            }
            Posted::AllToAll => {
                let size = bytes.len() / 2 / world;
                let of = |half: usize, rank: usize| bytes.start + (half * world + rank) * size;
                for from in 0..world {
                    // SAFETY: nobody writes to inputs, and this rank alone uses its output.
                    unsafe { posted.copy(from, of(0, me)..of(0, me) + size, me, of(1, from)) }
                }
            }
        }
        self.slot().done.value.store(posted.number, SeqCst);
        self.control.header().done.wake();
        self.slot().history.leave();
        Ok(())
    }

    fn reduce_share(&self, posted: &Pending, dtype: DType, op: Op, into: Range<usize>) {
        match &posted.own {
            Some(own) => own.iter().for_each(|one| self.reduce(posted, one, dtype, op, into.clone())),
            None => {
                let mine = share(&posted.bytes, dtype.size(), self.rank, self.world());
                self.reduce(posted, &mine, dtype, op, into);
            }
        }
    }

    /// `mine` lies in what was posted, and no other rank of the host has it.
    fn reduce(&self, posted: &Pending, mine: &Range<usize>, dtype: DType, op: Op, into: Range<usize>) {
        assert!(
            posted.bytes.start <= mine.start && mine.end <= posted.bytes.end,
            "inside of what was posted"
        );
        let mut all = [std::ptr::null_mut::<u8>(); RANKS_MAX];
        for (rank, pointer) in all[..self.world()].iter_mut().enumerate() {
            *pointer = posted.buffers.of(rank).wrapping_add(mine.start);
        }
        let sources = all.map(<*mut u8>::cast_const);
        let elements = mine.len() / dtype.size();
        // SAFETY: the range was checked against the buffers when it was posted, and all ranks posted the same. All ranks have marked
        // their input complete; nobody but this rank reads or writes this part of any buffer until it is done.
        unsafe { reduce(&sources[..self.world()], &all[into], elements, dtype, op) };
    }

    fn is_posted(&self, number: u64) -> bool {
        (0..self.world()).all(|r| post_mark(self.control.slot(r), number).number.load(SeqCst) >= number)
    }

    pub(super) fn work_off_ready(&mut self) -> Result<()> {
        while let Some(front) = self.pending.front()
            && self.is_posted(front.number)
            && let Some(posted) = self.pending.pop_front()
        {
            self.work_off(&posted)?;
        }
        Ok(())
    }

    /// Does this rank's share of everything up to post `number`, waiting for the ranks that have not posted it.
    fn work_off_until(&mut self, number: u64) -> Result<()> {
        while let Some(posted) = self.pending.pop_front_if(|posted| posted.number <= number) {
            self.slot().history.wait_in(posted.signature);
            self.wait_for_all(&self.control.header().posted, posted.signature, |slot| {
                post_mark(slot, posted.number).number.load(SeqCst) >= posted.number
            })?;
            self.slot().history.go_on();
            self.work_off(&posted)?;
        }
        Ok(())
    }

    /// Waits until every rank has done its share of post `number`, which this rank has.
    fn wait_done(&self, number: u64) -> Result<()> {
        let sequence = self.sequence;
        let word = Call::Reduce(DType::F32, Op::Sum, crate::collective::Keep::Everything).word();
        let signature = Signature { sequence, word, bytes: 0, place: 0 };
        self.slot().history.wait_in(signature);
        let done = |slot: &Slot| slot.done.value.load(SeqCst) >= number;
        self.wait_for_all(&self.control.header().done, signature, done)?;
        self.slot().history.go_on();
        Ok(())
    }

    pub(super) fn finish_posted(&mut self) -> Result<()> {
        self.work_off_until(u64::MAX)?;
        match std::mem::take(&mut self.last_of_all) {
            0 => Ok(()),
            number => self.wait_done(number),
        }
    }

    pub(super) fn finish_until(&mut self, ticket: Ticket) -> Result<()> {
        self.work_off_until(ticket.0)?;
        self.wait_done(ticket.0)
    }

    pub(super) fn post_exchange(
        &mut self,
        buffers: &PerRank,
        bytes: Range<usize>,
        told: Told,
    ) -> Result<Ticket> {
        let Told { exchange, call, of_all, own } = told;
        exchange.check(buffers, &bytes, self.world())?;
        if buffers.ranks() != self.world() {
            return Err(refuse("post", "the buffer was not allocated by this gang".to_owned()));
        }
        // The oldest mark is overwritten only when every rank has compared it.
        if let Some(oldest) = (self.posts + 1).checked_sub(POSTS_MAX as u64).filter(|n| *n > 0) {
            self.work_off_until(oldest)?;
            self.wait_done(oldest)?;
        }
        let signature = self.enter(call, bytes.len(), buffers.id + bytes.start as u64);
        self.posts += 1;
        let number = self.posts;
        if of_all {
            self.last_of_all = number;
        }
        self.pending.push_back(Pending { number, signature, buffers: buffers.clone(), bytes, exchange, own });
        post_mark(self.slot(), number).set(number, signature);
        if self.is_posted(number) {
            self.control.header().posted.wake();
        }
        self.work_off_ready()?;
        Ok(Ticket(number))
    }
}
