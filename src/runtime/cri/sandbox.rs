//! Sandboxes: run, stop, remove, status.
//!
//! ```text
//! cgroup + limits  ->  RunPodSandbox (labels)  ->  plug  = ready
//! thaw members -> unplug -> StopPodSandbox = stopped;  remove members -> cgroup, logs -> RemovePodSandbox = gone
//! ```
//! The runtime undoes what it half did, and a call that was sent is carried out whether or not somebody waits for it (see
//! [`Creates`](crate::runtime::creates::Creates)); so whatever a crash interrupts is found by its labels, but for the cgroup
//! of a sandbox that never came to be, which the next process removes at its start.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use futures::{FutureExt, StreamExt, TryStreamExt, stream};
use jiff::Timestamp;
use lambdalet_proto::cri::v1;
use tokio::time::sleep;

use super::client::{ask, is_taken, unless_absent};
use super::info::{self, Place};
use super::{CriRuntime, spec};
use crate::runtime::labels::{self, Facts};
use crate::runtime::running::pod_cgroup;
use crate::runtime::types::{ContainerId, SandboxConfig, SandboxId, SandboxNetwork, SandboxState, SandboxStatus};
use crate::runtime::{Kind, Result, RuntimeError, blocking, locked, turn};

/// How often a create is tried anew after what held its name was removed, or while another holds it.
pub(super) const CREATE_TRIES: u32 = 50;
/// Pause between those.
pub(super) const CREATE_PAUSE: Duration = Duration::from_millis(20);
/// Calls in flight during one list.
pub(super) const CALLS_IN_FLIGHT: usize = 8;

/// A sandbox of ours with its labels read.
pub(super) struct Seen {
    pub(super) id: String,
    pub(super) facts: Facts,
    pub(super) ready: bool,
    created_at: i64,
}

impl CriRuntime {
    pub(super) async fn run_sandbox(&self, config: &SandboxConfig) -> Result<SandboxId> {
        if matches!(config.network, SandboxNetwork::Plugins { .. }) {
            let what = "CNI plugins of the node (--cni-conf-dir) cannot make the network of a CRI runtime's sandboxes";
            return Err(RuntimeError::new(
                Kind::Unsupported,
                format!("failed to run the sandbox of {}: {what}", config.pod),
            ));
        }
        let _turn = self.turns.turn(&config.pod.uid).await;
        for _ in 0..CREATE_TRIES {
            // Before anything is asked: hardly ever is there another of its name, and the runtime knows.
            match self.make_sandbox(config).await {
                Err(error) if is_taken(&error) => {}
                made => return self.bring_up(made?, config).await,
            }
            let attempt = config.attempt.to_string();
            self.creates.landed(&config.pod.uid).await;
            let more = [(labels::POD_UID, config.pod.uid.as_str()), (labels::ATTEMPT, attempt.as_str())];
            match self.see_sandboxes(&more).await?.into_iter().next() {
                Some(seen) if seen.ready => {
                    self.plug_seen(&seen).await?;
                    return Ok(seen.id.into());
                }
                Some(seen) => self.remove_sandbox(&SandboxId::from(seen.id)).await?,
                None => sleep(CREATE_PAUSE).await,
            }
        }
        let what = format!("the name of the sandbox of {} stays taken by one that cannot be seen", config.pod);
        Err(RuntimeError::new(Kind::Unavailable, what))
    }

