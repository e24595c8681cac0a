//! What there is in the guest: images, volumes, containers, and who the guest is.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use lambdalet_proto::agent::v1::{ConfigureRequest, EventKind, Resources};
use nix::mount::{MsFlags, mount};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, WatchDescriptor};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;
use tonic::Status;

use crate::cgroup::Cgroups;
use crate::clock;
use crate::container::{Containers, directory};
use crate::error::{Error, Result, Tried};
use crate::events::Events;
use crate::exec::Execs;
use crate::image::{Images, device};
use crate::network::Network;
use crate::reaper::{PidNamespace, Reaper};
use crate::stage;
use crate::stats::{self, Walks};
use crate::sys::{self, Owned, polled};
use crate::tree;
use crate::volume::Volumes;

/// The scratch disk's serial.
const SCRATCH: &str = "scratch";
/// Name of the Pod's shared memory among volumes; no volume's name begins with a dot.
const SHARED_MEMORY: &str = ".shm";
/// Who a system is, as machine-id(5) has it.
const MACHINE_ID: &str = "/etc/machine-id";
const NONE: Option<&str> = None;
/// Until a guest of one CPU has sent what it has written.
const BEHIND_ANSWER: Duration = Duration::from_millis(2);

/// Where things are.
#[derive(Clone, Debug)]
pub(crate) struct Paths(PathBuf);

impl Default for Paths {
    fn default() -> Self {
        Self("/run/lambdalet".into())
    }
}

impl Paths {
    fn scratch(&self) -> PathBuf {
        self.0.join("scratch")
    }

    /// What of a container is on the scratch disk.
    pub(crate) fn container(&self, id: &str) -> PathBuf {
        directory(&self.scratch(), id)
    }

    /// Where a container's root file system is mounted.
    pub(crate) fn root(&self, id: &str) -> PathBuf {
        self.0.join("roots").join(id)
    }

    /// Where an image is mounted.
    pub(crate) fn image(&self, image: &str) -> PathBuf {
        self.0.join("images").join(image)
    }

    /// A volume in memory.
    pub(crate) fn memory_volume(&self, name: &str) -> PathBuf {
        self.0.join("volumes").join(name)
    }

    /// A volume on the scratch disk.
    pub(crate) fn scratch_volume(&self, name: &str) -> PathBuf {
        self.scratch().join("volumes").join(name)
    }

    /// The Pod's /dev/shm.
    pub(crate) fn shared_memory(&self) -> PathBuf {
        self.memory_volume(SHARED_MEMORY)
    }
}

/// Who the guest is.
#[derive(Debug, Default)]
struct Identity {
    configured: bool,
    scratch: bool,
    /// What all containers together may use; at first whatever there is.
    limits: Resources,
    /// Holds the PID namespace that containers share.
    pause: Option<Arc<OwnedFd>>,
}

/// Watches for kills for want of memory.
#[derive(Debug)]
struct MemoryWatch {
    inotify: AsyncFd<Owned<Inotify>>,
    /// Whose file, and how many kills were told.
    watched: Mutex<HashMap<WatchDescriptor, (String, u64)>>,
}

/// The guest.
#[derive(Debug)]
pub(crate) struct Guest {
    pub(crate) paths: Paths,
    /// Not in a guest, but in namespaces on a host: in tests.
    pub(crate) stand_in: bool,
    pub(crate) reaper: Reaper,
    pub(crate) events: Events,
    pub(crate) cgroups: Cgroups,
    pub(crate) execs: Execs,
    pub(crate) walks: Walks,
    pub(crate) ready_after_ns: u64,
    /// Bytes of memory, and CPUs.
    pub(crate) size: (u64, u32),
    network: Mutex<Network>,
    containers: Mutex<Containers>,
    images: Mutex<Images>,
    volumes: Mutex<Volumes>,
    identity: Mutex<Identity>,
    memory: MemoryWatch,
    loaded: watch::Sender<Option<Result<(), String>>>,
}

