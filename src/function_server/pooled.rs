//! Replicas that are microVMs, each in a setup of the pool: the kernel and initramfs that the caller names, its image as a
//! read-only disk, an address of the node's range.
//!
//! ```text
//! create   files opened -> share of the node -> setup -> address -> machine -> image in its slot -> address led there
//! release  machine killed -> address rests -> setup made anew and idle, or destroyed
//! ```
//! Whatever fails on the way is undone to where it began. What runs in the guest is the caller's: no agent of this node is
//! there, and nothing is asked of it.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use futures::FutureExt;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, TryAcquireError};
use tokio::task::JoinSet;
use tracing::warn;

use super::replicas::{Reason, Refusal, Replica, ReplicaWish, Replicas, TryAgain};
use crate::network::NetworkError;
use crate::network::egress;
use crate::network::ipam::{Ipam, NO_POD};
use crate::network::tap::{Taps, mac_of};
use crate::runtime::locked;
use crate::runtime::microvm::machine::arguments::Services;
use crate::runtime::microvm::machine::pin::Pins;
use crate::runtime::microvm::machine::pool::{Setup, SetupPool, Setups};
use crate::runtime::microvm::machine::{
    Asset, AssetDirs, Machine, MachineError, MachineManager, MachineSpec, SCRATCH, TapLink, VmDirs, VmId, trim_consoles,
};
use crate::telemetry::chain;

/// When replicas end, nobody knows.
const RETRY: Duration = Duration::from_secs(5);
/// How often consoles are looked at.
const UPKEEP: Duration = Duration::from_secs(10);
/// Bytes of the disk that a guest can write to; taken from the host as they are written.
const SCRATCH_BYTES: u64 = 256 << 20;
/// Where the image is.
const IMAGE_SLOT: u8 = 0;
/// What a guest's network card is called in it.
const INTERFACE: &str = "eth0";
/// Says in a replica's directory how many MiB of memory it has.
const SHARE_FILE: &str = "replica-mib";

/// What replicas are made of.
pub struct PooledParams<S> {
    /// Their setups.
    pub pool: SetupPool<S>,
    /// Where the setups' directories are: for these replicas alone.
    pub dirs: VmDirs,
    /// Starts their machines.
    pub manager: Arc<dyn MachineManager>,
    /// The node's Pod network.
    pub taps: Arc<dyn Taps>,
    /// Its addresses.
    pub ipam: Arc<Ipam>,
    /// Beneath which directories callers may name files (`--vm-asset-dirs`).
    pub assets: AssetDirs,
    /// What guests are told of.
    pub services: Services,
    /// The cgroup right below the cgroup root that those of machines are made in: the node's own, since one further down
    /// is a Pod's and goes with its last machine.
    pub cgroup_parent: String,
    /// Which of the host's CPUs they run on.
    pub pins: Pins,
    /// Replicas at once.
    pub most: usize,
    /// Bytes of memory that all of them may have together.
    pub memory: u64,
}

/// Replicas of the pool.
pub struct PooledReplicas<S> {
    inner: Arc<Inner<S>>,
    /// Who looks after what runs and what is ready; it ends with this.
    upkeep: JoinSet<()>,
}

struct Inner<S> {
    params: PooledParams<S>,
    places: Arc<Semaphore>,
    /// In MiB.
    memory: Arc<Semaphore>,
    running: Mutex<HashMap<VmId, Running>>,
    /// Those of them that did not start and did not end either, whom nobody knows.
    orphans: Mutex<Vec<VmId>>,
    adopted: Mutex<Vec<Replica>>,
}

struct Running {
    machine: Arc<dyn Machine>,
    _share: Share,
}

/// A replica's part of what the node has for all.
struct Share {
    _place: OwnedSemaphorePermit,
    _memory: OwnedSemaphorePermit,
}

/// The files of a replica, open.
struct Files {
    kernel: Asset,
    initrd: Asset,
    image: Option<Asset>,
}

// === impl PooledReplicas ===

