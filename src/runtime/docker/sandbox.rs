//! Sandboxes: run, stop, remove, status.
//!
//! ```text
//! create (labels)  ->  cgroup + limits  ->  start  ->  plug  = ready
//! kill members -> unplug -> kill holder = stopped;  remove members -> cgroup -> holder = gone
//! ```
//! The labelled container is the first thing made and the last thing removed, so whatever a crash interrupts still has
//! a name on it, and removing that removes the rest.

use std::net::IpAddr;
use std::pin::Pin;
use std::time::Duration;

use bollard::models::ContainerInspectResponse;
use bollard::query_parameters::CreateContainerOptionsBuilder;
use futures::{StreamExt, TryStreamExt, stream};

use super::container::{INSPECTS_IN_FLIGHT, pid, timestamp};
use super::failure::{failed, is_absent, status as http_status};
use super::labels::{self, Facts};
use super::spec::{self, Surroundings};
use super::{DockerRuntime, pause};
use crate::network::NetworkError;
use crate::network::cni::Attachment;
use crate::runtime::session::Duplex;
use crate::runtime::types::{PodRef, SandboxConfig, SandboxId, SandboxNetwork, SandboxState, SandboxStatus};
use crate::runtime::{Kind, Result, RuntimeError, blocking, loopback, turn};

/// How often a create is tried anew after what held its name was removed, or its name was taken by something that is
/// not to be seen yet (a create whose answer nobody waited for).
pub(super) const CREATE_TRIES: u32 = 50;
/// Pause between those.
pub(super) const CREATE_PAUSE: Duration = Duration::from_millis(20);

/// A container of ours with its labels read.
pub(super) struct Seen {
    pub(super) inspect: ContainerInspectResponse,
    pub(super) facts: Facts,
}

impl Seen {
    pub(super) fn id(&self) -> &str {
        self.inspect.id.as_deref().unwrap_or_default()
    }

    pub(super) fn running(&self) -> bool {
        self.inspect.state.as_ref().and_then(|state| state.running).unwrap_or(false)
    }
}

/// What became of a create.
pub(super) enum Created {
    New(String),
    NameTaken,
}

/// Marks a sandbox as being made for as long as it lives, whichever way the making ends.
struct Making<'a> {
    runtime: &'a DockerRuntime,
    id: String,
}

impl Drop for Making<'_> {
    fn drop(&mut self) {
        self.runtime.network_book().making.remove(&self.id);
    }
}

impl DockerRuntime {
    pub(super) async fn run_sandbox(&self, config: &SandboxConfig) -> Result<SandboxId> {
        let name = labels::sandbox_name(self.owner(), config);
        for _ in 0..CREATE_TRIES {
            if let Created::New(id) = self.create_sandbox(&name, config).await? {
                return self.bring_up(id, config).await;
            }
            match self.see(&name).await? {
                Some(seen) if seen.running() => {
                    let id = SandboxId::from(seen.id());
                    match self.plug_seen(&seen).await {
                        Ok(_) => return Ok(id),
                        // What plugins had begun is taken away; only a whole new sandbox is plugged in.
                        Err(_) if seen.facts.by_plugins => self.remove_sandbox(&id).await?,
                        Err(error) => return Err(error),
                    }
                }
                Some(seen) => self.remove_sandbox(&SandboxId::from(seen.id())).await?,
                None => tokio::time::sleep(CREATE_PAUSE).await,
            }
        }
        Err(RuntimeError::new(
            Kind::Unavailable,
            format!("the name {name} stays taken by a sandbox that cannot be seen"),
        ))
    }

    async fn create_sandbox(&self, name: &str, config: &SandboxConfig) -> Result<Created> {
        let around = Surroundings {
            cgroup_parent: self.cgroups.engine_parent(&config.cgroup_parent),
            oom_floor: self.oom_floor,
            held: None,
            labels: labels::of_sandbox(self.owner(), config),
        };
        let own_image = pause::reference();
        let image = self.options.sandbox_image.as_deref().unwrap_or(&own_image);
        let mut body = spec::sandbox_body(config, image, around);
        if self.options.sandbox_image.is_none() {
            body.entrypoint = Some(pause::command());
        }
        let mut imported = false;
        loop {
            match self.create_named(name, body.clone()).await {
                // Docker says so before anything is made: most creates are spared the question.
                Err(error) if error.is_not_found() && !imported && self.options.sandbox_image.is_none() => {
                    imported = true;
                    self.ensure_pause_image().await?;
                }
                done => return done,
            }
        }
    }