    async fn make_sandbox(&self, config: &SandboxConfig) -> Result<String> {
        let (cgroups, path, limits) = (self.cgroups.clone(), config.cgroup_parent.clone(), config.resources.clone());
        blocking(format!("failed to make cgroup {path}"), move || cgroups.ensure(&path, &limits)).await?;
        let logs = self.logs.of_pod(&config.pod.uid).to_string_lossy().into_owned();
        let parent = self.cgroups.engine_parent(&config.cgroup_parent);
        let sandbox = spec::sandbox(self.owner(), config, parent, logs);
        let request = v1::RunPodSandboxRequest { config: Some(sandbox), runtime_handler: String::new() };
        let tried = format!("failed to run the sandbox of {}", config.pod);
        let (client, lost) = (self.client.runtime.clone(), format!("lost the sandbox of {}", config.pod));
        let run = async move { ask!(client, run_pod_sandbox(request), || tried.clone()).await };
        let made = {
            let _turn = turn(&self.starts).await?;
            self.creates.run(&config.pod.uid, run).await
        };
        let made = made.map_err(|error| RuntimeError::new(Kind::Internal, lost).with_source(error))?;
        match made {
            Ok(made) => {
                let of_pod = (config.pod.uid.clone(), config.cgroup_parent.clone());
                locked(&self.known).insert(made.pod_sandbox_id.clone(), of_pod);
                Ok(made.pod_sandbox_id)
            }
            Err(error) => {
                if !is_taken(&error)
                    && let Err(left) = self.leave_pod((&config.pod.uid, &config.cgroup_parent), "").await
                {
                    tracing::warn!(pod = %config.pod, error = crate::telemetry::chain(&left),
                        "the cgroup of a sandbox that could not be run could not be removed either");
                }
                Err(error)
            }
        }
    }

