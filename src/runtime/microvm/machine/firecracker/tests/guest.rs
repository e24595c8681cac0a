//! The memory of a guest that a pager brings, as Firecracker has it: registered with userfaultfd(2), and said to whoever
//! listens.
#![allow(unsafe_code, reason = "it is memory that the kernel asks somebody else for")]

use std::fs::File;
use std::io::{IoSlice, Result};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::ptr;
use std::sync::mpsc;
use std::thread;

use rustix::ioctl::{Updater, ioctl, opcode};
use rustix::mm::{Advice, MapFlags, ProtFlags, UserfaultfdFlags, madvise, mmap_anonymous, userfaultfd};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::json;

use super::START_PATIENCE;

const PAGE: usize = 4 << 10;
const PAGES: usize = 64;
/// What lies before the guest's memory in the file.
const BEFORE: usize = PAGE;
/// `linux/userfaultfd.h`: the version of its calls, that pages which are given back are told, and that those which are missing
/// are asked for.
const API: u64 = 0xAA;
const EVENT_REMOVE: u64 = 1 << 3;
const MISSING: u64 = 1;

/// `struct uffdio_api` and `struct uffdio_register` both are words.
type Asked<const N: usize> = [u64; N];

/// The memory. It is there until the process ends, as is whoever brings it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Guest {
    start: usize,
}

/// What a template's file holds: each page is full of its number, after one that is nobody's.
pub(super) fn memory() -> Vec<u8> {
    let page = |number: usize| vec![number as u8; PAGE];
    (0..=PAGES).flat_map(page).collect()
}

impl Guest {
    /// Has whoever listens there bring it.
    pub(super) fn behind(socket: &Path) -> Result<Self> {
        let faults = unsafe { userfaultfd(UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK) }?;
        let mut api: Asked<3> = [API, EVENT_REMOVE, 0];
        unsafe { ioctl(&faults, Updater::<{ opcode::read_write::<Asked<3>>(0xAA, 0x3F) }, _>::new(&mut api)) }?;
        let length = PAGE * PAGES;
        let (access, kind) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE);
        let start = unsafe { mmap_anonymous(ptr::null_mut(), length, access, kind) }? as usize;
        let mut register: Asked<4> = [start as u64, length as u64, MISSING, 0];
        unsafe { ioctl(&faults, Updater::<{ opcode::read_write::<Asked<4>>(0xAA, 0x00) }, _>::new(&mut register)) }?;

        let said = json!([{ "base_host_virt_addr": start, "size": length, "offset": BEFORE, "page_size": PAGE }]);
        // By the directory's descriptor, for its path is too long for a socket's.
        let directory = File::open(socket.parent().unwrap())?;
        let name = socket.file_name().unwrap().display();
        let stream = UnixStream::connect(format!("/proc/self/fd/{}/{name}", directory.as_raw_fd()))?;
        let files = [faults.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        control.push(SendAncillaryMessage::ScmRights(&files));
        sendmsg(&stream, &[IoSlice::new(said.to_string().as_bytes())], &mut control, SendFlags::empty())?;
        // The VMM keeps its own, so that the kernel goes on asking.
        std::mem::forget(faults);
        Ok(Self { start })
    }

    /// What the page of that number, from 0, is full of. Fails if nobody brings it.
    pub(super) fn page(self, number: usize) -> u8 {
        let (told, page) = mpsc::channel();
        let address = self.start + number * PAGE;
        // It waits for ever for a page that nobody brings.
        thread::spawn(move || {
            let bytes: Vec<u8> =
                (0..PAGE).map(|at| unsafe { ptr::read_volatile((address + at) as *const u8) }).collect();
            let _ = told.send(bytes);
        });
        let bytes = page.recv_timeout(START_PATIENCE).unwrap_or_else(|_| panic!("nobody brings page {number}"));
        assert!(bytes.iter().all(|byte| *byte == bytes[0]), "page {number} is a mixture");
        bytes[0]
    }

    /// Gives a page back, as a guest with a balloon does. Returns when whoever brings pages knows.
    pub(super) fn give_back(self, number: usize) {
        let address = (self.start + number * PAGE) as *mut _;
        unsafe { madvise(address, PAGE, Advice::LinuxDontNeed) }.unwrap();
    }
}
