//! From a Pod to what the runtime seam takes: pure.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use k8s_openapi::api::core::v1::{
    AppArmorProfile, Container, Pod, PodSecurityContext, PodSpec, SeccompProfile, SecurityContext,
};

use super::admission::dotted;
use super::qos::{self, qos_class};
use crate::network::cni::Wish;
use crate::network::ports::HostPort;
use crate::quantity::Quantity;
use crate::runtime::types::{
    ContainerConfig, Image, ImageId, MachineFiles, Mount, MountPropagation, NamespaceMode, PodRef, Profile,
    SandboxConfig, SandboxNetwork, Security,
};

/// Bits per second that a Pod may receive.
const INGRESS: &str = "kubernetes.io/ingress-bandwidth";
/// Bits per second that it may send.
const EGRESS: &str = "kubernetes.io/egress-bandwidth";

/// What of the node a translation depends on.
#[derive(Clone, Debug)]
pub struct Host {
    /// First part of every cgroup path (`lambdalet-1a2b3c4d`).
    pub cgroup_root: String,
    /// Directory of seccomp profiles that Pods may name (`<root-dir>/seccomp`).
    pub seccomp_root: PathBuf,
    /// Bytes of memory, for OOM scores.
    pub memory: i64,
    /// Whether CPU limits are enforced (`cpuCFSQuota`).
    pub cpu_quota: bool,
    /// Most processes of one Pod (`podPidsLimit`); `None` is no limit.
    pub pids_limit: Option<i64>,
}

/// A container that cannot be made as asked. `Display` is the message of its status.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum TranslateError {
    /// `runAsNonRoot` and the user is root.
    #[error("container has runAsNonRoot and image will run as root (pod: {pod:?}, container: {container})")]
    RunsAsRoot {
        /// `name_namespace(uid)`.
        pod: String,
        /// The container's name.
        container: String,
    },
    /// `runAsNonRoot` and `runAsUser: 0`.
    #[error("container's runAsUser breaks non-root policy (pod: {pod:?}, container: {container})")]
    UserIsRoot {
        /// `name_namespace(uid)`.
        pod: String,
        /// The container's name.
        container: String,
    },
    /// `runAsNonRoot` and the image names its user.
    #[error(
        "container has runAsNonRoot and image has non-numeric user ({user}), cannot verify user is non-root (pod: {pod:?}, container: {container})"
    )]
    UnknownUser {
        /// The image's USER.
        user: String,
        /// `name_namespace(uid)`.
        pod: String,
        /// The container's name.
        container: String,
    },
    /// A mount names a volume that the Pod does not have.
    #[error("cannot find volume {volume:?} to mount into container {container:?}")]
    NoVolume {
        /// `volumeMounts[].name`.
        volume: String,
        /// The container's name.
        container: String,
    },
    /// Something this node does not do yet.
    #[error("container {container:?} asks for {what}, which this node does not support yet")]
    Unsupported {
        /// The container's name.
        container: String,
        /// The field.
        what: &'static str,
    },
}

/// Where a Pod's volumes and files are on the host.
#[derive(Clone, Debug, Default)]
pub struct Places {
    /// Volume name to host path, and whether the volume itself is read-only.
    pub volumes: BTreeMap<String, (PathBuf, bool)>,
    /// What a mount with a `subPath` shows in place of its volume, by place in the container's `volumeMounts`.
    pub sub_paths: BTreeMap<usize, PathBuf>,
    /// In their place, for a microVM: the part's path in its volume.
    pub parts: BTreeMap<usize, String>,
    /// For a microVM: volume name to the image that it shows.
    pub images: BTreeMap<String, ImageId>,
    /// The Pod's `/etc/hosts`, `/etc/resolv.conf` and `/etc/hostname`, as host path and container path.
    pub files: Vec<(PathBuf, String)>,
    /// The attempt's termination message file.
    pub termination_log: Option<PathBuf>,
}

/// The Pod's identity at the seam.
pub fn pod_ref(pod: &Pod) -> PodRef {
    let meta = &pod.metadata;
    PodRef {
        uid: meta.uid.clone().unwrap_or_default(),
        namespace: meta.namespace.clone().unwrap_or_default(),
        name: meta.name.clone().unwrap_or_default(),
    }
}

