//! Containers: create, start, stop, remove, status.

use std::str::FromStr as _;
use std::sync::Arc;
use std::time::Duration;

use futures::{StreamExt, TryStreamExt, stream};
use lambdalet_proto::cri::v1;
use nix::sys::signal::Signal;
use tokio::time::{Instant, sleep, timeout};

use super::client::{ask, is_taken, unless_absent};
use super::info::{self, Place};
use super::sandbox::{CALLS_IN_FLIGHT, CREATE_PAUSE, CREATE_TRIES, moment};
use super::{CriRuntime, spec};
use crate::runtime::labels::{self, Facts};
use crate::runtime::process::Process;
use crate::runtime::types::{ContainerConfig, ContainerId, ContainerState, ContainerStatus, Grace, ImageId, SandboxId};
use crate::runtime::{Kind, Result, RuntimeError, blocking, locked, turn};

/// How long a removal that someone else began may take.
const REMOVE_PATIENCE: Duration = Duration::from_secs(30);
const REMOVE_PAUSE: Duration = Duration::from_millis(30);
/// Exit code of a container whose command was not found; that of other failed starts is the runtime's, 128.
const EXIT_NOT_FOUND: i32 = 127;
const EXIT_START_FAILED: i32 = 128;
/// Exit code of a process that SIGKILL ended, whoever sent it.
const EXIT_KILLED: i32 = 137;

/// What became of a container's own stop signal.
enum Signalled {
    /// It ended within the grace.
    Ended,
    /// It did not.
    Ignored,
    /// There is no process that it could be sent to.
    NotSent,
}

/// A container of ours with its labels read.
pub(super) struct Listed {
    pub(super) id: String,
    pub(super) facts: Facts,
    pub(super) running: bool,
}

/// What the runtime tells of one.
pub(super) struct Looked {
    pub(super) status: v1::ContainerStatus,
    pub(super) facts: Facts,
}

impl Looked {
    pub(super) fn running(&self) -> bool {
        self.status.state() == v1::ContainerState::ContainerRunning
    }

    /// Whether it has `stdin`, `once` or `tty`.
    pub(super) fn has(&self, stream: &str) -> bool {
        self.status.annotations.get(spec::STREAMS).is_some_and(|streams| streams.split(' ').any(|one| one == stream))
    }
}

impl CriRuntime {
    pub(super) async fn create(&self, sandbox: &SandboxId, config: &ContainerConfig) -> Result<ContainerId> {
        let tried = format!("failed to create container {} of {}", config.name, config.pod);
        let refused = |kind, why: String| Err(RuntimeError::new(kind, format!("{tried}: {why}")));
        let place = self.places.get(sandbox.as_str());
        let request = match place.as_ref().and_then(|place| place.sandbox.as_ref()) {
            // It may have ended since. Then the runtime refuses, and what it is like is asked below.
            Some(status) => self.creation(sandbox, status, config).await?,
            None => self.creation(sandbox, &self.look_at_ready(sandbox, &tried).await?, config).await?,
        };
        self.check_target(sandbox, config, &tried).await?;
        for _ in 0..CREATE_TRIES {
            // Before anything is asked: hardly ever is there another of its name, and the runtime knows.
            let (client, request, trying) = (self.client.runtime.clone(), request.clone(), tried.clone());
            let make = async move { ask!(client, create_container(request), || trying.clone()).await };
            let made = self.creates.run(&config.pod.uid, make).await;
            let lost = |error| RuntimeError::new(Kind::Internal, "lost a container's creation").with_source(error);
            match made.map_err(lost)? {
                Ok(made) => {
                    locked(&self.unstarted).insert(made.container_id.clone(), config.pod.uid.clone());
                    return Ok(ContainerId::from(made.container_id));
                }
                Err(error) if is_taken(&error) => {}
                Err(error) => return Err(self.look_at_ready(sandbox, &tried).await.err().unwrap_or(error)),
            }
            match self.see_attempt(config).await? {
                Some(there) if there.facts.sandbox == sandbox.as_str() => return Ok(ContainerId::from(there.id)),
                Some(Listed { facts, .. }) => {
                    return refused(Kind::AlreadyExists, format!("it exists in another sandbox, {}", facts.sandbox));
                }
                None => sleep(CREATE_PAUSE).await,
            }
        }
        refused(Kind::Unavailable, "its name stays taken by what cannot be seen".to_owned())
    }

