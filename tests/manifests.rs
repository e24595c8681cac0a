//! What `manifests/` holds: every document is what the API server takes it for, field by field, and the examples ask
//! for nothing this node leaves out.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::autoscaling::v2::HorizontalPodAutoscaler;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Pod, PodSpec, Secret, Service, ServiceAccount, Toleration};
use k8s_openapi::api::node::v1::RuntimeClass;
use k8s_openapi::api::rbac::v1::{ClusterRole, ClusterRoleBinding, Role, RoleBinding};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use lambdalet::pod::unsupported;

/// The label by which examples find their node.
const NODE_LABEL: &str = "lambdalet.dev/node";

/// One YAML document.
struct Document {
    file: PathBuf,
    raw: Value,
}

impl Document {
    fn text(&self, pointer: &str) -> &str {
        self.raw.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
    }

    /// For messages: `manifests/rbac.yaml, ClusterRole lambdalet:node`.
    fn name(&self) -> String {
        format!("{}, {} {}", self.file.display(), self.text("/kind"), self.text("/metadata/name"))
    }

    fn decode<T: DeserializeOwned>(&self) -> T {
        serde_json::from_value(self.raw.clone()).unwrap_or_else(|error| panic!("{}: {error}", self.name()))
    }

    /// Fields that are lost when the document is read as `T` and written again: misspelled, or in the wrong place.
    fn unknown_fields<T: DeserializeOwned + Serialize>(&self) -> Vec<String> {
        let known = serde_json::to_value(self.decode::<T>()).expect("an API object can be written as JSON");
        let mut lost = Vec::new();
        collect_lost(&self.raw, &known, "", &mut lost);
        lost
    }
}

fn collect_lost(raw: &Value, known: &Value, path: &str, lost: &mut Vec<String>) {
    match (raw, known) {
        (Value::Object(raw), Value::Object(known)) => {
            for (name, value) in raw {
                match known.get(name) {
                    Some(known) => collect_lost(value, known, &format!("{path}.{name}"), lost),
                    None => lost.push(format!("{path}.{name}")),
                }
            }
        }
        (Value::Array(raw), Value::Array(known)) if raw.len() == known.len() => {
            for (at, (value, known)) in raw.iter().zip(known).enumerate() {
                collect_lost(value, known, &format!("{path}[{at}]"), lost);
            }
        }
        _ if raw == known => {}
        _ => lost.push(format!("{path}: {raw} is read as {known}")),
    }
}

/// A kustomization, as far as ours goes.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Kustomization {
    api_version: String,
    kind: String,
    resources: Vec<String>,
    images: Vec<KustomizedImage>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct KustomizedImage {
    name: String,
    new_tag: String,
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// For Grafana and Prometheus (and `tests/dashboard.rs`), and for containerd's network.
const NOT_FOR_KUBERNETES: [&str; 2] = ["manifests/grafana", "manifests/cni"];

/// Every `.yaml` below `manifests/` that is for Kubernetes, in order.
fn files() -> Vec<PathBuf> {
    let (mut files, mut folders) = (Vec::new(), vec![root().join("manifests")]);
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).expect("manifests can be read") {
            let path = entry.expect("its entries can be read").path();
            match path.extension().and_then(|extension| extension.to_str()) {
                _ if NOT_FOR_KUBERNETES.iter().any(|folder| path == root().join(folder)) => {}
                _ if path.is_dir() => folders.push(path),
                Some("yaml") => files.push(path.strip_prefix(root()).expect("it is below the root").to_owned()),
                Some("md") => {}
                _ => panic!("{}: a manifest ends in .yaml", path.display()),
            }
        }
    }
    files.sort();
    files
}

fn documents() -> Vec<Document> {
    let parse = |file: PathBuf| {
        let text = fs::read_to_string(root().join(&file)).expect("manifests are UTF-8");
        let raw: Vec<Value> =
            serde_saphyr::from_multiple(&text).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        assert!(!raw.is_empty(), "{} holds nothing", file.display());
        raw.into_iter().map(move |raw| Document { file: file.clone(), raw })
    };
    files().into_iter().flat_map(parse).collect()
}

