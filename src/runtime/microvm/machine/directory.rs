//! The directory of a machine, `<base>/<namespace>/<id>/`, and what is remembered there of it.
//!
//! The directory is root's. Only [`VmDir::inside`] belongs to the VMM, and what lies there is not believed: a socket is
//! opened without following links, a file is never read to its end.

use std::fmt;
use std::fs::{self, DirBuilder, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};
use serde::{Deserialize, Serialize};
use tokio::net::UnixStream;

use super::MachineSpec;
use super::error::{MachineError, Result};
use super::process::boot_id;
use crate::file::{self, Synced};
use crate::telemetry::chain;

/// containerd's limit on identifiers.
const LONGEST: usize = 76;
/// Names of Firecracker's pipes, in the machine's directory and in its jail.
pub(super) const LOG_FIFO: &str = "fc-logs.fifo";
pub(super) const METRICS_FIFO: &str = "fc-metrics.fifo";
/// Where machines are unless said otherwise.
pub const DEFAULT_NAMESPACE: &str = "default";
/// Bytes of the console that are kept.
const CONSOLE_KEPT: u64 = 1 << 20;

/// The name of a machine: letters, digits and single `.`, `_`, `-` between them, 1 to 76 in all (containerd's rule for
/// identifiers).
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct VmId(String);

/// Where the machines of one namespace are.
#[derive(Clone, Debug)]
pub struct VmDirs {
    path: PathBuf,
}

/// The directory of one machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmDir {
    path: PathBuf,
    id: VmId,
}

/// What a later process of this node has to know of a machine that runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Checkpoint {
    /// The manager that started it, by name.
    pub manager: String,
    /// The VMM's process; 0 for one that is being started, of which so far only the cgroup is known.
    pub pid: i32,
    /// When that was started, in clock ticks after the host's boot: a number that is used again does not pass for it.
    pub start_time: u64,
    /// The host's boot that this was in.
    pub boot_id: String,
    /// How many image slots it has.
    pub image_slots: u8,
    /// What its cgroup was made in.
    pub cgroup_parent: String,
}

// === impl Checkpoint ===

impl Checkpoint {
    /// Of a machine that is being started: what it is to run in is known, so that it is found even if this process ends
    /// before more is.
    ///
    /// # Errors
    /// The host does not say which boot this is.
    pub(super) fn of_start(manager: &str, spec: &MachineSpec) -> Result<Self> {
        Ok(Self {
            manager: manager.to_owned(),
            pid: 0,
            start_time: 0,
            boot_id: boot_id().map_err(MachineError::start("look at the host", spec.dir.id()))?,
            image_slots: spec.image_slots,
            cgroup_parent: spec.cgroup_parent.clone(),
        })
    }
}

// === impl VmId ===

impl VmId {
    /// This name.
    ///
    /// # Errors
    /// [`MachineError::Invalid`] if it breaks the rule.
    pub fn new(name: impl Into<String>) -> Result<Self> {
        let name = name.into();
        check("machine id", &name)?;
        Ok(Self(name))
    }

    /// A fresh name: a version 4 UUID.
    pub fn random() -> Self {
        let mut bytes: [u8; 16] = rand::random();
        bytes[6] = bytes[6] & 0x0f | 0x40;
        bytes[8] = bytes[8] & 0x3f | 0x80;
        let digits: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        let parts = [&digits[..8], &digits[8..12], &digits[12..16], &digits[16..20], &digits[20..]];
        Self(parts.join("-"))
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for VmId {
    type Error = MachineError;

    fn try_from(name: String) -> Result<Self> {
        Self::new(name)
    }
}

impl From<VmId> for String {
    fn from(id: VmId) -> Self {
        id.0
    }
}

impl fmt::Display for VmId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

fn check(what: &str, name: &str) -> Result<()> {
    let invalid =
        |reason: &str| Err(MachineError::Invalid { what: format!("{what} {name:?}"), reason: reason.to_owned() });
    if name.is_empty() || name.len() > LONGEST {
        return invalid("it must have 1 to 76 characters");
    }
    let word = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_alphanumeric());
    if !name.split(['.', '_', '-']).all(word) {
        return invalid("it must be letters and digits, with single '.', '_' or '-' between them");
    }
    Ok(())
}

// === impl VmDirs ===

impl VmDirs {
    /// Below `base`, for machines of that namespace ([`DEFAULT_NAMESPACE`]).
    ///
    /// # Errors
    /// [`MachineError::Invalid`] if the namespace breaks the rule of [`VmId`].
    pub fn new(base: &Path, namespace: &str) -> Result<Self> {
        check("namespace", namespace)?;
        Ok(Self { path: base.join(namespace) })
    }

