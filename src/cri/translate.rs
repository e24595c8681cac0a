//! Pure: what a CRI client asks for, as the configs of the runtime seam. What cannot be done is refused, not left out; but for
//! the limits that docs/cri.md names, which kubelets send without being asked to.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;

use lambdalet_proto::cri::v1;
use tonic::{Code, Status};

use super::failure::status;
use crate::network::ports::{HostPort, Protocol};
use crate::runtime::types::{
    CgroupDriver, ContainerConfig, ContainerId, ImageId, MachineFiles, Mount, MountPropagation, NamespaceMode, PodRef,
    Profile, Resources, SandboxConfig, SandboxNetwork, Security,
};

/// Longest host name the kernel takes, less one for its end.
const LONGEST_HOSTNAME: usize = 63;

/// A request that makes no sense.
pub(super) fn invalid(message: impl AsRef<str>) -> Status {
    status(Code::InvalidArgument, message.as_ref())
}

/// A request that makes sense and is beyond this runtime.
fn unsupported(what: &str) -> Status {
    status(Code::Unimplemented, &format!("lambdalet does not support {what}"))
}

// === Sandboxes ===

/// Whose sandbox it is, and which attempt.
pub(super) fn pod(config: &v1::PodSandboxConfig) -> Result<(PodRef, u32), Status> {
    let metadata = config.metadata.as_ref().ok_or_else(|| invalid("the sandbox has no metadata"))?;
    let v1::PodSandboxMetadata { name, uid, namespace, attempt } = metadata;
    for (what, text) in [("name", name), ("uid", uid), ("namespace", namespace)] {
        if text.is_empty() {
            return Err(invalid(format!("the sandbox's metadata has no {what}")));
        }
    }
    Ok((PodRef { uid: uid.clone(), namespace: namespace.clone(), name: name.clone() }, *attempt))
}

/// Where a sandbox finds itself.
#[derive(Clone, Debug)]
pub(super) struct Place<'a> {
    /// Its driver's handler; `None` for the runtime's own.
    pub(super) handler: Option<String>,
    /// Its address; `None` on the host's network.
    pub(super) address: Option<IpAddr>,
    /// The cgroup that sandboxes without one of their own are in, and how the engine names cgroups.
    pub(super) cgroup_root: (&'a str, CgroupDriver),
    /// The host's name.
    pub(super) hostname: &'a str,
    /// Whether the host has SELinux; see [`Surroundings::selinux`].
    pub(super) selinux: bool,
}

/// Whether the sandbox is on the host's network.
///
/// # Errors
/// A mode that networks do not have.
pub(super) fn on_host_network(config: &v1::PodSandboxConfig) -> Result<bool, Status> {
    match namespaces(sandbox_security(config).and_then(|context| context.namespace_options.as_ref())).network() {
        v1::NamespaceMode::Pod => Ok(false),
        v1::NamespaceMode::Node => Ok(true),
        other => Err(invalid(format!("a sandbox's network is POD or NODE, not {}", other.as_str_name()))),
    }
}

/// What the sandbox is made from.
pub(super) fn sandbox(config: &v1::PodSandboxConfig, place: Place<'_>) -> Result<SandboxConfig, Status> {
    let (pod, attempt) = pod(config)?;
    let linux = config.linux.clone().unwrap_or_default();
    let options = namespaces(sandbox_security(config).and_then(|context| context.namespace_options.as_ref()));
    check_users(&options)?;
    let labels = sandbox_security(config).and_then(|context| context.selinux_options.as_ref());
    check_selinux(labels, place.selinux)?;
    Ok(SandboxConfig {
        hostname: hostname(config, &pod, &place),
        handler: place.handler,
        attempt,
        network: place.address.map_or(SandboxNetwork::Host, |address| SandboxNetwork::Pod { address }),
        ipc: ipc(options.ipc())?,
        pid: pid(options.pid())?,
        sysctls: linux.sysctls.clone().into_iter().collect(),
        cgroup_parent: cgroup(config, &pod.uid, place.cgroup_root)?,
        resources: whole(linux.resources.as_ref(), linux.overhead.as_ref())?,
        // CRI has no words for it.
        machine: MachineFiles::default(),
        pod,
    })
}

fn sandbox_security(config: &v1::PodSandboxConfig) -> Option<&v1::LinuxSandboxSecurityContext> {
    config.linux.as_ref()?.security_context.as_ref()
}

fn namespaces(options: Option<&v1::NamespaceOption>) -> v1::NamespaceOption {
    options.cloned().unwrap_or_default()
}

fn check_users(options: &v1::NamespaceOption) -> Result<(), Status> {
    match options.userns_options.as_ref().map(v1::UserNamespace::mode) {
        None | Some(v1::NamespaceMode::Node) => Ok(()),
        Some(_) => Err(unsupported("user namespaces")),
    }
}