    /// Creates a Docker container; a name that is taken is not an error.
    pub(super) async fn create_named(&self, name: &str, body: bollard::models::ContainerCreateBody) -> Result<Created> {
        let options = CreateContainerOptionsBuilder::new().name(name).build();
        let labelled = body.labels.as_ref().and_then(|labels| labels.get(labels::POD_UID));
        let pod_uid = labelled.cloned().unwrap_or_default();
        let docker = self.docker.clone();
        let create = async move { docker.create_container(Some(options), body).await };
        match self.creates.run(&pod_uid, create).await {
            Ok(Ok(made)) => Ok(Created::New(made.id)),
            Ok(Err(error)) if http_status(&error) == Some(409) => Ok(Created::NameTaken),
            Ok(Err(error)) => Err(failed(format!("failed to create {name}"), error)),
            Err(lost) => {
                Err(RuntimeError::new(Kind::Internal, format!("lost the creation of {name}")).with_source(lost))
            }
        }
    }

    async fn bring_up(&self, id: String, config: &SandboxConfig) -> Result<SandboxId> {
        self.network_book().making.insert(id.clone());
        let making = Making { runtime: self, id };
        let made = self.start_and_plug(&making.id, config).await;
        let id = SandboxId::from(making.id.as_str());
        match made {
            Ok(()) => Ok(id),
            Err(error) => {
                if let Err(left) = self.remove_sandbox(&id).await {
                    tracing::warn!(sandbox = %id, pod = %config.pod, error = crate::telemetry::chain(&left),
                        "a sandbox that could not be brought up could not be removed either");
                }
                Err(error)
            }
        }
    }

    async fn start_and_plug(&self, id: &str, config: &SandboxConfig) -> Result<()> {
        let (cgroups, path, limits) = (self.cgroups.clone(), config.cgroup_parent.clone(), config.resources.clone());
        blocking(format!("failed to make cgroup {path}"), move || cgroups.ensure(&path, &limits)).await?;
        {
            let _turn = turn(&self.starts).await?;
            self.docker
                .start_container(id, None::<bollard::query_parameters::StartContainerOptions>)
                .await
                .map_err(|error| failed(format!("failed to start the sandbox of {}", config.pod), error))?;
        }
        self.statistics.changed();
        if config.network == SandboxNetwork::Host {
            return Ok(());
        }
        let died = || RuntimeError::new(Kind::Internal, format!("the sandbox of {} ended at once", config.pod));
        let seen = self.see(id).await?.ok_or_else(died)?;
        let pid = pid(&seen.inspect).ok_or_else(died)?;
        crate::failpoint::hit("plug");
        match &config.network {
            SandboxNetwork::Host => Ok(()),
            SandboxNetwork::Pod { .. } | SandboxNetwork::Dual { .. } => {
                self.plug(pid, id, config.network.addresses()).await.map(drop)
            }
            SandboxNetwork::Plugins { wish } => {
                let PodRef { namespace, name, uid } = config.pod.clone();
                let attachment = Attachment { namespace, name, uid, wish: wish.clone() };
                self.note_plugged(id, self.cable.attach(pid, id, &attachment).await).map(drop)
            }
        }
    }

    async fn plug(&self, pid: i32, id: &str, addresses: &[IpAddr]) -> Result<Vec<IpAddr>> {
        self.cable.plug(pid, id, addresses).await.map_err(|error| {
            let text = format!("failed to plug sandbox {id} in as {addresses:?}");
            RuntimeError::new(Kind::Internal, text).with_source(error)
        })?;
        self.note_plugged(id, Ok(addresses.to_vec()))
    }

