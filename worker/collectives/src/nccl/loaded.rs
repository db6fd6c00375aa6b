//! NCCL as a library that is loaded when it is asked for: with libtorch for CUDA it is there as `libnccl.so.2`, a name that cudarc does not look
//! for. Streams and events are the driver's, through cudarc. The declarations follow `nccl.h` of 2.14 and later.

#![allow(unsafe_code)]

use super::library::{Call, Group, Id, Library, Mark, Numbers};
use crate::DType;
use cudarc::driver::{result, sys};
use std::collections::VecDeque;
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::sync::OnceLock;

type Comm = *mut c_void;
type Status = c_int;

const SUCCESS: Status = 0;
const IN_PROGRESS: Status = 7;
const FLOAT16: c_int = 6;
const FLOAT32: c_int = 7;
const BFLOAT16: c_int = 9;
const SUM: c_int = 0;

/// `ncclUniqueId`.
#[repr(C)]
#[derive(Clone, Copy)]
struct UniqueId {
    internal: Id,
}

/// `ncclConfig_t` as 2.14 has it: what later versions have more they take as their defaults.
#[repr(C)]
struct Config {
    size: usize,
    magic: c_uint,
    version: c_uint,
    blocking: c_int,
    /// What would be padding: a later version's field, for which it has a default.
    later: c_int,
}

type GetUniqueId = unsafe extern "C" fn(*mut UniqueId) -> Status;
type CommInitRankConfig = unsafe extern "C" fn(*mut Comm, c_int, UniqueId, c_int, *mut Config) -> Status;
type CommGetAsyncError = unsafe extern "C" fn(Comm, *mut Status) -> Status;
type CommAbort = unsafe extern "C" fn(Comm) -> Status;
type AllGather =
    unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, Comm, sys::CUstream) -> Status;
type ReduceScatter =
    unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, c_int, Comm, sys::CUstream) -> Status;
type AllReduce =
    unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, c_int, Comm, sys::CUstream) -> Status;
type GetErrorString = unsafe extern "C" fn(Status) -> *const c_char;

/// The functions that are used.
struct Functions {
    get_unique_id: GetUniqueId,
    comm_init_rank_config: CommInitRankConfig,
    comm_get_async_error: CommGetAsyncError,
    comm_abort: CommAbort,
    all_gather: AllGather,
    reduce_scatter: ReduceScatter,
    all_reduce: AllReduce,
    get_error_string: GetErrorString,
}

impl Functions {
    fn load() -> Result<&'static Functions, String> {
        static LOADED: OnceLock<Result<Functions, String>> = OnceLock::new();
        LOADED.get_or_init(Functions::find).as_ref().map_err(String::clone)
    }

    fn find() -> Result<Functions, String> {
        // SAFETY: the library registers nothing but itself; it stays for the life of the process.
        let handle = unsafe { libc::dlopen(c"libnccl.so.2".as_ptr(), libc::RTLD_NOW) };
        if handle.is_null() {
            return Err(
                "NCCL (libnccl.so.2) cannot be loaded; run `make setup CUDA=1`, or `pip install` torch for CUDA, or train with one rank"
                    .into(),
            );
        }
        let symbol = |name: &CStr| {
            // SAFETY: `handle` is a loaded library, `name` ends with a zero.
            let found = unsafe { libc::dlsym(handle, name.as_ptr()) };
            let old = || format!("NCCL has no {}: it is older than 2.14; update it", name.to_string_lossy());
            if found.is_null() { Err(old()) } else { Ok(found) }
        };
        // SAFETY: each is a function of NCCL that is declared so in its header, unchanged since 2.14.
        unsafe {
            use std::mem::transmute as function;
            Ok(Functions {
                get_unique_id: function::<*mut c_void, GetUniqueId>(symbol(c"ncclGetUniqueId")?),
                comm_init_rank_config: function::<*mut c_void, CommInitRankConfig>(symbol(
                    c"ncclCommInitRankConfig",
                )?),
                comm_get_async_error: function::<*mut c_void, CommGetAsyncError>(symbol(
                    c"ncclCommGetAsyncError",
                )?),
                comm_abort: function::<*mut c_void, CommAbort>(symbol(c"ncclCommAbort")?),
                all_gather: function::<*mut c_void, AllGather>(symbol(c"ncclAllGather")?),
                reduce_scatter: function::<*mut c_void, ReduceScatter>(symbol(c"ncclReduceScatter")?),
                all_reduce: function::<*mut c_void, AllReduce>(symbol(c"ncclAllReduce")?),
                get_error_string: function::<*mut c_void, GetErrorString>(symbol(c"ncclGetErrorString")?),
            })
        }
    }

    fn checked(&self, status: Status) -> Result<bool, String> {
        match status {
            SUCCESS => Ok(true),
            IN_PROGRESS => Ok(false),
            other => {
                // SAFETY: NCCL gives a constant text for any number.
                let text = unsafe { CStr::from_ptr((self.get_error_string)(other)) };
                Err(text.to_string_lossy().into_owned())
            }
        }
    }
}

