//! Static Pods: those in files of this node, which run whether there is an API server or not.
//!
//! ```text
//! files --source--> StaticPods --watch::statics--> a worker each
//!                                      '--mirror--> a mirror Pod on the API server, which shows it and its status
//! ```
//! What a file says decides its Pod's identity: an edited file is another Pod, which takes the place of the one before
//! (Kubernetes documentation, "Create static Pods"; annotations and defaults are the kubelet's).

pub mod source;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Container, Pod, PodSpec, Toleration, Volume};
use serde_json::Value;
use sha2::{Digest as _, Sha256};

use super::qos::CRITICAL_PRIORITY;
use crate::config::document::{decode, decode_object};

/// What a file of a static Pod says, as a word; also the Pod's UID on this node.
pub const HASH: &str = "kubernetes.io/config.hash";
/// Where a Pod is from: `file`.
pub const SOURCE: &str = "kubernetes.io/config.source";
/// When this node first saw the file.
pub const SEEN: &str = "kubernetes.io/config.seen";
/// On a mirror Pod: the [`HASH`] of the static Pod that it shows.
pub const MIRROR: &str = "kubernetes.io/config.mirror";

/// Digits of the hash: as many as a kubelet's has.
const HASH_BYTES: usize = 16;
/// Priorities of the classes that every cluster has; those of others only an API server knows.
const CLASSES: [(&str, i32); 2] =
    [("system-node-critical", CRITICAL_PRIORITY + 1000), ("system-cluster-critical", CRITICAL_PRIORITY)];

/// The static Pods of this node.
#[derive(Clone, Debug, Default)]
pub struct StaticPods {
    /// Whether their files were looked for.
    pub read: bool,
    /// By UID.
    pub pods: BTreeMap<String, Arc<Pod>>,
}

impl StaticPods {
    /// What there is where none are looked for.
    pub fn none() -> Self {
        Self { read: true, pods: BTreeMap::new() }
    }
}

/// Why a file makes no Pod.
#[derive(Debug, thiserror::Error)]
pub enum StaticError {
    /// It cannot be read.
    #[error("failed to read {file}", file = file.display())]
    Read {
        /// The file.
        file: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It is not YAML or JSON, or a field has the wrong type.
    #[error("failed to parse {file} as a Pod: {message}", file = file.display())]
    Parse {
        /// The file.
        file: PathBuf,
        /// What and where.
        message: String,
    },
    /// It is a Pod that cannot be run as it is.
    #[error("the Pod in {file} cannot be run: {why}", file = file.display())]
    Refused {
        /// The file.
        file: PathBuf,
        /// Why.
        why: String,
    },
}

/// Namespace and name, which no two Pods of a cluster share.
pub type Key = (String, String);

/// Of a Pod.
pub fn key(pod: &Pod) -> Key {
    (pod.metadata.namespace.clone().unwrap_or_default(), pod.metadata.name.clone().unwrap_or_default())
}

/// The static Pod that a mirror Pod shows, by its hash; `None` of any other Pod.
pub fn mirrored(pod: &Pod) -> Option<&str> {
    annotation(pod, MIRROR)
}

/// Whether the Pod is from a file of this node.
pub fn is_static(pod: &Pod) -> bool {
    mirrored(pod).is_none() && annotation(pod, SOURCE) == Some("file")
}

/// Whether it can be let in before there is a Node object: it is static, and asks for no label of the Node.
pub fn is_independent(pod: &Pod) -> bool {
    let picky = pod.spec.as_ref().is_some_and(|spec| spec.node_selector.is_some() || spec.affinity.is_some());
    is_static(pod) && !picky
}

fn annotation<'a>(pod: &'a Pod, name: &str) -> Option<&'a str> {
    pod.metadata.annotations.as_ref()?.get(name).map(String::as_str)
}

