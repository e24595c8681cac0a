//! What a Firecracker says of itself, by its two pipes: its log goes to the machine's console, where it would go without
//! one, its metrics to the node's log (level debug).
//!
//! Whoever took over a Firecracker may write what he likes: lines are cut, and so much is read in a second and no more. It
//! never waits for a reader: what its pipe has no room for (64 KiB) it drops.

use std::io;
use std::path::Path;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::unix::pipe;
use tokio::task::JoinSet;
use tokio::time::sleep;

use crate::runtime::microvm::machine::{MachineError, Result, VmDir};

/// Bytes of a line; its metrics, once a minute, are one of some 6000.
const LONGEST_LINE: u64 = 16 << 10;
/// Bytes that are read in a second.
const MOST: u64 = 64 << 10;
const PAUSE: Duration = Duration::from_secs(1);

/// Reads both until what it returns is dropped. One without pipes says nothing.
///
/// # Errors
/// [`MachineError::File`] if the pipes or the console cannot be opened.
pub(super) fn listen(dir: &VmDir) -> Result<JoinSet<()>> {
    let mut readers = JoinSet::new();
    if let Some(log) = open(&dir.log_fifo())? {
        let path = dir.console();
        let console = std::fs::File::options().append(true).create(true).open(&path);
        readers.spawn(to_console(log, console.map_err(MachineError::file("open", &path))?.into()));
    }
    if let Some(metrics) = open(&dir.metrics_fifo())? {
        readers.spawn(to_log(metrics, dir.id().to_string()));
    }
    Ok(readers)
}

fn open(path: &Path) -> Result<Option<Lines>> {
    // It reads on when there is no writer: one that is restarted, or that has not begun.
    match pipe::OpenOptions::new().read_write(true).open_receiver(path) {
        Ok(pipe) => Ok(Some(Lines { pipe: BufReader::new(pipe), left: MOST })),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(MachineError::file("open", path)(error)),
    }
}

async fn to_console(mut log: Lines, mut console: tokio::fs::File) {
    while let Some(line) = log.next().await {
        // It is there for people who look for a reason; a full disk is told by others.
        let _ = console.write_all(&line).await;
        let _ = console.flush().await;
    }
}

async fn to_log(mut metrics: Lines, id: String) {
    while let Some(line) = metrics.next().await {
        let line = String::from_utf8_lossy(&line);
        tracing::debug!(machine = id, metrics = ?line.trim_end(), "Firecracker's metrics");
    }
}

/// Lines of a pipe.
struct Lines {
    pipe: BufReader<pipe::Receiver>,
    /// Bytes that may be read before the next pause.
    left: u64,
}

impl Lines {
    /// The next line with its end, or the next piece of a long one; `None` if the pipe is broken.
    async fn next(&mut self) -> Option<Vec<u8>> {
        if self.left == 0 {
            sleep(PAUSE).await;
            self.left = MOST;
        }
        let mut line = Vec::new();
        let most = self.left.min(LONGEST_LINE);
        let read = (&mut self.pipe).take(most).read_until(b'\n', &mut line).await.ok().filter(|read| *read > 0)?;
        self.left = self.left.saturating_sub(u64::try_from(read).unwrap_or(u64::MAX));
        Some(line)
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::io::Write as _;
    use std::os::unix::fs::OpenOptionsExt;
    use std::time::Instant;

    use super::*;
    use crate::runtime::microvm::machine::firecracker::jailer;
    use crate::runtime::microvm::machine::{VmDirs, VmId, VmmUser};

    /// As Firecracker opens it.
    fn writer(path: &Path) -> File {
        let flags = nix::fcntl::OFlag::O_NONBLOCK.bits();
        File::options().read(true).write(true).custom_flags(flags).open(path).unwrap()
    }

    #[tokio::test]
    async fn a_log_goes_to_the_console_and_no_faster_than_is_good() {
        let base = tempfile::tempdir().unwrap();
        let user = VmmUser { uid: nix::unistd::geteuid().as_raw(), gid: nix::unistd::getegid().as_raw() };
        let dir = VmDirs::new(base.path(), "default").unwrap().of(&VmId::random());
        dir.create(user.uid, user.gid).unwrap();
        assert!(listen(&dir).unwrap().is_empty(), "one of a process before has no pipes");
        let root = base.path().join("root");
        fs::create_dir(&root).unwrap();
        for _ in 0..2 {
            jailer::make_fifos(&dir, &root, user).unwrap();
        }
        let _readers = listen(&dir).unwrap();
        let (mut log, mut metrics) = (writer(&root.join("fc-logs.fifo")), writer(&root.join("fc-metrics.fifo")));
        log.write_all(b"a reason\n").unwrap();
        let begun = Instant::now();
        let size = || fs::metadata(dir.console()).map_or(0, |file| file.len());
        while size() < 9 {
            sleep(Duration::from_millis(1)).await;
        }
        assert_eq!(dir.console_tail(100), "a reason\n");
        // Without an end, and more than a pipe holds.
        let (mut written, mut told) = (0, 0);
        while written < 200_000 {
            match log.write(&[b'x'; 4096]) {
                Ok(some) => written += some,
                Err(_) => sleep(Duration::from_millis(1)).await,
            }
            told += metrics.write(b"{}\n").unwrap_or_default();
        }
        assert!(begun.elapsed() > PAUSE && begun.elapsed() < Duration::from_secs(60), "{:?}", begun.elapsed());
        assert!(told > 0);
    }
}
