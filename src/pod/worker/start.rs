//! The steps that bring a Pod up.

use std::borrow::Cow;
use std::path::PathBuf;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Container, Pod, PodSpec, Volume};
use tokio::time::Instant;

use super::{Worker, trouble};
use crate::failpoint;
use crate::pod::PodContext;
use crate::pod::addresses::{AddressError, host_ports};
use crate::pod::backoff;
use crate::pod::ephemeral;
use crate::pod::files;
use crate::pod::images::{Local, Wanted};
use crate::pod::resize;
use crate::pod::status::Trouble;
use crate::pod::translate::{self, Places};
use crate::pod::volumes::sub_paths;
use crate::pod::watch::GRACE_ANNOTATION;
use crate::runtime::types::{
    ContainerConfig, ContainerId, Image, NamespaceMode, SandboxConfig, SandboxId, SandboxNetwork,
};
use crate::runtime::{Kind, RuntimeError};
use crate::telemetry::chain;

/// How long a container says `ErrImagePull` before it says `ImagePullBackOff`.
const PULL_NOTICE: Duration = Duration::from_secs(2);

/// Wait after the first failure to set volumes up; doubled up to [`backoff::RETRY`].
const FIRST_MOUNT_RETRY: Duration = Duration::from_millis(50);
/// Failures in a row that are not told: together they last less than half a second.
const QUIET_MOUNT_FAILURES: u32 = 3;

impl Worker {
    /// Nothing of the Pod as a whole is tried for a while, and the user is told.
    pub(super) fn hold_pod(&mut self, reason: &str, message: String) {
        self.shared.events.warning(&self.pod, None, reason, message);
        self.memory.pod_hold = Some(Timestamp::now() + backoff::RETRY);
    }

    /// The container is not tried until `until`, and its status says why.
    pub(super) fn hold(&mut self, name: &str, trouble: Trouble, until: Timestamp) {
        self.memory.waiting.insert(name.to_owned(), trouble);
        self.memory.holds.insert(name.to_owned(), until);
    }

    pub(super) async fn set_up_volumes(&mut self) {
        let (pod, facts) = (self.pod.clone(), self.shared.facts.borrow().clone());
        let context = PodContext { pod: &pod, key: &self.reference.uid, node: &facts, addresses: &[] };
        match self.shared.volumes.set_up(context).await {
            Ok(made) => {
                failpoint::hit("mount");
                let volumes = made.volumes.into_iter().map(|(name, v)| (name, (v.host_path, v.read_only))).collect();
                self.shared.volumes.follow(&mut self.memory.following, made.uses);
                self.memory.places = Some(Places { volumes, ..Places::default() });
                self.memory.pod_hold = None;
                self.memory.mount_failures = 0;
                // The first refresh tells when the next is due; nothing can be stale yet.
                self.memory.next_refresh = Some(Instant::now() + Duration::from_secs(30));
            }
            Err(error) => self.hold_for_mount(chain(&error)),
        }
    }

    /// Volumes are tried again soon at first: right after a Pod was bound the API server may not know yet that this
    /// node may read what it names. Only what lasts is told.
    fn hold_for_mount(&mut self, message: String) {
        let failures = self.memory.mount_failures;
        self.memory.mount_failures = failures.saturating_add(1);
        if failures < QUIET_MOUNT_FAILURES {
            tracing::debug!(pod = %self.reference, message, "failed to set up volumes; trying again");
        } else {
            self.shared.events.warning(&self.pod, None, "FailedMount", message);
        }
        let wait = FIRST_MOUNT_RETRY.saturating_mul(2_u32.saturating_pow(failures)).min(backoff::RETRY);
        self.memory.pod_hold = Some(Timestamp::now() + wait);
    }

    pub(super) async fn refresh_volumes(&mut self) {
        let (pod, facts) = (self.pod.clone(), self.shared.facts.borrow().clone());
        let addresses = self.memory.addresses.clone();
        let context = PodContext { pod: &pod, key: &self.reference.uid, node: &facts, addresses: &addresses };
        self.memory.next_refresh = match self.shared.volumes.refresh(context).await {
            Ok(fresh) => {
                self.shared.volumes.follow(&mut self.memory.following, fresh.uses);
                fresh.period.map(|after| Instant::now() + after)
            }
            Err(error) => {
                self.shared.events.warning(&pod, None, "FailedMount", chain(&error));
                Some(Instant::now() + backoff::RETRY)
            }
        };
    }

