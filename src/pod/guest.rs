//! What a Pod asks for that a microVM cannot give it: it is refused for it when it comes, and not half run.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use k8s_openapi::api::core::v1::{Container, EnvVar, Pod, PodSpec, Volume};

use crate::function::labels;
use crate::network::egress;
use crate::runtime::microvm::machine::AssetDirs;
use crate::runtime::microvm::machine::arguments::{MachineWish, VmType};
use crate::runtime::types::MachineFiles;
use crate::telemetry::chain;

/// What guests of this node can be given.
#[derive(Clone, Debug, Default)]
pub struct Bounds {
    /// Host paths beneath these may be copied into guests (`--microvm-host-paths`).
    pub host_paths: Vec<PathBuf>,
    /// Images that one guest has room for.
    pub images: usize,
    /// Where the files lie that a Pod may name for its machine (`--vm-asset-dirs`).
    pub assets: AssetDirs,
}

/// What says of any Pod's machine what it is to be.
const OF_MACHINE: [&str; 5] = ["KERNEL_IMAGE_PATH", "INITRD_PATH", "KERNEL_ARGS", "VM_TYPE", "GPU_MEM"];
/// What says more of a function's. To the containers of any other Pod these may mean what they will.
const OF_FUNCTION: [&str; 3] = ["INET_DEV", "IMAGE_STORAGE", "NAMESERVER"];

/// Those variables of the Pod's (first, or default) container that have one of `names`.
fn variables<'a>(pod: &'a Pod, names: &'a [&'a str]) -> impl Iterator<Item = &'a EnvVar> {
    let all = labels::container(pod).into_iter().flat_map(|container| container.env.iter().flatten());
    all.filter(move |variable| names.contains(&variable.name.as_str()))
}

/// What these variables say of the machine, by the names that the function server this follows has for them. One with a
/// `valueFrom` says nothing: it is read when the machine runs already.
///
/// # Errors
/// What no machine of this node can have, in words that begin with the variable.
fn wish(pod: &Pod, names: &[&str]) -> Result<MachineWish, String> {
    let plain = variables(pod, names).filter(|variable| variable.value_from.is_none());
    let values = plain.map(|variable| (variable.name.clone(), variable.value.clone().unwrap_or_default()));
    MachineWish::read(&values.collect::<BTreeMap<_, _>>()).map_err(|error| chain(&error))
}

/// The files and arguments that the machine of the Pod is to be started with.
///
/// # Errors
/// As [`refusal`] has them for its variables.
pub fn files(pod: &Pod) -> Result<MachineFiles, String> {
    let wish = wish(pod, &OF_MACHINE)?;
    if wish.vm_type != VmType::Linux {
        return Err("VM_TYPE \"osv\" is not possible: the containers of a Pod need Linux".to_owned());
    }
    Ok(MachineFiles {
        kernel: wish.kernel,
        initramfs: wish.initrd,
        kernel_args: wish.kernel_args.filter(|text| !text.trim().is_empty()).into_iter().collect(),
    })
}

/// Why a function that comes now cannot be a microVM as its variables have it, if so, as the end of a sentence about it.
/// Looks at the interface it names. It is asked once: a function that is here already goes on as it did, whatever became
/// of the host's routes or of this program since.
pub fn refusal_of_new(pod: &Pod, spec: &PodSpec) -> Option<String> {
    if !labels::is_function(pod) {
        return None;
    }
    of_sources(pod).or_else(|| of_surroundings(pod, spec)).map(|why| of_environment(&why))
}

fn of_environment(why: &str) -> String {
    format!("its environment says of the machine: {why}")
}

fn of_sources(pod: &Pod) -> Option<String> {
    let mut read = variables(pod, &OF_MACHINE).chain(variables(pod, &OF_FUNCTION));
    let name = &read.find(|variable| variable.value_from.is_some())?.name;
    Some(format!("{name} has a valueFrom, which is read when the machine runs already: give it a value"))
}