fn check_selinux(options: Option<&v1::SeLinuxOption>, selinux: bool) -> Result<(), Status> {
    match options {
        Some(options) if selinux && *options != v1::SeLinuxOption::default() => Err(unsupported("SELinux options")),
        _ => Ok(()),
    }
}

/// The name the client chose; else the host's on its network, else the Pod's.
fn hostname(config: &v1::PodSandboxConfig, pod: &PodRef, place: &Place<'_>) -> String {
    let name = match (config.hostname.as_str(), place.address) {
        ("", None) => place.hostname,
        ("", Some(_)) => &pod.name,
        (chosen, _) => chosen,
    };
    let end = (0..=name.len().min(LONGEST_HOSTNAME)).rev().find(|end| name.is_char_boundary(*end)).unwrap_or(0);
    name[..end].trim_end_matches(['-', '.']).to_owned()
}

/// The cgroup as a path. The client's where it has one: a path, or a slice if the engine names them so.
pub(super) fn cgroup(
    config: &v1::PodSandboxConfig,
    uid: &str,
    (root, driver): (&str, CgroupDriver),
) -> Result<String, Status> {
    let asked = config.linux.as_ref().map_or("", |linux| &linux.cgroup_parent);
    if let Some(slices) = asked.strip_suffix(".slice") {
        if driver != CgroupDriver::Systemd {
            return Err(invalid(format!(
                "cgroup {asked:?} is a name for systemd; this runtime's cgroup driver is cgroupfs, as RuntimeConfig says"
            )));
        }
        // systemd puts a-b.slice into a.slice: the last name says the whole way.
        let name = slices.rsplit('/').next().unwrap_or_default();
        return Ok(format!("/{}", name.replace('-', "/")));
    }
    if !asked.is_empty() {
        return Ok(format!("/{}", asked.trim_matches('/')));
    }
    let plain = |c: char| if c.is_ascii_alphanumeric() || matches!(c, '-' | '_') { c } else { '_' };
    Ok(format!("/{root}/pod{}", uid.chars().map(plain).collect::<String>()))
}

fn ipc(mode: v1::NamespaceMode) -> Result<NamespaceMode, Status> {
    match mode {
        v1::NamespaceMode::Pod => Ok(NamespaceMode::Pod),
        v1::NamespaceMode::Node => Ok(NamespaceMode::Node),
        other => Err(invalid(format!("an IPC namespace is POD or NODE, not {}", other.as_str_name()))),
    }
}

/// A sandbox has no processes to join, so [`v1::NamespaceMode::Target`] is each container's own.
fn pid(mode: v1::NamespaceMode) -> Result<NamespaceMode, Status> {
    Ok(match mode {
        v1::NamespaceMode::Pod => NamespaceMode::Pod,
        v1::NamespaceMode::Container | v1::NamespaceMode::Target => NamespaceMode::Container,
        v1::NamespaceMode::Node => NamespaceMode::Node,
    })
}

/// The ports of the host that are to lead to the sandbox.
pub(super) fn host_ports(config: &v1::PodSandboxConfig) -> Result<Vec<HostPort>, Status> {
    let number = |port: i32| u16::try_from(port).map_err(|_| invalid(format!("{port} is no port")));
    let wanted = config.port_mappings.iter().filter(|mapping| mapping.host_port != 0);
    wanted
        .map(|mapping| {
            let host_ip = match mapping.host_ip.as_str() {
                "" => None,
                text => Some(text.parse().map_err(|_| invalid(format!("{text:?} is no address")))?),
            };
            Ok(HostPort {
                protocol: match mapping.protocol() {
                    v1::Protocol::Tcp => Protocol::Tcp,
                    v1::Protocol::Udp => Protocol::Udp,
                    v1::Protocol::Sctp => Protocol::Sctp,
                },
                host_ip,
                host_port: number(mapping.host_port)?,
                pod_port: number(mapping.container_port)?,
            })
        })
        .collect()
}

// === Containers ===

