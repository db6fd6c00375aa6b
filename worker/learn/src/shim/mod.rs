//! The only unsafe code of this package: memory that ranks share, and the inherited socket.

#![allow(unsafe_code)]

pub mod buffers;

use std::ffi::c_int;

/// Takes over the socket whose number the agent left in the environment. Call once, before anything else opens files.
pub fn inherited_socket(fd: i32) -> std::io::Result<std::os::unix::net::UnixStream> {
    use std::os::fd::FromRawFd;
    let mut kind: c_int = 0;
    let mut len = size_of::<c_int>() as libc::socklen_t;
    // SAFETY: getsockopt writes at most `len` bytes into `kind`; a number that is no socket is an error, not undefined.
    let rc =
        unsafe { libc::getsockopt(fd, libc::SOL_SOCKET, libc::SO_TYPE, (&raw mut kind).cast(), &mut len) };
    if rc != 0 {
        return Err(std::io::Error::last_os_error());
    }
    // SAFETY: `fd` is an open socket that was inherited for this process alone and is owned by nothing else here.
    Ok(unsafe { std::os::unix::net::UnixStream::from_raw_fd(fd) })
}
