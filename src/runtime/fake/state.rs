//! What the fake remembers, and how each verb changes it. No waiting here: the verbs do that.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use jiff::Timestamp;
use tokio::sync::{mpsc, watch};

use super::log::Log;
use super::program::{self, Program};
use crate::runtime::session::TerminalSize;
use crate::runtime::stats::{
    ContainerStats, CpuUsage, Interface, Limits, MemoryUsage, SandboxStats, StatsScope, Usage,
};
use crate::runtime::types::{
    ContainerConfig, ContainerId, ContainerState, ContainerStatus, Image, ImageId, Resources, SandboxConfig, SandboxId,
    SandboxState, SandboxStatus,
};
use crate::runtime::{Kind, Result, RuntimeError};

/// Exit code of a process that SIGKILL ended.
pub(super) const KILLED: i32 = 137;
/// Writes to a standard input that may wait for its reader.
pub(super) const WRITES_AHEAD: usize = 4;

/// One container.
#[derive(Debug)]
pub(super) struct Container {
    pub(super) status: ContainerStatus,
    pub(super) program: Program,
    pub(super) config: ContainerConfig,
    pub(super) stubborn: bool,
    pub(super) log: Log,
    /// Where its standard input is written to, as long as somebody may attach.
    pub(super) stdin: Option<mpsc::Sender<Bytes>>,
    /// The other end, until its process takes it.
    pub(super) input: Option<mpsc::Receiver<Bytes>>,
    pub(super) size: watch::Sender<Option<TerminalSize>>,
    /// Where its process listens.
    pub(super) ports: Vec<u16>,
    /// Execs that run in it.
    pub(super) execs: usize,
    pub(super) usage: Usage,
}

/// Everything.
#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) sandboxes: BTreeMap<SandboxId, SandboxStatus>,
    /// Of the sandboxes.
    limits: BTreeMap<SandboxId, Resources>,
    pub(super) containers: BTreeMap<ContainerId, Container>,
    pub(super) images: BTreeMap<ImageId, Image>,
}

fn unknown(what: &str, id: impl std::fmt::Display) -> RuntimeError {
    RuntimeError::new(Kind::NotFound, format!("there is no {what} {id}"))
}

impl State {
    /// Unique in the process, so that no two fakes know each other's ids.
    fn number() -> u64 {
        static MADE: AtomicU64 = AtomicU64::new(1);
        MADE.fetch_add(1, Ordering::Relaxed)
    }

    /// The sandbox of this Pod and attempt: a ready one stays, any other gives way to a new one.
    pub(super) fn run_sandbox(&mut self, config: &SandboxConfig) -> (SandboxId, bool) {
        let same = |status: &&SandboxStatus| status.pod.uid == config.pod.uid && status.attempt == config.attempt;
        if let Some(found) = self.sandboxes.values().find(same).map(|status| (status.id.clone(), status.state)) {
            match found {
                (id, SandboxState::Ready) => return (id, false),
                (id, SandboxState::NotReady) => drop(self.remove_sandbox(&id)),
            }
        }
        let number = Self::number();
        let id = SandboxId::from(format!("sandbox-{number}"));
        let status = SandboxStatus {
            id: id.clone(),
            pod: config.pod.clone(),
            attempt: config.attempt,
            state: SandboxState::Ready,
            created_at: Timestamp::now(),
            addresses: config.network.addresses().to_vec(),
            pid: Some(1_000_000 + number as i32),
        };
        self.sandboxes.insert(id.clone(), status);
        self.limits.insert(id.clone(), config.resources.clone());
        (id, true)
    }

    /// Kills what runs in it; `false` if it was stopped already. The containers that ended are returned too.
    pub(super) fn stop_sandbox(&mut self, id: &SandboxId) -> (bool, Vec<ContainerId>) {
        let members = self.running_members(id);
        for member in &members {
            self.end(member, KILLED, false);
        }
        let Some(sandbox) = self.sandboxes.get_mut(id) else { return (false, members) };
        let stopped = sandbox.state == SandboxState::Ready;
        sandbox.state = SandboxState::NotReady;
        sandbox.pid = None;
        (stopped, members)
    }

    fn running_members(&self, id: &SandboxId) -> Vec<ContainerId> {
        let running = |container: &&Container| {
            container.status.sandbox == *id && container.status.state == ContainerState::Running
        };
        self.containers.values().filter(running).map(|container| container.status.id.clone()).collect()
    }

    /// Forgets it and its containers; how many objects went.
    pub(super) fn remove_sandbox(&mut self, id: &SandboxId) -> usize {
        let before = self.containers.len() + self.sandboxes.len();
        self.containers.retain(|_, container| container.status.sandbox != *id);
        self.sandboxes.remove(id);
        self.limits.remove(id);
        before - self.containers.len() - self.sandboxes.len()
    }

