//! What a node has on the host, counted: the same before and after, or something was forgotten.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use super::node::{Node, mounts_below, output};
use super::wait::{SOON, poll};

/// Everything of one node on the host, by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Leaks {
    /// Containers of Docker or containerd, sandboxes included.
    pub(crate) containers: Vec<String>,
    /// Docker networks.
    pub(crate) networks: Vec<String>,
    /// Ports of its bridge.
    pub(crate) links: Vec<String>,
    /// What guests may send: rules of single taps.
    pub(crate) guards: Vec<String>,
    /// Routes to Pods.
    pub(crate) routes: Vec<String>,
    /// Addresses that a Pod holds; those that only cool down are free in due time.
    pub(crate) addresses: Vec<String>,
    /// Mount points below its root directory.
    pub(crate) mounts: Vec<String>,
    /// Directories of Pods.
    pub(crate) directories: Vec<String>,
    /// cgroups of Pods.
    pub(crate) cgroups: Vec<String>,
    /// Network namespaces with one of its addresses.
    pub(crate) namespaces: Vec<String>,
    /// Directories of microVMs.
    pub(crate) machines: Vec<String>,
    /// Processes of VMMs.
    pub(crate) vmms: Vec<String>,
}

impl Leaks {
    /// Waits until the node has given everything back, so that there is again what there was.
    pub(crate) async fn again(&self, node: &Node) {
        poll("back to what was there before", SOON, async || {
            let now = Self::of(node);
            if now == *self { Ok(()) } else { Err(format!("{now:#?}\nand it was {self:#?}")) }
        })
        .await;
    }

    /// What there is of the node now.
    pub(crate) fn of(node: &Node) -> Self {
        let Some(owner) = node.owner() else { return Self::default() };
        let label = format!("label=lambdalet.dev/owner={owner}");
        let in_docker = lines(&output("docker", &["ps", "-a", "--filter", &label, "--format", "{{.Names}}"]));
        let in_containerd = node.containerd().map(|containerd| containerd.containers(&owner)).unwrap_or_default();
        Self {
            containers: [in_docker, in_containerd].concat(),
            networks: lines(&output("docker", &["network", "ls", "--filter", &label, "--format", "{{.Name}}"])),
            links: ports(&node.bridge().unwrap()),
            guards: guards(&node.bridge().unwrap()),
            routes: lines(&output("ip", &["route", "show", "dev", &node.bridge().unwrap()])),
            addresses: [held(&node.root.join("addresses")), held(&node.root.join("addresses6"))].concat(),
            mounts: mounts_below(&node.root),
            directories: ["pods", "secrets", "cri-logs"]
                .iter()
                .flat_map(|place| entries(&node.root.join(place)))
                .collect(),
            cgroups: pod_cgroups(&owner),
            namespaces: namespaces(node),
            machines: [entries(&node.root.join("microvm/vms/default")), entries(&node.root.join("microvm/sandboxes"))]
                .concat(),
            vmms: vmms(node, "").iter().map(ToString::to_string).collect(),
        }
    }
}

fn lines(text: &str) -> Vec<String> {
    let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
    lines.sort();
    lines
}

fn ports(bridge: &str) -> Vec<String> {
    let listed = output("ip", &["-o", "link", "show", "master", bridge]);
    lines(&listed).iter().filter_map(|line| line.split(": ").nth(1)).map(str::to_owned).collect()
}

/// A node without microVMs has no such table, and a host without them no such program.
fn guards(bridge: &str) -> Vec<String> {
    let listed = Command::new("nft").args(["list", "table", "bridge", &format!("lambdalet_{bridge}")]).output();
    let listed = listed.map(|listed| String::from_utf8_lossy(&listed.stdout).into_owned()).unwrap_or_default();
    let is_tap =
        |word: &&str| word.strip_prefix("lt").is_some_and(|id| id.len() == 12 && u64::from_str_radix(id, 16).is_ok());
    let words = listed.split(|letter: char| !letter.is_ascii_alphanumeric());
    words.filter(is_tap).map(str::to_owned).collect::<BTreeSet<_>>().into_iter().collect()
}

fn held(directory: &Path) -> Vec<String> {
    let is_held = |name: &String| {
        let record = std::fs::read_to_string(directory.join(name)).unwrap_or_default();
        !record.contains("\"released\"")
    };
    entries(directory).into_iter().filter(is_held).collect()
}

