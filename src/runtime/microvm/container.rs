//! Containers: create, start, stop, remove, status, log.

use std::sync::Arc;
use std::time::Duration;

use futures::stream::BoxStream;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

use super::checkpoint::{ContainerRecord, Phase};
use super::fetch::fetch_log;
use super::image::{BlockImage, ImageConfig};
use super::logs::LogBook;
use super::sandbox::{ANSWER, Log, Sandbox};
use super::slots::Place;
use super::vm::{GuestContainer, GuestMount, GuestVolume, MountSource, Vm, VolumeKind};
use super::volumes::{Volume, of_mount};
use super::{Inner, MicrovmRuntime, copy};
use crate::runtime::types::{
    ContainerConfig, ContainerId, ContainerState, ContainerStatus, EventKind, Grace, ImageId, LogChunk, LogOptions,
    SandboxId,
};
use crate::runtime::{Kind, Result, RuntimeError, blocking, locked};

/// How long a killed process may take to be gone, before its microVM is ended.
const KILL_PATIENCE: Duration = Duration::from_secs(20);
/// Pause before a guest is asked again.
const AGAIN: Duration = Duration::from_millis(200);

impl MicrovmRuntime {
    /// The sandbox of a container that is there.
    pub(super) fn of_container(&self, id: &ContainerId) -> Option<Arc<Sandbox>> {
        let (sandbox, _) = id.as_str().rsplit_once('.')?;
        self.sandbox(sandbox).filter(|sandbox| sandbox.record().containers.contains_key(id.as_str()))
    }

    pub(super) fn known_container(&self, id: &ContainerId) -> Result<Arc<Sandbox>> {
        let absent = || RuntimeError::new(Kind::NotFound, format!("there is no container {id}"));
        self.of_container(id).ok_or_else(absent)
    }

    /// The VM of a container that runs.
    pub(super) async fn running(&self, id: &ContainerId) -> Result<Arc<dyn Vm>> {
        let sandbox = self.known_container(id)?;
        let status = self.status(id).await?;
        let idle = || RuntimeError::new(Kind::Invalid, format!("container {id} does not run"));
        sandbox.vm().filter(|_| status.state == ContainerState::Running).ok_or_else(idle)
    }

    pub(super) async fn create(&self, sandbox: &SandboxId, config: &ContainerConfig) -> Result<ContainerId> {
        let tried = || format!("failed to create container {} of {}", config.name, config.pod);
        let failed = |kind, what: &str| RuntimeError::new(kind, format!("{}: {what}", tried()));
        let found = self.sandbox(sandbox.as_str());
        let sandbox = found.ok_or_else(|| failed(Kind::NotFound, &format!("there is no sandbox {sandbox}")))?;
        let _turn = sandbox.turn.lock().await;
        let same = |(_, one): &(&String, &ContainerRecord)| one.name == config.name && one.attempt == config.attempt;
        if let Some((id, _)) = sandbox.record().containers.iter().find(same) {
            return Ok(id.as_str().into());
        }
        let elsewhere = |other: &Arc<Sandbox>| other.record().containers.iter().any(|one| same(&one));
        if let Some(other) = self.sandboxes(Some(&config.pod.uid)).iter().find(|other| elsewhere(other)) {
            return Err(failed(Kind::AlreadyExists, &format!("it exists in another sandbox, {}", other.id)));
        }
        let vm = sandbox.vm().filter(|_| sandbox.record().phase == Phase::Running);
        let vm = vm.ok_or_else(|| failed(Kind::Invalid, &format!("sandbox {} is not ready", sandbox.id)))?;
        self.check_target(&sandbox, config).await?;
        let image = self.place(&sandbox, &vm, config, &config.image).await?;
        let (mounts, returned) = self.mounts(&sandbox, &vm, config).await?;
        let id = format!("{}.{:08x}", sandbox.id, rand::random::<u32>());
        let merged = merged(config, &image);
        let stop = config.stop_signal.clone().unwrap_or_else(|| image.stop_signal.clone());
        let stop = if stop.is_empty() { "SIGTERM".to_owned() } else { stop };
        let record = ContainerRecord::new(config, stop, returned);
        sandbox.change(|known| known.containers.insert(id.clone(), record)).await?;
        let made = vm.create(GuestContainer { id: id.clone(), config: merged, image, mounts }).await;
        if let Err(error) = made {
            // What the guest may have made of it goes with the sandbox, and is not listed.
            sandbox.change(|known| known.containers.remove(&id)).await?;
            return Err(error);
        }
        self.inner.open_log(&sandbox, &id, false).await?;
        Ok(id.into())
    }