    async fn creation(
        &self,
        sandbox: &SandboxId,
        status: &v1::PodSandboxStatus,
        config: &ContainerConfig,
    ) -> Result<v1::CreateContainerRequest> {
        let security = &config.security;
        let mut image_user = String::new();
        if security.run_as_group.is_some() && security.run_as_user.is_none() {
            image_user = self.image(config.image.as_str()).await?.map(|image| image.user).unwrap_or_default();
        }
        let directory = self.logs.of_pod(&config.pod.uid);
        let path = self.logs.of_container(&config.pod.uid, &config.name, config.attempt);
        if let Some(folder) = path.parent().map(std::path::Path::to_owned) {
            let tried = format!("failed to make the directory {}", folder.display());
            blocking(tried, move || std::fs::create_dir_all(folder)).await?;
        }
        let log_path = path.strip_prefix(&directory).unwrap_or(&path).to_string_lossy().into_owned();
        let own_network = spec::has_own_network(status);
        let parent = self.cgroups.engine_parent(&config.cgroup_parent);
        let logs = directory.to_string_lossy().into_owned();
        let again = spec::sandbox_again(status, parent, logs, security.privileged);
        Ok(v1::CreateContainerRequest {
            pod_sandbox_id: sandbox.to_string(),
            config: Some(spec::container((self.owner(), sandbox), config, &image_user, own_network, log_path)),
            sandbox_config: Some(again),
        })
    }

    /// Runtimes differ in what they make of a target that is not there.
    async fn check_target(&self, sandbox: &SandboxId, config: &ContainerConfig, tried: &str) -> Result<()> {
        let Some(target) = &config.pid_target else { return Ok(()) };
        let looked = self.look_at(target).await?.filter(|looked| looked.facts.sandbox == sandbox.as_str());
        let (kind, what) = match looked {
            Some(looked) if looked.running() => return Ok(()),
            Some(looked) => (Kind::Invalid, format!("its target container {} does not run", looked.facts.container)),
            None => (Kind::NotFound, format!("there is no target container {target} in its sandbox")),
        };
        Err(RuntimeError::new(kind, format!("{tried}: {what}")))
    }

    /// The container of ours that is this attempt, if it is there once all creates of its Pod have landed.
    async fn see_attempt(&self, config: &ContainerConfig) -> Result<Option<Listed>> {
        self.creates.landed(&config.pod.uid).await;
        let attempt = config.attempt.to_string();
        let known = [
            (labels::POD_UID, config.pod.uid.as_str()),
            (labels::CONTAINER, config.name.as_str()),
            (labels::ATTEMPT, attempt.as_str()),
        ];
        Ok(self.see_containers(&known).await?.into_iter().next())
    }

    /// The containers of ours that have all of `more` as labels.
    pub(super) async fn see_containers(&self, more: &[(&str, &str)]) -> Result<Vec<Listed>> {
        let filter = v1::ContainerFilter { label_selector: self.selector(more), ..v1::ContainerFilter::default() };
        let request = v1::ListContainersRequest { filter: Some(filter) };
        let listed = ask!(self.client.runtime, list_containers(request), || "failed to list containers".to_owned());
        let read = |container: v1::Container| {
            let running = container.state() == v1::ContainerState::ContainerRunning;
            let facts = spec::facts(self.owner(), &container.labels, &container.annotations)?;
            Some(Listed { id: container.id, facts, running })
        };
        Ok(listed.await?.containers.into_iter().filter_map(read).filter(|one| !one.facts.sandbox_itself).collect())
    }

    /// What the runtime tells of a container of ours, if there is one of that id.
    pub(super) async fn look_at(&self, id: &ContainerId) -> Result<Option<Looked>> {
        self.look(id, false).await
    }

    /// The same; if it runs its place is known afterwards, too, by one call instead of two.
    pub(super) async fn look_closely(&self, id: &ContainerId) -> Result<Option<Looked>> {
        self.look(id, self.places.get(id.as_str()).is_none()).await
    }