/// NCCL on one CUDA device.
pub struct Loaded {
    functions: &'static Functions,
    context: sys::CUcontext,
    /// Of exchanges.
    stream: sys::CUstream,
    /// Of each group.
    members: [Member; 2],
    /// Behind what the default stream had at the last start.
    before: sys::CUevent,
    /// Of marks that were not reached, oldest first, and how many were made.
    marks: VecDeque<(Mark, sys::CUevent)>,
    made: u64,
    /// Events to use again.
    spare: Vec<sys::CUevent>,
}

/// This rank in a group.
#[derive(Clone, Copy)]
struct Member {
    /// Null before `connect` and after `abort`.
    comm: Comm,
    rank: usize,
    world: usize,
}

impl Member {
    const NONE: Member = Member { comm: std::ptr::null_mut(), rank: 0, world: 1 };
}

// SAFETY: the handles may be used by any thread that has made the context its current one, which every call does.
unsafe impl Send for Loaded {}

impl Loaded {
    /// For CUDA device `number`, whose primary context it uses; or why that cannot be, and what to do.
    pub fn open(number: usize) -> Result<Loaded, String> {
        let functions = Functions::load()?;
        // SAFETY: only looks for a library.
        if !unsafe { sys::is_culib_present() } {
            return Err("NVIDIA's driver library (libcuda) cannot be loaded".into());
        }
        result::init().map_err(told)?;
        let device = result::device::get(number as i32).map_err(told)?;
        // SAFETY: `device` was given by the driver; the context is kept for the life of the process.
        let context = unsafe { result::primary_ctx::retain(device) }.map_err(told)?;
        // SAFETY: the context is alive.
        unsafe { result::ctx::set_current(context) }.map_err(told)?;
        Ok(Loaded {
            functions,
            context,
            stream: result::stream::create(result::stream::StreamKind::NonBlocking).map_err(told)?,
            members: [Member::NONE; 2],
            before: event()?,
            marks: VecDeque::new(),
            made: 0,
            spare: Vec::new(),
        })
    }

    fn current(&self) -> Result<(), String> {
        // SAFETY: the context is alive.
        unsafe { result::ctx::set_current(self.context) }.map_err(told)
    }

    /// This rank in a group, unless its communicator is gone.
    fn member(&self, group: Group) -> Result<Member, String> {
        let member = self.members[group as usize];
        if member.comm.is_null() { Err("the communicator was aborted".into()) } else { Ok(member) }
    }
}

fn told(error: result::DriverError) -> String {
    format!("CUDA: {error:?}")
}

fn event() -> Result<sys::CUevent, String> {
    result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING).map_err(told)
}

impl Library for Loaded {
    fn unique_id(&mut self) -> Result<Id, String> {
        let mut id = UniqueId { internal: [0; size_of::<Id>()] };
        // SAFETY: NCCL writes one id.
        let status = unsafe { (self.functions.get_unique_id)(&mut id) };
        self.functions.checked(status).map(|_| id.internal)
    }

    fn connect(&mut self, group: Group, id: &Id, rank: usize, world: usize) -> Result<(), String> {
        self.current()?;
        let member = &mut self.members[group as usize];
        *member = Member { rank, world, ..Member::NONE };
        let version = 2 * 10_000 + 14 * 100;
        let mut config =
            Config { size: size_of::<Config>(), magic: 0xcafe_beef, version, blocking: 0, later: 0 };
        let id = UniqueId { internal: *id };
        // SAFETY: NCCL writes the communicator, which this owns from now on, and reads as much of the configuration as it says it has.
        let status = unsafe {
            let (rank, world) = (rank as c_int, world as c_int);
            (self.functions.comm_init_rank_config)(&mut member.comm, world, id, rank, &mut config)
        };
        self.functions.checked(status).map(|_| ())
    }

    fn settled(&mut self) -> Result<bool, String> {
        self.member(Group::Shards)?;
        let alive = self.members.iter().filter(|member| !member.comm.is_null());
        alive.map(|member| member.comm).try_fold(true, |settled, comm| {
            let mut status = SUCCESS;
            // SAFETY: the communicator is alive.
            self.functions.checked(unsafe { (self.functions.comm_get_async_error)(comm, &mut status) })?;
            Ok(self.functions.checked(status)? && settled)
        })
    }

