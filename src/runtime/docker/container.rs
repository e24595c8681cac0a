//! Containers: create, start, stop, remove, status.

use std::collections::HashMap;
use std::time::Duration;

use bollard::errors::Error::DockerContainerWaitError as WaitError;
use bollard::models::{
    ContainerInspectResponse, ContainerState as DockerState, ContainerStateStatusEnum, ContainerSummaryStateEnum,
    HostConfigLogConfig,
};
use bollard::query_parameters::{
    KillContainerOptionsBuilder, ListContainersOptionsBuilder, RemoveContainerOptionsBuilder, StartContainerOptions,
    WaitContainerOptionsBuilder,
};
use futures::{StreamExt, stream};
use jiff::Timestamp;
use tokio::time::{Instant, sleep, timeout};

use super::failure::{failed, is_absent, status as http_status};
use super::limits::limits_of;
use super::sandbox::{CREATE_PAUSE, CREATE_TRIES, Created, Seen};
use super::spec::{self, Extras, Surroundings};
use super::{DockerRuntime, labels};
use crate::runtime::types::{
    ContainerConfig, ContainerId, ContainerState, ContainerStatus, Grace, ImageId, Profile, SandboxId,
};
use crate::runtime::{Kind, Result, RuntimeError, turn};

/// Inspects in flight during one list: each takes about a millisecond, most of it in the daemon.
pub(super) const INSPECTS_IN_FLIGHT: usize = 8;
/// A wait for a process to end is asked anew this often, in case the daemon lost the event.
const WAIT_SLICE: Duration = Duration::from_secs(2);
/// How long a killed process may take to be gone before the verb gives up (a process stuck in the kernel).
const KILL_PATIENCE: Duration = Duration::from_secs(30);
/// How long a removal that someone else began may take.
const REMOVE_PATIENCE: Duration = Duration::from_secs(30);
const REMOVE_PAUSE: Duration = Duration::from_millis(30);
/// Exit codes of a container that could not be started.
const EXIT_START_FAILED: i32 = 128;
const EXIT_NOT_FOUND: i32 = 127;
/// Exit code of a process that SIGKILL ended, whoever sent it.
const EXIT_KILLED: i32 = 137;

/// What a list says of one object.
pub(super) struct Listed {
    pub(super) id: String,
    pub(super) cgroup: String,
    /// False only if Docker says that it does not run.
    pub(super) may_run: bool,
}

impl DockerRuntime {
    pub(super) async fn create(&self, sandbox: &SandboxId, config: &ContainerConfig) -> Result<ContainerId> {
        self.check_sandbox(sandbox, config).await?;
        self.check_target(sandbox, config).await?;
        let name = labels::container_name(self.owner(), config);
        let extras = self.extras(config).await?;
        let around = Surroundings {
            cgroup_parent: self.cgroups.engine_parent(&config.cgroup_parent),
            oom_floor: self.oom_floor,
            held: self.held.clone(),
            labels: labels::of_container(self.owner(), sandbox, config),
        };
        let body = spec::container_body(sandbox, config, extras, around);
        for _ in 0..CREATE_TRIES {
            if let Created::New(id) = self.create_named(&name, body.clone()).await? {
                self.unstarted().insert(id.clone());
                return Ok(ContainerId::from(id));
            }
            match self.see(&name).await? {
                Some(seen) if half_made(&seen) => self.remove(seen.id()).await?,
                Some(seen) if seen.facts.sandbox == sandbox.as_str() => return Ok(ContainerId::from(seen.id())),
                Some(seen) => {
                    let text = format!("container {name} exists in another sandbox, {}", seen.facts.sandbox);
                    return Err(RuntimeError::new(Kind::AlreadyExists, text));
                }
                None => sleep(CREATE_PAUSE).await,
            }
        }
        Err(RuntimeError::new(Kind::Unavailable, format!("the name {name} stays taken by what cannot be seen")))
    }

    async fn check_sandbox(&self, sandbox: &SandboxId, config: &ContainerConfig) -> Result<()> {
        if self.network_book().plugged.contains_key(sandbox.as_str()) {
            // This process brought it up. Should its holder have died since, the start says so.
            return Ok(());
        }
        let tried = || format!("failed to create container {} of {}", config.name, config.pod);
        match self.see(sandbox.as_str()).await? {
            Some(seen) if !seen.facts.sandbox_itself => {
                Err(RuntimeError::new(Kind::NotFound, format!("{}: {sandbox} is not a sandbox", tried())))
            }
            Some(seen) if seen.running() => Ok(()),
            Some(_) => Err(RuntimeError::new(Kind::Invalid, format!("{}: sandbox {sandbox} is not ready", tried()))),
            None => Err(RuntimeError::new(Kind::NotFound, format!("{}: there is no sandbox {sandbox}", tried()))),
        }
    }