    async fn look(&self, id: &ContainerId, closely: bool) -> Result<Option<Looked>> {
        let request = v1::ContainerStatusRequest { container_id: id.to_string(), verbose: closely };
        let tried = || format!("failed to ask for the status of container {id}");
        let (status, info) = match ask!(self.client.runtime, container_status(request), tried).await {
            Ok(answer) => (answer.status.unwrap_or_default(), answer.info),
            Err(error) if error.is_not_found() => return Ok(None),
            Err(error) => return Err(error),
        };
        let facts = spec::facts(self.owner(), &status.labels, &status.annotations);
        // Runtimes take the beginning of an id for it.
        let facts = facts.filter(|facts| !facts.sandbox_itself && status.id == id.as_str());
        let looked = facts.map(|facts| Looked { status, facts });
        if let Some(looked) = looked.as_ref().filter(|looked| closely && looked.running())
            && let Some(place) = info::place(&info, looked.status.started_at, &self.cgroups)
        {
            self.places.insert(id.as_str(), place);
        }
        Ok(looked)
    }

    /// A container that runs, and where; begins the message with `tried` if there is none or it does not.
    pub(super) async fn look_at_running(&self, id: &ContainerId, tried: &str) -> Result<(Looked, Arc<Place>)> {
        let looked = self.look_closely(id).await?;
        let looked =
            looked.ok_or_else(|| RuntimeError::new(Kind::NotFound, format!("{tried}: there is no such container")))?;
        let place = if looked.running() { self.place(id.as_str()).await? } else { None };
        let place =
            place.ok_or_else(|| RuntimeError::new(Kind::Invalid, format!("{tried}: the container does not run")))?;
        Ok((looked, place))
    }

    /// Process and cgroup of a running container; `None` if there is none, or it does not run.
    pub(super) async fn place(&self, id: &str) -> Result<Option<Arc<Place>>> {
        if self.places.get(id).is_none() {
            self.look_closely(&ContainerId::from(id)).await?;
        }
        Ok(self.places.get(id))
    }

    pub(super) async fn start(&self, id: &ContainerId) -> Result<()> {
        let tried = || format!("failed to start container {id}");
        let unstarted = locked(&self.unstarted).remove(id.as_str());
        let pod_uid = match unstarted {
            Some(pod_uid) => pod_uid,
            None => {
                let looked = self.look_at(id).await?;
                let looked = looked
                    .ok_or_else(|| RuntimeError::new(Kind::NotFound, format!("{}: it does not exist", tried())))?;
                match looked.status.state() {
                    v1::ContainerState::ContainerRunning => return Ok(()),
                    v1::ContainerState::ContainerCreated => looked.facts.pod.uid,
                    v1::ContainerState::ContainerExited | v1::ContainerState::ContainerUnknown => {
                        return Err(RuntimeError::new(Kind::Invalid, format!("{}: it has exited already", tried())));
                    }
                }
            }
        };
        let started = {
            let _turn = turn(&self.starts).await?;
            // To its end: a start that is called off halfway fails the container, and containerd holds on to it for seconds.
            let (client, tried) = (self.client.runtime.clone(), tried());
            let request = v1::StartContainerRequest { container_id: id.to_string() };
            let start = async move { ask!(client, start_container(request), || tried.clone()).await };
            self.creates.run(&pod_uid, start).await
        };
        let lost =
            |error| RuntimeError::new(Kind::Internal, format!("lost the start of container {id}")).with_source(error);
        let started = started.map_err(lost)?;
        let Err(error) = started else { return Ok(()) };
        // What the runtime wrote on the container decides.
        match self.look_at(id).await? {
            Some(looked) if looked.status.state() == v1::ContainerState::ContainerExited => {
                let words = looked.status.message.trim();
                let text = if words.is_empty() { error.to_string() } else { format!("{}: {words}", tried()) };
                Err(RuntimeError::new(Kind::Invalid, text))
            }
            // Another call did it, or the answer was lost.
            Some(looked) if looked.running() => Ok(()),
            _ => Err(error),
        }
    }

    pub(super) async fn stop(&self, id: &ContainerId, grace: Grace) -> Result<()> {
        let Some(looked) = self.look_at(id).await?.filter(Looked::running) else { return Ok(()) };
        self.thaw(id.as_str()).await?;
        if grace.is_zero() {
            return self.call_stop(id, 0).await;
        }
        // A real-time signal cannot be sent from here: the runtime's own takes its place.
        let asked = looked.status.annotations.get(spec::STOP_SIGNAL).and_then(|name| Signal::from_str(name).ok());
        if let Some(signal) = asked {
            match self.signalled(id, signal, grace).await? {
                Signalled::Ended => return Ok(()),
                Signalled::Ignored => return self.call_stop(id, 0).await,
                Signalled::NotSent => {}
            }
        }
        // CRI counts whole seconds. The signal is sent at once, and a call that is given up has no other effect.
        let seconds = grace.as_secs() + u64::from(grace.subsec_nanos() > 0);
        match timeout(grace, self.call_stop(id, i64::try_from(seconds).unwrap_or(i64::MAX))).await {
            Ok(stopped) => stopped,
            Err(_late) => self.call_stop(id, 0).await,
        }
    }

