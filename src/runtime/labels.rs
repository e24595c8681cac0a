//! What is written on each object of an engine, so that a restart finds everything again by listing.
//!
//! Only facts of ours are written, never the Pod's own labels: other programs on the host reap Docker containers by
//! labels of theirs, and a Pod may carry those.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;

use crate::runtime::types::{ContainerConfig, PodRef, SandboxConfig, SandboxId, SandboxNetwork};

/// Whose object it is; every list and event subscription filters by it.
pub(super) const OWNER: &str = "lambdalet.dev/owner";
/// `sandbox` or `container`.
pub(super) const KIND: &str = "lambdalet.dev/kind";
/// The Pod's UID.
pub(super) const POD_UID: &str = "lambdalet.dev/pod-uid";
/// On a container: the id of its sandbox.
pub(super) const SANDBOX: &str = "lambdalet.dev/sandbox";
/// The cgroup everything of the sandbox lives below, as the caller wrote it.
pub(super) const CGROUP: &str = "lambdalet.dev/cgroup";

/// Value of [`KIND`] on the container that holds a sandbox.
pub(super) const KIND_SANDBOX: &str = "sandbox";
/// Value of [`KIND`] on the others.
pub(super) const KIND_CONTAINER: &str = "container";

const POD_NAMESPACE: &str = "lambdalet.dev/pod-namespace";
const POD_NAME: &str = "lambdalet.dev/pod-name";
pub(super) const CONTAINER: &str = "lambdalet.dev/container";
pub(super) const ATTEMPT: &str = "lambdalet.dev/attempt";
/// Its addresses, on a sandbox that this node gives some.
pub(crate) const ADDRESS: &str = "lambdalet.dev/address";
/// On a sandbox: who makes its network, if it is not this node.
const NETWORK: &str = "lambdalet.dev/network";
/// Value of [`NETWORK`]: CNI plugins.
const PLUGINS: &str = "cni";
const IMAGE_REF: &str = "lambdalet.dev/image-ref";
pub(super) const ANNOTATION_PREFIX: &str = "annotation.lambdalet.dev/";

/// The labels of a sandbox.
pub(super) fn of_sandbox(owner: &str, config: &SandboxConfig) -> HashMap<String, String> {
    let mut labels = common(owner, KIND_SANDBOX, &config.pod, config.attempt, &config.cgroup_parent);
    match &config.network {
        SandboxNetwork::Plugins { .. } => drop(labels.insert(NETWORK.into(), PLUGINS.into())),
        SandboxNetwork::Host => {}
        SandboxNetwork::Pod { .. } | SandboxNetwork::Dual { .. } => {
            let addresses: Vec<String> = config.network.addresses().iter().map(IpAddr::to_string).collect();
            labels.insert(ADDRESS.into(), addresses.join(","));
        }
    }
    labels
}

/// The labels of a container.
pub(super) fn of_container(owner: &str, sandbox: &SandboxId, config: &ContainerConfig) -> HashMap<String, String> {
    let mut labels = common(owner, KIND_CONTAINER, &config.pod, config.attempt, &config.cgroup_parent);
    labels.insert(SANDBOX.into(), sandbox.to_string());
    labels.insert(CONTAINER.into(), config.name.clone());
    labels.insert(IMAGE_REF.into(), config.image_ref.clone());
    for (key, value) in &config.annotations {
        labels.insert(format!("{ANNOTATION_PREFIX}{key}"), value.clone());
    }
    labels
}

fn common(owner: &str, kind: &str, pod: &PodRef, attempt: u32, cgroup: &str) -> HashMap<String, String> {
    HashMap::from([
        (OWNER.into(), owner.into()),
        (KIND.into(), kind.into()),
        (POD_UID.into(), pod.uid.clone()),
        (POD_NAMESPACE.into(), pod.namespace.clone()),
        (POD_NAME.into(), pod.name.clone()),
        (ATTEMPT.into(), attempt.to_string()),
        (CGROUP.into(), cgroup.into()),
    ])
}

/// What the labels of one object say.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Facts {
    pub(super) sandbox_itself: bool,
    pub(super) pod: PodRef,
    pub(super) attempt: u32,
    /// Empty on a sandbox.
    pub(super) container: String,
    /// Empty on a sandbox.
    pub(super) sandbox: String,
    pub(super) addresses: Vec<IpAddr>,
    /// CNI plugins give it its addresses.
    pub(super) by_plugins: bool,
    pub(super) cgroup: String,
    pub(super) image_ref: String,
    pub(super) annotations: BTreeMap<String, String>,
}