    fn note_plugged(&self, id: &str, plugged: std::result::Result<Vec<IpAddr>, NetworkError>) -> Result<Vec<IpAddr>> {
        let addresses = plugged.map_err(|error| {
            RuntimeError::new(Kind::Internal, format!("failed to plug sandbox {id} in")).with_source(error)
        })?;
        self.network_book().plugged.insert(id.to_owned(), addresses.clone());
        Ok(addresses)
    }

    /// Plugs a running sandbox in unless this process did so already; which addresses it has.
    async fn plug_seen(&self, seen: &Seen) -> Result<Vec<IpAddr>> {
        if let Some(addresses) = self.network_book().plugged.get(seen.id()) {
            return Ok(addresses.clone());
        }
        match (&seen.facts.addresses[..], pid(&seen.inspect)) {
            _ if seen.facts.by_plugins => self.note_plugged(seen.id(), self.cable.attached(seen.id()).await),
            (addresses @ [_, ..], Some(pid)) => self.plug(pid, seen.id(), addresses).await,
            (addresses, _) => Ok(addresses.to_vec()),
        }
    }

    /// The container of ours with this name or id, if there is one.
    pub(super) async fn see(&self, name: &str) -> Result<Option<Seen>> {
        let inspected =
            self.docker.inspect_container(name, None::<bollard::query_parameters::InspectContainerOptions>).await;
        let inspect = match inspected {
            Ok(inspect) => inspect,
            Err(error) if is_absent(&error) => return Ok(None),
            Err(error) => return Err(failed(format!("failed to inspect {name}"), error)),
        };
        let labels = inspect.config.as_ref().and_then(|config| config.labels.as_ref());
        let facts = labels.and_then(|labels| labels::read(self.owner(), labels));
        Ok(facts.map(|facts| Seen { inspect, facts }))
    }

    pub(super) async fn stop_sandbox(&self, id: &SandboxId) -> Result<()> {
        self.kill_members(id).await?;
        self.unplug(id).await?;
        match self.see(id.as_str()).await? {
            Some(seen) if seen.running() => self.kill(seen.id()).await,
            _ => Ok(()),
        }
    }

    async fn kill_members(&self, id: &SandboxId) -> Result<()> {
        let members = self.list_ids(labels::KIND_CONTAINER, &[(labels::SANDBOX, id.as_str())]).await?;
        let running = members.into_iter().filter(|member| member.may_run).map(|member| member.id);
        stream::iter(running)
            .map(Ok)
            .try_for_each_concurrent(self.options.removals_in_flight, |member| async move { self.kill(&member).await })
            .await
    }

    async fn unplug(&self, id: &SandboxId) -> Result<()> {
        self.network_book().plugged.remove(id.as_str());
        self.cable.unplug(id.as_str()).await.map_err(|error| {
            RuntimeError::new(Kind::Internal, format!("failed to unplug sandbox {id}")).with_source(error)
        })
    }

    pub(super) async fn remove_sandbox(&self, id: &SandboxId) -> Result<()> {
        let mut cgroup = None;
        // Again until a list is empty: a create that nobody waited for may land in between.
        loop {
            let members = self.list_ids(labels::KIND_CONTAINER, &[(labels::SANDBOX, id.as_str())]).await?;
            if members.is_empty() {
                break;
            }
            cgroup = cgroup.or_else(|| members.first().map(|member| member.cgroup.clone()));
            stream::iter(members)
                .map(Ok)
                .try_for_each_concurrent(self.options.removals_in_flight, |member| async move {
                    self.remove_own(&member.id).await
                })
                .await?;
        }
        self.unplug(id).await?;
        let holder = self.see(id.as_str()).await?.filter(|seen| seen.facts.sandbox_itself);
        if let Some(seen) = &holder {
            if seen.running() {
                self.kill(seen.id()).await?;
            }
            cgroup = Some(seen.facts.cgroup.clone());
        }
        let Some(path) = cgroup else { return Ok(()) };
        let removed = self.remove_cgroup(&path, id).await?;
        if let Some(seen) = holder {
            self.remove_own(seen.id()).await?;
        }
        // Of two sandboxes that share it and go at the same time, each may have left it to the other.
        if !removed {
            self.remove_cgroup(&path, id).await?;
        }
        Ok(())
    }