/// What a container needs to know besides its config.
#[derive(Clone, Debug)]
pub(super) struct Surroundings {
    /// Its Pod.
    pub(super) pod: PodRef,
    /// The sandbox's cgroup.
    pub(super) cgroup_parent: String,
    /// The image, which is present.
    pub(super) image: ImageId,
    /// The image's USER.
    pub(super) image_user: String,
    /// Files that it sees unless its config has others there.
    pub(super) files: Vec<(PathBuf, &'static str)>,
    /// Whether the host has SELinux. Without it labels mean nothing, and are left out as by every runtime.
    pub(super) selinux: bool,
}

/// What the container is made from.
pub(super) fn container(config: &v1::ContainerConfig, around: Surroundings) -> Result<ContainerConfig, Status> {
    let metadata = config.metadata.as_ref().ok_or_else(|| invalid("the container has no metadata"))?;
    if metadata.name.is_empty() {
        return Err(invalid("the container's metadata has no name"));
    }
    check_devices(config)?;
    let linux = config.linux.clone().unwrap_or_default();
    let context = linux.security_context.unwrap_or_default();
    let options = namespaces(context.namespace_options.as_ref());
    check_users(&options)?;
    check_selinux(context.selinux_options.as_ref(), around.selinux)?;
    let target = options.pid() == v1::NamespaceMode::Target;
    let mut mounts = config.mounts.iter().map(mount).collect::<Result<Vec<_>, _>>()?;
    add_files(&mut mounts, around.files);
    let image = config.image.clone().unwrap_or_default();
    Ok(ContainerConfig {
        pod: around.pod,
        name: metadata.name.clone(),
        attempt: metadata.attempt,
        image: around.image,
        image_ref: if image.user_specified_image.is_empty() { image.image } else { image.user_specified_image },
        command: config.command.clone(),
        args: config.args.clone(),
        working_dir: Some(config.working_dir.clone()).filter(|path| !path.is_empty()),
        env: config.envs.iter().map(variable).collect::<Result<_, _>>()?,
        mounts,
        stdin: config.stdin,
        stdin_once: config.stdin_once,
        tty: config.tty,
        resources: linux.resources.as_ref().map(resources).transpose()?.unwrap_or_default(),
        security: security(&context, &around.image_user)?,
        cgroup_parent: around.cgroup_parent,
        pid: pid(options.pid())?,
        pid_target: target.then(|| ContainerId::from(options.target_id.as_str())),
        ipc: ipc(options.ipc())?,
        stop_signal: stop_signal(config.stop_signal()),
        annotations: BTreeMap::new(),
    })
}

fn check_devices(config: &v1::ContainerConfig) -> Result<(), Status> {
    if !config.devices.is_empty() || !config.cdi_devices.is_empty() {
        return Err(unsupported("devices in containers"));
    }
    Ok(())
}

fn variable(pair: &v1::KeyValue) -> Result<(String, String), Status> {
    let value = String::from_utf8(pair.value.clone());
    let value = value.map_err(|_| invalid(format!("the value of variable {:?} is not UTF-8", pair.key)))?;
    Ok((pair.key.clone(), value))
}

fn mount(mount: &v1::Mount) -> Result<Mount, Status> {
    let path = &mount.container_path;
    if mount.image.as_ref().is_some_and(|image| !image.image.is_empty()) {
        return Err(unsupported("images as volumes"));
    }
    if !mount.uid_mappings.is_empty() || !mount.gid_mappings.is_empty() {
        return Err(unsupported("mounts with other users"));
    }
    if mount.recursive_read_only {
        return Err(unsupported("recursive read-only mounts"));
    }
    if mount.host_path.is_empty() || path.is_empty() {
        return Err(invalid(format!(
            "a mount needs a path on the host ({:?}) and in the container ({path:?})",
            mount.host_path
        )));
    }
    Ok(Mount {
        host_path: PathBuf::from(&mount.host_path),
        container_path: if path.starts_with('/') { path.clone() } else { format!("/{path}") },
        read_only: mount.readonly,
        propagation: match mount.propagation() {
            v1::MountPropagation::PropagationPrivate => MountPropagation::Private,
            v1::MountPropagation::PropagationHostToContainer => MountPropagation::HostToContainer,
            v1::MountPropagation::PropagationBidirectional => MountPropagation::Bidirectional,
        },
        ..Mount::default()
    })
}

fn add_files(mounts: &mut Vec<Mount>, files: Vec<(PathBuf, &'static str)>) {
    for (host_path, container_path) in files {
        if !mounts.iter().any(|mount| mount.container_path.trim_end_matches('/') == container_path) {
            mounts.push(Mount { host_path, container_path: container_path.to_owned(), ..Mount::default() });
        }
    }
}

/// Limits. 0 is none; what the cgroup of a container is not held to here is refused where it would hold something back.
pub(super) fn resources(limits: &v1::LinuxContainerResources) -> Result<Resources, Status> {
    if !limits.cpuset_cpus.is_empty() || !limits.cpuset_mems.is_empty() {
        return Err(unsupported("containers bound to certain CPUs or memory nodes"));
    }
    let set = |value: i64| (value != 0).then_some(value);
    Ok(Resources {
        cpu_shares: set(limits.cpu_shares),
        cpu_quota: set(limits.cpu_quota),
        cpu_period: set(limits.cpu_period),
        memory_limit: set(limits.memory_limit_in_bytes),
        oom_score_adj: Some(limits.oom_score_adj),
        pids_limit: None,
    })
}

/// Limits of a sandbox: those of its containers together, and what it needs besides added to those there are. A kubelet has
/// given its cgroup the same.
pub(super) fn whole(
    containers: Option<&v1::LinuxContainerResources>,
    overhead: Option<&v1::LinuxContainerResources>,
) -> Result<Resources, Status> {
    let limits = containers.map(resources).transpose()?.unwrap_or_default();
    let Some(overhead) = overhead else { return Ok(limits) };
    let with = |limit: Option<i64>, more: i64| match limit {
        Some(limit) if limit > 0 => Some(limit.saturating_add(more.max(0))),
        other => other,
    };
    // In the period of the other.
    let quota = match limits.cpu_period {
        Some(period) if overhead.cpu_period > 0 => overhead.cpu_quota.saturating_mul(period) / overhead.cpu_period,
        _ => overhead.cpu_quota,
    };
    Ok(Resources {
        cpu_shares: with(limits.cpu_shares, overhead.cpu_shares),
        cpu_quota: with(limits.cpu_quota, quota),
        memory_limit: with(limits.memory_limit, overhead.memory_limit_in_bytes),
        ..limits
    })
}

fn security(context: &v1::LinuxContainerSecurityContext, image_user: &str) -> Result<Security, Status> {
    let user = context.run_as_user.as_ref().map(|user| user.value);
    let group = context.run_as_group.as_ref().map(|group| group.value);
    let named = context.run_as_username.as_str();
    // A kubelet repeats the image's user here, which runs it anyway.
    if user.is_none() && !named.is_empty() && Some(named) != image_user.split(':').next() {
        return Err(unsupported(&format!("running as user {named:?}, who is not the image's; a number is fine")));
    }
    if context.supplemental_groups_policy() == v1::SupplementalGroupsPolicy::Strict {
        return Err(unsupported("supplementalGroupsPolicy Strict"));
    }
    let capabilities = context.capabilities.clone().unwrap_or_default();
    if !capabilities.add_ambient_capabilities.is_empty() {
        return Err(unsupported("ambient capabilities"));
    }
    Ok(Security {
        run_as_user: user,
        run_as_group: group,
        supplemental_groups: context.supplemental_groups.clone(),
        privileged: context.privileged,
        add_capabilities: capabilities.add_capabilities,
        drop_capabilities: capabilities.drop_capabilities,
        read_only_rootfs: context.readonly_rootfs,
        no_new_privileges: context.no_new_privs,
        seccomp: seccomp(context)?,
        apparmor: apparmor(context)?,
        // An empty list of masked paths may mean none or the usual ones: the wire does not tell. The usual ones are safe,
        // and those who may ask for none (procMount: Unmasked) need user namespaces.
        unmasked_proc: false,
    })
}

#[allow(deprecated)]
fn seccomp(context: &v1::LinuxContainerSecurityContext) -> Result<Profile, Status> {
    match (&context.seccomp, context.seccomp_profile_path.as_str()) {
        (Some(profile), _) => named_profile(profile),
        (None, "" | "runtime/default" | "docker/default") => Ok(Profile::RuntimeDefault),
        (None, "unconfined") => Ok(Profile::Unconfined),
        (None, path) => Ok(Profile::Localhost(path.strip_prefix("localhost/").unwrap_or(path).to_owned())),
    }
}

#[allow(deprecated)]
fn apparmor(context: &v1::LinuxContainerSecurityContext) -> Result<Profile, Status> {
    match (&context.apparmor, context.apparmor_profile.as_str()) {
        (Some(profile), _) => named_profile(profile),
        (None, "" | "runtime/default") => Ok(Profile::RuntimeDefault),
        (None, "unconfined") => Ok(Profile::Unconfined),
        (None, name) => Ok(Profile::Localhost(name.strip_prefix("localhost/").unwrap_or(name).to_owned())),
    }
}

fn named_profile(profile: &v1::SecurityProfile) -> Result<Profile, Status> {
    use v1::security_profile::ProfileType;
    match (profile.profile_type(), profile.localhost_ref.as_str()) {
        (ProfileType::RuntimeDefault, _) => Ok(Profile::RuntimeDefault),
        (ProfileType::Unconfined, _) => Ok(Profile::Unconfined),
        (ProfileType::Localhost, "") => Err(invalid("a profile of the node has no name")),
        (ProfileType::Localhost, name) => {
            Ok(Profile::Localhost(name.strip_prefix("localhost/").unwrap_or(name).to_owned()))
        }
    }
}

/// The signal as engines write it (`SIGRTMIN+3`); `None` is the image's.
fn stop_signal(signal: v1::Signal) -> Option<String> {
    match signal {
        v1::Signal::RuntimeDefault => None,
        signal => Some(signal.as_str_name().replace("PLUS", "+").replace("MINUS", "-")),
    }
}

#[cfg(test)]
mod tests;
