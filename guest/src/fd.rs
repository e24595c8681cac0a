//! Pipes and terminals as asynchronous streams.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::termios::{LocalModes, SpecialCodeIndex, tcgetattr};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::sys::{Owned, polled};

/// Control-D.
const END_OF_TRANSMISSION: u8 = 4;

/// One end of a pipe, or the agent's side of a terminal. Its bytes never wait in the agent.
#[derive(Clone, Debug)]
pub(crate) struct FdStream(Arc<AsyncFd<Owned<OwnedFd>>>);

impl FdStream {
    /// Takes a descriptor that can be polled.
    ///
    /// # Errors
    /// The kernel cannot poll it.
    pub(crate) fn new(fd: OwnedFd) -> io::Result<Self> {
        fcntl_setfl(&fd, fcntl_getfl(&fd)? | OFlags::NONBLOCK)?;
        Ok(Self(Arc::new(polled(fd, Interest::READABLE | Interest::WRITABLE)?)))
    }

    /// Reads what there is; 0 at the end, also of a terminal that nobody has open. Cancel-safe.
    ///
    /// # Errors
    /// What the kernel refused.
    pub(crate) async fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let mut ready = self.0.readable().await?;
            match ready.try_io(|fd| Ok(rustix::io::read(&fd.get_ref().0, &mut *buffer)?)) {
                // A terminal whose other side is closed.
                Ok(Err(error)) if error.raw_os_error() == Some(rustix::io::Errno::IO.raw_os_error()) => return Ok(0),
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(read) => return read,
                Err(_would_block) => {}
            }
        }
    }

    /// Writes all of it.
    ///
    /// # Errors
    /// [`io::ErrorKind::BrokenPipe`] if nobody reads any more.
    pub(crate) async fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let mut ready = self.0.writable().await?;
            match ready.try_io(|fd| Ok(rustix::io::write(&fd.get_ref().0, bytes)?)) {
                Ok(Ok(written)) => bytes = &bytes[written..],
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(Err(error)) => return Err(error),
                Err(_would_block) => {}
            }
        }
        Ok(())
    }

    /// Gives a terminal another size; 0 in either direction is none.
    pub(crate) fn resize(&self, columns: u32, rows: u32) {
        let (Ok(columns @ 1..), Ok(rows @ 1..)) = (u16::try_from(columns), u16::try_from(rows)) else { return };
        let size = rustix::termios::Winsize { ws_col: columns, ws_row: rows, ws_xpixel: 0, ws_ypixel: 0 };
        // What is no terminal has no size.
        let _ = rustix::termios::tcsetwinsize(&self.0.get_ref().0, size);
    }

    /// What somebody types at a terminal to end the input of its process: the terminal's key for that, twice in the middle
    /// of a line, where the first only hands over what was typed. A process that reads key by key gets one Control-D.
    pub(crate) fn end_of_file(&self, mid_line: bool) -> Vec<u8> {
        match tcgetattr(&self.0.get_ref().0) {
            Ok(modes) if modes.local_modes.contains(LocalModes::ICANON) => {
                vec![modes.special_codes[SpecialCodeIndex::VEOF]; if mid_line { 2 } else { 1 }]
            }
            _ => vec![END_OF_TRANSMISSION],
        }
    }
}