impl<S: Setups + 'static> PooledReplicas<S> {
    /// Takes over the replicas that an earlier process of this node left running; what is left of others is removed.
    ///
    /// # Errors
    /// The directories cannot be listed.
    pub async fn open(params: PooledParams<S>) -> Result<Self, MachineError> {
        let mib = usize::try_from(params.memory >> 20).unwrap_or(usize::MAX).min(Semaphore::MAX_PERMITS);
        let inner = Arc::new(Inner {
            places: Arc::new(Semaphore::new(params.most.min(Semaphore::MAX_PERMITS))),
            memory: Arc::new(Semaphore::new(mib)),
            running: Mutex::default(),
            orphans: Mutex::default(),
            adopted: Mutex::default(),
            params,
        });
        for dir in inner.params.dirs.list()? {
            let id = dir.id().clone();
            inner.params.pool.adopt(Setup { dir: dir.clone(), tap: unknown_tap() });
            let found = match inner.params.manager.adopt(&dir).await {
                Ok(found) => found,
                Err(error) => {
                    // Its setup stays taken; the next process tries again.
                    warn!(replica = %id, error = chain(&error), "failed to take over what is left of a replica");
                    continue;
                }
            };
            if let Some(machine) = found {
                let machine: Arc<dyn Machine> = machine.into();
                if let Some(replica) = inner.adopt(id.clone(), &machine) {
                    locked(&inner.adopted).push(replica);
                    continue;
                }
                warn!(replica = %id, "a replica that runs has no place any more: it is ended");
                if let Err(error) = machine.kill().await {
                    // Its setup stays taken; the next process tries again.
                    warn!(replica = %id, error = chain(&error), "failed to end a replica that has no place any more");
                    continue;
                }
            }
            inner.give_back(&id, inner.params.ipam.release(&key(&id))).await;
        }
        let mut upkeep = JoinSet::new();
        upkeep.spawn(look_after(Arc::clone(&inner)));
        Ok(Self { inner, upkeep })
    }

    /// Makes setups ahead of time from now on, and others in the place of those that are taken.
    pub fn keep_ready(&mut self) {
        let inner = Arc::clone(&self.inner);
        self.upkeep.spawn(async move { inner.params.pool.keep_filled().await });
    }

    /// Ends every replica and removes every setup, so that nothing of them stays on the host. What cannot be removed is told
    /// in the log.
    pub async fn end(&self) {
        let ids: Vec<VmId> = locked(&self.inner.running).keys().cloned().collect();
        for id in ids {
            if let Err(error) = self.release(id.as_str()).await {
                warn!(replica = %id, error = chain(&error), "failed to end a replica");
            }
        }
        if let Err(error) = self.inner.params.pool.drain().await {
            warn!(error = chain(&error), "failed to remove a VM setup");
        }
    }

    /// How many replicas run.
    pub fn count(&self) -> usize {
        locked(&self.inner.running).len()
    }
}

#[async_trait]
impl<S: Setups + 'static> Replicas for PooledReplicas<S> {
    async fn create(&self, wish: &ReplicaWish) -> Result<Replica, Refusal> {
        let inner = &self.inner;
        check_interface(wish)?;
        let files = inner.open(wish)?;
        let share = inner.share(wish.memory)?;
        let setup = inner.params.pool.get().await.map_err(|error| Refusal::failed("make a VM setup", error))?;
        let id = setup.dir.id().clone();
        match inner.start(&setup, wish, &files).await {
            Ok((machine, address)) => Ok(inner.keep(id, machine, address, share)),
            Err(refusal) => {
                inner.undo(&setup, share).await;
                Err(refusal)
            }
        }
    }

    async fn release(&self, id: &str) -> Result<(), Refusal> {
        self.inner.release(&VmId::new(id).map_err(|_| Refusal::NotAssigned)?).await
    }

    fn adopted(&self) -> Vec<Replica> {
        std::mem::take(&mut locked(&self.inner.adopted))
    }
}

// === impl Inner ===