/// Names in a directory; none if it does not exist.
fn entries(directory: &Path) -> Vec<String> {
    let Ok(listed) = std::fs::read_dir(directory) else { return Vec::new() };
    let mut names: Vec<String> = listed.flatten().map(|e| e.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// Processes of every VMM that the node has started and that runs, for a sandbox or for a template.
pub(crate) fn all_vmms(node: &Node) -> Vec<i32> {
    let vms = node.root.join("microvm/vms");
    let below = entries(&vms).into_iter().flat_map(|group| {
        let group = vms.join(group);
        entries(&group).into_iter().map(move |id| group.join(id))
    });
    below.filter_map(|directory| vmm_in(&directory)).collect()
}

/// The VMM whose machine has that directory, if it runs.
fn vmm_in(directory: &Path) -> Option<i32> {
    let text = std::fs::read_to_string(directory.join("machine.json")).ok()?;
    let record: serde_json::Value = serde_json::from_str(&text).ok()?;
    let pid = i32::try_from(record["pid"].as_i64()?).ok()?;
    Path::new(&format!("/proc/{pid}")).exists().then_some(pid)
}

/// Processes of the VMMs that run sandboxes of the node: of those that this word occurs in the record of, such as a
/// namespace or a UID.
pub(crate) fn vmms(node: &Node, word: &str) -> Vec<i32> {
    let (vms, sandboxes) = (node.root.join("microvm/vms/default"), node.root.join("microvm/sandboxes"));
    let is_meant = |id: &String| {
        let record = std::fs::read_to_string(sandboxes.join(id).join("sandbox.json")).unwrap_or_default();
        record.contains(word)
    };
    entries(&vms).into_iter().filter(is_meant).filter_map(|id| vmm_in(&vms.join(id))).collect()
}

/// Directories named `pod...` below the owner's, in every hierarchy.
fn pod_cgroups(owner: &str) -> Vec<String> {
    let pattern = format!("*lambdalet-{owner}*/pod*");
    let text = output("find", &["/sys/fs/cgroup", "-type", "d", "-path", &pattern, "-prune"]);
    lines(&text)
}

/// Docker's network namespaces, and containerd's, in which an address of the node's range lives. The host's own is `default`
/// to Docker.
fn namespaces(node: &Node) -> Vec<String> {
    let lives_here = |path: &String| {
        let addresses = output("nsenter", &[&format!("--net={path}"), "ip", "-o", "-4", "address"]);
        addresses.split_whitespace().any(|word| node.has_address(word))
    };
    let all = ["/var/run/docker/netns", "/var/run/netns"].into_iter().flat_map(|directory| {
        let directory = Path::new(directory);
        entries(directory)
            .into_iter()
            .filter(|name| name != "default")
            .map(move |name| directory.join(name).to_string_lossy().into_owned())
    });
    all.filter(lives_here).collect()
}

/// What is left on the host of Pods that should be gone, each a line; Pods are known by UID and namespace.
pub(crate) fn remains(node: &Node, namespace: &str, uids: &[String]) -> Vec<String> {
    let mut found = Vec::new();
    let label = format!("label=lambdalet.dev/pod-namespace={namespace}");
    let names = output("docker", &["ps", "-a", "--filter", &label, "--format", "container {{.Names}} ({{.Status}})"]);
    found.extend(lines(&names));
    let Some(owner) = node.owner() else { return found };
    let is_ours = |name: &String| uids.iter().any(|uid| name.contains(uid.as_str()));
    for place in ["pods", "secrets"] {
        let names = entries(&node.root.join(place));
        found.extend(names.into_iter().filter(is_ours).map(|name| format!("directory {place}/{name}")));
    }
    let sandboxes = node.root.join("microvm/sandboxes");
    for sandbox in entries(&sandboxes) {
        let record = std::fs::read_to_string(sandboxes.join(&sandbox).join("sandbox.json")).unwrap_or_default();
        if is_ours(&record) {
            found.push(format!("microVM {sandbox}"));
        }
    }
    found.extend(mounts_below(&node.root).into_iter().filter(is_ours).map(|point| format!("mount {point}")));
    found.extend(pod_cgroups(&owner).into_iter().filter(is_ours).map(|path| format!("cgroup {path}")));
    let addresses = node.root.join("addresses");
    for address in held(&addresses) {
        let record = std::fs::read_to_string(addresses.join(&address)).unwrap_or_default();
        if is_ours(&record) {
            found.push(format!("address {address}: {record}"));
        }
    }
    found
}