    /// Docker would make the container and refuse to start it.
    async fn check_target(&self, sandbox: &SandboxId, config: &ContainerConfig) -> Result<()> {
        let Some(target) = &config.pid_target else { return Ok(()) };
        let seen = self.see(target.as_str()).await?.filter(|seen| seen.facts.sandbox == sandbox.as_str());
        let (kind, what) = match seen {
            Some(seen) if seen.running() => return Ok(()),
            Some(seen) => (Kind::Invalid, format!("its target container {} does not run", seen.facts.container)),
            None => (Kind::NotFound, format!("there is no target container {target} in its sandbox")),
        };
        Err(RuntimeError::new(kind, format!("failed to create container {} of {}: {what}", config.name, config.pod)))
    }

    async fn extras(&self, config: &ContainerConfig) -> Result<Extras> {
        let security = &config.security;
        let mut image_user = String::new();
        if security.run_as_group.is_some() && security.run_as_user.is_none() {
            let image = self.image(config.image.as_str()).await?;
            image_user = image.map(|image| image.user).unwrap_or_default();
        }
        let seccomp = match &security.seccomp {
            Profile::Localhost(path) => Some(tokio::fs::read_to_string(path).await.map_err(|error| {
                RuntimeError::new(Kind::Invalid, format!("failed to read seccomp profile {path}")).with_source(error)
            })?),
            _ => None,
        };
        let log = HostConfigLogConfig {
            typ: Some("local".to_owned()),
            config: Some(HashMap::from([
                ("max-size".to_owned(), self.options.log_max_size.clone()),
                ("max-file".to_owned(), self.options.log_max_files.to_string()),
                ("compress".to_owned(), "false".to_owned()),
            ])),
        };
        Ok(Extras { user: spec::user(security, &image_user), seccomp, log })
    }

    pub(super) async fn start(&self, id: &ContainerId) -> Result<()> {
        let tried = || format!("failed to start container {id}");
        let absent = || RuntimeError::new(Kind::NotFound, format!("{}: it does not exist", tried()));
        if !self.unstarted().remove(id.as_str()) {
            match self.status(id).await?.state {
                ContainerState::Running => return Ok(()),
                ContainerState::Exited => {
                    return Err(RuntimeError::new(Kind::Invalid, format!("{}: it has exited already", tried())));
                }
                ContainerState::Created => {}
            }
        }
        let started = {
            let _turn = turn(&self.starts).await?;
            self.docker.start_container(id.as_str(), None::<StartContainerOptions>).await
        };
        self.statistics.changed();
        let Err(error) = started else { return Ok(()) };
        if is_absent(&error) && self.see(id.as_str()).await?.is_none() {
            return Err(absent());
        }
        // Docker answers 400, 404, 409 or 500 to a start that cannot succeed; what it wrote on the container decides.
        if http_status(&error).is_some() && self.status(id).await?.state == ContainerState::Exited {
            let words = super::failure::words(&error).unwrap_or_default();
            return Err(RuntimeError::new(Kind::Invalid, format!("{}: {}", tried(), words.trim())));
        }
        Err(failed(tried(), error))
    }

    pub(super) async fn stop(&self, id: &ContainerId, grace: Grace) -> Result<()> {
        let Some(seen) = self.see(id.as_str()).await? else { return Ok(()) };
        if !seen.running() {
            return Ok(());
        }
        if !grace.is_zero() {
            let signal = seen.inspect.config.as_ref().and_then(|config| config.stop_signal.clone());
            self.signal(id.as_str(), signal.as_deref().unwrap_or("SIGTERM")).await?;
            if self.ended_within(id.as_str(), grace).await? {
                return Ok(());
            }
        }
        self.kill(id.as_str()).await
    }

    /// Kills at once; returns when the process is gone.
    pub(super) async fn kill(&self, id: &str) -> Result<()> {
        {
            let _turn = turn(&self.removals).await?;
            self.signal(id, "SIGKILL").await?;
        }
        if self.ended_within(id, KILL_PATIENCE).await? {
            return Ok(());
        }
        Err(RuntimeError::new(Kind::Unavailable, format!("container {id} still runs after it was killed")))
    }