    pub(super) fn sandbox(&self, id: &SandboxId) -> Result<&SandboxStatus> {
        self.sandboxes.get(id).ok_or_else(|| unknown("sandbox", id))
    }

    pub(super) fn create(&mut self, sandbox: &SandboxId, config: &ContainerConfig) -> Result<ContainerId> {
        if self.sandbox(sandbox)?.state != SandboxState::Ready {
            return Err(RuntimeError::new(Kind::Invalid, format!("sandbox {sandbox} is not ready")));
        }
        if !self.images.contains_key(&config.image) {
            return Err(unknown("image", &config.image));
        }
        self.check_target(sandbox, config)?;
        let same = |container: &&Container| {
            let status = &container.status;
            status.pod.uid == config.pod.uid && status.name == config.name && status.attempt == config.attempt
        };
        if let Some(found) = self.containers.values().find(same).map(|container| &container.status) {
            if found.sandbox == *sandbox {
                return Ok(found.id.clone());
            }
            let text = format!("container {} of {} exists in another sandbox", config.name, config.pod);
            return Err(RuntimeError::new(Kind::AlreadyExists, text));
        }
        let id = ContainerId::from(format!("container-{}", Self::number()));
        let words: Vec<String> = config.command.iter().chain(&config.args).cloned().collect();
        let (stdin, input) = mpsc::channel(WRITES_AHEAD);
        let container = Container {
            status: created(id.clone(), sandbox.clone(), config),
            program: program::read(&words),
            config: config.clone(),
            stubborn: false,
            log: Log::default(),
            stdin: config.stdin.then_some(stdin),
            input: Some(input),
            size: watch::Sender::new(None),
            ports: Vec::new(),
            execs: 0,
            usage: used(),
        };
        self.containers.insert(id.clone(), container);
        Ok(id)
    }

    fn check_target(&self, sandbox: &SandboxId, config: &ContainerConfig) -> Result<()> {
        let Some(target) = &config.pid_target else { return Ok(()) };
        let found = self.containers.get(target).filter(|found| found.status.sandbox == *sandbox);
        let found = found.ok_or_else(|| unknown("target container", target))?;
        if found.status.state == ContainerState::Running {
            return Ok(());
        }
        Err(RuntimeError::new(Kind::Invalid, format!("target container {} does not run", found.status.name)))
    }

    /// Running containers that have joined the processes of this one.
    pub(super) fn joined_to(&self, id: &ContainerId) -> Vec<ContainerId> {
        let running = self.containers.values().filter(|c| c.status.state == ContainerState::Running);
        running.filter(|c| c.config.pid_target.as_ref() == Some(id)).map(|c| c.status.id.clone()).collect()
    }

    pub(super) fn container(&mut self, id: &ContainerId) -> Result<&mut Container> {
        self.containers.get_mut(id).ok_or_else(|| unknown("container", id))
    }

    /// The container, if it runs.
    pub(super) fn running(&mut self, id: &ContainerId, tried: &str) -> Result<&mut Container> {
        let container = self.container(id)?;
        if container.status.state == ContainerState::Running {
            return Ok(container);
        }
        Err(RuntimeError::new(Kind::Invalid, format!("failed to {tried} container {id}: it does not run")))
    }

    /// Whether something in the sandbox listens on the port.
    pub(super) fn listens(&self, id: &SandboxId, port: u16) -> Result<bool> {
        self.sandbox(id)?;
        let members = self.running_members(id);
        Ok(members.iter().any(|member| self.containers[member].ports.contains(&port)))
    }

    /// What runs, with whatever usage it was given.
    pub(super) fn stats(&self, scope: StatsScope) -> Vec<SandboxStats> {
        let ready = self.sandboxes.values().filter(|sandbox| sandbox.state == SandboxState::Ready);
        let of_sandbox = |sandbox: &SandboxStatus| {
            let members = self.running_members(&sandbox.id);
            let containers: Vec<_> = members.iter().map(|id| stats_of(&self.containers[id], scope)).collect();
            let networked = scope > StatsScope::CpuAndMemory && !sandbox.addresses.is_empty();
            SandboxStats {
                id: sandbox.id.clone(),
                pod: sandbox.pod.clone(),
                started_at: Some(sandbox.created_at),
                cgroup: format!("/fake/pod{}", sandbox.pod.uid),
                usage: Usage {
                    limits: self.limits.get(&sandbox.id).filter(|_| scope > StatsScope::CpuAndMemory).map(told),
                    ..sum(&containers, scope)
                },
                network: networked.then(|| vec![Interface { name: "eth0".to_owned(), ..Interface::default() }]),
                containers,
                volumes: Vec::new(),
            }
        };
        ready.map(of_sandbox).collect()
    }

