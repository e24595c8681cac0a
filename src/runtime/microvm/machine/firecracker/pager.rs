//! Who brings the memory of a restored machine, page by page, as its guest touches it (Firecracker's
//! docs/snapshotting/handling-page-faults-on-snapshot-resume.md, userfaultfd(2)).
//!
//! ```text
//! node --start--> pager, on uffd.sock <--where its memory is, and a descriptor of its faults-- Firecracker
//!                   '-- for each fault: the template's page --UFFDIO_COPY--> the guest's memory
//! ```
//! It is a process of its own, of this same program, in the machine's cgroup, without a network and as the VMM's user: the
//! machine outlives the node's process, and could not without its pager. It ends with the VMM, and the shell that stands behind
//! it ends the VMM if it fails, in whatever way: a guest whose page nobody brings would wait for it for ever.
//!
//! The VMM is not believed: it may pass a descriptor that blocks, or tell without an end of memory it gives back. So its end is
//! watched by a thread of its own, and what is remembered of it is bounded.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Error, ErrorKind};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use serde::Deserialize;

use super::faults::{Brought, Event, Faults};
use crate::runtime::microvm::machine::jail::VmmUser;
use crate::runtime::microvm::machine::process::start_time;

/// Bytes of what Firecracker says of its memory; a machine has two regions at the most.
const LONGEST: usize = 16 << 10;
const MOST_REGIONS: usize = 64;
/// Bytes brought for one fault: its neighbours are mostly touched next.
const AROUND: u64 = 64 << 10;
/// From the pager's start until Firecracker has connected and spoken.
const PATIENCE: Duration = Duration::from_secs(30);
/// Milliseconds before a page is tried again that the kernel does not take yet: there is an event to be read first.
const AGAIN: u8 = 1;
const SMALLEST_PAGE: u64 = 4 << 10;
const LARGEST_PAGE: u64 = 1 << 30;
/// Events read before pages are brought again, and pieces of memory given back that are told apart: a guest of 64 GiB that gives
/// back every other piece of 2 MiB has half as many.
const AT_ONCE: usize = 64;
const MOST_PIECES: usize = 1 << 15;

/// A piece of the guest's memory, as Firecracker says it.
#[derive(Clone, Debug, Deserialize)]
struct Said {
    base_host_virt_addr: u64,
    size: u64,
    offset: u64,
    page_size: Option<u64>,
    /// Bytes too, whatever it is called; the name before `page_size`.
    page_size_kib: Option<u64>,
}

/// A piece of the guest's memory in the VMM, and where it lies in the template's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Region {
    start: u64,
    size: u64,
    offset: u64,
    page: u64,
}

/// What a pager is told. Its standard input is the socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Arguments {
    /// The template's memory.
    pub memory: PathBuf,
    /// The process whose memory it becomes.
    pub vmm: i32,
    /// When that was started, in clock ticks after the host's boot: its number may be another's later.
    pub vmm_started: u64,
    /// Whose rights it goes on with.
    pub user: VmmUser,
}

impl Arguments {
    /// As a command line says them.
    pub(super) fn words(&self) -> Vec<OsString> {
        let VmmUser { uid, gid } = self.user;
        let numbers = [
            ("--vmm", self.vmm.to_string()),
            ("--vmm-started", self.vmm_started.to_string()),
            ("--uid", uid.to_string()),
            ("--gid", gid.to_string()),
        ];
        let numbers = numbers.into_iter().flat_map(|(name, value)| [name.into(), value.into()]);
        ["pager".into(), "--memory".into(), self.memory.clone().into()].into_iter().chain(numbers).collect()
    }

    /// Brings the pages of one machine. When its VMM has ended the process does, too, with code 0.
    ///
    /// # Errors
    /// What went wrong: the VMM is of no use then.
    pub fn serve(self) -> io::Result<()> {
        let listener = UnixListener::from(io::stdin().as_fd().try_clone_to_owned()?);
        let memory = File::open(&self.memory)?;
        // The guest's VMM is what it listens to, so it has no more rights than that.
        nix::unistd::setgroups(&[])?;
        nix::unistd::setgid(self.user.gid.into())?;
        nix::unistd::setuid(self.user.uid.into())?;
        if !self.ends_with_vmm()? {
            return Ok(());
        }
        let (regions, faults) = greet(&listener, memory.metadata()?.len())?;
        Pager::new(regions, faults, memory).run()
    }

    /// Has this process end with the VMM; `false` if that has ended already.
    fn ends_with_vmm(&self) -> io::Result<bool> {
        let pid = Pid::from_raw(self.vmm).ok_or_else(|| Error::from(ErrorKind::InvalidInput))?;
        let vmm = match pidfd_open(pid, PidfdFlags::empty()) {
            Err(rustix::io::Errno::SRCH) => return Ok(false),
            vmm => vmm?,
        };
        if start_time(self.vmm) != Some(self.vmm_started) {
            return Ok(false);
        }
        let watch = move || {
            while !matches!(wait(vmm.as_fd(), PollTimeout::NONE), Ok(true)) {}
            std::process::exit(0);
        };
        thread::Builder::new().name("vmm".to_owned()).spawn(watch).map(|_| true)
    }
}