    /// The directory of that machine, whether or not it is there.
    pub fn of(&self, id: &VmId) -> VmDir {
        VmDir { path: self.path.join(id.as_str()), id: id.clone() }
    }

    /// Every directory there is, by name; what has no machine's name is not ours.
    ///
    /// # Errors
    /// [`MachineError::File`] if they cannot be listed.
    pub fn list(&self) -> Result<Vec<VmDir>> {
        let entries = match fs::read_dir(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(MachineError::file("list", &self.path))?,
        };
        let ids = entries.filter_map(|entry| VmId::new(entry.ok()?.file_name().into_string().ok()?).ok());
        let mut dirs: Vec<VmDir> = ids.map(|id| self.of(&id)).collect();
        dirs.sort_by(|a, b| a.id.cmp(&b.id));
        Ok(dirs)
    }
}

// === impl VmDir ===

impl VmDir {
    /// The machine's name.
    pub fn id(&self) -> &VmId {
        &self.id
    }

    /// The directory itself.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What the VMM sees of the host's disks, and may write to.
    pub fn inside(&self) -> PathBuf {
        self.path.join("vmm")
    }

    /// Firecracker's API socket, once it is started.
    pub fn api_socket(&self) -> PathBuf {
        self.path.join("firecracker.sock")
    }

    /// Where Firecracker's log goes.
    pub fn log_fifo(&self) -> PathBuf {
        self.path.join(LOG_FIFO)
    }

    /// Where Firecracker's metrics go.
    pub fn metrics_fifo(&self) -> PathBuf {
        self.path.join(METRICS_FIFO)
    }

    /// What the VMM writes and the guest's console: a regular file, for all its name.
    pub fn console(&self) -> PathBuf {
        self.path.join("osv.fifo")
    }

    fn checkpoint_path(&self) -> PathBuf {
        self.path.join("machine.json")
    }

    /// Makes the directory, for root alone, and what the VMM sees, for that user. What is there already stays.
    ///
    /// # Errors
    /// [`MachineError::File`].
    pub fn create(&self, uid: u32, gid: u32) -> Result<()> {
        let mut builder = DirBuilder::new();
        builder.mode(0o700).recursive(true);
        let inside = self.inside();
        builder.create(&inside).map_err(MachineError::file("make", &inside))?;
        std::os::unix::fs::chown(&inside, Some(uid), Some(gid)).map_err(MachineError::file("give away", &inside))
    }

    /// Removes it with all there is in it. Removing one that is not there is Ok.
    ///
    /// # Errors
    /// [`MachineError::File`].
    pub fn remove(&self) -> Result<()> {
        match fs::remove_dir_all(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            result => result.map_err(MachineError::file("remove", &self.path)),
        }
    }

    /// Opens the console for a VMM to write to, at its end; it may open it again itself.
    pub(super) fn open_console(&self, uid: u32, gid: u32) -> Result<File> {
        let path = self.console();
        let mut options = fs::OpenOptions::new();
        options.append(true).create(true).mode(0o644);
        let file = options.open(&path).map_err(MachineError::file("open", &path))?;
        std::os::unix::fs::fchown(&file, Some(uid), Some(gid)).map_err(MachineError::file("give away", &path))?;
        Ok(file)
    }

    /// The last bytes of the console, as text.
    pub fn console_tail(&self, bytes: u64) -> String {
        let read = || -> io::Result<Vec<u8>> {
            let mut file = File::open(self.console())?;
            let size = file.metadata()?.len();
            file.seek(SeekFrom::Start(size.saturating_sub(bytes)))?;
            let mut text = Vec::new();
            file.take(bytes).read_to_end(&mut text)?;
            Ok(text)
        };
        // Only ever shown to people: no console is an empty one.
        String::from_utf8_lossy(&read().unwrap_or_default()).into_owned()
    }

    /// Cuts a console of more than 1 MiB off; a VMM goes on at the start. To be called now and then.
    ///
    /// # Errors
    /// [`MachineError::File`].
    pub fn trim_console(&self) -> Result<()> {
        let path = self.console();
        let trim = || -> io::Result<()> {
            let file = fs::OpenOptions::new().write(true).open(&path)?;
            if file.metadata()?.len() > CONSOLE_KEPT { file.set_len(0) } else { Ok(()) }
        };
        match trim() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            result => result.map_err(MachineError::file("shorten", &path)),
        }
    }