impl Guest {
    /// A guest that holds nothing yet.
    ///
    /// # Errors
    /// No inotify.
    pub(crate) fn new(paths: Paths, stand_in: bool) -> io::Result<Self> {
        let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?;
        let inotify = polled(inotify, Interest::READABLE)?;
        // The host's processes see the same hierarchy.
        let own = stand_in.then(|| paths.0.join(format!("cgroup/lambdalet-stand-in-{}", clock::now_ns())));
        let cgroups = Cgroups::new(own, stand_in);
        Ok(Self {
            paths,
            stand_in,
            cgroups,
            memory: MemoryWatch { inotify, watched: Mutex::default() },
            ready_after_ns: clock::uptime_ns(),
            size: stats::size(),
            network: Mutex::default(),
            reaper: Reaper::default(),
            events: Events::default(),
            execs: Execs::default(),
            walks: Walks::default(),
            containers: Mutex::default(),
            images: Mutex::default(),
            volumes: Mutex::default(),
            identity: Mutex::default(),
            loaded: watch::Sender::new(None),
        })
    }

    /// Makes directories and cgroups and brings the network up; after the modules are loaded.
    ///
    /// # Errors
    /// What the kernel refused.
    pub(crate) fn prepare(&self) -> io::Result<()> {
        for part in ["images", "roots", "scratch", "volumes"] {
            fs::create_dir_all(self.paths.0.join(part))?;
        }
        let shared = self.paths.shared_memory();
        fs::create_dir_all(&shared)?;
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
        mount(Some("shm"), &shared, Some("tmpfs"), flags, Some("mode=1777"))?;
        if self.stand_in {
            let cgroups = self.paths.0.join("cgroup");
            fs::create_dir_all(&cgroups)?;
            mount(Some("cgroup2"), &cgroups, Some("cgroup2"), flags, NONE)?;
            fs::create_dir_all(self.cgroups.root())?;
        } else {
            fs::create_dir_all("/etc")?;
            fs::write(MACHINE_ID, "")?;
        }
        *lock(&self.network) = Network::prepare(self.stand_in)?;
        self.cgroups.prepare()
    }

    /// Says that everything is there, or what is not.
    pub(crate) fn loaded(&self, loaded: Result<(), String>) {
        self.loaded.send_replace(Some(loaded));
    }

    /// Waits until everything is there.
    ///
    /// # Errors
    /// What is not.
    pub(crate) async fn is_loaded(&self) -> Result<()> {
        let mut loaded = self.loaded.subscribe();
        // Cancel-safe: only looks.
        let outcome = loaded.wait_for(Option::is_some).await.ok().and_then(|outcome| outcome.clone());
        outcome.unwrap_or(Ok(())).map_err(|reason| Error::state(format!("the guest is not whole: {reason}")))
    }

    /// Whether it has an identity.
    pub(crate) fn configured(&self) -> bool {
        self.identity().configured
    }

    /// Takes an identity: the random numbers first, for all else may draw some. The scratch disk is mounted behind the
    /// answer; what needs it, or anything else, waits for it ([`is_loaded`](Self::is_loaded)).
    ///
    /// # Errors
    /// What does not parse, or the kernel refuses.
    pub(crate) fn configure(self: &Arc<Self>, request: &ConfigureRequest) -> Result<()> {
        let mut identity = self.identity();
        if self.stand_in {
            // A host's clock and names are its own.
            identity.configured = true;
            return Ok(());
        }
        sys::reseed(&request.seed).tried(|| "failed to seed the random number generator".to_owned())?;
        if request.time_ns > 0 {
            clock::set(request.time_ns).tried(|| "failed to set the clock".to_owned())?;
        }
        if !request.hostname.is_empty() {
            nix::unistd::sethostname(&request.hostname).tried(|| "failed to set the host name".to_owned())?;
        }
        lock(&self.network).configure(request)?;
        if !request.machine_id.is_empty() {
            let written = fs::write(MACHINE_ID, format!("{}\n", request.machine_id));
            written.tried(|| "failed to write the guest's machine id".to_owned())?;
        }
        let limits = request.resources.unwrap_or_default();
        if limits != identity.limits {
            self.cgroups.limit_pod(&limits).tried(|| "failed to set the Pod's limits".to_owned())?;
            identity.limits = limits;
        }
        if request.scratch && !identity.scratch {
            identity.scratch = true;
            self.loaded.send_replace(None);
            let guest = Arc::clone(self);
            let said = |error| Status::from(error).message().to_owned();
            tokio::task::spawn(async move {
                // The answer goes first.
                tokio::time::sleep(BEHIND_ANSWER).await;
                tokio::task::spawn_blocking(move || guest.loaded(guest.mount_scratch().map_err(said)));
            });
        }
        identity.configured = true;
        Ok(())
    }

