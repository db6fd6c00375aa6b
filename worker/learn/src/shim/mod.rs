//! The only unsafe code of this package: memory that ranks share, pages of memory, the inherited sockets, and the clock that the processes of a machine share.

#![allow(unsafe_code)]

pub mod buffers;
pub mod pages;

use std::ffi::c_int;

/// Takes over the socket on which other hosts call this rank. Call once.
pub fn inherited_listener(fd: i32) -> std::io::Result<std::os::fd::OwnedFd> {
    check_socket(fd)?;
    // SAFETY: `fd` is an open socket that was inherited for this process alone and is owned by nothing else here.
    Ok(unsafe { std::os::fd::FromRawFd::from_raw_fd(fd) })
}

/// Takes over the socket whose number the agent left in the environment. Call once, before anything else opens files.
pub fn inherited_socket(fd: i32) -> std::io::Result<std::os::unix::net::UnixStream> {
    check_socket(fd)?;
    // SAFETY: `fd` is an open socket that was inherited for this process alone and is owned by nothing else here.
    Ok(unsafe { std::os::fd::FromRawFd::from_raw_fd(fd) })
}

/// Nanoseconds of the clock that all processes of the machine share.
pub fn monotonic_ns() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is valid for the write; this clock always exists.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    (time.tv_sec as u64) * 1_000_000_000 + time.tv_nsec as u64
}

fn check_socket(fd: i32) -> std::io::Result<()> {
    let mut kind: c_int = 0;
    let mut len = size_of::<c_int>() as libc::socklen_t;
    // SAFETY: getsockopt writes at most `len` bytes into `kind`; a number that is no socket is an error, not undefined.
    let rc =
        unsafe { libc::getsockopt(fd, libc::SOL_SOCKET, libc::SO_TYPE, (&raw mut kind).cast(), &mut len) };
    if rc != 0 {
        return Err(std::io::Error::last_os_error());
    }
    Ok(())
}