    /// Writes the checkpoint. The disk is not waited for: after another boot of the host no machine of it runs.
    pub(super) fn write_checkpoint(&self, checkpoint: &Checkpoint) -> Result<()> {
        let path = self.checkpoint_path();
        write_json(&path, checkpoint, Synced::No).map_err(MachineError::file("write", &path))
    }

    /// What is remembered of the machine; `None` if nothing is, or it cannot be read.
    pub(super) fn read_checkpoint(&self) -> Option<Checkpoint> {
        serde_json::from_slice(&fs::read(self.checkpoint_path()).ok()?).ok()
    }

    /// Gives a regular file that the VMM sees, and may have put a link in the place of, to its user; its size.
    pub(super) fn give_inside(&self, name: &str, uid: u32, gid: u32) -> Result<u64> {
        let inside = self.inside();
        let give = || -> io::Result<u64> {
            let file = File::from(open_without_links(&inside, name, OFlags::WRONLY | OFlags::NONBLOCK)?);
            let seen = file.metadata()?;
            if !seen.is_file() {
                return Err(io::Error::other("it is not a regular file"));
            }
            std::os::unix::fs::fchown(&file, Some(uid), Some(gid))?;
            Ok(seen.len())
        };
        give().map_err(MachineError::file("give away", &inside.join(name)))
    }

    /// Gives a file that the VMM sees, and may have put a link in the place of, this size.
    pub(super) fn resize_inside(&self, name: &str, size: u64) -> Result<()> {
        let inside = self.inside();
        let file = open_without_links(&inside, name, OFlags::WRONLY | OFlags::NONBLOCK).map(File::from);
        file.and_then(|file| file.set_len(size)).map_err(MachineError::file("resize", &inside.join(name)))
    }

    /// Connects to a socket that the VMM has made in `directory`, which is in this one: to that one and nothing else,
    /// even if it has put a link in its place since.
    pub(super) async fn connect(&self, directory: &Path, name: &str) -> io::Result<UnixStream> {
        let socket = open_without_links(directory, name, OFlags::PATH)?;
        // By its descriptor: also because a path in the address of a socket has 107 bytes at the most.
        UnixStream::connect(format!("/proc/self/fd/{}", socket.as_raw_fd())).await
    }
}

/// Shortens the consoles of these machines; what goes wrong is told in the log.
pub async fn trim_consoles(dirs: Vec<VmDir>) {
    let trim = move || {
        for dir in dirs {
            if let Err(error) = dir.trim_console() {
                tracing::warn!(machine = %dir.id(), error = chain(&error), "a console grows");
            }
        }
    };
    if let Err(error) = tokio::task::spawn_blocking(trim).await {
        tracing::warn!(error = chain(&error), "consoles grow");
    }
}

/// The file of that name in the directory; a link is an error.
fn open_without_links(directory: &Path, name: &str, flags: OFlags) -> io::Result<OwnedFd> {
    let dir = File::open(directory)?;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
    Ok(openat2(&dir, name, flags | OFlags::CLOEXEC, Mode::empty(), resolve)?)
}