/// What else a function's variables ask for: this node has no means of its own to do it, so it has to be so already.
fn of_surroundings(pod: &Pod, spec: &PodSpec) -> Option<String> {
    let wish = match wish(pod, &OF_FUNCTION) {
        Ok(wish) => wish,
        Err(why) => return Some(why),
    };
    if let Some(storage) = wish.image_storage {
        return Some(format!(
            "IMAGE_STORAGE={storage:?} is not possible: images lie in the node's own store: leave it out"
        ));
    }
    if let Some(wanted) = wish.inet_dev {
        // A route that is missing now may be back when the function calls somebody.
        let uplink = egress::interface().ok().flatten();
        if let Some(why) = uplink.and_then(|uplink| of_interface(&wanted, &uplink)) {
            return Some(why);
        }
    }
    let asked = wish.name_server?;
    let named = spec.dns_config.iter().flat_map(|dns| dns.nameservers.iter().flatten());
    let is_named = named.filter_map(|name| name.parse().ok()).any(|address: IpAddr| address == asked);
    (!is_named).then(|| {
        format!(
            "NAMESERVER={asked} is not what its resolv.conf says: name it in dnsConfig.nameservers, or leave it out"
        )
    })
}

fn of_interface(wanted: &str, uplink: &str) -> Option<String> {
    (wanted != uplink)
        .then(|| format!("INET_DEV={wanted:?} is not possible: traffic of this node leaves by {uplink}: leave it out"))
}

/// Why the machine cannot be what the Pod's variables say, if so. Looks at the files that they name.
fn of_variables(pod: &Pod, assets: &AssetDirs) -> Option<String> {
    let files = match files(pod) {
        Ok(files) => files,
        Err(why) => return Some(of_environment(&why)),
    };
    let named = [("KERNEL_IMAGE_PATH", &files.kernel), ("INITRD_PATH", &files.initramfs)];
    named.into_iter().find_map(|(variable, path)| {
        let error = assets.open(path.as_ref()?).err()?;
        Some(format!("its {variable} is not to be had: {}", chain(&error)))
    })
}

/// Why the Pod cannot be a microVM, if so, as the end of a sentence about it. Looks at the files it names for its machine,
/// and else at nothing but the Pod.
pub fn refusal(pod: &Pod, spec: &PodSpec, bounds: &Bounds) -> Option<String> {
    of_spec(spec, bounds).or_else(|| of_variables(pod, &bounds.assets))
}

fn of_spec(spec: &PodSpec, bounds: &Bounds) -> Option<String> {
    shared_with_host(spec).or_else(|| images(spec, bounds.images)).or_else(|| {
        let containers = spec.init_containers.iter().flatten().chain(&spec.containers);
        containers.into_iter().find_map(|container| of_container(spec, container, bounds))
    })
}

fn shared_with_host(spec: &PodSpec) -> Option<String> {
    let fields = [(spec.host_network, "hostNetwork"), (spec.host_pid, "hostPID"), (spec.host_ipc, "hostIPC")];
    let (_, field) = fields.into_iter().find(|(set, _)| *set == Some(true))?;
    Some(format!(
        "a microVM has a kernel of its own and no part in the host's namespaces: it cannot have {field}: true"
    ))
}

fn images(spec: &PodSpec, most: usize) -> Option<String> {
    let containers = spec.init_containers.iter().flatten().chain(&spec.containers);
    let shown = spec.volumes.iter().flatten().filter_map(|volume| volume.image.as_ref()?.reference.as_deref());
    let images: BTreeSet<_> = containers.filter_map(|container| container.image.as_deref()).chain(shown).collect();
    let count = images.len();
    (count > most)
        .then(|| format!("its containers and volumes have {count} different images: a microVM has room for {most}"))
}