/// The Pod that a file describes, with the name it has in the cluster and the defaults that an API server would have
/// filled in. [`SEEN`] is left to the caller.
///
/// # Errors
/// It is no Pod, a name in it is none, or it needs something of the API server.
pub fn read(text: &str, file: &Path, node: &str) -> Result<Pod, StaticError> {
    let parse = |message| StaticError::Parse { file: file.to_owned(), message };
    let refused = |why: String| StaticError::Refused { file: file.to_owned(), why };
    let raw: Value = decode(text).map_err(parse)?;
    if (raw["apiVersion"].as_str(), raw["kind"].as_str()) != (Some("v1"), Some("Pod")) {
        return Err(parse(format!("it holds {} {}, not v1 Pod", raw["apiVersion"], raw["kind"])));
    }
    let mut pod: Pod = decode_object(raw).map_err(parse)?;
    pod.status = None;
    let hash = hash(&pod, file, node);
    let Some(spec) = &mut pod.spec else { return Err(refused("it has no spec".to_owned())) };
    check_names(spec).map_err(refused)?;
    if let Some(what) = reference(spec) {
        return Err(refused(format!("static pods may not reference {what}")));
    }
    fill_in(spec, node);
    let meta = &mut pod.metadata;
    let name = meta
        .name
        .as_deref()
        .filter(|name| is_name(name, 253))
        .ok_or_else(|| refused("it has no usable name".to_owned()))?;
    let name = format!("{name}-{}", node.to_lowercase());
    if !is_name(&name, 253) {
        return Err(refused(format!("{name:?} is too long for a Pod's name")));
    }
    let namespace = meta.namespace.get_or_insert_with(|| "default".to_owned());
    if !is_name(namespace, 63) {
        return Err(refused(format!("{namespace:?} is no namespace")));
    }
    meta.name = Some(name);
    let annotations = meta.annotations.get_or_insert_default();
    annotations.insert(HASH.to_owned(), hash.clone());
    annotations.insert(SOURCE.to_owned(), "file".to_owned());
    // On the host it names directories and cgroups: a word of ours, whatever the file says.
    meta.uid = Some(hash);
    Ok(pod)
}

/// The same file on another node, or the same Pod in another file, is another Pod.
fn hash(pod: &Pod, file: &Path, node: &str) -> String {
    let mut digest = Sha256::new();
    digest.update(serde_json::to_vec(pod).unwrap_or_default());
    digest.update(format!("\nhost:{node}\nfile:{}", file.display()));
    digest.finalize().iter().take(HASH_BYTES).map(|byte| format!("{byte:02x}")).collect()
}

/// A DNS name of that length at most; whatever else is in it may become part of a path.
fn is_name(name: &str, longest: usize) -> bool {
    let inner = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-' || (c == '.' && longest > 63);
    let part = |part: &str| !part.is_empty() && !part.starts_with('-') && !part.ends_with('-');
    name.len() <= longest && name.chars().all(inner) && name.split('.').all(part)
}

/// No API server has checked them.
fn check_names(spec: &PodSpec) -> Result<(), String> {
    let containers = || spec.containers.iter().chain(spec.init_containers.iter().flatten());
    if spec.containers.is_empty() {
        return Err("it has no containers".to_owned());
    }
    if let Some(wrong) = containers().find(|c| !is_name(&c.name, 63)) {
        return Err(format!("{:?} is no container's name", wrong.name));
    }
    if let Some(bare) = containers().find(|c| c.image.as_deref().is_none_or(str::is_empty)) {
        return Err(format!("container {:?} has no image", bare.name));
    }
    if let Some(wrong) = spec.volumes.iter().flatten().find(|volume| !is_name(&volume.name, 63)) {
        return Err(format!("{:?} is no volume's name", wrong.name));
    }
    let mut names: Vec<_> = containers().map(|c| &c.name).collect();
    names.sort();
    match names.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => Err(format!("two containers are called {:?}", pair[0])),
        None => Ok(()),
    }
}

/// What of the API server the Pod needs, if anything: there may be none.
fn reference(spec: &PodSpec) -> Option<&'static str> {
    let named = |name: &Option<String>| name.as_deref().is_some_and(|name| !name.is_empty());
    if named(&spec.service_account_name) || named(&spec.service_account) {
        return Some("serviceaccounts");
    }
    if spec.image_pull_secrets.as_ref().is_some_and(|secrets| !secrets.is_empty()) {
        return Some("secrets");
    }
    if spec.resource_claims.as_ref().is_some_and(|claims| !claims.is_empty()) {
        return Some("resourceclaims");
    }
    if spec.ephemeral_containers.as_ref().is_some_and(|containers| !containers.is_empty()) {
        return Some("ephemeral containers");
    }
    let containers = spec.containers.iter().chain(spec.init_containers.iter().flatten());
    containers.into_iter().find_map(in_environment).or_else(|| spec.volumes.iter().flatten().find_map(in_volume))
}