/// The Pod's cgroup: BestEffort and Burstable Pods below a group of their class, Guaranteed ones beside them.
pub fn cgroup_parent(host: &Host, uid: &str, spec: &PodSpec) -> String {
    match qos_class(spec) {
        "Guaranteed" => format!("/{}/pod{uid}", host.cgroup_root),
        class => format!("/{}/{}/pod{uid}", host.cgroup_root, class.to_lowercase()),
    }
}

/// The sandbox of a Pod.
pub fn sandbox(host: &Host, pod: &Pod, spec: &PodSpec, hostname: &str, network: SandboxNetwork) -> SandboxConfig {
    let reference = pod_ref(pod);
    let sysctls = spec.security_context.iter().flat_map(|s| s.sysctls.iter().flatten());
    let mut resources = qos::pod_resources(spec, host.cpu_quota);
    resources.pids_limit = host.pids_limit;
    SandboxConfig {
        handler: None,
        attempt: 0,
        hostname: hostname.to_owned(),
        network,
        ipc: ipc(spec),
        pid: pid(spec),
        sysctls: sysctls.map(|s| (dotted(&s.name), s.value.clone())).collect(),
        cgroup_parent: cgroup_parent(host, &reference.uid, spec),
        resources,
        machine: MachineFiles::default(),
        pod: reference,
    }
}

fn ipc(spec: &PodSpec) -> NamespaceMode {
    if spec.host_ipc == Some(true) { NamespaceMode::Node } else { NamespaceMode::Pod }
}

fn pid(spec: &PodSpec) -> NamespaceMode {
    if spec.host_pid == Some(true) {
        NamespaceMode::Node
    } else if spec.share_process_namespace == Some(true) {
        NamespaceMode::Pod
    } else {
        NamespaceMode::Container
    }
}

/// What CNI plugins are told that the Pod wants: `ports` of the host, and the rates of its annotations. A rate that is no
/// quantity is no limit, as on a kubelet.
pub fn wish(pod: &Pod, ports: Vec<HostPort>) -> Wish {
    let rate = |key: &str| {
        let text = pod.metadata.annotations.as_ref()?.get(key)?;
        let rate = text.parse::<Quantity>().ok()?.value();
        u64::try_from(rate).ok().filter(|rate| *rate > 0)
    };
    Wish { ports, ingress: rate(INGRESS), egress: rate(EGRESS) }
}

/// The addresses of a Pod, the one of the same family as the node's `first` before the other.
pub fn in_order(mut addresses: Vec<IpAddr>, first: Option<IpAddr>) -> Vec<IpAddr> {
    // Stable, so that without a difference the network's order holds.
    addresses.sort_by_key(|address| first.is_some_and(|first| first.is_ipv4() != address.is_ipv4()));
    addresses
}

/// One attempt of a container: everything but its number, environment, command and args, and the container whose
/// processes it is to see, which are filled in by the caller once the API's inputs are known.
///
/// # Errors
/// What the container's status says instead of starting; see [`TranslateError`].
pub fn container(
    host: &Host,
    pod: &Pod,
    container: &Container,
    image: &Image,
    places: &Places,
) -> Result<ContainerConfig, TranslateError> {
    let empty = PodSpec::default();
    let spec = pod.spec.as_ref().unwrap_or(&empty);
    let reference = pod_ref(pod);
    let security = security(host, spec, container);
    check_user(pod, spec, container, image, &security)?;
    Ok(ContainerConfig {
        name: container.name.clone(),
        attempt: 0,
        image: image.id.clone(),
        image_ref: container.image.clone().unwrap_or_default(),
        command: Vec::new(),
        args: Vec::new(),
        working_dir: container.working_dir.clone().filter(|d| !d.is_empty()),
        env: Vec::new(),
        mounts: mounts(container, places)?,
        stdin: container.stdin == Some(true),
        stdin_once: container.stdin_once == Some(true),
        tty: container.tty == Some(true),
        resources: qos::container_resources(spec, container, host.memory, host.cpu_quota),
        security,
        cgroup_parent: cgroup_parent(host, &reference.uid, spec),
        pid: pid(spec),
        pid_target: None,
        ipc: ipc(spec),
        stop_signal: container.lifecycle.as_ref().and_then(|l| l.stop_signal.clone()),
        annotations: BTreeMap::new(),
        pod: reference,
    })
}