    pub(super) async fn run_sandbox(&mut self, attempt: u32) {
        let pod = self.pod.clone();
        let Some(spec) = &pod.spec else { return };
        let handler = match self.handler(spec).await {
            Ok(handler) => handler,
            Err(unfit) => return self.without_driver(unfit),
        };
        let network = match self.allot(spec).await {
            Ok(network) => network,
            Err(error) => return self.hold_pod("FailedCreatePodSandBox", chain(&error)),
        };
        failpoint::hit("address");
        let hostname = match files::hostname(&pod, &self.shared.dns) {
            Ok(name) => name.hostname,
            Err(error) => return self.hold_pod("FailedCreatePodSandBox", chain(&error)),
        };
        let mut config =
            SandboxConfig { attempt, ..translate::sandbox(&self.shared.host, &pod, spec, &hostname, network) };
        if let Some(seat) = &self.seat {
            seat.place_sandbox(&mut config);
        }
        self.assign(&mut config, spec, &handler);
        match self.shared.runtime.run_pod_sandbox(&config).await {
            Ok(id) => self.sandbox_is_up(&id).await,
            Err(error) => {
                let text = format!("Failed to create pod sandbox: {}", chain(&error));
                self.hold_pod("FailedCreatePodSandBox", text);
                self.relist().await;
            }
        }
    }

    /// The Pod's network: the node's, or its own with addresses of the node's ranges, or what plugins give it.
    async fn allot(&self, spec: &PodSpec) -> Result<SandboxNetwork, AddressError> {
        if spec.host_network == Some(true) {
            return Ok(SandboxNetwork::Host);
        }
        if self.shared.addresses.are_by_plugins() {
            // Neither a function's front nor its environments are behind ports of the host.
            let plain = self.seat.is_none() && self.function.is_none();
            let ports = if plain { host_ports(spec) } else { Vec::new() };
            return Ok(SandboxNetwork::Plugins { wish: translate::wish(&self.pod, ports) });
        }
        let addresses = self.shared.addresses.allot(&*self.shared.runtime, &self.reference.uid).await?;
        Ok(match addresses[..] {
            [] => SandboxNetwork::Host,
            [address] => SandboxNetwork::Pod { address },
            [first, second, ..] => SandboxNetwork::Dual { addresses: [first, second] },
        })
    }

    async fn sandbox_is_up(&mut self, id: &SandboxId) {
        failpoint::hit("sandbox");
        self.memory.pod_hold = None;
        match self.shared.runtime.pod_sandbox_status(id).await {
            Ok(status) => {
                self.learn_addresses(status.addresses.clone());
                self.observed.put_sandbox(status);
            }
            Err(error) => {
                tracing::warn!(pod = %self.reference, error = chain(&error), "failed to look at new sandbox");
                self.relist().await;
            }
        }
        if let Err(message) = self.write_files() {
            self.hold_pod("FailedCreatePodSandBox", message);
            self.memory.places = None;
        }
    }

    /// `/etc/hosts`, `/etc/resolv.conf` and `/etc/hostname` of the Pod, which need its address.
    fn write_files(&mut self) -> Result<(), String> {
        let (dns, pod) = (&self.shared.dns, &self.pod);
        let addresses = self.addresses();
        let name = files::hostname(pod, dns).map_err(|error| chain(&error))?;
        let resolv_conf = files::resolv_conf(pod, dns);
        for warning in &resolv_conf.warnings {
            self.shared.events.warning(pod, None, "DNSConfigForming", warning.clone());
        }
        let contents = [
            ("hosts", files::hosts(pod, &addresses, &name, dns)),
            ("resolv.conf", resolv_conf.render()),
            ("hostname", format!("{}\n", name.hostname)),
        ];
        let dir = self.shared.pod_dir(&self.reference.uid);
        let mut written = Vec::new();
        for (file, text) in contents {
            let path = dir.join(file);
            files::write(&path, &text).map_err(|error| format!("failed to write {}: {error}", path.display()))?;
            written.push((path, format!("/etc/{file}")));
        }
        if let Some(places) = &mut self.memory.places {
            places.files = written;
        }
        Ok(())
    }