/// What Firecracker says once it loads the snapshot.
fn greet(listener: &UnixListener, memory: u64) -> io::Result<(Vec<Region>, Faults)> {
    let patience = PollTimeout::try_from(PATIENCE).unwrap_or(PollTimeout::MAX);
    let late = || Error::new(ErrorKind::TimedOut, "Firecracker has not said where its memory is");
    if !wait(listener.as_fd(), patience)? {
        return Err(late());
    }
    let (stream, _) = listener.accept()?;
    if !wait(stream.as_fd(), patience)? {
        return Err(late());
    }
    let (said, faults) = hear(&stream)?;
    let faults = faults.ok_or_else(|| invalid("it came without a descriptor"))?;
    Ok((regions(&said, memory)?, Faults::new(faults)))
}

/// Whether there is something to read, or will be in time.
fn wait(readable: BorrowedFd<'_>, patience: PollTimeout) -> io::Result<bool> {
    match poll(&mut [PollFd::new(readable, PollFlags::POLLIN)], patience) {
        Err(nix::errno::Errno::EINTR) => wait(readable, patience),
        polled => Ok(polled? > 0),
    }
}

fn hear(stream: &UnixStream) -> io::Result<(Vec<u8>, Option<OwnedFd>)> {
    let mut text = vec![0; LONGEST];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut parts = [io::IoSliceMut::new(&mut text)];
    let length = recvmsg(stream, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC)?.bytes;
    let files = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut files) => files.next(),
        _ => None,
    });
    let file = files.last();
    text.truncate(length);
    Ok((text, file))
}

/// # Errors
/// What is not within the template's memory, or could not be brought page by page.
fn regions(said: &[u8], memory: u64) -> io::Result<Vec<Region>> {
    let said: Vec<Said> = serde_json::from_slice(said).map_err(|error| invalid(&error.to_string()))?;
    if said.is_empty() || said.len() > MOST_REGIONS {
        return Err(invalid(&format!("{} regions", said.len())));
    }
    let region = |said: &Said| {
        let page = said.page_size.or(said.page_size_kib).unwrap_or(SMALLEST_PAGE);
        let whole = page.is_power_of_two() && (SMALLEST_PAGE..=LARGEST_PAGE).contains(&page);
        let whole =
            whole && [said.base_host_virt_addr, said.size, said.offset].iter().all(|value| value.is_multiple_of(page));
        let inside = said.offset.checked_add(said.size).is_some_and(|end| end <= memory);
        let inside = inside && said.base_host_virt_addr.checked_add(said.size).is_some();
        if !(whole && inside) {
            return Err(invalid(&format!("a region that is not in {memory} bytes of whole pages: {said:?}")));
        }
        Ok(Region { start: said.base_host_virt_addr, size: said.size, offset: said.offset, page })
    };
    said.iter().map(region).collect()
}

fn invalid(what: &str) -> Error {
    Error::new(ErrorKind::InvalidData, format!("what Firecracker says of its memory is of no use: {what}"))
}

struct Pager {
    regions: Vec<Region>,
    faults: Faults,
    memory: File,
    /// What the guest gave back, from start to end, apart from each other: it is empty now, whatever the template has there.
    removed: BTreeMap<u64, u64>,
    page: Vec<u8>,
}

impl Pager {
    fn new(regions: Vec<Region>, faults: Faults, memory: File) -> Self {
        Self { regions, faults, memory, removed: BTreeMap::new(), page: Vec::new() }
    }

    fn run(&mut self) -> io::Result<()> {
        let mut waiting: Vec<u64> = Vec::new();
        loop {
            wait(self.faults.as_fd(), if waiting.is_empty() { PollTimeout::NONE } else { AGAIN.into() })?;
            for _ in 0..AT_ONCE {
                match self.faults.next()? {
                    Some(Event::Fault(address)) => waiting.push(address),
                    Some(Event::Removed { start, end }) => self.remove(start, end)?,
                    Some(Event::Other) => {}
                    None => break,
                }
            }
            for address in std::mem::take(&mut waiting) {
                if self.bring(address)? == Brought::NotYet {
                    waiting.push(address);
                }
            }
        }
    }