/// The Pod's and the container's security contexts, the container's field winning where both have it.
fn security(host: &Host, spec: &PodSpec, container: &Container) -> Security {
    let none = (PodSecurityContext::default(), SecurityContext::default());
    let of_pod = spec.security_context.as_ref().unwrap_or(&none.0);
    let own = container.security_context.as_ref().unwrap_or(&none.1);
    let capabilities = own.capabilities.clone().unwrap_or_default();
    let mut groups = of_pod.supplemental_groups.clone().unwrap_or_default();
    groups.extend(of_pod.fs_group);
    Security {
        run_as_user: own.run_as_user.or(of_pod.run_as_user),
        run_as_group: own.run_as_group.or(of_pod.run_as_group),
        supplemental_groups: groups,
        privileged: own.privileged == Some(true),
        add_capabilities: capabilities.add.unwrap_or_default(),
        drop_capabilities: capabilities.drop.unwrap_or_default(),
        read_only_rootfs: own.read_only_root_filesystem == Some(true),
        no_new_privileges: own.allow_privilege_escalation == Some(false),
        seccomp: seccomp(host, own.seccomp_profile.as_ref().or(of_pod.seccomp_profile.as_ref())),
        apparmor: apparmor(own.app_armor_profile.as_ref().or(of_pod.app_armor_profile.as_ref())),
        unmasked_proc: own.proc_mount.as_deref() == Some("Unmasked"),
    }
}

/// No profile means none, as on a kubelet without `seccompDefault`.
fn seccomp(host: &Host, profile: Option<&SeccompProfile>) -> Profile {
    match profile {
        Some(profile) if profile.type_ == "RuntimeDefault" => Profile::RuntimeDefault,
        Some(profile) if profile.type_ == "Localhost" => {
            let file = profile.localhost_profile.as_deref().unwrap_or_default();
            Profile::Localhost(host.seccomp_root.join(file).display().to_string())
        }
        _ => Profile::Unconfined,
    }
}

fn apparmor(profile: Option<&AppArmorProfile>) -> Profile {
    match profile {
        Some(profile) if profile.type_ == "Unconfined" => Profile::Unconfined,
        Some(profile) if profile.type_ == "Localhost" => {
            Profile::Localhost(profile.localhost_profile.clone().unwrap_or_default())
        }
        _ => Profile::RuntimeDefault,
    }
}

/// `runAsNonRoot`, as a kubelet verifies it.
fn check_user(
    pod: &Pod,
    spec: &PodSpec,
    container: &Container,
    image: &Image,
    security: &Security,
) -> Result<(), TranslateError> {
    let own = container.security_context.as_ref().and_then(|s| s.run_as_non_root);
    if own.or(spec.security_context.as_ref().and_then(|s| s.run_as_non_root)) != Some(true) {
        return Ok(());
    }
    let reference = pod_ref(pod);
    let pod = format!("{}_{}({})", reference.name, reference.namespace, reference.uid);
    let container = container.name.clone();
    match security.run_as_user {
        Some(0) => return Err(TranslateError::UserIsRoot { pod, container }),
        Some(_) => return Ok(()),
        None => {}
    }
    let user = image.user.split(':').next().unwrap_or_default();
    match user.parse::<i64>() {
        Ok(0) => Err(TranslateError::RunsAsRoot { pod, container }),
        Ok(_) => Ok(()),
        Err(_) if user.is_empty() => Err(TranslateError::RunsAsRoot { pod, container }),
        Err(_) => Err(TranslateError::UnknownUser { user: user.to_owned(), pod, container }),
    }
}