    async fn bring_up(&self, id: String, config: &SandboxConfig) -> Result<SandboxId> {
        let id = SandboxId::from(id);
        if config.network == SandboxNetwork::Host {
            return Ok(id);
        }
        crate::failpoint::hit("plug");
        match self.plug(id.as_str(), config.network.addresses()).await {
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

    /// Plugs a ready sandbox in unless this process did so already.
    async fn plug_seen(&self, seen: &Seen) -> Result<()> {
        match &seen.facts.addresses[..] {
            [] => Ok(()),
            addresses => self.plug(&seen.id, addresses).await,
        }
    }

    async fn plug(&self, id: &str, addresses: &[IpAddr]) -> Result<()> {
        if locked(&self.plugged).contains(id) {
            return Ok(());
        }
        let _turn = self.turns.turn(id).await;
        if locked(&self.plugged).contains(id) {
            return Ok(());
        }
        let tried = || format!("failed to plug sandbox {id} in as {addresses:?}");
        let place = self.sandbox_place(id).await?.ok_or_else(|| {
            RuntimeError::new(
                Kind::Internal,
                format!("{}: it has ended, or the runtime does not tell its process", tried()),
            )
        })?;
        if let Some(given) = place.address.filter(|given| !addresses.contains(given)) {
            let why = format!(
                "the runtime gave it {given}, so its CNI configuration is not lambdalet's (docs/cri-driver.md)"
            );
            return Err(RuntimeError::new(Kind::Internal, format!("{}: {why}", tried())));
        }
        let plugged = self.cable.plug(place.pid, id, addresses).await;
        plugged.map_err(|error| RuntimeError::new(Kind::Internal, tried()).with_source(error))?;
        locked(&self.plugged).insert(id.to_owned());
        Ok(())
    }

    /// Process and cgroup of a ready sandbox; `None` if there is none, or it has ended.
    pub(super) async fn sandbox_place(&self, id: &str) -> Result<Option<Arc<Place>>> {
        if self.places.get(id).is_none() {
            self.look_sandbox(id, true).await?;
        }
        Ok(self.places.get(id))
    }

    /// The sandboxes of ours that have all of `more` as labels.
    pub(super) async fn see_sandboxes(&self, more: &[(&str, &str)]) -> Result<Vec<Seen>> {
        let filter = v1::PodSandboxFilter { label_selector: self.selector(more), ..v1::PodSandboxFilter::default() };
        let request = v1::ListPodSandboxRequest { filter: Some(filter) };
        let listed = ask!(self.client.runtime, list_pod_sandbox(request), || "failed to list sandboxes".to_owned());
        let seen = |sandbox: v1::PodSandbox| {
            let ready = sandbox.state() == v1::PodSandboxState::SandboxReady;
            let facts = spec::facts(self.owner(), &sandbox.labels, &sandbox.annotations)?;
            Some(Seen { id: sandbox.id, facts, ready, created_at: sandbox.created_at })
        };
        Ok(listed.await?.items.into_iter().filter_map(seen).filter(|seen| seen.facts.sandbox_itself).collect())
    }

    /// A selector of objects of this owner, further narrowed by `more`.
    pub(super) fn selector(&self, more: &[(&str, &str)]) -> HashMap<String, String> {
        let own = [(labels::OWNER, self.owner())];
        own.iter().chain(more).map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    /// What the runtime tells of a sandbox of ours, if there is one of that id.
    pub(super) async fn look_at_sandbox(&self, id: &str) -> Result<Option<(v1::PodSandboxStatus, Seen)>> {
        self.look_sandbox(id, false).await
    }

    /// A sandbox that is ready; begins the message with `tried` if there is none, or it is not.
    pub(super) async fn look_at_ready(&self, id: &SandboxId, tried: &str) -> Result<v1::PodSandboxStatus> {
        let (kind, what) = match self.look_at_sandbox(id.as_str()).await? {
            Some((status, seen)) if seen.ready => return Ok(status),
            Some(_) => (Kind::Invalid, format!("sandbox {id} is not ready")),
            None => (Kind::NotFound, format!("there is no sandbox {id}")),
        };
        Err(RuntimeError::new(kind, format!("{tried}: {what}")))
    }

    /// The same; `closely`, its place is known afterwards if it is ready, and the call takes longer.
    async fn look_sandbox(&self, id: &str, closely: bool) -> Result<Option<(v1::PodSandboxStatus, Seen)>> {
        let request = v1::PodSandboxStatusRequest { pod_sandbox_id: id.to_owned(), verbose: closely };
        let tried = || format!("failed to ask for the status of sandbox {id}");
        let (status, info) = match ask!(self.client.runtime, pod_sandbox_status(request), tried).await {
            Ok(answer) => (answer.status.unwrap_or_default(), answer.info),
            Err(error) if error.is_not_found() => return Ok(None),
            Err(error) => return Err(error),
        };
        let facts = spec::facts(self.owner(), &status.labels, &status.annotations);
        // Runtimes take the beginning of an id for it.
        let Some(facts) = facts.filter(|facts| facts.sandbox_itself && status.id == id) else { return Ok(None) };
        let ready = status.state() == v1::PodSandboxState::SandboxReady;
        if closely
            && ready
            && let Some(place) = info::place(&info, status.created_at, &self.cgroups)
        {
            let address = status.network.as_ref().and_then(|network| network.ip.parse().ok());
            let pod_cgroup = pod_cgroup(self.cgroups.relative(&facts.cgroup));
            self.places.insert(id, Place { address, pod_cgroup, sandbox: Some(status.clone()), ..place });
        }
        let seen = Seen { id: status.id.clone(), facts, ready, created_at: status.created_at };
        Ok(Some((status, seen)))
    }

    pub(super) async fn stop_sandbox(&self, id: &SandboxId) -> Result<()> {
        if self.look_at_sandbox(id.as_str()).await?.is_none() {
            return Ok(());
        }
        self.halt_sandbox(id).await
    }

    async fn halt_sandbox(&self, id: &SandboxId) -> Result<()> {
        // What is frozen does not die.
        for member in self.see_containers(&[(labels::SANDBOX, id.as_str())]).await? {
            if member.running {
                self.thaw(&member.id).await?;
            }
        }
        let _halting = Halting::begin(self, id.as_str());
        // Whoever looked at it just now may be plugging it in.
        let _turn = self.turns.turn(id.as_str()).await;
        locked(&self.plugged).remove(id.as_str());
        // First, since the runtime takes its time, in which an address without a process would not answer.
        self.cable.unplug(id.as_str()).await.map_err(|error| {
            RuntimeError::new(Kind::Internal, format!("failed to unplug sandbox {id}")).with_source(error)
        })?;
        let request = v1::StopPodSandboxRequest { pod_sandbox_id: id.to_string() };
        let tried = || format!("failed to stop sandbox {id}");
        unless_absent(ask!(self.client.runtime, stop_pod_sandbox(request), tried).await.map(drop))?;
        self.places.forget(id.as_str());
        Ok(())
    }

    pub(super) async fn remove_sandbox(&self, id: &SandboxId) -> Result<()> {
        let Some((_, seen)) = self.look_at_sandbox(id.as_str()).await? else { return Ok(()) };
        self.halt_sandbox(id).await?;
        // Again until a list is empty: a create that nobody waited for may land in between.
        loop {
            self.creates.landed(&seen.facts.pod.uid).await;
            let members = self.see_containers(&[(labels::SANDBOX, id.as_str())]).await?;
            if members.is_empty() {
                break;
            }
            let removed = members
                .into_iter()
                .map(|member| async move { self.remove_own(&ContainerId::from(member.id), &member.facts).await });
            stream::iter(removed).buffer_unordered(CALLS_IN_FLIGHT).try_collect::<()>().await?;
        }
        // The sandbox last, for it is what makes a later process look for the rest.
        self.leave_pod((&seen.facts.pod.uid, &seen.facts.cgroup), id.as_str()).await?;
        let request = v1::RemovePodSandboxRequest { pod_sandbox_id: id.to_string() };
        let tried = || format!("failed to remove sandbox {id}");
        unless_absent(ask!(self.client.runtime, remove_pod_sandbox(request), tried).await.map(drop))?;
        locked(&self.known).remove(id.as_str());
        Ok(())
    }

    /// Removes what was left by sandboxes, of this Pod or of all, that somebody else removed since they were last seen.
    async fn leave_vanished(&self, seen: &[Seen], pod_uid: Option<&str>) {
        let vanished: Vec<_> = {
            let mut known = locked(&self.known);
            known.extend(seen.iter().map(|one| {
                let Facts { pod, cgroup, .. } = &one.facts;
                (one.id.clone(), (pod.uid.clone(), cgroup.clone()))
            }));
            let is_there = |id: &str| seen.iter().any(|one| one.id == id);
            let asked = known.iter().filter(|(_, (uid, _))| pod_uid.is_none_or(|wanted| wanted == uid));
            asked.filter(|(id, _)| !is_there(id)).map(|(id, of_pod)| (id.clone(), of_pod.clone())).collect()
        };
        for (id, of_pod) in vanished {
            if let Err(error) = self.leave_if_vanished(&id, of_pod).await {
                tracing::warn!(
                    sandbox = id,
                    error = crate::telemetry::chain(&error),
                    "what is left of a sandbox that somebody else removed could not be removed"
                );
            }
        }
    }

    async fn leave_if_vanished(&self, id: &str, (uid, cgroup): (String, String)) -> Result<()> {
        // Another of the Pod may be on its way into the cgroup. Who lists does not wait for that: the next list is soon.
        let Some(_turn) = self.turns.turn(&uid).now_or_never() else { return Ok(()) };
        if self.creates.landed(&uid).now_or_never().is_none() {
            return Ok(());
        }
        // It may have been made while others were listed, or another look may have been here.
        if !locked(&self.known).contains_key(id) || self.look_at_sandbox(id).await?.is_some() {
            return Ok(());
        }
        locked(&self.plugged).remove(id);
        self.places.forget(id);
        self.cable.unplug(id).await.map_err(|error| {
            RuntimeError::new(Kind::Internal, format!("failed to unplug sandbox {id}")).with_source(error)
        })?;
        self.leave_pod((&uid, &cgroup), id).await?;
        locked(&self.known).remove(id);
        Ok(())
    }

    /// Removes the Pod's cgroup and directory of logs, unless another sandbox of the Pod has them.
    async fn leave_pod(&self, (uid, path): (&str, &str), but: &str) -> Result<()> {
        let holders = self.see_sandboxes(&[(labels::CGROUP, path)]).await?;
        if holders.iter().any(|holder| holder.id != but) {
            return Ok(());
        }
        let (cgroups, owned) = (self.cgroups.clone(), path.to_owned());
        // Others may have theirs below one that is not named after the Pod.
        let is_the_pods = !uid.is_empty() && path.rsplit('/').next().is_some_and(|last| last.contains(uid));
        blocking(format!("failed to remove cgroup {path}"), move || {
            // What still runs there is what a runtime forgot, such as a start that was given up halfway.
            if is_the_pods {
                cgroups.kill(&cgroups.relative(&owned));
            }
            cgroups.remove(&owned)
        })
        .await?;
        let (logs, owned) = (self.logs.clone(), uid.to_owned());
        blocking(format!("failed to remove the directory of the logs of Pod {uid}"), move || logs.leave(&owned)).await
    }

    pub(super) async fn sandbox_status(&self, id: &SandboxId) -> Result<SandboxStatus> {
        match self.look_at_sandbox(id.as_str()).await? {
            Some((_, seen)) => self.sandbox_status_of(seen).await,
            None => Err(RuntimeError::new(Kind::NotFound, format!("there is no sandbox {id}"))),
        }
    }

    async fn sandbox_status_of(&self, seen: Seen) -> Result<SandboxStatus> {
        let mut ready = seen.ready && !locked(&self.halting).contains_key(&seen.id);
        if ready && let Err(error) = self.plug_seen(&seen).await {
            tracing::warn!(sandbox = seen.id, pod = %seen.facts.pod, error = crate::telemetry::chain(&error),
                "a running sandbox has no network");
            ready = false;
        }
        let place = if seen.ready { self.sandbox_place(&seen.id).await? } else { None };
        Ok(SandboxStatus {
            pod: seen.facts.pod,
            attempt: seen.facts.attempt,
            state: if ready { SandboxState::Ready } else { SandboxState::NotReady },
            created_at: moment(seen.created_at).unwrap_or_default(),
            addresses: seen.facts.addresses,
            pid: place.map(|place| place.pid),
            id: seen.id.into(),
        })
    }

    pub(super) async fn list_sandboxes(&self, pod_uid: Option<&str>) -> Result<Vec<SandboxStatus>> {
        let of_pod: Vec<_> = pod_uid.map(|uid| (labels::POD_UID, uid)).into_iter().collect();
        if let Some(uid) = pod_uid {
            self.creates.landed(uid).await;
        }
        let seen = self.see_sandboxes(&of_pod).await?;
        self.leave_vanished(&seen, pod_uid).await;
        let statuses = seen.into_iter().map(|seen| self.sandbox_status_of(seen));
        stream::iter(statuses).buffer_unordered(CALLS_IN_FLIGHT).try_collect().await
    }
}

/// A sandbox is being stopped, until this is dropped.
struct Halting<'a>(&'a CriRuntime, &'a str);

impl<'a> Halting<'a> {
    fn begin(runtime: &'a CriRuntime, id: &'a str) -> Self {
        *locked(&runtime.halting).entry(id.to_owned()).or_default() += 1;
        Self(runtime, id)
    }
}

impl Drop for Halting<'_> {
    fn drop(&mut self) {
        let mut halting = locked(&self.0.halting);
        if let Some(by) = halting.get_mut(self.1) {
            *by -= 1;
            if *by == 0 {
                halting.remove(self.1);
            }
        }
    }
}

/// Nanoseconds since 1970; zero is never.
pub(super) fn moment(nanoseconds: i64) -> Option<Timestamp> {
    Timestamp::from_nanosecond(nanoseconds.into()).ok().filter(|_| nanoseconds > 0)
}