fn of_container(spec: &PodSpec, container: &Container, bounds: &Bounds) -> Option<String> {
    let name = &container.name;
    let own = container.security_context.as_ref();
    let of_pod = spec.security_context.as_ref();
    let seccomp = own.and_then(|s| s.seccomp_profile.as_ref()).or(of_pod.and_then(|s| s.seccomp_profile.as_ref()));
    if seccomp.is_some_and(|profile| profile.type_ == "Localhost") {
        return Some(format!(
            "container {name:?} asks for a seccomp profile of the host (type Localhost), which a microVM does not have: use \
             RuntimeDefault"
        ));
    }
    let apparmor = own.and_then(|s| s.app_armor_profile.as_ref()).or(of_pod.and_then(|s| s.app_armor_profile.as_ref()));
    if apparmor.is_some_and(|profile| profile.type_ == "Localhost") {
        return Some(format!(
            "container {name:?} asks for an AppArmor profile of the host (type Localhost), and a guest's kernel has none"
        ));
    }
    if container.volume_devices.as_ref().is_some_and(|devices| !devices.is_empty()) {
        return Some(format!(
            "container {name:?} asks for block devices (volumeDevices), which a microVM is not given"
        ));
    }
    container.volume_mounts.iter().flatten().find_map(|mount| {
        let at = &mount.mount_path;
        if mount.mount_propagation.as_deref().is_some_and(|how| how != "None") {
            return Some(format!(
                "container {name:?} asks for mountPropagation at {at}: mounts do not travel between the host and a microVM"
            ));
        }
        let volume = spec.volumes.iter().flatten().find(|volume| volume.name == mount.name)?;
        of_host(volume, mount.read_only == Some(true), bounds)
    })
}