    unsafe fn start(&mut self, group: Group, call: Call, numbers: Numbers) -> Result<(), String> {
        self.current()?;
        let Member { comm, rank, world } = self.member(group)?;
        let share = numbers.count / world;
        let whole = numbers.address as *mut c_void;
        let own = (numbers.address + (rank * share * numbers.dtype.size()) as u64) as *mut c_void;
        let kind = match numbers.dtype {
            DType::F32 => FLOAT32,
            DType::Bf16 => BFLOAT16,
            DType::F16 => FLOAT16,
            other => return Err(format!("{other} is not exchanged over NCCL")),
        };
        // SAFETY: stream, event and communicator are alive; the null stream is the default one; both addresses lie within `numbers`, for which the
        // caller answers.
        let status = unsafe {
            result::event::record(self.before, std::ptr::null_mut()).map_err(told)?;
            let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
            result::stream::wait_event(self.stream, self.before, flags).map_err(told)?;
            match call {
                Call::AllGather => (self.functions.all_gather)(own, whole, share, kind, comm, self.stream),
                Call::ReduceScatter => {
                    (self.functions.reduce_scatter)(whole, own, share, kind, SUM, comm, self.stream)
                }
                Call::AllReduce => {
                    (self.functions.all_reduce)(whole, whole, numbers.count, kind, SUM, comm, self.stream)
                }
            }
        };
        self.functions.checked(status).map(|_| ())
    }

    fn mark(&mut self) -> Result<Mark, String> {
        self.current()?;
        let event = self.spare.pop().map_or_else(event, Ok)?;
        // SAFETY: both are alive.
        unsafe { result::event::record(event, self.stream) }.map_err(told)?;
        self.made += 1;
        self.marks.push_back((Mark(self.made), event));
        Ok(Mark(self.made))
    }

    fn reached(&mut self, mark: Mark) -> Result<bool, String> {
        while let Some((first, event)) = self.marks.front().copied().filter(|(first, _)| *first <= mark) {
            // SAFETY: the event is alive.
            match unsafe { result::event::query(event) } {
                Ok(()) => {
                    self.marks.pop_front();
                    self.spare.push(event);
                    if first == mark {
                        return Ok(true);
                    }
                }
                Err(result::DriverError(sys::CUresult::CUDA_ERROR_NOT_READY)) => return Ok(false),
                Err(error) => return Err(told(error)),
            }
        }
        Ok(true)
    }

    fn abort(&mut self) {
        for member in std::mem::replace(&mut self.members, [Member::NONE; 2]) {
            if !member.comm.is_null() && self.current().is_ok() {
                // SAFETY: the communicator is alive and is not used any more. What cannot be aborted stays until the process ends.
                let _ = unsafe { (self.functions.comm_abort)(member.comm) };
            }
        }
    }
}

impl Drop for Loaded {
    fn drop(&mut self) {
        self.abort();
        let marks = std::mem::take(&mut self.marks).into_iter().map(|(_, event)| event);
        let events: Vec<sys::CUevent> =
            marks.chain(std::mem::take(&mut self.spare)).chain([self.before]).collect();
        if self.current().is_ok() {
            // SAFETY: they are not used any more. What cannot be destroyed stays until the process ends.
            unsafe {
                for event in events {
                    let _ = result::event::destroy(event);
                }
                let _ = result::stream::destroy(self.stream);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Without a device there is one line with the cure; with one, a communicator of one rank.
    #[test]
    fn one_rank_connects_or_is_told_what_to_do() {
        let mut nccl = match Loaded::open(0) {
            Ok(nccl) => nccl,
            Err(why) => {
                eprintln!("SKIPPED: {why}");
                return assert!(!why.is_empty() && !why.contains('\n'), "{why}");
            }
        };
        let id = nccl.unique_id().unwrap();
        nccl.connect(Group::Shards, &id, 0, 1).unwrap();
        let id = nccl.unique_id().unwrap();
        while !nccl.settled().unwrap() {
            std::thread::yield_now();
        }
        nccl.connect(Group::Replicas, &id, 0, 1).unwrap();
        while !nccl.settled().unwrap() {
            std::thread::yield_now();
        }
        let mark = nccl.mark().unwrap();
        while !nccl.reached(mark).unwrap() {
            std::thread::yield_now();
        }
        nccl.abort();
        assert!(nccl.settled().unwrap_err().contains("aborted"));
    }
}