/// Puts a value in the place of what is there; see [`file::replace`].
pub(super) fn write_json(path: &Path, value: &impl Serialize, synced: Synced) -> io::Result<()> {
    file::replace(path, &path.with_extension("new"), &serde_json::to_vec(value)?, synced)
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::os::unix::fs::{PermissionsExt, symlink};
    use std::os::unix::net::UnixListener;

    use proptest::prelude::*;

    use super::*;

    fn dirs(base: &Path) -> VmDirs {
        VmDirs::new(base, DEFAULT_NAMESPACE).unwrap()
    }

    fn own() -> (u32, u32) {
        (nix::unistd::geteuid().as_raw(), nix::unistd::getegid().as_raw())
    }

    #[test]
    fn names_follow_the_rule_of_containerd() {
        for name in ["a", "A1", "a.b_c-d", &"x".repeat(76), VmId::random().as_str()] {
            assert!(VmId::new(name).is_ok(), "{name}");
        }
        for name in ["", ".", "..", "-a", "a-", "a--b", "a/b", "a b", "ä", &"x".repeat(77)] {
            assert!(VmId::new(name).is_err(), "{name}");
            assert!(VmDirs::new(Path::new("/run"), name).is_err(), "{name}");
        }
    }

    proptest! {
        #[test]
        fn a_name_that_passes_stays_in_its_directory(name in ".{0,80}") {
            if let Ok(id) = VmId::new(name) {
                let dir = dirs(Path::new("/base")).of(&id);
                prop_assert_eq!(dir.path().parent(), Some(Path::new("/base/default")));
                prop_assert_eq!(dir.path().components().count(), 4);
            }
        }
    }

    #[test]
    fn a_random_name_is_a_version_4_uuid() {
        let id = VmId::random();
        let parts: Vec<usize> = id.as_str().split('-').map(str::len).collect();
        assert_eq!(parts, [8, 4, 4, 4, 12]);
        assert_eq!(&id.as_str()[14..15], "4");
        assert!("89ab".contains(&id.as_str()[19..20]));
        assert_ne!(id, VmId::random());
    }

    #[test]
    fn a_directory_is_roots_and_is_removed_with_all_in_it() {
        let base = tempfile::tempdir().unwrap();
        let (uid, gid) = own();
        let all = dirs(base.path());
        assert!(all.list().unwrap().is_empty());
        let dir = all.of(&VmId::new("one").unwrap());
        dir.create(uid, gid).unwrap();
        dir.create(uid, gid).unwrap();
        assert_eq!(fs::metadata(dir.path()).unwrap().permissions().mode() & 0o777, 0o700);
        for file in [dir.console(), dir.log_fifo(), dir.metrics_fifo(), dir.api_socket(), dir.inside().join("x")] {
            fs::write(file, "stale").unwrap();
        }
        symlink("/", dir.inside().join("root")).unwrap();
        assert_eq!(all.list().unwrap(), std::slice::from_ref(&dir));
        dir.remove().unwrap();
        dir.remove().unwrap();
        assert!(all.list().unwrap().is_empty());
    }

    #[test]
    fn a_checkpoint_is_read_back_and_a_torn_one_is_none() {
        let base = tempfile::tempdir().unwrap();
        let (uid, gid) = own();
        let dir = dirs(base.path()).of(&VmId::random());
        dir.create(uid, gid).unwrap();
        assert_eq!(dir.read_checkpoint(), None);
        let checkpoint = Checkpoint {
            manager: "qemu".to_owned(),
            pid: 7,
            start_time: 8,
            boot_id: "b".to_owned(),
            image_slots: 2,
            cgroup_parent: "l".to_owned(),
        };
        dir.write_checkpoint(&checkpoint).unwrap();
        assert_eq!(dir.read_checkpoint(), Some(checkpoint));
        fs::write(dir.checkpoint_path(), "{\"pid\":").unwrap();
        assert_eq!(dir.read_checkpoint(), None);
    }

    #[tokio::test]
    async fn a_socket_is_never_a_link_to_another() {
        let base = tempfile::tempdir().unwrap();
        let (uid, gid) = own();
        let dir = dirs(base.path()).of(&VmId::new("x".repeat(76)).unwrap());
        dir.create(uid, gid).unwrap();
        let outside = base.path().join("docker.sock");
        let _outside = UnixListener::bind(&outside).unwrap();
        symlink(&outside, dir.inside().join("agent.sock")).unwrap();
        assert!(dir.connect(&dir.inside(), "agent.sock").await.is_err());
        symlink(base.path(), dir.inside().join("sub")).unwrap();
        assert!(dir.connect(&dir.inside(), "sub/docker.sock").await.is_err());
        assert!(dir.connect(&dir.inside(), "../../../docker.sock").await.is_err());
        for name in ["agent.sock", "sub/docker.sock", "sub"] {
            assert!(dir.resize_inside(name, 1).is_err() && dir.give_inside(name, uid, gid).is_err(), "{name}");
        }
        fs::write(dir.inside().join("file"), "").unwrap();
        dir.resize_inside("file", 7).unwrap();
        assert_eq!(dir.give_inside("file", uid, gid).unwrap(), 7);
        fs::rename(&outside, dir.inside().join("qmp.sock")).unwrap();
        dir.connect(&dir.inside(), "qmp.sock").await.unwrap();
    }

    #[test]
    fn a_console_is_shown_by_its_end_and_kept_short() {
        let base = tempfile::tempdir().unwrap();
        let (uid, gid) = own();
        let dir = dirs(base.path()).of(&VmId::random());
        dir.create(uid, gid).unwrap();
        assert_eq!(dir.console_tail(10), "");
        dir.trim_console().unwrap();
        let mut console = dir.open_console(uid, gid).unwrap();
        console.write_all(b"first last").unwrap();
        assert_eq!(dir.console_tail(4), "last");
        console.write_all(&vec![b'x'; 1 << 20]).unwrap();
        dir.trim_console().unwrap();
        console.write_all(b"again").unwrap();
        assert_eq!(dir.console_tail(100), "again");
    }
}