impl<S: Setups> Inner<S> {
    /// Opens what the caller names: beneath the directories that are allowed, and from then on it is that file and no other.
    fn open(&self, wish: &ReplicaWish) -> Result<Files, Refusal> {
        let open = |field: &'static str, path: &Path| {
            self.params.assets.open(path).map_err(|error| Refusal::Invalid { field, reason: chain(&error) })
        };
        Ok(Files {
            kernel: open("kernelImagePath", &wish.kernel)?,
            initrd: open("initrdPath", &wish.initrd)?,
            image: wish.image.as_deref().map(|path| open("imageName", path)).transpose()?,
        })
    }

    /// A share of this size, if there is one.
    fn share(&self, memory: u64) -> Result<Share, Refusal> {
        let refused = |reason| move |_: TryAcquireError| Refusal::TryAgain(TryAgain { reason, retry_after: RETRY });
        let place = Arc::clone(&self.places).try_acquire_owned().map_err(refused(Reason::Replicas))?;
        let all = self.params.memory;
        if memory > all {
            let reason = format!("{} MiB: this node has {} MiB for all replicas", memory >> 20, all >> 20);
            return Err(Refusal::invalid("mem", reason));
        }
        let mib = u32::try_from(memory >> 20).unwrap_or(u32::MAX);
        let memory = Arc::clone(&self.memory).try_acquire_many_owned(mib).map_err(refused(Reason::Memory))?;
        Ok(Share { _place: place, _memory: memory })
    }

    /// Starts a machine in the setup. On an error what is left is for [`undo`](Self::undo).
    async fn start(
        &self,
        setup: &Setup,
        wish: &ReplicaWish,
        files: &Files,
    ) -> Result<(Arc<dyn Machine>, IpAddr), Refusal> {
        let id = setup.dir.id();
        let address = match self.params.ipam.allocate(&key(id)) {
            Ok(address) => address,
            Err(NetworkError::Exhausted { .. }) => {
                return Err(Refusal::TryAgain(TryAgain { reason: Reason::Address, retry_after: RETRY }));
            }
            Err(error) => return Err(Refusal::failed("give the replica an address", error)),
        };
        let spec = self.spec(setup, wish, files, address)?;
        let machine = self.params.manager.boot(&spec).await;
        let machine: Arc<dyn Machine> = machine.map_err(|error| started(id, error))?.into();
        // A tap that was handed over is to end with its machine and its setup.
        drop(spec);
        match self.finish(machine.as_ref(), id, address, files).await {
            Ok(()) => Ok((machine, address)),
            Err(refusal) => {
                if let Err(error) = machine.kill().await {
                    warn!(replica = %id, error = chain(&error), "failed to end a replica that did not start");
                }
                Err(refusal)
            }
        }
    }

    /// The image and the network of a machine that runs.
    async fn finish(&self, machine: &dyn Machine, id: &VmId, address: IpAddr, files: &Files) -> Result<(), Refusal> {
        if let Some(image) = &files.image {
            // By its descriptor: the name may lead elsewhere by now.
            let path = PathBuf::from(format!("/proc/self/fd/{}", image.file().as_raw_fd()));
            machine.put_image(IMAGE_SLOT, &path).await.map_err(|error| started(id, error))?;
        }
        let led = self.params.taps.lead(id.as_str(), address).await;
        led.map_err(|error| Refusal::failed(&format!("lead {address} to replica {id}"), error))
    }

    fn spec(&self, setup: &Setup, wish: &ReplicaWish, files: &Files, address: IpAddr) -> Result<MachineSpec, Refusal> {
        let dir = &setup.dir;
        let scratch = dir.inside().join(SCRATCH);
        let prepare = || -> io::Result<()> {
            fs::File::create_new(&scratch)?.set_len(SCRATCH_BYTES)?;
            fs::write(dir.path().join(SHARE_FILE), (wish.memory >> 20).to_string())
        };
        prepare().map_err(|error| Refusal::failed(&format!("prepare the directory of replica {}", dir.id()), error))?;
        let mut kernel_args = vec![wish.kernel_args.clone()];
        kernel_args.extend(self.params.services.kernel_args(dir.id()).map_err(|error| started(dir.id(), error))?);
        kernel_args.push(self.address_argument(address, wish.name_server)?);
        kernel_args.retain(|argument| !argument.is_empty());
        let held = self.params.pins.next(wish.cpus);
        let held = held.map_err(|error| Refusal::failed("read which CPUs this host has", error))?;
        Ok(MachineSpec {
            dir: dir.clone(),
            kernel: files.kernel.clone(),
            initramfs: files.initrd.clone(),
            kernel_args,
            memory: wish.memory,
            vcpus: wish.cpus,
            cpus: held.cpus,
            numa_node: held.numa_node,
            tap: Some(TapLink { mac: mac_of(address), ..setup.tap.clone() }),
            scratch,
            image_slots: 1,
            cgroup_parent: self.params.cgroup_parent.clone(),
            template: None,
        })
    }

    /// The guest's kernel sets its address itself (Documentation/admin-guide/nfs/nfsroot.rst, `ip=`).
    fn address_argument(&self, address: IpAddr, name_server: IpAddr) -> Result<String, Refusal> {
        let (IpAddr::V4(_), IpAddr::V4(gateway)) = (address, self.params.ipam.gateway()) else {
            return Err(Refusal::Missing("replicas need IPv4 addresses, and this node's range has none".to_owned()));
        };
        let mask = u32::MAX.checked_shl(32 - u32::from(self.params.ipam.prefix_len())).unwrap_or(0);
        Ok(format!("ip={address}::{gateway}:{}::{INTERFACE}:off:{name_server}", Ipv4Addr::from(mask)))
    }

    fn keep(&self, id: VmId, machine: Arc<dyn Machine>, address: IpAddr, share: Share) -> Replica {
        let ends = Arc::clone(&machine);
        locked(&self.running).insert(id.clone(), Running { machine, _share: share });
        let ended = async move {
            ends.exited().await;
        }
        .boxed();
        Replica { id: id.to_string(), address, ended }
    }

    /// Gives the setup of a replica back that did not start.
    async fn undo(&self, setup: &Setup, share: Share) {
        let id = setup.dir.id();
        match self.params.manager.adopt(&setup.dir).await {
            // Nobody was told of its address.
            Ok(None) => self.give_back(id, self.params.ipam.discard(&key(id))).await,
            Ok(Some(machine)) => {
                // It keeps what it takes until it has ended.
                warn!(replica = %id, "a replica that did not start has not ended either");
                locked(&self.running).insert(id.clone(), Running { machine: machine.into(), _share: share });
                locked(&self.orphans).push(id.clone());
            }
            // Its directory says where its cgroup is; the next process tries again.
            Err(error) => {
                warn!(replica = %id, error = chain(&error), "failed to clean up a replica that did not start");
            }
        }
    }

    /// Goes on with a machine that was found, if it has a share of what there is now.
    fn adopt(&self, id: VmId, machine: &Arc<dyn Machine>) -> Option<Replica> {
        let mib = fs::read_to_string(machine.dir().path().join(SHARE_FILE)).ok()?.parse::<u64>().ok()?;
        let share = self.share(mib.checked_mul(1 << 20)?).ok()?;
        let address = self.params.ipam.allocate(&key(&id)).ok()?;
        Some(self.keep(id, Arc::clone(machine), address, share))
    }

    /// Ends a replica and gives back what it has taken.
    async fn release(&self, id: &VmId) -> Result<(), Refusal> {
        let running = locked(&self.running).remove(id).ok_or(Refusal::NotAssigned)?;
        let killed = running.machine.kill().await.map_err(|error| Refusal::failed(&format!("end replica {id}"), error));
        let rests = |()| {
            let rests = self.params.ipam.release(&key(id));
            rests.map_err(|error| Refusal::failed(&format!("let the address of replica {id} rest"), error))
        };
        if let Err(refusal) = killed.and_then(rests) {
            // Neither its setup nor its address is to be reused before; whoever releases it again tries again.
            locked(&self.running).insert(id.clone(), running);
            return Err(refusal);
        }
        let given = self.params.pool.give_back(id).await;
        given.map_err(|error| Refusal::failed(&format!("clean the setup of replica {id}"), error))
    }

    /// Tries again to end those that did not start.
    async fn release_orphans(&self) {
        let orphans = std::mem::take(&mut *locked(&self.orphans));
        for id in orphans {
            match self.release(&id).await {
                Ok(()) | Err(Refusal::NotAssigned) => {}
                // That it does not end was told; there will be another attempt.
                Err(_) => locked(&self.orphans).push(id),
            }
        }
    }

    /// Gives a setup back that no replica is in; `freed` is what became of its address.
    async fn give_back(&self, id: &VmId, freed: Result<(), NetworkError>) {
        if let Err(error) = freed {
            warn!(replica = %id, error = chain(&error), "failed to free the address of a replica that is not there");
        }
        if let Err(error) = self.params.pool.give_back(id).await {
            warn!(replica = %id, error = chain(&error), "failed to clean a VM setup: it is destroyed");
        }
    }
}