/// Reads the labels of an object back; `None` if it is not an object of `owner`.
pub(super) fn read(owner: &str, labels: &HashMap<String, String>) -> Option<Facts> {
    let text = |key: &str| labels.get(key).cloned().unwrap_or_default();
    if labels.get(OWNER).map(String::as_str) != Some(owner) {
        return None;
    }
    let annotations = labels
        .iter()
        .filter_map(|(key, value)| Some((key.strip_prefix(ANNOTATION_PREFIX)?.to_owned(), value.clone())))
        .collect();
    Some(Facts {
        sandbox_itself: labels.get(KIND)? == KIND_SANDBOX,
        pod: PodRef { uid: text(POD_UID), namespace: text(POD_NAMESPACE), name: text(POD_NAME) },
        attempt: text(ATTEMPT).parse().ok()?,
        container: text(CONTAINER),
        sandbox: text(SANDBOX),
        addresses: text(ADDRESS).split(',').filter_map(|address| address.parse().ok()).collect(),
        by_plugins: labels.get(NETWORK).is_some_and(|network| network == PLUGINS),
        cgroup: text(CGROUP),
        image_ref: text(IMAGE_REF),
        annotations,
    })
}

/// A list filter: objects of `owner`, further narrowed by `more` (key, value).
pub(super) fn filter(owner: &str, more: &[(&str, &str)]) -> HashMap<String, Vec<String>> {
    let mut wanted = vec![format!("{OWNER}={owner}")];
    wanted.extend(more.iter().map(|(key, value)| format!("{key}={value}")));
    HashMap::from([("label".to_owned(), wanted)])
}

/// Name of the Docker container that holds a sandbox.
pub(super) fn sandbox_name(owner: &str, config: &SandboxConfig) -> String {
    object_name(owner, "POD", &config.pod, config.attempt)
}

/// Name of the Docker container of one attempt. It is a function of what identifies the attempt, so a create that was
/// cut off before its answer arrived is found by the name being taken.
pub(super) fn container_name(owner: &str, config: &ContainerConfig) -> String {
    object_name(owner, &config.name, &config.pod, config.attempt)
}

/// Owner, container, UID and attempt identify; the Pod's name and namespace are for people and are cut to fit.
fn object_name(owner: &str, container: &str, pod: &PodRef, attempt: u32) -> String {
    let part = |text: &str, longest: usize| -> String { text.chars().take(longest).map(plain).collect() };
    format!(
        "lambdalet_{}_{}_{}_{}_{}_{attempt}",
        part(owner, 63),
        part(container, 63),
        part(&pod.name, 40),
        part(&pod.namespace, 30),
        part(&pod.uid, 64),
    )
}

/// Docker allows `[a-zA-Z0-9_.-]` in a name.
fn plain(c: char) -> char {
    if c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-') { c } else { '-' }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod() -> PodRef {
        PodRef { uid: "0c9d-uid".into(), namespace: "default".into(), name: "web".into() }
    }

    #[test]
    fn what_is_written_on_a_sandbox_reads_back() {
        let mut labels = common("o1", KIND_SANDBOX, &pod(), 3, "/l/pod1");
        labels.insert(ADDRESS.into(), "10.1.2.3,fd00::3".into());
        let facts = read("o1", &labels).unwrap();
        assert!(facts.sandbox_itself);
        assert_eq!((facts.pod, facts.attempt, facts.cgroup.as_str()), (pod(), 3, "/l/pod1"));
        assert_eq!(facts.addresses, ["10.1.2.3", "fd00::3"].map(|text| text.parse::<IpAddr>().unwrap()));
        assert!(!facts.by_plugins);
        labels.insert(NETWORK.into(), PLUGINS.into());
        assert!(read("o1", &labels).unwrap().by_plugins);
    }

    #[test]
    fn an_object_of_another_owner_is_not_ours() {
        let labels = common("o1", KIND_SANDBOX, &pod(), 0, "/");
        assert_eq!(read("o2", &labels), None);
        assert_eq!(read("o1", &HashMap::new()), None);
    }

    #[test]
    fn a_name_keeps_to_dockers_letters_and_stays_short() {
        let long = PodRef { uid: "u".repeat(36), namespace: "n".repeat(63), name: "p.".repeat(126) };
        let name = object_name("o", &"c".repeat(63), &long, u32::MAX);
        assert!(name.len() < 255, "{name}");
        assert!(object_name("ä/b", "c", &pod(), 0).chars().all(|c| plain(c) == c));
    }
}