/// What is lost of a document of a kind we use.
fn lost(document: &Document) -> Vec<String> {
    match (document.text("/apiVersion"), document.text("/kind")) {
        ("v1", "ConfigMap") => document.unknown_fields::<ConfigMap>(),
        ("v1", "Namespace") => document.unknown_fields::<Namespace>(),
        ("v1", "Pod") => document.unknown_fields::<Pod>(),
        ("v1", "Secret") => document.unknown_fields::<Secret>(),
        ("v1", "Service") => document.unknown_fields::<Service>(),
        ("v1", "ServiceAccount") => document.unknown_fields::<ServiceAccount>(),
        ("apps/v1", "Deployment") => document.unknown_fields::<Deployment>(),
        ("autoscaling/v2", "HorizontalPodAutoscaler") => document.unknown_fields::<HorizontalPodAutoscaler>(),
        ("node.k8s.io/v1", "RuntimeClass") => document.unknown_fields::<RuntimeClass>(),
        ("rbac.authorization.k8s.io/v1", "ClusterRole") => document.unknown_fields::<ClusterRole>(),
        ("rbac.authorization.k8s.io/v1", "ClusterRoleBinding") => document.unknown_fields::<ClusterRoleBinding>(),
        ("rbac.authorization.k8s.io/v1", "Role") => document.unknown_fields::<Role>(),
        ("rbac.authorization.k8s.io/v1", "RoleBinding") => document.unknown_fields::<RoleBinding>(),
        ("kustomize.config.k8s.io/v1beta1", "Kustomization") => document.unknown_fields::<Kustomization>(),
        (version, kind) => panic!("{}: teach tests/manifests.rs {version} {kind}", document.name()),
    }
}

/// Every Pod spec, also those inside Deployments, with the document it comes from.
fn pod_specs() -> Vec<(Document, PodSpec)> {
    let spec = |document: Document| {
        let spec = match document.text("/kind") {
            "Pod" => document.decode::<Pod>().spec,
            "Deployment" => document.decode::<Deployment>().spec.template.spec,
            _ => None,
        };
        spec.map(|spec| (document, spec))
    };
    documents().into_iter().filter_map(spec).collect()
}

/// The environment variable of a container's own value.
fn variable<'a>(spec: &'a PodSpec, name: &str) -> &'a str {
    let variables = spec.containers.iter().flat_map(|container| container.env.iter().flatten());
    let value = variables.filter(|variable| variable.name == name).find_map(|variable| variable.value.as_deref());
    value.unwrap_or_else(|| panic!("no container has the variable {name}"))
}

#[test]
fn every_document_is_read_to_its_last_field() {
    for document in documents() {
        let lost = lost(&document);
        assert!(lost.is_empty(), "{}: no such field, or another value: {}", document.name(), lost.join(", "));
    }
}

#[test]
fn a_misspelled_field_is_found() {
    let raw = serde_json::json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a", "labelz": {}},
        "spec": {"containers": [{"name": "c", "resource": {}, "ports": [{"containerPort": 80, "hostport": 1}]}]},
    });
    let document = Document { file: "bad.yaml".into(), raw };
    let mut lost = lost(&document);
    lost.sort();
    assert_eq!(lost, [".metadata.labelz", ".spec.containers[0].ports[0].hostport", ".spec.containers[0].resource"]);
}

#[test]
fn examples_land_on_this_node_and_lose_nothing_there() {
    for (document, spec) in pod_specs() {
        let name = document.name();
        let selector = spec.node_selector.clone().unwrap_or_default();
        assert!(selector.contains_key(NODE_LABEL), "{name}: without nodeSelector {NODE_LABEL} it may land anywhere");
        if let Some(trouble) = unsupported::refusal(&Pod::default(), &spec) {
            panic!("{name}: this node refuses it: {}", trouble.message);
        }
        let omissions = unsupported::omissions(&Pod::default(), &spec);
        assert!(omissions.is_empty(), "{name}: this node leaves out: {}", omissions.join("; "));
        for volume in spec.volumes.iter().flatten() {
            let kinds = [
                volume.empty_dir.is_some(),
                volume.host_path.is_some(),
                volume.config_map.is_some(),
                volume.secret.is_some(),
                volume.downward_api.is_some(),
                volume.projected.is_some(),
            ];
            assert!(kinds.contains(&true), "{name}: volume {} is of a type this node does not have", volume.name);
        }
    }
}

#[test]
fn every_image_can_be_built_without_a_registry() {
    let output = Command::new(root().join("hack/images")).arg("--list").output().expect("hack/images runs");
    let list = String::from_utf8(output.stdout).expect("names are UTF-8");
    for (document, spec) in pod_specs() {
        for container in spec.containers.iter().chain(spec.init_containers.iter().flatten()) {
            let image = container.image.as_deref().unwrap_or_default();
            assert!(list.lines().any(|line| line == image), "{}: hack/images does not make {image}", document.name());
        }
    }
}