    async fn call_stop(&self, id: &ContainerId, seconds: i64) -> Result<()> {
        let request = v1::StopContainerRequest { container_id: id.to_string(), timeout: seconds };
        let mut client = self.client.runtime.clone();
        // As long as the grace and what the runtime allows itself for a kill.
        let limit = Duration::from_secs(u64::try_from(seconds).unwrap_or(0)) + super::client::PATIENCE;
        let tried = format!("failed to stop container {id}");
        let stopped = match timeout(limit, client.stop_container(request)).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(status)) => Err(super::client::failed(&tried, &status)),
            Err(late) => Err(RuntimeError::new(Kind::Unavailable, tried).with_source(late)),
        };
        self.places.forget(id.as_str());
        unless_absent(stopped)
    }

    /// Sends the container's own stop signal, which not every runtime knows of.
    async fn signalled(&self, id: &ContainerId, signal: Signal, grace: Grace) -> Result<Signalled> {
        // It has ended, or the runtime does not tell its process: either way the runtime is to stop it, by its own signal.
        let Some(place) = self.place(id.as_str()).await? else { return Ok(Signalled::NotSent) };
        let Some(process) = Process::open(place.pid, id.as_str()) else { return Ok(Signalled::NotSent) };
        process.send(signal);
        if timeout(grace, process.ended()).await.is_err() {
            return Ok(Signalled::Ignored);
        }
        // The runtime takes note a moment later; it waits for that itself where there is nothing to stop any more.
        self.call_stop(id, 0).await.map(|()| Signalled::Ended)
    }

    pub(super) async fn remove(&self, id: &ContainerId) -> Result<()> {
        // Not an id that someone else's container happens to have.
        match self.look_at(id).await? {
            Some(looked) => {
                if looked.running() {
                    self.thaw(id.as_str()).await?;
                }
                self.remove_own(id, &looked.facts).await
            }
            None => Ok(()),
        }
    }

    /// Removes a container that is known to be ours and not frozen, and its log.
    pub(super) async fn remove_own(&self, id: &ContainerId, facts: &Facts) -> Result<()> {
        locked(&self.unstarted).remove(id.as_str());
        // First, for without the container nobody would look for its log.
        let (logs, facts) = (self.logs.clone(), (facts.pod.uid.clone(), facts.container.clone(), facts.attempt));
        let tried = format!("failed to remove the log of container {id}");
        blocking(tried, move || logs.remove(&facts.0, &facts.1, facts.2)).await?;
        let deadline = Instant::now() + REMOVE_PATIENCE;
        loop {
            let request = v1::RemoveContainerRequest { container_id: id.to_string() };
            let tried = || format!("failed to remove container {id}");
            let removed = ask!(self.client.runtime, remove_container(request), tried).await.map(drop);
            match unless_absent(removed) {
                Ok(()) => {
                    self.places.forget(id.as_str());
                    return Ok(());
                }
                // Being removed by another call, or its file system is busy for a moment: look again.
                Err(error) if error.kind() != Kind::Unavailable && Instant::now() < deadline => {
                    tracing::debug!(container = %id, error = crate::telemetry::chain(&error), "removal is tried again");
                }
                Err(error) => return Err(error),
            }
            sleep(REMOVE_PAUSE).await;
        }
    }

    pub(super) async fn status(&self, id: &ContainerId) -> Result<ContainerStatus> {
        match self.look_closely(id).await? {
            Some(looked) => self.status_of(looked).await,
            None => Err(RuntimeError::new(Kind::NotFound, format!("there is no container {id}"))),
        }
    }

    pub(super) async fn list(&self, pod_uid: Option<&str>) -> Result<Vec<ContainerStatus>> {
        let of_pod: Vec<_> = pod_uid.map(|uid| (labels::POD_UID, uid)).into_iter().collect();
        if let Some(uid) = pod_uid {
            self.creates.landed(uid).await;
        }
        let listed = self.see_containers(&of_pod).await?;
        let looked = listed.into_iter().map(|listed| async move {
            // One that vanishes meanwhile is left out.
            match self.look_at(&ContainerId::from(listed.id)).await? {
                Some(looked) => self.status_of(looked).await.map(Some),
                None => Ok(None),
            }
        });
        let looked = stream::iter(looked).buffer_unordered(CALLS_IN_FLIGHT);
        looked.try_filter_map(|status| async move { Ok(status) }).try_collect().await
    }

    async fn status_of(&self, looked: Looked) -> Result<ContainerStatus> {
        let id = looked.status.id.clone();
        let place = if looked.running() { self.place(&id).await? } else { None };
        if !looked.running() {
            self.places.forget(&id);
        }
        let mut status = status_of(looked);
        if status.exit_code == EXIT_KILLED && !status.oom_killed {
            status.oom_killed = self.verdicts.of(&id).await;
        }
        if let Some(place) = place {
            status.frozen = self.cgroups.is_frozen(place.cgroup.path());
            status.pid = Some(place.pid);
        }
        Ok(status)
    }
}