    async fn check_target(&self, sandbox: &Arc<Sandbox>, config: &ContainerConfig) -> Result<()> {
        let Some(target) = &config.pid_target else { return Ok(()) };
        let name = sandbox.record().containers.get(target.as_str()).map(|one| one.name.clone());
        let (kind, what) = match name {
            None => (Kind::NotFound, format!("there is no target container {target} in its sandbox")),
            Some(name) => {
                if self.status(target).await?.state == ContainerState::Running {
                    return Ok(());
                }
                (Kind::Invalid, format!("its target container {name} does not run"))
            }
        };
        Err(RuntimeError::new(kind, format!("failed to create container {} of {}: {what}", config.name, config.pod)))
    }

    /// Sees to it that the image, one of the container's, lies behind a slot; what it says. The caller has the sandbox's turn.
    async fn place(
        &self,
        sandbox: &Sandbox,
        vm: &Arc<dyn Vm>,
        container: &ContainerConfig,
        image: &ImageId,
    ) -> Result<ImageConfig> {
        let block = self.inner.images.block(image).await?;
        let config = block.config.clone();
        let place = {
            let record = sandbox.record();
            // Of the container that is being made nothing is written down yet.
            let used = |held: &ImageId| {
                images_of(container).any(|own| own == held) || record.containers.values().any(|one| one.uses(held))
            };
            record.slots.place(image, used)
        };
        let full = || {
            let text = format!(
                "image {image} has no place in sandbox {}: all {} are in use",
                sandbox.id,
                self.inner.vms.slots()
            );
            RuntimeError::new(Kind::Unsupported, text)
        };
        let slot = match place.ok_or_else(full)? {
            Place::Taken(_) => {
                keep(sandbox, image, block);
                return Ok(config);
            }
            Place::Free(slot) => slot,
            Place::Instead(slot, held) => {
                vm.take_image(slot, &held).await?;
                sandbox.change(|record| record.slots.take(slot)).await?;
                locked(&sandbox.blocks).remove(&held);
                slot
            }
        };
        vm.put_image(slot, image, &block.path).await?;
        sandbox.change(|record| record.slots.put(slot, image)).await?;
        keep(sandbox, image, block);
        Ok(config)
    }

    /// Makes the volumes of a container that are not there yet; its mounts, and what is to be copied back.
    async fn mounts(
        &self,
        sandbox: &Sandbox,
        vm: &Arc<dyn Vm>,
        config: &ContainerConfig,
    ) -> Result<(Vec<GuestMount>, Vec<(String, std::path::PathBuf)>)> {
        let (mut mounts, mut returned) = (Vec::new(), Vec::new());
        for mount in &config.mounts {
            let refused = |why: String| {
                let text = format!("failed to mount {} in container {}: {why}", mount.container_path, config.name);
                RuntimeError::new(Kind::Unsupported, text)
            };
            if let Some(image) = &mount.image {
                self.place(sandbox, vm, config, image).await?;
                mounts.push(GuestMount {
                    source: MountSource::Image(image.clone()),
                    part: mount.sub_path.clone(),
                    container_path: mount.container_path.clone(),
                    read_only: true,
                });
                continue;
            }
            let volume = of_mount(mount, &self.inner.options.places).map_err(refused)?;
            let name = volume.name();
            let file = self.inner.make_volume(sandbox, vm, &name, &volume).await?;
            if !file.is_empty() && !mount.sub_path.is_empty() {
                return Err(refused(format!(
                    "{} is a file and has no part {:?}",
                    mount.host_path.display(),
                    mount.sub_path
                )));
            }
            if let Volume::Returned(path) = &volume {
                returned.push((name.clone(), path.clone()));
            }
            mounts.push(GuestMount {
                source: MountSource::Volume(name),
                part: if file.is_empty() { mount.sub_path.clone() } else { file },
                container_path: mount.container_path.clone(),
                // As a kubelet has it: what is copied belongs to the node, which changes it. A guest's agent must find its
                // own files there and no links that a workload has laid.
                read_only: mount.read_only || matches!(volume, Volume::Copied(_)),
            });
        }
        Ok((mounts, returned))
    }