#[test]
fn the_fakecloud_deployment_agrees_with_its_service_and_itself() {
    let found = |kind: &str| {
        let is_it =
            |document: &Document| document.file.starts_with("manifests/fakecloud") && document.text("/kind") == kind;
        documents().into_iter().find(is_it).unwrap_or_else(|| panic!("manifests/fakecloud has no {kind}"))
    };
    let (_, spec) =
        pod_specs().into_iter().find(|(d, _)| d.file.starts_with("manifests/fakecloud")).expect("a Pod spec");
    let service = found("Service");
    let (name, namespace) = (service.text("/metadata/name"), service.text("/metadata/namespace"));
    let port = service.raw.pointer("/spec/ports/0/port").and_then(Value::as_i64).expect("the Service has a port");
    let url = format!("http://{name}.{namespace}.svc.cluster.local:{port}");
    assert_eq!(variable(&spec, "FAKECLOUD_K8S_SELF_URL"), url);

    let selector = spec.node_selector.clone().unwrap_or_default();
    let selector: Vec<String> = selector.iter().map(|(key, value)| format!("{key}={value}")).collect();
    assert_eq!(variable(&spec, "FAKECLOUD_K8S_NODE_SELECTOR"), selector.join(","));
    let tolerations: Vec<Toleration> =
        serde_json::from_str(variable(&spec, "FAKECLOUD_K8S_TOLERATIONS")).expect("fakecloud reads a JSON list");
    assert_eq!(Some(tolerations), spec.tolerations);

    let account = found("ServiceAccount");
    assert_eq!(spec.service_account_name.as_deref(), Some(account.text("/metadata/name")));
    let kustomization: Kustomization = found("Kustomization").decode();
    for file in &kustomization.resources {
        assert!(root().join("manifests/fakecloud").join(file).exists(), "kustomization.yaml names {file}");
    }
    let image = &kustomization.images[0];
    assert_eq!(spec.containers[0].image, Some(format!("{}:{}", image.name, image.new_tag)));
}

/// Whether the namespace was made here; waits for an earlier one of that name to be gone.
fn create(kubectl: &dyn Fn(&[&str]) -> (bool, String), name: &str) -> bool {
    if kubectl(&["get", "namespace", name, "-o", "name"]).0 {
        let active = ["wait", "namespace", name, "--for=jsonpath={.status.phase}=Active", "--timeout=1s"];
        if kubectl(&active).0 {
            return false;
        }
        kubectl(&["wait", "namespace", name, "--for=delete", "--timeout=60s"]);
    }
    let (made, text) = kubectl(&["create", "namespace", name]);
    assert!(made, "failed to make namespace {name}: {text}");
    true
}

/// Needs a running `hack/cluster`: `LAMBDALET_TEST_CLUSTER=D cargo test --test manifests -- --ignored`.
#[test]
#[ignore = "needs cluster (LAMBDALET_TEST_CLUSTER names its directory)"]
fn server_side_dry_run_takes_every_document() {
    let cluster =
        std::env::var("LAMBDALET_TEST_CLUSTER").expect("LAMBDALET_TEST_CLUSTER names a hack/cluster directory");
    let kubectl = |args: &[&str]| {
        let mut command = Command::new(root().join("hack/cluster"));
        let output = command.args(["--dir", &cluster, "kubectl"]).args(args).output().expect("hack/cluster runs");
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        (output.status.success(), text)
    };
    // A dry run makes no namespace, and what is in one needs it.
    let namespaces: Vec<Document> = documents().into_iter().filter(|d| d.text("/kind") == "Namespace").collect();
    let made: Vec<&str> =
        namespaces.iter().map(|d| d.text("/metadata/name")).filter(|name| create(&kubectl, name)).collect();
    let mut refused = Vec::new();
    for file in files().iter().filter(|file| !file.ends_with("kustomization.yaml")) {
        let path = root().join(file).display().to_string();
        let (taken, text) = kubectl(&[
            "apply",
            "--server-side",
            "--dry-run=server",
            "--validate=strict",
            "--force-conflicts",
            "-f",
            &path,
        ]);
        if !taken {
            refused.push(format!("{}: {text}", file.display()));
        }
    }
    let folder = root().join("manifests/fakecloud").display().to_string();
    let (taken, text) = kubectl(&[
        "apply",
        "--server-side",
        "--dry-run=server",
        "--validate=strict",
        "--force-conflicts",
        "-k",
        &folder,
    ]);
    if !taken {
        refused.push(format!("kustomization in {folder}: {text}"));
    }
    for name in made {
        kubectl(&["delete", "namespace", name, "--timeout=60s"]);
    }
    assert!(refused.is_empty(), "the API server refuses\n{}", refused.join("\n"));
}