/// Goes on for as long as there are replicas to look after.
async fn look_after<S: Setups>(inner: Arc<Inner<S>>) {
    let mut looks = tokio::time::interval(UPKEEP);
    loop {
        looks.tick().await;
        let dirs = locked(&inner.running).values().map(|one| one.machine.dir().clone()).collect();
        trim_consoles(dirs).await;
        inner.release_orphans().await;
    }
}

/// Whom the node's addresses know a replica by.
fn key(id: &VmId) -> String {
    format!("{NO_POD}{id}")
}

fn started(id: &VmId, error: MachineError) -> Refusal {
    Refusal::failed(&format!("start replica {id}"), error)
}

/// Of a setup of an earlier process: it is made anew before anybody has it.
fn unknown_tap() -> TapLink {
    TapLink { name: String::new(), mac: [0; 6], device: None, namespace: None }
}

/// Traffic leaves by the host's routes; a caller that counts on an interface is told if it is another.
fn check_interface(wish: &ReplicaWish) -> Result<(), Refusal> {
    let Some(wanted) = &wish.inet_dev else { return Ok(()) };
    let found = egress::interface().map_err(|error| Refusal::failed("read the host's routes", error))?;
    match found {
        Some(uplink) if uplink == *wanted => Ok(()),
        Some(uplink) => Err(Refusal::invalid("inetDev", format!("traffic of this node leaves by {uplink}"))),
        None => Err(Refusal::invalid("inetDev", "this node has no default route")),
    }
}

#[cfg(test)]
mod tests;
