//! What is asked of NCCL and of CUDA, as few calls of which none waits.

#![allow(unsafe_code)]

use crate::DType;

/// Names a communicator that is to be made.
pub type Id = [u8; 128];

/// Which ranks exchange: each group has a communicator of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Group {
    /// Those that keep a model together: all ranks, or those of a host.
    Shards,
    /// Where each host has a model, those that keep the same share of it.
    Replicas,
}

/// An exchange of numbers in place, of which each rank of a group has a share of equal length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// Each rank gives its share; all of them come to be everywhere.
    AllGather,
    /// Each rank's share becomes the sum over all ranks.
    ReduceScatter,
    /// All numbers become the sums over all ranks.
    AllReduce,
}

impl Call {
    pub fn name(self) -> &'static str {
        match self {
            Call::AllGather => "all_gather",
            Call::ReduceScatter => "reduce_scatter",
            Call::AllReduce => "all_reduce",
        }
    }
}

/// Numbers in a device's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Numbers {
    pub address: u64,
    pub count: usize,
    /// fp32, bf16 or fp16.
    pub dtype: DType,
}

/// A place in the stream of exchanges, from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Mark(pub u64);

/// One rank's communicators on one device. Errors are what the library says, in one line.
pub trait Library: Send {
    fn unique_id(&mut self) -> Result<Id, String>;
    /// Begins to connect a group, in which this rank is number `rank`; over when `settled`.
    fn connect(&mut self, group: Group, id: &Id, rank: usize, world: usize) -> Result<(), String>;
    /// Whether what was asked for has been taken on; or what went wrong since, here or at a peer.
    fn settled(&mut self) -> Result<bool, String>;
    /// Asks for an exchange in a group, on a stream of its own behind all that is on the device's default stream, and behind what was asked for before.
    ///
    /// # Safety
    /// `numbers` are memory of the device that lives, and that nobody else uses, until a mark behind it is reached or `abort` has returned.
    unsafe fn start(&mut self, group: Group, call: Call, numbers: Numbers) -> Result<(), String>;
    /// Marks the end of what was started.
    fn mark(&mut self) -> Result<Mark, String>;
    /// Whether the device has come to a mark.
    fn reached(&mut self, mark: Mark) -> Result<bool, String>;
    /// Ends everything that was started. More than once is once.
    fn abort(&mut self);
}