fn status_of(looked: Looked) -> ContainerStatus {
    let Looked { status, facts } = looked;
    let state = match status.state() {
        v1::ContainerState::ContainerCreated => ContainerState::Created,
        v1::ContainerState::ContainerRunning => ContainerState::Running,
        v1::ContainerState::ContainerExited | v1::ContainerState::ContainerUnknown => ContainerState::Exited,
    };
    let exited = state == ContainerState::Exited;
    let created_at = moment(status.created_at).unwrap_or_default();
    let started_at = moment(status.started_at);
    let never_ran = exited && started_at.is_none();
    let said = |key: &str| status.annotations.get(key).cloned().unwrap_or_default();
    ContainerStatus {
        sandbox: SandboxId::from(facts.sandbox),
        pod: facts.pod,
        name: facts.container,
        attempt: facts.attempt,
        state,
        frozen: false,
        created_at,
        started_at: started_at.filter(|_| state != ContainerState::Created),
        finished_at: exited.then(|| moment(status.finished_at).unwrap_or(created_at)),
        exit_code: match status.exit_code {
            _ if !exited => 0,
            _ if never_ran && is_not_found(&status.message) => EXIT_NOT_FOUND,
            _ if never_ran => EXIT_START_FAILED,
            code => code,
        },
        oom_killed: exited && status.reason == "OOMKilled",
        message: if exited { status.message.clone() } else { String::new() },
        image: ImageId::from(said(spec::IMAGE)),
        image_ref: facts.image_ref,
        pid: None,
        resources: status.resources.as_ref().and_then(|all| all.linux.as_ref()).map(spec::limits),
        annotations: facts.annotations,
        id: ContainerId::from(status.id),
    }
}

/// Whether a start failed because there is no such command, in an OCI runtime's words.
fn is_not_found(message: &str) -> bool {
    message.contains("no such file or directory") || message.contains("executable file not found")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::types::PodRef;

    fn looked(status: v1::ContainerStatus) -> ContainerStatus {
        let pod = PodRef { uid: "u".into(), namespace: "n".into(), name: "p".into() };
        let config = ContainerConfig::new(pod, "c", "sha256:1".into(), Vec::new());
        let made = spec::container(("o", &"s".into()), &config, "", true, String::new());
        let facts = spec::facts("o", &made.labels, &made.annotations).unwrap();
        status_of(Looked { status: v1::ContainerStatus { annotations: made.annotations, ..status }, facts })
    }

    #[test]
    fn a_failed_start_has_no_beginning_and_a_code_of_its_own() {
        let exited = |message: &str, code| v1::ContainerStatus {
            state: v1::ContainerState::ContainerExited.into(),
            created_at: 5,
            finished_at: 9,
            exit_code: code,
            message: message.to_owned(),
            ..v1::ContainerStatus::default()
        };
        let status = looked(exited("exec: \"/x\": stat /x: no such file or directory", 128));
        assert_eq!((status.exit_code, status.started_at), (127, None));
        assert_eq!(status.finished_at.map(|at| at.as_nanosecond()), Some(9));
        assert_eq!(looked(exited("exec: \"/bin\": permission denied", 128)).exit_code, 128);
        let ran = looked(v1::ContainerStatus { started_at: 7, ..exited("", 3) });
        assert_eq!((ran.exit_code, ran.image.as_str()), (3, "sha256:1"));
    }
}