    pub(super) async fn start(&self, id: &ContainerId) -> Result<()> {
        let sandbox = self.known_container(id)?;
        match self.status(id).await?.state {
            ContainerState::Running => return Ok(()),
            ContainerState::Exited => {
                let text = format!("failed to start container {id}: it has exited already");
                return Err(RuntimeError::new(Kind::Invalid, text));
            }
            ContainerState::Created => {}
        }
        let gone =
            || RuntimeError::new(Kind::Invalid, format!("failed to start container {id}: its microVM has ended"));
        let vm = sandbox.vm().ok_or_else(gone)?;
        // Before it starts: whoever waits for that may be gone by then.
        self.inner.open_log(&sandbox, id.as_str(), true).await?;
        let started = vm.start(id.as_str()).await;
        self.inner.look(&sandbox).await;
        started
    }

    pub(super) async fn stop(&self, id: &ContainerId, grace: Grace) -> Result<()> {
        self.stop_within(id, grace, KILL_PATIENCE).await
    }

    /// Stops a container, with its microVM if the guest does not end it: what ignores its node must not hold up the Pod's
    /// end.
    pub(super) async fn stop_within(&self, id: &ContainerId, grace: Grace, patience: Duration) -> Result<()> {
        let Some(sandbox) = self.of_container(id) else { return Ok(()) };
        if self.status(id).await?.state != ContainerState::Running {
            return Ok(());
        }
        let Some(vm) = sandbox.vm() else { return Ok(()) };
        let signal = sandbox.record().containers.get(id.as_str()).map(|one| one.stop_signal.clone());
        let signal = signal.as_deref().unwrap_or("SIGTERM");
        let heeded = !grace.is_zero() && {
            // Its grace begins when it has been told.
            let told = timeout(grace.max(ANSWER).min(patience), tell(vm.as_ref(), id.as_str(), signal, false)).await;
            matches!(told, Ok(Ok(()))) && matches!(timeout(grace, wait(vm.as_ref(), id.as_str())).await, Ok(Ok(())))
        };
        let kill = async {
            tell(vm.as_ref(), id.as_str(), "SIGKILL", true).await?;
            wait(vm.as_ref(), id.as_str()).await
        };
        // Cancel-safe, as all that is waited for here: what was not seen by then ends with the VM.
        let ended = heeded || matches!(timeout(patience, kill).await, Ok(Ok(())));
        let has_ended = || sandbox.record().containers.get(id.as_str()).is_none_or(|one| one.ended.is_some());
        let seen = async {
            loop {
                self.inner.look(&sandbox).await;
                if has_ended() || sandbox.vm().is_none() {
                    return;
                }
                sleep(AGAIN).await;
            }
        };
        let _ = timeout(if ended { patience } else { ANSWER }, seen).await;
        if has_ended() {
            return Ok(());
        }
        if let Some(vm) = sandbox.vm() {
            tracing::warn!(container = %id, "a guest does not end a container: its microVM is ended");
            vm.kill().await?;
        }
        self.inner.end(&sandbox).await
    }