    /// Sends a signal; Ok if nothing is there to get it.
    async fn signal(&self, id: &str, signal: &str) -> Result<()> {
        let options = KillContainerOptionsBuilder::new().signal(signal).build();
        match self.docker.kill_container(id, Some(options)).await {
            Err(error) if !matches!(http_status(&error), Some(404 | 409)) => {
                // An engine may say "500: process not found" to a process that just ended.
                if self.see(id).await?.is_none_or(|seen| !seen.running()) {
                    return Ok(());
                }
                Err(failed(format!("failed to send {signal} to container {id}"), error))
            }
            _ => Ok(()),
        }
    }

    /// Waits until the container does not run, at most `patience`. The daemon's own notice is the fast way; it is
    /// checked by looking, since a notice can be lost.
    async fn ended_within(&self, id: &str, patience: Duration) -> Result<bool> {
        let deadline = Instant::now() + patience;
        loop {
            let slice = WAIT_SLICE.min(deadline.saturating_duration_since(Instant::now()));
            let options = WaitContainerOptionsBuilder::new().condition("not-running").build();
            let notice = timeout(slice, self.docker.wait_container(id, Some(options)).next()).await;
            // An exit code other than zero is an error to the client library.
            if let Ok(Some(Ok(_) | Err(WaitError { .. }))) = notice {
                return Ok(true);
            }
            if self.see(id).await?.is_none_or(|seen| !seen.running()) {
                return Ok(true);
            }
            if Instant::now() >= deadline {
                return Ok(false);
            }
            if notice.is_ok() {
                // The wait failed though the container runs: the daemon is shutting down; do not spin.
                sleep(REMOVE_PAUSE).await;
            }
        }
    }

    pub(super) async fn remove(&self, id: &str) -> Result<()> {
        // Not an id that someone else's container happens to have.
        if self.see(id).await?.is_none() { Ok(()) } else { self.remove_own(id).await }
    }

    /// Removes a container that is known to be ours.
    pub(super) async fn remove_own(&self, id: &str) -> Result<()> {
        self.unstarted().remove(id);
        let deadline = Instant::now() + REMOVE_PATIENCE;
        loop {
            let options = RemoveContainerOptionsBuilder::new().force(true).v(true).build();
            let removed = {
                let _turn = turn(&self.removals).await?;
                self.docker.remove_container(id, Some(options)).await
            };
            match removed {
                Ok(()) => {
                    self.statistics.changed();
                    return Ok(());
                }
                Err(error) if is_absent(&error) => return Ok(()),
                // Being removed by another call, or its file system is busy for a moment: look again.
                Err(error) if matches!(http_status(&error), Some(409 | 500)) && Instant::now() < deadline => {
                    tracing::debug!(container = id, error = crate::telemetry::chain(&error), "removal is tried again");
                }
                Err(error) => return Err(failed(format!("failed to remove container {id}"), error)),
            }
            sleep(REMOVE_PAUSE).await;
        }
    }

    pub(super) async fn status(&self, id: &ContainerId) -> Result<ContainerStatus> {
        match self.see(id.as_str()).await? {
            Some(seen) if !seen.facts.sandbox_itself => Ok(self.status_of(seen).await),
            _ => Err(RuntimeError::new(Kind::NotFound, format!("there is no container {id}"))),
        }
    }

    pub(super) async fn list(&self, pod_uid: Option<&str>) -> Result<Vec<ContainerStatus>> {
        let seen = self.list_seen(labels::KIND_CONTAINER, pod_uid).await?;
        Ok(stream::iter(seen).then(|seen| self.status_of(seen)).collect().await)
    }

    /// The objects of a kind that have all of `more` as labels, as Docker's list shows them.
    pub(super) async fn list_ids(&self, kind: &str, more: &[(&str, &str)]) -> Result<Vec<Listed>> {
        let mut wanted = vec![(labels::KIND, kind)];
        wanted.extend(more);
        let filter = labels::filter(self.owner(), &wanted);
        let options = ListContainersOptionsBuilder::new().all(true).filters(&filter).build();
        let listed = self.docker.list_containers(Some(options)).await;
        let listed = listed.map_err(|error| failed("failed to list containers", error))?;
        let fields = |summary: bollard::models::ContainerSummary| {
            use ContainerSummaryStateEnum::{CREATED, DEAD, EXITED};
            let may_run = !matches!(summary.state, Some(CREATED | EXITED | DEAD));
            let cgroup = summary.labels.and_then(|mut labels| labels.remove(labels::CGROUP)).unwrap_or_default();
            Some(Listed { id: summary.id?, cgroup, may_run })
        };
        Ok(listed.into_iter().filter_map(fields).collect())
    }
}

