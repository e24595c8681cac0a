//! The kernel's side of a pager: what userfaultfd(2) tells, and takes (ioctl_userfaultfd(2)).

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::ioctl::{Opcode, Setter, Updater, opcode};

/// Bytes of a message of the kernel's (`struct uffd_msg`).
const MESSAGE: usize = 32;
/// The kinds of message that are looked at (`linux/userfaultfd.h`).
const FAULT: u8 = 0x12;
const REMOVED: u8 = 0x15;
const GROUP: u8 = 0xAA;

/// What the VMM's memory went through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Event {
    /// A thread waits for the page of this address.
    Fault(u64),
    /// These pages were given back.
    Removed { start: u64, end: u64 },
    /// Something that needs no answer.
    Other,
}

/// What became of a page that was to be brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Brought {
    /// It is there, and whoever waited for it goes on.
    Here,
    /// Not all of it could be, where there is something already; not everybody was woken.
    WasThere,
    /// An event has to be read first.
    NotYet,
}

/// The descriptor of a VMM's faults. It does not block.
#[derive(Debug)]
pub(super) struct Faults(OwnedFd);

/// `struct uffdio_copy`.
#[repr(C)]
struct Copy {
    target: u64,
    source: u64,
    length: u64,
    mode: u64,
    copied: i64,
}

/// `struct uffdio_zeropage`.
#[repr(C)]
struct Zero {
    range: Range,
    mode: u64,
    zeroed: i64,
}

/// `struct uffdio_range`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Range {
    start: u64,
    length: u64,
}

const COPY: Opcode = opcode::read_write::<Copy>(GROUP, 0x03);
const ZERO: Opcode = opcode::read_write::<Zero>(GROUP, 0x04);
const WAKE: Opcode = opcode::read::<Range>(GROUP, 0x02);

impl Faults {
    pub(super) fn new(descriptor: OwnedFd) -> Self {
        Self(descriptor)
    }

    /// The next event, if there is one.
    pub(super) fn next(&self) -> io::Result<Option<Event>> {
        let mut message = [0; MESSAGE];
        match rustix::io::read(&self.0, &mut message) {
            Ok(MESSAGE) => Ok(Some(event(&message))),
            Ok(_) => Err(io::ErrorKind::UnexpectedEof.into()),
            Err(Errno::AGAIN) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Puts these bytes there, whole pages, and wakes who waits for them.
    pub(super) fn copy(&self, target: u64, bytes: &[u8]) -> io::Result<Brought> {
        let length = bytes.len() as u64;
        let mut copy = Copy { target, source: bytes.as_ptr().addr() as u64, length, mode: 0, copied: 0 };
        // SAFETY: the kernel reads `length` bytes at `source`, which are borrowed, and writes into another process, whose
        // descriptor this is; of this one it changes `copied` alone.
        #[allow(unsafe_code)]
        let done = unsafe { rustix::ioctl::ioctl(&self.0, Updater::<COPY, Copy>::new(&mut copy)) };
        brought(done, copy.copied, length)
    }

    /// Puts empty pages there, and wakes who waits for them.
    pub(super) fn zero(&self, start: u64, length: u64) -> io::Result<Brought> {
        let mut zero = Zero { range: Range { start, length }, mode: 0, zeroed: 0 };
        // SAFETY: as above; nothing of this process is read.
        #[allow(unsafe_code)]
        let done = unsafe { rustix::ioctl::ioctl(&self.0, Updater::<ZERO, Zero>::new(&mut zero)) };
        brought(done, zero.zeroed, length)
    }

    /// Has those who wait for these pages look again.
    pub(super) fn wake(&self, start: u64, length: u64) -> io::Result<()> {
        // SAFETY: the kernel reads the range and changes nothing of this process.
        #[allow(unsafe_code)]
        let done = unsafe { rustix::ioctl::ioctl(&self.0, Setter::<WAKE, Range>::new(Range { start, length })) };
        Ok(done?)
    }
}

impl AsFd for Faults {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn brought(done: Result<(), Errno>, bytes: i64, length: u64) -> io::Result<Brought> {
    match done {
        Ok(()) if u64::try_from(bytes) == Ok(length) => Ok(Brought::Here),
        // As much as went before a page that was there; or not all of it is the guest's memory.
        Ok(()) | Err(Errno::EXIST | Errno::NOENT) => Ok(Brought::WasThere),
        Err(Errno::AGAIN) if bytes > 0 => Ok(Brought::WasThere),
        Err(Errno::AGAIN) => Ok(Brought::NotYet),
        // The process is gone.
        Err(Errno::SRCH) => Ok(Brought::Here),
        Err(errno) => Err(errno.into()),
    }
}

fn event(message: &[u8; MESSAGE]) -> Event {
    let word = |at: usize| {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&message[at..at + 8]);
        u64::from_ne_bytes(bytes)
    };
    match message[0] {
        FAULT => Event::Fault(word(16)),
        REMOVED => Event::Removed { start: word(8), end: word(16) },
        _ => Event::Other,
    }
}