fn mounts(container: &Container, places: &Places) -> Result<Vec<Mount>, TranslateError> {
    let unsupported = |what| TranslateError::Unsupported { container: container.name.clone(), what };
    let mut mounts = Vec::new();
    for (at, wanted) in container.volume_mounts.iter().flatten().enumerate() {
        if wanted.recursive_read_only.as_deref() == Some("Enabled") {
            return Err(unsupported("volumeMounts.recursiveReadOnly"));
        }
        let sub_path = places.parts.get(&at).cloned().unwrap_or_default();
        if let Some(image) = places.images.get(&wanted.name) {
            let (container_path, image) = (absolute(&wanted.mount_path), Some(image.clone()));
            mounts.push(Mount { container_path, image, sub_path, read_only: true, ..Mount::default() });
            continue;
        }
        let (path, volume_is_read_only) = places.volumes.get(&wanted.name).ok_or_else(|| TranslateError::NoVolume {
            volume: wanted.name.clone(),
            container: container.name.clone(),
        })?;
        let propagation = match wanted.mount_propagation.as_deref() {
            Some("HostToContainer") => MountPropagation::HostToContainer,
            Some("Bidirectional") => MountPropagation::Bidirectional,
            _ => MountPropagation::Private,
        };
        let path = match places.sub_paths.get(&at) {
            Some(part) => part,
            None if sub_path.is_empty() && wanted.sub_path.as_deref().is_some_and(|part| !part.is_empty()) => {
                return Err(unsupported("volumeMounts.subPath, which nobody has bound"));
            }
            None => path,
        };
        let read_only = wanted.read_only == Some(true) || *volume_is_read_only;
        mounts.push(Mount { sub_path, ..mount(path, absolute(&wanted.mount_path), read_only, propagation) });
    }
    if container.volume_devices.as_ref().is_some_and(|d| !d.is_empty()) {
        return Err(unsupported("volumeDevices"));
    }
    let taken: Vec<String> = mounts.iter().map(|m| m.container_path.clone()).collect();
    let read_only = container.security_context.as_ref().and_then(|s| s.read_only_root_filesystem) == Some(true);
    for (path, inside) in places.files.iter().filter(|(_, inside)| !taken.contains(inside)) {
        mounts.push(mount(path, inside.clone(), read_only, MountPropagation::Private));
    }
    if let Some(path) = &places.termination_log {
        let inside = container.termination_message_path.clone().unwrap_or_else(|| "/dev/termination-log".to_owned());
        mounts.push(mount(path, absolute(&inside), false, MountPropagation::Private));
    }
    Ok(mounts)
}

fn mount(host_path: &Path, container_path: String, read_only: bool, propagation: MountPropagation) -> Mount {
    Mount { host_path: host_path.to_owned(), container_path, read_only, propagation, ..Mount::default() }
}

/// A relative mount path counts from the root, as a kubelet has it.
fn absolute(path: &str) -> String {
    if path.starts_with('/') { path.to_owned() } else { format!("/{path}") }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn plugins_are_told_of_rates_that_are_quantities() {
        let wish = |ingress: &str, egress: &str| {
            let pod = json!({"metadata": {"annotations": {INGRESS: ingress, EGRESS: egress}}});
            let wish = wish(&serde_json::from_value(pod).unwrap(), Vec::new());
            (wish.ingress, wish.egress)
        };
        assert_eq!(wish("10M", "1500k"), (Some(10_000_000), Some(1_500_000)));
        assert_eq!(wish("fast", "-1"), (None, None));
        assert_eq!(super::wish(&Pod::default(), Vec::new()), Wish::default());
    }

    #[test]
    fn the_address_of_the_nodes_first_family_comes_first() {
        let [four, six]: [IpAddr; 2] = ["10.1.0.2", "fd00::2"].map(|text| text.parse().unwrap());
        assert_eq!(in_order(vec![six, four], Some(four)), [four, six]);
        assert_eq!(in_order(vec![four, six], Some(six)), [six, four]);
        assert_eq!(in_order(vec![six, four], None), [six, four]);
        assert_eq!(in_order(vec![six], Some(four)), [six]);
    }
}
