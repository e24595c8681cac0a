//! Pure: `/metrics/resource`, with the names, labels and times of a kubelet's (Kubernetes documentation, "Node metrics
//! data"; KEP-1324). CPU in core-seconds, memory in bytes.

use super::exposition::{Exposition, Kind};
use crate::runtime::stats::{ContainerStats, SandboxStats, Usage};

const NANOSECONDS: f64 = 1e9;

/// The text; `pods` is `None` if they could not be read.
pub(super) fn render(node: &Usage, pods: Option<&[SandboxStats]>) -> String {
    let mut out = Exposition::default();
    let sandboxes = pods.unwrap_or_default();
    let containers = || sandboxes.iter().flat_map(|pod| pod.containers.iter().map(move |container| (pod, container)));

    let mut family = out.family(
        "container_cpu_usage_seconds_total",
        Kind::Counter,
        "CPU time the container has used, in core-seconds",
    );
    for (pod, container) in containers() {
        if let Some(cpu) = container.usage.cpu {
            family.sample(&labels(pod, container), cpu.total as f64 / NANOSECONDS, Some(container.usage.time));
        }
    }
    let mut family =
        out.family("container_memory_working_set_bytes", Kind::Gauge, "Working set of the container, in bytes");
    for (pod, container) in containers() {
        if let Some(memory) = container.usage.memory {
            family.sample(&labels(pod, container), memory.working_set as f64, Some(container.usage.time));
        }
    }
    let help = "When the container started, in seconds since 1970";
    let mut family = out.family("container_start_time_seconds", Kind::Gauge, help);
    for (pod, container) in containers() {
        if let Some(started) = container.started_at {
            family.sample(&labels(pod, container), started.as_millisecond() as f64 / 1e3, None);
        }
    }
    let mut family =
        out.family("node_cpu_usage_seconds_total", Kind::Counter, "CPU time the node has used, in core-seconds");
    if let Some(cpu) = node.cpu {
        family.sample(&[], cpu.total as f64 / NANOSECONDS, Some(node.time));
    }
    let mut family = out.family("node_memory_working_set_bytes", Kind::Gauge, "Working set of the node, in bytes");
    if let Some(memory) = node.memory {
        family.sample(&[], memory.working_set as f64, Some(node.time));
    }
    let mut family =
        out.family("pod_cpu_usage_seconds_total", Kind::Counter, "CPU time the Pod has used, in core-seconds");
    for pod in sandboxes {
        if let Some(cpu) = pod.usage.cpu {
            family.sample(&pod_labels(pod), cpu.total as f64 / NANOSECONDS, Some(pod.usage.time));
        }
    }
    let mut family = out.family("pod_memory_working_set_bytes", Kind::Gauge, "Working set of the Pod, in bytes");
    for pod in sandboxes {
        if let Some(memory) = pod.usage.memory {
            family.sample(&pod_labels(pod), memory.working_set as f64, Some(pod.usage.time));
        }
    }
    // The second is what it was called before Kubernetes 1.29.
    for name in ["resource_scrape_error", "scrape_error"] {
        let help = "1 if the containers could not be read, 0 otherwise";
        out.family(name, Kind::Gauge, help).sample(&[], if pods.is_none() { 1.0 } else { 0.0 }, None);
    }
    out.finish()
}

fn labels<'a>(pod: &'a SandboxStats, container: &'a ContainerStats) -> [(&'a str, &'a str); 3] {
    [("container", &container.name), ("namespace", &pod.pod.namespace), ("pod", &pod.pod.name)]
}

fn pod_labels(pod: &SandboxStats) -> [(&str, &str); 2] {
    [("namespace", &pod.pod.namespace), ("pod", &pod.pod.name)]
}