    /// Leads ports of the host to the Pod, once per sandbox. A function's front answers at the Pod's address only.
    async fn open_ports(&mut self) -> Result<(), String> {
        let Some(spec) = &self.pod.spec else { return Ok(()) };
        if self.memory.addresses.is_empty() || self.memory.ports_open || self.seat.is_some() || self.function.is_some()
        {
            return Ok(());
        }
        let opened = self.shared.addresses.open_ports(&self.reference.uid, &self.memory.addresses, spec).await;
        opened.map_err(|error| format!("failed to open the Pod's ports on the host: {}", chain(&error)))?;
        self.memory.ports_open = true;
        Ok(())
    }

    /// The Pod's addresses: its own, or the node's on the host's network.
    fn addresses(&self) -> Vec<std::net::IpAddr> {
        match self.memory.addresses[..] {
            [] => self.shared.facts.borrow().addresses.clone(),
            ref own => own.to_vec(),
        }
    }

    /// The Pod's addresses, that of the node's first family first: kubelet's `sortPodIPs`.
    pub(super) fn learn_addresses(&mut self, found: Vec<std::net::IpAddr>) {
        let first = self.shared.facts.borrow().addresses.first().copied();
        self.memory.addresses = translate::in_order(found, first);
    }

    pub(super) async fn start(&mut self, name: &str, attempt: u32) {
        let Some(config) = self.configured(name, attempt).await else { return };
        let current = self.observed.current(name).map(|current| &current.id);
        let made = self.memory.made.get(name).filter(|(id, _)| Some(id) == current);
        let id = match made.cloned() {
            Some((id, made_of)) if made_of == config => id,
            // What it was told of ConfigMaps, Secrets and Services has changed: the next attempt is told anew.
            Some((id, _)) => return self.prune(&id).await,
            None => match self.make(name, &config).await {
                Some(id) => id,
                None => return,
            },
        };
        self.launch(name, &id).await;
    }

    /// Makes a container that is started later, unless what it is made of has changed by then.
    pub(super) async fn create(&mut self, name: &str, attempt: u32) {
        let Some(config) = self.configured(name, attempt).await else { return };
        if let Some(id) = self.make(name, &config).await {
            self.memory.holds.remove(name);
            self.memory.waiting.remove(name);
            self.seen(&id).await;
            self.memory.made.insert(name.to_owned(), (id, config));
        }
    }

    /// What the container is made from now; `None` puts it on hold.
    async fn configured(&mut self, name: &str, attempt: u32) -> Option<ContainerConfig> {
        let pod = self.pod.clone();
        let container = find(&pod, name)?;
        let container = container.as_ref();
        if ephemeral::find(&pod, name).is_some() && !self.has_volumes_of(container) {
            // Only what some container mounts is made, and this one was not there then.
            self.memory.places = None;
            self.set_up_volumes().await;
            return None;
        }
        let furnished = match self.memory.places.as_ref().is_some_and(|p| p.files.is_empty()) {
            true => self.write_files(),
            false => Ok(()),
        };
        if let Err(message) = self.open_ports().await.and(furnished) {
            let until = Timestamp::now() + backoff::RETRY;
            self.hold(name, Trouble::new("CreateContainerError", message), until);
            return None;
        }
        self.show_images(&pod, container).await?;
        let image = self.image(&pod, container).await?;
        match self.config(&pod, container, &image, attempt).await {
            Ok(config) => Some(config),
            Err(trouble) => {
                let text = format!("Error: {}", trouble.message);
                self.shared.events.warning(&pod, Some(name), "Failed", text);
                self.hold(name, trouble, Timestamp::now() + backoff::RETRY);
                None
            }
        }
    }

    /// The image, pulled if need be; `None` puts the container on hold.
    pub(super) async fn image(&mut self, pod: &Pod, container: &Container) -> Option<Image> {
        self.fetched(Wanted::by_container(pod, container), &container.name).await
    }