/// A directory of the host is copied into a guest, and only from where the operator said so.
fn of_host(volume: &Volume, read_only: bool, bounds: &Bounds) -> Option<String> {
    let (name, source) = (&volume.name, volume.host_path.as_ref()?);
    let path = Path::new(&source.path);
    if !bounds.host_paths.iter().any(|allowed| path.starts_with(allowed)) {
        return Some(format!(
            "volume {name:?} is hostPath {}, and a microVM sees nothing of the host: the node's operator can have \
             directories copied into guests (--microvm-host-paths DIR)",
            source.path
        ));
    }
    (!read_only).then(|| {
        format!(
            "volume {name:?} is hostPath {}, of which a microVM gets a copy: mount it with readOnly: true",
            source.path
        )
    })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn refused(spec: Value) -> Option<String> {
        let bounds = Bounds { host_paths: vec!["/srv/data".into()], images: 2, ..Bounds::default() };
        let pod: Pod = serde_json::from_value(json!({"spec": spec})).unwrap();
        refusal(&pod, pod.spec.as_ref().unwrap(), &bounds)
    }

    #[test]
    fn a_machine_of_ones_own_files_is_had_only_where_the_operator_keeps_them() {
        let place = tempfile::tempdir().unwrap();
        let kernel = place.path().join("vmlinux");
        std::fs::write(&kernel, "a kernel").unwrap();
        let told = |variables: Value| -> Pod {
            serde_json::from_value(json!({"spec": {"containers": [container(json!({"env": variables}))]}})).unwrap()
        };
        let env = |name: &str, value: &str| told(json!([{"name": name, "value": value}]));
        let assets = AssetDirs::new(vec![place.path().to_owned()]);
        let allowed = Bounds { images: 8, assets, ..Bounds::default() };
        let refused = |pod: &Pod, bounds: &Bounds| refusal(pod, pod.spec.as_ref().unwrap(), bounds);
        let own = env("KERNEL_IMAGE_PATH", kernel.to_str().unwrap());
        assert_eq!(refused(&own, &allowed), None);
        assert_eq!(files(&own).unwrap().kernel, Some(kernel));
        let nowhere = refused(&own, &Bounds { images: 8, ..Bounds::default() }).unwrap();
        assert!(nowhere.contains("KERNEL_IMAGE_PATH") && nowhere.contains("--vm-asset-dirs"), "{nowhere}");
        for (name, value, why) in [
            ("KERNEL_IMAGE_PATH", "/etc/passwd", "does not lie beneath"),
            ("INITRD_PATH", "../initrd", "absolute"),
            ("VM_TYPE", "osv", "need Linux"),
            ("GPU_MEM", "256", "GPU"),
        ] {
            let told = refused(&env(name, value), &allowed);
            assert!(told.as_ref().is_some_and(|told| told.contains(why)), "{name}: {told:?}");
        }
        let args = files(&env("KERNEL_ARGS", "quiet loglevel=3")).unwrap();
        assert_eq!(args.kernel_args, ["quiet loglevel=3"]);
        assert_eq!(files(&told(json!([]))), Ok(MachineFiles::default()));
    }

    #[test]
    fn each_variable_of_a_function_is_honoured_or_refused_by_its_name() {
        let of = |function: bool, env: Value, dns: Value| -> Pod {
            let labels = if function { json!({"com.openfaas.scale.min": "0"}) } else { json!({}) };
            let spec = json!({"containers": [container(json!({"env": env}))], "dnsConfig": dns});
            serde_json::from_value(json!({"metadata": {"labels": labels}, "spec": spec})).unwrap()
        };
        let bounds = Bounds { images: 8, ..Bounds::default() };
        let spec = |pod: &Pod| pod.spec.clone().unwrap();
        let refused = |pod: &Pod| refusal(pod, &spec(pod), &bounds).or_else(|| refusal_of_new(pod, &spec(pod)));
        let long = "x".repeat(1537);
        let uplink = egress::interface().unwrap();
        for (name, value, why) in [
            ("INET_DEV", "no-such-interface", uplink.is_some().then_some("leave it out")),
            ("INET_DEV", "", None),
            ("IMAGE_STORAGE", "/srv/images", Some("the node's own store: leave it out")),
            ("IMAGE_STORAGE", "", None),
            ("NAMESERVER", "10.9.8.7", Some("dnsConfig.nameservers")),
            ("NAMESERVER", "1.1.1.1", None),
            ("NAMESERVER", "resolver", Some("must be an IP address")),
            ("NAMESERVER", "", None),
            ("KERNEL_ARGS", &long, Some("has 1537 bytes")),
            ("KERNEL_ARGS", &long[1..], None),
            ("VM_TYPE", "linux", None),
            ("GPU_MEM", "1", Some("GPU")),
            ("OTHER", "10.9.8.7", None),
        ] {
            let told = refused(&of(true, json!([{"name": name, "value": value}]), json!({"nameservers": ["1.1.1.1"]})));
            let is_told = |told: &String| why.is_some_and(|why| told.contains(name) && told.contains(why));
            assert!(told.as_ref().map_or(why.is_none(), is_told), "{name}={value}: {told:?}");
        }
        if let Some(uplink) = uplink {
            assert_eq!(refused(&of(true, json!([{"name": "INET_DEV", "value": uplink}]), json!({}))), None);
        }
        for name in OF_MACHINE.into_iter().chain(OF_FUNCTION) {
            let from = json!([{"name": name, "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}]);
            let told = refused(&of(true, from.clone(), json!({}))).unwrap();
            assert!(told.contains(name) && told.contains("give it a value"), "{told}");
            assert_eq!(refused(&of(false, from, json!({}))), None, "{name}: such a Pod may mean anything by it");
        }
        let others = json!([{"name": "NAMESERVER", "value": "ns1.example"}, {"name": "INET_DEV", "value": "wlan0"}]);
        assert_eq!(refused(&of(false, others, json!({}))), None, "such a Pod may mean anything by it");
        assert_eq!(of_interface("eth0", "eth0"), None);
        assert!(of_interface("eth0", "eth1").unwrap().contains("leaves by eth1"));
    }

    #[test]
    fn a_function_that_is_here_already_is_not_asked_for_its_surroundings() {
        let from = json!({"fieldRef": {"fieldPath": "metadata.name"}});
        for variable in [
            json!({"name": "IMAGE_STORAGE", "value": "/srv/images"}),
            json!({"name": "INET_DEV", "value": "no-such-interface"}),
            json!({"name": "NAMESERVER", "value": "resolver"}),
            json!({"name": "NAMESERVER", "value": "10.9.8.7"}),
            json!({"name": "VM_TYPE", "valueFrom": from}),
        ] {
            let spec = json!({"containers": [container(json!({"env": [variable]}))]});
            let pod = json!({"metadata": {"labels": {"com.openfaas.scale.min": "0"}}, "spec": spec});
            let pod: Pod = serde_json::from_value(pod).unwrap();
            let bounds = Bounds { images: 8, ..Bounds::default() };
            assert_eq!(refusal(&pod, pod.spec.as_ref().unwrap(), &bounds), None, "{spec}");
            assert_eq!(files(&pod), Ok(MachineFiles::default()), "{spec}");
        }
    }

    fn container(more: Value) -> Value {
        let mut container = json!({"name": "c", "image": "i"});
        container.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        container
    }

    #[test]
    fn what_a_guest_can_have_is_not_refused() {
        for spec in [
            json!({"containers": [container(json!({}))]}),
            json!({"containers": [container(json!({"securityContext": {"privileged": true}}))]}),
            json!({
                "shareProcessNamespace": true, "initContainers": [container(json!({"image": "j"}))],
                "containers": [container(json!({"volumeMounts": [
                    {"name": "v", "mountPath": "/v", "readOnly": true, "mountPropagation": "None"},
                    {"name": "m", "mountPath": "/m"}, {"name": "m", "mountPath": "/n", "subPath": "x"},
                    {"name": "i", "mountPath": "/i"},
                ]}))],
                "volumes": [
                    {"name": "v", "hostPath": {"path": "/srv/data/x"}},
                    {"name": "m", "configMap": {"name": "m"}}, {"name": "i", "image": {"reference": "j"}},
                    {"name": "unused", "hostPath": {"path": "/"}},
                ],
            }),
        ] {
            assert_eq!(refused(spec.clone()), None, "{spec}");
        }
    }

    #[test]
    fn what_it_cannot_have_is_named() {
        let mounting = |path: &str, mount: Value| {
            let mut all = json!({"name": "v", "mountPath": "/v"});
            all.as_object_mut().unwrap().extend(mount.as_object().unwrap().clone());
            let volumes = json!([{"name": "v", "hostPath": {"path": path}}]);
            json!({"containers": [container(json!({"volumeMounts": [all]}))], "volumes": volumes})
        };
        let images: Vec<_> = ["1", "2", "3"].iter().map(|image| container(json!({"image": image}))).collect();
        for (spec, named) in [
            (json!({"containers": [], "hostNetwork": true}), "hostNetwork: true"),
            (json!({"containers": [], "hostPID": true}), "hostPID: true"),
            (json!({"containers": [], "hostIPC": true}), "hostIPC: true"),
            (json!({"containers": images}), "3 different images"),
            (mounting("/srv/database", json!({"readOnly": true})), "--microvm-host-paths"),
            (mounting("/", json!({"readOnly": true})), "--microvm-host-paths"),
            (mounting("/srv/data", json!({})), "readOnly: true"),
            (
                json!({
                    "containers": [container(json!({"image": "1"})), container(json!({"image": "2"}))],
                    "volumes": [{"name": "v", "image": {"reference": "3"}}],
                }),
                "3 different images",
            ),
            (mounting("/srv/data", json!({"mountPropagation": "HostToContainer"})), "mountPropagation"),
            (
                json!({"containers": [container(json!({
                    "securityContext": {"seccompProfile": {"type": "Localhost", "localhostProfile": "p"}},
                }))]}),
                "seccomp profile of the host",
            ),
            (
                json!({
                    "securityContext": {"appArmorProfile": {"type": "Localhost"}},
                    "containers": [container(json!({}))],
                }),
                "AppArmor",
            ),
            (
                json!({"containers": [container(json!({"volumeDevices": [{"name": "d", "devicePath": "/dev/x"}]}))]}),
                "volumeDevices",
            ),
        ] {
            let why = refused(spec.clone());
            assert!(why.as_ref().is_some_and(|why| why.contains(named)), "{spec}: {why:?}");
        }
    }
}