    pub(super) async fn remove(&self, id: &ContainerId) -> Result<()> {
        let Some(sandbox) = self.of_container(id) else { return Ok(()) };
        let _turn = sandbox.turn.lock().await;
        if let Some(vm) = sandbox.vm() {
            vm.remove(id.as_str()).await?;
        }
        if let Some(log) = locked(&sandbox.logs).remove(id.as_str()) {
            log.book.close();
        }
        let directory = log_directory(&sandbox, id.as_str());
        blocking(format!("failed to remove the log of container {id}"), move || {
            match std::fs::remove_dir_all(directory) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
                _ => Ok(()),
            }
        })
        .await?;
        let removed = sandbox.change(|record| record.containers.remove(id.as_str())).await?;
        if removed.is_some() {
            self.inner.tell(&sandbox, EventKind::Removed);
        }
        Ok(())
    }

    pub(super) async fn status(&self, id: &ContainerId) -> Result<ContainerStatus> {
        let sandbox = self.known_container(id)?;
        let ended = sandbox.record().containers.get(id.as_str()).is_some_and(|one| one.ended.is_some());
        // An end is final: of it the guest need not be asked.
        let guests = if ended { Vec::new() } else { sandbox.guests().await };
        let guest = guests.iter().find(|guest| guest.id == id.as_str());
        let vmm = sandbox.vm().map(|vm| vm.pid());
        let status = sandbox.record().status(id.as_str(), guest, vmm);
        status.ok_or_else(|| RuntimeError::new(Kind::NotFound, format!("there is no container {id}")))
    }

    pub(super) async fn list(&self, pod_uid: Option<&str>) -> Vec<ContainerStatus> {
        let of_each = self.sandboxes(pod_uid).into_iter().map(|sandbox| async move {
            let guests = sandbox.guests().await;
            let vmm = sandbox.vm().map(|vm| vm.pid());
            let record = sandbox.record();
            let guest = |id: &str| guests.iter().find(|guest| guest.id == id);
            record.containers.keys().filter_map(|id| record.status(id, guest(id), vmm)).collect::<Vec<_>>()
        });
        futures::future::join_all(of_each).await.concat()
    }

    pub(super) async fn read_log(
        &self,
        id: &ContainerId,
        options: &LogOptions,
    ) -> Result<BoxStream<'static, Result<LogChunk>>> {
        let sandbox = self.known_container(id)?;
        let log = locked(&sandbox.logs).get(id.as_str()).cloned();
        let absent = || RuntimeError::new(Kind::NotFound, format!("there is no log of container {id}"));
        log.ok_or_else(absent)?.book.read(options).await
    }
}

impl Inner {
    /// Opens a container's log, and fetches it from the guest if it is, or was, started.
    pub(super) async fn open_log(&self, sandbox: &Arc<Sandbox>, id: &str, fetch: bool) -> Result<()> {
        let _opening = sandbox.opening.lock().await;
        let known = locked(&sandbox.logs).get(id).cloned();
        let book = match known {
            // A second fetch would write the same lines.
            Some(log) if log.fetched => return Ok(()),
            Some(log) => log.book,
            None => {
                let (directory, limits) = (log_directory(sandbox, id), self.options.logs);
                let opened = blocking(format!("failed to open the log of container {id}"), move || {
                    LogBook::open(&directory, limits)
                });
                Arc::new(opened.await?)
            }
        };
        let (told, whole) = watch::channel(!fetch);
        let vm = sandbox.vm();
        let log = Log { book: Arc::clone(&book), whole, fetched: fetch && vm.is_some() };
        locked(&sandbox.logs).insert(id.to_owned(), log);
        if let (true, Some(vm)) = (fetch, &vm) {
            let vm = Arc::clone(vm);
            let id = id.to_owned();
            let name = sandbox.record().containers.get(&id).map(|one| one.name.clone()).unwrap_or_default();
            sandbox.spawn(async move {
                fetch_log(vm.as_ref(), (&id, &name), &book).await;
                book.close();
                told.send_replace(true);
            });
        } else if vm.is_none() {
            book.close();
        }
        Ok(())
    }