    /// An image that this container needs, pulled if need be; `None` puts the container on hold.
    pub(super) async fn fetched(&mut self, wanted: Wanted<'_>, container: &str) -> Option<Image> {
        let pod = wanted.pod;
        let shared = self.shared.clone();
        let runtime = shared.runtime.as_ref();
        if self.seat.is_some()
            && let Ok(Some(image)) = runtime.image_status(wanted.reference).await
        {
            // Fetched when its Pod came; nobody wants to hear of it for each environment.
            return Some(image);
        }
        let trouble = match shared.images.look(runtime, wanted, &shared.events).await {
            Ok(Local::Present(image)) => return Some(image),
            Ok(Local::MustPull) => {
                let auths = self.auths(wanted).await;
                match shared.images.pull(runtime, wanted, &auths, &shared.events).await {
                    Ok(image) => {
                        self.memory.pulls.remove(container);
                        return Some(image);
                    }
                    Err(trouble) => trouble,
                }
            }
            Err(trouble) => trouble,
        };
        let now = Timestamp::now();
        shared.events.warning(pod, Some(container), "Failed", format!("Error: {}", trouble.reason));
        let backoff = self.memory.pulls.entry(container.to_owned()).or_default();
        backoff.note(now, backoff::MAX);
        let until = now + backoff.delay();
        self.memory.pull_notice = Some(now + PULL_NOTICE);
        self.hold(container, trouble, until);
        None
    }

    async fn auths(&self, Wanted { pod, reference, .. }: Wanted<'_>) -> Vec<crate::runtime::types::RegistryAuth> {
        match self.shared.inputs.registry_auths(pod, reference).await {
            Ok(found) => {
                for warning in found.warnings {
                    self.shared.events.warning(pod, None, "FailedToRetrieveImagePullSecret", warning);
                }
                found.auths
            }
            Err(error) => {
                // The pull goes on without: a public image needs none.
                let text = format!("Unable to retrieve some image pull secrets: {}", chain(&error));
                self.shared.events.warning(pod, None, "FailedToRetrieveImagePullSecret", text);
                Vec::new()
            }
        }
    }