fn in_environment(container: &Container) -> Option<&'static str> {
    let sources = container.env.iter().flatten().filter_map(|variable| variable.value_from.as_ref());
    let of_variable = sources.into_iter().find_map(|from| match () {
        () if from.secret_key_ref.is_some() => Some("secrets"),
        () if from.config_map_key_ref.is_some() => Some("configmaps"),
        () => None,
    });
    of_variable.or_else(|| {
        container.env_from.iter().flatten().find_map(|from| match () {
            () if from.secret_ref.is_some() => Some("secrets"),
            () if from.config_map_ref.is_some() => Some("configmaps"),
            () => None,
        })
    })
}

fn in_volume(volume: &Volume) -> Option<&'static str> {
    if volume.config_map.is_some() {
        return Some("configmaps (via configmap volumes)");
    }
    if volume.secret.is_some() {
        return Some("secrets (via secret volumes)");
    }
    if volume.persistent_volume_claim.is_some() || volume.ephemeral.is_some() {
        return Some("persistentvolumeclaims");
    }
    if volume.csi.is_some() {
        return Some("csidrivers (via CSI volumes)");
    }
    let projected = volume.projected.as_ref().and_then(|projected| projected.sources.as_ref());
    // Of all its sources only the downward API is not the API server's.
    let foreign = projected.into_iter().flatten().any(|source| source.downward_api.is_none());
    foreign.then_some("API objects (via projected volumes)")
}