    /// As one piece with those it touches.
    fn remove(&mut self, start: u64, end: u64) -> io::Result<()> {
        let before = self.removed.range(..=start).next_back().filter(|(_, until)| **until >= start);
        let from = before.map_or(start, |(from, _)| *from);
        let mut to = end;
        while let Some((&piece, &until)) = self.removed.range(from..=to).next() {
            self.removed.remove(&piece);
            to = to.max(until);
        }
        self.removed.insert(from, to);
        if self.removed.len() > MOST_PIECES {
            return Err(invalid(&format!("more than {MOST_PIECES} pieces of it were given back")));
        }
        Ok(())
    }

    fn is_removed(&self, address: u64) -> bool {
        self.removed.range(..=address).next_back().is_some_and(|(_, to)| *to > address)
    }

    fn bring(&mut self, address: u64) -> io::Result<Brought> {
        let at = |region: &&Region| (region.start..region.start + region.size).contains(&address);
        let unknown = || invalid(&format!("a fault at {address:#x}, which is in no region"));
        let region = *self.regions.iter().find(at).ok_or_else(unknown)?;
        let start = address - (address - region.start) % region.page;
        if self.is_removed(start) {
            let zeroed = self.faults.zero(start, region.page)?;
            return self.awake(start, region.page, zeroed);
        }
        // A neighbour that was given back must not come to life again.
        if self.removed.is_empty() && region.page < AROUND {
            let from = start - (start - region.start) % AROUND;
            let length = AROUND.min(region.start + region.size - from);
            let brought = self.copy(region, from, length)?;
            // Where a neighbour is there already the kernel takes nothing: then it is the page alone.
            if brought != Brought::WasThere {
                return Ok(brought);
            }
        }
        let copied = self.copy(region, start, region.page)?;
        self.awake(start, region.page, copied)
    }

    /// Where the page was there already, another thread had asked for it too: whoever waits is to look again.
    fn awake(&self, start: u64, page: u64, brought: Brought) -> io::Result<Brought> {
        if brought == Brought::WasThere {
            self.faults.wake(start, page)?;
            return Ok(Brought::Here);
        }
        Ok(brought)
    }

    fn copy(&mut self, region: Region, start: u64, length: u64) -> io::Result<Brought> {
        let size = usize::try_from(length).map_err(Error::other)?;
        self.page.resize(size.max(self.page.len()), 0);
        let page = &mut self.page[..size];
        self.memory.read_exact_at(page, region.offset + (start - region.start))?;
        self.faults.copy(start, page)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_was_given_back_is_known_and_nothing_else(pieces in prop::collection::vec((0u64..60, 1u64..9), 0..20)) {
            let file = tempfile::tempfile().unwrap();
            let mut pager = Pager::new(Vec::new(), Faults::new(file.try_clone().unwrap().into()), file);
            for (start, length) in &pieces {
                pager.remove(*start, start + length).unwrap();
            }
            for address in 0..80 {
                let was = pieces.iter().any(|(start, length)| (*start..start + length).contains(&address));
                prop_assert_eq!(pager.is_removed(address), was, "{}", address);
            }
            let apart = pager.removed.iter().zip(pager.removed.iter().skip(1)).all(|((_, end), (next, _))| end < next);
            prop_assert!(apart, "{:?}", pager.removed);
        }
    }

    fn say(text: &str) -> io::Result<Vec<Region>> {
        regions(text.as_bytes(), 1 << 20)
    }

    #[test]
    fn what_firecracker_says_is_believed_as_far_as_the_template_goes() {
        let one =
            r#"[{"base_host_virt_addr":4194304,"size":65536,"offset":4096,"page_size":4096,"page_size_kib":4096}]"#;
        let region = Region { start: 4 << 20, size: 65536, offset: 4096, page: 4096 };
        assert_eq!(say(one).unwrap(), [region]);
        let older = r#"[{"base_host_virt_addr":4194304,"size":65536,"offset":4096,"page_size_kib":4096}]"#;
        assert_eq!(say(older).unwrap(), [region]);
        for bad in [
            "",
            "[]",
            "{}",
            r#"[{"base_host_virt_addr":4194304,"size":65536}]"#,
            r#"[{"base_host_virt_addr":4194304,"size":65536,"offset":1044480}]"#,
            r#"[{"base_host_virt_addr":4194304,"size":65536,"offset":18446744073709486080}]"#,
            r#"[{"base_host_virt_addr":18446744073709486080,"size":65536,"offset":0}]"#,
            r#"[{"base_host_virt_addr":4194305,"size":65536,"offset":0}]"#,
            r#"[{"base_host_virt_addr":4194304,"size":65536,"offset":0,"page_size":0}]"#,
            r#"[{"base_host_virt_addr":4194304,"size":65536,"offset":0,"page_size":4097}]"#,
            r#"[{"base_host_virt_addr":4194304,"size":65536,"offset":0,"page_size":4294967296}]"#,
        ] {
            assert_eq!(say(bad).unwrap_err().kind(), ErrorKind::InvalidData, "{bad}");
        }
    }
}