    async fn config(
        &self,
        pod: &Pod,
        container: &Container,
        image: &Image,
        attempt: u32,
    ) -> Result<ContainerConfig, Trouble> {
        let config_error = |error: &(dyn std::error::Error + 'static)| trouble("CreateContainerConfigError", error);
        let facts = self.shared.facts.borrow().clone();
        let addresses = self.addresses();
        let context = PodContext { pod, key: &self.reference.uid, node: &facts, addresses: &addresses };
        let environment = self.shared.inputs.env(context, container).await.map_err(|e| config_error(&e))?;
        for warning in environment.warnings {
            self.shared.events.warning(pod, Some(&container.name), "InvalidEnvironmentVariableNames", warning);
        }
        let env = environment.variables;
        let log = self.termination_log(&container.name, attempt).map_err(|e| config_error(&e))?;
        let mut places = self.memory.places.clone().unwrap_or_default();
        places.termination_log = Some(log);
        let volumes = &self.shared.volumes;
        if self.is_in_guests(pod).await {
            places.parts = sub_paths(container, &env).map_err(|e| config_error(&e))?;
        } else {
            let parts = volumes.bind_sub_paths(&self.reference.uid, container, &places.volumes, &env).await;
            places.sub_paths = parts.map_err(|e| config_error(&e))?;
        }
        let config =
            translate::container(&self.shared.host, pod, container, image, &places).map_err(|e| config_error(&e))?;
        let expand =
            |words: &Option<Vec<String>>| self.shared.inputs.expand(words.as_deref().unwrap_or_default(), &env);
        let (command, args) = (expand(&container.command), expand(&container.args));
        let grace = crate::pod::plan::grace(pod).as_secs().to_string();
        let mut annotations = std::collections::BTreeMap::from([(GRACE_ANNOTATION.to_owned(), grace)]);
        annotations.extend(pod.spec.iter().flat_map(|spec| resize::remembered(spec, container)));
        let pid_target = self.target(pod, &config)?;
        let mut config = ContainerConfig { attempt, env, command, args, annotations, pid_target, ..config };
        if let Some(seat) = &self.seat {
            seat.place_container(&mut config);
        }
        Ok(config)
    }

    /// The container whose processes an ephemeral one asked to see. Where the Pod's containers see each other's anyway
    /// there is none, as with a kubelet.
    fn target(&self, pod: &Pod, config: &ContainerConfig) -> Result<Option<ContainerId>, Trouble> {
        let Some(name) = ephemeral::find(pod, &config.name).and_then(ephemeral::target) else { return Ok(None) };
        let Some(target) = self.observed.latest(name) else {
            let text = format!("unable to find target container {name}");
            return Err(Trouble::new("CreateContainerConfigError", text));
        };
        Ok(Some(target.id.clone()).filter(|_| config.pid == NamespaceMode::Container))
    }

    /// Whether every volume that the container mounts and the Pod has was made. (One that the Pod does not have is told
    /// later.)
    fn has_volumes_of(&self, container: &Container) -> bool {
        let Some(places) = &self.memory.places else { return false };
        // Those that show an image are made for each container.
        let made = |volume: &Volume, name: &str| volume.name == name && volume.image.is_none();
        let of_pod = |name: &str| self.pod.spec.iter().flat_map(|s| s.volumes.iter().flatten()).any(|v| made(v, name));
        let mut mounts = container.volume_mounts.iter().flatten();
        mounts.all(|mount| places.volumes.contains_key(&mount.name) || !of_pod(&mount.name))
    }

    /// An empty file that every user of the container may write.
    fn termination_log(&self, name: &str, attempt: u32) -> std::io::Result<PathBuf> {
        use std::os::unix::fs::PermissionsExt as _;
        let path = self.shared.termination_log(&self.reference.uid, name, attempt);
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent)?;
        }
        std::fs::File::create(&path)?.set_permissions(std::fs::Permissions::from_mode(0o666))?;
        Ok(path)
    }

    /// Makes the container; `None` puts it on hold.
    async fn make(&mut self, name: &str, config: &ContainerConfig) -> Option<ContainerId> {
        let sandbox = self.observed.ready_sandbox().map(|s| s.id.clone())?;
        let id = match self.shared.runtime.create_container(&sandbox, config).await {
            Ok(id) => id,
            Err(error) => {
                self.not_created(name, &error).await;
                return None;
            }
        };
        failpoint::hit("create");
        self.tell(Some(name), "Created", format!("Container created: {name}"));
        if config.attempt > 0 {
            let max = self.shared.settings.max_restart_backoff;
            self.memory.crashes.entry(name.to_owned()).or_default().note(Timestamp::now(), max);
        }
        self.memory.floors.insert(name.to_owned(), config.attempt + 1);
        Some(id)
    }

    async fn launch(&mut self, name: &str, id: &ContainerId) {
        let (pod, shared) = (self.pod.clone(), self.shared.clone());
        let started = shared.runtime.start_container(id).await;
        failpoint::hit("start");
        self.memory.holds.remove(name);
        self.memory.waiting.remove(name);
        self.seen(id).await;
        match started {
            Ok(()) => {
                self.tell(Some(name), "Started", format!("Container started: {name}"));
                self.after_start(name, id).await;
            }
            Err(error) if error.kind() == Kind::Invalid => {
                let trouble = trouble("RunContainerError", &error);
                shared.events.warning(&pod, Some(name), "Failed", format!("Error: {}", trouble.message));
                self.memory.waiting.insert(name.to_owned(), trouble);
            }
            Err(error) => {
                let trouble = trouble("RunContainerError", &error);
                shared.events.warning(&pod, Some(name), "Failed", format!("Error: {}", trouble.message));
                self.hold(name, trouble, Timestamp::now() + backoff::RETRY);
                self.relist().await;
            }
        }
    }

    async fn not_created(&mut self, name: &str, error: &RuntimeError) {
        let trouble = trouble("CreateContainerError", error);
        self.shared.events.warning(&self.pod, Some(name), "Failed", format!("Error: {}", trouble.message));
        self.hold(name, trouble, Timestamp::now() + backoff::RETRY);
        // The sandbox or the image may have vanished.
        self.relist().await;
    }

    /// Looks at one container.
    async fn seen(&mut self, id: &ContainerId) {
        match self.shared.runtime.container_status(id).await {
            Ok(status) => self.observed.put_container(status),
            Err(error) => {
                tracing::debug!(pod = %self.reference, error = chain(&error), "failed to look at new container");
                self.relist().await;
            }
        }
    }
}

/// The container of that name.
pub(super) fn find<'a>(pod: &'a Pod, name: &str) -> Option<Cow<'a, Container>> {
    let spec = pod.spec.as_ref()?;
    let lasting = spec.init_containers.iter().flatten().chain(&spec.containers).find(|c| c.name == name);
    match lasting {
        Some(container) => Some(Cow::Borrowed(container)),
        None => ephemeral::find(pod, name).map(|container| Cow::Owned(ephemeral::as_container(container))),
    }
}