impl DockerRuntime {
    async fn status_of(&self, seen: Seen) -> ContainerStatus {
        let mut status = status_of(seen);
        if status.exit_code == EXIT_KILLED && !status.oom_killed {
            status.oom_killed = self.verdicts.of(status.id.as_str()).await;
        }
        status
    }
}

/// Only good for removal: its removal began and was cut off.
fn half_made(seen: &Seen) -> bool {
    use ContainerStateStatusEnum::{DEAD, REMOVING};
    seen.inspect.state.as_ref().is_some_and(|state| matches!(state.status, Some(DEAD | REMOVING)))
}

fn status_of(seen: Seen) -> ContainerStatus {
    let id = ContainerId::from(seen.id());
    let created_at = timestamp(seen.inspect.created.as_deref()).unwrap_or_default();
    let (pid, resources) = (pid(&seen.inspect), limits_of(&seen.inspect));
    let docker = seen.inspect.state.unwrap_or_default();
    let state = state_of(&docker);
    let started_at = timestamp(docker.started_at.as_deref());
    let exited = state == ContainerState::Exited;
    let failed_start = exited && started_at.is_none();
    let code = docker.exit_code.unwrap_or(0) as i32;
    ContainerStatus {
        id,
        sandbox: SandboxId::from(seen.facts.sandbox),
        pod: seen.facts.pod,
        name: seen.facts.container,
        attempt: seen.facts.attempt,
        state,
        frozen: docker.paused.unwrap_or(false),
        created_at,
        started_at: started_at.filter(|_| state != ContainerState::Created),
        // Docker notes no end for what never ran; it was over as soon as it was tried.
        finished_at: exited.then(|| timestamp(docker.finished_at.as_deref()).unwrap_or(created_at)),
        exit_code: match code {
            _ if !exited => 0,
            EXIT_NOT_FOUND => EXIT_NOT_FOUND,
            _ if failed_start => EXIT_START_FAILED,
            code => code,
        },
        oom_killed: exited && docker.oom_killed.unwrap_or(false),
        message: if exited { docker.error.unwrap_or_default() } else { String::new() },
        image: ImageId::from(seen.inspect.image.unwrap_or_default()),
        image_ref: seen.facts.image_ref,
        pid,
        resources,
        annotations: seen.facts.annotations,
    }
}

/// Docker keeps a container whose start failed as "created", with the failure noted on it.
pub(super) fn state_of(state: &DockerState) -> ContainerState {
    use ContainerStateStatusEnum::{CREATED, PAUSED, RESTARTING, RUNNING};
    match state.status {
        Some(RUNNING | PAUSED | RESTARTING) => ContainerState::Running,
        Some(CREATED) if state.exit_code.unwrap_or(0) != 0 => ContainerState::Exited,
        Some(CREATED) if state.error.as_ref().is_some_and(|text| !text.is_empty()) => ContainerState::Exited,
        Some(CREATED) => ContainerState::Created,
        _ => ContainerState::Exited,
    }
}

/// The first process, while there is one.
pub(super) fn pid(inspect: &ContainerInspectResponse) -> Option<i32> {
    let pid = inspect.state.as_ref()?.pid?;
    i32::try_from(pid).ok().filter(|pid| *pid > 0)
}

/// Docker writes the year 1 for "never".
pub(super) fn timestamp(text: Option<&str>) -> Option<Timestamp> {
    let time: Timestamp = text?.parse().ok()?;
    (time > Timestamp::UNIX_EPOCH).then_some(time)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dockers_never_is_no_time() {
        assert_eq!(timestamp(Some("0001-01-01T00:00:00Z")), None);
        assert_eq!(timestamp(Some("nonsense")), None);
        assert!(timestamp(Some("2026-11-21T07:15:43.359877326Z")).is_some());
    }

    #[test]
    fn a_failed_start_counts_as_exited() {
        let created = DockerState { status: Some(ContainerStateStatusEnum::CREATED), ..DockerState::default() };
        assert_eq!(state_of(&created), ContainerState::Created);
        let failed = DockerState { exit_code: Some(127), ..created.clone() };
        assert_eq!(state_of(&failed), ContainerState::Exited);
        let failed = DockerState { error: Some("no".into()), ..created };
        assert_eq!(state_of(&failed), ContainerState::Exited);
    }
}
