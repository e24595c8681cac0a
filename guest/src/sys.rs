//! What has no safe wrapper that fits: two requests to the kernel's random number generator, a system call filter for those
//! who may still gain rights, and tokio's word for "poll this". The only unsafe code of the agent.
#![allow(unsafe_code)]

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};

use nix::libc;
use nix::sys::epoll::Epoll;
use nix::sys::inotify::Inotify;
use rustix::ioctl::{NoArg, Opcode, Setter, ioctl, opcode};
use seccompiler::sock_filter;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// `RNDRESEEDCRNG`, include/uapi/linux/random.h.
const RESEED: Opcode = opcode::none(b'R', 0x07);
/// `RNDADDTOENTCNT`.
const CREDIT: Opcode = opcode::write::<i32>(b'R', 0x01);

/// Mixes bytes that only the node and this guest know into the random number generator, counts them as entropy, and makes
/// the generator use them from now on: after a restore from a template, clones must not draw the same numbers.
///
/// # Errors
/// What the kernel refused.
pub(crate) fn reseed(seed: &[u8]) -> io::Result<()> {
    if seed.is_empty() {
        return Ok(());
    }
    let mut random = File::options().write(true).open("/dev/urandom")?;
    random.write_all(seed)?;
    let bits = i32::try_from(seed.len().saturating_mul(8)).unwrap_or(4096).min(4096);
    // SAFETY: RNDADDTOENTCNT reads one int and keeps no pointer.
    unsafe { ioctl(&random, Setter::<CREDIT, i32>::new(bits)) }?;
    // SAFETY: RNDRESEEDCRNG takes no argument.
    unsafe { ioctl(&random, NoArg::<RESEED>::new()) }?;
    Ok(())
}

/// Installs a system call filter for the calling thread and what it becomes. Unlike seccompiler's own, this leaves
/// setuid programs their rights, for which the caller needs CAP_SYS_ADMIN.
///
/// # Errors
/// What the kernel refused.
pub(crate) fn install_filter(program: &[sock_filter]) -> io::Result<()> {
    let len = u16::try_from(program.len()).map_err(io::Error::other)?;
    // The kernel reads instructions of this layout (linux/filter.h), which both crates restate.
    let program = libc::sock_fprog { len, filter: program.as_ptr().cast_mut().cast() };
    // SAFETY: the kernel reads `len` instructions behind the pointer, which outlive the call, and keeps a copy.
    let installed = unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const program) };
    if installed == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// A descriptor that its holder owns from the beginning to the end of its life: a pipe, socket or terminal, or one of the
/// kernel's queues.
#[derive(Debug)]
pub(crate) struct Owned<T>(pub(crate) T);

impl AsRawFd for Owned<OwnedFd> {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl AsRawFd for Owned<Epoll> {
    fn as_raw_fd(&self) -> RawFd {
        self.0.0.as_raw_fd()
    }
}

impl AsRawFd for Owned<Inotify> {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

/// Has a descriptor polled.
///
/// # Errors
/// One that the kernel cannot poll.
pub(crate) fn polled<T>(owned: T, interest: Interest) -> io::Result<AsyncFd<Owned<T>>>
where
    Owned<T>: AsRawFd,
{
    // SAFETY: each of the types above owns its descriptor, gives the same one each time, and closes it when it is dropped;
    // none of them is ever closed or replaced before, since nothing here gives out more than a borrow.
    Ok(unsafe { AsyncFd::register_with_interest(Owned(owned), interest) }?)
}