/// What an API server fills in, as far as anything here asks for it, and what a kubelet adds to a static Pod.
fn fill_in(spec: &mut PodSpec, node: &str) {
    spec.node_name = Some(node.to_owned());
    spec.restart_policy.get_or_insert_with(|| "Always".to_owned());
    spec.dns_policy.get_or_insert_with(|| "ClusterFirst".to_owned());
    spec.termination_grace_period_seconds.get_or_insert(30);
    // It must start without an API server, which alone knows the Services.
    spec.enable_service_links.get_or_insert(false);
    if let Some((_, priority)) = CLASSES.iter().find(|(name, _)| spec.priority_class_name.as_deref() == Some(*name)) {
        spec.priority = Some(*priority);
    }
    for container in spec.containers.iter_mut().chain(spec.init_containers.iter_mut().flatten()) {
        let Some(resources) = &mut container.resources else { continue };
        let requests = resources.requests.get_or_insert_default();
        for (name, limit) in resources.limits.iter().flatten() {
            requests.entry(name.clone()).or_insert_with(|| limit.clone());
        }
    }
    // Trouble with the node does not evict it.
    let endures = Toleration {
        operator: Some("Exists".to_owned()),
        effect: Some("NoExecute".to_owned()),
        ..Toleration::default()
    };
    let tolerations = spec.tolerations.get_or_insert_default();
    if !tolerations.contains(&endures) {
        tolerations.push(endures);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn file(text: &str) -> Result<Pod, StaticError> {
        read(text, Path::new("/m/web.yaml"), "Node-1")
    }

    const HEAD: &str = "apiVersion: v1\nkind: Pod\nmetadata: {name: web, uid: ../../etc}\nspec:\n";

    fn with(spec: &str) -> Result<Pod, StaticError> {
        file(&format!("{HEAD}  containers: [{{name: c, image: i}}]\n{spec}"))
    }

    #[test]
    fn a_file_makes_a_pod_of_this_node() {
        let pod = with("  priorityClassName: system-node-critical\n").unwrap();
        assert_eq!(key(&pod), ("default".to_owned(), "web-node-1".to_owned()));
        let uid = pod.metadata.uid.clone().unwrap();
        assert!(uid.len() == 32 && uid.chars().all(|c| c.is_ascii_hexdigit()), "{uid}");
        assert_eq!((annotation(&pod, HASH), annotation(&pod, SOURCE)), (Some(uid.as_str()), Some("file")));
        assert!(is_static(&pod) && mirrored(&pod).is_none());
        let spec = pod.spec.unwrap();
        assert_eq!((spec.node_name.as_deref(), spec.priority), (Some("Node-1"), Some(2_000_001_000)));
        assert_eq!(spec.restart_policy.as_deref(), Some("Always"));
        assert_eq!(spec.tolerations.unwrap()[0].effect.as_deref(), Some("NoExecute"));
    }

    #[test]
    fn what_the_file_says_and_where_it_is_make_the_identity() {
        let uid = |pod: Pod| pod.metadata.uid.unwrap();
        let text = format!("{HEAD}  containers: [{{name: c, image: i}}]\n");
        let one = uid(file(&text).unwrap());
        assert_eq!(uid(file(&format!("{text}# a remark\n")).unwrap()), one);
        assert_ne!(uid(file(&text.replace("image: i", "image: j")).unwrap()), one);
        assert_ne!(uid(read(&text, Path::new("/m/other.yaml"), "Node-1").unwrap()), one);
        assert_ne!(uid(read(&text, Path::new("/m/web.yaml"), "n2").unwrap()), one);
    }

    #[test]
    fn a_field_of_the_wrong_type_is_named() {
        let error = with("  terminationGracePeriodSeconds: soon\n").unwrap_err().to_string();
        assert!(error.contains("web.yaml") && error.contains("field spec.terminationGracePeriodSeconds: "), "{error}");
        let ports = file(&format!("{HEAD}  containers: [{{name: c, image: i, ports: [{{containerPort: []}}]}}]\n"));
        assert!(ports.unwrap_err().to_string().contains("field spec.containers[0].ports[0].containerPort: "));
    }

    #[test]
    fn what_needs_the_api_server_is_refused_by_name() {
        for (spec, what) in [
            ("  serviceAccountName: a\n", "serviceaccounts"),
            ("  imagePullSecrets: [{name: s}]\n", "secrets"),
            ("  volumes: [{name: v, configMap: {name: m}}]\n", "configmaps (via configmap volumes)"),
            ("  volumes: [{name: v, secret: {secretName: m}}]\n", "secrets (via secret volumes)"),
            ("  volumes: [{name: v, persistentVolumeClaim: {claimName: m}}]\n", "persistentvolumeclaims"),
            ("  volumes: [{name: v, projected: {sources: [{serviceAccountToken: {path: t}}]}}]\n", "projected"),
            ("  initContainers: [{name: i, image: i, envFrom: [{secretRef: {name: s}}]}]\n", "secrets"),
            (
                "  initContainers: [{name: i, image: i, env: [{name: A, valueFrom: {configMapKeyRef: {key: k, name: m}}}]}]\n",
                "configmaps",
            ),
        ] {
            let error = with(spec).unwrap_err().to_string();
            assert!(
                error.contains("/m/web.yaml") && error.contains(&format!("reference {what}")) || error.contains(what),
                "{error}"
            );
        }
        let own =
            "  volumes: [{name: v, emptyDir: {}}, {name: w, projected: {sources: [{downwardAPI: {items: []}}]}}]\n";
        with(own).unwrap();
    }

    #[test]
    fn names_that_would_leave_their_directory_are_refused() {
        for spec in [
            "  containers: []\n",
            "  containers: [{name: ../c, image: i}]\n",
            "  containers: [{name: c}]\n",
            "  containers: [{name: c, image: i}, {name: c, image: i}]\n",
            "  containers: [{name: c, image: i}]\n  volumes: [{name: ../v, emptyDir: {}}]\n",
        ] {
            assert!(matches!(file(&format!("{HEAD}{spec}")), Err(StaticError::Refused { .. })), "{spec}");
        }
        let text = "apiVersion: v1\nkind: Pod\nmetadata: {name: ../w}\nspec: {containers: [{name: c, image: i}]}\n";
        assert!(matches!(file(text), Err(StaticError::Refused { .. })));
        let list = file("apiVersion: v1\nkind: ConfigMap\n").unwrap_err().to_string();
        assert!(list.contains("ConfigMap") && list.contains("not v1 Pod"), "{list}");
    }

    #[test]
    fn requests_that_are_not_there_are_the_limits() {
        let pod =
            file(&format!("{HEAD}  containers: [{{name: c, image: i, resources: {{limits: {{cpu: 1}}}}}}]\n")).unwrap();
        let requests = pod.spec.unwrap().containers[0].resources.clone().unwrap().requests.unwrap();
        assert_eq!(requests["cpu"].0, "1");
    }

    proptest! {
        #[test]
        fn no_text_makes_it_panic_or_names_a_directory_of_its_own(text in "[a-z:{}\\[\\]\"'/.\n -]{0,120}") {
            for text in [text.clone(), format!("{HEAD}{text}")] {
                if let Ok(pod) = file(&text) {
                    prop_assert!(pod.metadata.uid.unwrap().chars().all(|c| c.is_ascii_hexdigit()));
                }
            }
        }
    }
}