    pub(super) fn set_limits(&mut self, id: &ContainerId, limits: &Resources) -> Result<()> {
        let status = &mut self.container(id)?.status;
        if status.state == ContainerState::Exited {
            let text = format!("failed to change the limits of container {id}: it has exited");
            return Err(RuntimeError::new(Kind::Invalid, text));
        }
        overlay(status.resources.get_or_insert_default(), limits);
        Ok(())
    }

    pub(super) fn set_sandbox_limits(&mut self, id: &SandboxId, limits: &Resources) -> Result<()> {
        self.sandbox(id)?;
        overlay(self.limits.entry(id.clone()).or_default(), limits);
        Ok(())
    }

    /// Ends a running container; `false` if there is none of that id that runs.
    pub(super) fn end(&mut self, id: &ContainerId, exit_code: i32, oom_killed: bool) -> bool {
        let Some(container) = self.containers.get_mut(id) else { return false };
        let status = &mut container.status;
        if status.state != ContainerState::Running {
            return false;
        }
        status.state = ContainerState::Exited;
        status.finished_at = Some(Timestamp::now());
        status.exit_code = exit_code;
        status.oom_killed = oom_killed;
        status.pid = None;
        container.status.frozen = false;
        container.stdin = None;
        true
    }

    pub(super) fn mark_started(&mut self, id: &ContainerId) {
        let pid = 1_000_000 + Self::number() as i32;
        if let Some(container) = self.containers.get_mut(id) {
            container.status.state = ContainerState::Running;
            container.status.started_at = Some(Timestamp::now());
            container.status.pid = Some(pid);
        }
    }
}

fn told(limits: &Resources) -> Limits {
    let whole = |limit: Option<i64>| limit.and_then(|limit| u64::try_from(limit).ok());
    Limits {
        cpu_shares: whole(limits.cpu_shares),
        cpu_quota: whole(limits.cpu_quota),
        cpu_period: whole(limits.cpu_period),
        memory: whole(limits.memory_limit),
    }
}

/// Lays the limits that are asked for over those there are.
fn overlay(limits: &mut Resources, asked: &Resources) {
    limits.cpu_shares = asked.cpu_shares.or(limits.cpu_shares);
    limits.cpu_quota = asked.cpu_quota.or(limits.cpu_quota);
    limits.cpu_period = asked.cpu_period.or(limits.cpu_period);
    limits.memory_limit = asked.memory_limit.or(limits.memory_limit);
    limits.pids_limit = asked.pids_limit.or(limits.pids_limit);
}

/// What a container uses unless a test says otherwise: a second of CPU time and a mebibyte.
fn used() -> Usage {
    Usage {
        cpu: Some(CpuUsage { total: 1_000_000_000, ..CpuUsage::default() }),
        memory: Some(MemoryUsage { usage: 1 << 20, working_set: 1 << 20, ..MemoryUsage::default() }),
        ..Usage::default()
    }
}

fn stats_of(container: &Container, scope: StatsScope) -> ContainerStats {
    let (status, all) = (&container.status, scope > StatsScope::CpuAndMemory);
    ContainerStats {
        id: status.id.clone(),
        name: status.name.clone(),
        attempt: status.attempt,
        image_ref: status.image_ref.clone(),
        started_at: status.started_at,
        cgroup: format!("/fake/pod{}/{}", status.pod.uid, status.id),
        usage: Usage {
            time: Timestamp::now(),
            tasks: all.then_some(1),
            limits: status.resources.as_ref().filter(|_| all).map(told),
            ..container.usage
        },
        writable_layer: None,
        log: None,
    }
}

fn sum(containers: &[ContainerStats], scope: StatsScope) -> Usage {
    let cpu = containers.iter().filter_map(|container| container.usage.cpu).map(|cpu| cpu.total).sum();
    let memory = |of: fn(MemoryUsage) -> u64| containers.iter().filter_map(|c| c.usage.memory).map(of).sum();
    let memory = MemoryUsage {
        usage: memory(|memory| memory.usage),
        working_set: memory(|memory| memory.working_set),
        ..MemoryUsage::default()
    };
    Usage {
        time: Timestamp::now(),
        cpu: Some(CpuUsage { total: cpu, ..CpuUsage::default() }),
        memory: Some(memory),
        tasks: (scope > StatsScope::CpuAndMemory).then_some(containers.len() as u64),
        limits: None,
    }
}

fn created(id: ContainerId, sandbox: SandboxId, config: &ContainerConfig) -> ContainerStatus {
    ContainerStatus {
        id,
        sandbox,
        pod: config.pod.clone(),
        name: config.name.clone(),
        attempt: config.attempt,
        state: ContainerState::Created,
        created_at: Timestamp::now(),
        started_at: None,
        finished_at: None,
        frozen: false,
        exit_code: 0,
        oom_killed: false,
        message: String::new(),
        image: config.image.clone(),
        image_ref: config.image_ref.clone(),
        pid: None,
        resources: Some(config.resources.clone()),
        annotations: config.annotations.clone(),
    }
}
