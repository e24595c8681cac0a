//! Statistics: what guests say they use, in the sandboxes' terms.

use std::path::Path;
use std::time::Duration;

use jiff::Timestamp;
use tokio::time::timeout;

use super::MicrovmRuntime;
use super::sandbox::{ANSWER, Sandbox};
use super::vm::GuestStats;
use crate::runtime::locked;
use crate::runtime::stats::{ContainerStats, DiskUsage, Limits, SandboxStats, StatsScope, Usage};
use crate::runtime::types::{ContainerStatus, Resources};
use crate::telemetry::chain;

/// How long a guest may walk through the files of its containers.
const WALK: Duration = Duration::from_secs(8);

impl MicrovmRuntime {
    /// Of every sandbox whose guest answers in time.
    pub(super) async fn read_stats(&self, scope: StatsScope) -> Vec<SandboxStats> {
        let of_each = self.sandboxes(None).into_iter().map(|sandbox| async move {
            let vm = sandbox.vm()?;
            // One with many files takes a while to walk through them; what else it uses is told without.
            let whole = Some((scope, WALK)).filter(|_| scope > StatsScope::CpuAndMemory);
            for (scope, patience) in whole.into_iter().chain([(StatsScope::CpuAndMemory, ANSWER)]) {
                // Cancel-safe: it only asks.
                match timeout(patience, vm.stats(scope)).await {
                    Ok(Ok(stats)) => return Some(told(&sandbox, stats, scope)),
                    Ok(Err(error)) => {
                        tracing::debug!(
                            sandbox = sandbox.id,
                            error = chain(&error),
                            "a guest does not say what it uses"
                        );
                        return None;
                    }
                    Err(_) => tracing::debug!(sandbox = sandbox.id, "a guest does not say in time what it uses"),
                }
            }
            None
        });
        futures::future::join_all(of_each).await.into_iter().flatten().collect()
    }
}

fn told(sandbox: &Sandbox, stats: GuestStats, scope: StatsScope) -> SandboxStats {
    let record = sandbox.record();
    let cgroup = record.cgroup.trim_start_matches('/').to_owned();
    let containers = stats.containers.into_iter().filter_map(|(id, usage, writable_layer)| {
        let status: ContainerStatus = record.status(&id, None, None)?;
        let log = (scope > StatsScope::CpuAndMemory).then(|| log_size(sandbox, &id)).flatten();
        Some(ContainerStats {
            name: status.name,
            attempt: status.attempt,
            image_ref: status.image_ref,
            started_at: status.started_at,
            // Of the guest's own tree; here it stands for the container as the host's does elsewhere.
            cgroup: Path::new(&cgroup).join(&id).display().to_string(),
            id: status.id,
            usage: limited(usage, status.resources.as_ref(), scope),
            writable_layer,
            log,
        })
    });
    let volumes = stats.volumes.into_iter();
    let volumes = volumes.filter_map(|(name, usage)| Some((record.volumes.get(&name)?.path().to_owned(), usage)));
    SandboxStats {
        volumes: volumes.collect(),
        id: sandbox.id.as_str().into(),
        pod: record.pod(),
        started_at: Some(record.created_at()),
        usage: limited(stats.usage, Some(&record.resources), scope),
        network: stats.network,
        containers: containers.collect(),
        cgroup: cgroup.clone(),
    }
}

/// With the limits that the guest was given, where it does not tell them itself.
fn limited(usage: Usage, given: Option<&Resources>, scope: StatsScope) -> Usage {
    let positive = |value: Option<i64>| value.and_then(|value| u64::try_from(value).ok()).filter(|value| *value > 0);
    let given = given.filter(|_| scope > StatsScope::CpuAndMemory).map(|given| Limits {
        cpu_shares: positive(given.cpu_shares),
        cpu_quota: positive(given.cpu_quota),
        cpu_period: positive(given.cpu_period),
        memory: positive(given.memory_limit),
    });
    Usage { limits: usage.limits.or(given), ..usage }
}

/// What a log takes on the host: a handful of files.
fn log_size(sandbox: &Sandbox, id: &str) -> Option<DiskUsage> {
    let log = locked(&sandbox.logs).get(id).cloned()?;
    let bytes = log.book.size().ok()?;
    Some(DiskUsage { time: Timestamp::now(), bytes, inodes: 1 })
}