    /// Makes a volume in the guest unless it is there; the file in it, if it is of one file.
    pub(super) async fn make_volume(
        &self,
        sandbox: &Sandbox,
        vm: &Arc<dyn Vm>,
        name: &str,
        volume: &Volume,
    ) -> Result<String> {
        let path = volume.path().to_owned();
        let tried = format!("failed to read {} for the guest", path.display());
        let is_there = sandbox.record().volumes.contains_key(name);
        if let Volume::Empty(_) = volume {
            if !is_there {
                let made = blocking(tried, move || copy::empty_volume(&path)).await?;
                vm.make_volume(name, made).await?;
                sandbox.change(|record| record.volumes.insert(name.to_owned(), volume.clone())).await?;
            }
            return Ok(String::new());
        }
        let places = self.options.places.clone();
        let copied = blocking(tried, move || copy::read_shared(&places, &path)).await?;
        if !is_there {
            vm.make_volume(name, GuestVolume { kind: VolumeKind::Pushed, mode: 0, gid: 0 }).await?;
            vm.push_files(name, copied.layout, copied.files).await?;
            sandbox.change(|record| record.volumes.insert(name.to_owned(), volume.clone())).await?;
        }
        Ok(copied.file)
    }
}

/// Its own, and those it is shown.
fn images_of(container: &ContainerConfig) -> impl Iterator<Item = &ImageId> {
    [&container.image].into_iter().chain(container.mounts.iter().filter_map(|mount| mount.image.as_ref()))
}

fn keep(sandbox: &Sandbox, image: &ImageId, block: BlockImage) {
    locked(&sandbox.blocks).insert(image.clone(), block);
}

fn log_directory(sandbox: &Sandbox, id: &str) -> std::path::PathBuf {
    sandbox.directory.join("logs").join(id)
}

/// Tells a container to end.
async fn tell(vm: &dyn Vm, id: &str, signal: &str, all: bool) -> Result<()> {
    insist(vm, || async {
        // One that is frozen heeds no signal; of one that has just ended there is nothing to thaw.
        let _ = vm.set_frozen(id, false).await;
        vm.signal(id, signal, all).await
    })
    .await
}

/// Waits until a container has ended.
async fn wait(vm: &dyn Vm, id: &str) -> Result<()> {
    insist(vm, || vm.wait(id)).await
}

/// What a lost session had no answer to is asked again, until the VM has ended.
async fn insist<F: Future<Output = Result<()>>>(vm: &dyn Vm, ask: impl Fn() -> F) -> Result<()> {
    loop {
        match ask().await {
            // Both are cancel-safe: they only wait.
            Err(error) if error.kind() == Kind::Unavailable => tokio::select! {
                () = sleep(AGAIN) => {}
                () = vm.exited() => return Ok(()),
            },
            done => return done,
        }
    }
}

/// The container's config with what the image says where nothing else is said.
fn merged(config: &ContainerConfig, image: &ImageConfig) -> ContainerConfig {
    let command = match (config.command.is_empty(), config.args.is_empty()) {
        (false, _) => [config.command.clone(), config.args.clone()].concat(),
        (true, false) => [image.entrypoint.clone(), config.args.clone()].concat(),
        (true, true) => [image.entrypoint.clone(), image.cmd.clone()].concat(),
    };
    let of_image = image.env.iter().map(|line| line.split_once('=').unwrap_or((line.as_str(), "")));
    let of_image = of_image.map(|(name, value)| (name.to_owned(), value.to_owned()));
    let working_dir =
        config.working_dir.clone().or_else(|| Some(image.working_dir.clone()).filter(|dir| !dir.is_empty()));
    ContainerConfig {
        command,
        args: Vec::new(),
        env: of_image.chain(config.env.iter().cloned()).collect(),
        working_dir,
        ..config.clone()
    }
}