    /// Removes the Pod's cgroup unless another sandbox of the Pod is in it; whether it is gone.
    async fn remove_cgroup(&self, path: &str, but: &SandboxId) -> Result<bool> {
        let holders = self.list_ids(labels::KIND_SANDBOX, &[(labels::CGROUP, path)]).await?;
        if holders.iter().any(|holder| holder.id != but.as_str()) {
            return Ok(false);
        }
        let (cgroups, owned) = (self.cgroups.clone(), path.to_owned());
        blocking(format!("failed to remove cgroup {path}"), move || cgroups.remove(&owned)).await?;
        Ok(true)
    }

    pub(super) async fn sandbox_status(&self, id: &SandboxId) -> Result<SandboxStatus> {
        match self.see(id.as_str()).await? {
            Some(seen) if seen.facts.sandbox_itself => Ok(self.sandbox_status_of(seen).await),
            _ => Err(RuntimeError::new(Kind::NotFound, format!("there is no sandbox {id}"))),
        }
    }

    async fn sandbox_status_of(&self, seen: Seen) -> SandboxStatus {
        let mut state = if seen.running() { SandboxState::Ready } else { SandboxState::NotReady };
        let mut addresses = seen.facts.addresses.clone();
        if self.network_book().making.contains(seen.id()) {
            state = SandboxState::NotReady;
        } else if state == SandboxState::Ready {
            match self.plug_seen(&seen).await {
                Ok(plugged) => addresses = plugged,
                Err(error) => {
                    tracing::warn!(sandbox = seen.id(), pod = %seen.facts.pod, error = crate::telemetry::chain(&error),
                        "a running sandbox has no network");
                    state = SandboxState::NotReady;
                }
            }
        }
        SandboxStatus {
            id: SandboxId::from(seen.id()),
            pod: seen.facts.pod,
            attempt: seen.facts.attempt,
            state,
            created_at: timestamp(seen.inspect.created.as_deref()).unwrap_or_default(),
            addresses,
            pid: pid(&seen.inspect),
        }
    }

    pub(super) async fn connect_inside(&self, id: &SandboxId, port: u16) -> Result<Pin<Box<dyn Duplex>>> {
        let tried = loopback::tried(id, port);
        let seen = self.see(id.as_str()).await?.filter(|seen| seen.facts.sandbox_itself);
        let seen =
            seen.ok_or_else(|| RuntimeError::new(Kind::NotFound, format!("{tried}: there is no such sandbox")))?;
        let holder = pid(&seen.inspect);
        let holder =
            holder.ok_or_else(|| RuntimeError::new(Kind::Invalid, format!("{tried}: the sandbox does not run")))?;
        loopback::connect(&self.sockets, holder, port, &tried).await
    }

    pub(super) async fn list_sandboxes(&self, pod_uid: Option<&str>) -> Result<Vec<SandboxStatus>> {
        let seen = self.list_seen(labels::KIND_SANDBOX, pod_uid).await?;
        Ok(stream::iter(seen)
            .map(|seen| self.sandbox_status_of(seen))
            .buffer_unordered(INSPECTS_IN_FLIGHT)
            .collect()
            .await)
    }

    /// Every object of a kind, or of one Pod, inspected. One that vanishes meanwhile is left out; one of the Pod that is
    /// being created is waited for.
    pub(super) async fn list_seen(&self, kind: &str, pod_uid: Option<&str>) -> Result<Vec<Seen>> {
        if let Some(uid) = pod_uid {
            self.creates.landed(uid).await;
        }
        let of_pod: Vec<_> = pod_uid.map(|uid| (labels::POD_UID, uid)).into_iter().collect();
        let listed = self.list_ids(kind, &of_pod).await?;
        stream::iter(listed)
            .map(|listed| async move { self.see(&listed.id).await })
            .buffer_unordered(INSPECTS_IN_FLIGHT)
            .try_filter_map(|seen| async move { Ok(seen) })
            .try_collect()
            .await
    }
}