    /// The id by which the guest knows itself; empty until it has an identity, and in a stand-in.
    pub(crate) fn machine_id(&self) -> String {
        if self.stand_in || !self.configured() {
            return String::new();
        }
        fs::read_to_string(MACHINE_ID).unwrap_or_default().trim_end().to_owned()
    }

    fn mount_scratch(&self) -> Result<()> {
        let tried = || "failed to mount the scratch disk".to_owned();
        let device = device(SCRATCH).tried(tried)?.ok_or_else(|| Error::not_found("there is no scratch disk"))?;
        let path = self.paths.scratch();
        // Not nosuid: setuid programs of an image work through its overlay, whose upper layer is here.
        let flags = MsFlags::MS_NODEV | MsFlags::MS_NOATIME;
        mount(Some(&device), &path, Some("ext4"), flags, NONE).tried(tried)?;
        for entry in fs::read_dir(&path).tried(tried)?.flatten().filter(|entry| entry.file_name() != "lost+found") {
            tree::remove(&entry.path()).tried(tried)?;
        }
        Ok(())
    }

    /// The process that holds the PID namespace which containers share.
    ///
    /// # Errors
    /// It cannot be started.
    pub(crate) fn pause(&self) -> io::Result<Arc<OwnedFd>> {
        let mut identity = self.identity();
        if let Some(pause) = &identity.pause {
            return Ok(Arc::clone(pause));
        }
        let mut command = Command::new("/proc/self/exe");
        command.arg0(stage::PAUSE).env_clear();
        let child = self.reaper.spawn(&mut command, PidNamespace::New)?;
        let pause = Arc::new(child.pidfd);
        identity.pause = Some(Arc::clone(&pause));
        Ok(pause)
    }

    /// Begins to watch a container for kills for want of memory.
    pub(crate) fn watch_container(&self, id: &str) {
        let path = self.cgroups.path(id).join("memory.events");
        // Without a memory controller nothing is killed.
        if let Ok(descriptor) = self.memory.inotify.get_ref().0.add_watch(&path, AddWatchFlags::IN_MODIFY) {
            lock(&self.memory.watched).insert(descriptor, (id.to_owned(), 0));
        }
    }

    /// Tells of kills for want of memory, for ever.
    ///
    /// # Errors
    /// inotify fails.
    pub(crate) async fn watch_memory(&self) -> io::Result<()> {
        loop {
            let mut ready = self.memory.inotify.readable().await?;
            let read = ready.try_io(|inotify| inotify.get_ref().0.read_events().map_err(io::Error::from));
            let Ok(events) = read else { continue };
            for event in events? {
                self.memory_event(event.wd, event.mask.contains(AddWatchFlags::IN_IGNORED));
            }
        }
    }

    fn memory_event(&self, descriptor: WatchDescriptor, gone: bool) {
        let mut watched = lock(&self.memory.watched);
        if gone {
            watched.remove(&descriptor);
            return;
        }
        if let Some((id, told)) = watched.get_mut(&descriptor) {
            let kills = self.cgroups.oom_kills(id);
            if kills > *told {
                *told = kills;
                self.events.tell(id, EventKind::OutOfMemory, 0);
            }
        }
    }

    /// Where the scratch disk is mounted.
    pub(crate) fn scratch(&self) -> PathBuf {
        self.paths.scratch()
    }

    pub(crate) fn containers(&self) -> MutexGuard<'_, Containers> {
        lock(&self.containers)
    }

    pub(crate) fn images(&self) -> MutexGuard<'_, Images> {
        lock(&self.images)
    }

    pub(crate) fn volumes(&self) -> MutexGuard<'_, Volumes> {
        lock(&self.volumes)
    }

    fn identity(&self) -> MutexGuard<'_, Identity> {
        lock(&self.identity)
    }
}

/// What is behind these locks is whole between statements.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
